"""Qwen3-235B-A22B (2505.09388): Qwen3-30B-A3B, larger. config.json of Qwen/Qwen3-235B-A22B."""

from ml_collections import ConfigDict

from configs import models
from configs.models import qwen3_30b_a3b

MODEL = qwen3_30b_a3b.MODEL | {
    "num_layers": 94,
    "dim": 4096,
    "ffn_dim": 12_288,
    "attention.num_heads": 64,
    "moe.expert_dim": 1536,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("qwen3_235b_a22b", variant, MODEL, balance=0.001)
