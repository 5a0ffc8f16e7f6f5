"""Dispatch and combine: from tokens to rows sorted by expert, and back.

A back end makes a :class:`~moejax.types.DispatchPlan` from a Routing; :func:`dispatch` and :func:`combine` execute it:

``local``
    One device. Pairs are sorted by expert (a single-key sort), tokens gathered into rows, the way back is the inverse
    permutation and an unrolled sum over k: deterministic, no scatter-add. Dropless: ``P = R K`` rows.
``dense``
    The slow, obvious reference: every expert computes every token, combine picks the pairs. Plain autodiff.

Dispatch and combine are transposes of one another, so each has a custom_vjp whose backward pass is the other's gather.

:func:`per_shard` is the only place of the project that enters ``jax.shard_map``.

Letters: T tokens, D model, R routing rows, K choices per row, P rows for the experts, E experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moejax import sharding
from moejax.routing import computing, count_by_expert
from moejax.sharding import TOKEN_AXES
from moejax.types import DispatchPlan, Routing, SoftRouting

# --- plans ----------------------------------------------------------------------------------------


def local_plan(routing: Routing, num_tokens: int) -> DispatchPlan:
    """Sorts the valid pairs by expert, then by pair. Each gets a row, except those of zero-computation experts:
    ``P = R K``, overflow 0."""
    if isinstance(routing, SoftRouting):
        raise TypeError("the local dispatcher takes pairs, not a SoftRouting: use a dense mixture's einsum dispatcher")
    num_experts = routing.probs.shape[-1] - routing.zero_experts
    rows, k = routing.expert.shape
    pairs = rows * k
    expert = jnp.where(computing(routing), routing.expert, num_experts).reshape(-1)
    pair = jnp.arange(pairs, dtype=jnp.int32)
    if (num_experts + 1) * pairs < 2**31:
        # One sort of one operand: expert and pair in one int32. Faster than a stable argsort of two.
        key = jnp.sort(expert.astype(jnp.int32) * pairs + pair)
        order = key % pairs
    else:
        _, order = jax.lax.sort((expert, pair), num_keys=1, is_stable=True)
    group_sizes = count_by_expert(expert, num_experts)
    held = pair < jnp.sum(group_sizes)
    source = order // k if routing.token is None else routing.token[order // k]
    row_of_pair = jnp.zeros_like(pair).at[order].set(jnp.where(held, pair, pairs), unique_indices=True)
    return DispatchPlan(
        token_of_row=jnp.where(held, source, num_tokens).astype(jnp.int32),
        row_of_pair=row_of_pair.reshape(rows, k),
        pair_of_row=jnp.where(held, order, pairs),
        group_sizes=group_sizes,
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


def unchanged(x: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"] | None:
    """What the zero-computation experts return (LongCat-Flash, 2509.01322, eq. 2): each token times the sum of its
    weights for them, in float32. None without such experts."""
    if not routing.zero_experts:
        return None
    weight = jnp.sum(jnp.where(routing.valid & ~computing(routing), routing.weight, 0.0), axis=1)
    if routing.token is not None:
        weight = jnp.zeros_like(weight, shape=x.shape[:1]).at[routing.token].add(weight)
    return weight[:, None] * x.astype(jnp.float32)


PLANS: dict[str, Callable[[Routing, int], DispatchPlan]] = {"local": local_plan, "dense": dense_plan}


# --- execution ------------------------------------------------------------------------------------


def dispatch(x: Float[Array, "T D"], plan: DispatchPlan, *, backend: str = "local") -> Float[Array, "P D"]:
    """Gathers each row's token; rows that hold no pair are zeros."""
    if backend == "dense" or plan.token is not None:
        return _take(x, plan.token_of_row)
    return _dispatch(x, plan.token_of_row, plan.row_of_pair)


def combine(
    ys: Float[Array, "P D"],
    weight: Float[Array, "R K"],
    plan: DispatchPlan,
    num_tokens: int,
    *,
    backend: str = "local",
) -> Float[Array, "T D"]:
    """``y[t] = sum over pairs of t of weight * ys[row]``, accumulated in float32, in the order of k.

    Rows that belong to no pair may hold anything, NaN included: they are never read.
    """
    if plan.token is not None:
        # Expert choice: how many pairs a token has is not known beforehand, so this is a sum by token.
        pairs = weight.astype(jnp.float32) * _take(ys, plan.row_of_pair[:, 0]).astype(jnp.float32)
        summed = jnp.zeros((num_tokens, ys.shape[1]), jnp.float32).at[plan.token].add(pairs)
        return summed.astype(ys.dtype)
    if backend == "dense":
        return _weighted_sum(ys, weight, plan.row_of_pair)
    return _combine(ys, weight, plan.token_of_row, plan.row_of_pair, plan.pair_of_row)


