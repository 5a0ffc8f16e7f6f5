"""Dispatch and combine: tokens to the rows of a plan, and rows back to tokens.

They are transposes of one another, so each has a custom_vjp whose backward pass is the other's gather.

Letters: T tokens, D model, R routing rows, K choices per row, P rows for the experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation
from kernels_pallas.gather_rows import combine_rows, gather_rows
from moejax.dispatch import wide
from moejax.routing import computing
from moejax.types import DispatchPlan, Routing

GATHER: Implementation = None
"""Who copies rows: None is the platform's best (a kernel on Hopper, for shapes that it takes), "ref" is XLA."""
COMBINE: Implementation = "ref"
"""Who sums a token's rows, in the same way. The kernel was faster in its benchmark, and has not trained a model yet."""


def dispatch(
    x: Float[Array, "T D"],
    plan: DispatchPlan,
    *,
    backend: str = "local",
    to_experts: bool = False,
    from_tokens: bool = False,
) -> Float[Array, "P D"]:
    """Gathers each row's token; rows that hold no pair are zeros.

    Args:
        x: tokens.
        plan: their rows.
        backend: a local dispatcher's.
        to_experts: groups follow one another, and rows past them, which no expert computes, may hold anything.
        from_tokens: ``x`` is no exchange's buffer, so that nearly all of it has rows. It then costs less to read each
            token once than once for each of its experts.
    """
    if backend == "dense" or plan.token is not None:
        return take(x, plan.token_of_row)
    count = jnp.sum(plan.group_sizes) if to_experts else None
    places = plan.row_of_pair if to_experts and from_tokens else None
    return _dispatch(x, plan.token_of_row, plan.row_of_pair, count, places)


def weighted_rows(
    xs: Float[Array, "P D"], weight: Float[Array, "R K"], plan: DispatchPlan, *, backend: str = "local"
) -> Float[Array, "P D"]:
    """Each row times the gate weight of its pair (Llama 4 weighs what goes into an expert). Rows that hold none are 0
    times what they hold, which may be anything."""
    weight = weight.astype(jnp.float32)
    if backend == "dense":  # row e T + t, whether or not t chose e: combine reads the pairs' rows only
        of_row = jnp.zeros(xs.shape[0]).at[plan.row_of_pair.reshape(-1)].set(weight.reshape(-1), mode="drop")
    else:
        of_row = _read(weight.reshape(-1), plan.pair_of_row)
    return (of_row[:, None] * xs.astype(jnp.float32)).astype(xs.dtype)


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
        pairs = weight.astype(jnp.float32) * _read(ys, plan.row_of_pair[:, 0]).astype(jnp.float32)
        summed = jnp.zeros((num_tokens, ys.shape[1]), jnp.float32).at[plan.token].add(pairs)
        return summed.astype(ys.dtype)
    if backend == "dense":
        return _weighted_sum(ys, weight, plan.row_of_pair)
    return _combine(ys, weight, plan.token_of_row, plan.row_of_pair, plan.pair_of_row)


def summed(ys: Float[Array, "P D"], plan: DispatchPlan) -> Float[Array, "T D"]:
    """:func:`combine` with weights of 1, whose gradient needs none of ``ys``; a row of ``plan`` is a token."""
    return _summed(ys, plan.token_of_row, plan.row_of_pair)


def take(x: Array, index: Array, count: Array | None = None, places: Array | None = None) -> Array:
    """Rows of ``x``, written out; zeros where the index is out of bounds. From row ``count`` on they may hold
    anything. ``places``: the index's inverse (:func:`kernels_pallas.gather_rows.gather_rows`)."""
    if x.ndim == 2 and index.ndim == 1:
        return gather_rows(x, index, count, places, implementation=GATHER)
    return _read(x, index)


def _read(x: Array, index: Array) -> Array:
    # As `take`, for what reads the rows in the same pass: XLA fuses its own gather, and no kernel.
    return x.at[index].get(mode="fill", fill_value=0)


