"""Measures the memory of a process that loads a published checkpoint, one results row for each mesh.

    python -m experiments.load_memory --output=rows.jsonl [--gigabytes=2] [--shards=4]
        [--mesh=data=1 --mesh=expert=8] [--rival=orbax]

Writes a checkpoint of random values, with OLMoE-1B-7B's layers, experts, heads and vocabulary at a width that gives it
that size, in bfloat16, each expert's matrices by themselves, in several files; then a new process loads it
(``experiments/load_once.py``), on CPU devices that are emulated where the mesh has several. What counts:

* **anonymous memory**, which the system cannot take back (RssAnon of /proc, looked at every 2 ms). On a CPU the arrays
  of the devices are part of it, so the row also says what remains beyond them: a host with an accelerator needs that.
* the whole resident memory (VmHWM, the kernel's own peak) holds the pages of the mapped files too, which the system
  takes back when it needs them.

Both count from the state in which JAX was ready and nothing was read. ``--rival=orbax`` adds Orbax's own reader, whose
tensors are then stacked. What a program frees goes back to the system as the allocator likes: settings of it in the
environment (``MALLOC_MMAP_THRESHOLD_``) stand in the row's name.
"""

import bisect
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags

from experiments import session
from moejax.config import ConfigError, MeshConfig
from moejax.importers import files
from moejax.plan import parse_mesh
from moejax.results import ResultRow, append_rows, environment_facts

PAPER, TABLE = "loading", "peak host memory"
ROOT = Path(__file__).resolve().parent.parent
INTERVAL = 0.002
"""Seconds between two looks at the process."""
SPARE = 64_000_000
"""Bytes of disk beside the weights: headers, index, results."""


def config_json(gigabytes: float) -> dict[str, Any]:
    """OLMoE-1B-7B's config.json at the width (a multiple of 32) whose weights come nearest to that size."""

    def of_width(width: int) -> dict[str, Any]:
        return {
            "model_type": "olmoe", "hidden_act": "silu", "hidden_size": width, "intermediate_size": width // 2,
            "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
            "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 50304,
        }  # fmt: skip

    def too_much(width: int) -> float:
        return size_of(specs(of_width(width))) - gigabytes * 1e9

    widths = range(32, 4097, 32)
    above = bisect.bisect_left(widths, 0, hi=len(widths) - 1, key=too_much)
    return of_width(min(widths[max(above - 1, 0)], widths[above], key=lambda width: abs(too_much(width))))


