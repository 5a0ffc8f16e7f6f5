"""Back end `cpu_tiled`: for each expert, its rows in tiles, by a loop that follows the group's size.

No row is copied to another place; an expert runs on its own rows, rounded up to a tile. Groups are visited in
ascending order and a tile is written whole: what its last part spills over the following group's rows is
overwritten by that group's own tiles. A tile that would pass the end of the array moves back, and keeps what
earlier tiles wrote.

Temporaries beside inputs and outputs: a few tiles, one expert's gradients, and for the FFN the saved
pre-activations. Correct on every platform, but a loop of small matmuls is slow on accelerators. `jax.vmap` runs
the batch one by one.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import ffn, groups
from kernels_pallas.grouped_matmul.ffn import Activation, Hidden, Rows, Weights, accumulator, einsum
from kernels_pallas.grouped_matmul.vjp import by_cutting, differentiable

MIN_TILE, MAX_TILE = 8, 256


def tile_rows(rows: int, experts: int) -> int:
    """Rows in a tile: the power of two from half the mean group on, in [8, 256], at most `rows`.

    Small tiles waste less at a group's end (half a tile on average), large ones share a matmul's fixed cost and
    the addition to the gradients of the weights, which is as large for every tile.
    """
    half = -(-rows // (2 * experts))
    return min(rows, max(MIN_TILE, min(MAX_TILE, 1 << (half - 1).bit_length())))


def _loop(start: Array, end: Array, tile: int, rows: int, body: Callable, init):
    """Folds `body(at, fresh, mine, carry)` over one group's tiles.

    `at` is the first row to slice, `fresh [R, 1]` marks rows not covered by an earlier tile (all, unless the slice had
    to move back from the end of the array), `mine [R, 1]` those of them that belong to the group.
    """

    def step(i: Array, carry):
        first = start + i * tile
        at = jnp.minimum(first, rows - tile)
        row = at + jnp.arange(tile, dtype=jnp.int32)
        fresh = row >= first
        return body(at, fresh[:, None], (fresh & (row < end))[:, None], carry)

    return lax.fori_loop(0, (end - start + tile - 1) // tile, step, init)


def _read(x: Array, at: Array, tile: int, keep: Array | None = None) -> Array:
    rows = lax.dynamic_slice_in_dim(x, at, tile)
    return rows if keep is None else jnp.where(keep, rows, jnp.zeros((), x.dtype))


def _write(out: Array, rows: Array, at: Array, fresh: Array) -> Array:
    old = lax.dynamic_slice_in_dim(out, at, rows.shape[0])
    return lax.dynamic_update_slice_in_dim(out, jnp.where(fresh, rows.astype(out.dtype), old), at, 0)


def _product(lhs: Array, rhs: Array, group_sizes: Array, transpose_rhs: bool, dtype: jnp.dtype) -> Array:
    @sequential_vmap
    def run(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
        rows, tile = lhs.shape[0], tile_rows(lhs.shape[0], rhs.shape[0])
        spec = "pk,nk->pn" if transpose_rhs else "pk,kn->pn"

        def expert(out: Array, args: tuple[Array, Array, Array]) -> tuple[Array, None]:
            w, start, end = args

            def body(at: Array, fresh: Array, mine: Array, out: Array) -> Array:
                return _write(out, einsum(spec, _read(lhs, at, tile), w), at, fresh)

            return _loop(start, end, tile, rows, body, out), None

        out = groups.zeros((rows, rhs.shape[1 if transpose_rhs else 2]), dtype, lhs, rhs, group_sizes)
        return lax.scan(expert, out, (rhs, *groups.bounds(group_sizes, rows)))[0]

    return run(lhs, rhs, group_sizes)


def _outer(lhs: Array, grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    @sequential_vmap
    def run(lhs: Array, grad: Array, group_sizes: Array) -> Array:
        rows, tile = lhs.shape[0], tile_rows(lhs.shape[0], group_sizes.shape[0])

        def expert(_: None, args: tuple[Array, Array]) -> tuple[None, Array]:
            def body(at: Array, fresh: Array, mine: Array, dw: Array) -> Array:
                return dw + einsum("pk,pn->kn", _read(lhs, at, tile, mine), _read(grad, at, tile, mine))

            init = groups.zeros((lhs.shape[1], grad.shape[1]), accumulator(lhs.dtype), lhs, grad, group_sizes)
            return None, _loop(*args, tile, rows, body, init).astype(dtype)

        return lax.scan(expert, None, groups.bounds(group_sizes, rows))[1]

    return run(lhs, grad, group_sizes)


grouped_matmul = differentiable(*by_cutting(_product, _outer))


def _ffn_forward(
    activation: Activation, xs: Array, group_sizes: Array, weights: Weights, values: Rows
) -> tuple[Array, Hidden]:
    @sequential_vmap
    def run(xs: Array, group_sizes: Array, weights: Weights, values: Rows) -> tuple[Array, Hidden]:
        rows, tile = xs.shape[0], tile_rows(xs.shape[0], weights.up.shape[0])

        def expert(out: tuple[Array, Hidden], args: tuple[Weights, Array, Array]) -> tuple:
            w, start, end = args

            def body(at: Array, fresh: Array, mine: Array, out: tuple[Array, Hidden]) -> tuple[Array, Hidden]:
                x, v = jax.tree.map(lambda a: _read(a, at, tile), (xs, values))
                new = ffn.forward(activation, x, w, v)
                return jax.tree.map(lambda whole, part: _write(whole, part, at, fresh), out, new)

            return _loop(start, end, tile, rows, body, out), None

        def zeros(columns: int) -> Array:
            return groups.zeros((rows, columns), xs.dtype, xs, weights.up, group_sizes, *values)

        hidden = weights.up.shape[2]
        saved = Hidden(None if weights.gate is None else zeros(hidden), zeros(hidden))
        out = (zeros(xs.shape[1]), saved)
        return lax.scan(expert, out, (weights, *groups.bounds(group_sizes, rows)))[0]

    return run(xs, group_sizes, weights, values)


def _ffn_backward(
    activation: Activation, xs: Array, group_sizes: Array, weights: Weights, values: Rows, hidden: Hidden, dy: Array
) -> tuple[Array, Array | None, Weights]:
    @sequential_vmap
    def run(xs: Array, group_sizes: Array, weights: Weights, values: Rows, hidden: Hidden, dy: Array) -> tuple:
        rows, tile = xs.shape[0], tile_rows(xs.shape[0], weights.up.shape[0])

        def expert(whole: tuple[Array, Array | None], args: tuple[Weights, Array, Array]) -> tuple:
            w, start, end = args

            def body(at: Array, fresh: Array, mine: Array, carry: tuple) -> tuple:
                whole, dw = carry
                arrays = (xs, hidden, dy, values)
                x, h, g, v = (jax.tree.map(lambda a: _read(a, at, tile, mine), a) for a in arrays)
                dx, dw_tile, d_weight = ffn.backward(activation, x, h, g, w, v)
                whole = jax.tree.map(lambda out, part: _write(out, part, at, fresh), whole, (dx, d_weight))
                return whole, jax.tree.map(jnp.add, dw, dw_tile)

            wide = accumulator(xs.dtype)
            dw = jax.tree.map(lambda a: groups.zeros(a.shape, wide, xs, a, dy, group_sizes, *values), w)
            whole, dw = _loop(start, end, tile, rows, body, (whole, dw))
            return whole, jax.tree.map(lambda a, like: a.astype(like.dtype), dw, w)

        def zeros(like: Array) -> Array:
            return groups.zeros(like.shape, like.dtype, xs, weights.up, dy, group_sizes, *values)

        whole = jax.tree.map(zeros, (xs, values.weight))
        (dx, d_weight), dw = lax.scan(expert, whole, (weights, *groups.bounds(group_sizes, rows)))
        return dx, d_weight, dw

    return run(xs, group_sizes, weights, values, hidden, dy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ffn(xs: Array, group_sizes: Array, weights: Weights, values: Rows, activation: Activation) -> Array:
    return _ffn_forward(activation, xs, group_sizes, weights, values)[0]


def _save(xs: Array, group_sizes: Array, weights: Weights, values: Rows, activation: Activation):
    y, hidden = _ffn_forward(activation, xs, group_sizes, weights, values)
    return y, (xs, group_sizes, weights, values, hidden)


def _pull(activation: Activation, saved: tuple, dy: Array) -> tuple:
    xs, group_sizes, weights, values, hidden = saved
    dx, d_weight, dw = _ffn_backward(activation, xs, group_sizes, weights, values, hidden, dy)
    return dx, None, dw, Rows(None, d_weight)


_ffn.defvjp(_save, _pull)


def grouped_ffn(
    xs: Float[Array, "P D"],
    group_sizes: Int[Array, "G"],
    weights: Weights,
    activation: Activation,
    *,
    extents: Int[Array, "G"] | None = None,
    row_weights: Float[Array, "P"] | None = None,
) -> Float[Array, "P D"]:
    """See `api.grouped_ffn`. Saves the pre-activations: 2 P F elements (P F if not gated)."""
    experts, _, columns = weights.up.shape
    values = ffn.row_values(group_sizes, extents, row_weights, xs.shape[0], columns)
    return _ffn(xs, groups.per_expert(group_sizes, experts), weights, values, activation)
