"""Sections made from results rows: a paper's table with its plot and contrasts, verdict counts, and what is
not shown."""

import math
import re
from collections.abc import Sequence
from typing import Any

from moejax.report import plots
from moejax.report.blocks import (
    MINUS,
    NONE,
    Block,
    Cell,
    Counts,
    Facts,
    Figure,
    Notes,
    Row,
    Section,
    Table,
    fixed,
    is_number,
    metric_words,
    number,
    percent,
    significant,
    span,
)
from moejax.report.imported import OWN_TABLES
from moejax.report.load import Run
from moejax.results import ResultRow
from moejax.verdicts import count_verdicts
from moejax.verdicts.contrast import known_sign

SWEEP = "sweep"
"""``paper`` of the rows that ``experiments.sweep`` makes."""
PAPERS = {
    SWEEP: "Sweep",
    "capacity_aware": "Capacity-Aware Inference, arXiv 2503.05066",
    "dualsparse": "DualSparse-MoE, arXiv 2508.18376",
    "scmoe": "ScMoE, arXiv 2404.05019",
    "specmoeoff": "SpecMoEOff, arXiv 2508.21706",
    "pec": "Partial Experts Checkpoint, arXiv 2408.04307",
    "survey": "A Survey on Mixture of Experts, arXiv 2407.06204",
    "parity": "Parity with transformers",
    "loading": "Loading a published checkpoint",
}
MAX_PLOTS = 4


