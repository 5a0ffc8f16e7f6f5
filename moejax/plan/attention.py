"""What attention keeps for its backward pass and works with, of both kinds (``moejax.attention``)."""

import dataclasses
from collections.abc import Iterator

from moejax import count
from moejax.config import AttentionConfig
from moejax.plan.sizes import F32, Array, Sizes
from moejax.rope import rotated_dims


def norm(s: Sizes, dim: int) -> Iterator[Array]:
    """Of one norm over ``dim`` numbers of each token. A layer norm keeps its centred input instead of the input."""
    yield Array("norms", "input and x/rms in float32", 2 * s.tokens * dim * F32)
    yield Array("norms", "1/rms", 2 * s.tokens * F32)


def matrices(s: Sizes) -> int:
    """Numbers in the projections of one attention, on one device."""
    return count.attention_parameters(_on_device(s), s.model.dim)[0]


def parameters(s: Sizes) -> int:
    """All trainable numbers of one attention, on one device."""
    return sum(count.attention_parameters(_on_device(s), s.model.dim))


def _on_device(s: Sizes) -> AttentionConfig:
    return dataclasses.replace(s.model.attention, num_heads=s.heads, num_kv_heads=s.kv_heads)


def _numbers(s: Sizes) -> int:
    """Of queries, keys, values and output of one token."""
    a = s.model.attention
    if a.kind == "latent":
        return s.heads * (2 * a.head_dim + 2 * a.value_head_dim + a.rope_head_dim) + a.rope_head_dim
    return 2 * a.head_dim * (s.heads + s.kv_heads)


def _keys_and_values(s: Sizes) -> int:
    a = s.model.attention
    return s.heads * (a.head_dim + a.value_head_dim) if a.kind == "latent" else 2 * a.head_dim * s.kv_heads


def _ranks(s: Sizes) -> list[int]:
    a = s.model.attention
    return [rank for rank in (a.query_rank, a.latent_rank) if rank] if a.kind == "latent" else []


def attention(s: Sizes) -> Iterator[Array]:
    """Kept of one attention and its norm, or both its norms."""
    a, c, t = s.model.attention, s.itemsize, s.tokens
    yield from norm(s, s.model.dim)
    if s.model.sandwich_norm:
        yield from norm(s, s.model.dim)
    yield Array("attention", "input of the projections", t * s.model.dim * c)
    for rank in _ranks(s):
        yield from norm(s, rank)
        yield Array("attention", "latents", t * rank * c)
    if a.qk_norm:
        means = s.heads + s.kv_heads if a.qk_norm_over == "head" else 2
        yield Array("norms", "queries and keys, normalised and not", 2 * t * a.head_dim * (s.heads + s.kv_heads) * F32)
        yield Array("norms", "1/rms of queries and keys", 2 * t * means * F32)
    if a.qk_unit_norm:
        heads = s.heads + s.kv_heads
        yield Array("norms", "queries and keys, rotated, and 1/rms", t * heads * (a.head_dim + 2) * F32)
    if a.clip_qkv:
        numbers = (s.heads + 2 * s.kv_heads) * a.head_dim
        yield Array("attention", "queries, keys, values before clipping", 2 * t * numbers * c)
    yield Array("attention", "queries, keys, values, output", t * _numbers(s) * c)
    if s.cast:
        yield Array("attention", "weights in the compute type", matrices(s) * c)
    if s.core == "cudnn":
        yield Array("attention scores", "logsumexp", t * s.heads * F32)
        if a.window:
            yield Array("attention scores", "mask of each layer as a bias [B,1,S,S]", t * s.seq * c)
        return
    yield Array("attention scores", "softmax [B,H,S,S]", s.scores * (F32 + c))
    yield Array("attention scores", "its sums", (3 if a.sinks else 2) * t * s.heads * F32)
    if a.score_softcap:
        yield Array("attention scores", "soft cap [B,H,S,S]", s.scores * F32)
    if a.window:
        yield Array("attention scores", "mask of each layer [B,H,S,S]", s.scores)


def outputs(s: Sizes) -> Iterator[Array]:
    """What ``remat="dots"`` keeps of one attention: outputs of its matmuls without a batch axis."""
    a, c, t = s.model.attention, s.itemsize, s.tokens
    if a.kind == "latent":
        down = sum(_ranks(s)) + a.rope_head_dim
        up = s.heads * (2 * a.head_dim + a.rope_head_dim + a.value_head_dim)
        yield Array("attention", "latents", t * down * c)
        yield Array("attention", "queries, keys, values", t * up * c)
    else:
        yield Array("attention", "queries, keys, values", t * a.head_dim * (s.heads + 2 * s.kv_heads) * c)
    yield Array("attention", "output projection", t * s.model.dim * c)


def shared_by_layers(s: Sizes) -> Iterator[Array]:
    """Kept once for all layers: rotary angles, and the mask where no layer has one of its own."""
    a, t = s.model.attention, s.tokens
    rotated = a.rope_head_dim if a.kind == "latent" else rotated_dims(a.rope, a.head_dim)
    yield Array("attention", "rotary angles", 4 * t * (rotated // 2) * F32)
    if s.core == "cudnn":
        if not a.window:
            yield Array("attention scores", "mask as a bias [B,1,S,S]", t * s.seq * s.itemsize)
        return
    yield Array("attention scores", "mask [B,H,S,S]", s.scores * (F32 if a.window else F32 + 1))


def backward(s: Sizes) -> list[Array]:
    """Beside what is kept, when the gradient is at a block's attention."""
    d, t = s.model.dim, s.tokens
    found = [
        Array("norms", "gradients of the residual stream and the norm", 4 * t * d * F32),
        Array("attention", "queries, keys, values, output and their gradients", 2 * t * _numbers(s) * s.itemsize),
    ]
    if s.core == "xla":
        found.append(Array("attention scores", "gradients of softmax and scores [B,H,S,S]", 2 * s.scores * F32))
        if s.model.remat == "none":
            found.append(Array("attention scores", "this layer's softmax", s.scores * F32))
    return found


def forward(s: Sizes) -> list[Array]:
    """Of one attention without a backward pass."""
    c, t = s.itemsize, s.tokens
    found = [
        Array("norms", "residual stream and normalised input", 2 * t * s.model.dim * c),
        Array("attention", "queries, keys, values, output", t * _numbers(s) * c),
    ]
    if s.core == "xla":
        found.append(Array("attention", "keys and values, laid out for the products", t * _keys_and_values(s) * c))
        found.append(Array("attention scores", "scores, softmax, mask", s.scores * (F32 + c) + t * s.seq))
    return found
