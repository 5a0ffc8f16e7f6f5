"""Sections about a run itself: facts, curves, held-out text, expert load, tasks. Each takes a run and gives a
Section."""

import itertools
import statistics
from typing import Any

from moejax.report import plots
from moejax.report.blocks import (
    NONE,
    Cell,
    Facts,
    Figure,
    Notes,
    Row,
    Section,
    Table,
    count,
    duration,
    fixed,
    is_number,
    number,
    percent,
    significant,
)
from moejax.report.load import Run, dig, names, running_time, series
from moejax.verdicts import at_chance

POINTS = 400
"""Points of a curve in a figure; longer ones are averaged in equal stretches."""


def facts(run: Run) -> Section:
    """What ran, where, and how fast."""
    env, config, last = run.env, run.config, run.last("train")
    lines = run.lines("train")[1:] or run.lines("train")  # the first one holds the compilation
    speeds = [line["tokens_per_s"] for line in lines if is_number(line.get("tokens_per_s"))]
    mfus = [line["mfu"] for line in lines if is_number(line.get("mfu"))]
    commit = env.get("commit") or ""
    dirty = " (with uncommitted changes)" if env.get("dirty") else ""
    device = env.get("device") or ""
    devices = f" × {env['device_count']}" if env.get("device_count") else ""
    implementation = dig(env, "grouped_matmul", "implementation")
    refused = dig(env, "grouped_matmul", "refused")
    back_end = str(implementation or "")
    if isinstance(refused, dict) and refused:
        back_end += "; refused: " + "; ".join(f"{name} ({why})" for name, why in refused.items())
    exchange = dig(env, "expert_parallelism", "exchange")
    ranks = dig(env, "expert_parallelism", "ranks")
    sent = dig(env, "expert_parallelism", "sent") or "rows"
    experts_over = f"{ranks} ranks, {sent} travel by {exchange} exchange" if exchange else ""
    items = [
        ("config", str(config.get("name") or "")),
        ("scale", str(config.get("scale") or "")),
        ("config hash", str(env.get("config_hash") or "")),
        ("status", run.status),
        ("parameters, total", _known(count, dig(env, "parameters", "total"))),
        ("parameters, active per token", _known(count, dig(env, "parameters", "active"))),
        ("model", _model(config)),
        ("tokens trained", _known(count, last.get("tokens"))),
        (
            "speed",
            _known(lambda v: f"{v:,.0f} tokens/s, median", statistics.median(speeds) if speeds else None),
        ),
        (
            "model FLOP utilisation",
            _known(lambda v: f"{percent(v, 1)}, median", statistics.median(mfus) if mfus else None),
        ),
        ("wall time, first to last log line", _known(duration, running_time(run.lines("train")))),
        ("device", f"{device}{devices}" if device else ""),
        ("grouped matmul", back_end),
        ("expert parallelism", experts_over),
        ("versions", ", ".join(f"{k} {v}" for k, v in (env.get("versions") or {}).items())),
        ("commit", f"{commit}{dirty}" if commit else ""),
        ("command", str(env.get("command") or "")),
        ("data hash", str(dig(env, "data", "hash") or "")),
        (
            "auxiliary losses, last step",
            ", ".join(f"{k} {significant(v)}" for k, v in (last.get("aux") or {}).items()),
        ),
    ]
    blocks: list[Any] = [Facts([(name, value) for name, value in items if value])]
    sizes = _sizes(dig(env, "data", "stats"))
    if sizes:
        blocks.append(sizes)
    if not (run.config or run.env or run.metrics):
        return Section("facts", "Run", absent="No config.json, env.json or metrics.jsonl in the workdir yet.")
    return Section("facts", "Run", blocks)


def _known(form: Any, value: Any) -> str:
    return form(value) if is_number(value) else ""


def _model(config: dict[str, Any]) -> str:
    model, moe = dig(config, "model"), dig(config, "model", "moe")
    if not isinstance(model, dict) or not isinstance(moe, dict):
        return ""
    parts = [
        f"{model.get('num_layers')} layers of width {model.get('dim')}",
        f"{moe.get('num_experts')} experts of width {moe.get('expert_dim')}",
        f"router {dig(moe, 'router', 'name')}, k = {dig(moe, 'router', 'k')}",
    ]
    if moe.get("zero_experts"):
        parts.append(f"{moe['zero_experts']} zero-computation experts")
    if moe.get("shared_experts"):
        parts.append(f"{moe['shared_experts']} shared experts")
    factor = moe.get("capacity_factor")
    parts.append(f"capacity factor {factor:g}" if is_number(factor) and factor > 0 else "dropless")
    return ", ".join(parts)