def _take(x: Array, index: Array) -> Array:
    """Rows of ``x``; zeros where the index is out of bounds."""
    return x.at[index].get(mode="fill", fill_value=0)


def _weighted_sum(ys: Array, weight: Array, row_of_pair: Array) -> Array:
    # Unrolled over K: no [T, K, D] temporary (see the measurements behind it in docs/architecture.md).
    total = jnp.zeros_like(ys, jnp.float32, shape=(weight.shape[0], ys.shape[1]))
    for k in range(weight.shape[1]):
        total = total + weight[:, k, None].astype(jnp.float32) * _take(ys, row_of_pair[:, k]).astype(jnp.float32)
    return total.astype(ys.dtype)


@jax.custom_vjp
def _dispatch(x: Float[Array, "T D"], token_of_row: Int[Array, "P"], row_of_pair: Int[Array, "T K"]) -> Array:
    return _take(x, token_of_row)


def _dispatch_fwd(x: Array, token_of_row: Array, row_of_pair: Array) -> tuple[Array, Array]:
    return _take(x, token_of_row), row_of_pair


def _dispatch_bwd(row_of_pair: Array, dxs: Array) -> tuple[Array, None, None]:
    ones = jnp.ones_like(dxs, jnp.float32, shape=row_of_pair.shape)
    return _weighted_sum(dxs, ones, row_of_pair), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(ys: Array, weight: Array, token_of_row: Array, row_of_pair: Array, pair_of_row: Array) -> Array:
    return _weighted_sum(ys, weight, row_of_pair)


def _combine_fwd(ys: Array, weight: Array, token_of_row: Array, row_of_pair: Array, pair_of_row: Array) -> tuple:
    return _weighted_sum(ys, weight, row_of_pair), (ys, weight, token_of_row, row_of_pair, pair_of_row)


def _combine_bwd(saved: tuple, dy: Array) -> tuple:
    ys, weight, token_of_row, row_of_pair, pair_of_row = saved
    weight_of_row = _take(weight.reshape(-1), pair_of_row).astype(jnp.float32)
    dys = (weight_of_row[:, None] * _take(dy, token_of_row).astype(jnp.float32)).astype(ys.dtype)
    dweight = [
        jnp.sum(_take(ys, row_of_pair[:, k]).astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)
        for k in range(weight.shape[1])
    ]
    return dys, jnp.stack(dweight, axis=1).astype(weight.dtype), None, None, None


_combine.defvjp(_combine_fwd, _combine_bwd)


# --- shards ---------------------------------------------------------------------------------------


def token_shards() -> int:
    """Devices over which tokens are spread in the mesh in force (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else sharding.token_shards(mesh)


def per_shard(fn: Callable[..., Any], sharded: tuple, replicated: Any) -> Any:
    """``fn(*sharded, replicated)`` on each device's own tokens; every output leaf gains a leading shard axis.

    ``sharded`` arguments have a leading axis that is split over ("data", "expert"); ``replicated`` (weights, limits,
    keys) is whole on each device and is cast to varying, so that custom_vjp sees one type and the transpose sums its
    gradients over devices. On one device it is a plain call.

    Outputs are what the device made, with a new leading axis of one entry per device: ``[B, S, D]`` results keep
    their batch axis by :func:`merge_shards`.
    """
    if token_shards() == 1:
        return jax.tree.map(lambda leaf: leaf[None], fn(*sharded, replicated))

    def on_shard(*args: Any) -> Any:
        *split, whole = args
        whole = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, TOKEN_AXES, to="varying"), whole)
        return jax.tree.map(lambda leaf: leaf[None], fn(*split, whole))

    spec = PartitionSpec(TOKEN_AXES)
    return jax.shard_map(
        on_shard,
        in_specs=(*([spec] * len(sharded)), PartitionSpec()),
        out_specs=spec,
        axis_names=set(TOKEN_AXES),
        check_vma=True,
    )(*sharded, replicated)


def shard_index() -> Array:
    """Index of this device among the token shards; 0 outside :func:`per_shard` or on one device."""
    if token_shards() == 1:
        return jnp.int32(0)
    return jax.lax.axis_index(TOKEN_AXES)


def merge_shards(stacked: Array) -> Array:
    """``[shards, b, ...]`` back to ``[B, ...]``."""
    return stacked.reshape(-1, *stacked.shape[2:])
