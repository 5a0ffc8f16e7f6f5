"""What the training loop collects between two log lines: means, rates, expert loads, and the first step that broke."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from moejax import metrics
from moejax.train import StepMetrics

_SCALARS = ("loss", "ce", "nll", "text_bytes", "tokens", "aux", "grad_norm", "param_norm")
"""Fields of StepMetrics that a row takes from each of its steps."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Sums over the steps between two log lines, on the host in float64."""

    steps: int
    tokens: Float[np.ndarray, "L"]
    routed: Float[np.ndarray, "L E"]
    entropy_sum: Float[np.ndarray, "L"]
    overflow: Float[np.ndarray, "L"]

    def __add__(self, other: "Window") -> "Window":
        return Window(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Broken:
    """A step whose loss, gradients or parameters are not finite, on the host."""

    step: int
    metrics: StepMetrics
    before: StepMetrics | None
    """The step before it; None where this process did not run it."""


class Meter:
    """Collects device scalars between two log lines, so that no step waits for the host."""

    def __init__(self, flops_per_token: float, peak: float) -> None:
        self.flops_per_token, self.peak = flops_per_token, peak
        self._pending: list[StepMetrics] = []
        self._before: StepMetrics | None = None
        self._given = 0  # of the pending steps, those of another process
        self._untimed = 0
        self._seconds = 0.0
        self._since: float | None = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        self._pending.append(metrics)

    def leave_out(self) -> None:
        """The steps since the last row count in no rate: the first one compiled."""
        self._untimed, self._seconds, self._since = len(self._pending), 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stops the clock, for validation and saving, once the steps so far are done on the device."""
        if self._since is None:
            return
        if self._pending:
            jax.block_until_ready(self._pending[-1].loss)
        self._seconds += time.perf_counter() - self._since
        self._since = None

    def go_on(self) -> None:
        """Starts the clock again."""
        self._since = time.perf_counter()

    def broken(self, step: int) -> Broken | None:
        """The first step since the last row that is not finite, where ``step`` is the newest; waits for the device."""
        values = jax.device_get([(m.loss, m.grad_norm, m.param_norm) for m in self._pending])
        for i, value in enumerate(values):
            if not np.all(np.isfinite(value)):
                before = self._pending[i - 1] if i > self._given else self._before if i == 0 else None
                return Broken(step - len(values) + i + 1, *jax.device_get((self._pending[i], before)))
        return None

    def state(self) -> list[dict[str, Any]]:
        """The steps since the last row as JSON values, each number exactly; without what is kept by layer."""
        steps = jax.device_get([{name: getattr(m, name) for name in _SCALARS} for m in self._pending])
        return jax.tree.map(float, steps)

    def restore(self, steps: list[dict[str, Any]]) -> None:
        """Begins with steps that another process made (:meth:`state`); they count in no rate and in no load."""
        by_layer: Any = {"layer_grad_norm": np.zeros(0), "outer_grad_norm": {}, "moe": None}
        self._pending = [StepMetrics(**jax.tree.map(np.float32, step), **by_layer) for step in steps]
        self._given = len(steps)

    def row(self) -> tuple[dict[str, Any], Window | None]:
        """Means since the last row, and the loads (None for a model without experts); waits for the device."""
        self.pause()
        last = self._pending[-1]
        bulky = ("layer_grad_norm", "outer_grad_norm", "moe")
        steps = jax.device_get([dataclasses.replace(m, **dict.fromkeys(bulky)) for m in self._pending])
        window = self._window()
        text_bytes = max(sum(float(m.text_bytes) for m in steps), 1.0)
        timed = sum(float(m.tokens) for m in steps[self._untimed :])
        rate = timed / self._seconds if timed else 0.0
        row: dict[str, Any] = {
            "loss": float(np.mean([m.loss for m in steps])),
            "ce": float(np.mean([m.ce for m in steps])),
            "bits_per_byte": sum(float(m.nll) for m in steps) / np.log(2) / text_bytes,
            "grad_norm": float(np.mean([m.grad_norm for m in steps])),
            "param_norm": float(steps[-1].param_norm),
            "tokens_per_s": rate,
            "mfu": rate * self.flops_per_token / self.peak,
            "aux": {name: float(np.mean([m.aux[name] for m in steps])) for name in steps[0].aux},
            "layers": {"grad_norm": metrics.short(jax.device_get(last.layer_grad_norm))},
        }
        if window is not None:
            moe = jax.device_get(last.moe)
            routed = np.asarray(moe.routed)
            row["load_max_over_mean"] = float((routed.max(axis=1) / np.maximum(routed.mean(axis=1), 1e-9)).max())
            row["dropped_share"] = float(moe.dropped.sum() / max(routed.sum(), 1.0))
            if moe.skipped is not None:
                row["skipped_share"] = float(moe.skipped.sum() / max(routed.sum(), 1.0))
            # Of all steps since the last row: nothing is lost in silence.
            row["overflow"] = float(window.overflow.sum())
            row["overflow_share"] = float(window.overflow.sum() / max(window.routed.sum(), 1.0))
            if moe.zero_routed is not None:
                row["layers"]["zero_share"] = metrics.short(metrics.zero_share(routed, np.asarray(moe.zero_routed)))
            figures = metrics.load_figures(window.routed, window.tokens, window.entropy_sum)
            for name in ("max_over_mean", "load_entropy", "entropy", "dead"):
                row["layers"][name] = metrics.short(figures[name])
        self._before, self._pending, self._given, self._untimed, self._seconds = last, [], 0, 0, 0.0
        self.go_on()
        return row, window

    def _window(self) -> Window | None:
        kept = [
            (m.moe.tokens, m.moe.routed, m.moe.entropy_sum, m.moe.overflow) for m in self._pending if m.moe is not None
        ]
        if not kept:
            return None
        sums = (np.sum(np.asarray(leaves, np.float64), axis=0) for leaves in zip(*jax.device_get(kept), strict=True))
        return Window(len(kept), *sums)