def group_rows(rows: Sequence[ResultRow]) -> dict[tuple[str, str, str], list[ResultRow]]:
    """Rows by (paper, table, config's name or else scale), in order of appearance: one table each."""
    groups: dict[tuple[str, str, str], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault((row.paper, row.table, row.config or f":{row.scale}"), []).append(row)
    return groups


def table_title(paper: str, table: str, setting: str) -> str:
    name = f"table {table}" if table[:1].isdigit() else table
    return f"{PAPERS.get(paper, paper)}: {name}" + (f" ({setting})" if setting.strip(":") else "")


def headline(rows: Sequence[ResultRow]) -> str | None:
    """The metric that the contrasts are about, else the first one."""
    for kind in ("contrast", "value"):
        for row in rows:
            if row.kind == kind:
                return row.metric
    return None


def tables(run: Run) -> list[Section]:
    """One section for each table of the results rows."""
    if not run.rows:
        return [Section("tables", "Tables", absent="No results row has been written yet.")]
    sections = []
    for i, ((paper, table, setting), rows) in enumerate(group_rows(run.rows).items()):
        title = table_title(paper, table, setting)
        sections.append(Section(f"table-{i + 1}", title, _table_blocks(rows, f"{run.key}-table-{i + 1}")))
    return sections


def _table_blocks(rows: Sequence[ResultRow], key: str) -> list[Block]:
    values = [row for row in rows if row.kind == "value"]
    contrasts = [row for row in rows if row.kind == "contrast"]
    first = headline(rows)
    metrics = sorted({row.metric: None for row in values}, key=lambda metric: metric != first)
    figures = [figure for i, m in enumerate(metrics) if (figure := arm_figure(values, m, f"{key}-{i}"))]
    published = published_figure(values, f"{key}-published")
    if published and figures:
        figures.insert(1, published)
    blocks: list[Block] = []
    if contrasts:
        blocks.append(contrast_table(contrasts))
        reasons = contrast_reasons(contrasts)
        blocks += [reasons] if reasons else []
    figures = figures[:MAX_PLOTS]
    forest = forest_figure(contrasts, f"{key}-contrasts")
    if forest:
        figures.append(forest)
    if figures:
        blocks.append(Row(figures))
    return [*blocks, *value_tables(values, first), *_origin(rows)]


def _origin(rows: Sequence[ResultRow]) -> list[Block]:
    """Where the rows come from; "" for what they do not say."""
    shapes = sorted({" × ".join(map(str, row.batch_shape)) for row in rows if row.batch_shape})
    commits = {row.commit + (" (with uncommitted changes)" if row.dirty else "") for row in rows if row.commit}
    items = [
        ("evaluation batch, sequences × tokens; limits act within it", " or ".join(shapes)),
        ("device", ", ".join(sorted({f"{row.device} × {row.device_count}" for row in rows if row.device}))),
        ("config hash", ", ".join(sorted({row.config_hash for row in rows if row.config_hash}))),
        ("checkpoint hash", ", ".join(sorted({row.checkpoint_hash for row in rows if row.checkpoint_hash}))),
        ("commit", ", ".join(sorted(commits))),
        *(("command", command) for command in commands(rows)),
    ]
    known = [(name, value) for name, value in items if value]
    return [Facts(known)] if known else []


def commands(rows: Sequence[ResultRow]) -> list[str]:
    """The commands that made the rows, each once; of a sweep the one that makes all its rows."""
    return sorted({re.sub(r" '?--only=.*", "", row.command) for row in rows if row.command})


def value_tables(values: Sequence[ResultRow], first: str | None) -> list[Table]:
    """One table for each metric, ``first`` ahead; where there is one row of many metrics, one table of them all; for
    some papers a table of their own."""
    metrics = sorted({row.metric: None for row in values}, key=lambda metric: metric != first)
    if len(metrics) > 1 and len({row.row for row in values}) == 1:
        return [metric_table(values)]
    if values and values[0].paper in OWN_TABLES:
        return [OWN_TABLES[values[0].paper](values)]
    return [value_table([r for r in values if r.metric == m], folded=m != metrics[0]) for m in metrics]


def metric_table(rows: Sequence[ResultRow]) -> Table:
    """All metrics of one row, with the byte 6-gram's value beside bits per byte."""
    cells = [
        [
            Cell(metric_words(row.metric), title=f"row {row.id}"),
            number(NONE if row.value is None else digits_of(row)),
            Cell(row.unit),
            number(fixed(row.extra["byte_6_gram"], 4) if is_number(row.extra.get("byte_6_gram")) else NONE),
            number(str(len(row.values_by_seed)) if row.values_by_seed else NONE),
        ]
        for row in rows
    ]
    caps = {int(row.extra["ngram_max_train_bytes"]) for row in rows if row.extra.get("ngram_max_train_bytes")}
    caption = f"{rows[0].row}, best checkpoint."
    caption += "".join(
        f" The n-gram was fitted on the first {cap / 1e6:g} MB of each domain's train text." for cap in caps
    )
    return Table(["metric", "ours", "unit", "byte 6-gram", "seeds"], cells, caption, False)


def value_table(rows: Sequence[ResultRow], folded: bool = False) -> Table:
    """Row, ours, interval, seeds, published, touched pairs, verdict, for the rows of one metric; and commits where they
    differ, as rows of two may have one name."""
    metric, unit = metric_words(rows[0].metric), rows[0].unit
    mixed = len({row.commit for row in rows}) > 1
    cells = []
    for row in rows:
        baseline = f", against {row.baseline_row}" if row.baseline_row else ""
        cells.append(
            [
                Cell(row.row, title=f"row {row.id}{baseline}"),
                number(NONE if row.value is None else digits_of(row)),
                Cell(span(row.interval), "number", row.interval_kind),
                number(str(len(row.values_by_seed)) if row.values_by_seed else NONE),
                Cell(published_words(row), "number"),
                number(percent(row.exercised_share)),
                Cell(row.verdict or NONE, "verdict" if row.verdict else "text", row.verdict_note),
                Cell((row.commit or "")[:7] or NONE if mixed else NONE),
            ]
        )
    columns = ["row", f"ours, {unit or metric}", "interval", "seeds", "published", "pairs touched", "verdict", "commit"]
    kinds = sorted({row.interval_kind for row in rows if row.interval_kind})
    notes = sorted({row.published_metric for row in rows if row.published is not None and row.published_metric})
    caption = metric[:1].upper() + metric[1:]
    if known_sign(rows[0].metric):
        caption += " (lower is better)" if known_sign(rows[0].metric) == "a < b" else " (higher is better)"
    caption += "".join(f". Interval: {kind}" for kind in kinds)
    caption += "".join(f". Published: {note}" for note in notes)
    sweep = rows[0].paper == SWEEP
    if not sweep and any(row.verdict is None for row in rows):
        caption += ". A row without a verdict is judged by the contrasts only"
    keep = [
        i
        for i, name in enumerate(columns)
        if i < 2 or (name == "verdict" and not sweep) or any(line[i].text != NONE for line in cells)
    ]
    return Table([columns[i] for i in keep], [[line[i] for i in keep] for line in cells], caption + ".", folded)


def digits_of(row: ResultRow) -> str:
    """The value as a table shows it: four decimals for bits per byte, else four significant digits."""
    if row.metric.split("/")[0].endswith("share") and row.unit in ("", "share"):
        return percent(row.value)
    return fixed(row.value, 4) if "byte" in row.unit and "bit" in row.unit else significant(row.value)


def published_words(row: ResultRow) -> str:
    return NONE if row.published is None else f"{row.published:,.6g}".replace("-", MINUS)


def contrast_claim(row: ResultRow) -> str:
    """The claim in words, with the sign as it is in the metric."""
    symbol = "<" if row.sign == "a < b" else ">"
    if row.claim == "no_loss":
        return f"{row.arm_a} loses less than {row.margin:g} to {row.arm_b}"
    return f"{row.arm_a} {symbol} {row.arm_b} by more than {row.margin:g}"


def contrast_table(rows: Sequence[ResultRow]) -> Table:
    """What was claimed before the run, what came out, and the verdict."""
    cells = [
        [
            Cell(row.row, title=f"row {row.id}"),
            Cell(row.verdict or NONE, "verdict" if row.verdict else "text", row.verdict_note),
            Cell(contrast_claim(row)),
            number(fixed(row.difference, 4, signed=True)),
            Cell(span(row.interval, signed=True), "number", row.interval_kind),
            number(percent(row.exercised_share)),
        ]
        for row in rows
    ]
    unit = f", {rows[0].unit}" if rows[0].unit else ""
    columns = ["contrast", "verdict", "claim", f"a − b{unit}", "interval", "pairs touched"]
    metrics = list({metric_words(row.metric): None for row in rows})
    return Table(columns, cells, f"Contrasts in {' and '.join(metrics)}, stated before the run.")


def contrast_reasons(rows: Sequence[ResultRow]) -> Notes | None:
    """Why each verdict is what it is."""
    found = []
    for row in rows:
        kind = f" ({row.interval_kind})" if row.interval_kind else ""
        if row.verdict_note or kind:
            found.append(f"{row.row}: {row.verdict_note}{kind}.")
    return Notes(found) if found else None


def plot_point(row: ResultRow) -> tuple[str, float, str] | None:
    """(arm, x, name of x) of a row that belongs in a plot, from ``extra``."""
    for key in ("x", "capacity_factor", "factor"):
        x = row.extra.get(key)
        if is_number(x):
            name = row.extra.get("x_name") or ("capacity factor" if key != "x" else "x")
            return str(row.extra.get("arm", row.row)), float(x), str(name)
    return None


def _lines(points: Sequence[tuple[str, float, Any]]) -> list[tuple[str, list[tuple[float, Any]]]]:
    by_arm: dict[str, list[tuple[float, Any]]] = {}
    for arm, x, item in points:
        by_arm.setdefault(arm, []).append((x, item))
    return [(arm, sorted(items, key=lambda item: item[0])) for arm, items in by_arm.items()]


def arm_figure(rows: Sequence[ResultRow], metric: str, name: str) -> Figure | None:
    """Ours over the table's variable, one line per arm, the baseline as a dashed level."""
    mine = [row for row in rows if row.metric == metric and row.value is not None]
    found = [(row, point) for row in mine if (point := plot_point(row))]
    if len({point[1] for _, point in found}) < 2:
        return None
    baselines = {row.baseline_row for row, _ in found}
    base = next((row for row in mine if row.row in baselines and plot_point(row) is None), None)
    lines: list[plots.Line] = []
    data: list[list[Any]] = [["arm", found[0][1][2], metric_words(metric), "interval low", "interval high"]]
    for arm, items in _lines([(point[0], point[1], row) for row, point in found]):
        ends = [row.interval or (math.nan, math.nan) for _, row in items]
        lines.append(
            plots.Line(
                arm,
                [x for x, _ in items],
                [row.value for _, row in items],
                [e[0] for e in ends],
                [e[1] for e in ends],
            )
        )
        data += [[arm, x, row.value, *(row.interval or ("", ""))] for x, row in items]
    words, unit, xname = metric_words(metric), mine[0].unit, found[0][1][2]
    level = (f"{base.row} (baseline)", base.value) if base is not None and base.value is not None else None
    alt = f"Ours: {words} over {xname}. " + "; ".join(
        f"{line.label}: " + ", ".join(f"{y:.4g} at {x:g}" for x, y in zip(line.x, line.y, strict=True))
        for line in lines
    )
    caption = f"Ours: {words} over {xname}." + (
        f" Dashed: {base.row}, {significant(base.value)}." if base and level else ""
    )
    ylabel = f"{words}{f' ({unit})' if unit and unit.replace('/', ' per ') not in words else ''}"
    return Figure(name, plots.arms(lines, level, name, alt, xname, ylabel), alt, caption, data)


def published_figure(rows: Sequence[ResultRow], name: str) -> Figure | None:
    """What the paper printed, in its own metric, on its own axis."""
    metric = next((row.metric for row in rows if row.published is not None), None)
    mine = [row for row in rows if row.metric == metric and row.published is not None]
    found = [(row, point) for row in mine if (point := plot_point(row))]
    if len({point[1] for _, point in found}) < 2:
        return None
    baselines = {row.baseline_row for row, _ in found}
    base = next((row for row in mine if row.row in baselines and plot_point(row) is None), None)
    arms = _lines([(point[0], point[1], row) for row, point in found])
    lines = [plots.Line(arm, [x for x, _ in items], [row.published for _, row in items]) for arm, items in arms]
    label = next((row.published_metric for row in mine if row.published_metric), "") or metric_words(str(metric))
    xname = found[0][1][2]
    alt = f"Published: {label} over {xname}. " + "; ".join(
        f"{line.label}: " + ", ".join(f"{y:g} at {x:g}" for x, y in zip(line.x, line.y, strict=True)) for line in lines
    )
    level = (f"{base.row} (baseline)", base.published) if base is not None and base.published is not None else None
    data = [
        ["arm", xname, label],
        *([line.label, x, y] for line in lines for x, y in zip(line.x, line.y, strict=True)),
    ]
    short = label if len(label) <= 34 else "published value"
    figure = plots.arms(lines, level, name, alt, xname, short)
    return Figure(name, figure, alt, f"Published: {label}. Another axis and perhaps another direction than ours.", data)


def forest_figure(rows: Sequence[ResultRow], name: str) -> Figure | None:
    """Advantage and interval of each contrast against its border."""
    entries: list[tuple[str, float, tuple[float, float] | None, float]] = []
    data: list[list[Any]] = [["contrast", "advantage", "low", "high", "border"]]
    for row in rows:
        if row.difference is None or row.margin is None or row.sign not in ("a < b", "a > b"):
            continue
        turn = -1.0 if row.sign == "a < b" else 1.0
        low, high = sorted(turn * end for end in row.interval) if row.interval else (0.0, 0.0)
        interval = (low, high) if row.interval else None
        border = -row.margin if row.claim == "no_loss" else row.margin
        entries.append((row.row, turn * row.difference, interval, border))
        data.append([row.row, turn * row.difference, *(interval or ("", "")), border])
    if not entries:
        return None
    unit = next((row.unit for row in rows if row.unit), metric_words(rows[0].metric))
    alt = "Advantage on the claimed side. " + "; ".join(f"{label}: {value:+.4g}" for label, value, *_ in entries)
    caption = "Advantage on the claimed side, with interval. A claim holds if all of it is beyond the border."
    return Figure(name, plots.forest(entries, name, alt, f"advantage, {unit}"), alt, caption, data)


def verdict_counts(runs: Sequence[Run], anchor: str = "verdicts") -> Section:
    """How often each verdict occurs, losses like wins."""
    found = [row.verdict for run in runs for row in run.rows if row.verdict]
    if not found:
        return Section(anchor, "Verdicts", absent="No row has a verdict yet.")
    return Section(anchor, "Verdicts", [Counts(list(count_verdicts(found).items()))])
