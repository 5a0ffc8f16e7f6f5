"""The parts of a decoder block, and the block itself: attention, normalisation, rotary positions, dense or MoE FFN.

Letters: B batch, S query length, M key/value length, D model, H query heads, G key/value heads, N head dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.config import AttentionConfig, ModelConfig
from moejax.experts import DenseFFN
from moejax.moe import MoELayer
from moejax.sharding import ArraySpec, create
from moejax.types import LayerReport, Limit, RouteContext, pytree


@pytree
class AttentionInput:
    """What attention needs to know about tokens, shared by all layers."""

    positions: Int[Array, "B S"]
    """Rotary position of each token; restarts at each document."""
    index: Int[Array, "B S"]
    """Place of each token in the key/value sequence: a query sees places up to its own."""
    segment_ids: Int[Array, "B S"] | None = None
    """Document of each token: a query sees its own document only. None: one document for each row (and with a
    cache)."""


@pytree
class KVCache:
    """Keys and values of one layer (or of stacked layers, with a leading axis), filled up to a place for each row."""

    k: Float[Array, "B M G N"]
    v: Float[Array, "B M G N"]


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale``, computed in float32."""

    def __init__(self, dim: int, eps: float, axis: str = "embed") -> None:
        self.eps = eps
        self.scale = create(ArraySpec((dim,), (axis,), init="ones"), jax.random.key(0))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def rotary(x: Float[Array, "B S H N"], positions: Int[Array, "B S"], theta: float) -> Float[Array, "B S H N"]:
    """Rotary position embedding (2104.09864), halves rotated against each other (the Llama layout), in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention_mask(
    query: AttentionInput, key_index: Int[Array, "B M"], key_segments: Int[Array, "B M"] | None
) -> Bool[Array, "B 1 S M"]:
    """Causal by place in the sequence, and within one document."""
    mask = query.index[:, :, None] >= key_index[:, None, :]
    if query.segment_ids is not None and key_segments is not None:
        mask &= query.segment_ids[:, :, None] == key_segments[:, None, :]
    return mask[:, None]


class Attention(nnx.Module):
    """Grouped-query causal attention with rotary positions; optional QK-norm and biases; optional key/value cache."""

    def __init__(self, config: AttentionConfig, dim: int, eps: float, key: PRNGKeyArray, scale: float) -> None:
        heads, groups, n = config.num_heads, config.num_kv_heads, config.head_dim
        keys = jax.random.split(key, 4)
        self.config = config
        self.q = create(ArraySpec((dim, heads, n), ("embed", "heads", "head_dim"), fan_in=dim), keys[0], scale)
        self.k = create(ArraySpec((dim, groups, n), ("embed", "kv_heads", "head_dim"), fan_in=dim), keys[1], scale)
        self.v = create(ArraySpec((dim, groups, n), ("embed", "kv_heads", "head_dim"), fan_in=dim), keys[2], scale)
        self.o = create(ArraySpec((heads, n, dim), ("heads", "head_dim", "embed"), fan_in=heads * n), keys[3], scale)
        q_bias = ArraySpec((heads, n), ("heads", "head_dim"), init="zeros")
        kv_bias = ArraySpec((groups, n), ("kv_heads", "head_dim"), init="zeros")
        self.q_bias = create(q_bias, key) if config.bias else None
        self.k_bias = create(kv_bias, key) if config.bias else None
        self.v_bias = create(kv_bias, key) if config.bias else None
        self.q_norm = RMSNorm(n, eps, "head_dim") if config.qk_norm else None
        self.k_norm = RMSNorm(n, eps, "head_dim") if config.qk_norm else None

    def __call__(
        self, x: Float[Array, "B S D"], tokens: AttentionInput, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        q = self._project(x, self.q, self.q_bias, self.q_norm, tokens.positions)
        k = self._project(x, self.k, self.k_bias, self.k_norm, tokens.positions)
        v = self._project(x, self.v, self.v_bias, None, None)
        if cache is None:
            mask = attention_mask(tokens, tokens.index, tokens.segment_ids)
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = KVCache(
                k=cache.k.at[rows, tokens.index].set(k.astype(cache.k.dtype), mode="drop"),
                v=cache.v.at[rows, tokens.index].set(v.astype(cache.v.dtype), mode="drop"),
            )
            k, v = cache.k.astype(x.dtype), cache.v.astype(x.dtype)
            places = jnp.broadcast_to(jnp.arange(k.shape[1]), (x.shape[0], k.shape[1]))
            mask = attention_mask(tokens, places, None)
        with jax.named_scope("attention"):
            y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=self._implementation(x, cache))
        return jnp.einsum("bshn,hnd->bsd", y, self.o[...].astype(x.dtype)), cache

    def _project(
        self,
        x: Array,
        weight: nnx.Variable,
        bias: nnx.Variable | None,
        norm: RMSNorm | None,
        positions: Array | None,
    ) -> Array:
        y = jnp.einsum("bsd,dhn->bshn", x, weight[...].astype(x.dtype))
        if bias is not None:
            y = y + bias[...].astype(x.dtype)
        if norm is not None:
            y = norm(y)
        return y if positions is None else rotary(y, positions, self.config.rope_theta)

    def _implementation(self, x: Array, cache: KVCache | None) -> Literal["xla", "cudnn"]:
        if self.config.implementation != "auto":
            return self.config.implementation
        fits = x.dtype == jnp.bfloat16 and cache is None and self.config.head_dim in (64, 128) and x.shape[1] % 64 == 0
        return "cudnn" if fits and jax.default_backend() == "gpu" else "xla"


class Block(nnx.Module):
    """Pre-norm decoder block: ``h = x + attention(norm(x)); y = h + ffn(norm(h))``, its FFN dense or MoE.

    Seam 6: another wiring calls ``moe.begin`` / ``compute`` / ``finish`` apart, among these lines.
    """

    def __init__(self, config: ModelConfig, is_moe: bool, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 2)
        scale = config.init_scale
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config.attention, config.dim, config.norm_eps, keys[0], scale)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.moe = MoELayer(config.moe, config.dim, config.activation, keys[1], scale) if is_moe else None
        self.ffn = None if is_moe else DenseFFN(config.dim, config.ffn_dim, config.activation, keys[1], scale)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        tokens: AttentionInput,
        ctx: RouteContext,
        limits: tuple[Limit, ...] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Array, "B S D"], LayerReport | None, KVCache | None]:
        attended, cache = self.attention(self.attention_norm(x), tokens, cache)
        x = x + attended
        z = self.ffn_norm(x)
        if self.ffn is not None:
            return x + self.ffn(z), None, cache
        assert self.moe is not None  # a block has one of the two
        y, report = self.moe.reported(z, ctx, limits)
        return x + y, report, cache
