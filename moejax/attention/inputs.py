"""What attention knows about tokens, and the scores' softmax.

Letters: B batch, S query length, M key/value length, H query heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.types import pytree, static

NOWHERE = 2**30
"""Place of padding: beyond every cache and every window."""
PADDING = -1
"""Document of padding: that of no real token."""


@pytree
class AttentionInput:
    """What attention needs to know about tokens, shared by all layers but for the window."""

    positions: Int[Array, "B S"]
    """Rotary position of each token; restarts at each document."""
    index: Int[Array, "B S"]
    """Place of each token in the key/value sequence: a query sees places up to its own. Padding is at
    :data:`NOWHERE`."""
    segment_ids: Int[Array, "B S"] | None = None
    """Document of each token: a query sees its own document only, and padding is a document of its own. None: one
    document for each row (and with a cache, which padding does not enter)."""
    window: Int[Array, ""] | Int[Array, "B S"] | None = None
    """A query sees this many last places, its own included: one number for all or one for each (:func:`in_chunks`).
    None: all. Data, so that layers with and without a window are one program."""
    rotates: Bool[Array, ""] | None = None
    """Whether the layer has rotary positions. None: it has. Data, like the window."""
    layer: Int[Array, ""] | None = None
    """Which of a cache's stacked layers is this one's. None: the cache is of one layer."""
    prompt: bool = static(False)
    """The cache is empty and padding only follows each row's tokens: attention is causal over the new tokens alone."""
    places: int = static(0)
    """Width of the batch, or places of the cache: LongRoPE chooses its factors by it."""


def attention_input(
    positions: Int[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
    mask: Bool[Array, "B S"] | None,
    start: Int[Array, "B"] | None,
    shape: tuple[int, ...],
    places: int = 0,
) -> AttentionInput:
    """Of a batch of ``shape`` [B, S] whose real tokens are those of ``mask``, padding anywhere.

    A token's place and default position are the number of real tokens before it, plus ``start`` with a cache, which
    has ``places`` (0: there is none).
    """
    batch, seq = shape
    first = jnp.zeros(batch, jnp.int32) if start is None else start
    before = jnp.arange(seq, dtype=jnp.int32)[None]
    if mask is not None:
        real = mask.astype(jnp.int32)
        before = jnp.cumsum(real, axis=1) - real
    place = first[:, None] + before
    positions = place if positions is None else positions
    places = places or seq
    if mask is None:
        return AttentionInput(positions=positions, index=place, segment_ids=segment_ids, places=places)
    if start is None:
        segment_ids = jnp.where(mask, 0 if segment_ids is None else segment_ids, PADDING)
    index = jnp.where(mask, place, NOWHERE)
    return AttentionInput(positions=positions, index=index, segment_ids=segment_ids, places=places)


def attention_mask(
    query: AttentionInput, key_index: Int[Array, "B M"], key_segments: Int[Array, "B M"] | None
) -> Bool[Array, "B 1 S M"]:
    """Causal by place in the sequence, within the window, and within one document."""
    mask = query.index[:, :, None] >= key_index[:, None, :]
    if query.window is not None:
        window = query.window if query.window.ndim == 0 else query.window[:, :, None]
        mask &= query.index[:, :, None] - key_index[:, None, :] < window
    if query.segment_ids is not None and key_segments is not None:
        mask &= query.segment_ids[:, :, None] == key_segments[:, None, :]
    return mask[:, None]


def in_chunks(tokens: AttentionInput) -> AttentionInput:
    """``tokens`` whose window is the size of chunks: each token sees the places from the beginning of its own chunk of
    positions on, so its window is ``position % size + 1`` (chunked attention, Llama 4)."""
    if tokens.window is None:
        return tokens
    within = tokens.positions % tokens.window + 1
    return dataclasses.replace(tokens, window=jnp.where(tokens.window < NOWHERE, within, NOWHERE))


def cache_mask(query: AttentionInput, size: int) -> Bool[Array, "B 1 S M"]:
    """:func:`attention_mask` over all places of a cache."""
    places = jnp.broadcast_to(jnp.arange(size), (query.index.shape[0], size))
    return attention_mask(query, places, None)


def shares(
    scores: Float[Array, "B H S M"], mask: Bool[Array, "B 1 S M"], sinks: Float[Array, "H"] | None = None
) -> Float[Array, "B H S M"]:
    """Softmax over visible keys, float32; a sink takes part as one more key, whose share is left out (gpt-oss).

    The largest logit is taken off first, sinks included, so that neither large scores nor large sinks overflow.
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min / 2)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = sinks.astype(jnp.float32)[None, :, None, None]
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
    weights = jnp.exp(scores - top)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top))
