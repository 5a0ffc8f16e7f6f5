"""Reads a workdir as far as it goes: a run that is half-way, or was stopped in the middle of a line, still
has a report."""

import dataclasses
import datetime
import itertools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moejax.report.blocks import is_number
from moejax.results import ResultRow, scan_rows

STEPPED = ("train", "valid", "load")
FILES = ("config.json", "env.json", "metrics.jsonl", "results.jsonl", "sweep.json")
"""What a workdir is known by; a run writes the first before it makes anything, a sweep the last."""


@dataclasses.dataclass
class Run:
    """Everything that a workdir holds; what is missing is empty."""

    path: Path
    key: str = "run-1"
    """Distinguishes runs in one report; begins the ids of their figures and sections."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    env: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    """Lines of metrics.jsonl by kind, ordered by step."""
    rows: list[ResultRow] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return self.metrics.get(kind, [])

    def last(self, kind: str) -> dict[str, Any]:
        """The last line of a kind, or {}."""
        return self.lines(kind)[-1] if self.lines(kind) else {}

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.name or self.path)

    @property
    def step(self) -> int:
        return max((line["step"] for kind in STEPPED for line in self.lines(kind)), default=0)

    @property
    def steps(self) -> int | None:
        """Steps that the config asks for."""
        steps = dig(self.config, "train", "steps")
        return steps if isinstance(steps, int) else None

    @property
    def status(self) -> str:
        if self.lines("final"):
            return "finished"
        if not any(self.metrics.values()):
            return "not started" if not self.rows else "results only"
        return f"at step {self.step:,}" + (f" of {self.steps:,}" if self.steps else "")


def dig(value: Any, *keys: str) -> Any:
    """``value[keys[0]][keys[1]]...``, or None where the path ends early."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def read_run(workdir: str | Path, key: str = "run-1") -> Run:
    """Reads ``config.json``, ``env.json``, ``metrics.jsonl`` and ``results.jsonl``; what cannot be read is a
    problem.

    Raises:
      FileNotFoundError: see :func:`check_workdir`.
    """
    path = Path(workdir)
    check_workdir(path)
    run = Run(path, key)
    run.config = _read_json(path / "config.json", run.problems)
    run.env = _read_json(path / "env.json", run.problems)
    run.metrics = _read_metrics(path / "metrics.jsonl", run.problems)
    run.rows, broken = scan_rows(path / "results.jsonl")
    run.problems += broken
    return run


def check_workdir(path: Path) -> None:
    """Raises FileNotFoundError where there is no such folder, or nothing of a run or a sweep in it."""
    if not path.is_dir():
        raise FileNotFoundError(f"--workdir={path}: no such folder; give the --workdir of a run")
    if _is_workdir(path):
        return
    below = [str(folder) for folder in sorted(path.iterdir()) if folder.is_dir() and _is_workdir(folder)]
    raise FileNotFoundError(
        f"--workdir={path}: is no workdir, the folder that a run or a sweep was given as --workdir and wrote into: it "
        f"has no {', '.join(FILES[:-1])} or {FILES[-1]} of one"
        + (f". Below it are {', '.join(below[:4])}" + (", ..." if len(below) > 4 else "") if below else "")
        + ". Results files alone are given as --results=FILE"
    )


def _is_workdir(path: Path) -> bool:
    there = [name for name in FILES if (path / name).exists()]
    if there != ["config.json"]:
        return bool(there)
    config = _read_json(path / "config.json", [])
    return not config or "model" in config  # else of other weights: a Hugging Face folder


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        problems.append(f"{path.name}: not JSON ({error}); its facts are left out.")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name}: expected an object, got {type(value).__name__}; its facts are left out.")
        return {}
    return value


def _read_metrics(path: Path, problems: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Lines by kind. A run that was resumed repeats steps: what it wrote later replaces that step and all
    after it."""
    metrics: dict[str, list[dict[str, Any]]] = {}
    if not path.exists():
        return metrics
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    broken = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):  # a last line without its newline is a writer at work
                broken.append(number)
            continue
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            broken.append(number)
            continue
        kind, step = value["kind"], value.get("step")
        known = metrics.setdefault(kind, [])
        if kind in STEPPED:
            if not isinstance(step, int):
                broken.append(number)
                continue
            while known and known[-1]["step"] >= step:
                known.pop()
        known.append(value)
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (" ..." if len(broken) > 5 else "")
        problems.append(f"{path.name}: {len(broken)} lines cannot be read and are left out (line {shown}).")
    return metrics


def seconds(time: Any) -> float | None:
    """A time of metrics.jsonl in seconds: a number as it is, ISO 8601 since 1970."""
    if is_number(time):
        return float(time)
    if isinstance(time, str):
        try:
            return datetime.datetime.fromisoformat(time).timestamp()
        except ValueError:
            return None
    return None


def running_time(lines: Iterable[dict[str, Any]]) -> float | None:
    """Seconds between the first and the last line, without the pauses between processes.

    A pause is a step back in time (each process counts from its own start) or a gap of more than 20 usual
    ones and a minute.
    """
    times = [t for t in (seconds(line.get("time")) for line in lines) if t is not None]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    if not gaps:
        return None
    longest = max(60.0, 20 * statistics.median(gaps))
    return sum(gap for gap in gaps if 0 <= gap <= longest)


def series(lines: Iterable[dict[str, Any]], *keys: str) -> tuple[list[int], list[float]]:
    """Steps and values of one field, where it is a finite number."""
    steps, values = [], []
    for line in lines:
        value = dig(line, *keys)
        if is_number(value):
            steps.append(line["step"])
            values.append(float(value))
    return steps, values


def names(lines: Iterable[dict[str, Any]], key: str) -> list[str]:
    """Keys of a mapping field over all lines, in order of appearance (domains, for example)."""
    found: dict[str, None] = {}
    for line in lines:
        if isinstance(line.get(key), dict):
            found |= dict.fromkeys(line[key])
    return list(found)
