"""Qwen2-57B-A14B (2407.10671): Qwen1.5-MoE's architecture with grouped-query attention and top-8 of 64 experts.

config.json of Qwen/Qwen2-57B-A14B.
"""

from ml_collections import ConfigDict

from configs import models
from configs.models import qwen15_moe_a27b

MODEL = qwen15_moe_a27b.MODEL | {
    "num_layers": 28,
    "dim": 3584,
    "ffn_dim": 18_944,
    "attention.num_heads": 28,
    "attention.num_kv_heads": 4,
    "moe.num_experts": 64,
    "moe.expert_dim": 2560,
    "moe.shared_experts": 8,
    "moe.router.k": 8,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("qwen2_57b_a14b", variant, MODEL, balance=0.001)
