"""Sections about a run's health (``docs/healthy.md``): warnings and failures; expert load by domain and token class."""

import statistics
from collections.abc import Sequence
from typing import Any

from moejax.report.blocks import NONE, Cell, Notes, Row, Section, Table, fixed, is_number, number, percent, significant
from moejax.report.load import Run, dig
from moejax.report.sections import curve_figure

FIGURES = {
    "max_over_mean": ("max / mean", lambda v: fixed(v, 2, "×")),
    "cv": ("coefficient of variation", lambda v: fixed(v, 3)),
    "load_entropy": ("load entropy, 1 is even", lambda v: fixed(v, 3)),
    "entropy": ("router entropy, nats", lambda v: fixed(v, 3)),
    "dead": ("dead experts", significant),
    "dropped_share": ("dropped pairs", percent),
}
"""Field of a row of loads -> name of the column, and how a value is written."""
_WORST = ("max_over_mean", "dead")


def warnings(run: Run) -> Section:
    """What the run warned of, where it broke, and how the layers' loads moved."""
    title = "Warnings"
    if not any(run.metrics.values()):
        return Section("warnings", title, absent="Nothing has been logged yet.")
    told, failed = _newest(run.lines("warning")), run.last("failure")
    blocks: list[Any] = []
    if failed:
        loss, gradient, parameters = (_any(failed.get(name)) for name in ("loss", "grad_norm", "param_norm"))
        text = (
            f"Stopped at step {significant(failed.get('step'))}: loss {loss}, gradient norm {gradient}, "
            f"parameter norm {parameters}. Where: {failed.get('where', '')}."
        )
        blocks += [Notes([text], "problem"), *_layers_of(failed)]
    if told:
        rows = [
            [number(significant(line.get("step"))), Cell(str(line.get("rule", ""))),
             Cell(str(line.get("state", ""))), Cell(str(line.get("text", "")))]
            for line in told
        ]  # fmt: skip
        blocks.append(Table(["step", "rule", "", "what"], rows, "Warnings of the training, in order"))
    elif not failed:
        blocks.append(Notes(["No warning: no collapsing router, no program compiled again, every step finite."]))
    figures = [
        curve_figure(f"load-{name}", title, label, _over_layers(run, key), f"{run.key}-")
        for key, name, title, label in (
            ("max_over_mean", "spread", "Busiest expert, over layers", "max / mean load"),
            ("load_entropy", "entropy", "Load entropy, over layers", "1 is even, 0 is collapsed"),
            ("entropy", "router", "Router entropy, over layers", "nats per token"),
        )
    ]
    shown = [figure for figure in figures if figure is not None]
    return Section("warnings", title, [*blocks, *([Row(shown)] if shown else [])])


def load_parts(run: Run) -> Section:
    """Expert load over layers, by domain and by token class, of the newest evaluation."""
    title = "Expert load by domain and token class"
    line = run.last("final_load") or run.last("load")
    if not isinstance(line.get("by_domain"), dict):
        return Section("load-parts", title, absent="No expert load by domain has been logged yet.")
    where = f"{line['split']} text" if line.get("split") else "validation text"
    blocks: list[Any] = []
    spread = line.get("percentiles")
    if isinstance(spread, dict) and spread:
        points = sorted(next(iter(spread.values())), key=lambda point: int(point[1:]))  # p0, p50, ...
        rows = [
            [Cell(name), *(number(form(dig(spread, key, point))) for point in points)]
            for key, (name, form) in FIGURES.items()
        ]
        blocks.append(Table(["over layers", *points], rows, "Percentiles over layers, p0 to p100"))
    for key, name in (("by_domain", "domain"), ("by_class", "token class")):
        parts = line.get(key)
        if isinstance(parts, dict) and parts:
            blocks.append(_part_table(parts, name, len(line.get("layers") or [])))
    lead = (
        f"At step {significant(line.get('step'))}, {where}. Distance is half the sum over experts of the difference "
        "between a part's shares and those of all text: 0 is routed alike, 1 is experts of its own."
    )
    return Section("load-parts", title, blocks, lead=lead)


def _part_table(parts: dict[str, Any], name: str, layers: int) -> Table:
    rows = []
    for part, figures in parts.items():
        cells = [Cell(str(part)), number(percent(dig(figures, "share"), 1))]
        for key, (_, form) in FIGURES.items():
            values = [v for v in figures.get(key) or [] if is_number(v)]
            cells.append(number(form((max if key in _WORST else statistics.median)(values) if values else None)))
        distance = [v for v in figures.get("distance") or [] if is_number(v)]
        cells.append(number(fixed(statistics.median(distance) if distance else None, 2)))
        rows.append(cells)
    columns = [name, "tokens", *(title for title, _ in FIGURES.values()), "distance"]
    caption = f"By {name}: max / mean and dead experts of the worst of {layers} layers, the others medians over layers"
    return Table(columns, rows, caption)


def _newest(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a call wrote that another one overtook from an earlier step."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        step = line.get("step", 0)
        while kept and kept[-1].get("step", 0) > step:
            kept.pop()
        if line not in kept:
            kept.append(line)
    return kept


def _over_layers(run: Run, key: str) -> list[tuple[str, tuple[list[int], list[float]]]]:
    """Least, median and largest over layers of a figure that training lines hold by layer."""
    found: list[tuple[int, list[float]]] = []
    for line in run.lines("train"):
        values = dig(line, "layers", key)
        if isinstance(values, list) and values and all(map(is_number, values)):
            found.append((line["step"], values))
    steps = [step for step, _ in found]
    return [
        (name, (steps, [float(pick(values)) for _, values in found]))
        for name, pick in (("least", min), ("median", statistics.median), ("largest", max))
    ]


def _any(value: Any) -> str:
    """A number that may be NaN or infinite, which is what the reader is to see."""
    return f"{value:.4g}" if isinstance(value, int | float) else NONE


def _layers_of(failed: dict[str, Any]) -> list[Table]:
    layers = [line for line in failed.get("layers") or [] if isinstance(line, dict)]
    if not layers:
        return []
    names = ["grad_norm", "logsumexp", "entropy", "max_over_mean"]
    rows = [[Cell(str(line.get("layer"))), *(number(_any(line.get(n))) for n in names)] for line in layers]
    columns = ["layer", "gradient norm", "router logsumexp, rms", "router entropy, nats", "max / mean load"]
    return [Table(columns, rows, "The layers at that step", folded=len(rows) > 8)]
