"""Gradients of a grouped matmul from two primitives of a back end.

With Y[rows of e] = X[rows of e] @ W[e]:
    dX[rows of e] = dY[rows of e] @ W[e]^T     the same product with the other `transpose_rhs`
    dW[e] = X[rows of e]^T @ dY[rows of e]     the `outer` product of a group
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# (lhs, rhs, group_sizes, transpose_rhs, dtype of the result)
Product = Callable[[Array, Array, Array, bool, jnp.dtype], Array]
# (lhs [P,K], grad [P,N], group_sizes, dtype of the result) -> [E,K,N]; must not read NaN from tail rows
Outer = Callable[[Array, Array, Array, jnp.dtype], Array]


def differentiable(product: Product, outer: Outer) -> Callable[..., Array]:
    """A grouped matmul with the signature of `api.grouped_matmul` (no `implementation`), reverse mode only.

    The cotangent is rounded to the dtype of lhs before it is multiplied, as usual in mixed precision.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
    def matmul(lhs: Array, rhs: Array, group_sizes: Array, transpose_rhs: bool, dtype: jnp.dtype) -> Array:
        return product(lhs, rhs, group_sizes, transpose_rhs, dtype)

    def forward(lhs, rhs, group_sizes, transpose_rhs, dtype):
        return product(lhs, rhs, group_sizes, transpose_rhs, dtype), (lhs, rhs, group_sizes)

    def backward(transpose_rhs, dtype, saved, dy):
        del dtype
        lhs, rhs, group_sizes = saved
        dy = dy.astype(lhs.dtype)
        dlhs = product(dy, rhs, group_sizes, not transpose_rhs, lhs.dtype)
        pair = (dy, lhs) if transpose_rhs else (lhs, dy)
        return dlhs, outer(*pair, group_sizes, rhs.dtype), None

    matmul.defvjp(forward, backward)

    def grouped_matmul(
        lhs: Float[Array, "P K"],
        rhs: Float[Array, "E K N"] | Float[Array, "E N K"],
        group_sizes: Int[Array, "E"],
        *,
        transpose_rhs: bool = False,
        preferred_element_type: jnp.dtype | None = None,
    ) -> Float[Array, "P N"]:
        return matmul(lhs, rhs, group_sizes, transpose_rhs, jnp.dtype(preferred_element_type or lhs.dtype))

    return grouped_matmul
