"""Progress of a long task: a live display on a terminal, plain lines without one."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

ALL_LAYERS = 12
"""A summary of loads lists so many layers; of more of them, the percentiles and the worst."""
WORST = 3


class TrainProgress:
    """Shows step, loss, bits per byte, tokens/s, MFU, expert load max/mean, dropped share and time left.

    Use as a context manager. Off the main process nothing is shown.
    """

    def __init__(self, total: int, start: int, visible: bool = True) -> None:
        self.total, self.start, self.visible = total, start, visible
        self.console = Console(file=sys.stderr)
        self.live = visible and self.console.is_terminal
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        self._warned = False

    def __enter__(self) -> "TrainProgress":
        if self.live:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("train", total=self.total, completed=self.start)
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def note(self, text: str, style: str = "") -> None:
        """A line that stays on the screen."""
        if self.visible:
            (self._bar.console if self._bar else self.console).print(
                text, highlight=False, markup=False, soft_wrap=True, style=style or None
            )

    def warn(self, text: str) -> None:
        """A line that a reader must not miss: in colour on a terminal."""
        self.note(text, "bold yellow")

    def metrics(self, row: dict[str, Any]) -> None:
        if row.get("overflow_share") and not self._warned:
            self._warned = True
            self.warn(
                f"{row['overflow']:,.0f} pairs up to step {row['step']} found no place in the buffers of the exchange, "
                "and no expert computed them: raise model.moe.ep_buffer_factor, or set it to 0 (the worst case)"
            )
        parts = [
            f"loss {row['loss']:.3f}",
            f"bpb {row['bits_per_byte']:.3f}",
            f"{row['tokens_per_s']:,.0f} tok/s",
        ]
        if row.get("mfu") is not None:
            parts.append(f"MFU {100 * row['mfu']:.1f}%")
        if row.get("load_max_over_mean") is not None:
            parts.append(f"load max/mean {row['load_max_over_mean']:.2f}")
            parts.append(f"dropped {100 * row['dropped_share']:.2f}%")
            if row.get("skipped_share") is not None:  # of halved pairs
                parts.append(f"skipped {100 * row['skipped_share']:.2f}% of the work")
            if row.get("overflow_share"):
                parts.append(f"overflow {100 * row['overflow_share']:.2f}%")
        text = "  ".join(parts)
        if self._bar is not None:  # a line above the bar, which shows the time left itself
            self.note(f"step {row['step']}/{self.total}  {text}")
            return
        done = row["step"] - self.start
        left = (time.monotonic() - self._begin) / max(done, 1) * (self.total - row["step"])
        self.note(f"step {row['step']}/{self.total}  {text}  left {left:,.0f} s")


def load_cells(row: dict[str, Any]) -> list[list[str]]:
    """The summary of a row of loads (``metrics.load_row``) as cells, the first line its header.

    A line for each layer (of many layers: percentiles and the worst), then for each domain and token class, whose
    figures are medians over layers, but for the worst layer's max / mean and dead experts.
    """
    cells = [["", "tokens", "max/mean", "cv", "load entropy", "router entropy", "dead", "dropped", "distance"]]

    def line(name: str, tokens: str, pick: Callable[[str], float], distance: str = "") -> list[str]:
        figures = [f"{pick('max_over_mean'):.2f}", f"{pick('cv'):.2f}", f"{pick('load_entropy'):.3f}",
                   f"{pick('entropy'):.2f}", f"{pick('dead'):g}", f"{pick('dropped_share'):.2%}"]  # fmt: skip
        return [name, tokens, *figures, distance]

    layers, loads = row["layers"], row["max_over_mean"]
    listed = list(range(len(layers)))
    if len(layers) > ALL_LAYERS:
        cells += [line(f"layers, {p}", "", lambda key, p=p: row["percentiles"][key][p])
                  for p in row["percentiles"]["max_over_mean"]]  # fmt: skip
        listed = sorted(sorted(listed, key=lambda i: -loads[i])[:WORST])
    cells += [line(f"layer {layers[i]}", "", lambda key, i=i: row[key][i]) for i in listed]
    for kind in ("by_domain", "by_class"):
        for name, part in row.get(kind, {}).items():

            def over_layers(key: str, part: dict[str, Any] = part) -> float:
                return max(part[key]) if key in ("max_over_mean", "dead") else statistics.median(part[key])

            cells.append(line(name, f"{part['share']:.1%}", over_layers, f"{statistics.median(part['distance']):.2f}"))
    if any(lost := row.get("overflow_share", [])):
        shown = {f"layer {layers[i]}": f"{lost[i]:.2%}" for i in listed}
        cells = [[*line, "overflow" if i == 0 else shown.get(line[0], "")] for i, line in enumerate(cells)]
    return cells


def show_load(row: dict[str, Any], title: str, say: Callable[[str], None] | None = None) -> None:
    """Prints :func:`load_cells`: a table on a terminal, plain lines through ``say`` or without a terminal."""
    cells, console = load_cells(row), Console(file=sys.stderr)
    if say is None and console.is_terminal:
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(cells[0]):
            table.add_column(name, justify="right" if i else "left")
        for line in cells[1:]:
            table.add_row(*line)
        console.print(table)
        return
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    say(title)
    for line in cells:
        first, *rest = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        say("  ".join(["", line[0].ljust(len(first)), *rest]).rstrip())
