"""The doctor: is this machine fit to run moejax, and how will it run? ``scripts/doctor.py`` is the command."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.doctor import environment, known_bad
from experiments.doctor.environment import Environment
from experiments.doctor.finding import EXIT_CODES, LEVELS, Finding, Level, exit_code, guarded

__all__ = ["Environment", "Finding", "examine", "main"]

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def examine(
    env: Environment, *, workdir: Path = Path("runs/first"), speed: bool = True
) -> tuple[list[Finding], dict[str, Any]]:
    """Every check, in order: ``(findings, facts)``. A check that breaks is an error finding, never an exception."""
    found: list[Finding] = []
    facts: dict[str, Any] = {
        "python": env.python,
        "versions": {name: env.versions[name] for name in ("jax", "jaxlib", "flax", "numpy") if name in env.versions},
        "gpus": [dataclasses.asdict(gpu) for gpu in env.gpus],
    }
    found += guarded("python", found, environment.python_findings, env) or []
    found += guarded("locks", found, environment.lock_findings, env) or []
    from experiments.doctor import hardware

    found += guarded("devices", found, hardware.device_findings, facts) or []
    env = dataclasses.replace(env, platform=facts.get("platform", ""))
    found += guarded("driver", found, environment.driver_findings, env) or []
    found += guarded("known-bad combinations", found, known_bad.findings, env) or []
    found += guarded("disk", found, hardware.disk_findings, workdir, hardware.cache_folder(), facts) or []
    if "platform" in facts:
        found += guarded("kernels", found, hardware.kernel_findings, facts) or []
    if "platform" in facts and speed:
        from experiments.doctor.speed import speed_findings

        found += guarded("speed", found, speed_findings, facts) or []
    return found, facts


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/doctor.py",
        description="Looks at Python, packages, devices, kernels, disks and speed, and says what to do.",
        epilog="Exit code: 0 fine or notes only, 1 warnings, 2 errors (also of the command line).",
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/first"), help="workdir of a run to come (default: runs/first)"
    )
    parser.add_argument("--no_speed", action="store_true", help="leave out the speed check of about five seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--verbose", action="store_true", help="also which kernel runs at each shape")
    args = parser.parse_args(argv)
    env = environment.current()
    # What the doctor needs is small: it must not take 75 % of a GPU that another run is on.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found, facts = examine(env, workdir=args.workdir, speed=not args.no_speed)
    code = exit_code(found)
    if args.json:
        print(
            json.dumps(
                {"exit_code": code, "findings": [dataclasses.asdict(f) for f in found], "facts": facts}, indent=1
            )
        )
    else:
        show(found)
        if args.verbose:
            print("\nkernels by shape")
            for e in facts.get("kernels", []):
                print(f"  {e['operation']:15s}{e['dtype']:9s} {e['shape']:18s}{e['chosen']}")
        print(verdict(found))
    return code


def show(found: list[Finding]) -> None:
    """The findings as text, coloured on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    said = ""
    for f in found:
        console.print(Text(f"{f.level:8s}", STYLES[f.level]) + Text(f"{f.topic}: {f.what}"))
        why, said = f.why if f.why != said else "", f.why  # the same refusals hold for several operations
        for label, value in (("why", why), ("do", f.fix), ("source", f.source)):
            if value:
                console.print(Text(f"{'':8s}  {label}: {value}", "dim" if label == "source" else ""))


def verdict(found: list[Finding]) -> str:
    """The last line."""
    counts: dict[Level, int] = {level: sum(f.level == level for f in found) for level in LEVELS}
    words = [f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in ("error", "warning", "note")]
    worst = max((f.level for f in found), key=lambda level: EXIT_CODES[level], default="ok")
    meaning = {0: "ready", 1: "it will run; read the warnings", 2: "mend the errors first"}[EXIT_CODES[worst]]
    return f"{', '.join(words)}: {meaning}"
