"""Limits that also add pairs: Expanded Drop and the multi-round reroute. What they add stands in appended columns.

Letters: T tokens, E experts, K choices per row, e experts of this rank.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.limits.pieces import (
    Rounding,
    Scope,
    best_of_token,
    capacity,
    hosted_experts,
    keep_best,
    num_experts,
    of_layer,
    option,
    share_lost_weight,
)
from moejax.routing import computing
from moejax.types import RouteContext, Routing, pytree, static

Priority = Literal["score", "topk"]
AddedWeight = Literal["score", "like_own"]


@pytree
class ExpandedDrop:
    """Expanded Drop of Capacity-Aware Inference (2503.05066, Algorithm 2).

    A token's candidates are its own pairs and all experts of its own rank (``ctx.local_experts``), duplicates merged;
    each expert keeps its ``C`` best candidates, ``C`` as in :class:`TokenDrop` from the router's pairs alone. What is
    added stays on its rank, so it costs computation and no communication: up to ``factor * t k`` pairs in all.

    With ``ctx.local_experts=None`` all experts are local, and this is expert choice with capacity C. A large factor is
    *not* neutral: at n/k every expert takes every candidate.

    Candidates compete by ``Routing.score`` and, for the added ones, ``Routing.probs``: the router's output before
    renormalisation, whatever its nonlinearity. A selection bias (DeepSeek-V3) takes no part.
    """

    factor: Float[Array, "..."]
    """Capacity factor, as in :class:`TokenDrop`."""
    floor: Float[Array, ""]
    """A candidate is added only with a higher score than this; 0 or less: with any."""
    priority: Priority = static("score")
    """"score": the paper's Algorithm 2, where a local candidate may displace another token's genuine pair. "topk": it
    never does; candidates fill what the router's own pairs leave free."""
    added_weight: AddedWeight = static("score")
    """What an added pair is multiplied by. "score": its score (the paper's G, before renormalisation). "like_own": its
    score times (sum of weights / sum of scores) of the token's own pairs, so that it stands on their footing where the
    router renormalises or scales; without either the two are equal."""
    rounding: Rounding = option("floor")
    scope: Scope = option("rank")
    keep_top1: bool = option(False)
    renormalise: bool = option(False)
    """A token's pairs, added ones too, are scaled to the sum that its own had."""

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        require_token_choice(routing)
        factor = of_layer(self.factor)
        own = routing.expert.shape[1]
        wide = with_pairs(routing, *candidates(routing, ctx, self.floor), self.added_weight)
        genuine = jnp.broadcast_to(jnp.arange(wide.expert.shape[1]) < own, wide.expert.shape)
        best = widened(best_of_token(routing), wide.valid.shape[1]) if self.keep_top1 else None
        first = (genuine.astype(jnp.int32),) if self.priority == "topk" else ()
        kept = keep_best(
            wide, wide.expert, (*first, wide.score),
            lambda pairs: capacity(factor, pairs / num_experts(routing), self.rounding), ctx,
            scope=self.scope, counted=genuine, protected=best,
        )  # fmt: skip
        return share_lost_weight(routing, kept) if self.renormalise else kept


