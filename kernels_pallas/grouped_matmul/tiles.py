"""Back end `tiles`: groups padded to blocks of R rows, each block with its own copy of its expert's weights.

Static shapes, exact for any group sizes, one batched matmul of `count(P, E, R)` blocks, at most P + E (R -
1) rows. Good for small experts; for large ones the copies cost too much, and it refuses above `MAX_BYTES`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import blocks, ffn, groups
from kernels_pallas.grouped_matmul.ffn import Activation, Weights, accumulator, einsum
from kernels_pallas.grouped_matmul.vjp import differentiable

MAX_BYTES = 4 * 2**30
MIN_BLOCK, MAX_BLOCK = 8, 1024


def block_rows(rows: int, experts: int, k: int, n: int) -> int:
    """Rows in a block, a power of two in [8, 1024] near the one that costs the least time.

    A block's copy of the weights moves some 3 k n elements, a padding row some 3 (k + n) and k n / 200 more
    for its multiplications (an accelerator of 240 FLOP a byte). With P/R + E blocks and E R / 2 .. E R
    padding rows the sum of both is least at R = sqrt(P / E * k n / (k + n + k n / 600)).
    """
    best = math.sqrt(rows / experts * k * n / (k + n + k * n / 600))
    return max(MIN_BLOCK, min(MAX_BLOCK, 2 ** round(math.log2(max(best, 1)))))


def _layout(group_sizes: Array, rows: int, k: int, n: int) -> tuple[blocks.Blocks, Array]:
    return blocks.tiled(*groups.bounds(group_sizes, rows), rows, block_rows(rows, group_sizes.shape[0], k, n))


def _product(lhs: Array, rhs: Array, group_sizes: Array, transpose_rhs: bool, dtype: jnp.dtype) -> Array:
    layout, owner = _layout(group_sizes, lhs.shape[0], *rhs.shape[1:])
    spec = "grk,gnk->grn" if transpose_rhs else "grk,gkn->grn"
    return layout.restore(einsum(spec, layout.gather(lhs), blocks.owners(rhs, owner)).astype(dtype))


def _outer(lhs: Array, grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    layout, owner = _layout(group_sizes, lhs.shape[0], lhs.shape[1], grad.shape[1])
    dw = einsum("grk,grn->gkn", layout.gather(lhs), layout.gather(grad))
    return blocks.sum_by_owner(dw, owner, group_sizes.shape[0]).astype(dtype)


grouped_matmul = differentiable(_product, _outer)


def _ffn_layout(xs: Array, group_sizes: Array, weights: Weights) -> tuple[blocks.Blocks, Array, Weights]:
    layout, owner = _layout(group_sizes, xs.shape[0], *weights.up.shape[1:])
    return layout, owner, jax.tree.map(lambda w: blocks.owners(w, owner), weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_ffn(
    xs: Float[Array, "P D"], group_sizes: Int[Array, "E"], weights: Weights, activation: Activation
) -> Float[Array, "P D"]:
    """See `api.grouped_ffn`. Saves the pre-activations in blocks; copies of the weights are made again."""
    layout, _, w = _ffn_layout(xs, group_sizes, weights)
    return layout.restore(ffn.forward(activation, layout.gather(xs), w)[0])


def _save(xs: Array, group_sizes: Array, weights: Weights, activation: Activation):
    layout, _, w = _ffn_layout(xs, group_sizes, weights)
    y, hidden = ffn.forward(activation, layout.gather(xs), w)
    return layout.restore(y), (xs, group_sizes, weights, hidden)


def _pull(activation: Activation, saved: tuple, dy: Array) -> tuple:
    xs, group_sizes, weights, hidden = saved
    layout, owner, w = _ffn_layout(xs, group_sizes, weights)
    # Places without a row have x = dy = 0; their hidden is the biases', finite, and dy = 0 stops it.
    dx, dw = ffn.backward(activation, layout.gather(xs), hidden, layout.gather(dy), w)
    experts = group_sizes.shape[0]
    dw = jax.tree.map(lambda d, like: blocks.sum_by_owner(d, owner, experts).astype(like.dtype), dw, weights)
    return layout.restore(dx), None, dw


grouped_ffn.defvjp(_save, _pull)


def copied_bytes(rows: int, experts: int, k: int, n: int, dtype: jnp.dtype, matrices: int = 1) -> int:
    """Bytes of the larger of: copies of the weights (dtype), gradients by block (float32 or wider)."""
    elements = blocks.count(rows, experts, block_rows(rows, experts, k, n)) * k * n * matrices
    return elements * accumulator(dtype).itemsize


def refuse(rows: int, experts: int, k: int, n: int, dtype: jnp.dtype, matrices: int = 1) -> str | None:
    """The reason if weights and gradients by block would take more than MAX_BYTES."""
    needed = copied_bytes(rows, experts, k, n, dtype, matrices)
    if needed <= MAX_BYTES:
        return None
    limit = f"tiles.MAX_BYTES = {MAX_BYTES / 2**30:.1f} GiB"
    return f"weights by block would take {needed / 2**30:.1f} GiB, more than {limit}"
