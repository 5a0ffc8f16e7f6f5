"""The set-up scripts and the locks: which Python is chosen, what is said without one, what is pinned."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import platform_settings

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("base", "dev", "cuda", "tpu")
ADDRESS = re.compile(r"https?://|file://|--(extra-)?index-url|--find-links|^-i ", re.MULTILINE)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# ---- which Python is chosen


class Sandbox:
    """A copy of the scripts beside fake interpreters; PATH holds nothing else but a few system tools."""

    def __init__(self, folder: Path):
        self.checkout = folder / "checkout"
        self.bin = folder / "bin"
        self.home = folder / "home"
        (self.checkout / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        self.home.mkdir()
        shutil.copy(ROOT / "scripts" / "setup_env.sh", self.checkout / "scripts")
        shutil.copytree(ROOT / "requirements", self.checkout / "requirements")
        tools = folder / "tools"
        tools.mkdir()
        needed = [
            "awk",
            "bash",
            "cat",
            "cmp",
            "cp",
            "dirname",
            "env",
            "grep",
            "mkdir",
            "mv",
            "rm",
            "sort",
            "touch",
        ]
        for tool in needed:
            found = shutil.which(tool)
            assert found, f"this test needs {tool}"
            (tools / tool).symlink_to(found)
        self.env = {"PATH": f"{self.bin}:{tools}", "HOME": str(self.home)}

    def python(self, path: Path | str, version: str, venv: bool = True) -> str:
        """A fake interpreter: answers for its version and its modules, and makes no environment."""
        path = self.bin / path
        path.parent.mkdir(parents=True, exist_ok=True)
        answer = f"echo {path}" if venv else "exit 1"
        path.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) {answer} ;; *) echo {version} ;; esac\n')
        path.chmod(0o755)
        return str(path)

    def broken(self, name: str) -> str:
        """A pyenv shim whose version is not selected: it exists, can be started, and fails."""
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "pyenv: {name}: command not found" >&2\nexit 127\n')
        path.chmod(0o755)
        return str(path)

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.checkout / "scripts" / "setup_env.sh"), *arguments]
        env = {**self.env, **environ}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)

    def chosen(self, **environ: str) -> str:
        done = self.run("--find-python", **environ)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def entries(self) -> list[str]:
        return sorted(os.listdir(self.checkout))


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_python312_on_path(sandbox: Sandbox):
    sandbox.python("python3", "3.11")
    good = sandbox.python("python3.12", "3.12")
    assert sandbox.chosen() == good


def test_broken_shim_falls_through_to_pyenv(sandbox: Sandbox):
    sandbox.broken("python3.12")
    sandbox.python("python3", "3.11")
    sandbox.python(sandbox.home / ".pyenv/versions/3.13.0/bin/python3.12", "3.13")
    sandbox.python(sandbox.home / ".pyenv/versions/3.12.1/bin/python3.12", "3.12")
    newest = sandbox.python(sandbox.home / ".pyenv/versions/3.12.10/bin/python3.12", "3.12")
    assert sandbox.chosen() == newest


def test_pyenv_root_is_asked_for(sandbox: Sandbox, tmp_path: Path):
    good = sandbox.python(tmp_path / "elsewhere/versions/3.12.4/bin/python3.12", "3.12")
    assert sandbox.chosen(PYENV_ROOT=str(tmp_path / "elsewhere")) == good


def test_plain_names_are_taken_if_they_are_312(sandbox: Sandbox):
    sandbox.broken("python3.12")
    sandbox.python("python3", "3.11")
    good = sandbox.python("python", "3.12")
    assert sandbox.chosen() == good


def test_uv_is_asked_last(sandbox: Sandbox, tmp_path: Path):
    good = sandbox.python(tmp_path / "uv-python" / "python3.12", "3.12")
    (sandbox.bin / "uv").write_text(f"#!/bin/sh\necho {good}\n")
    (sandbox.bin / "uv").chmod(0o755)
    assert sandbox.chosen() == good


def test_named_python_comes_first(sandbox: Sandbox, tmp_path: Path):
    sandbox.python("python3.12", "3.12")
    mine = sandbox.python(tmp_path / "mine", "3.12")
    assert sandbox.chosen(MOEJAX_PYTHON=mine) == mine


def test_named_python_is_not_replaced_silently(sandbox: Sandbox):
    sandbox.python("python3.12", "3.12")
    old = sandbox.python("old", "3.11")
    done = sandbox.run("base", MOEJAX_PYTHON=old)
    assert done.returncode == 1
    assert "MOEJAX_PYTHON must name a Python 3.12" in done.stderr
    assert f"{old} (3.11)" in done.stderr
    assert sandbox.entries() == ["requirements", "scripts"]


def test_without_python312_it_says_what_was_tried_and_makes_nothing(sandbox: Sandbox):
    shim, old = sandbox.broken("python3.12"), sandbox.python("python3", "3.11")
    bare = sandbox.python("python", "3.12", venv=False)
    done = sandbox.run("base")
    assert done.returncode == 1
    assert "no Python 3.12 found" in done.stderr
    assert f"{shim} (does not run)" in done.stderr
    assert f"{old} (3.11)" in done.stderr
    assert f"{bare} (3.12 without venv and ensurepip; on Debian and Ubuntu: apt install" in done.stderr
    assert "pyenv install 3.12" in done.stderr and "MOEJAX_PYTHON" in done.stderr
    assert sandbox.entries() == ["requirements", "scripts"]


# ---- what is done with a .venv that is there


def test_a_finished_environment_is_left_alone(sandbox: Sandbox):
    sandbox.python(sandbox.checkout / ".venv/bin/python", "3.12")
    stamps = sandbox.checkout / ".venv/.moejax"
    stamps.mkdir()
    shutil.copy(sandbox.checkout / "requirements/dev.lock", stamps)
    for name in ("dev", "base"):  # dev holds all of base
        done = sandbox.run(name)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_changed_lock_is_installed(sandbox: Sandbox):
    """The fake interpreter stands in for pip too, and logs what it is asked to do."""
    venv = sandbox.checkout / ".venv"
    python = venv / "bin/python"
    python.parent.mkdir(parents=True)
    log, site = sandbox.checkout / "log", venv / "site"
    site.mkdir()
    python.write_text(
        f'#!/bin/sh\necho "$*" >>{log}\ncase "$*" in *version_info*) echo 3.12 ;; *purelib*) echo {site} ;; esac\n'
    )
    python.chmod(0o755)
    stamps = venv / ".moejax"
    stamps.mkdir()
    (stamps / "dev.lock").write_text("an older lock\n")

    assert sandbox.run("base").returncode == 0
    (install,) = [line for line in log.read_text().splitlines() if " install " in line]
    assert "--require-hashes" in install and "--force-reinstall" not in install
    assert install.endswith("requirements/base.lock")
    # The older dev stamp would speak for versions that are no longer there.
    assert sorted(os.listdir(stamps)) == ["base.lock"]
    assert (site / "moejax.pth").read_text().strip() == "../../../.."

    log.write_text("")
    assert sandbox.run("base").returncode == 0
    assert log.read_text() == ""


def test_a_failed_install_is_redone_in_full(sandbox: Sandbox):
    venv = sandbox.checkout / ".venv"
    python = venv / "bin/python"
    python.parent.mkdir(parents=True)
    answers = f"*version_info*) echo 3.12 ;; *purelib*) echo {venv} ;;"
    python.write_text(f'#!/bin/sh\ncase "$*" in {answers} *install*) exit 1 ;; esac\n')
    python.chmod(0o755)
    done = sandbox.run("dev")
    assert done.returncode == 1
    assert "pip could not install requirements/dev.lock" in done.stderr
    assert not (venv / ".moejax/dev.lock").exists()

    python.write_text(f'#!/bin/sh\ncase "$*" in {answers} *install*) echo "$*" >{venv}/asked ;; esac\n')
    assert sandbox.run("dev").returncode == 0
    assert "--force-reinstall" in (venv / "asked").read_text()
    assert os.listdir(venv / ".moejax") == ["dev.lock"]


@pytest.mark.parametrize(("version", "text"), [("3.11", "made by Python 3.11"), ("", "does not run")])
def test_a_foreign_environment_is_reported_and_kept(sandbox: Sandbox, version: str, text: str):
    sandbox.python("python3.12", "3.12")
    python = sandbox.checkout / ".venv/bin/python"
    if version:
        sandbox.python(python, version)
    else:
        python.parent.mkdir(parents=True)
        python.symlink_to("/nonexistent/python3.12")
    done = sandbox.run("base")
    assert done.returncode == 1
    assert text in done.stderr and "mv '" in done.stderr
    assert python.is_symlink() or python.exists()


def test_unknown_environment_is_refused(sandbox: Sandbox):
    done = sandbox.run("gpu")
    assert done.returncode == 1
    assert "unknown environment 'gpu': choose base, dev, cuda or tpu" in done.stderr


# ---- the locks


def locked(name: str) -> dict[str, Version]:
    """Versions by canonical name."""
    lines = (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()
    entries = [re.match(r"([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", line) for line in lines]
    return {canonicalize_name(entry[1]): Version(entry[2]) for entry in entries if entry}


def unhashed(text: str) -> list[str]:
    """Requirements of a lock that have no sha256, or are not pinned."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n?", "", text))
    lines = [line.strip() for line in joined.splitlines() if line.strip()]
    pinned = re.compile(r"[A-Za-z0-9][\w.-]*==[^\s;]+( ;.*?)?(\s+--hash=sha256:[0-9a-f]{64})+")
    return [line for line in lines if not pinned.fullmatch(line)]


