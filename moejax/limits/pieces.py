"""What limits share: ranks within an expert, capacities, requests, and what becomes of a dropped pair's weight.

Letters: T tokens, E experts, R routing rows, K choices per row, P = R K pairs, L MoE layers.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ConfigError
from moejax.routing import computing, count_by_expert
from moejax.types import VIRTUAL, RouteContext, Routing

DropOrder = Literal["score", "order", "reverse", "random"]
Rounding = Literal["floor", "ceil", "at_least_one"]
Scope = Literal["rank", "fair", "request"]

SLACK = 5e-7
"""Factor and mean are rounded to float32 (and XLA divides by a constant through its reciprocal): without the slack,
1.3 x 170 or (n/k) x (t k / n) lands just below its integer and one pair too many goes. Its price: a capacity of some
thousands that lies within 5e-7 of the next integer from below is taken for that one, so that one pair more stays."""


def option(default: Any, *, static: bool = True) -> Any:
    """A field of a limit that :func:`moejax.limits.describe` leaves out at its default."""
    return dataclasses.field(default=default, metadata={"static": static, "later": True})


# --- ranks ----------------------------------------------------------------------------------------


def ranked(
    groups: tuple[Array, ...], valid: Bool[Array, "R K"], priority: tuple[Array, ...], count: int | None = None
) -> tuple[Int[Array, "R K"], Int[Array, "R K"]]:
    """Rank of each valid pair among those that agree with it in all of ``groups``, and how many these are.

    Rank 0 has the highest priority; a later entry of ``priority`` parts what is equal in the earlier ones, and at last
    the earlier pair goes first. Invalid pairs are ranked among themselves.

    Args:
      count: where there is one entry of ``groups``, its numbers are below this; None: nothing is known of them. Groups
        that can be counted beforehand need no search for where they begin.
    """
    shape = valid.shape
    first_group = jnp.where(valid, groups[0], jnp.iinfo(jnp.int32).max if count is None else count)
    keys = [jnp.broadcast_to(k, shape).reshape(-1) for k in (first_group, *groups[1:], *map(_falling, priority))]
    pair = jnp.arange(valid.size, dtype=jnp.int32)
    order = _sorted_by(keys)
    back = jnp.zeros_like(pair).at[order]
    if count is not None and len(groups) == 1:
        sizes = count_by_expert(first_group.reshape(-1), count + 1)
        starts = jnp.cumsum(sizes) - sizes
        return back.set(pair, unique_indices=True).reshape(shape) - starts[first_group], sizes[first_group]
    new = pair == 0
    for key in keys[: len(groups)]:
        in_order = key[order]
        new = new | (in_order != jnp.roll(in_order, 1))
    start = jax.lax.cummax(jnp.where(new, pair, 0))
    end = jax.lax.cummin(jnp.where(jnp.roll(new, -1), pair + 1, valid.size), reverse=True)
    rank, size = (back.set(v, unique_indices=True).reshape(shape) for v in (pair - start, end - start))
    return rank, size


def spent(
    group: Int[Array, "R K"], valid: Bool[Array, "R K"], priority: tuple[Array, ...], cost: Int[Array, "R K"]
) -> Int[Array, "R K"]:
    """What the valid pairs of a group cost together, from the one with the highest priority to this one."""
    shape, cost = valid.shape, jnp.where(valid, cost, 0).reshape(-1)
    key = jnp.where(valid, group, jnp.iinfo(jnp.int32).max).reshape(-1)
    order = _sorted_by([key, *(jnp.broadcast_to(_falling(p), shape).reshape(-1) for p in priority)])
    pair, in_order, total = jnp.arange(valid.size), key[order], jnp.cumsum(cost[order])
    before = jax.lax.cummax(jnp.where((pair == 0) | (in_order != jnp.roll(in_order, 1)), total - cost[order], 0))
    return jnp.zeros_like(total).at[order].set(total - before, unique_indices=True).reshape(shape)


def _falling(priority: Array) -> Array:
    """A key that is sorted by the highest priority first. NaN is the highest: a limit must not hide a broken router."""
    if jnp.issubdtype(priority.dtype, jnp.floating):
        priority = jnp.where(jnp.isnan(priority), jnp.inf, priority)
    return -priority


def _sorted_by(keys: list[Array]) -> Int[Array, "P"]:
    """Positions in the order of the first key, then the second, ...; at last the earlier one goes first. One stable
    sort of (int32, position) for each key, the last key first: GPUs sort such pairs by radix, and more operands slowly.
    """
    order = jnp.arange(keys[0].shape[0], dtype=jnp.int32)
    for i, key in enumerate(reversed(keys)):
        key = _as_int32(key)
        _, order = jax.lax.sort((key if i == 0 else key[order], order), num_keys=1, is_stable=True)
    return order


def _as_int32(key: Array) -> Int[Array, "..."]:
    """In the same order: NaN last, both zeros equal."""
    if not jnp.issubdtype(key.dtype, jnp.floating):
        return key.astype(jnp.int32)
    key = jnp.where(key == 0, 0.0, jnp.where(jnp.isnan(key), jnp.nan, key)).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(key, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of two negative numbers the one with more in its bits is smaller


def rank_in_expert(routing: Routing, priority: Float[Array, "R K"]) -> Int[Array, "R K"]:
    """Rank of each valid pair among those of its expert: 0 has the highest priority, ties go to the earlier pair."""
    return ranked((routing.expert,), routing.valid, (priority,), routing.probs.shape[1])[0]


def keep_best(
    routing: Routing,
    group: Int[Array, "R K"],
    priority: tuple[Array, ...],
    room: Callable[[Array], Array],
    ctx: RouteContext,
    *,
    scope: Scope = "rank",
    counted: Bool[Array, "R K"] | None = None,
    protected: Bool[Array, "R K"] | None = None,
    cost: Int[Array, "R K"] | None = None,
) -> Routing:
    """Clears every pair that is not among the best of its group.

    Args:
      group: what shares one capacity: the pair's expert, or its expert's device.
      priority: as in :func:`ranked`.
      room: from the number of pairs that share the capacities to the capacity of one group.
      scope: "rank": all tokens at hand share. "fair": they do, and every request loses the same share of its pairs of a
        group, up to one pair. "request": each request has capacities of its own, from its own pairs.
      counted: the pairs that ``room`` is told of; None: all valid ones.
      protected: pairs that stay whatever the capacity. They take the first places; those beyond the capacity are
        counted in ``Routing.exceeded``.
      cost: what each pair takes of the capacity, in the scope "rank"; None: one, however much of it is computed.

    Pairs of zero-computation experts cost nothing: they are neither counted nor cleared.
    """
    costs = computing(routing)
    counted = costs if counted is None else costs & counted
    first = () if protected is None else (protected.astype(jnp.int32),)
    priority = tuple(jax.lax.stop_gradient(p) for p in priority)
    if scope == "request":
        request = request_of_row(routing, ctx)
        rank, _ = ranked((group, request[:, None]), costs, (*first, *priority))
        capacity = room(pairs_of_request(request, counted))[:, None]
    else:
        if scope == "fair":
            request = request_of_row(routing, ctx)[:, None]
            rank, size = ranked((group, request), costs, (*first, *priority))
            priority = (-(rank + 0.5) / size, *priority)
        if cost is None:
            rank, _ = ranked((group,), costs, (*first, *priority), routing.probs.shape[1])
        else:
            rank = spent(group, costs, (*first, *priority), cost) - 1
        capacity = room(jnp.sum(counted))
    within = rank < capacity
    stays = within if protected is None else within | protected
    kept = dataclasses.replace(routing, valid=routing.valid & (stays | ~costs))
    if protected is None:
        return kept
    beyond = jnp.sum(costs & protected & ~within, axis=1, dtype=jnp.float32)
    return dataclasses.replace(kept, exceeded=beyond if routing.exceeded is None else routing.exceeded + beyond)


def best_of_token(routing: Routing) -> Bool[Array, "R K"]:
    """The pair with the highest score of each token, among those that an expert must compute."""
    costs, score = computing(routing), jax.lax.stop_gradient(routing.score)
    if routing.token is None:  # a row is a token
        order = jnp.where(costs, _as_int32(-score), jnp.iinfo(jnp.int32).max)
        return costs & (jnp.arange(costs.shape[1]) == jnp.argmin(order, axis=1)[:, None])
    rank, _ = ranked((token_of_row(routing)[:, None],), costs, (score,))
    return costs & (rank == 0)


# --- capacities -----------------------------------------------------------------------------------


def over_ranks(counts: Array, ctx: RouteContext) -> Array:
    """The sum of what each rank of expert parallelism counted, real or virtual; on one rank the counts themselves."""
    if ctx.axis_name == VIRTUAL:
        return _over_virtual_ranks(counts)
    return counts if ctx.axis_name is None else jax.lax.psum(counts, ctx.axis_name)


@jax.custom_batching.custom_vmap
def _over_virtual_ranks(counts: Array) -> Array:
    """A psum over the innermost `jax.vmap`: JAX takes a named one for an axis of the mesh inside `shard_map`."""
    return counts


@_over_virtual_ranks.def_vmap
def _sum_of_ranks(ranks: int, batched: list[bool], counts: Array) -> tuple[Array, bool]:
    if not batched[0]:
        return counts * ranks, False
    return jnp.broadcast_to(jnp.sum(counts, axis=0, dtype=counts.dtype), counts.shape), True


def mean_load(routing: Routing, ctx: RouteContext) -> Float[Array, ""]:
    """``t k / n`` of the paper: pairs still valid over experts. Padding, pairs that an earlier limit dropped and
    zero-computation experts with their pairs do not count."""
    del ctx
    return jnp.sum(computing(routing)) / num_experts(routing)


def hosted_experts(routing: Routing, ctx: RouteContext) -> Int[Array, "e"]:
    """Ids of the experts that this rank hosts: all of them without expert parallelism.

    Raises:
      ConfigError: it hosts parts of experts only.
    """
    if ctx.local_experts is None:
        return jnp.arange(num_experts(routing), dtype=jnp.int32)
    if not ctx.local_experts.shape[0]:
        raise ConfigError(
            f"a limit asks which experts its rank hosts, and of the {num_experts(routing)} some lie in parts on "
            "several ranks (moe.parts): choose as many ranks as divide the experts, or a limit that does not ask"
        )
    return ctx.local_experts


def num_experts(routing: Routing) -> int:
    """Experts that compute."""
    return routing.probs.shape[-1] - routing.zero_experts


def capacity(factor: Array, mean: Array, rounding: Rounding) -> Array:
    """``factor * mean`` as a whole number of pairs: rounded down ("floor"), up ("ceil"), or down but not to 0 unless
    the factor is 0 ("at_least_one")."""
    if rounding == "ceil":
        return jnp.ceil(factor * mean * (1 - SLACK))
    floor = jnp.floor(factor * mean * (1 + SLACK))
    return jnp.where(factor > 0, jnp.maximum(floor, 1), 0) if rounding == "at_least_one" else floor


def of_layer(factor: Float[Array, "..."]) -> Float[Array, ""]:
    """The factor; raises ValueError where it still is one for each layer (:func:`moejax.limits.for_layer`)."""
    if jnp.ndim(factor):
        raise ValueError(f"a limit with {factor.shape[0]} factors, one for each layer: take limits.for_layer of it")
    return factor


# --- tokens and requests --------------------------------------------------------------------------


def token_of_row(routing: Routing) -> Int[Array, "R"]:
    rows = routing.expert.shape[0]
    return jnp.arange(rows, dtype=jnp.int32) if routing.token is None else routing.token


def request_of_row(routing: Routing, ctx: RouteContext) -> Int[Array, "R"]:
    """Number of each row's request, counted from 0: rows of one request have one number."""
    if ctx.request_ids is None:
        raise ValueError("a limit with scope='fair' or 'request' needs RouteContext(request_ids=...)")
    ids = ctx.request_ids if routing.token is None else ctx.request_ids[routing.token]
    row = jnp.arange(ids.shape[0], dtype=jnp.int32)
    in_order, order = jax.lax.sort((ids, row), num_keys=1, is_stable=True)
    number = jnp.cumsum((row > 0) & (in_order != jnp.roll(in_order, 1)), dtype=jnp.int32)
    return jnp.zeros_like(row).at[order].set(number, unique_indices=True)


