"""Plans: where every pair of a Routing goes, and the way back.

Letters: T tokens, R routing rows, K choices per row, P rows for the experts, E experts.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels_pallas.moe_ffn.plan import make_plan
from moejax.routing import computing
from moejax.types import DispatchPlan, Routing, SoftRouting


def local_plan(routing: Routing, num_tokens: int) -> DispatchPlan:
    """Sorts the valid pairs by expert, then by pair. Each gets a row, except those of zero-computation experts:
    ``P = R K``, overflow 0."""
    if isinstance(routing, SoftRouting):
        raise TypeError("the local dispatcher takes pairs, not a SoftRouting: use a dense mixture's einsum dispatcher")
    num_experts = routing.probs.shape[-1] - routing.zero_experts
    pairs, k = routing.expert.size, routing.expert.shape[1]
    plan = make_plan(routing.expert, routing.valid, num_experts)  # ids of zero-computation experts are beyond it
    held = jnp.arange(pairs, dtype=jnp.int32) < jnp.sum(plan.group_sizes)
    source = plan.pair_of_row // k if routing.token is None else routing.token[plan.pair_of_row // k]
    return DispatchPlan(
        token_of_row=jnp.where(held, source, num_tokens).astype(jnp.int32),
        row_of_pair=plan.row_of_pair,
        pair_of_row=jnp.where(held, plan.pair_of_row, pairs),
        group_sizes=plan.group_sizes,
        token=routing.token,
        overflow=jnp.int32(0),
    )


def dense_plan(routing: Routing, num_tokens: int) -> DispatchPlan:
    """Every expert computes every token: row ``e T + t``. Invalid pairs point out of bounds."""
    if isinstance(routing, SoftRouting):
        raise TypeError("the dense dispatcher takes pairs, not a SoftRouting")
    num_experts = routing.probs.shape[-1] - routing.zero_experts
    rows = num_experts * num_tokens
    token = jnp.arange(routing.expert.shape[0]) if routing.token is None else routing.token
    row_of_pair = jnp.where(computing(routing), routing.expert * num_tokens + token[:, None], rows)
    return DispatchPlan(
        token_of_row=jnp.arange(rows, dtype=jnp.int32) % num_tokens,
        row_of_pair=row_of_pair.astype(jnp.int32),
        pair_of_row=jnp.full(rows, routing.expert.size, jnp.int32),
        group_sizes=jnp.full(num_experts, num_tokens, jnp.int32),
        token=routing.token,
        overflow=jnp.int32(0),
    )


PLANS: dict[str, Callable[[Routing, int], DispatchPlan]] = {"local": local_plan, "dense": dense_plan}


def placed(place: Int[Array, "..."], value: Array, size: int, empty: int) -> Array:
    """``[size]`` with each value at its place, ``empty`` elsewhere; out of bounds is nowhere, no other place is there
    twice."""
    place, filled = place.reshape(-1), jnp.full_like(value, empty, shape=(size,))
    # All of them are told apart, those out of bounds too: a scatter that may not write twice needs no atomics.
    place = jnp.where(place < size, place, size + jnp.arange(place.shape[0]))
    return filled.at[place].set(value.reshape(-1), mode="drop", unique_indices=True)