@pytest.mark.parametrize("name", LOCKS)
def test_lock_is_pinned_by_hashes_and_names_no_address(name: str):
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    assert len(locked(name)) > 40
    assert unhashed(text) == []
    assert ADDRESS.findall(text) == []


def test_unhashed_requirements_are_caught():
    pin = "a==1 \\\n    --hash=sha256:" + "0" * 64 + "\n"
    assert unhashed(f"# made by x\n{pin}    # via b\n{pin.replace('==1', "==1 ; sys_platform == 'linux'")}") == []
    assert unhashed("a==1\n") == ["a==1"]
    assert unhashed(pin.replace("==", ">=")) != []
    assert unhashed("--index-url x\n") != []


def test_no_address_of_an_index_in_the_set_up():
    files = [ROOT / "pyproject.toml", *(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]
    assert [path.name for path in files if ADDRESS.search(path.read_text())] == []
    assert not (ROOT / "uv.lock").exists()


@pytest.mark.parametrize("name", LOCKS)
def test_lock_fits_pyproject(name: str):
    extra = PROJECT["optional-dependencies"].get(name, [])
    versions = locked(name)
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extra]):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {name}.lock: run scripts/lock.sh"
        assert version in requirement.specifier, f"{name}.lock has {version}, not {requirement}: run scripts/lock.sh"


