"""Parameters, floating-point operations and cache bytes from the config alone: arithmetic, no devices."""

import dataclasses
import math

from moejax.config import AttentionConfig, ModelConfig
from moejax.experts import GATED
from moejax.model import moe_layer_ids
from moejax.moe import shared_width
from moejax.routing import router_arrays


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of trainable parameters."""

    total: int
    active: int
    """Of those, used for one token: all but the routed experts that the router leaves out. With zero-computation
    experts (``moe.zero_experts``) a token uses fewer than k others: the mean under a uniform choice is counted."""
    embedding: int
    """Of input and output, and the bias on the logits."""
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    vectors: int
    """Norm scales and biases that one token uses (but for those of the model's norms, they are in the other groups
    too): no matmul."""
    prediction: int = 0
    """Of the multi-token-prediction modules, beside embedding and head, which they share with the model. A token of the
    main model uses none of them, and they are in no other group."""


def ffn_parameters(dim: int, hidden: int, activation: str) -> int:
    """Of one FFN without biases."""
    return dim * hidden * ffn_matrices(activation)


def ffn_matrices(activation: str) -> int:
    """Gate, up, down; or up, down."""
    return 3 if activation in GATED else 2


def attention_parameters(a: AttentionConfig, dim: int) -> tuple[int, int]:
    """``(matrices, vectors)`` of one attention: numbers in its projections; norm scales, biases and sinks."""
    h, g, n = a.num_heads, a.num_kv_heads, a.head_dim
    vectors = (h if a.sinks else 0) + (dim if a.output_bias else 0)
    if a.kind == "latent":
        rank, query = a.latent_rank, n + a.rope_head_dim
        matrices = dim * (rank + a.rope_head_dim) + rank * h * (n + a.value_head_dim) + h * a.value_head_dim * dim
        matrices += dim * a.query_rank + a.query_rank * h * query if a.query_rank else dim * h * query
        vectors += rank + a.query_rank + (a.query_rank + rank + a.rope_head_dim if a.bias else 0)
        return matrices, vectors
    if a.qk_norm:
        vectors += 2 * n if a.qk_norm_over == "head" else (h + g) * n
    return dim * n * 2 * (h + g), vectors + (n * (h + 2 * g) if a.bias else 0)


def attentions(config: ModelConfig) -> int:
    """Attention modules of the model; each has a norm, and in LongCat's blocks a dense FFN of its own."""
    return config.num_layers * (2 if config.wiring == "longcat" else 1)


def dense_ffns(config: ModelConfig) -> int:
    """Dense FFNs of the model, shared experts apart."""
    return attentions(config) if config.wiring == "longcat" else config.num_layers - len(moe_layer_ids(config))


def norm_parameters(config: ModelConfig) -> int:
    """Numbers of one norm over the model's dimension."""
    return config.dim * (2 if config.norm == "layer_bias" else 1)


def block_norms(config: ModelConfig) -> int:
    """Numbers in the norms of all blocks, those inside attention apart."""
    return attentions(config) * (4 if config.sandwich_norm else 2) * norm_parameters(config)


def expert_biases(config: ModelConfig) -> int:
    """Numbers in the biases of one routed expert; each part that it is stored in has a down bias."""
    moe = config.moe
    return (ffn_matrices(config.activation) - 1) * moe.expert_dim + moe.parts * config.dim if moe.expert_bias else 0


def router_parameters(config: ModelConfig) -> tuple[int, int]:
    """``(matrices, vectors)`` of one router; state that the optimizer never sees is no parameter."""
    moe = config.moe
    specs = router_arrays(moe.router, config.dim, moe.num_experts + moe.zero_experts).values()
    shapes = [spec.shape for spec in specs if spec.kind == "param"]
    return sum(math.prod(s) for s in shapes if len(s) > 1), sum(math.prod(s) for s in shapes if len(s) == 1)


def chosen_experts(config: ModelConfig) -> float:
    """Experts with weights that a token uses in an MoE layer: k, or the mean where some choices are zero experts."""
    moe = config.moe
    return moe.router.k * moe.num_experts / (moe.num_experts + moe.zero_experts)


