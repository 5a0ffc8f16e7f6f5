"""Grouped-query attention.

Letters: B batch, S query length, M key/value length, D model, H query heads, G key/value heads, J query heads of one
group, N head dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moejax.attention.cache import KVCache, LayerCache, append, seen
from moejax.attention.inputs import AttentionInput, attention_mask, cache_mask, in_chunks, shares
from moejax.config import AttentionConfig
from moejax.norm import RMSNorm, unit_rms
from moejax.rope import rotary
from moejax.sharding import ArraySpec, create


class Attention(nnx.Module):
    """Grouped-query causal attention with rotary positions; optional QK-norm, biases, clipping, sinks, window and soft
    cap of the scores; optional key/value cache.

    The core is ``jax.nn.dot_product_attention``. It has no sinks and no soft cap: with them the softmax is our own, in
    plain XLA.
    """

    def __init__(self, config: AttentionConfig, dim: int, eps: float, key: PRNGKeyArray, scale: float) -> None:
        heads, groups, n = config.num_heads, config.num_kv_heads, config.head_dim
        keys = jax.random.split(key, 4)
        self.config, self.eps = config, eps
        self.q = create(ArraySpec((dim, heads, n), ("embed", "heads", "head_dim"), fan_in=dim), keys[0], scale)
        self.k = create(ArraySpec((dim, groups, n), ("embed", "kv_heads", "head_dim"), fan_in=dim), keys[1], scale)
        self.v = create(ArraySpec((dim, groups, n), ("embed", "kv_heads", "head_dim"), fan_in=dim), keys[2], scale)
        self.o = create(ArraySpec((heads, n, dim), ("heads", "head_dim", "embed"), fan_in=heads * n), keys[3], scale)
        q_bias = ArraySpec((heads, n), ("heads", "head_dim"), init="zeros")
        kv_bias = ArraySpec((groups, n), ("kv_heads", "head_dim"), init="zeros")
        self.q_bias = create(q_bias, key) if config.bias else None
        self.k_bias = create(kv_bias, key) if config.bias else None
        self.v_bias = create(kv_bias, key) if config.bias else None
        self.o_bias = create(ArraySpec((dim,), ("embed",), init="zeros"), key) if config.output_bias else None
        self.q_norm = self._norm(heads, "heads", eps) if config.qk_norm else None
        self.k_norm = self._norm(groups, "kv_heads", eps) if config.qk_norm else None
        self.sinks = create(ArraySpec((heads,), ("heads",), init="zeros"), key) if config.sinks else None

    def _norm(self, heads: int, axis: str, eps: float) -> RMSNorm:
        if self.config.qk_norm_over == "projection":
            return RMSNorm((heads, self.config.head_dim), eps, (axis, "head_dim"))
        return RMSNorm(self.config.head_dim, eps, "head_dim")

    def __call__(
        self, x: Float[Array, "B S D"], tokens: AttentionInput, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        q = self._placed(self._project(x, self.q, self.q_bias, self.q_norm), tokens, is_query=True)
        k = self._placed(self._project(x, self.k, self.k_bias, self.k_norm), tokens)
        v = self._project(x, self.v, self.v_bias, None)
        if self.config.window_kind == "chunks":
            tokens = in_chunks(tokens)
        if cache is not None:
            assert isinstance(cache, KVCache)
            cache = KVCache(k=append(cache.k, k, tokens), v=append(cache.v, v, tokens))
        alone = cache is None or tokens.prompt  # what is attended to is the new tokens
        if alone:
            mask = attention_mask(tokens, tokens.index, tokens.segment_ids)
        else:
            assert isinstance(cache, KVCache)
            k, v = (seen(leaf, tokens).astype(x.dtype) for leaf in (cache.k, cache.v))
            mask = cache_mask(tokens, k.shape[1])
        with jax.named_scope("attention"):
            if self.sinks is None and not self.config.score_softcap:
                causal = tokens.prompt and tokens.window is None  # all that the mask says: a fused core skips half
                y = jax.nn.dot_product_attention(
                    q, k, v, mask=None if causal else mask, is_causal=causal, scale=self.config.softmax_scale or None,
                    implementation=self._implementation(x, alone),
                )  # fmt: skip
            else:
                y = self._plain(q, k, v, mask)
        y = jnp.einsum("bshn,hnd->bsd", y, self.o[...].astype(x.dtype))
        return y if self.o_bias is None else y + self.o_bias[...].astype(x.dtype), cache

    def _project(
        self,
        x: Array,
        weight: nnx.Variable,
        bias: nnx.Variable | None,
        norm: RMSNorm | None,
    ) -> Array:
        y = jnp.einsum("bsd,dhn->bshn", x, weight[...].astype(x.dtype))
        if bias is not None:
            y = y + bias[...].astype(x.dtype)
        if norm is not None:
            y = norm(y)
        return jnp.clip(y, -self.config.clip_qkv, self.config.clip_qkv) if self.config.clip_qkv else y

    def _placed(self, y: Float[Array, "B S H N"], tokens: AttentionInput, *, is_query: bool = False) -> Array:
        """Queries or keys with their position: rotated, and normed again with ``qk_unit_norm``; in a layer that does
        not rotate queries times the temperature of their position, which is 1 at ``temperature=0``."""
        config = self.config
        turned = rotary(y, tokens.positions, config.rope_theta, config.rope, tokens.places)
        if config.qk_unit_norm:
            turned = unit_rms(turned, self.eps)
        if tokens.rotates is None:
            return turned
        if is_query and config.temperature:
            steps = jnp.floor((tokens.positions.astype(jnp.float32) + 1) / config.temperature_length)
            y = (y * (1 + config.temperature * jnp.log1p(steps))[..., None, None]).astype(y.dtype)
        return jnp.where(tokens.rotates, turned, y)

    def _plain(
        self,
        q: Float[Array, "B S H N"],
        k: Float[Array, "B M G N"],
        v: Float[Array, "B M G N"],
        mask: Bool[Array, "B 1 S M"],
    ) -> Float[Array, "B S H N"]:
        """The core with sinks and a soft cap of the scores, where there are some."""
        batch, seq, heads, n = q.shape
        cap, sinks = self.config.score_softcap, None if self.sinks is None else self.sinks[...]
        grouped = q.reshape(batch, seq, k.shape[2], -1, n)
        scores = jnp.einsum("bsgjn,bmgn->bgjsm", grouped, k, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, heads, seq, -1) * (self.config.softmax_scale or n**-0.5)
        scores = cap * jnp.tanh(scores / cap) if cap else scores
        p = shares(scores, mask, sinks).astype(v.dtype).reshape(batch, k.shape[2], -1, seq, k.shape[1])
        return jnp.einsum("bgjsm,bmgn->bsgjn", p, v).reshape(q.shape)

    def _implementation(self, x: Array, alone: bool) -> Literal["xla", "cudnn"]:
        if self.config.implementation != "auto":
            return self.config.implementation
        fits = x.dtype == jnp.bfloat16 and alone and self.config.head_dim in (64, 128) and x.shape[1] % 64 == 0
        return "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
