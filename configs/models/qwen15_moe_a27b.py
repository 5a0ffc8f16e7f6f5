"""Qwen1.5-MoE-A2.7B: 60 fine experts and 4 shared behind a sigmoid gate, biases on query, key and value.

config.json of Qwen/Qwen1.5-MoE-A2.7B; checked: defaults of ``Qwen2MoeConfig``.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 151_936,
    "num_layers": 24,
    "dim": 2048,
    "ffn_dim": 5632,
    "attention.num_heads": 16,
    "attention.num_kv_heads": 16,
    "attention.head_dim": 128,
    "attention.bias": True,
    "attention.rope_theta": 1e6,
    "moe.num_experts": 60,
    "moe.expert_dim": 1408,
    "moe.shared_experts": 4,
    "moe.shared_gate": "sigmoid",
    "moe.router.k": 4,
    "moe.router.renormalise": False,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("qwen15_moe_a27b", variant, MODEL, balance=0.001)
