"""DeepSeekMoE-16B (2401.06066): 64 fine experts and 2 shared, first layer dense, top-6 of softmax as it is.

config.json of deepseek-ai/deepseek-moe-16b-base.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 102_400,
    "num_layers": 28,
    "dim": 2048,
    "ffn_dim": 10_944,
    "attention.num_heads": 16,
    "attention.num_kv_heads": 16,
    "attention.head_dim": 128,
    "moe.first_dense": 1,
    "moe.num_experts": 64,
    "moe.expert_dim": 1408,
    "moe.shared_experts": 2,
    "moe.router.k": 6,
    "moe.router.renormalise": False,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("deepseek_moe_16b", variant, MODEL, balance=0.001)
