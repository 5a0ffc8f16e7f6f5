"""Back end `lax`: `jax.lax.ragged_dot`. Kept for comparison.

Slow on most platforms: XLA for CPU and GPU computes every expert on every row and masks (JAX 0.11), E times
the work and E times the memory. `transpose_rhs` swaps the axes of rhs, which may copy it; extents zero columns.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.ffn import accumulator, precision
from kernels_pallas.grouped_matmul.ref import compose
from kernels_pallas.grouped_matmul.vjp import by_cutting, differentiable

_OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _product(lhs: Array, rhs: Array, group_sizes: Array, transpose_rhs: bool, dtype: jnp.dtype) -> Array:
    @sequential_vmap  # ragged_dot itself cannot be batched over weights or group sizes
    def run(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
        wide, (start, end) = accumulator(lhs.dtype), groups.bounds(group_sizes, lhs.shape[0])
        y = lax.ragged_dot(lhs, rhs, end - start, precision=precision(lhs.dtype), preferred_element_type=wide)
        return y.astype(dtype)

    return run(lhs, jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs, group_sizes)


def _outer(lhs: Array, grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    @sequential_vmap
    def run(lhs: Array, grad: Array, group_sizes: Array) -> Array:
        start, end = groups.bounds(group_sizes, lhs.shape[0])
        lhs, grad = groups.zero_tail(lhs, end), groups.zero_tail(grad, end)
        high, wide = precision(lhs.dtype), accumulator(lhs.dtype)
        dw = lax.ragged_dot_general(lhs, grad, end - start, _OUTER, precision=high, preferred_element_type=wide)
        return dw.astype(dtype)

    return run(lhs, grad, group_sizes)


grouped_matmul = differentiable(*by_cutting(_product, _outer))
grouped_ffn = compose(grouped_matmul)


def refuse(lhs: jax.ShapeDtypeStruct, *args, **kwargs) -> str | None:
    """Never: it is slow, not wrong."""
    del lhs, args, kwargs
    return None
