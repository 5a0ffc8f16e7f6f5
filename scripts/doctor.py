"""Is this machine fit to run moejax, and how will it run?

    .venv/bin/python scripts/doctor.py

Flags: --workdir=runs/first, --no_speed, --json, --verbose (docs/doctor.md).

Exit code: 0 fine or notes only, 1 warnings, 2 errors. Started by a Python without the packages it says what to do; so
this file keeps to what any Python 3 reads. The checks are in experiments/doctor.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEEDED = ("jax", "jaxlib", "numpy", "rich", "jaxtyping", "ml_collections", "flax")


def missing():
    """Packages that cannot be found, without importing any."""
    import importlib.util

    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def advice(problem):
    """What to do, as lines: the environment of the checkout, if there is one, or how to make it."""
    python = os.path.join(ROOT, ".venv", "bin", "python")
    version = "%d.%d.%d" % sys.version_info[:3]  # noqa: UP031 (older Pythons read this too)
    lines = ["error: " + problem + " (Python " + version + ", " + sys.executable + ")"]
    if os.path.exists(python) and os.path.realpath(sys.prefix) != os.path.realpath(os.path.join(ROOT, ".venv")):
        lines.append("The checkout has an environment of its own; use its Python:")
        lines.append("    " + python + " scripts/doctor.py")
    else:
        lines.append(
            "Set up the environment (base for a CPU, cuda for NVIDIA GPUs, tpu for TPUs), then use its Python:"
        )
        lines.append("    bash " + os.path.join(ROOT, "scripts", "setup_env.sh") + " base")
        lines.append("    " + python + " scripts/doctor.py")
    return lines


def main():
    with open(os.path.join(ROOT, ".python-version")) as file:
        wanted = file.read().strip()
    if sys.version_info[:2] != tuple(int(n) for n in wanted.split(".")[:2]):
        problem = "moejax is locked for Python " + wanted
    else:
        absent = missing()
        problem = "these packages are missing: " + ", ".join(absent) if absent else ""
    if problem:
        print("\n".join(advice(problem)), file=sys.stderr)
        return 2
    if ROOT not in sys.path:
        sys.path.insert(0, ROOT)
    from experiments.doctor import main as examine

    return examine()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
