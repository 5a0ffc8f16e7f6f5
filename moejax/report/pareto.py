"""Quality over time: rows that say how fast an arm is, and rows that say how good, joined by arm and factor.

Times are those of ``experiments.limit_speed``, and of ``experiments.ep_simulation``; quality that of the tables of
Capacity-Aware Inference. They may be of two models, and one factor drops another share of the pairs where loads are
more even: both shares stand beside each point.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from moejax.report import plots
from moejax.report.blocks import Cell, Figure, Notes, Section, Table, fixed, is_number, number, percent, significant
from moejax.report.load import Run
from moejax.results import ResultRow

QUALITY = "bits_per_byte"
TIMES = {
    "speedup/layer": "an MoE layer",
    "speedup/prefill": "a prefill",
    "layer_speedup": "an MoE layer, simulated on 8 ranks",
    "whole_speedup": "end to end, simulated on 8 ranks",
}
BASELINE, FEWER, EXACT = "no limit", "lower top-k", "replication"
"""An arm that is exact is as good as the baseline."""

Setting = tuple[str, float | None]
"""An arm, and its factor, or the share of the experts per token that it keeps; None for one that has neither."""


class Point(NamedTuple):
    arm: str
    strength: float | None
    time: float
    """As a share of that without a limit."""
    quality: float
    dropped: tuple[float | None, float | None]
    """Share of the pairs, where time and where quality was measured."""


def sections(runs: Sequence[Run]) -> list[Section]:
    """A section for each pair of times and quality that have two arms or more in common beside the exact one, whose
    quality needs no row; none where there are none."""
    rows = [row for run in runs for row in run.rows if row.kind == "value" and row.value is not None]
    timed, scored = _times(rows), _quality(rows)
    found = []
    for (what, metric), fast in timed.items():
        for model, good in scored.items():
            points = joined(fast, good)
            if len({point.arm for point in points} - {EXACT}) > 1:
                name = f"pareto-{len(found) + 1}"
                found.append(_section(name, f"{what}, {TIMES[metric]}", model, points, good))
    return found


def setting_of(row: ResultRow) -> Setting | None:
    """The setting that a row of either kind is of."""
    arm = row.extra.get("method") or row.extra.get("arm")
    if not isinstance(arm, str):
        return None
    if fewer := re.search(r"top-(\d+) of (\d+)", row.row):
        return FEWER, int(fewer[1]) / int(fewer[2])
    arm = arm.rpartition(": ")[2]  # a simulation names its model first
    if arm.startswith(EXACT):
        return EXACT, None
    factor = row.extra.get("factor_used", row.extra.get("factor"))
    if factor is None and row.extra.get("x_name") == "capacity factor":
        factor = row.extra.get("x")
    return arm, float(factor) if is_number(factor) else None


def _times(rows: Sequence[ResultRow]) -> dict[tuple[str, str], dict[Setting, ResultRow]]:
    """By what was timed and how."""
    found: dict[tuple[str, str], dict[Setting, ResultRow]] = {}
    for row in rows:
        if row.metric in TIMES and row.value and (setting := setting_of(row)):
            what = (row.baseline_row or row.row).removesuffix(f": {BASELINE}").removesuffix(", none")
            found.setdefault((what, row.metric), {})[setting] = row
    return found


def _quality(rows: Sequence[ResultRow]) -> dict[str, dict[Setting, ResultRow]]:
    """By model."""
    found: dict[str, dict[Setting, ResultRow]] = {}
    for row in rows:
        if row.metric == QUALITY and row.table in ("sweep", "3", "latency") and (setting := setting_of(row)):
            found.setdefault(f"{row.config} ({row.checkpoint_hash})", {})[setting] = row
    return found


def joined(fast: dict[Setting, ResultRow], good: dict[Setting, ResultRow]) -> list[Point]:
    """What both know, in the order of the times; nothing where the quality without a limit is not known."""
    base = (BASELINE, None)
    if base not in good:
        return []
    points = []
    for setting, row in fast.items():
        scored = good.get(base if setting == (EXACT, None) else setting)
        if scored is None or setting == base or row.value is None or scored.value is None:
            continue
        arm, strength = setting
        dropped = (row.extra.get("drop_rate", row.extra.get("dropped_share")), scored.extra.get("dropped_share"))
        if arm == FEWER and strength is not None:  # of a router that makes fewer pairs none is dropped
            dropped = (1 - strength, 1 - strength)
        points.append(Point(arm, strength, 1 / row.value, scored.value, dropped))
    return points


def front(points: Sequence[Point], base: float) -> list[Point]:
    """Those for which no other, nor the baseline (time 1, quality ``base``), is as fast and as good, and better in one
    of the two. Lower quality values are better."""

    def beaten(p: Point, time: float, quality: float) -> bool:
        return time <= p.time and quality <= p.quality and (time < p.time or quality < p.quality)

    return [p for p in points if not beaten(p, 1.0, base) and not any(beaten(p, q.time, q.quality) for q in points)]


def _section(name: str, what: str, model: str, points: list[Point], good: dict[Setting, ResultRow]) -> Section:
    base = good[BASELINE, None].value
    assert base is not None
    best = front(points, base)
    by_arm: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.time):
        by_arm.setdefault(point.arm, []).append(point)
    lines = [plots.Line(arm, [p.time for p in mine], [p.quality for p in mine]) for arm, mine in by_arm.items()]
    xname, yname = "time, as a share of that without a limit", "bits per byte"
    caption = f"Time of {what}; quality of {model}. Joined by arm and factor."
    alt = f"{yname} over {xname}. " + "; ".join(
        f"{line.label}: " + ", ".join(f"{y:.4g} at {x:.3g}" for x, y in zip(line.x, line.y, strict=True))
        for line in lines
    )
    columns = ["arm", "factor, or share of k", "time", "speed-up", yname, "on the front", "dropped where timed",
               "dropped where scored"]  # fmt: skip
    ordered = [point for mine in by_arm.values() for point in mine]
    data = [columns, *([p.arm, p.strength, p.time, 1 / p.time, p.quality, p in best, *p.dropped] for p in ordered)]
    figure = Figure(
        name, plots.arms(lines, (f"{BASELINE} (time 1)", base), name, alt, xname, yname), alt, caption, data
    )
    table = Table(columns, [
        [Cell(p.arm), number(significant(p.strength)), number(percent(p.time, 1)), number(f"{fixed(1 / p.time)}×"),
         number(fixed(p.quality, 4)), Cell("yes" if p in best else "no"), *(number(percent(d, 1)) for d in p.dropped)]
        for p in ordered
    ], f"Quality over time. {BASELINE}: {fixed(base, 4)}.")  # fmt: skip
    notes = [
        "Times and quality are of two models: at one factor each drops its own share of the pairs.",
        "On the front: no other setting is as fast and as good, and better in one of the two. What differs by less "
        "than its margin or interval does not part two settings.",
    ]
    return Section(name, f"Quality over time: {what}", [figure, table, Notes(notes)])
