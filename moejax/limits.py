"""Limits: pure transforms ``(Routing, RouteContext) -> Routing`` that decide which pairs survive.

A limit is a frozen dataclass registered as a pytree: its numbers are arrays, so that sweeping a capacity factor does
not recompile, and it can be passed through ``jit`` like any value. A limit clears ``valid``; it never removes an entry.

Letters: T tokens, E experts, R routing rows, K choices per row, P = R K pairs.
"""

import dataclasses
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import ConfigError
from moejax.routing import computing, count_by_expert
from moejax.types import RouteContext, Routing, pytree, static

DropOrder = Literal["score", "order", "reverse", "random"]


def rank_in_expert(routing: Routing, priority: Float[Array, "R K"]) -> Int[Array, "R K"]:
    """Rank of each pair among the valid pairs of its expert: 0 has the highest priority, ties go to the earlier pair.

    Invalid pairs rank behind all valid ones.
    """
    num_experts = routing.probs.shape[-1]
    expert = jnp.where(routing.valid, routing.expert, num_experts).reshape(-1)
    pair = jnp.arange(expert.size, dtype=jnp.int32)
    # Sorted by expert, then priority, then pair; rank = place in the sorted list - start of the expert's run.
    sorted_expert, _, order = jax.lax.sort((expert, -priority.reshape(-1), pair), num_keys=2, is_stable=True)
    start = jnp.append(
        0, jnp.cumsum(count_by_expert(expert, num_experts))
    )  # of each expert's run, and of the invalid pairs' run
    rank = pair - start[sorted_expert]
    return jnp.zeros_like(pair).at[order].set(rank, unique_indices=True).reshape(routing.expert.shape)


def mean_load(routing: Routing, ctx: RouteContext) -> Float[Array, ""]:
    """``t k / n`` of the paper: pairs still valid over experts. Padding, pairs that an earlier limit dropped and
    zero-computation experts with their pairs do not count."""
    return jnp.sum(computing(routing)) / (routing.probs.shape[-1] - routing.zero_experts)


@pytree
class TokenDrop:
    """Token Drop of Capacity-Aware Inference (2503.05066, eq. 5 and Algorithm 1).

    Each expert keeps the ``C = floor(factor * t k / n)`` valid pairs of its column that rank highest and the others are
    dropped: their weight is not given to anyone (the paper does not renormalise), and a token without pairs passes
    through the residual and the shared experts only. ``t`` counts real tokens of the rows in hand, so on several ranks
    each applies it to its own tokens and no synchronisation is needed.

    Orders: "score" keeps the highest scores; "order" the earliest tokens (Switch); "reverse" the latest; "random" a
    uniform choice (needs ``ctx.key``). A factor of n/k or more drops nothing.
    """

    factor: Float[Array, ""]
    """Capacity factor gamma: a multiple of the mean load. A run-time value."""
    order: DropOrder = static("score")

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        shape = routing.expert.shape
        token = jnp.arange(shape[0]) if routing.token is None else routing.token
        position = jnp.broadcast_to(token.astype(jnp.float32)[:, None], shape)
        if self.order == "score":
            priority = routing.score
        elif self.order == "order":
            priority = -position
        elif self.order == "reverse":
            priority = position
        else:
            if ctx.key is None:
                raise ValueError("TokenDrop(order='random') needs RouteContext(key=...)")
            priority = jax.random.uniform(jax.random.fold_in(ctx.key, 77), shape)
        # Factor and mean are rounded to float32 (and XLA divides by a constant through its reciprocal): without the
        # slack, 1.3 x 170 or (n/k) x (t k / n) lands just below its integer and one pair too many goes.
        capacity = jnp.floor(self.factor * mean_load(routing, ctx) * (1 + 5e-7))
        keep = rank_in_expert(routing, jax.lax.stop_gradient(priority)) < capacity
        return _keep(routing, keep)


def _keep(routing: Routing, keep: Array) -> Routing:
    return dataclasses.replace(routing, valid=routing.valid & keep)


def token_drop(factor: float, order: str = "score") -> TokenDrop:
    """A :class:`TokenDrop` from plain values.

    Raises:
      ConfigError: an unknown order or a negative factor.
    """
    if order not in get_args(DropOrder):
        raise ConfigError(f"order={order!r}: choose one of {', '.join(get_args(DropOrder))}")
    if not factor >= 0:
        raise ConfigError(f"factor={factor}: a capacity factor is a multiple of the mean load, 0 or more")
    return TokenDrop(factor=jnp.float32(factor), order=cast(DropOrder, order))


def apply(limits: tuple, routing: Routing, ctx: RouteContext) -> Routing:
    """Applies limits from first to last. Pairs of zero-computation experts cost nothing: none of them is dropped."""
    free = routing.valid & ~computing(routing)
    for limit in limits:
        routing = limit(routing, ctx)
    if not limits or not routing.zero_experts:
        return routing
    width = free.shape[1]  # a limit may have appended columns
    return dataclasses.replace(routing, valid=routing.valid.at[:, :width].set(routing.valid[:, :width] | free))
