"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.sharding import ArraySpec, create


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale``, computed in float32.

    ``dims`` is the shape of the scale: the mean is over that many trailing axes together. ``axes`` are their logical
    names.
    """

    def __init__(self, dims: int | tuple[int, ...], eps: float, axes: str | tuple[str, ...] = "embed") -> None:
        self.eps = eps
        shape = (dims,) if isinstance(dims, int) else dims
        names = (axes,) if isinstance(axes, str) else axes
        self.scale = create(ArraySpec(shape, names, init="ones"), jax.random.key(0))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.scale[...]
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=tuple(range(-scale.ndim, 0)), keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)
