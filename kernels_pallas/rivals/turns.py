"""Implementations of several families timed in turn, one timing each, so that a change of the device's clock counts for
all alike: between families timed one after the other it moves by more than most kernels differ.

Each implementation of a case compiles, is checked and tuned with the device to itself, and stops at the first timing
(`timing.repeat`). When all of the case have come so far, they go on one timing at a time, every round from another one
on. Those of one process are threads, of which one runs at a time.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from kernels_pallas.rivals import timing
from kernels_pallas.rivals.case import AnyCase, Settings

Row = dict[str, Any]


class _Closed(BaseException):
    """Ends an implementation that nobody will ask to go on."""


class Runner:
    """One implementation, in a thread that stops before each timing."""

    def __init__(self, name: str, run: Callable[[], Row]):
        self.name, self.run = name, run
        self.row: Row | None = None
        self.problem: BaseException | None = None
        self._closed = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def advance(self) -> bool:
        """Lets it run up to its next timing, or to its end; whether that was its end, with `row` or `problem`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        ended = self.row is not None or self.problem is not None
        if ended:
            self._thread.join()  # its frames are gone with it
        return ended

    def close(self) -> None:
        """Ends it where it stops next: a thread that still computes when Python ends brings the process down."""
        if self._thread is not None:
            self._closed = True
            self._go.release()
            self._thread.join()

    def _work(self) -> None:
        try:
            with timing.stopping(self._pause):
                self.row = self.run()
        except BaseException as problem:  # a SystemExit too: nobody else would hear of it
            self.problem = problem
        finally:
            self._stopped.release()

    def _pause(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self._closed:
            raise _Closed


class Process(Protocol):
    """What can take part: `worker.Worker` and `worker.Inline`."""

    def begin(self, case: AnyCase, settings: Settings) -> tuple[list[str], list[Row]]:
        """Brings all implementations of a case to their first timing: (names of those, rows of what has none)."""
        ...

    def advance(self, name: str) -> Row | None:
        """One timing of an implementation; its row after the last one."""
        ...


def measure(processes: Mapping[str, Process], case: AnyCase, settings: Settings) -> Iterator[tuple[str, Row]]:
    """(family, row) of every implementation, in the order of families, once all are measured."""
    rows: dict[str, list[Row]] = {}
    waiting: list[tuple[str, str]] = []
    for family, process in processes.items():
        names, rows[family] = process.begin(case, settings)
        waiting += [(family, name) for name in names]
    order = {one: place for place, one in enumerate(waiting)}
    turn = 0
    while waiting:
        first = turn % len(waiting)
        for family, name in waiting[first:] + waiting[:first]:
            row = processes[family].advance(name)
            if row is not None:
                rows[family].append(row)
                waiting.remove((family, name))
        turn += 1
    for family, found in rows.items():
        found.sort(key=lambda row: order.get((family, row["implementation"]), -1))
        yield from ((family, row) for row in found)


def ratios(row: Row, other: Row) -> Sequence[float]:
    """How much longer `other` took, for each round in which both were timed; empty if they were not timed in turn."""
    mine, others = row.get("timings_ms", ()), other.get("timings_ms", ())
    return [b / a for a, b in zip(mine, others, strict=True)] if len(mine) == len(others) else []
