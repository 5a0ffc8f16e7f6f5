"""The public functions: checks of the arguments, then the choice of a back end.

| name | what | order |
|---|---|---|
| `mosaic_gpu` | Pallas kernels for Hopper: rows by TMA through shared memory | first on GPU |
| `ref` | XLA's gather, on any platform | last |

Letters: N rows to choose from, R rows chosen, D columns, T tokens, K rows of each.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Backend, Implementation, Operation
from kernels_pallas.gather_rows import mosaic_gpu, mosaic_gpu_combine, mosaic_gpu_scatter, ref
from kernels_pallas.grouped_matmul.groups import to_int32

_ORDER = {"gpu": ("mosaic_gpu", "ref"), "*": ("ref",)}

GATHER_ROWS = Operation(
    "gather_rows",
    {
        "mosaic_gpu": Backend("mosaic_gpu", mosaic_gpu_scatter.gather_rows, mosaic_gpu.refuse),
        "ref": Backend("ref", ref.gather_rows),
    },
    _ORDER,
)

COMBINE_ROWS = Operation(
    "combine_rows",
    {
        "mosaic_gpu": Backend("mosaic_gpu", mosaic_gpu_combine.combine_rows, mosaic_gpu_combine.refuse),
        "ref": Backend("ref", ref.combine_rows),
    },
    _ORDER,
)


def gather_rows(
    x: Float[Array, "N D"],
    index: Int[Array, "R"],
    count: Int[Array, ""] | None = None,
    places: Int[Array, "N K"] | None = None,
    *,
    implementation: Implementation = None,
) -> Float[Array, "R D"]:
    """out[r] = x[index[r]], bit by bit; zeros where the index is out of bounds. As in NumPy, -1 is the last row.

    Differentiable in x: the gradient is a scatter-add, in float32 and rounded once. Where the inverse of the index is
    known, a `custom_vjp` that gathers by it is faster.

    Args:
        x: rows to choose from.
        index: integers of any type, on the device; other values never recompile.
        count: how many leading rows of the result are asked for, on the device: the others may hold anything, and need
            not be copied. None: all.
        places: the inverse of the index, on the device: the rows of the result that are row n of x, each of the
            leading `count` once in all, and numbers out of bounds. A kernel may then read each row of x once. Which
            of the two it goes by is not said, so they must tell the same.
        implementation: None (the platform's order), a back end's name, or names to try in order.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation.
        BackendRefused: no allowed back end can run; a back end chosen by name is never replaced by another.
    """
    x, index = jnp.asarray(x), to_int32(index)  # numpy's too
    count, places = (None if a is None else to_int32(a) for a in (count, places))
    if x.ndim != 2 or index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"x.shape={x.shape} must be [N, D], and index, of shape {index.shape} and dtype {index.dtype}, "
            "must be [R] integers: flatten the others beforehand"
        )
    if count is not None and (count.ndim != 0 or not jnp.issubdtype(count.dtype, jnp.integer)):
        raise ValueError(f"count of shape {count.shape} and dtype {count.dtype} must be one integer, or None")
    if places is not None and (places.ndim != 2 or places.shape[0] != x.shape[0] or count is None):
        raise ValueError(f"places of shape {places.shape} must be [N, K] for x.shape={x.shape}, and need a count")
    return GATHER_ROWS.select(implementation, x, index).run(x, index, count, places)


def combine_rows(
    ys: Float[Array, "N D"],
    row_of_pair: Int[Array, "T K"],
    weight: Float[Array, "T K"],
    *,
    implementation: Implementation = None,
) -> Float[Array, "T D"]:
    """out[t] = sum over k of weight[t, k] * ys[row_of_pair[t, k]], in float32 and in the order of k.

    A row out of bounds counts as zeros, so that its weight must be finite; rows that nobody names may hold anything.
    Differentiable in ys and weight (reverse mode), by scatter-adds in float32, rounded once. Where the inverse of the
    table is known, a `custom_vjp` that gathers by it is faster.

    Args:
        ys: rows to sum.
        row_of_pair: integers of any type, on the device; -1 is the last row, as in NumPy.
        weight: gate weights, of any floating-point type.
        implementation: None (the platform's order), a back end's name, or names to try in order.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation.
        BackendRefused: no allowed back end can run; a back end chosen by name is never replaced by another.
    """
    ys, row_of_pair, weight = jnp.asarray(ys), to_int32(row_of_pair), jnp.asarray(weight)  # numpy's too
    integers = jnp.issubdtype(row_of_pair.dtype, jnp.integer)
    if ys.ndim != 2 or row_of_pair.ndim != 2 or weight.shape != row_of_pair.shape or not integers:
        raise ValueError(
            f"ys.shape={ys.shape} must be [N, D], and row_of_pair, of shape {row_of_pair.shape} and dtype "
            f"{row_of_pair.dtype}, [T, K] integers, as weight.shape={weight.shape}"
        )
    args = ys, row_of_pair, weight
    return COMBINE_ROWS.select(implementation, *args).run(*args)
