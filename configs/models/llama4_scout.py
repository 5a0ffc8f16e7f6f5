"""Llama-4-Scout, the language model: one of 16 experts by sigmoid, whose score weighs the expert's input, beside one
shared expert; attention in chunks of 8,192 with rotary positions and a norm of queries and keys after them, but in
every fourth layer whole, without positions, with a temperature that grows.

config.json of meta-llama/Llama-4-Scout-17B-16E; checked: defaults of ``Llama4TextConfig``, but rotary scaling, which is
that of the published files as they are now (factor 16, both bounds 1). The vision encoder is not built.
"""

from ml_collections import ConfigDict

from configs import models

LAYERS = 48
MODEL = {
    "vocab_size": 202_048,
    "num_layers": LAYERS,
    "dim": 5120,
    "ffn_dim": 16_384,
    "norm_eps": 1e-5,
    "attention.num_heads": 40,
    "attention.num_kv_heads": 8,
    "attention.head_dim": 128,
    "attention.window": 8192,
    "attention.window_layers": tuple(i for i in range(LAYERS) if i % 4 != 3),
    "attention.window_kind": "chunks",
    "attention.no_rope_layers": tuple(range(3, LAYERS, 4)),
    "attention.temperature": 0.1,
    "attention.temperature_length": 8192,
    "attention.qk_unit_norm": True,
    "attention.rope_theta": 5e5,
    "attention.rope.layout": "interleaved",
    "attention.rope.scaling": "llama3",
    "attention.rope.factor": 16.0,
    "attention.rope.original_length": 8192,
    "attention.rope.low_freq_factor": 1.0,
    "attention.rope.high_freq_factor": 1.0,
    "moe.num_experts": 16,
    "moe.expert_dim": 8192,
    "moe.shared_experts": 1,
    "moe.weigh": "input",
    "moe.router.name": "topk_of_sigmoid",
    "moe.router.k": 1,
    "moe.router.renormalise": False,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("llama4_scout", variant, MODEL, balance=0.001)