def _weighted_sum(ys: Array, weight: Array, row_of_pair: Array) -> Array:
    if wide.pays(ys.shape[0], *row_of_pair.shape):
        return wide.wide_sum(ys, weight, row_of_pair)
    return combine_rows(ys, row_of_pair, weight, implementation=COMBINE)


@jax.custom_vjp
def _dispatch(
    x: Float[Array, "T D"],
    token_of_row: Int[Array, "P"],
    row_of_pair: Int[Array, "T K"],
    count: Array | None,
    places: Int[Array, "T K"] | None,
) -> Array:
    return take(x, token_of_row, count, places)


def _dispatch_fwd(
    x: Array, token_of_row: Array, row_of_pair: Array, count: Array | None, places: Array | None
) -> tuple[Array, Array]:
    return take(x, token_of_row, count, places), row_of_pair


def _dispatch_bwd(row_of_pair: Array, dxs: Array) -> tuple[Array, None, None, None, None]:
    return _sum(dxs, row_of_pair), None, None, None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


def _sum(ys: Array, row_of_pair: Array) -> Array:
    return _weighted_sum(ys, jnp.ones_like(ys, jnp.float32, shape=row_of_pair.shape), row_of_pair)


@jax.custom_vjp
def _summed(ys: Float[Array, "P D"], token_of_row: Int[Array, "P"], row_of_pair: Int[Array, "T K"]) -> Array:
    return _sum(ys, row_of_pair)


_summed.defvjp(
    lambda ys, token_of_row, row_of_pair: (_sum(ys, row_of_pair), token_of_row),
    lambda token_of_row, dy: (take(dy, token_of_row), None, None),
)


@jax.custom_vjp
def _combine(ys: Array, weight: Array, token_of_row: Array, row_of_pair: Array, pair_of_row: Array) -> Array:
    # Pairs without a row weigh nothing, as their rows are zeros. Said here too, it lets XLA for GPU make the columns of
    # weights and of bounds in one kernel; it makes slices that nothing is computed of in a kernel for each of the K.
    held = (row_of_pair >= 0) & (row_of_pair < ys.shape[0])
    return _weighted_sum(ys, jnp.where(held, weight, 0), row_of_pair)


def _combine_fwd(ys: Array, weight: Array, token_of_row: Array, row_of_pair: Array, pair_of_row: Array) -> tuple:
    saved = ys, weight, token_of_row, row_of_pair, pair_of_row
    return _combine(*saved), saved


def _combine_bwd(saved: tuple, dy: Array) -> tuple:
    ys, weight, token_of_row, row_of_pair, pair_of_row = saved
    weight_of_row = _read(weight.reshape(-1), pair_of_row).astype(jnp.float32)
    dy_of_row = _read(dy, token_of_row).astype(jnp.float32)
    dys = (weight_of_row[:, None] * dy_of_row).astype(ys.dtype)
    if weight.shape[1] > wide.NARROW:  # a product for each row, not for each column: few programs, and P instead of T K
        dweight = _read(jnp.sum(ys.astype(jnp.float32) * dy_of_row, axis=-1), row_of_pair)
    else:
        columns = [
            jnp.sum(_read(ys, row_of_pair[:, k]).astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)
            for k in range(weight.shape[1])
        ]
        dweight = jnp.stack(columns, axis=1)
    return dys, dweight.astype(weight.dtype), None, None, None


_combine.defvjp(_combine_fwd, _combine_bwd)


def unchanged(x: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"] | None:
    """What the zero-computation experts return (LongCat-Flash, 2509.01322, eq. 2): each token times the sum of its
    weights for them, in float32. None without such experts."""
    if not routing.zero_experts:
        return None
    weight = jnp.sum(jnp.where(routing.valid & ~computing(routing), routing.weight, 0.0), axis=1)
    if routing.token is not None:
        weight = jnp.zeros_like(weight, shape=x.shape[:1]).at[routing.token].add(weight)
    return weight[:, None] * x.astype(jnp.float32)
