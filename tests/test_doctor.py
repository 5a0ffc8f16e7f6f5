"""The doctor: a healthy machine, faults by fake environments with their exit codes, and the command as it is typed."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import kernels_pallas
from experiments import doctor
from experiments.doctor import environment, hardware, known_bad, speed
from experiments.doctor.environment import Environment, Gpu
from experiments.doctor.finding import Finding, exit_code, guarded

ROOT = Path(__file__).resolve().parent.parent
H100 = Gpu("NVIDIA H100 80GB HBM3", 81559, 4, "580.95.05")
LOCKED = environment.read_lock(ROOT / "requirements" / "base.lock")


def healthy(**changes: Any) -> Environment:
    """A machine with exactly what base.lock says, and no GPU."""
    return dataclasses.replace(Environment("3.12.1", LOCKED, {}, (), "cpu"), **changes)


def with_versions(**versions: str | None) -> Environment:
    """``healthy`` with other versions; None: not installed. ``_`` stands for ``-``."""
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    kept = {name: version for name, version in {**LOCKED, **named}.items() if version is not None}
    return healthy(versions=kept)


def on_gpu(versions: dict[str, str] | None = None, **changes: Any) -> Environment:
    """A machine with an H100 and what cuda.lock says."""
    pins = environment.read_lock(ROOT / "requirements" / "cuda.lock")
    return healthy(**{"versions": {**pins, **(versions or {})}, "gpus": (H100,), "platform": "gpu", **changes})


# --- a machine without faults -----------------------------------------------------------------------------------------


def test_healthy_machines_have_no_finding():
    for env in (healthy(), on_gpu()):
        assert known_bad.findings(env) == []
        assert {f.level for f in environment.lock_findings(env)} == {"ok"}
        assert [f.level for f in environment.python_findings(env)] == ["ok"]


def test_this_machine(tmp_path: Path):
    """In this process: every topic is there, facts are filled in, and emulated devices are noted."""
    found, facts = doctor.examine(environment.current(), workdir=tmp_path / "run", speed=False)
    assert [f for f in found if f.level == "error"] == []
    assert {"python", "locks", "devices", "kernels", "disk"} <= {f.topic for f in found}
    assert facts["platform"] == jax.default_backend() and len(facts["devices"]) == jax.device_count()
    assert {f.what.split(",")[0] for f in found if f.topic == "kernels"} == {"grouped_matmul", "grouped_ffn", "moe_ffn"}
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        assert any(f.topic == "emulated devices" and f.level == "note" for f in found)
    assert not (tmp_path / "run").exists() and list(tmp_path.iterdir()) == []


def test_exit_codes():
    findings = {level: Finding(level, "t", "w") for level in ("ok", "note", "warning", "error")}
    assert exit_code([]) == exit_code([findings["ok"], findings["note"]]) == 0
    assert exit_code([findings["ok"], findings["warning"], findings["note"]]) == 1
    assert exit_code([findings["error"], findings["warning"]]) == 2


# --- known-bad combinations -------------------------------------------------------------------------------------------

FAKES = {
    "jax too old": (with_versions(jax="0.10.2", jaxlib="0.10.2"), "jax version", "jax 0.10.2"),
    "jax too new": (with_versions(jax="0.12.0"), "jax version", "jax 0.12.0"),
    "jaxlib newer": (with_versions(jaxlib="0.11.3"), "jaxlib", "jaxlib 0.11.3 is newer than jax 0.11.2"),
    "plugin of another version": (
        on_gpu({"jax-cuda13-plugin": "0.11.1"}), "CUDA plugin", "jax-cuda13-plugin 0.11.1 beside jaxlib 0.11.2",
    ),
    "two plugins": (on_gpu({"jax-cuda12-plugin": "0.11.2"}), "CUDA plugin", "are both installed"),
    "GPU without plugin": (healthy(gpus=(H100,)), "GPU unused", "no jax-cuda13-plugin"),
    "plugin did not start": (on_gpu(platform="cpu"), "GPU unused", "JAX runs on the CPU beside"),
    "JAX_PLATFORMS": (on_gpu(variables={"JAX_PLATFORMS": "cpu"}, platform="cpu"), "GPU unused", "JAX_PLATFORMS=cpu"),
    "hidden GPU": (on_gpu(variables={"CUDA_VISIBLE_DEVICES": ""}, platform="cpu"), "GPU unused", "hides every GPU"),
    "old driver": (on_gpu(gpus=(dataclasses.replace(H100, driver="570.12"),)), "driver", "driver 570.12 for CUDA 13"),
    "cuDNN": (on_gpu({"nvidia-cudnn-cu13": "9.19.0.56"}), "cuDNN", "nvidia-cudnn-cu13 9.19.0.56"),
    "LD_LIBRARY_PATH": (
        on_gpu(variables={"LD_LIBRARY_PATH": "/opt/x:/usr/local/cuda-12/lib64"}),
        "LD_LIBRARY_PATH", "/usr/local/cuda-12",
    ),
    "fraction is no number": (healthy(variables={"XLA_CLIENT_MEM_FRACTION": "90%"}), "GPU memory", "is no number"),
    "fraction above 1": (healthy(variables={"XLA_PYTHON_CLIENT_MEM_FRACTION": "90"}), "GPU memory", "at most at 1"),
    "fraction without preallocation": (
        healthy(variables={"XLA_CLIENT_MEM_FRACTION": "0.9", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
        "GPU memory", "XLA_CLIENT_MEM_FRACTION beside XLA_PYTHON_CLIENT_PREALLOCATE=false",
    ),
    "no preallocation": (
        on_gpu(variables={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}), "GPU memory", "PREALLOCATE=false",
    ),
    "platform allocator": (
        healthy(variables={"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}), "GPU memory", "ALLOCATOR=platform",
    ),
    "occupied GPU": (on_gpu(gpus=(dataclasses.replace(H100, used_mib=60_000),)), "GPU memory", "60,000 of 81,559 MiB"),
    "x64": (healthy(variables={"JAX_ENABLE_X64": "1"}), "JAX_ENABLE_X64", "JAX_ENABLE_X64=1"),
    "no jit": (healthy(variables={"JAX_DISABLE_JIT": "true"}), "JAX_DISABLE_JIT", "JAX_DISABLE_JIT=true"),
    "debug NaN": (healthy(variables={"JAX_DEBUG_NANS": "True"}), "JAX_DEBUG_NANS", "JAX_DEBUG_NANS=True"),
    "debug inf": (healthy(variables={"JAX_DEBUG_INFS": "1"}), "JAX_DEBUG_INFS", "JAX_DEBUG_INFS=1"),
    "precision": (
        healthy(variables={"JAX_DEFAULT_MATMUL_PRECISION": "highest"}), "matmul precision", "=highest",
    ),
    "emulated devices": (
        healthy(variables={"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8"}),
        "emulated devices", "count=8",
    ),
    "unoptimised": (healthy(variables={"XLA_FLAGS": "--xla_backend_optimization_level=0"}), "XLA_FLAGS", "level=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAKES)
def test_a_known_bad_combination_is_found(name: str):
    env, topic, words = FAKES[name]
    found = known_bad.findings(env)
    (finding,) = [f for f in found if words in f.what]
    assert finding.topic == topic and finding.why and finding.fix and finding.source
    others = [f for f in found if f is not finding]
    assert not others or name == "fraction without preallocation", others


def test_every_row_has_a_fake():
    applies = {row.applies: row.name for row in known_bad.ROWS}
    tested = {row.applies for row in known_bad.ROWS for env, _, _ in FAKES.values() if row.applies(env)}
    assert set(applies) == tested, [applies[row] for row in set(applies) - tested]


def test_rows_name_what_they_need():
    for row in known_bad.ROWS:
        assert row.why and row.fix and row.source and row.level in ("note", "warning", "error")


def test_switched_off_variables_are_no_fault():
    off = {"JAX_ENABLE_X64": "0", "JAX_DISABLE_JIT": "false", "JAX_DEBUG_NANS": "", "XLA_CLIENT_MEM_FRACTION": "0.9"}
    assert known_bad.findings(healthy(variables=off)) == []
    assert known_bad.findings(on_gpu(variables={"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "0"})) == []


def test_what_is_usual_on_healthy_gpu_machines_is_no_fault():
    busy, old = dataclasses.replace(H100, used_mib=80_000), dataclasses.replace(H100, driver="570.12")
    for env in (
        on_gpu(variables={"LD_LIBRARY_PATH": "/usr/local/nvidia/lib:/usr/local/nvidia/lib64"}),  # of most containers
        on_gpu(gpus=(busy, H100), variables={"CUDA_VISIBLE_DEVICES": "1"}),  # somebody else's GPU
        on_gpu(gpus=(old,), variables={"LD_LIBRARY_PATH": "/usr/local/cuda/compat/lib"}),
    ):
        assert known_bad.findings(env) == []
    for name, value in (("JAX_PLATFORMS", "cpu,cuda"), ("JAX_PLATFORM_NAME", "cpu")):  # chosen, so no plugin failed
        (finding,) = known_bad.findings(on_gpu(variables={name: value}, platform="cpu"))
        assert finding.level == "warning" and f"{name}={value} while" in finding.what


# --- versions ---------------------------------------------------------------------------------------------------------


def test_python_of_another_version():
    (finding,) = environment.python_findings(healthy(python="3.11.7"))
    assert finding.level == "error" and "3.11.7" in finding.what and "setup_env.sh" in finding.fix


def test_missing_older_and_newer_packages():
    found = environment.lock_findings(with_versions(flax="0.12.10", numpy="99.0", grain=None))
    by_level = {(f.level, f.what.split()[0]): f for f in found}
    assert "grain" in by_level["error", "missing"].what
    assert f"flax 0.12.10 (locked: {LOCKED['flax']})" in by_level["warning", "older"].what
    assert "numpy 99.0" in by_level["warning", "newer"].what
    assert all("setup_env.sh base" in f.fix for f in found) and exit_code(found) == 2


def test_only_locks_that_were_installed_are_compared():
    dev = {**LOCKED, "pytest": "1.0", "ruff": "0.17.6"}
    found = environment.lock_findings(healthy(versions=dev))
    assert [f for f in found if "cuda" in f.what or "tpu" in f.what] == []
    missing, older = [f for f in found if "dev.lock" in f.what]
    assert missing.level == "warning" and "hypothesis" in missing.what and "pytest 1.0" in older.what
    gpu = environment.lock_findings(on_gpu({"nvidia-nccl-cu13": "2.0"}))
    assert [f.level for f in gpu] == ["ok", "warning"] and "nvidia-nccl-cu13 2.0" in gpu[1].what


def test_markers_decide_what_a_lock_asks_for(tmp_path: Path):
    lock = tmp_path / "base.lock"
    lock.write_text(
        "# a comment\nJax_Lib==1.2 \\\n    --hash=sha256:00\nother==2 ; sys_platform == 'nowhere' \\\n"
        "third==3.0.1 ; python_version >= '3' \\\n    # via x\n"
    )
    assert environment.read_lock(lock) == {"jax-lib": "1.2", "third": "3.0.1"}
    (finding,) = environment.lock_findings(healthy(versions={"jax-lib": "1.2", "third": "3.0.1"}), tmp_path)
    assert finding.level == "ok"
    lock.unlink()
    (finding,) = environment.lock_findings(healthy(), tmp_path)
    assert finding.level == "error" and "base.lock is missing" in finding.what


def test_version_numbers():
    assert environment.number("0.11.2.dev3+cuda13") == (0, 11, 2) and environment.number("x") == ()
    assert environment.normal("Orbax_Checkpoint") == "orbax-checkpoint"


# --- drivers, devices, kernels ----------------------------------------------------------------------------------------


def fake_program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_gpus_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake_program(tmp_path, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 81559, 4, 580.95.05'")
    assert environment.nvidia_gpus() == (H100,)
    fake_program(tmp_path, "nvidia-smi", "echo 'NVIDIA X, [N/A], [N/A], 580.1'")
    assert environment.nvidia_gpus() == (Gpu("NVIDIA X", 0, 0, "580.1"),)


def test_a_driver_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake_program(tmp_path, "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert environment.nvidia_gpus() == ()
    (finding,) = environment.driver_findings(on_gpu(gpus=(), platform="cpu"))
    assert finding.level == "error" and "lists no GPU" in finding.what
    chosen = {"JAX_PLATFORMS": "cpu"}
    for idle in (healthy(), on_gpu(gpus=(), platform="cpu", variables=chosen)):  # a login node, or a choice
        assert [f.level for f in environment.driver_findings(idle)] == ["note"]
    assert environment.driver_findings(on_gpu(gpus=())) == []  # JAX has its GPU without nvidia-smi
    monkeypatch.setenv("PATH", "")
    assert environment.driver_findings(healthy(), tmp_path / "no such device") == []


def test_a_back_end_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The error is a finding, the other checks go on, and nothing is asked of devices that are not there."""

    def broken(*args: Any) -> None:
        raise RuntimeError("Unable to initialize backend 'cuda': CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr(jax, "devices", broken)
    found, facts = doctor.examine(healthy(), workdir=tmp_path / "run")
    (devices,) = [f for f in found if f.topic == "devices"]
    assert devices.level == "error" and "CUDA_ERROR_NO_DEVICE" in devices.what and "JAX_PLATFORMS=cpu" in devices.fix
    assert exit_code(found) == 2 and "platform" not in facts
    assert {"locks", "disk"} <= {f.topic for f in found} and not {"kernels", "speed"} & {f.topic for f in found}


def test_a_check_that_breaks_is_a_finding():
    found: list[Finding] = []
    assert guarded("topic", found, lambda: 1 // 0) is None
    assert found[0].level == "error" and "ZeroDivisionError" in found[0].what
    assert guarded("topic", found, lambda x: x + 1, 2) == 3 and len(found) == 1


def test_kernels_say_who_runs_and_why_others_refuse():
    facts: dict[str, Any] = {"platform": jax.default_backend()}
    found = hardware.kernel_findings(facts)
    assert len(found) == 6 and {f.level for f in found} == {"ok"}
    assert len(facts["kernels"]) == 3 * 2 * len(hardware.MODEL_SHAPES)
    if jax.default_backend() == "cpu":
        assert all("cpu_tiled" in f.what and "needs a Hopper GPU" in f.why for f in found)
        for e in facts["kernels"]:
            assert e["chosen"] == "cpu_tiled" and "Hopper" in e["refusals"]["mosaic_gpu"]


def test_a_fast_kernel_that_refuses_is_a_warning():
    """On a GPU of another generation bfloat16 falls back, which is told with its reason; float32 has no faster one."""
    reasons = {"mosaic_gpu": "needs compute capability 9.0 (Hopper), the device has 8.0"}
    e = {"operation": "grouped_ffn", "shape": "olmoe", "chosen": "padded", "refusals": reasons, "order": ["mosaic_gpu"]}
    slow, plain = (hardware._kernel_finding("grouped_ffn", dtype, [e], "gpu") for dtype in ("bfloat16", "float32"))
    assert slow.level == "warning" and "has 8.0" in slow.why and "padded" in slow.what
    assert plain.level == "ok"
    nothing = hardware._kernel_finding("grouped_ffn", "float32", [{**e, "chosen": None}], "cpu")
    assert nothing.level == "error" and "nothing" in nothing.what


# --- disks and speed --------------------------------------------------------------------------------------------------


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    facts: dict[str, Any] = {}
    found = hardware.disk_findings(tmp_path / "a" / "b", tmp_path / "cache", facts)
    assert [f.topic for f in found] == ["disk", "disk"] and [f["writable"] for f in facts["disk"]] == [True, True]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    workdir, _ = hardware.disk_findings(tmp_path / "file" / "run", tmp_path, facts)
    assert workdir.level == "error" and "cannot be written" in workdir.what and "--workdir" in workdir.fix
    usage = shutil.disk_usage(tmp_path)
    for free, level in ((2**29, "error"), (2**32, "warning"), (2**40, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert hardware.disk_findings(tmp_path, tmp_path, facts)[0].level == level


def test_where_compiled_programs_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    assert hardware.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("MOEJAX_CACHE", "/data")
    assert hardware.cache_folder() == Path("/data/programs")


def test_a_wrong_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """The real kernels are right within the contract's tolerance; one that is off is named. Nothing is timed here."""
    monkeypatch.setattr(speed, "_seconds", lambda fn, *args: 1.0)
    for name in ("_matmul", "_copy"):
        monkeypatch.setattr(speed, name, lambda *args: (None,))
    monkeypatch.setattr(speed, "_grouped", lambda *args: (1.0, 2.0, "any"))
    facts: dict[str, Any] = {}
    found = speed.speed_findings(facts)
    assert {f.level for f in found} == {"ok"}
    assert {name: error <= speed.TOLERANCE[name] for name, (error, _) in facts["speed"]["errors"].items()} == {
        "float32": True, "bfloat16": True,
    }  # fmt: skip
    assert facts["speed"]["matmul_tflops"] == 2 * facts["speed"]["matmul_size"] ** 3 / 1e12
    assert any("'any'" in f.what and "50% of a dense" in f.what for f in found)
    right, precisions = kernels_pallas.grouped_ffn, []

    def listening(*args: Any, **kwargs: Any) -> Any:
        precisions.append(jax.config.jax_default_matmul_precision)
        return right(*args, **kwargs)

    monkeypatch.setattr(kernels_pallas, "grouped_ffn", listening)
    with jax.default_matmul_precision("bfloat16"):  # the user's choice for speed is not judged here
        assert speed._error("float32")[0] <= speed.TOLERANCE["float32"]
    assert precisions == ["highest", "highest"]

    def wrong(*args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        ys = right(*args, implementation=implementation, **kwargs)
        return ys if implementation == "ref" else 1.05 * ys

    monkeypatch.setattr(kernels_pallas, "grouped_ffn", wrong)
    bad = [f for f in speed.speed_findings({}) if f.level == "error"]
    assert len(bad) == 2 and all("off by 0.0" in f.what for f in bad)


# --- the command ------------------------------------------------------------------------------------------------------


def called(env: Environment, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command in this process, on a fake environment."""
    monkeypatch.setattr(environment, "current", lambda: env)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = doctor.main(["--no_speed", *arguments])
    return code, out.getvalue()


def test_faults_decide_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    workdir = f"--workdir={tmp_path / 'run'}"
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(hardware, "_disk", lambda name, path, facts: Finding("ok", "disk", name))
    code, text = called(healthy(), monkeypatch, workdir)
    assert code == 0 and text.endswith("0 errors, 0 warnings, 0 notes: ready\n")
    code, text = called(healthy(variables={"JAX_DISABLE_JIT": "1"}), monkeypatch, workdir)
    assert code == 1 and re.search(
        r"^warning JAX_DISABLE_JIT: JAX_DISABLE_JIT=1\n +why: .*\n +do: unset", text, re.MULTILINE
    )
    assert "1 warning, 0 notes: it will run" in text
    code, text = called(with_versions(jaxlib="0.11.3"), monkeypatch, workdir)
    assert code == 2 and "mend the errors first" in text
    code, text = called(with_versions(jaxlib="0.11.3"), monkeypatch, workdir, "--json")
    answer = json.loads(text)
    assert code == answer["exit_code"] == 2
    (finding,) = [f for f in answer["findings"] if f["topic"] == "jaxlib"]
    assert finding["level"] == "error" and finding["source"] and finding["fix"]
    assert {"python", "versions", "devices", "platform", "kernels", "disk"} <= answer["facts"].keys()
    code, text = called(healthy(), monkeypatch, workdir, "--verbose")
    assert re.search(r"^  grouped_ffn +bfloat16 +qwen3_moe +\w+$", text, re.MULTILINE)


def script(*arguments: str, python: str = sys.executable, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    return subprocess.run(
        [python, str(ROOT / "scripts" / "doctor.py"), *arguments],
        cwd="/", env={**kept, **variables}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_script_from_another_folder(tmp_path: Path):
    """A variable in its environment is found, JSON alone is on standard output, and the exit code is the finding's."""
    done = script("--json", "--no_speed", f"--workdir={tmp_path / 'run'}", JAX_PLATFORMS="cpu", JAX_DEBUG_NANS="1")
    answer = json.loads(done.stdout)
    assert done.returncode == answer["exit_code"] >= 1
    assert "JAX_DEBUG_NANS" in {f["topic"] for f in answer["findings"]}
    assert answer["facts"]["platform"] == "cpu" and len(answer["facts"]["devices"]) == 1


def test_a_platform_that_is_not_there():
    done = script("--no_speed", JAX_PLATFORMS="tpu")
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"^error +devices: JAX cannot start its back end: .*tpu", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stdout + done.stderr


def test_wrong_arguments():
    done = script("--jason")
    assert done.returncode == 2 and "--jason" in done.stderr and "Traceback" not in done.stderr


def test_a_python_without_the_packages(tmp_path: Path):
    """It says which Python to use, with the packages' names, and imports none of them."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    done = script(python=str(bare / "bin" / "python"))
    assert done.returncode == 2 and done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: these packages are missing: jax, jaxlib") and "Python 3.12" in first
    assert any(re.search(r"\.venv/bin/python scripts/doctor\.py$", line) for line in rest)


def test_another_python_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """As for any Python 3: the file's text is what Python 3.6 reads."""
    import ast
    import importlib.util

    path = ROOT / "scripts" / "doctor.py"
    ast.parse(path.read_text(), feature_version=(3, 6))
    spec = importlib.util.spec_from_file_location("doctor_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))
    monkeypatch.setattr(module, "ROOT", module.ROOT)
    assert module.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: moejax is locked for Python 3.12 (Python 3.11.7") and "scripts/doctor.py" in error


@pytest.mark.slow
def test_the_whole_visit():
    """With the speed check, as a user types it: rates are printed and experts are right."""
    done = script(JAX_PLATFORMS="cpu")
    assert done.returncode in (0, 1), done.stdout
    assert re.search(r"matmul 1024\^3 float32 \d+\.\d+ TFLOP/s; copy \d+\.\d GB/s", done.stdout)
    assert re.search(r"grouped FFN by 'cpu_tiled'.* \d+% of a dense", done.stdout)
    assert "correctness: grouped FFN against the reference: float32" in done.stdout