def _sizes(stats: Any) -> Table | None:
    if not isinstance(stats, dict):
        return None
    rows = [
        [Cell(str(domain)), Cell(str(split)), *(number(significant(dig(size, unit))) for unit in units)]
        for units in [("bytes", "tokens", "documents")]
        for domain, splits in stats.items()
        if isinstance(splits, dict)
        for split, size in splits.items()
    ]
    return Table(["domain", "split", "bytes", "tokens", "documents"], rows, "Data", folded=True) if rows else None


def thin(steps: list[int], values: list[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Averages a long curve over equal stretches; short ones stay as they are."""
    if len(steps) <= points:
        return list(map(float, steps)), values
    edges = [round(i * len(steps) / points) for i in range(points + 1)]
    parts = list(itertools.pairwise(edges))
    return [steps[b - 1] * 1.0 for _, b in parts], [statistics.fmean(values[a:b]) for a, b in parts]


def last_value(value: float) -> str:
    """Three decimals, fewer for what is large."""
    return fixed(value, 3) if abs(value) < 100 else significant(value)


def curve_figure(
    name: str,
    title: str,
    ylabel: str,
    found: list[tuple[str, tuple[list[int], list[float]]]],
    prefix: str = "",
) -> Figure | None:
    """A figure of curves over steps from (label, (steps, values)); None without a point."""
    # One that has no point yet keeps its colour free: a run looks the same in every figure.
    lines = [plots.Line(label, *thin(*points), series=i) for i, (label, points) in enumerate(found) if points[0]]
    if not lines:
        return None
    ends = "; ".join(f"{line.label} {last_value(line.y[-1])} at step {line.x[-1]:,.0f}" for line in lines)
    alt = f"{title} over steps. Last: {ends}."
    data = [
        ["series", "step", ylabel],
        *([line.label, int(x), y] for line in lines for x, y in zip(line.x, line.y, strict=True)),
    ]
    caption = f"{title}. Last: {ends}."
    if any(len(points[0]) > POINTS for _, points in found):
        caption += f" Averaged to {POINTS} points."
    return Figure(name, plots.curves(lines, prefix + name, alt, "optimizer step", ylabel), alt, caption, data)


def curves(run: Run) -> Section:
    """Training loss, and validation bits per byte by domain."""
    train, valid = run.lines("train"), run.lines("valid")
    figures = [
        curve_figure(
            "train-loss",
            "Training loss",
            "nats per token",
            [("loss with auxiliary terms", series(train, "loss")), ("cross-entropy", series(train, "ce"))],
            f"{run.key}-",
        ),
        curve_figure(
            "validation",
            "Validation bits per byte by domain",
            "bits per byte",
            [
                *((domain, series(valid, "bits_per_byte", domain)) for domain in names(valid, "bits_per_byte")),
                ("mean of domains", series(valid, "mean_bits_per_byte")),
            ],
            f"{run.key}-",
        ),
    ]
    shown = [figure for figure in figures if figure is not None]
    if not shown:
        return Section("curves", "Loss", absent="No training or validation line has been logged yet.")
    return Section("curves", "Loss", [Row(shown)])


def held_out(run: Run) -> Section:
    """Bits per byte and perplexity by domain beside byte n-grams."""
    title = "Held-out text"
    final = run.last("final")
    domains = names([final], "bits_per_byte") if final else []
    if not domains:
        return Section("held-out", title, absent="The final evaluation has not run yet.")
    ngram: dict[str, Any] = final["ngram"] if isinstance(final.get("ngram"), dict) else {}
    orders = sorted(ngram, key=lambda order: (len(order), order))
    rows, lost = [], []
    for domain in domains:
        ours = final["bits_per_byte"][domain]
        others = [dig(ngram, order, domain) for order in orders]
        best = min((v for v in [ours, *others] if is_number(v)), default=None)
        rows.append(
            [
                Cell(domain),
                number(fixed(ours, 4), strong=ours == best),
                *(number(fixed(v, 4), strong=v is not None and v == best) for v in others),
                number(fixed(dig(final, "perplexity", domain), 2)),
            ]
        )
        lost += [
            f"{order}-gram on {domain}"
            for order, v in zip(orders, others, strict=True)
            if is_number(v) and is_number(ours) and v <= ours
        ]
    columns = [
        "domain",
        "model, bits per byte",
        *(f"{order}\u2011gram, bits per byte" for order in orders),
        "perplexity per token",
    ]
    caption = f"Split “{final.get('split', '?')}” at step {significant(final.get('step'))}. "
    caption += "Lower is better; the best of a row is bold."
    blocks: list[Any] = [Table(columns, rows, caption)]
    if lost:
        blocks.append(Notes([f"The model does not beat the {', '.join(lost)}."]))
    elif orders:
        blocks.append(Notes([f"The model beats the byte {' and '.join(orders)}-gram in every domain."]))
    return Section("held-out", title, blocks)


def load(run: Run) -> Section:
    """Expert load by layer."""
    line = run.last("load")
    grid = line.get("utilisation")
    title = "Expert load"
    if (
        not isinstance(grid, list)
        or not all(isinstance(row, list) and row and all(map(is_number, row)) for row in grid)
        or not grid
    ):
        return Section("load", title, absent="No expert load has been logged yet (or the model has no experts).")
    named = line.get("layers")
    layers = named if isinstance(named, list) and len(named) == len(grid) else list(range(len(grid)))
    peak = max(
        (value, layer, expert) for layer, row in zip(layers, grid, strict=True) for expert, value in enumerate(row)
    )
    dead = sum(value < plots.HEAT_BOUNDS[1] for row in grid for value in row)
    cells = sum(map(len, grid))
    alt = (
        f"Heat map of expert load over {len(grid)} layers and {max(map(len, grid))} experts "
        f"at step {line['step']:,}. "
        f"Busiest: expert {peak[2]} of layer {peak[1]} with {peak[0]:.2f} times its even share; "
        f"{dead} of {cells} get under 1 % of theirs."
    )
    data: list[list[Any]] = [["layer", "expert", "load / ideal"]]
    data += [[layer, e, v] for layer, row in zip(layers, grid, strict=True) for e, v in enumerate(row)]
    svg = plots.heat_map(grid, layers, f"{run.key}-load", alt)
    figure = Figure(
        "expert-load",
        svg,
        alt,
        alt.replace("Heat map of expert load", "Utilisation (load / ideal)"),
        data,
        wide=True,
        scale=plots.heat_scale(),
        scale_title="load / ideal; 1 is an even share",
    )

    experts = max(map(len, grid))
    columns = {
        "max / mean": ("max_over_mean", lambda v: fixed(v, 2, "×")),
        "coefficient of variation": ("cv", lambda v: fixed(v, 3)),
        "router entropy, nats": ("entropy", lambda v: fixed(v, 3)),
        "dead experts": ("dead", lambda v: significant(v)),
        "dropped pairs": ("dropped_share", percent),
    }
    rows = []
    for i, layer in enumerate(layers):
        values = [_at(line.get(key), i) for key, _ in columns.values()]
        cells_of_row = [number(form(v)) for v, (_, form) in zip(values, columns.values(), strict=True)]
        rows.append([Cell(str(layer)), *cells_of_row])
    table = Table(["layer", *columns], rows, f"Load by layer, {experts} experts each", folded=len(rows) > 8)
    over_time = [
        curve_figure(
            "load-max",
            "Busiest expert",
            "max / mean load",
            [("max / mean", series(run.lines("train"), "load_max_over_mean"))],
            f"{run.key}-",
        ),
        curve_figure(
            "dropped",
            "Dropped pairs",
            "share of pairs",
            [("dropped share", series(run.lines("train"), "dropped_share"))],
            f"{run.key}-",
        ),
    ]
    shown = [f for f in over_time if f is not None]
    return Section("load", title, [figure, table, *([Row(shown)] if shown else [])])


def _at(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, list) and index < len(values) else None


def tasks(run: Run) -> Section:
    """Task scores beside chance."""
    line = run.last("tasks")
    found = [task for task in line.get("tasks") or [] if isinstance(task, dict)] if line else []
    if not found:
        return Section("tasks", "Tasks", absent="No task was scored in this run.")
    rows = []
    for task in found:
        value, error, chance = task.get("value"), task.get("stderr"), task.get("chance")
        word = ""
        if is_number(value) and is_number(error) and is_number(chance):
            word = "not above chance" if at_chance(value, error, chance) or value < chance else "above chance"
        shown = f"{fixed(value, 3)} ± {fixed(error, 3)}" if is_number(error) else fixed(value, 3)
        rows.append(
            [
                Cell(str(task.get("task", NONE))),
                Cell(str(task.get("metric", NONE)).replace("_", " ")),
                number(shown),
                number(fixed(chance, 3)),
                number(significant(task.get("n"))),
                Cell(word or NONE),
            ]
        )
    caption = f"At step {significant(line.get('step'))}. ± is one standard error; within two is chance."
    return Section("tasks", "Tasks", [Table(["task", "metric", "score", "chance", "examples", "note"], rows, caption)])
