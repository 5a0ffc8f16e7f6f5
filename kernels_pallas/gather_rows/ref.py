"""Back end `ref`: XLA's gather. It may be fused into what reads it, and it is the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.ffn import accumulator


@jax.custom_jvp
def _gather(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


@_gather.defjvp
def _gather_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # As wide as a sum must be, for the transpose: it adds up the cotangents of a row that is in the result many times.
    wide = tangents[0].astype(accumulator(primals[0].dtype))
    return _gather(*primals), _gather(wide, primals[1]).astype(primals[0].dtype)


def gather_rows(
    x: Float[Array, "N D"],
    index: Int[Array, "R"],
    count: Int[Array, ""] | None = None,
    places: Int[Array, "N K"] | None = None,
) -> Float[Array, "R D"]:
    """See `api.gather_rows`. All rows are copied, whatever `count` is."""
    del count, places
    if x.shape[0] == 0:  # XLA has no gather from nothing
        return groups.zeros((index.shape[0], x.shape[1]), x.dtype, x, index)
    return _gather(x, index)


def combine_rows(
    ys: Float[Array, "R D"], row_of_pair: Int[Array, "T K"], weight: Float[Array, "T K"]
) -> Float[Array, "T D"]:
    """See `api.combine_rows`."""
    return _combine(ys, weight, row_of_pair)


def _sum(ys: Array, weight: Array, row_of_pair: Array) -> Float[Array, "T D"]:
    # Unrolled over K: no [T, K, D] temporary (see the measurements behind it in docs/architecture.md).
    total = jnp.zeros_like(ys, jnp.float32, shape=(weight.shape[0], ys.shape[1]))
    for k in range(weight.shape[1]):
        rows = gather_rows(ys, row_of_pair[:, k]).astype(jnp.float32)
        total = total + weight[:, k, None].astype(jnp.float32) * rows
    return total


@jax.custom_jvp
def _combine(ys: Array, weight: Array, row_of_pair: Array) -> Array:
    return _sum(ys, weight, row_of_pair).astype(ys.dtype)


@_combine.defjvp
def _combine_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    # As in _gather_jvp: the transpose adds up the K parts of a row's cotangent before it is rounded.
    (ys, weight, row_of_pair), (dys, dweight, _) = primals, tangents
    wide = dys.astype(accumulator(ys.dtype))
    total = _sum(wide, weight, row_of_pair)
    if dweight.dtype != jax.dtypes.float0:  # of integers
        total = total + _sum(ys, dweight, row_of_pair)
    return _combine(*primals), total.astype(ys.dtype)
