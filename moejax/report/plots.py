"""Figures as inline SVG.

Drawn by matplotlib in placeholder colours that become CSS variables, so one drawing serves light, dark and
print. Text stays text (it takes the page's font and can be searched). Nothing in the result points outside
the page.
"""

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moejax.report.blocks import MINUS

INK, MUTED, GRID, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c"
SERIES = tuple(f"#1000{i:02x}" for i in range(8))
HEAT_BOUNDS = (0.0, 0.01, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, math.inf)
"""Utilisation (load / ideal) at which the heat map changes colour: symmetric around 1, and under 1 % is its
own."""
HEAT = tuple(f"#2000{i:02x}" for i in range(len(HEAT_BOUNDS) - 1))
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    SURFACE: "surface",
    **{color: f"series-{i}" for i, color in enumerate(SERIES)},
    **{color: f"heat-{i}" for i, color in enumerate(HEAT)},
}
LOG_FROM = 10.0
"""Ratio of the largest to the smallest x from which on the axis of ``arms`` is logarithmic."""
CLOSE = 0.06
"""Where two places on the axis of ``arms`` are nearer than this share of it, not all are named, but round ones."""
_MARKERS = "os^Dv<>P"
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "text.usetex": False,
    "axes.unicode_minus": True,
}


@dataclasses.dataclass(frozen=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    """Ends of intervals, as long as ``y`` or empty; NaN where there is none."""
    series: int | None = None
    """Its colour and dashes. None: by its place among the lines."""


def render(draw: Callable[[Figure], None], name: str, alt: str, size: tuple[float, float]) -> str:
    """Draws a figure of ``size`` inches and returns it as an ``<svg>`` element whose ids begin with
    ``name``."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), name, alt)


def _inline(svg: str, name: str, alt: str) -> str:
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    opening = body[: body.index(">")]
    box = re.search(r'viewBox="[^"]*"', opening)
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower()) + "-"
    body = body[len(opening) + 1 :]
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r"url\(#", f"url(#{prefix}", body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}', body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    # A hundredth of a point is finer than any screen. In tags only: the text of a tick may be 0.001.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag.group()), body)
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg role="img" aria-label="{escape(alt)}" {box.group() if box else ""}>{body}'


def _legend(axes: Axes, entries: int) -> None:
    if entries > 1:
        longest = max(map(len, axes.get_legend_handles_labels()[1]))
        columns = 3 if longest <= 17 else 2 if longest <= 30 else 1  # as many as the figure is wide
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0, columnspacing=1.2)


def _thousands(value: float, _: Any) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:,g}"


def _large_numbers(axes: Axes) -> None:
    """7,000 and 70k rather than 7000 and 70000 on the y axis."""
    if max(map(abs, axes.get_ylim())) >= 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))


def curves(lines: Sequence[Line], name: str, alt: str, xlabel: str, ylabel: str, hlines: Sequence[tuple] = ()) -> str:
    """Values over steps. ``hlines``: (label, y) of dashed levels."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, line in enumerate(lines):
            i = place if line.series is None else line.series
            marker = "o" if len(line.x) == 1 else ""
            axes.plot(line.x, line.y, color=SERIES[i % 8], ls=_DASHES[i % 8], marker=marker, label=line.label)
        for label, y in hlines:
            axes.axhline(y, color=MUTED, ls=(0, (4, 3)), lw=1.1, label=label)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.margins(x=0.02)
        _large_numbers(axes)
        _legend(axes, len(lines) + len(hlines))

    return render(draw, name, alt, (4.9, 3.2))


def arms(
    lines: Sequence[Line], baseline: tuple[str, float] | None, name: str, alt: str, xlabel: str, ylabel: str
) -> str:
    """One line per arm over the table's variable, intervals as bars, the baseline as a dashed level."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        xs = sorted({x for line in lines for x in line.x})
        log = xs[0] > 0 and xs[-1] / xs[0] >= LOG_FROM
        gaps = [math.log(after / before) if log else after - before for before, after in itertools.pairwise(xs)]
        step = min(gaps, default=1.0)
        for i, line in enumerate(lines):
            # Arms stand a little beside each other, so that intervals at the same x can be told apart.
            shift = (i - (len(lines) - 1) / 2) * min(0.08, 0.4 / len(lines)) * step
            at = [x * math.exp(shift) if log else x + shift for x in line.x]
            axes.plot(at, line.y, label=line.label, color=SERIES[i % 8], ls=_DASHES[i % 8], marker=_MARKERS[i % 8])
            for x, low, high in zip(at, line.low, line.high, strict=False):
                if math.isfinite(low) and math.isfinite(high):
                    axes.plot([x, x], [low, high], color=SERIES[i % 8], lw=1)
        if baseline is not None:
            axes.axhline(baseline[1], color=MUTED, ls=(0, (4, 3)), lw=1.2, label=baseline[0])
        if log:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xlabel(xlabel + (", logarithmic" if log else ""))
        axes.set_ylabel(ylabel)
        if step > CLOSE * sum(gaps):
            axes.set_xticks(xs)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.04, y=0.08)
        _large_numbers(axes)
        _legend(axes, len(lines) + (baseline is not None))

    return render(draw, name, alt, (4.9, 3.4))


def heat_map(utilisation: Sequence[Sequence[float]], layers: Sequence[Any], name: str, alt: str) -> str:
    """Load / ideal of every expert (columns) in every layer (rows), in eight classes around 1 (:func:`heat_scale`).

    Cells of one class are one path, so that hundreds of experts in dozens of layers stay small.
    """
    experts = max(len(row) for row in utilisation)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        gap = 0.04 if experts <= 128 else 0.0
        for level, color in enumerate(HEAT):
            cells = [
                Rectangle((e + gap, l + gap), 1 - 2 * gap, 1 - 2 * gap)
                for l, row in enumerate(utilisation)
                for e, value in enumerate(row)
                if HEAT_BOUNDS[level] <= value < HEAT_BOUNDS[level + 1]
            ]
            paths = [cell.get_path().transformed(cell.get_patch_transform()) for cell in cells]
            if paths:
                axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=color, lw=0))
        axes.set(xlim=(0, experts), ylim=(len(utilisation), 0), xlabel="expert", ylabel="layer")
        every = max(1, math.ceil(len(layers) / 24))
        axes.set_yticks([i + 0.5 for i in range(0, len(layers), every)], [str(v) for v in layers[::every]])
        stride = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256) if experts / s <= 17 or s == 256)
        axes.set_xticks([e + 0.5 for e in range(0, experts, stride)], [str(e) for e in range(0, experts, stride)])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)

    return render(draw, name, alt, (9.6, 0.75 + 0.2 * max(4, len(utilisation))))


def heat_scale() -> list[tuple[str, str]]:
    """The classes of :func:`heat_map`, as (name of a CSS colour, words); drawn as text, so that it wraps on a phone."""
    words = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(HEAT_BOUNDS)]
    words[0], words[-1] = f"under {HEAT_BOUNDS[1]:g}", f"{HEAT_BOUNDS[-2]:g} and more"
    return [(_VARIABLES[color], text) for color, text in zip(HEAT, words, strict=True)]


def forest(
    entries: Sequence[tuple[str, float, tuple[float, float] | None, float]], name: str, alt: str, xlabel: str
) -> str:
    """Advantages of contrasts: (label, advantage, interval or None, border)."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, lw=1)
        for i, (_, value, interval, border) in enumerate(entries):
            if interval:
                axes.plot(interval, [i, i], color=SERIES[0], lw=2.4, solid_capstyle="butt")
            axes.plot([value], [i], "o", color=SERIES[0], ms=6)
            axes.plot([border, border], [i - 0.32, i + 0.32], color=SERIES[1], lw=1.6, label=None if i else "border")
        axes.set_yticks(range(len(entries)), [entry[0] for entry in entries])
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}".replace("-", MINUS) if v else "0"))
        axes.set_xlabel(xlabel)
        axes.margins(x=0.08)
        _legend(axes, 2)

    return render(draw, name, alt, (4.9, 1.15 + 0.34 * len(entries)))
