"""Qwen3-30B-A3B (2505.09388): 128 fine experts in every layer, top-8 renormalised, QK-norm over each head.

config.json of Qwen/Qwen3-30B-A3B; sizes checked against a training set-up that copies it.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 151_936,
    "num_layers": 48,
    "dim": 2048,
    "ffn_dim": 6144,
    "attention.num_heads": 32,
    "attention.num_kv_heads": 4,
    "attention.head_dim": 128,
    "attention.qk_norm": True,
    "attention.rope_theta": 1e6,
    "moe.num_experts": 128,
    "moe.expert_dim": 768,
    "moe.router.k": 8,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("qwen3_30b_a3b", variant, MODEL, balance=0.001)
