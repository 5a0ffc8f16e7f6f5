"""From the layers' sums to the figures that people read, and the files and lines they go to."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.results import write_atomically
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


PERCENTILES = (0, 50, 90, 100)
"""Over layers, in every row of loads."""


def load_figures(
    routed: Float[np.ndarray, "L E"],
    tokens: Float[np.ndarray, "L"],
    entropy_sum: Float[np.ndarray, "L"],
) -> dict[str, Float[np.ndarray, "L ..."]]:
    """Figures of each layer's load from its sums; all of pairs before limits.

    ``utilisation`` [L, E] = pairs / ideal, where ideal is an even share of the layer's pairs: 1 is perfect.
    ``max_over_mean``, ``cv``: the largest utilisation, and the coefficient of variation over experts; 1 and 0 are even.
    ``load_entropy`` = (H - ln k) / (ln E - ln k) with H the entropy of the experts' shares of the pairs and k the pairs
    per token: 1 is even, 0 says that all tokens use the same k experts (no distribution of distinct experts has less
    than ln k). ``busiest`` = (s - k/E) / (1 - k/E) with s the share of tokens that choose the busiest expert: 0 is
    even, 1 says that all do. Where k = E leaves no choice they are 1 and 0.
    ``entropy``: mean entropy of a token's router probabilities, nats, in [0, ln E]. ``dead``: experts with no pair.
    """
    experts = routed.shape[1]
    pairs = np.maximum(routed.sum(axis=1), 1.0)
    ideal = np.maximum(routed.mean(axis=1, keepdims=True), 1e-9)
    utilisation = routed / ideal
    k = np.clip(pairs / np.maximum(tokens, 1.0), 1.0, experts)
    share = routed / pairs[:, None]
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=1)
    choice = k < experts * (1 - 1e-9)  # else every token uses every expert
    room = np.where(choice, np.log(experts) - np.log(k), 1.0)
    rest = np.where(choice, 1 - k / experts, 1.0)
    return {
        "utilisation": utilisation,
        "max_over_mean": utilisation.max(axis=1),
        "cv": utilisation.std(axis=1),
        "load_entropy": np.where(choice, np.clip((entropy - np.log(k)) / room, 0.0, 1.0), 1.0),
        "busiest": np.where(choice, np.clip((k * share.max(axis=1) - k / experts) / rest, 0.0, 1.0), 0.0),
        "entropy": entropy_sum / np.maximum(tokens, 1.0),
        "dead": (routed == 0).sum(axis=1),
    }


def load_summary(metrics: MoEMetrics) -> dict[str, list]:
    """Load of each layer's experts, from sums with a leading axis of layers: :func:`load_figures`, and

    ``dropped_share`` pairs removed / pairs routed; ``lost_share`` tokens that no expert computed / tokens;
    ``overflow`` pairs that a static buffer lost, ``overflow_share`` of pairs routed. Where a limit halves pairs,
    ``skipped_share`` is the work of kept pairs that was skipped / pairs routed. Where the layers have zero-computation
    experts all of these are of the others, and ``zero_share`` is pairs of zero-computation experts / all pairs.
    """
    m = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), metrics)
    figures = load_figures(m.routed, m.tokens, m.entropy_sum)
    return (
        _lists(figures)
        | {
            "dropped_share": (m.dropped / np.maximum(m.routed.sum(axis=1), 1.0)).tolist(),
            "lost_share": (m.lost_tokens / np.maximum(m.tokens, 1.0)).tolist(),
            "overflow": m.overflow.tolist(),
            "overflow_share": (m.overflow / np.maximum(m.routed.sum(axis=1), 1.0)).tolist(),
        }
        | ({} if m.skipped is None else {"skipped_share": (m.skipped / np.maximum(m.routed.sum(axis=1), 1.0)).tolist()})
        | ({} if m.zero_routed is None else {"zero_share": zero_share(m.routed, m.zero_routed).tolist()})
    )


def touched_share(metrics: MoEMetrics) -> float:
    """Pairs of all layers that limits removed or added / pairs routed, at most 1; a halved pair counts by the work that
    it saves."""
    skipped = 0.0 if metrics.skipped is None else np.sum(metrics.skipped)
    touched = np.sum(metrics.dropped) + np.sum(metrics.added) + skipped
    return min(1.0, float(touched / max(np.sum(metrics.routed), 1.0)))


def zero_share(routed: Float[np.ndarray, "L E"], zero_routed: Float[np.ndarray, "L Z"]) -> Float[np.ndarray, "L"]:
    """Pairs of zero-computation experts over all pairs, of each layer."""
    free = zero_routed.sum(axis=1)
    return free / np.maximum(free + routed.sum(axis=1), 1.0)


def load_row(domains: Mapping[str, MoEMetrics], classes: Sequence[str] = ()) -> dict[str, Any]:
    """Everything about expert load that a row of ``metrics.jsonl`` holds, from the sums of each domain.

    :func:`load_summary` of all of them together; ``percentiles`` over layers of each figure; ``by_domain`` and, where
    the sums are kept by token class, ``by_class`` (named by ``classes``, those without a token left out): the same
    figures, with ``share`` of the tokens and, for each layer, ``distance`` = half the sum over experts of
    ``|share of the part's pairs - share of all pairs|``: 0 is routed like all text, 1 is experts of its own. Domains
    also have :func:`touched_share`.
    """
    sums = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), m) for m in domains.values()]
    whole = jax.tree.map(lambda *leaves: sum(leaves), *sums)
    row: dict[str, Any] = load_summary(whole)
    row["tokens"] = float(whole.tokens[0])
    row["percentiles"] = {name: percentiles(row[name]) for name in LAYER_FIGURES}
    row["by_domain"] = {
        domain: _part(whole, m.routed, m.tokens, m.entropy_sum, m.dropped) | {"touched_share": touched_share(m)}
        for domain, m in zip(domains, sums, strict=True)
    }
    by = whole.by_class
    if by is not None:
        row["by_class"] = {
            name: _part(whole, by.routed[:, c], by.tokens[:, c], by.entropy_sum[:, c], by.dropped[:, c])
            for c, name in enumerate(classes)
            if by.tokens[:, c].any()
        }
    return row


LAYER_FIGURES = ("max_over_mean", "cv", "load_entropy", "busiest", "entropy", "dead", "dropped_share")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """``{"p0": least, "p50": median, "p90": ..., "p100": largest}``, linear between neighbours."""
    return {f"p{p}": float(np.percentile(np.asarray(values, np.float64), p)) for p in PERCENTILES}


def _part(whole: MoEMetrics, routed: np.ndarray, tokens: np.ndarray, entropy: np.ndarray, dropped: np.ndarray) -> dict:
    def shares(pairs: Any) -> np.ndarray:
        return pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1.0)

    part: dict[str, Any] = _lists(load_figures(routed, tokens, entropy))
    part["share"] = float(tokens[0] / max(float(whole.tokens[0]), 1.0))
    part["dropped_share"] = (dropped / np.maximum(routed.sum(axis=1), 1.0)).tolist()
    part["distance"] = (np.abs(shares(routed) - shares(whole.routed)).sum(axis=1) / 2).tolist()
    return part


def _lists(figures: Mapping[str, np.ndarray]) -> dict[str, list]:
    return {name: (np.round(v, 4) if name == "utilisation" else v).tolist() for name, v in figures.items()}


def short(values: Any) -> list[float]:
    """Four significant digits of each value: enough for a curve, and lines stay short."""
    return [float(f"{value:.4g}") for value in np.asarray(values, np.float64)]


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

    def forget_after(self, step: int) -> None:
        """Takes out of the file what a run that goes on from ``step`` writes again, so that each row is there once.

        These are rows of later steps, those of a last evaluation that did not end, and lines that were cut off.
        """
        self._file.flush()
        text = _text(self.path)
        kept = [(line, row) for line in text.split("\n") if (row := _row(line)) is not None]
        kept = [(line, row) for line, row in kept if not (isinstance(row.get("step"), int) and row["step"] > step)]
        while kept and kept[-1][1].get("kind") in BEFORE_FINAL:
            kept.pop()
        new = "".join(line + "\n" for line, _ in kept)
        if new != text:
            self._file.close()
            write_atomically(self.path, new)
            self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


BEFORE_FINAL = ("final_load", "tasks")
"""Kinds of rows that the last evaluation writes before its row ``final``."""


def _text(path: Path) -> str:
    """Bytes that are no UTF-8 (a damaged disk, a line cut within a character) end no command."""
    return path.read_text(encoding="utf-8", errors="replace")


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a metrics file; a line cut off at the end (a writer was stopped), or damaged, is left out."""
    return [row for line in _text(Path(path)).split("\n") if (row := _row(line)) is not None]


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
