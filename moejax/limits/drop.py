"""Limits that only clear pairs, expert by expert: Token Drop and Expert Drop.

Letters: T tokens, E experts, R routing rows, K choices per row, L MoE layers.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.limits.pieces import (
    DropOrder,
    Rounding,
    Scope,
    best_of_token,
    capacity,
    keep_best,
    num_experts,
    of_layer,
    option,
    over_ranks,
    share_lost_weight,
    token_of_row,
)
from moejax.routing import computing, count_by_expert
from moejax.types import RouteContext, Routing, pytree, static

Loads = Literal["rank", "all"]
"""Of a rank's own tokens, or of those of all ranks of expert parallelism."""


@pytree
class TokenDrop:
    """Token Drop of Capacity-Aware Inference (2503.05066, eq. 5 and Algorithm 1).

    Each expert keeps the ``C = floor(factor * t k / n)`` valid pairs of its column that rank highest and the others are
    dropped: their weight is not given to anyone (the paper does not renormalise), and a token without pairs passes
    through the residual and the shared experts only. ``t`` counts real tokens of the rows in hand, so on several ranks
    each applies it to its own tokens and no synchronisation is needed.

    Orders: "score" keeps the highest scores; "order" the earliest tokens (Switch); "reverse" the latest; "random" a
    uniform choice (needs ``ctx.key``). A factor of n/k or more drops nothing. The names say what the digest of the
    paper's Table 1 means by them; the published code's "first" and "last" changed their meaning between versions.
    """

    factor: Float[Array, "..."]
    """Capacity factor gamma, a multiple of the mean load: one, or ``[L]`` (one for each MoE layer). A run-time
    value."""
    order: DropOrder = static("score")
    rounding: Rounding = option("floor")
    """Of the capacity; matters where tokens are few (decoding): see :func:`moejax.limits.pieces.capacity`."""
    scope: Scope = option("rank")
    """Who shares a capacity: see :func:`moejax.limits.pieces.keep_best`. "request" is batch-invariant: what a request
    keeps depends on no other request; it costs pairs, as each request must be balanced by itself."""
    keep_top1: bool = option(False)
    """A token's best pair is never dropped. The load of an expert can then exceed its capacity, by the pairs that
    ``MoEMetrics.exceeded`` counts."""
    renormalise: bool = option(False)
    """The pairs that are left to a token take over the weight of its dropped ones."""
    drop_first: Int[Array, ""] | None = option(None, static=False)
    """A value of ``ctx.modality``: an overfull expert drops its tokens before any other's (the paper's Image First)."""

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        factor = of_layer(self.factor)
        kept = keep_best(
            routing, routing.expert, (*self._modality(routing, ctx), self._priority(routing, ctx)),
            lambda pairs: capacity(factor, pairs / num_experts(routing), self.rounding), ctx,
            scope=self.scope, protected=best_of_token(routing) if self.keep_top1 else None,
        )  # fmt: skip
        return share_lost_weight(routing, kept) if self.renormalise else kept

    def _priority(self, routing: Routing, ctx: RouteContext) -> Float[Array, "R K"]:
        shape = routing.expert.shape
        if self.order == "score":
            return routing.score
        if self.order == "random":
            if ctx.key is None:
                raise ValueError("TokenDrop(order='random') needs RouteContext(key=...)")
            return jax.random.uniform(jax.random.fold_in(ctx.key, 77), shape)
        position = jnp.broadcast_to(token_of_row(routing).astype(jnp.float32)[:, None], shape)
        return position if self.order == "reverse" else -position

    def _modality(self, routing: Routing, ctx: RouteContext) -> tuple[Array, ...]:
        # A key of its own, and not 1.0 off the score as in the published code: scores of a sigmoid sum to more than 1.
        if self.drop_first is None:
            return ()
        if ctx.modality is None:
            raise ValueError("TokenDrop(drop_first=...) needs RouteContext(modality=...)")
        return ((ctx.modality[token_of_row(routing)] != self.drop_first).astype(jnp.int32)[:, None],)


@pytree
class ExpertDrop:
    """Expert Drop (2503.05066, ablation of Table 2): the least-loaded experts are skipped altogether.

    The load of an expert is its pairs summed over *tokens* (the published code sums over the expert axis, which gives
    every expert the same load, so that it skips arbitrary ones); whose tokens, ``loads`` says. Equal loads: the lower
    id goes.
    """

    amount: Float[Array, ""]
    """How many experts, or their share; a run-time value."""
    unit: Literal["experts", "share"] = static("experts")
    """"share": ``floor(amount * E)`` experts, and at least one (the paper's 10 % is one of Mixtral's eight)."""
    loads: Loads = option("rank")
    """Loads of the rank's own tokens, or of all ranks: one small sum over them, and all skip the same experts."""

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        experts = num_experts(routing)
        loads = loads_of(routing, ctx, self.loads)
        count = self.amount
        if self.unit == "share":
            count = jnp.where(count > 0, jnp.maximum(jnp.floor(count * experts * (1 + 1e-6)), 1), 0)
        ids = jnp.arange(experts)
        below = (loads < loads[:, None]) | ((loads == loads[:, None]) & (ids < ids[:, None]))
        skipped = jnp.sum(below, axis=1) < count  # so many have less to do; E is small, so no sort
        hit = jnp.any((routing.expert[..., None] == ids) & skipped, axis=-1)  # zero-computation experts have no id here
        return dataclasses.replace(routing, valid=routing.valid & ~hit)


def loads_of(routing: Routing, ctx: RouteContext, of: Loads = "rank", halved: float = 1.0) -> Float[Array, "E"]:
    """Pairs of each expert that computes: ``ctx.loads`` where they are given, else those of the rows in hand, or with
    "all" of all ranks of expert parallelism. A pair that 2T-Drop halved counts as ``halved``."""
    experts = num_experts(routing)
    if ctx.loads is not None:
        return ctx.loads[:experts]
    expert = jnp.where(computing(routing), routing.expert, experts).reshape(-1)
    counts = count_by_expert(expert, experts).astype(jnp.float32)
    if routing.level is not None and halved < 1:
        minor = jnp.where(routing.level.reshape(-1) == 1, expert, experts)
        counts = counts - (1 - halved) * count_by_expert(minor, experts)
    return over_ranks(counts, ctx) if of == "all" else counts
