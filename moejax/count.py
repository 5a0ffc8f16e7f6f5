"""Parameters and floating-point operations from the config alone: arithmetic, no devices."""

import dataclasses

from moejax.config import ModelConfig
from moejax.experts import GATED
from moejax.model import moe_layer_ids
from moejax.routing import FAMILIES


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of trainable parameters."""

    total: int
    active: int
    """Of those, used for one token: all but the routed experts that the router leaves out."""
    embedding: int
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    vectors: int
    """Norm scales and biases (those of attention are in ``attention`` too): no matmul."""


def ffn_parameters(dim: int, hidden: int, activation: str) -> int:
    return dim * hidden * (3 if activation in GATED else 2)


def parameters(config: ModelConfig) -> Parameters:
    """Counts each group of parameters; a test holds the total to the model's real arrays."""
    a, moe, d = config.attention, config.moe, config.dim
    num_moe = len(moe_layer_ids(config))
    embedding = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    projections = d * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
    small = a.head_dim * (a.num_heads + 2 * a.num_kv_heads) if a.bias else 0
    small += 2 * a.head_dim if a.qk_norm else 0
    attention = config.num_layers * (projections + small)
    norms = (2 * config.num_layers + 1) * d
    vectors = norms + config.num_layers * small
    dense = (config.num_layers - num_moe) * ffn_parameters(d, config.ffn_dim, config.activation)
    expert = ffn_parameters(d, moe.expert_dim, config.activation)
    routed = num_moe * moe.num_experts * expert
    gate = d if moe.shared_experts and moe.shared_gate == "sigmoid" else 0
    shared = num_moe * (moe.shared_experts * expert + gate)
    arrays = FAMILIES[moe.router.name].arrays(d, moe.num_experts)
    router = num_moe * sum(_size(s.shape) for s in arrays.values() if s.kind == "param")
    total = embedding + attention + norms + dense + routed + shared + router
    idle = num_moe * (moe.num_experts - moe.router.k) * expert
    return Parameters(total, total - idle, embedding, attention, dense, routed, shared, router, vectors)


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one token's forward pass: 2 per multiply-add of active matmuls, and causal attention at length S.

    Attention counts scores and values over the (S + 1) / 2 places that a token sees on average. Norms, softmax and
    routing arithmetic are left out, as usual for model FLOP utilisation. Training is three times this.
    """
    p = parameters(config)
    lookup = config.vocab_size * config.dim * (0 if config.tie_embeddings else 1)
    matmul = p.active - lookup - p.vectors
    a = config.attention
    attention = config.num_layers * 2 * 2 * a.num_heads * a.head_dim * (seq_len + 1) / 2
    return 2.0 * matmul + attention


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
