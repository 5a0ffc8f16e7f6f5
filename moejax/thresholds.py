"""Thresholds of :class:`moejax.limits.ThresholdDrop` from what a user wants: a drop rate, or a bound on the loss.

The paper (DualSparse-MoE, 2508.18376) sets one threshold by hand and leaves one for each layer to future work. Here one
pass over calibration text counts the normalised scores of each layer, and thresholds are quantiles of them.

Letters: L MoE layers, G ranks, R routing rows, K choices per row, T threshold.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moejax import limits, routing
from moejax.config import ConfigError, MoEConfig
from moejax.data import Batch
from moejax.moe import shared_width
from moejax.types import Limit, MoEMetrics

BINS = 1 << 18
"""Thresholds that are told apart: multiples of 1/BINS, which float32 holds exactly."""
STEPS = 512
"""Points of each layer's curve of lost weight among which ``spread="weight"`` chooses."""

Spread = Literal["layer", "global", "weight"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The form of dropping that thresholds are for."""

    gap: float | None = 0.01
    """2T-Drop: ``T - gap`` and ``T + gap``. None: 1T-Drop."""
    major: int = 0
    """Major neurons; 0: :func:`moejax.limits.major_columns`."""
    expert_dim: int = 0
    """Hidden width F of a routed expert; 0: half a pair's work is skipped."""

    @property
    def columns(self) -> int:
        """Major neurons as a number, where F says what it is: what thresholds were found for must not change with what
        0 means."""
        if self.gap is None or not self.expert_dim:
            return self.major
        return limits.major_columns(self.expert_dim, self.major)

    @property
    def skip(self) -> float:
        """Share of its work that a halved pair leaves out."""
        return 1 - limits.major_columns(self.expert_dim, self.major) / self.expert_dim if self.expert_dim else 0.5

    def text(self, thresholds: Sequence[float] | Float[np.ndarray, "L"]) -> str:
        """The limit as ``--limit=`` and ``moe.capacity_limits`` take it; equal thresholds stand once."""
        values = [str(np.float32(value)) for value in thresholds]
        values = values[:1] if len(set(values)) == 1 else values
        more = (
            ""
            if self.gap is None
            else f",gap={np.float32(self.gap)!s}" + (f",major={self.columns}" if self.columns else "")
        )
        return f"threshold_drop:threshold={'/'.join(values)}{more}"

    def limit(self, thresholds: Sequence[float] | Float[np.ndarray, "L"]) -> tuple[limits.ThresholdDrop, ...]:
        """The limit of L thresholds, always with one for each layer, so that any of them run the same program."""
        return (limits.threshold_drop(tuple(map(float, thresholds)), gap=self.gap, major=self.columns),)


# --- scores ---------------------------------------------------------------------------------------


class ScoreTable:
    """How many pairs of each layer have which normalised score, and their gate weight: sums over batches.

    Memory is that of ``L * BINS`` counts and weights, however many tokens were read. A pair in bin b has a score in
    ``((b - 1) / BINS, b / BINS]``, so that counts are exact for thresholds that are multiples of ``1 / BINS``.
    """

    def __init__(self, layers: int) -> None:
        self.pairs = np.zeros((layers, BINS + 1), np.int64)
        self.weight = np.zeros((layers, BINS + 1), np.float64)
        self.tokens = 0

    @property
    def layers(self) -> int:
        return len(self.pairs)

    @property
    def routed(self) -> Float[np.ndarray, "L"]:
        """Pairs of each layer."""
        return self.pairs.sum(axis=1).astype(np.float64)

    def add(
        self,
        scores: Float[np.ndarray, "L *pairs"],
        weights: Float[np.ndarray, "L *pairs"],
        tokens: int,
    ) -> None:
        """Counts pairs; those whose score is below 0 are none.

        Raises:
          FloatingPointError: a score is NaN.
        """
        for layer, (score, weight) in enumerate(zip(np.asarray(scores), np.asarray(weights), strict=True)):
            if np.isnan(score).any():
                raise FloatingPointError(
                    f"MoE layer {layer + 1} of {self.layers}: a router score is NaN; the model or its input is broken"
                )
            real = score >= 0
            bins = np.minimum(np.ceil(score[real] * np.float32(BINS)), BINS).astype(np.int64)
            self.pairs[layer] += np.bincount(bins, minlength=BINS + 1)
            self.weight[layer] += np.bincount(bins, weight[real], minlength=BINS + 1)
        self.tokens += tokens

    def rates(self, thresholds: Any, rule: Rule) -> Float[np.ndarray, "L"]:
        """Drop rate of each layer: work that is not done over routed work, a halved pair with its share
        (``Rule.skip``)."""
        return self._gone(self.pairs, thresholds, rule) / np.maximum(self.routed, 1)

    def rate(self, thresholds: Any, rule: Rule) -> float:
        """Drop rate over all layers."""
        return float(self._gone(self.pairs, thresholds, rule).sum() / max(self.routed.sum(), 1))

    def lost_weight(self, thresholds: Any, rule: Rule) -> float:
        """Share of all gate weight that is lost; a halved pair loses the share of its weight that it skips."""
        return float(self._gone(self.weight, thresholds, rule).sum() / max(self.weight.sum(), 1e-20))

    def _gone(self, of: np.ndarray, thresholds: Any, rule: Rule) -> Float[np.ndarray, "L"]:
        each = np.broadcast_to(np.asarray(thresholds, np.float32).astype(np.float64), self.layers)
        return np.array([dropped(row, t, rule) for row, t in zip(of, each, strict=True)])


def dropped(counts: np.ndarray, thresholds: Any, rule: Rule) -> Any:
    """What of ``counts [BINS + 1]`` of one layer goes at each of ``thresholds``."""
    below, at = np.cumsum(counts, dtype=np.float64), np.asarray(thresholds, np.float64)

    def up_to(bound: np.ndarray) -> np.ndarray:
        place = np.floor(bound * BINS).astype(np.int64)
        return np.where(place > 0, below[np.clip(place, 0, BINS)], 0.0)

    gap = rule.gap or 0.0
    made = (1 - rule.skip) * up_to(at - gap) + rule.skip * up_to(at + gap) if gap else up_to(at)
    return np.where(at > 0, made, 0.0)


def collect_fn(model_def: nnx.GraphDef, mesh: jax.sharding.Mesh) -> Callable[..., tuple[Array, Array]]:
    """A compiled ``(params, router_state, batch, limits, key) -> (normalised scores, gate weights)``, ``[L, G, R, K]``
    each, of the pairs that routers made, before limits. The score of what is no pair, or needs no expert, is -1."""

    @jax.jit
    def run(params: nnx.State, router_state: nnx.State, batch: dict, in_force: tuple[Limit, ...], key: Array) -> Any:
        out = nnx.merge(model_def, params, router_state)(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], mask=batch["mask"],
            limits=in_force, key=key, record=True,
        )  # fmt: skip
        made = out.routing.made
        shares = jax.vmap(jax.vmap(lambda table: (limits.normalised(table), routing.computing(table))))
        share, paid = shares(made)
        return jax.numpy.where(paid, share, -1.0), made.weight

    def collect(*arguments: Any) -> tuple[Array, Array]:
        with jax.set_mesh(mesh):
            return run(*arguments)

    return collect