def pairs_of_request(request: Int[Array, "R"], counted: Bool[Array, "R K"]) -> Int[Array, "R"]:
    """Counted pairs of each row's request."""
    of_row = jnp.sum(counted, axis=1, dtype=jnp.int32)
    return jnp.zeros_like(of_row).at[request].add(of_row)[request]


# --- halved pairs ---------------------------------------------------------------------------------

BLOCK = 64
"""Columns that the kernels' extents count in (``kernels_pallas.grouped_matmul.groups.EXTENT_BLOCK``)."""
ROUNDED = 256
"""Width from which on half an expert is rounded up to whole blocks. A block is too large a part of a narrower one: its
half is exact, by the form "split" where it is no whole block."""


def major_columns(expert_dim: int, major: int = 0) -> int:
    """Major neurons of an expert of width ``expert_dim``: ``major``, or for 0 half of it, rounded up to a multiple of
    64 where it has 256 or more."""
    if major:
        return major
    half = -(-expert_dim // 2)
    return -(-half // BLOCK) * BLOCK if expert_dim >= ROUNDED else half


def major_share(ctx: RouteContext, major: int) -> Fraction:
    """Work of a halved pair in units of a whole one."""
    return Fraction(major_columns(ctx.expert_dim, major), ctx.expert_dim) if ctx.expert_dim else Fraction(1, 2)


def countable(share: Fraction, pairs: int) -> Fraction:
    """The nearest share to this one in whose denominator so many pairs can be counted in int32."""
    return share.limit_denominator(max(np.iinfo(np.int32).max // max(pairs, 1), 1))


# --- weights --------------------------------------------------------------------------------------


def sum_of_token(routing: Routing, values: Float[Array, "R K"]) -> Float[Array, "R"]:
    """Sum of ``values`` over the valid pairs of each row's token."""
    of_row = jnp.sum(jnp.where(routing.valid, values, 0.0), axis=1)
    if routing.token is None:
        return of_row
    return jnp.zeros(routing.probs.shape[0], of_row.dtype).at[routing.token].add(of_row)[routing.token]


def share_lost_weight(before: Routing, after: Routing) -> Routing:
    """``after`` with each token's weights scaled to the sum that they had in ``before``: pairs that are left take over
    what the dropped ones had. Where none was dropped or added they stay as they are, bit for bit."""
    left = sum_of_token(after, after.weight)
    scale = jnp.where(left > 0, sum_of_token(before, before.weight) / jnp.where(left > 0, left, 1.0), 1.0)
    return dataclasses.replace(after, weight=after.weight * scale[:, None])
