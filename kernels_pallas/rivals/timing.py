"""Timing of device work, the same for every family: k calls back to back, many times, median and spread."""

import contextlib
import contextvars
import dataclasses
import time
from collections.abc import Callable, Generator, Mapping

import numpy as np

_stop: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("stop", default=None)


@contextlib.contextmanager
def stopping(stop: Callable[[], None]) -> Generator[None]:
    """Within, `repeat` calls `stop` before it warms up and before each timing: others may have the device meanwhile."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of one call, one entry for each timing of `calls` calls; `shared`: made in turn with other families'."""

    seconds: tuple[float, ...]
    calls: int
    shared: bool = False

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def fields(self) -> dict:
        """Columns of a row, in ms; p10 and p90 are percentiles. Those made in turn with others tell every timing."""
        ms = 1e3 * np.asarray(self.seconds)
        every = {"timings_ms": [float(f"{one:.5g}") for one in ms]} if self.shared else {}
        return every | {
            "median_ms": float(np.median(ms)),
            "min_ms": float(ms.min()),
            "max_ms": float(ms.max()),
            "p10_ms": float(np.percentile(ms, 10)),
            "p90_ms": float(np.percentile(ms, 90)),
            "repeats": len(ms),
            "calls_per_timing": self.calls,
        }


def repeat(
    batch: Callable[[int], float], repeats: int, target_ms: float, per_call: int = 1, alone: bool = False
) -> Timings:
    """Times `batch(k)`, which runs k calls and returns the seconds they took together, `repeats` times.

    The first batches warm up; k follows from them, so that one timing lasts about `target_ms` and the cost of
    starting and of waiting at its end does not count. A call does the work `per_call` times. `alone`: it never stops
    for others (`stopping`), as in a search for the best configuration.
    """
    stop = None if alone else _stop.get()

    def timed(k: int) -> float:
        if stop is not None:
            stop()
            # Others had the device since: caches, and a clock that rose while it waited for this process, are theirs.
            batch(1)
        return batch(k) / (k * per_call)

    if stop is not None:
        stop()
    batch(1)
    guess = batch(2) / 2
    k = max(1, round(1e-3 * target_ms / max(guess, 1e-7)))
    guess = batch(k) / k
    k = max(1, round(1e-3 * target_ms / max(guess, 1e-7)))
    batch(k)
    return Timings(tuple(timed(k) for _ in range(repeats)), k * per_call, stop is not None)


def wall_clock(call: Callable[[], object], wait: Callable[[object], object]) -> Callable[[int], float]:
    """A `batch` for an asynchronous `call`: k calls, then `wait` for the last result. Raises ValueError for k < 1."""

    def batch(k: int) -> float:
        if k < 1:
            raise ValueError(f"k={k} calls must be at least 1")
        start = time.perf_counter()
        for _ in range(k):
            result = call()
        wait(result)
        return time.perf_counter() - start

    return batch


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    wait: Callable[[object], object],
    repeats: int,
    target_ms: float,
    per_call: int = 1,
) -> dict[str, Timings]:
    """Timings of each call, all of them in turn, every round from another one on: a change of the device's clock falls
    on all alike. A call does the work `per_call` times."""
    batches = {name: wall_clock(call, wait) for name, call in calls.items()}
    count = {name: repeat(batch, 1, target_ms, alone=True).calls for name, batch in batches.items()}
    names: list[str] = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(batches[name](count[name]) / (count[name] * per_call))
    return {name: Timings(tuple(seconds[name]), count[name] * per_call) for name in names}


def copies(touched_bytes: int, at_least: int, most: int = 8) -> int:
    """How many sets of inputs to rotate among so that `at_least` bytes lie between two uses of one."""
    return min(most, max(1, -(-at_least // max(touched_bytes, 1))))
