"""Multi-head latent attention (DeepSeek-V2, 2405.04434 section 2.1).

Letters: B batch, S query length, M key/value length, D model, H heads, N head dim without position, P rotary head dim,
U value head dim, Q query rank, R rank of keys and values.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moejax.attention.cache import LatentCache, LayerCache, append, seen
from moejax.attention.inputs import AttentionInput, attention_mask, cache_mask, shares
from moejax.config import AttentionConfig
from moejax.norm import RMSNorm
from moejax.rope import m, rotary
from moejax.sharding import ArraySpec, create

LATENT_NORM_EPS = 1e-6
"""Of the two norms of latents, whatever ``model.norm_eps`` is: the released models' code takes it from nowhere else."""


class LatentAttention(nnx.Module):
    """Causal attention whose keys and values are low-rank: ``c = norm(x W_down)``, ``k_h = [c W_k_h, rope(x W_r)]``,
    ``v_h = c W_v_h`` (equations 9 to 19 of the paper; queries likewise where ``query_rank`` is set).

    With a cache, only ``c`` and the rotary key are kept, and the up-projections are absorbed (section 2.1.2): scores
    are ``(q_h W_k_h^T) c``, and ``W_v_h`` follows the weighted sum of ``c``. Without one, and for a prompt, keys and
    values are computed.
    Both are plain XLA: the fused cores of ``jax.nn.dot_product_attention`` want values as wide as keys.
    """

    def __init__(self, config: AttentionConfig, dim: int, key: PRNGKeyArray, scale: float) -> None:
        heads, n, p, u = config.num_heads, config.head_dim, config.rope_head_dim, config.value_head_dim
        keys = jax.random.split(key, 7)
        self.config, self.dim = config, dim

        def matrix(i: int, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int) -> nnx.Variable:
            return create(ArraySpec(shape, axes, fan_in=fan_in), keys[i], scale)

        def bias(size: int, axis: str, wanted: bool) -> nnx.Variable | None:
            return create(ArraySpec((size,), (axis,), init="zeros"), key) if wanted else None

        rank, source = config.query_rank, config.query_rank or dim
        self.q_down = matrix(0, (dim, rank), ("embed", "latent"), dim) if rank else None
        self.q_down_bias = bias(rank, "latent", config.bias and rank > 0)
        self.q_down_norm = RMSNorm(rank, LATENT_NORM_EPS, "latent") if rank else None
        self.q = matrix(1, (source, heads, n + p), ("latent" if rank else "embed", "heads", "head_dim"), source)
        rank = config.latent_rank
        self.kv_down = matrix(2, (dim, rank), ("embed", "latent"), dim)
        self.kv_down_bias = bias(rank, "latent", config.bias)
        self.kv_norm = RMSNorm(rank, LATENT_NORM_EPS, "latent")
        self.k_rope = matrix(3, (dim, p), ("embed", "head_dim"), dim)
        self.k_rope_bias = bias(p, "head_dim", config.bias)
        self.k_up = matrix(4, (rank, heads, n), ("latent", "heads", "head_dim"), rank)
        self.v_up = matrix(5, (rank, heads, u), ("latent", "heads", "head_dim"), rank)
        self.o = matrix(6, (heads, u, dim), ("heads", "head_dim", "embed"), heads * u)
        self.o_bias = bias(dim, "embed", config.output_bias)

    def __call__(
        self, x: Float[Array, "B S D"], tokens: AttentionInput, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        config = self.config
        q = jnp.einsum("bsr,rhn->bshn", self._query_source(x), self.q[...].astype(x.dtype))
        q, q_rope = jnp.split(q, [config.head_dim], axis=-1)
        q_rope = rotary(q_rope, tokens.positions, config.rope_theta, config.rope, tokens.places)
        latent = self.kv_norm(_linear(x, self.kv_down, self.kv_down_bias)) * self._latent_scale(config.latent_rank)
        k_rope = _linear(x, self.k_rope, self.k_rope_bias)[:, :, None]
        k_rope = rotary(k_rope, tokens.positions, config.rope_theta, config.rope, tokens.places)[:, :, 0]
        k_up, v_up = self.k_up[...].astype(x.dtype), self.v_up[...].astype(x.dtype)
        with jax.named_scope("attention"):
            if cache is not None:
                assert isinstance(cache, LatentCache)
                cache = LatentCache(
                    latent=append(cache.latent, latent, tokens), k_rope=append(cache.k_rope, k_rope, tokens)
                )
            if cache is None or tokens.prompt:
                mask = attention_mask(tokens, tokens.index, tokens.segment_ids)
                k, v = (jnp.einsum("bmr,rhn->bmhn", latent, up) for up in (k_up, v_up))
                scores = jnp.einsum("bshn,bmhn->bhsm", q, k, preferred_element_type=jnp.float32)
                y = jnp.einsum("bhsm,bmhu->bshu", self._shares(scores, q_rope, k_rope, mask), v)
            else:
                latent, k_rope = (seen(leaf, tokens).astype(x.dtype) for leaf in (cache.latent, cache.k_rope))
                mask = cache_mask(tokens, latent.shape[1])
                q = jnp.einsum("bshn,rhn->bshr", q, k_up)
                scores = jnp.einsum("bshr,bmr->bhsm", q, latent, preferred_element_type=jnp.float32)
                y = jnp.einsum("bhsm,bmr->bshr", self._shares(scores, q_rope, k_rope, mask), latent)
                y = jnp.einsum("bshr,rhu->bshu", y, v_up)
        y = jnp.einsum("bshu,hud->bsd", y, self.o[...].astype(x.dtype))
        return y if self.o_bias is None else y + self.o_bias[...].astype(x.dtype), cache

    def _query_source(self, x: Float[Array, "B S D"]) -> Float[Array, "B S Q"]:
        if self.q_down is None or self.q_down_norm is None:
            return x
        down = self.q_down_norm(_linear(x, self.q_down, self.q_down_bias))
        return down * self._latent_scale(self.config.query_rank)

    def _latent_scale(self, rank: int) -> float:
        return (self.dim / rank) ** 0.5 if self.config.scale_latents else 1.0

    def _shares(
        self,
        scores: Float[Array, "B H S M"],
        q_rope: Float[Array, "B S H P"],
        k_rope: Float[Array, "B M P"],
        mask: Bool[Array, "B 1 S M"],
    ) -> Float[Array, "B H S M"]:
        scores = scores + jnp.einsum("bshp,bmp->bhsm", q_rope, k_rope, preferred_element_type=jnp.float32)
        return shares(scores * softmax_scale(self.config), mask).astype(q_rope.dtype)


def softmax_scale(config: AttentionConfig) -> float:
    """``1 / sqrt(N + P)``, times ``m(mscale_all_dim)^2`` with YaRN (DeepSeek-V2 and V3), or the configured value."""
    if config.softmax_scale:
        return config.softmax_scale
    scale = (config.head_dim + config.rope_head_dim) ** -0.5
    if config.rope.scaling == "yarn" and config.rope.mscale_all_dim:
        scale *= m(config.rope, config.rope.mscale_all_dim) ** 2
    return scale


def _linear(x: Array, weight: nnx.Variable, bias: nnx.Variable | None) -> Array:
    y = x @ weight[...].astype(x.dtype)
    return y if bias is None else y + bias[...].astype(x.dtype)