def collect(
    run: Callable[..., tuple[Array, Array]],
    params: nnx.State,
    router_state: nnx.State,
    batches: Iterable[Batch],
    put: Callable[[dict], dict],
    *,
    in_force: tuple[Limit, ...] = (),
    each: Callable[[ScoreTable], None] = lambda table: None,
) -> ScoreTable:
    """One pass over ``batches``; ``run`` from :func:`collect_fn`.

    Args:
      put: places a batch on the devices.
      in_force: limits that act meanwhile: a later layer reads what they leave.
      each: called after every batch.

    Raises:
      ConfigError: no batch.
    """
    table: ScoreTable | None = None
    for i, batch in enumerate(batches):
        given = put({name: batch[name] for name in ("tokens", "positions", "segment_ids", "mask")})
        key = jax.random.fold_in(jax.random.key(0), i)
        scores, weights = jax.device_get(run(params, router_state, given, in_force, key))
        table = table or ScoreTable(len(scores))
        table.add(scores, weights, int(np.asarray(batch["mask"]).sum()))
        each(table)
    if table is None:
        raise ConfigError("thresholds need calibration text, and there is none: name another split or domain")
    return table


# --- from a rate to thresholds --------------------------------------------------------------------


def solve(table: ScoreTable, rate: float, rule: Rule, spread: Spread = "layer") -> Float[np.ndarray, "L"]:
    """Thresholds at which ``rate`` of the routed work of ``table`` is dropped, as near as its scores allow.

    Args:
      table: from :func:`collect`.
      rate: in [0, 1].
      rule: with its gap the rate counts halved pairs by what they skip.
      spread: "layer": each layer drops the rate. "global": one threshold for all layers; the rate is the total's.
        "weight": one for each, and the total's rate, with the least gate weight lost in all: from no drop on, the layer
        that loses least weight for the work it saves goes on next. Where gate weights are the normalised scores
        (``renormalise``) that is nearly "global".

    Raises:
      ConfigError: a rate outside [0, 1], or an unknown spread.
    """
    check_rate(rate)
    if spread not in get_args(Spread):
        raise ConfigError(f"spread={spread!r}: choose one of {', '.join(get_args(Spread))}")
    grid = np.arange(BINS) / BINS
    if spread == "global":
        curve = sum(dropped(row, grid, rule) for row in table.pairs)
        return np.full(table.layers, _nearest(curve, rate * table.routed.sum()))
    if spread == "layer":
        curves = (dropped(row, grid, rule) for row in table.pairs)
        return np.array([_nearest(curve, rate * n) for curve, n in zip(curves, table.routed, strict=True)])
    return _least_weight(table, rate, rule, grid)


