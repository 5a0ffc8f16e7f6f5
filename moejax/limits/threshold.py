"""Threshold dropping of DualSparse-MoE (2508.18376): pairs with a low share of their token's scores are dropped
(1T-Drop), or left with the important half of their expert's neurons (2T-Drop). Which expert it is takes no part.

Letters: T tokens, E experts, R routing rows, K choices per row, G devices (ranks of expert parallelism), L MoE layers.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ConfigError
from moejax.limits.budget import device_of
from moejax.limits.pieces import (
    BLOCK,
    countable,
    major_columns,
    major_share,
    of_layer,
    option,
    over_ranks,
    sum_of_token,
)
from moejax.routing import computing
from moejax.types import RouteContext, Routing, pytree, static

LoadAware = Literal["none", "paper", "water"]
Form = Literal["auto", "extent", "split"]
STEPS = 64
"""Thresholds that water-filling chooses from for each device: 0 and so many equal steps up to the limit's own."""


def normalised(routing: Routing) -> Float[Array, "R K"]:
    """Each pair's share of its token's scores, over the pairs that are valid: what thresholds are compared with
    (section 3.2 of the paper). 0 for pairs that are not valid, and where all scores of a token are 0; NaN for all of a
    token with a score that is NaN."""
    score = jax.lax.stop_gradient(jnp.where(routing.valid, routing.score, 0.0))
    whole = sum_of_token(routing, score)
    return score / jnp.where(whole == 0, 1.0, whole)[:, None]


