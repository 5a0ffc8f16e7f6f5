"""Where the rows of each group lie, and what follows from it.

Rows are sorted by group: group g holds rows `start[g] <= row < end[g]`, the tail beyond the last group
belongs to none. With E experts and G groups, group g belongs to expert `g // (G // E)`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

ExtentAxis = Literal["n", "k"]
EXTENT_AXES: tuple[str, ...] = get_args(ExtentAxis)
EXTENT_BLOCK = 64
"""Extents count columns in blocks of this many: the depth that the Hopper kernels sum in one step. Half of F = 1408 is
whole blocks. Where a tile is wider, what lies beyond an extent is computed too and unspecified in a result of the kind
"n"; where it would be summed back ends mask it, or set it to zero."""


def to_int32(x: Any) -> Array:
    """Integers of any type as int32, what is beyond its range as its bound: the largest integer stays the largest.

    Arithmetic in a narrower type would wrap, and a cast of a wider one too. Numbers that are no integers stay as they
    are, for the checks of the arguments to refuse.
    """
    x = x if isinstance(x, np.ndarray) else jnp.asarray(x)  # jnp.asarray alone would wrap NumPy's int64
    if jnp.issubdtype(x.dtype, jnp.integer):
        given, wanted = jnp.iinfo(x.dtype), jnp.iinfo(jnp.int32)
        if given.max > wanted.max:
            x = x.clip(max=wanted.max)
        if given.min < wanted.min:
            x = x.clip(min=wanted.min)
        x = x.astype(jnp.int32)
    return jnp.asarray(x)


def _add(a: Array, b: Array) -> Array:
    """a + b of numbers from 0 on; what is beyond int32 is its bound."""
    return a + jnp.minimum(b, jnp.iinfo(jnp.int32).max - a)


def within(group_sizes: Int[Array, "G"], rows: int) -> Int[Array, "G"]:
    """Sizes whose sums do not wrap, and that mean the same groups once these are cut off at row `rows`."""
    sizes = jnp.minimum(group_sizes.astype(jnp.int32), rows)
    if sizes.shape[0] * rows <= jnp.iinfo(jnp.int32).max:
        return sizes
    end = jnp.minimum(lax.associative_scan(_add, jnp.maximum(sizes, 0)), rows)
    return end - jnp.concatenate([end[:1] * 0, end[:-1]])


def bounds(group_sizes: Int[Array, "G"], rows: int) -> tuple[Int[Array, "G"], Int[Array, "G"]]:
    """First row of each group and the row after its last; sizes that sum past `rows` are cut off there."""
    end = jnp.minimum(jnp.cumsum(within(group_sizes, rows)), rows)
    return jnp.concatenate([end[:1] * 0, end[:-1]]), end


def row_group(end: Int[Array, "G"], rows: int) -> Int[Array, "P"]:
    """The group of each row; G for the tail.

    A fused compare-and-sum: `jnp.searchsorted` fails inside `shard_map` with `check_vma` (an assertion of JAX 0.11.2).
    """
    return jnp.sum(end <= jnp.arange(rows, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)


def per_expert(group_sizes: Int[Array, "G"], experts: int) -> Int[Array, "E"]:
    """Rows of each expert: the sum over its groups, which are adjacent. No operation if each has one group.

    A sum beyond int32 is its bound, which is cut off at the last row as the sum would be.
    """
    if group_sizes.shape[0] == experts:
        return group_sizes
    parts = jnp.maximum(group_sizes.astype(jnp.int32), 0).reshape(experts, -1)
    return lax.reduce(parts, np.int32(0), _add, (1,))


def joined(
    group_sizes: Int[Array, "G"], extents: Int[Array, "G"], experts: int
) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """One group for each expert, with the largest extent of those of its groups that have rows; 0 without rows."""
    mine = jnp.where(group_sizes > 0, extents, 0).reshape(experts, -1)
    return per_expert(group_sizes, experts), jnp.max(mine, axis=1)


def round_extents(extents: Int[Array, "G"], columns: int) -> Int[Array, "G"]:
    """What extents mean: rounded up to a multiple of EXTENT_BLOCK, at least 0 and at most `columns`."""
    inside = jnp.clip(extents, 0, columns)  # first, as the largest integer may stand for "all"
    return jnp.minimum(-(-inside // EXTENT_BLOCK) * EXTENT_BLOCK, columns)


def row_extents(
    group_sizes: Int[Array, "G"], extents: Int[Array, "G"] | None, rows: int, columns: int
) -> Int[Array, "P 1"] | None:
    """The rounded extent of each row's group, 0 in the tail; None for None."""
    if extents is None:
        return None
    group = row_group(bounds(group_sizes, rows)[1], rows)
    rounded = round_extents(extents, columns)
    return rounded.at[group].get(mode="fill", fill_value=0, indices_are_sorted=True)[:, None]


def cut(x: Shaped[Array, "*batch F"], extents: Int[Array, "*batch 1"] | None) -> Shaped[Array, "*batch F"]:
    """x with the columns at and beyond each row's extent set to zero; selects, so that NaN there does not survive."""
    if extents is None:
        return x
    return jnp.where(jnp.arange(x.shape[-1], dtype=jnp.int32) < extents, x, jnp.zeros((), x.dtype))


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
    return vary(jnp.zeros(shape, dtype), *like)


def vary(x: Array, *like: Array | None) -> Array:
    """x, varying over every manual mesh axis over which one of `like` varies: kernels and loops mix no types."""
    axes = frozenset[str]().union(*(jax.typeof(a).manual_axis_type.varying for a in like if a is not None))
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def alike[T](operands: T) -> T:
    """The arrays, all varying over the manual mesh axes over which any of them does, as one kernel's operands must.

    Outside of a `custom_vjp` it makes the gradient of an array that several shards share the sum over them: what comes
    back for the operand of a `custom_vjp` must vary over the axes over which it does, no others.
    """
    return jax.tree.map(lambda a: vary(a, *jax.tree.leaves(operands)), operands)


def automatic[**P](call: Callable[P, Array]) -> Callable[P, Array]:
    """`call` for arrays whose types say how they are split (`AxisType.Explicit`), which loops and kernels cannot.

    Within, XLA decides who computes what. The rows of the result are split as those of the first argument, its columns
    are not; a gradient is split as what it is of. Inside `shard_map` `call` is what it was: of axes that stay Explicit
    there JAX 0.11.2 cannot keep for the backward what was computed within.
    """
    inner: Callable[..., Array] = call
    signature = inspect.signature(call)

    @functools.wraps(call)
    def run(*args: P.args, **options: P.kwargs) -> Array:
        given = [a for a in (*args, *options.values()) if isinstance(a, jax.Array)]
        meshes = [jax.typeof(a).sharding.mesh for a in given] + [jax.sharding.get_abstract_mesh()]
        mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if mesh is None or mesh.manual_axes:
            return call(*args, **options)
        named = signature.bind(*args, **options).arguments
        arrays = {name: a for name, a in named.items() if isinstance(a, jax.Array)}
        rest = {name: a for name, a in named.items() if name not in arrays}
        rows = arrays.get(next(iter(named)))
        split = jax.NamedSharding(mesh, jax.P() if rows is None else jax.P(*jax.typeof(rows).sharding.spec[:1]))

        @jax.sharding.auto_axes(axes=mesh.explicit_axes, out_sharding=split)
        def within(arrays: dict[str, Array]) -> Array:
            return inner(**arrays, **rest)

        return within(arrays)

    return run
