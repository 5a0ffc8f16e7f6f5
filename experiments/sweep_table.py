"""The table of a sweep: what the finished points measured, as mean and interval over seeds."""

import csv
import dataclasses
import fnmatch
import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from experiments.sweep_points import SEED, Point, short_name, shown
from experiments.training_rows import PAPER as TRAINING
from moejax.config import ConfigError, ExperimentConfig, config_hash
from moejax.report.blocks import significant
from moejax.report.tables import SWEEP as PAPER
from moejax.results import ResultRow, scan_rows
from moejax.verdicts import SeedDifferences
from moejax.verdicts.contrast import known_sign

MEAN = "bits_per_byte/mean"
"""Mean over domains of a run's held-out bits per byte; made here."""
SHOWN = (MEAN, "tokens_per_s")
INTERVAL = "95 %, t over seeds"
FEWEST = 3
"""Seeds that an interval needs, as everywhere (``docs/results.md``)."""


@dataclasses.dataclass
class Group:
    """Points that differ in the training seed only: one row of the table."""

    label: str
    points: list[Point]
    finished: list[Point] = dataclasses.field(default_factory=list)
    rows: list[ResultRow] = dataclasses.field(default_factory=list)
    """Over the finished points; those of the training first, in the order in which a run writes them."""

    def find(self, metric: str) -> ResultRow | None:
        return next((row for row in self.rows if row.metric == metric and row.row == self.label), None)


def without_seed(config: ExperimentConfig) -> ExperimentConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))


def groups(
    points: Sequence[Point], finished: Sequence[Point], folder: Path, table: str, command: str
) -> tuple[list[Group], list[str]]:
    """The rows of the table in the sweep's order, and what could not be read.

    Args:
      table: name of the table in the rows.
      command: command line of the sweep; each row's names its own points.
    """
    found: dict[ExperimentConfig, Group] = {}
    for point in points:
        found.setdefault(without_seed(point.config), Group(point.label, [])).points.append(point)
    problems: list[str] = []
    fields = varied(points)
    for group in found.values():
        group.finished = [point for point in group.points if point in finished]
        measured = []
        for point in group.finished:
            rows, broken = scan_rows(folder / point.name / "results.jsonl")
            problems += broken
            measured.append(_newest(rows))
        place = _place(group, fields, list(found.values()))
        group.rows = _over_seeds(group, measured, place, table, command)
    return list(found.values()), problems


def varied(points: Sequence[Point]) -> list[str]:
    """Fields that the sweep sets, but for the seed, in alphabetical order."""
    return sorted({path for point in points for path in point.overrides} - {SEED})


_Key = tuple[str, str, str, str]


def _newest(rows: Sequence[ResultRow]) -> dict[_Key, ResultRow]:
    """Values of one run, the newest of each, with the mean over domains.

    A table that was made again with another config (fewer tasks or arms) leaves rows of the old one in the file; they
    are not of this point.
    """
    newest: dict[_Key, ResultRow] = {}
    by_time = sorted(rows, key=lambda row: row.time)
    config = {(row.paper, row.table): row.config_hash for row in by_time}
    for row in by_time:
        if row.kind == "value" and row.value is not None and row.config_hash == config[row.paper, row.table]:
            newest[(row.paper, row.table, row.row, row.metric)] = row
    ordered = {k: newest[k] for k in sorted(newest, key=lambda k: k[0] != TRAINING)}
    domains = [r for k, r in ordered.items() if k[0] == TRAINING and r.metric.startswith("bits_per_byte/")]
    if not domains:
        return ordered
    first = domains[0]
    mean = float(np.mean([row.value for row in domains]))
    by_seed = dict.fromkeys(first.values_by_seed, mean)
    row = dataclasses.replace(first, metric=MEAN, value=mean, values_by_seed=by_seed, extra={})
    return {(row.paper, row.table, row.row, MEAN): row, **ordered}


def _over_seeds(
    group: Group, measured: Sequence[Mapping[_Key, ResultRow]], place: dict[str, Any], table: str, command: str
) -> list[ResultRow]:
    made = []
    for key in dict.fromkeys(key for rows in measured for key in rows):
        mine = [rows[key] for rows in measured if key in rows]
        first = mine[0]
        by_seed = {seed: value for row in mine for seed, value in row.values_by_seed.items()}
        values = list(by_seed.values()) or [row.value for row in mine if row.value is not None]
        interval = SeedDifferences(values).interval() if len(values) >= FEWEST else None
        commits = sorted({row.commit for row in mine})
        touched = [row.exercised_share for row in mine if row.exercised_share is not None]
        at = place
        if place and first.paper != TRAINING:  # a table's rows are lines of their own
            at = {**place, "arm": f"{place['arm']}: {first.row}"}
        row = ResultRow(
            kind="value", paper=PAPER, table=table,
            row=group.label if first.paper == TRAINING else f"{group.label}: {first.row}",
            metric=first.metric, unit=first.unit, value=float(np.mean(values)), values_by_seed=by_seed,
            interval=interval, interval_kind=INTERVAL if interval else "",
            exercised_share=float(np.mean(touched)) if touched else None, scale=first.scale, config=first.config,
            config_hash=config_hash(without_seed(group.points[0].config)),
            data_hash=_common(row.data_hash for row in mine), batch_shape=first.batch_shape,
            command=f"{command} {shlex.quote(f'--only={group.label}')}",
            commit=_common(commits), dirty=any(row.dirty for row in mine) if first.dirty is not None else None,
            device=_common(row.device for row in mine), device_count=first.device_count, versions=first.versions,
            time=max(row.time for row in mine),
            extra={
                "points": [point.name for point in group.finished],
                "seeds_finished": len(group.finished), "seeds": len(group.points),
                "overrides": {k: v for k, v in group.points[0].overrides.items() if k != SEED},
                **{k: first.extra[k] for k in ("n", "stderr") if k in first.extra},  # of a task; seeds share its items
                **at,
                **({"commits": commits} if len(commits) > 1 else {}),
                **({"of": f"{first.paper} {first.table}"} if first.paper != TRAINING else {}),
            },
        )  # fmt: skip
        made.append(row)
    return made


