"""DeepSeek-V2 (2405.04434): latent attention with query compression; 160 experts in 8 groups, top-6 of the best 3.

config.json of deepseek-ai/DeepSeek-V2.
"""

from ml_collections import ConfigDict

from configs import models
from configs.models import deepseek_v2_lite

MODEL = deepseek_v2_lite.MODEL | {
    "num_layers": 60,
    "dim": 5120,
    "ffn_dim": 12_288,
    "attention.num_heads": 128,
    "attention.num_kv_heads": 128,
    "attention.query_rank": 1536,
    "moe.num_experts": 160,
    "moe.expert_dim": 1536,
    "moe.router.groups": 8,
    "moe.router.groups_kept": 3,
    "moe.router.scale": 16.0,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("deepseek_v2", variant, MODEL, balance=0.003)
