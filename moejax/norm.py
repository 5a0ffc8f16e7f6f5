"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config import ModelConfig
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


class LayerNorm(nnx.Module):
    """``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * scale + bias`` (1607.06450), computed in float32; the bias
    is optional."""

    def __init__(self, dim: int, eps: float, bias: bool) -> None:
        self.eps = eps
        self.scale = create(ArraySpec((dim,), ("embed",), init="ones"), jax.random.key(0))
        self.bias = create(ArraySpec((dim,), ("embed",), init="zeros"), jax.random.key(0)) if bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(config: ModelConfig) -> Norm:
    """The norm of ``config.norm`` over the model's dimension."""
    if config.norm == "rms":
        return RMSNorm(config.dim, config.norm_eps)
    return LayerNorm(config.dim, config.norm_eps, bias=config.norm == "layer_bias")


def unit_rms(x: Float[Array, "... N"], eps: float) -> Float[Array, "... N"]:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, computed in float32: an RMS norm without a scale."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)
