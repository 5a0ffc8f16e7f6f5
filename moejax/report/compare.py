"""Several runs beside each other: one line each, the config fields that differ, common figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.report import sections, tables
from moejax.report.blocks import NONE, Block, Cell, Notes, Row, Section, Table, fixed, number
from moejax.report.load import Run, series

MOST_FIELDS = 40
"""Differing fields that are shown open; a longer table is folded."""


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: ``{"train": {"steps": 3}} -> {"train.steps": 3}``."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run, unlike the others': the config's, with the folder's where that is not enough."""
    names = [run.name for run in runs]
    folders = [run.path.name for run in runs]
    unique = [n if names.count(n) == 1 else f"{n} ({folder})" for n, folder in zip(names, folders, strict=True)]
    return [
        label if unique.count(label) == 1 else f"{run.name} ({run.key})"
        for label, run in zip(unique, runs, strict=True)
    ]


def overview(runs: Sequence[Run]) -> list[Section]:
    """Several runs beside each other: one line each, differing fields, their losses in one figure, all verdicts."""
    named = labels(runs)
    found = [Section("runs", "Runs", _runs(runs, named))]
    if sum(bool(run.config) for run in runs) > 1:
        found.append(fields_section(runs, named))
    return [*found, tables.verdict_counts(runs, "all-verdicts")]


def _runs(runs: Sequence[Run], named: Sequence[str]) -> list[Block]:
    rows = []
    for run, label in zip(runs, named, strict=True):
        losses, valid = (series(run.lines(kind), key)[1] for kind, key in (("train", "ce"), ("valid", _MEAN)))
        rows.append(
            [
                Cell(label),
                Cell(str(run.path), "code"),
                Cell(run.status),
                number(fixed(losses[-1] if losses else None)),
                number(fixed(min(valid, default=None))),
                number(f"{len(run.rows):,}"),
            ]
        )
    columns = [
        "run",
        "workdir",
        "status",
        "last training cross-entropy, nats per token",
        "best validation, bits per byte",
        "results rows",
    ]
    curves = (
        ("train", "ce", "compare-train", "Training cross-entropy", "nats per token"),
        ("valid", _MEAN, "compare-valid", "Validation, mean of domains", "bits per byte"),
        ("train", "load_max_over_mean", "compare-load", "Busiest expert", "load / mean load"),
        ("train", "tokens_per_s", "compare-speed", "Speed", "tokens per second"),
    )
    figures = [
        sections.curve_figure(
            name,
            title,
            unit,
            [(label, series(run.lines(kind), key)) for run, label in zip(runs, named, strict=True)],
        )
        for kind, key, name, title, unit in curves
    ]
    shown = [figure for figure in figures if figure is not None]
    keep = [i for i in range(len(columns)) if any(row[i].text != NONE for row in rows)]
    table = Table([columns[i] for i in keep], [[row[i] for i in keep] for row in rows])
    return [table, *([Row(shown)] if shown else [])]


_MEAN = "mean_bits_per_byte"


def fields_section(runs: Sequence[Run], named: Sequence[str]) -> Section:
    """Config fields whose values differ between the runs, one column for each run."""
    configs = [flat(run.config) for run in runs]
    paths = dict.fromkeys(path for config in configs for path in config)
    known = [config for config in configs if config]
    different = [path for path in paths if len({repr(config.get(path, _ABSENT)) for config in known}) > 1]
    lost = [label for label, config in zip(named, configs, strict=True) if not config]
    blocks: list[Block] = []
    if different:
        rows = [[Cell(path, "code"), *(Cell(_words(c, path), "code") for c in configs)] for path in different]
        caption = f"{len(different)} of {len(paths)} fields differ."
        blocks.append(Table(["field", *named], rows, caption, folded=len(different) > MOST_FIELDS))
    else:
        blocks.append(Notes(["The runs have the same config."]))
    if lost:
        blocks.append(Notes([f"No config.json: {', '.join(lost)}."]))
    return Section("fields", "Differing fields", blocks)


_ABSENT = object()


def _words(config: Mapping[str, Any], path: str) -> str:
    value = config.get(path, _ABSENT)
    if value is _ABSENT:
        return NONE
    if isinstance(value, list):
        return "(" + ", ".join(map(str, value)) + ")"
    return '""' if value == "" else str(value)
