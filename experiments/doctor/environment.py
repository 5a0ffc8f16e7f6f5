"""What is installed and set: Python, packages against ``requirements/*.lock``, environment variables.

Standard library only, and without importing a checked package: versions are read from their metadata.
"""

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from experiments.doctor.finding import Finding

ROOT = Path(__file__).resolve().parent.parent.parent
REQUIREMENTS = ROOT / "requirements"
CARRIERS = {"dev": ("pytest", "ruff"), "cuda": ("jax-cuda13-plugin",), "tpu": ("libtpu",)}
"""An environment of this lock has these; ``base`` is in all of them."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the driver says, whether JAX sees it or not."""

    name: str
    memory_mib: int
    used_mib: int
    driver: str


@dataclasses.dataclass(frozen=True)
class Environment:
    """All that the table of known-bad combinations looks at; tests make fakes of it."""

    python: str
    versions: Mapping[str, str]
    """Installed packages, by normalised name."""
    variables: Mapping[str, str]
    gpus: tuple[Gpu, ...] = ()
    platform: str = ""
    """What JAX runs on ("cpu", "gpu", "tpu"); empty where it is not known."""

    def number(self, package: str) -> tuple[int, ...] | None:
        """Version of ``package`` for comparisons; None if it is not installed."""
        return number(self.versions[package]) if package in self.versions else None


def number(version: str) -> tuple[int, ...]:
    """``(0, 11, 2)`` of ``0.11.2.dev3+local``: the leading numbers."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Versions by normalised name. The first on the path counts, as it is what is imported."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None
        if name and distribution.version:
            found.setdefault(normal(name), distribution.version)
    return found


def nvidia_gpus() -> tuple[Gpu, ...]:
    """GPUs by ``nvidia-smi``; none without it, or where the driver does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = "--query-gpu=name,memory.total,memory.used,driver_version"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4:
            sizes = [int(cell) if cell.isdigit() else 0 for cell in cells[1:3]]
            gpus.append(Gpu(cells[0], sizes[0], sizes[1], cells[3]))
    return tuple(gpus)


def current() -> Environment:
    """This process's environment, before JAX is imported."""
    return Environment(platform.python_version(), installed(), dict(os.environ), nvidia_gpus())


def driver_findings(env: Environment, device_file: Path = Path("/dev/nvidiactl")) -> list[Finding]:
    """A driver that is there and does not answer: no fault where JAX has its GPU all the same (a container may come
    without nvidia-smi), and a note where nothing asks for one (a login node)."""
    if env.gpus or env.platform == "gpu" or not (device_file.exists() or shutil.which("nvidia-smi")):
        return []
    wanted = any(re.fullmatch(r"jax-cuda\d+-plugin", name) for name in env.versions)
    wanted = wanted and env.variables.get("JAX_PLATFORMS", "").split(",")[0] in ("", "cuda", "gpu")
    return [
        Finding(
            "error" if wanted else "note",
            "driver",
            "an NVIDIA driver is installed, but nvidia-smi lists no GPU",
            "JAX would fail, or run on the CPU without saying so" if wanted else "runs here use the CPU",
            "run nvidia-smi by hand: after an update of the driver a reboot is needed; in a container, pass the GPU in",
        )
    ]


def python_findings(env: Environment, root: Path = ROOT) -> list[Finding]:
    """The interpreter against ``.python-version``."""
    wanted = (root / ".python-version").read_text(encoding="utf-8").strip()
    if number(env.python)[: len(number(wanted))] == number(wanted):
        return [Finding("ok", "python", f"Python {env.python}")]
    return [
        Finding(
            "error",
            "python",
            f"Python {env.python}, and .python-version says {wanted}",
            "the locks hold for that Python only, and JAX 0.11 and flax 0.12.9 need 3.12",
            "bash scripts/setup_env.sh base, then .venv/bin/python scripts/doctor.py",
        )
    ]


def read_lock(path: Path) -> dict[str, str]:
    """Pinned versions that hold on this machine (markers judged), by normalised name."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.match(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)\s*(?:;\s*([^\\]*))?", line)
        if found and _marker_holds((found[3] or "").strip()):
            pins[normal(found[1])] = found[2]
    return pins


def _marker_holds(marker: str) -> bool:
    if not marker:
        return True
    try:
        from packaging.markers import Marker
    except ImportError:  # a Python without the locked packages: what is conditional is left out
        return False
    return Marker(marker).evaluate()


def lock_findings(env: Environment, requirements: Path = REQUIREMENTS) -> list[Finding]:
    """Installed packages against the locks that this environment was made from: missing, older, newer."""
    locks = {path.stem: read_lock(path) for path in sorted(requirements.glob("*.lock"))}
    if "base" not in locks:
        return [Finding("error", "locks", f"{requirements}/base.lock is missing", fix="restore it from git")]
    found = []
    for name, pins in locks.items():
        if name != "base" and not all(package in env.versions for package in CARRIERS.get(name, ())):
            continue
        own = {p: v for p, v in pins.items() if name == "base" or p not in locks["base"]}
        found += _against(name, own, env)
    return found


def _against(name: str, pins: dict[str, str], env: Environment) -> list[Finding]:
    again = f"bash scripts/setup_env.sh {name}"
    missing = sorted(p for p in pins if p not in env.versions)
    older, newer = [], []
    for package, pin in sorted(pins.items()):
        have = env.versions.get(package)
        if have is not None and have != pin:
            (older if number(have) < number(pin) else newer).append(f"{package} {have} (locked: {pin})")
    if not missing and not older and not newer:
        return [Finding("ok", "locks", f"{len(pins)} packages are those of requirements/{name}.lock")]
    found = []
    if missing:
        found.append(
            Finding(
                "warning" if name == "dev" else "error",  # no run needs the tools of development
                "locks",
                f"missing from requirements/{name}.lock: {', '.join(missing)}",
                "something that needs them will fail when it is imported",
                again,
            )
        )
    for kind, packages in (("older", older), ("newer", newer)):
        if packages:
            found.append(
                Finding(
                    "warning",
                    "locks",
                    f"{kind} than requirements/{name}.lock: {', '.join(packages)}",
                    "only the locked versions are tested together",
                    f"{again} (or test with yours: bash scripts/test.sh)",
                )
            )
    return found
