"""Causal attention with rotary positions: grouped-query, or multi-head latent.

Both kinds are called as ``(x, tokens, cache) -> (y, cache)``; :func:`make_attention` and :func:`empty_cache` choose by
the config.
"""

from jaxtyping import PRNGKeyArray

from moejax.attention.cache import BlockCache, KVCache, LatentCache, LayerCache, empty_cache
from moejax.attention.checks import check
from moejax.attention.grouped import Attention
from moejax.attention.inputs import NOWHERE, AttentionInput, attention_input
from moejax.attention.latent import LatentAttention
from moejax.config import AttentionConfig

__all__ = [
    "NOWHERE",
    "Attention",
    "AttentionInput",
    "BlockCache",
    "KVCache",
    "LatentAttention",
    "LatentCache",
    "LayerCache",
    "attention_input",
    "check",
    "empty_cache",
    "make_attention",
]


def make_attention(
    config: AttentionConfig, dim: int, eps: float, key: PRNGKeyArray, scale: float
) -> Attention | LatentAttention:
    """Attention of ``config.kind`` with random weights. ``eps`` is that of QK-norm."""
    if config.kind == "latent":
        return LatentAttention(config, dim, key, scale)
    return Attention(config, dim, eps, key, scale)
