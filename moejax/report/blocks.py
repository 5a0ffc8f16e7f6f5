"""What a section of the report is made of, and how numbers are written.

A section is a list of blocks; the template knows how to draw each block and nothing about runs. So a new
section is one function that returns a :class:`Section` (see ``build.SECTIONS``).
"""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

MINUS = "\u2212"
NONE = "\u2013"
"""Shown where there is no number."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell. ``kind``: "text", "number", "verdict", "code" or "strong" (a number that stands out)."""

    text: str
    kind: str = "text"
    title: str = ""
    """Shown under the pointer, and in print not at all: never the only place of a fact."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and values; values may be long."""

    items: Sequence[tuple[str, str]]
    block: str = "facts"


@dataclasses.dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    folded: bool = False
    """Drawn closed, to be opened by its caption."""
    block: str = "table"


@dataclasses.dataclass(frozen=True)
class Figure:
    name: str
    """File name of the CSV, without its ending; unique in a section."""
    svg: str
    alt: str
    caption: str
    data: Sequence[Sequence[Any]] = ()
    """Header and rows, offered as CSV."""
    wide: bool = False
    scale: Sequence[tuple[str, str]] = ()
    """Classes of a heat map: (name of a CSS colour, words)."""
    scale_title: str = ""
    """What the classes measure, with its unit."""
    block: str = "figure"

    @property
    def csv(self) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(self.data)
        return out.getvalue()


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures beside each other where there is room."""

    figures: Sequence[Figure]
    block: str = "row"


@dataclasses.dataclass(frozen=True)
class Notes:
    """``level``: "note" or "problem"."""

    items: Sequence[str]
    level: str = "note"
    block: str = "notes"


@dataclasses.dataclass(frozen=True)
class Counts:
    """Verdict counts."""

    items: Sequence[tuple[str, int]]
    block: str = "counts"


Block = Facts | Table | Figure | Row | Notes | Counts


@dataclasses.dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: Sequence[Block] = ()
    lead: str = ""
    absent: str = ""
    """Why there is nothing to show; then ``blocks`` is empty."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a finite number (bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fixed(value: Any, digits: int = 3, unit: str = "", signed: bool = False) -> str:
    """``1.2345 -> "1.234"`` with a true minus sign; "–" for what is no finite number."""
    if not is_number(value):
        return NONE
    text = f"{value:{'+' if signed else ''},.{digits}f}".replace("-", MINUS)
    return f"{text} {unit}".strip()


def significant(value: Any, digits: int = 4, unit: str = "") -> str:
    """At most ``digits`` significant ones, without an exponent where that is readable; integers in full."""
    if not is_number(value):
        return NONE
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        text = f"{int(value):,}"
    elif value != 0 and not 1e-4 <= abs(value) < 1e6:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return f"{text.replace('-', MINUS)} {unit}".strip()


def percent(value: Any, digits: int = 2) -> str:
    """``0.0123 -> "1.23 %"``."""
    return f"{100 * value:.{digits}f} %" if is_number(value) else NONE


def count(value: Any) -> str:
    """``98_304_000 -> "98.3 M (98,304,000)"``; small ones in full."""
    if not is_number(value):
        return NONE
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter} ({int(value):,})"
    return f"{int(value):,}"


def duration(seconds: Any) -> str:
    """``3723 -> "1 h 2 min 3 s"``."""
    if not is_number(seconds):
        return NONE
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{n} {unit}" for n, unit in parts)


def span(interval: Any, digits: int = 4, signed: bool = False) -> str:
    """``(1.2, 1.3) -> "[1.2000, 1.3000]"``."""
    if not interval:
        return NONE
    return f"[{fixed(interval[0], digits, signed=signed)}, {fixed(interval[1], digits, signed=signed)}]"


def metric_words(metric: str) -> str:
    """``"bits_per_byte/english" -> "bits per byte, english"``."""
    return metric.replace("_", " ").replace("/", ", ")


def number(text: str, strong: bool = False, title: str = "") -> Cell:
    return Cell(text, "strong" if strong else "number", title)