def _common(values: Any) -> str:
    """The value that all have, or all of them."""
    return ", ".join(sorted(set(values)))


def _place(group: Group, fields: Sequence[str], found: Sequence[Group]) -> dict[str, Any]:
    """Where plots put the row: the number that the sweep varies most is x, the other fields name the line."""
    values = {field: [g.points[0].value(field) for g in found] for field in fields}
    numbers = [f for f in fields if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values[f])]
    if not numbers:
        return {}
    x = max(numbers, key=lambda field: len(set(values[field])))
    arm = ", ".join(f"{short_name(f)}={shown(group.points[0].value(f))}" for f in fields if f != x)
    return {"x": group.points[0].value(x), "x_name": short_name(x), "arm": arm or short_name(x)}


# --- as people see it -------------------------------------------------------------------------------------------------


def chosen_metrics(found: Sequence[Group], asked: Sequence[str]) -> list[str]:
    """Metrics of the terminal's table: those that match ``asked`` (file-name patterns), or a usual few.

    Raises:
      ConfigError: a pattern that matches no metric; the message lists them.
    """
    there = list(dict.fromkeys(row.metric for group in found for row in group.rows if row.row == group.label))
    if not there:
        return []
    if not asked:
        return [metric for metric in there if metric in SHOWN] or there[:3]
    for pattern in asked:
        if not fnmatch.filter(there, pattern):
            raise ConfigError(f"--metric={pattern}: no run of this sweep has it; there are {', '.join(there)}")
    return [metric for metric in there if any(fnmatch.fnmatch(metric, pattern) for pattern in asked)]


def rich_table(found: Sequence[Group], fields: Sequence[str], metrics: Sequence[str]) -> Table:
    """One line for each group: its fields, seeds finished of asked, and the metrics with intervals."""
    table = Table(box=box.SIMPLE_HEAD)
    for field in fields:
        table.add_column(short_name(field), overflow="fold")
    table.add_column("seeds", justify="right")
    best = {metric: _best(found, metric) for metric in metrics}
    units = {row.metric: row.unit for group in found for row in group.rows}
    for metric in metrics:
        unit = "" if units[metric].replace(" ", "_") in metric else f"\n{units[metric]}"
        table.add_column(f"{metric}{unit}", justify="right", overflow="fold")
    for group in found:
        cells = [escape(shown(group.points[0].value(field))) for field in fields]
        cells.append(f"{len(group.finished)}/{len(group.points)}")
        for metric in metrics:
            text = _value(group.find(metric))
            cells.append(f"[bold]* {text}[/bold]" if group is best[metric] else text)
        table.add_row(*cells)
    return table


def _value(row: ResultRow | None) -> str:
    if row is None or row.value is None:
        return "–"
    digits = 4 if "byte" in row.unit and "bit" in row.unit else None
    form = (lambda v: f"{v:.{digits}f}") if digits else significant
    if row.interval is None:
        return form(row.value)
    return f"{form(row.value)} ± {form((row.interval[1] - row.interval[0]) / 2)}"


def _best(found: Sequence[Group], metric: str) -> Group | None:
    """The group with the best mean, where the metric has a known direction and there is more than one."""
    sign = known_sign(metric)
    values = [(row.value, i) for i, group in enumerate(found) if (row := group.find(metric)) and row.value is not None]
    if sign is None or len(values) < 2:
        return None
    return found[(min(values) if sign == "a < b" else max(values))[1]]


def csv_text(found: Sequence[Group], fields: Sequence[str]) -> str:
    """All metrics, one line for each group and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["row", "metric", "unit", "mean", "low", "high", "seeds", "values"]
    writer.writerow([*fields, *head])
    for group in found:
        settings = [group.points[0].value(field) for field in fields]
        for row in group.rows:
            values = " ".join(f"{seed}:{value!r}" for seed, value in row.values_by_seed.items())
            ends = row.interval or ("", "")
            writer.writerow(
                [*settings, row.row, row.metric, row.unit, row.value, *ends] + [len(row.values_by_seed), values]
            )
    return out.getvalue()
