"""Back end `tokamax`: `tokamax.ragged_dot` (optional: `pip install tokamax`), with the kernel that it picks itself.

On a GPU its Mosaic kernel, then XLA; on a TPU its own kernels; on a CPU XLA. Untuned, as it comes: the user may call
`tokamax.autotune`. The gradients are ours around its products, so that NaN in tail rows stays there.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.ffn import precision
from kernels_pallas.grouped_matmul.ref import compose
from kernels_pallas.grouped_matmul.vjp import by_cutting, differentiable


def _dimensions(lhs: int, rhs: int, group_axes: list[int]) -> lax.RaggedDotDimensionNumbers:
    """Contracts axis `lhs` with axis `rhs`; rows are ragged. `group_axes`: that of experts in rhs, if any."""
    return lax.RaggedDotDimensionNumbers((((lhs,), (rhs,)), ((), ())), [0], group_axes)


_FORWARD, _TRANSPOSED, _OUTER = _dimensions(1, 1, [0]), _dimensions(1, 2, [0]), _dimensions(0, 0, [])


@functools.cache
def load() -> ModuleType | str:
    """The package, or the reason why there is none. Not imported before it is asked for: that takes seconds."""
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed: pip install tokamax"
    try:
        return importlib.import_module("tokamax")
    except Exception as error:  # what another version of JAX breaks in it need not be an ImportError
        return f"tokamax is installed but cannot be imported ({type(error).__name__}: {error}): reinstall it"


def _dot(
    lhs: Array, rhs: Array, group_sizes: Array, dimensions: lax.RaggedDotDimensionNumbers, dtype: jnp.dtype
) -> Array:
    tokamax = load()
    if isinstance(tokamax, str):
        raise ImportError(tokamax)
    start, end = groups.bounds(group_sizes, lhs.shape[0])
    high = precision(lhs.dtype)
    return tokamax.ragged_dot_general(lhs, rhs, end - start, dimensions, precision=high, preferred_element_type=dtype)


def _product(lhs: Array, rhs: Array, group_sizes: Array, transpose_rhs: bool, dtype: jnp.dtype) -> Array:
    return _dot(lhs, rhs, group_sizes, _TRANSPOSED if transpose_rhs else _FORWARD, dtype)


def _outer(lhs: Array, grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    _, end = groups.bounds(group_sizes, lhs.shape[0])
    return _dot(groups.zero_tail(lhs, end), groups.zero_tail(grad, end), group_sizes, _OUTER, dtype)


grouped_matmul = differentiable(*by_cutting(_product, _outer))
grouped_ffn = compose(grouped_matmul)


def refuse(rows: jax.ShapeDtypeStruct, *args, extents: jax.ShapeDtypeStruct | None = None, **kwargs) -> str | None:
    """Without the package, and extents, which it has no form of; `rows` is lhs or xs."""
    del rows, args, kwargs
    if extents is not None:
        return "extents are given and tokamax computes all columns: pass extents=None or choose another back end"
    package = load()
    return package if isinstance(package, str) else None
