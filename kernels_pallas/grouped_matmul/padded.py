"""Back end `padded`: C rows of every group in one batched matmul, repeated until the largest group is done.

Exact for any group sizes: the number of rounds, ceil(largest group / C), is found on the device, one when
loads are balanced. A wrong guess of C costs time, never rows. Work: E x largest group rounded up to C;
temporaries: E x C rows, no copy of the weights. The backward runs the forward again,
round by round, so nothing but the inputs is saved.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import blocks, ffn, groups
from kernels_pallas.grouped_matmul.ffn import Activation, Rows, Weights, einsum
from kernels_pallas.grouped_matmul.vjp import by_cutting, differentiable

CAPACITY_FACTOR = 1.25


def capacity(rows: int, experts: int) -> int:
    """C: the mean group times CAPACITY_FACTOR, rounded up to a multiple of 8."""
    return -(-int(CAPACITY_FACTOR * rows / experts + 0.999) // 8) * 8


def _rounds(group_sizes: Array, rows: int, body, *like):
    """Folds `body(layout, carry)` over rounds; the first always runs, outside the loop, with carry None."""
    start, end = groups.bounds(group_sizes, rows)
    size = capacity(rows, group_sizes.shape[0])
    count = (jnp.max(end - start) + size - 1) // size

    def step(state):
        i, carry = state
        return i + 1, body(blocks.capacity(start, end, rows, size, skip=i * size), carry)

    carry = body(blocks.capacity(start, end, rows, size), None)
    first = groups.zeros((), jnp.int32, group_sizes, *like) + 1
    return lax.while_loop(lambda state: state[0] < count, step, (first, carry))[1]


def _product(lhs: Array, rhs: Array, group_sizes: Array, transpose_rhs: bool, dtype: jnp.dtype) -> Array:
    spec = "grk,gnk->grn" if transpose_rhs else "grk,gkn->grn"

    def body(layout: blocks.Blocks, out: Array | None) -> Array:
        return layout.restore(einsum(spec, layout.gather(lhs), rhs).astype(dtype), out)

    return _rounds(group_sizes, lhs.shape[0], body)


def _outer(lhs: Array, grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    def body(layout: blocks.Blocks, dw: Array | None) -> Array:
        new = einsum("grk,grn->gkn", layout.gather(lhs), layout.gather(grad))
        return new if dw is None else dw + new

    return _rounds(group_sizes, lhs.shape[0], body).astype(dtype)


grouped_matmul = differentiable(*by_cutting(_product, _outer))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ffn(xs: Array, group_sizes: Array, weights: Weights, rows: Rows, activation: Activation) -> Array:
    def body(layout: blocks.Blocks, out: Array | None) -> Array:
        mine = jax.tree.map(layout.gather, rows)
        return layout.restore(ffn.forward(activation, layout.gather(xs), weights, mine)[0], out)

    return _rounds(group_sizes, xs.shape[0], body)


def _save(xs: Array, group_sizes: Array, weights: Weights, rows: Rows, activation: Activation):
    return _ffn(xs, group_sizes, weights, rows, activation), (xs, group_sizes, weights, rows)


def _pull(activation: Activation, saved: tuple, dy: Array) -> tuple:
    xs, group_sizes, weights, rows = saved

    def body(layout: blocks.Blocks, carry: tuple | None) -> tuple[Array, Array | None, Weights]:
        dx, d_weight, total = (None, None, None) if carry is None else carry
        x, mine = layout.gather(xs), jax.tree.map(layout.gather, rows)
        _, hidden = ffn.forward(activation, x, weights, mine)
        dx_blocks, dw, d_blocks = ffn.backward(activation, x, hidden, layout.gather(dy), weights, mine)
        if d_blocks is not None:
            d_weight = layout.restore(d_blocks, d_weight)
        return layout.restore(dx_blocks, dx), d_weight, dw if total is None else jax.tree.map(jnp.add, total, dw)

    dx, d_weight, dw = _rounds(group_sizes, xs.shape[0], body)
    return dx, None, jax.tree.map(lambda d, like: d.astype(like.dtype), dw, weights), Rows(None, d_weight)


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
    """See `api.grouped_ffn`."""
    experts, _, columns = weights.up.shape
    rows = ffn.row_values(group_sizes, extents, row_weights, xs.shape[0], columns)
    return _ffn(xs, groups.per_expert(group_sizes, experts), weights, rows, activation)
