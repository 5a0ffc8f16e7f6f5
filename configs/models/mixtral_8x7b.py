"""Mixtral-8x7B (2401.04088): 8 coarse experts in every layer, softmax of the top-2 logits, grouped-query attention.

config.json of mistralai/Mixtral-8x7B-v0.1; checked: defaults of ``MixtralConfig``.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 32_000,
    "num_layers": 32,
    "dim": 4096,
    "ffn_dim": 14_336,
    "norm_eps": 1e-5,
    "attention.num_heads": 32,
    "attention.num_kv_heads": 8,
    "attention.head_dim": 128,
    "attention.rope_theta": 1e6,
    "moe.num_experts": 8,
    "moe.expert_dim": 14_336,
    "moe.router.name": "softmax_of_topk",
    "moe.router.k": 2,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("mixtral_8x7b", variant, MODEL, balance=0.02)