@pytree
class ThresholdDrop:
    """1T-Drop, and with ``gap`` 2T-Drop (2508.18376, section 3.2)::

        n_j = score_j / sum of the token's scores
        1T:  keep iff n_j > T
        2T:  nothing iff n_j <= T - gap;  the major neurons iff T - gap < n_j <= T + gap;  all iff n_j > T + gap

    Kept pairs keep the gate weight that the router gave them: n_j decides, and nothing is renormalised. A threshold of
    0 or less drops nothing, also where a score has underflowed to 0, and with T = 0 nothing is halved either. As the
    largest n_j of a token is at least 1/K, T below 1/K leaves each token an expert. A token whose scores are NaN keeps
    all its pairs, so that its output is NaN with the limit as without.

    What 2T-Drop halves stays valid with ``Routing.level = 1``: the layer computes the leading ``major`` neurons of the
    expert for it, so neurons should stand in order of importance (``experiments.reconstruct``).

    Under expert parallelism ``load_aware`` lets each device have a threshold of its own, at most T, as only the busiest
    sets the time. It needs one small sum over the ranks for each layer, of loads before dropping:

    - "paper" (section 3.3): ``T_d = T min(1, load_d / mean load)``. It may drop where no time is saved.
    - "water": the device that is busiest with T sets the target; every other takes the lowest of :data:`STEPS` even
      steps of T that brings it to the target or below. The maximum load is that of T everywhere, and, up to a step, no
      pair goes that did not have to.
    """

    threshold: Float[Array, "..."]
    """T: one, or ``[L]`` (one for each MoE layer). A run-time value."""
    gap: Float[Array, ""] | None = None
    """Half the distance between the two thresholds, a run-time value. None: 1T-Drop."""
    major: int = static(0)
    """Major neurons of each expert. 0: half of them (:func:`major_columns`)."""
    form: Form = option("auto")
    """How the major half is computed; the outputs are the same. "extent": its leading columns, in a group of rows of
    its own, by the kernels' extents, which count in blocks of 64. "split": as the first of two sub-experts, for
    which the weights are copied. "auto": "extent" where the number of columns allows it."""
    load_aware: LoadAware = option("none")
    ranks: int = option(0)
    """Devices for ``load_aware``, as in :class:`~moejax.limits.DeviceBudget`."""

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        if routing.level is not None and self.gap is not None and routing.major != self.major:
            raise ValueError(f"two limits halve experts, to {routing.major} and {self.major} major neurons: choose one")
        share = normalised(routing)
        threshold = of_layer(self.threshold)
        if self.load_aware != "none":
            device, ranks = device_of(routing, ctx, self.ranks)
            of_device = self.device_thresholds(threshold, share, device, ranks, routing, ctx)
            threshold = jnp.append(of_device, 0.0)[device]  # 0: zero-computation experts
        lower, upper = self.pair_of(threshold)
        stays = _above(share, lower) | ~computing(routing)
        kept = dataclasses.replace(routing, valid=routing.valid & stays)
        if self.gap is None:
            return kept
        level = jnp.where(computing(routing) & ~_above(share, upper), 1, 0).astype(jnp.int32)
        if routing.level is not None:
            level = jnp.maximum(level, routing.level)
        return dataclasses.replace(kept, level=level, major=self.major, form=self.form)

    def pair_of(self, threshold: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """``(T_major, T_minor)``: both T for 1T-Drop, and both at most 0 where T is."""
        if self.gap is None:
            return threshold, threshold
        return threshold - self.gap, jnp.where(threshold > 0, threshold + self.gap, 0.0)

    def device_thresholds(
        self,
        threshold: Float[Array, ""],
        share: Float[Array, "R K"],
        device: Int[Array, "R K"],
        ranks: int,
        routing: Routing,
        ctx: RouteContext,
    ) -> Float[Array, "G"]:
        """T of each device, the same on every rank. Pairs that an earlier limit halved are as much work as is left."""
        device = jnp.where(computing(routing), device, ranks)
        halved = None if routing.level is None else routing.level == 1
        major = countable(
            major_share(ctx, self.major if routing.level is None else routing.major), ranks * routing.valid.size
        )
        whole, half = major.denominator, major.numerator  # whole numbers: what is equal must not differ by rounding

        def counts(place: Int[Array, "R K"], of_device: int) -> Int[Array, "G n"]:
            """How many pairs have each place in ``[0, of_device)`` on each device, over all ranks."""
            ids = jnp.arange(ranks * of_device, dtype=jnp.int32)
            flat = (device * of_device + place).reshape(-1)
            mine = jnp.sum(flat[:, None] == ids, axis=0, dtype=jnp.int32)  # fused: no scatter, no [P, G n] array
            return over_ranks(mine, ctx).reshape(ranks, -1)

        if self.load_aware == "paper":
            loads = counts(jnp.zeros_like(device), 1)[:, 0]
            if halved is not None:
                loads = whole * loads - (whole - half) * counts(halved.astype(device.dtype), 2)[:, 1]
            return threshold * jnp.minimum(1.0, loads / jnp.maximum(jnp.mean(loads), 1e-20))
        steps = threshold * jnp.arange(STEPS + 1, dtype=jnp.float32) / STEPS

        def gone(bounds: Float[Array, "S"], already: Bool[Array, "R K"] | None = None) -> Int[Array, "G S+1"]:
            """Pairs of each device that are not above each of the bounds, which rise: by the first that each meets; and
            at last all its pairs. ``already``: pairs that meet all bounds."""
            first = jnp.sum(_above(share[..., None], bounds), axis=-1, dtype=jnp.int32)  # STEPS + 1: never
            first = first if already is None else jnp.where(already, 0, first)
            return jnp.cumsum(counts(first, STEPS + 2), axis=1)

        at_lower, at_upper = self.pair_of(steps)
        lower, upper = gone(at_lower), gone(at_upper, halved)
        work = whole * lower[:, -1:] - (whole - half) * upper[:, :-1] - half * lower[:, :-1]
        target = jnp.max(work[:, -1])
        enough = jnp.argmax(work <= target, axis=1)  # the first; the last one always is
        return steps[enough]


def _above(share: Array, threshold: Array) -> Array:
    return ~(share <= threshold) | (threshold <= 0)  # NaN is above: a drop must not hide a broken router


@dataclasses.dataclass(frozen=True)
class Parting:
    """How pairs of a Routing reach the arrays of a layer's experts (:mod:`moejax.partition.levels`)."""

    parts: int = 1
    """Parts that each pair is spread over."""
    split: int = 1
    """Parts that the stored experts are split into while they compute, among these."""
    extents: tuple[int, ...] | None = None
    """Leading columns of each of an expert's groups of rows, instead of parts."""
    held: int = 0
    """Parts that level 1 keeps; 0: no pair has a level."""
    skipped: float = 0.0
    """Share of an expert that level 1 leaves out."""
    apart: bool = False
    """Whether the parts of an expert stand E ids apart (:attr:`moejax.config.MoEConfig.parts_apart`), not together."""


def halving(expert_dim: int, major: int = 0, form: Form = "auto", parts: int = 1) -> Parting:
    """How a layer computes the ``major`` neurons of experts of width ``expert_dim`` that are stored in ``parts`` parts.

    Raises:
      ConfigError: neurons that the form or the parts cannot compute.
    """
    major = major_columns(expert_dim, major)
    of = f"threshold_drop: {major} of {expert_dim} neurons of an expert are major"
    if not 0 < major < expert_dim:
        raise ConfigError(f"{of}: choose major above 0 and below moe.expert_dim")
    skipped = 1 - major / expert_dim
    if parts > 1:
        width = expert_dim // parts
        if major % width:
            raise ConfigError(
                f"{of}, which is no whole number of the {parts} parts of {width} that moe.parts stores: choose "
                f"major={width * max(1, major // width)}"
            )
        return Parting(parts, held=major // width, skipped=skipped)
    if form != "split" and major % BLOCK == 0:
        return Parting(extents=(expert_dim, major), skipped=skipped)
    if form == "extent" or 2 * major != expert_dim:
        raise ConfigError(f"{of}: form='extent' computes multiples of {BLOCK}, form='split' exactly one half")
    return Parting(2, split=2, held=1, skipped=skipped)