def specs(raw: dict[str, Any]) -> files.Specs:
    """Every tensor of an OLMoE folder in its published layout."""
    dim, ffn, vocab = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim)}
    for layer in range(raw["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {f"{p}self_attn.{name}_proj.weight": (dim, dim) for name in "qkvo"}
        shapes |= {f"{p}self_attn.{name}_norm.weight": (dim,) for name in "qk"}
        shapes |= {f"{p}{name}_layernorm.weight": (dim,) for name in ("input", "post_attention")}
        shapes[f"{p}mlp.gate.weight"] = (raw["num_experts"], dim)
        for e in range(raw["num_experts"]):
            shapes |= {f"{p}mlp.experts.{e}.{name}_proj.weight": (ffn, dim) for name in ("gate", "up")}
            shapes[f"{p}mlp.experts.{e}.down_proj.weight"] = (dim, ffn)
    shapes |= {"model.norm.weight": (dim,), "lm_head.weight": (vocab, dim)}
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def size_of(tensors: files.Specs) -> int:
    """Bytes of the values."""
    return sum(math.prod(shape) * files.DTYPES[dtype].itemsize for dtype, shape in tensors.values())


def write(folder: Path, raw: dict[str, Any], shards: int) -> list[int]:
    """Writes the checkpoint into at most ``shards`` files; the bytes of each, the largest last."""
    tensors = specs(raw)
    largest = max(size_of({name: spec}) for name, spec in tensors.items())
    pool = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)  # what it holds does not matter
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    files.write_files(
        folder, tensors, lambda name: np.resize(pool, tensors[name][1]), size_of(tensors) // shards + largest
    )
    return sorted(path.stat().st_size for path in folder.glob("*.safetensors"))


def memory(pid: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status: RssAnon, VmRSS, VmHWM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {name: int(kb) * 1024 for name, kb in re.findall(r"^(RssAnon|VmRSS|VmHWM):\s+(\d+) kB", status, re.M)}


def watch(folder: Path, program: str, mesh: str, devices: int) -> dict[str, Any]:
    """What ``experiments.load_once`` tells of its load, with the peaks above the start, in bytes.

    Raises:
      ConfigError: it failed.
    """
    kept = [word for word in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in word]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    call = [sys.executable, "-m", "experiments.load_once", str(folder), program, mesh]
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            if not child.stdout.readline():
                raise _failed(child, program, log)
            start = memory(child.pid)
            anonymous = start["RssAnon"]
            child.stdin.write("load\n")
            child.stdin.flush()
            while not select.select([child.stdout], [], [], INTERVAL)[0]:
                anonymous = max(anonymous, memory(child.pid).get("RssAnon", 0))  # {} of one that has just ended
            line = child.stdout.readline()
            if not line:
                raise _failed(child, program, log)
            end = memory(child.pid)
            return {
                **json.loads(line),
                "anonymous_bytes": max(anonymous, end["RssAnon"]) - start["RssAnon"],
                "resident_bytes": end["VmHWM"] - start["VmRSS"],
            }
        finally:
            child.kill()
            child.communicate()


def _failed(child: subprocess.Popen, program: str, log: Any) -> ConfigError:
    code = child.wait()
    log.seek(0)
    words = (log.read().strip().splitlines() or ["without a word"])[-1][:300]
    if code == -9:
        words = "it was killed, as the system does when memory runs out: choose a smaller --gigabytes"
    return ConfigError(f"{program} did not load the checkpoint (exit code {code}): {words}")


def measure(values: flags.FlagValues, meshes: dict[str, int], say: Callable[[str], None]) -> None:
    """Writes the checkpoint, loads it on each mesh, and appends the rows.

    Raises:
      ConfigError: the disk has no room, or a load failed.
    """
    raw = config_json(values.gigabytes)
    scratch, needed = Path(values.scratch or tempfile.gettempdir()), size_of(specs(raw)) + SPARE
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise ConfigError(
            f"{scratch} has {free / 1e9:.2f} GB free, and the checkpoint needs {needed / 1e9:.2f}: name a folder with "
            "room (--scratch), or ask for fewer --gigabytes"
        )
    facts = environment_facts(devices=False)
    allocator = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    with tempfile.TemporaryDirectory(dir=scratch, prefix="load_memory.") as place:
        folder = Path(place)
        sizes = write(folder, raw, values.shards)
        say(f"{len(sizes)} files, {sum(sizes) / 1e9:.2f} GB, the largest {sizes[-1] / 1e9:.2f} GB")
        loads = [("moejax", mesh, devices) for mesh, devices in meshes.items()]
        if values.rival == "orbax":
            loads.append(("orbax", "data=1", 1))
        for program, mesh, devices in loads:
            found = watch(folder, program, mesh, devices)
            beyond = found["anonymous_bytes"] - (found["held_bytes"] if found["on_host"] else 0)
            row = ResultRow(
                kind="value",
                paper=PAPER,
                table=TABLE,
                row=", ".join(["Orbax, then stacked" if program == "orbax" else program, mesh, *allocator]),
                metric="peak_anonymous_memory",
                unit="GB",
                value=found["anonymous_bytes"] / 1e9,
                scale="custom",
                config="olmoe",
                command=" ".join([*allocator, session.command_line()]),
                commit=facts["commit"],
                dirty=facts["dirty"],
                versions=facts["versions"],
                device=found.pop("device"),
                device_count=found.pop("device_count"),
                extra={
                    "checkpoint_bytes": sum(sizes), "file_bytes": sizes, "largest_file_bytes": sizes[-1],
                    "beyond_model_bytes": beyond, **found,
                },
            )  # fmt: skip
            append_rows(values.output, [row])
            say(
                f"{row.row:32s} {row.value:.2f} GB anonymous, {beyond / 1e9:.2f} GB beyond the model's arrays "
                f"({found['held_bytes'] / 1e9:.2f} GB), {found['seconds']:.1f} s"
            )


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", flag_values=values)
    flags.DEFINE_float("gigabytes", 2.0, "Size of the checkpoint.", 0.01, 50.0, flag_values=values)
    flags.DEFINE_integer("shards", 4, "Files, at most.", 1, flag_values=values)
    flags.DEFINE_multi_string(
        "mesh", ["data=1", "expert=8"], "Devices to load onto; may be given several times.", flag_values=values
    )
    flags.DEFINE_enum("rival", "none", ["none", "orbax"], "What to measure beside it.", flag_values=values)
    flags.DEFINE_string("scratch", None, "Folder for the checkpoint. None: the system's.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if not values.output:
        raise ConfigError("--output is needed: the results file to append to")
    session.check_output(values.output)
    if values.scratch and not Path(values.scratch).is_dir():
        raise ConfigError(f"--scratch={values.scratch}: there is no such folder; make it first")
    if not Path("/proc/self/status").is_file():
        raise ConfigError("memory is read from /proc, which this system does not have: run it on Linux")
    meshes = {mesh: parse_mesh(mesh, MeshConfig(data=1)) for mesh in values.mesh}
    measure(values, {mesh: m.data * m.expert * m.model for mesh, m in meshes.items()}, session.say)
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
