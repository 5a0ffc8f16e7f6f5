"""Gradients of a grouped matmul from two primitives of a back end.

With Y[rows of e] = X[rows of e] @ W[e]:
    dX[rows of e] = dY[rows of e] @ W[e]^T     the same product with the other `transpose_rhs`
    dW[e] = X[rows of e]^T @ dY[rows of e]     the `outer` product of an expert's rows

Extents turn round with it: where the product writes only the leading columns of Y ("n"), that of dX reads only
the leading columns of dY ("k"), and the other way about.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.groups import ExtentAxis


class Product(Protocol):
    """lhs [P,K], rhs [E,K,N] (or [E,N,K]) -> [P,N] of `dtype`; extents as in `api.grouped_matmul`."""

    def __call__(
        self,
        lhs: Array,
        rhs: Array,
        group_sizes: Array,
        extents: Array | None,
        *,
        transpose_rhs: bool,
        extent_axis: ExtentAxis,
        dtype: jnp.dtype,
    ) -> Array: ...


class Outer(Protocol):
    """lhs [P,K], grad [P,N] -> [E,K,N] of `dtype`, exactly 0 for an expert without rows.

    Extents limit the columns of lhs ("k") or of grad ("n"): neither those beyond nor tail rows, both of which may be
    NaN, may add anything.
    """

    def __call__(
        self,
        lhs: Array,
        grad: Array,
        group_sizes: Array,
        extents: Array | None,
        *,
        experts: int,
        extent_axis: ExtentAxis,
        dtype: jnp.dtype,
    ) -> Array: ...


def differentiable(product: Product, outer: Outer) -> Callable[..., Array]:
    """A grouped matmul with the signature of `api.grouped_matmul` (no `implementation`), reverse mode only.

    The cotangent is rounded to the dtype of lhs before it is multiplied, as usual in mixed precision.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
    def matmul(
        lhs: Array,
        rhs: Array,
        group_sizes: Array,
        extents: Array | None,
        transpose_rhs: bool,
        extent_axis: ExtentAxis,
        dtype: jnp.dtype,
    ) -> Array:
        return product(
            lhs, rhs, group_sizes, extents, transpose_rhs=transpose_rhs, extent_axis=extent_axis, dtype=dtype
        )

    def forward(lhs, rhs, group_sizes, extents, transpose_rhs, extent_axis, dtype):
        y = matmul(lhs, rhs, group_sizes, extents, transpose_rhs, extent_axis, dtype)
        return y, (lhs, rhs, group_sizes, extents)

    def backward(transpose_rhs, extent_axis, dtype, saved, dy):
        del dtype
        lhs, rhs, group_sizes, extents = saved
        dy = dy.astype(lhs.dtype)
        other: ExtentAxis = "k" if extent_axis == "n" else "n"
        dlhs = product(
            dy, rhs, group_sizes, extents, transpose_rhs=not transpose_rhs, extent_axis=other, dtype=lhs.dtype
        )
        pair = (dy, lhs) if transpose_rhs else (lhs, dy)
        limited = other if transpose_rhs else extent_axis
        experts = rhs.shape[0]
        drhs = outer(*pair, group_sizes, extents, experts=experts, extent_axis=limited, dtype=rhs.dtype)
        return dlhs, drhs, None, None

    matmul.defvjp(forward, backward)

    def grouped_matmul(
        lhs: Float[Array, "P K"],
        rhs: Float[Array, "E K N"] | Float[Array, "E N K"],
        group_sizes: Int[Array, "G"],
        *,
        transpose_rhs: bool = False,
        extents: Int[Array, "G"] | None = None,
        extent_axis: ExtentAxis = "n",
        preferred_element_type: jnp.dtype | None = None,
    ) -> Float[Array, "P N"]:
        dtype = jnp.dtype(preferred_element_type or lhs.dtype)
        return matmul(lhs, rhs, group_sizes, extents, transpose_rhs, extent_axis, dtype)

    return grouped_matmul


def cut_limited(
    lhs: Float[Array, "P K"],
    grad: Float[Array, "P N"],
    group_sizes: Int[Array, "G"],
    extents: Int[Array, "G"] | None,
    extent_axis: ExtentAxis,
) -> tuple[Float[Array, "P K"], Float[Array, "P N"]]:
    """Operands of an `Outer`; in the one that extents limit what they leave out is zero."""
    if extent_axis == "k":
        return groups.cut(lhs, groups.row_extents(group_sizes, extents, *lhs.shape)), grad
    return lhs, groups.cut(grad, groups.row_extents(group_sizes, extents, *grad.shape))


def by_cutting(
    product: Callable[[Array, Array, Array, bool, jnp.dtype], Array],
    outer: Callable[[Array, Array, Array, jnp.dtype], Array],
) -> tuple[Product, Outer]:
    """Extents and several groups for each expert, for primitives that know neither.

    They get one group for each expert and operands whose ignored columns are zero: exact, but no work is saved.

    Args:
        product: (lhs, rhs, group_sizes, transpose_rhs, dtype of the result).
        outer: (lhs, grad, group_sizes, dtype of the result); must not read NaN from tail rows.
    """

    def cut_product(lhs, rhs, group_sizes, extents, *, transpose_rhs, extent_axis, dtype):
        if extent_axis == "k":
            lhs = groups.cut(lhs, groups.row_extents(group_sizes, extents, *lhs.shape))
        return product(lhs, rhs, groups.per_expert(group_sizes, rhs.shape[0]), transpose_rhs, dtype)

    def cut_outer(lhs, grad, group_sizes, extents, *, experts, extent_axis, dtype):
        lhs, grad = cut_limited(lhs, grad, group_sizes, extents, extent_axis)
        return outer(lhs, grad, groups.per_expert(group_sizes, experts), dtype)

    return cut_product, cut_outer
