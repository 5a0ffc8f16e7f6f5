"""Progress of a long task: a live display on a terminal, plain lines without one."""

import sys
import time
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

    def note(self, text: str) -> None:
        """A line that stays on the screen."""
        if self.visible:
            (self._bar.console if self._bar else self.console).print(
                text, highlight=False, markup=False, soft_wrap=True
            )

    def metrics(self, row: dict[str, Any]) -> None:
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
        text = "  ".join(parts)
        if self._bar is not None:  # a line above the bar, which shows the time left itself
            self.note(f"step {row['step']}/{self.total}  {text}")
            return
        done = row["step"] - self.start
        left = (time.monotonic() - self._begin) / max(done, 1) * (self.total - row["step"])
        self.note(f"step {row['step']}/{self.total}  {text}  left {left:,.0f} s")
