"""Limits on what a whole device computes: its time follows the sum of its experts' loads, not the largest of them.

A device hosts a run of consecutive expert ids. Each rank limits its own tokens, with a quota for each destination: no
synchronisation is needed, and the bound of the whole follows by summation.

Letters: E experts, R routing rows, K choices per row, G devices (ranks of expert parallelism).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.limits.drop import Loads, loads_of
from moejax.limits.expand import AddedWeight, candidates, require_token_choice, widened, with_pairs
from moejax.limits.pieces import (
    SLACK,
    Rounding,
    Scope,
    best_of_token,
    capacity,
    countable,
    hosted_experts,
    keep_best,
    major_share,
    num_experts,
    of_layer,
    option,
    share_lost_weight,
)
from moejax.types import RouteContext, Routing, pytree, static


@pytree
class DeviceBudget:
    """Device-level capacity (2503.05066, Table 3): the pairs of a device's n_l experts are at most
    ``n_l * factor * t k / n`` of a rank's own, best by score, whichever expert they go to. With ``expanded`` the rank's
    own experts are candidates too, as in :class:`ExpandedDrop` (the paper's Table 3). Pairs are counted, as in
    :class:`TokenDrop`: one that 2T-Drop halved is one, as it travels whole."""

    factor: Float[Array, "..."]
    """Capacity factor, as in :class:`TokenDrop`."""
    ranks: int = static(0)
    """Devices that the experts are spread over. 0: as many as have ``len(ctx.local_experts)`` experts each."""
    rounding: Rounding = option("floor")
    scope: Scope = option("rank")
    keep_top1: bool = option(False)
    renormalise: bool = option(False)
    expanded: bool = option(False)
    added_weight: AddedWeight = option("score")

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        factor, experts, own = of_layer(self.factor), num_experts(routing), routing.expert.shape[1]
        wide = routing
        if self.expanded:
            require_token_choice(routing)
            wide = with_pairs(routing, *candidates(routing, ctx, jnp.float32(0)), self.added_weight)
        width = wide.expert.shape[1]
        device, ranks = device_of(wide, ctx, self.ranks)
        kept = keep_best(
            wide, device, (wide.score,),
            lambda pairs: capacity(factor, pairs * (experts // ranks) / experts, self.rounding), ctx,
            scope=self.scope, counted=jnp.broadcast_to(jnp.arange(width) < own, wide.expert.shape),
            protected=widened(best_of_token(routing), width) if self.keep_top1 else None,
        )  # fmt: skip
        return share_lost_weight(routing, kept) if self.renormalise else kept


@pytree
class MeasuredBudget:
    """A budget from measured time instead of a factor: only what the slowest device needs beyond the second-slowest is
    dropped, lowest scores first. Dropping more anywhere saves no time as long as that one sets it.

    Each rank keeps the same share of its own work on the slowest device, where a pair that 2T-Drop halved is what is
    left of it. With ``loads="all"`` all ranks agree which device that is; else each looks at the loads that its own
    tokens make.
    """

    seconds_per_row: Float[Array, "G"] | None = None
    """Measured, one for each device; only their ratios matter. None: all are equally fast."""
    ranks: int = static(0)
    """As in :class:`DeviceBudget`."""
    renormalise: bool = option(False)
    loads: Loads = option("rank")
    """As in :class:`ExpertDrop`."""

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        device, ranks = device_of(routing, ctx, self.ranks)
        if ranks == 1:
            return routing
        major = countable(major_share(ctx, routing.major), routing.valid.size)
        rows = jnp.sum(loads_of(routing, ctx, self.loads, float(major)).reshape(ranks, -1), axis=1)
        cost = jnp.ones(ranks) if self.seconds_per_row is None else self.seconds_per_row
        (_, second), _ = jax.lax.top_k(rows * cost, 2)
        share = jnp.minimum(second / jnp.maximum(rows * cost, 1e-20), 1.0)  # 1 for all but the slowest
        work = None  # of each pair, as a whole number
        if routing.level is not None:
            work = jnp.where(routing.level == 1, major.numerator, major.denominator)
        done = jnp.where(routing.valid, 1 if work is None else work, 0)
        own = jnp.sum(jnp.where(device[..., None] == jnp.arange(ranks), done[..., None], 0), axis=(0, 1))
        quota = jnp.append(jnp.floor(own * share * (1 + SLACK)), jnp.inf)  # inf: zero-computation experts
        kept = keep_best(routing, device, (routing.score,), lambda pairs: quota[device], ctx, cost=work)
        return share_lost_weight(routing, kept) if self.renormalise else kept


def device_of(routing: Routing, ctx: RouteContext, ranks: int) -> tuple[Int[Array, "R K"], int]:
    """The device of each pair's expert (``G`` for a zero-computation expert), and ``G``.

    Raises:
      ValueError: devices that do not divide the experts.
      ConfigError: as :func:`moejax.limits.pieces.hosted_experts`.
    """
    experts = num_experts(routing)
    size = experts // ranks if ranks else hosted_experts(routing, ctx).shape[0]
    if size < 1 or experts % size or (ranks and ranks * size != experts):
        raise ValueError(f"{experts} experts do not divide over {ranks or 'ranks'} devices of {size} each")
    return jnp.minimum(routing.expert // size, experts // size), experts // size
