"""What each kind of attention keeps of past tokens.

Letters: B batch, S new tokens, M places of the cache, G key/value heads, N head dim, R rank of keys and values, P
rotary head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.attention.inputs import AttentionInput
from moejax.config import AttentionConfig
from moejax.types import pytree


@pytree
class KVCache:
    """Keys and values of one layer (or of stacked layers, with a leading axis), filled up to a place for each row."""

    k: Float[Array, "B M G N"]
    v: Float[Array, "B M G N"]


@pytree
class LatentCache:
    """Latents of one layer (or of stacked layers, with a leading axis), filled up to a place for each row."""

    latent: Float[Array, "B M R"]
    """Normed, and scaled where ``scale_latents``."""
    k_rope: Float[Array, "B M P"]
    """The rotary key of all heads, rotated."""


LayerCache = KVCache | LatentCache
BlockCache = LayerCache | tuple[LayerCache, LayerCache]
"""Of one block; two where it has two attentions (wiring "longcat")."""


def empty_cache(config: AttentionConfig, leading: tuple[int, ...], dtype: Any) -> LayerCache:
    """Zeros for ``leading`` = ``[..., B, M]``: for each token 2 G N values, or R + P for latent attention."""
    if config.kind == "latent":
        widths = (config.latent_rank, config.rope_head_dim)
        latent, k_rope = (jnp.zeros((*leading, width), dtype) for width in widths)
        return LatentCache(latent=latent, k_rope=k_rope)
    k, v = (jnp.zeros((*leading, config.num_kv_heads, config.head_dim), dtype) for _ in range(2))
    return KVCache(k=k, v=v)


def append(cache: Float[Array, "..."], new: Float[Array, "B S ..."], tokens: AttentionInput) -> Array:
    """``cache``, ``[B, M, ...]`` or stacked ``[L, B, M, ...]``, with ``new`` at its tokens' places, in the layer that
    ``tokens`` names. What lies beyond M is left out.

    Only the new places are written, also where layers are stacked, so that a loop over layers that hands the cache on
    needs no second one. Padding is left out, but behind a prompt: it then lies where the next tokens will be written,
    and nobody sees it before.
    """
    layer = () if tokens.layer is None else (tokens.layer,)
    new = new.astype(cache.dtype)
    if tokens.prompt:
        new = new[:, : cache.shape[len(layer) + 1]]
        rest = (0,) * new.ndim
        return jax.lax.dynamic_update_slice(cache, new if not layer else new[None], (*layer, *rest))
    rows = jnp.arange(new.shape[0])[:, None]
    return cache.at[(*layer, rows, tokens.index)].set(new, mode="drop")


def seen(cache: Float[Array, "..."], tokens: AttentionInput) -> Float[Array, "B M ..."]:
    """The part of ``cache``, as in :func:`append`, that belongs to the layer that ``tokens`` names."""
    return cache if tokens.layer is None else jax.lax.dynamic_index_in_dim(cache, tokens.layer, keepdims=False)