def parameters(config: ModelConfig) -> Parameters:
    """Counts each group of parameters; a test holds the total to the model's real arrays."""
    moe, d = config.moe, config.dim
    num_moe, num_attention = len(moe_layer_ids(config)), attentions(config)
    logits_bias = config.vocab_size if config.logit_bias else 0
    embedding = config.vocab_size * d * (1 if config.tie_embeddings else 2) + logits_bias
    projections, small = attention_parameters(config.attention, d)
    norms = block_norms(config) + norm_parameters(config)
    dense = dense_ffns(config) * ffn_parameters(d, config.ffn_dim, config.activation)
    biases = expert_biases(config)
    expert = ffn_parameters(d, moe.expert_dim, config.activation) + biases
    gate = d if moe.shared_experts and moe.shared_gate == "sigmoid" else 0
    kernel, logit_bias = router_parameters(config) if num_moe else (0, 0)
    attention = num_attention * (projections + small)
    routed = num_moe * moe.num_experts * expert
    shared = num_moe * (ffn_parameters(d, shared_width(moe), config.activation) + gate)
    router = num_moe * (kernel + logit_bias)
    total = embedding + attention + norms + dense + routed + shared + router
    chosen = chosen_experts(config)
    idle = round(num_moe * (moe.num_experts - chosen) * expert)
    vectors = norms + num_attention * small + num_moe * logit_bias + round(num_moe * chosen * biases) + logits_bias
    active, further = total - idle, prediction_parameters(config)
    return Parameters(total + further, active, embedding, attention, dense, routed, shared, router, vectors, further)


def prediction_parameters(config: ModelConfig) -> int:
    """Numbers in the multi-token-prediction modules: each is a projection of two inputs, three norms, and one more
    layer like the last."""
    if not config.mtp_layers:
        return 0
    last = len(moe_layer_ids(config)) and moe_layer_ids(config)[-1] == config.num_layers - 1
    moe = dataclasses.replace(config.moe, first_dense=0 if last else 2, every=1, dense_layers=())
    two, one = (parameters(dataclasses.replace(config, num_layers=n, mtp_layers=0, moe=moe)).total for n in (2, 1))
    return config.mtp_layers * (two - one + 2 * config.dim**2 + 3 * norm_parameters(config))


def places_seen(seq_len: int, window: int, kind: str = "sliding") -> float:
    """Mean number of places that a token sees in a sequence, itself included; ``window`` 0: all before it. ``kind``:
    of the window, as ``attention.window_kind``."""
    if not 0 < window < seq_len:
        return (seq_len + 1) / 2
    if kind == "chunks":
        chunks, rest = divmod(seq_len, window)
        return (chunks * window * (window + 1) + rest * (rest + 1)) / (2 * seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def windowed_attentions(config: ModelConfig) -> int:
    """Attention modules that have the window."""
    a = config.attention
    if not a.window:
        return 0
    return len(a.window_layers or range(config.num_layers)) * (attentions(config) // config.num_layers)


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one token's forward pass: 2 per multiply-add of active matmuls, and causal attention at length S.

    Attention counts scores and values over the (S + 1) / 2 places that a token sees on average, or fewer in a layer
    with a window; latent attention as it is trained, with keys and values made for each head. Norms, softmax and
    routing arithmetic are left out, as usual for model FLOP utilisation. Training is three times this.
    """
    p, a = parameters(config), config.attention
    lookup = config.vocab_size * config.dim * (0 if config.tie_embeddings else 1)
    matmul = p.active - lookup - p.vectors
    one_place = 2 * a.num_heads * 2 * a.head_dim
    if a.kind == "latent":
        one_place = 2 * a.num_heads * (a.head_dim + a.rope_head_dim + a.value_head_dim)
    windowed = windowed_attentions(config)
    whole = attentions(config) - windowed
    places = whole * places_seen(seq_len, 0) + windowed * places_seen(seq_len, a.window, a.window_kind)
    return 2.0 * matmul + one_place * places


def cache_bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes that a token takes in the decoding cache over all layers, in bfloat16 by default.

    Keys and values of every key/value head; of latent attention the latent and the one rotary key. A layer with a
    window needs no more than its last ``window`` tokens; they are counted like others here.
    """
    a = config.attention
    numbers = a.latent_rank + a.rope_head_dim if a.kind == "latent" else 2 * a.num_kv_heads * a.head_dim
    return attentions(config) * numbers * itemsize
