"""The section of a sweep's folder: which points finished, failed or wait. Its table is made from its results rows."""

import json
from pathlib import Path
from typing import Any

from moejax.report.blocks import NONE, Block, Cell, Facts, Notes, Section, Table, duration, number
from moejax.report.load import Run

LEDGER = "sweep.json"
LONG = 24
"""Points from which on their table is folded."""


def ledger(run: Run) -> dict[str, Any]:
    """``sweep.json`` of a sweep's folder (``docs/sweeps.md``), {} for other folders.

    Raises:
      ValueError: it is no JSON object with points and runs.
    """
    path = run.path / LEDGER
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    if not (isinstance(found, dict) and isinstance(found.get("points"), list) and isinstance(found.get("runs"), dict)):
        raise ValueError(f"{LEDGER} has no points and runs")
    return found


def progress(found: dict[str, Any]) -> str:
    """How far a sweep is: "35 of 36 points finished, 1 failed"."""
    statuses = [(found["runs"].get(name) or {}).get("status", "waiting") for name in found["points"]]
    words = [f"{statuses.count('finished')} of {len(statuses)} points finished"]
    words += [f"{n} {word}" for word in ("failed", "stopped", "running", "waiting") if (n := statuses.count(word))]
    return ", ".join(words)


def title(run: Run) -> tuple[str, str]:
    """Name and status of a run, or of the sweep that its folder holds."""
    try:
        found = ledger(run)
    except (OSError, ValueError):
        found = {}
    if not found:
        return run.name, run.status
    return f"sweep {Path(str(found.get('sweep') or run.path.name)).stem}", progress(found)


def sweep(run: Run) -> list[Section]:
    """Progress, failures and every point of a sweep; [] for a folder that is none."""
    found = ledger(run)
    if not found:
        return []
    entries = {name: found["runs"].get(name) or {} for name in found["points"]}
    items = [("progress", progress(found))]
    items += [(name, str(found[name])) for name in ("sweep", "config", "command") if found.get(name)]
    blocks: list[Block] = [Facts(items)]
    failed = [
        f"{name}: {entry.get('why', 'failed')}. {(entry.get('error') or 'It said nothing.').splitlines()[-1]}"
        for name, entry in entries.items()
        if entry.get("status") == "failed"
    ]
    if failed:
        blocks.append(Notes(failed, "problem"))
    rows = [
        [
            Cell(str(entry.get("label", name))),
            number(str(entry.get("seed", NONE))),
            Cell(str(entry.get("status", "waiting"))),
            number(duration(entry.get("seconds"))),
            Cell(name, "code"),
        ]
        for name, entry in entries.items()
    ]
    columns = ["point", "seed", "status", "wall time, last start", "folder"]
    blocks.append(Table(columns, rows, "Points, in the order of the sweep file", folded=len(rows) > LONG))
    return [Section("sweep", "Sweep", blocks)]