@pytree
class Reroute:
    """The first version's rule (2503.05066v1, code of March 2025; superseded): tokens choose again, several times.

    Each round: a token that holds fewer experts than the router gave it takes the best it has not been dropped from;
    then each overfull expert drops its lowest scores down to C, and who was dropped never comes back. So one round is
    Token Drop by score. Between two rounds an expert may hold more than C, after the last never. Slots that are still
    empty then stay empty. It costs a top-k and a sort each round, and its pairs go to any rank.

    Scores, and the weight of a pair that was added, are as in :class:`ExpandedDrop`.
    """

    factor: Float[Array, "..."]
    rounds: int = static(2)
    added_weight: AddedWeight = static("score")
    rounding: Rounding = option("floor")
    renormalise: bool = option(False)

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        require_token_choice(routing)
        experts, own = num_experts(routing), routing.expert.shape[1]
        costs = computing(routing)
        pairs_of_token = jnp.sum(costs, axis=1)
        room = capacity(of_layer(self.factor), jnp.sum(costs) / experts, self.rounding)
        expert = jnp.where(costs, routing.expert, experts)  # out of bounds: dropped by the scatters below
        token = jnp.arange(expert.shape[0])[:, None]
        made = jnp.zeros(routing.probs[:, :experts].shape, bool).at[token, expert].set(True, mode="drop")
        score = jax.lax.stop_gradient(routing.probs[:, :experts].at[token, expert].set(routing.score, mode="drop"))
        score = jnp.where(jnp.isnan(score), jnp.inf, score)  # the best: a drop must not hide a broken router
        chosen = jnp.any(routing.expert[..., None] == jnp.arange(experts), axis=1)
        gone, held = chosen & ~made, made  # an earlier limit's drops do not come back either
        for i in range(self.rounds):
            if i:
                short = pairs_of_token - jnp.sum(held, axis=1)
                free = jnp.where(held | gone, -jnp.inf, score)
                rank = jnp.argsort(jnp.argsort(-free, axis=1, stable=True), axis=1, stable=True)
                held = held | ((rank < short[:, None]) & ~gone & ~held)
            column = jnp.where(held, -score, jnp.inf)
            rank = jnp.argsort(jnp.argsort(column, axis=0, stable=True), axis=0, stable=True)
            gone = gone | (held & (rank >= room))
            held = held & (rank < room)
        still = jnp.take_along_axis(held, jnp.minimum(routing.expert, experts - 1), axis=1)
        kept = dataclasses.replace(routing, valid=routing.valid & (still | ~costs))
        new, added = jax.lax.top_k(jnp.where(held & ~made, score, -jnp.inf), min(own, experts))
        kept = with_pairs(kept, added.astype(jnp.int32), new > -jnp.inf, self.added_weight, like=routing)
        return share_lost_weight(routing, kept) if self.renormalise else kept


def candidates(
    routing: Routing, ctx: RouteContext, floor: Float[Array, ""]
) -> tuple[Int[Array, "T e"], Bool[Array, "T e"]]:
    """The rank's own experts for each token, and which of them it had not been given and score above ``floor``."""
    local = hosted_experts(routing, ctx)
    probs = routing.probs[:, local]
    chosen = jnp.any(routing.expert[:, :, None] == local, axis=1)  # also where an earlier limit dropped the pair
    above = (probs > floor) | (floor <= 0)
    return jnp.broadcast_to(local, probs.shape), ~chosen & above & _real(routing, ctx)[:, None]


def with_pairs(
    routing: Routing,
    expert: Int[Array, "T e"],
    valid: Bool[Array, "T e"],
    added_weight: AddedWeight,
    like: Routing | None = None,
) -> Routing:
    """``routing`` with columns appended for these pairs; ``like``: whose pairs "like_own" looks at (None: these)."""
    score = jnp.take_along_axis(routing.probs, expert, axis=1)
    weight = score
    if added_weight == "like_own":
        own = routing if like is None else like
        weights, scores = (jnp.sum(jnp.where(own.valid, v, 0.0), axis=1) for v in (own.weight, own.score))
        weight = score * (weights / jnp.maximum(scores, 1e-20))[:, None]

    def joined(old: Array, new: Array) -> Array:
        return jnp.concatenate([old, new.astype(old.dtype)], axis=1)

    return dataclasses.replace(
        routing, expert=joined(routing.expert, expert), weight=joined(routing.weight, weight),
        score=joined(routing.score, score), valid=joined(routing.valid, valid),
        level=None if routing.level is None else joined(routing.level, jnp.zeros_like(expert)),
    )  # fmt: skip


def require_token_choice(routing: Routing) -> None:
    if routing.token is not None:
        raise ValueError("a limit that adds pairs needs token choice: the rows of expert choice are pairs, not tokens")


def _real(routing: Routing, ctx: RouteContext) -> Bool[Array, "T"]:
    return jnp.ones(routing.probs.shape[0], bool) if ctx.mask is None else jnp.asarray(ctx.mask)


def widened(flags: Bool[Array, "T K"], width: int) -> Bool[Array, "T K'"]:
    return jnp.pad(flags, ((0, 0), (0, width - flags.shape[1])))