def check_rate(rate: float) -> None:
    """Raises ConfigError for a drop rate outside [0, 1], or NaN."""
    if not 0 <= rate <= 1:
        raise ConfigError(f"drop_rate={rate}: a share of the routed work, in [0, 1]")


def _nearest(curve: Float[np.ndarray, "BINS"], target: float) -> float:
    """The lowest threshold at which a rising curve is nearest to ``target``; of two that are as near the lower."""
    above = min(int(np.searchsorted(curve, target)), len(curve) - 1)
    below = max(above - 1, 0)
    chosen = above if curve[above] - target < target - curve[below] else below
    return int(np.searchsorted(curve, curve[chosen])) / BINS


def _least_weight(table: ScoreTable, rate: float, rule: Rule, grid: np.ndarray) -> Float[np.ndarray, "L"]:
    room, moves, curves = rate * table.routed.sum(), [], []
    for layer, (pairs, weight) in enumerate(zip(table.pairs, table.weight, strict=True)):
        work, lost = dropped(pairs, grid, rule), dropped(weight, grid, rule)
        places = np.unique(np.searchsorted(work, np.linspace(0, work[-1], STEPS + 1)))
        corners = _lower_hull(work[places], lost[places])
        curves.append(work)
        moves += [((y1 - y0) / (x1 - x0), layer, x1 - x0) for (x0, y0), (x1, y1) in itertools.pairwise(corners)]
    spent = np.zeros(table.layers)
    for _, layer, step in sorted(moves):  # on a lower hull a layer's slopes rise: its moves come in order
        taken = min(step, room)
        spent[layer] += taken
        room -= taken
        if room <= 0:
            break
    return np.array([_nearest(curve, target) for curve, target in zip(curves, spent, strict=True)])


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """Corners of the greatest convex function below the points, whose ``x`` rise (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        if hull and point[0] <= hull[-1][0]:
            continue
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])


def fit(
    collected: Callable[[tuple[Limit, ...]], ScoreTable],
    rate: float,
    rule: Rule,
    spread: Spread = "layer",
    rounds: int = 2,
) -> tuple[Float[np.ndarray, "L"], ScoreTable]:
    """Thresholds for ``rate``, and the scores that they were solved on.

    Where a layer drops, later ones read another input and have other scores. So each round after the first collects
    them with the thresholds of the one before in force.

    Args:
      collected: one pass over the calibration text with these limits.
      rounds: passes, 1 or more.
      rate, rule, spread: as for :func:`solve`.
    """
    table = collected(())
    at = solve(table, rate, rule, spread)
    for _ in range(rounds - 1):
        table = collected(rule.limit(at))
        at = solve(table, rate, rule, spread)
    return at, table


def largest_rate(loss: Callable[[float], float], bound: float, *, resolution: float = 0.01) -> float:
    """The largest drop rate with ``loss(rate) <= bound``, up to ``resolution``, by bisection of [0, 1].

    ``loss`` is what is lost against no drop, and taken to rise with the rate; where it does not, a rate within the
    bound is found next to one beyond it. 0 where no rate that was tried is within it.

    Raises:
      ConfigError: as :func:`check_search`.
    """
    check_search(bound, resolution)
    within, beyond = 0.0, 1.0
    while beyond - within > resolution:
        middle = (within + beyond) / 2
        within, beyond = (middle, beyond) if loss(middle) <= bound else (within, middle)
    return within


def check_search(bound: float, resolution: float) -> None:
    """Raises ConfigError for a bound that is no number at least 0, or a resolution outside (0, 1)."""
    if not 0 <= bound < math.inf:
        raise ConfigError(f"quality={bound}: the largest loss that is accepted, in bits per byte, 0 or more")
    if not 0 < resolution < 1:
        raise ConfigError(f"resolution={resolution}: a step of the drop rate, between 0 and 1")


# --- what thresholds did --------------------------------------------------------------------------


def drop_rates(metrics: MoEMetrics) -> Float[np.ndarray, "L"]:
    """Drop rate of each layer that evaluation with limits counted: ``(dropped + skipped) / routed``."""
    m = jax.device_get(metrics)
    skipped = 0.0 if m.skipped is None else np.asarray(m.skipped, np.float64)
    return (np.asarray(m.dropped, np.float64) + skipped) / np.maximum(np.asarray(m.routed, np.float64).sum(-1), 1)


def with_shared(rate: float, pairs_per_token: float, moe: MoEConfig) -> float:
    """The rate over the work of routed and shared experts: FLOPs go by widths, ``pairs * F`` and the shared width."""
    routed = pairs_per_token * moe.expert_dim
    whole = routed + shared_width(moe)
    return rate * routed / whole if whole else 0.0


def risky(thresholds: Float[np.ndarray, "L"], rule: Rule, k: int) -> list[int]:
    """MoE layers whose threshold for a whole drop is 1/k or more: a token may lose all its experts there. Below it the
    largest of a token's k scores is above."""
    lower = np.asarray(thresholds, np.float64) - (rule.gap or 0.0)
    return [i for i, t in enumerate(lower.tolist()) if t >= 1 / k]
