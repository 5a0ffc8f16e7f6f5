"""From the layers' sums to the figures that people read, and the files and lines they go to."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.types import MoEMetrics

PEAK_BF16_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "TPU v5p": 459e12,
    "TPU v5e": 197e12,
}
"""Dense bf16 peak of one device, vendors' data sheets."""


def load_summary(metrics: MoEMetrics) -> dict[str, list]:
    """Load of each layer's experts, from sums with a leading axis of layers.

    ``utilisation`` = routed pairs / ideal (1 is perfect), before limits; ``cv`` its coefficient of variation;
    ``entropy`` the mean router entropy per token in nats; ``dead`` experts with no pair; ``dropped_share`` pairs
    removed / pairs routed; ``lost_share`` tokens that no expert computed / tokens.
    """
    m = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), metrics)
    routed, tokens = m.routed, np.maximum(m.tokens, 1.0)
    ideal = np.maximum(routed.mean(axis=1, keepdims=True), 1e-9)
    utilisation = routed / ideal
    pairs = np.maximum(routed.sum(axis=1), 1.0)
    return {
        "utilisation": np.round(utilisation, 4).tolist(),
        "max_over_mean": utilisation.max(axis=1).tolist(),
        "cv": utilisation.std(axis=1).tolist(),
        "entropy": (m.entropy_sum / tokens).tolist(),
        "dead": (routed == 0).sum(axis=1).tolist(),
        "dropped_share": (m.dropped / pairs).tolist(),
        "lost_share": (m.lost_tokens / tokens).tolist(),
        "overflow": m.overflow.tolist(),
    }


class JsonlWriter:
    """Appends one JSON object a line, each line written and flushed whole.

    A line that an earlier writer left half-written stays broken; it must not swallow the first new one too.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        cut = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = self.path.open("a", encoding="utf-8")
        if cut:
            self._file.write("\n")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, sort_keys=True, allow_nan=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a metrics file; a line cut off at the end (a writer was stopped) is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def peak_flops(devices: int) -> tuple[float, str]:
    """Peak matmul FLOP/s of ``devices`` devices like the first one, and where the figure is from.

    Known accelerators: the data sheet's dense bf16 peak. Others: one float32 matmul measured now (well under a second).
    """
    device = jax.devices()[0]
    for name, peak in PEAK_BF16_FLOPS.items():
        if name.lower() in device.device_kind.lower():
            return peak * devices, f"data sheet, {name} bf16 dense"
    size = 1024
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    share = 1 if device.platform == "cpu" else devices  # CPU devices are one host's cores, all of them measured
    return share * 2.0 * size**3 / best, f"measured float32 matmul {size}^3"


def tree_sum(a: MoEMetrics | None, b: MoEMetrics | None) -> MoEMetrics | None:
    """Adds two metrics; None counts as nothing."""
    if a is None or b is None:
        return b if a is None else a
    return jax.tree.map(jnp.add, a, b)
