"""What JAX sees, which back end each kernel would take and why the others refuse, and room on the disks."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from experiments.doctor.environment import ROOT
from experiments.doctor.finding import Finding

MODEL_SHAPES = ("cpu", "mixtral", "olmoe", "deepseek_v2_lite", "qwen3_moe", "olmoe_decode")
"""Names in ``kernels_pallas/grouped_matmul/specs.py``: a small one and those of published models."""
DTYPES = ("float32", "bfloat16")
GIB = 2**30


def device_findings(facts: dict[str, Any]) -> list[Finding]:
    """Starts JAX's back end; ``facts["devices"]`` and ``facts["platform"]`` are filled in."""
    try:
        import jax  # refuses versions of jaxlib that do not fit

        devices = jax.devices()
    except Exception as error:  # RuntimeError as a rule; plugins raise what they like
        return [
            Finding(
                "error",
                "devices",
                f"JAX cannot start its back end: {' '.join(str(error).split())[:600]}",
                "nothing can run",
                "check nvidia-smi and the driver; JAX_PLATFORMS=cpu runs on the CPU meanwhile; "
                "bash scripts/setup_env.sh cuda (or tpu) installs the plugin anew",
            )
        ]
    facts["platform"] = jax.default_backend()
    facts["devices"] = [
        {
            "kind": d.device_kind,
            "platform": d.platform,
            "memory_bytes": _memory(d),
            "compute_capability": getattr(d, "compute_capability", None),
        }
        for d in devices
    ]
    kinds: dict[str, int] = {}
    for fact in facts["devices"]:
        words: list[str] = [str(fact["kind"])]
        if fact["memory_bytes"]:
            words.append(f"{fact['memory_bytes'] / GIB:.1f} GiB")
        if fact["compute_capability"]:
            words.append(f"compute capability {fact['compute_capability']}")
        name = ", ".join(words)
        kinds[name] = kinds.get(name, 0) + 1
    listed = "; ".join(f"{count} x {name}" for name, count in kinds.items())
    drivers = sorted({gpu["driver"] for gpu in facts.get("gpus", [])})
    if drivers:
        listed += f"; NVIDIA driver {', '.join(drivers)}"
    return [
        Finding(
            "ok", "devices", f"{facts['platform']}: {listed}; process {jax.process_index()} of {jax.process_count()}"
        )
    ]


def _memory(device: Any) -> int | None:
    try:
        stats = device.memory_stats()
    except Exception:  # not every platform counts
        return None
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def explanations() -> list[dict[str, Any]]:
    """For each operation, type and shape: the back end that would run, and the reasons of those that refuse."""
    import jax
    import jax.numpy as jnp

    import kernels_pallas
    from kernels_pallas.grouped_matmul.specs import SHAPES

    found = []
    for dtype in DTYPES:
        for name in MODEL_SHAPES:
            shape = SHAPES[name]
            xs, sizes, weights = shape.abstract(jnp.dtype(dtype))
            top_k = 8 if shape.experts >= 64 else 2
            tokens = shape.rows // top_k
            x = jax.ShapeDtypeStruct((tokens, shape.d_model), dtype)
            expert = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
            gate = jax.ShapeDtypeStruct((tokens, top_k), jnp.float32)
            for operation, args in (
                (kernels_pallas.GROUPED_MATMUL, (xs, weights.up, sizes)),
                (kernels_pallas.GROUPED_FFN, (xs, sizes, weights, "swiglu")),
                (kernels_pallas.MOE_FFN, (x, expert, gate, weights, "swiglu")),
            ):
                e = operation.explain(*args)
                found.append(
                    {
                        "operation": e.operation,
                        "dtype": dtype,
                        "shape": name,
                        "chosen": e.chosen,
                        "refusals": e.refusals,
                        "order": list(e.order),
                    }
                )
    return found


def kernel_findings(facts: dict[str, Any]) -> list[Finding]:
    """One finding for each operation and type; ``facts["kernels"]`` holds every shape."""
    facts["kernels"] = explanations()
    found = []
    for operation in dict.fromkeys(e["operation"] for e in facts["kernels"]):
        for dtype in DTYPES:
            mine = [e for e in facts["kernels"] if (e["operation"], e["dtype"]) == (operation, dtype)]
            found.append(_kernel_finding(operation, dtype, mine, facts.get("platform", "")))
    return found


def _kernel_finding(operation: str, dtype: str, mine: list[dict[str, Any]], platform: str) -> Finding:
    chosen: dict[str, list[str]] = {}
    for e in mine:
        chosen.setdefault(e["chosen"] or "nothing", []).append(e["shape"])
    listed = "; ".join(name + (f" ({', '.join(shapes)})" if len(chosen) > 1 else "") for name, shapes in chosen.items())
    what = f"{operation}, {dtype}: {listed}"
    first = mine[0]["order"][0]
    reasons = list(dict.fromkeys(e["refusals"][first] for e in mine if first in e["refusals"]))
    others = {name: reason for e in mine for name, reason in e["refusals"].items() if name != first}
    refused = [*(f"{first}: {r}" for r in reasons), *(f"{n}: {r}" for n, r in others.items())]
    why = f"refused: {'; '.join(refused)}" if refused else ""
    if "nothing" in chosen:
        return Finding("error", "kernels", what, why, "set model.moe.implementation to a back end that runs here")
    # On an accelerator the fallback works and costs speed; for float32 there is no faster one to be had.
    slow = platform in ("gpu", "tpu") and dtype == "bfloat16" and reasons
    fix = "see docs/kernels.md for what the fast kernels ask of sizes, types and devices" if slow else ""
    return Finding("warning" if slow else "ok", "kernels", what, why, fix)


def disk_findings(workdir: Path, cache: Path, facts: dict[str, Any]) -> list[Finding]:
    """Whether the folders for runs and for compiled programs can be written, and how much room is left."""
    facts["disk"] = []
    return [_disk(name, path, facts["disk"]) for name, path in (("workdir", workdir), ("compile cache", cache))]


def _disk(name: str, path: Path, facts: list[dict[str, Any]]) -> Finding:
    there = path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    fact = {"name": name, "path": str(path), "free_bytes": free, "writable": True}
    facts.append(fact)
    what = f"{name} {path}: {free / GIB:.1f} GiB free"
    try:
        if not there.is_dir():
            raise NotADirectoryError(20, "not a folder")
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        fact["writable"] = False
        return Finding(
            "error",
            "disk",
            f"{name} {path}: {there} cannot be written ({error.strerror})",
            "a run ends before it begins" if name == "workdir" else "every run compiles everything again",
            "choose a folder that you may write" + (" with --workdir" if name == "workdir" else ""),
        )
    if free < GIB:
        return Finding("error", "disk", what, "the next checkpoint may not fit", "make room or choose another disk")
    if free < 10 * GIB:
        return Finding(
            "warning",
            "disk",
            what,
            "checkpoints of larger models may not fit: parameters and two moments, "
            "12 bytes for each parameter, as often as train.keep_checkpoints says",
            "make room",
        )
    return Finding("ok", "disk", what)


def cache_folder() -> Path:
    """Where runs keep compiled programs: JAX_COMPILATION_CACHE_DIR, else beside the data (``session``)."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("MOEJAX_CACHE") or ROOT / ".cache" / "data") / "programs"
