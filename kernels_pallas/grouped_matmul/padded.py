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
from kernels_pallas.grouped_matmul.ffn import Activation, Weights, einsum
from kernels_pallas.grouped_matmul.vjp import differentiable

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


grouped_matmul = differentiable(_product, _outer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_ffn(
    xs: Float[Array, "P D"], group_sizes: Int[Array, "E"], weights: Weights, activation: Activation
) -> Float[Array, "P D"]:
    """See `api.grouped_ffn`."""

    def body(layout: blocks.Blocks, out: Array | None) -> Array:
        return layout.restore(ffn.forward(activation, layout.gather(xs), weights)[0], out)

    return _rounds(group_sizes, xs.shape[0], body)


def _save(xs: Array, group_sizes: Array, weights: Weights, activation: Activation):
    return grouped_ffn(xs, group_sizes, weights, activation), (xs, group_sizes, weights)


def _pull(activation: Activation, saved: tuple, dy: Array) -> tuple:
    xs, group_sizes, weights = saved

    def body(layout: blocks.Blocks, carry: tuple[Array, Weights] | None) -> tuple[Array, Weights]:
        dx, total = (None, None) if carry is None else carry
        x = layout.gather(xs)
        _, hidden = ffn.forward(activation, x, weights)
        dx_blocks, dw = ffn.backward(activation, x, hidden, layout.gather(dy), weights)
        return layout.restore(dx_blocks, dx), dw if total is None else jax.tree.map(jnp.add, total, dw)

    dx, dw = _rounds(group_sizes, xs.shape[0], body)
    return dx, None, jax.tree.map(lambda d, like: d.astype(like.dtype), dw, weights)


grouped_ffn.defvjp(_save, _pull)