@pytest.mark.parametrize("name", LOCKS)
def test_locks_agree(name: str):
    versions, others = locked(name), [locked(other) for other in LOCKS]
    assert locked("base").items() <= versions.items()
    for other in others:
        assert {k: v for k, v in versions.items() if k in other and other[k] != v} == {}
    assert versions["jax"] == Version("0.11.2")


def test_accelerators_are_locked():
    jax = locked("base")["jax"]
    assert locked("cuda")["jax-cuda13-plugin"] == locked("cuda")["jax-cuda13-pjrt"] == jax
    assert "libtpu" in locked("tpu")


def test_python_version_is_stated_once_for_all_tools():
    assert (ROOT / ".python-version").read_text() == "3.12\n"
    assert PROJECT["requires-python"] == ">=3.12"


# ---- where the tests run


@pytest.mark.parametrize("expression", ["", "not gpu and not tpu and not slow", "slow"])
def test_emulated_devices_by_default(expression: str):
    assert platform_settings(expression, {"XLA_FLAGS": "--a"}) == {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--a --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    }


@pytest.mark.parametrize("expression", ["gpu", "gpu and not slow", "not slow and tpu"])
def test_accelerator_marks_leave_the_platform_alone(expression: str):
    assert platform_settings(expression, {}) == {}


def test_platform_by_name():
    assert platform_settings("", {"MOEJAX_TEST_PLATFORM": "cuda"}) == {"JAX_PLATFORMS": "cuda"}
    mine = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    assert platform_settings("", mine) == {"JAX_PLATFORMS": "cpu"}


def test_this_run_has_emulated_devices():
    import jax

    assert jax.device_count() > 1 or jax.default_backend() != "cpu"
