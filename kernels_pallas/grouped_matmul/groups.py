"""Where the rows of each group lie, and what follows from it.

Rows are sorted by group: group e holds rows `start[e] <= row < end[e]`, the tail beyond the last group
belongs to none.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped


def bounds(group_sizes: Int[Array, "E"], rows: int) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """First row of each group and the row after its last; sizes that sum past `rows` are cut off there."""
    end = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    return jnp.concatenate([end[:1] * 0, end[:-1]]), end


def row_group(end: Int[Array, "E"], rows: int) -> Int[Array, "P"]:
    """The group of each row; E for the tail."""
    return jnp.searchsorted(end, jnp.arange(rows, dtype=jnp.int32), side="right").astype(jnp.int32)


def zero_tail(x: Shaped[Array, "P N"], end: Int[Array, "E"]) -> Shaped[Array, "P N"]:
    """x with the rows beyond the last group set to zero; selects, so that NaN there does not survive."""
    inside = jnp.arange(x.shape[0], dtype=jnp.int32) < end[-1]
    return jnp.where(inside[:, None], x, jnp.zeros((), x.dtype))


def add_bias(
    x: Float[Array, "P N"], bias: Float[Array, "E N"] | None, group_sizes: Int[Array, "E"]
) -> Float[Array, "P N"]:
    """x + bias[group of the row]; the tail gets none, its cotangent stays out of the gradient of the bias.

    Taken in float32 so that the gradient, a sum over a group's rows, is too.
    """
    if bias is None:
        return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    group = row_group(bounds(group_sizes, x.shape[0])[1], x.shape[0])
    rows = bias.astype(wide).at[group].get(mode="fill", fill_value=0, indices_are_sorted=True)
    return (x.astype(wide) + rows).astype(x.dtype)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, *like: Array | None) -> Array:
    """Zeros that vary over every manual mesh axis over which one of `like` varies, as a loop's carry must."""
    z = jnp.zeros(shape, dtype)
    axes = frozenset[str]().union(*(jax.typeof(a).manual_axis_type.varying for a in like if a is not None))
    return lax.pcast(z, tuple(sorted(axes)), to="varying") if axes else z
