"""Mixtral-8x22B: Mixtral-8x7B, larger. config.json of mistralai/Mixtral-8x22B-v0.1."""

from ml_collections import ConfigDict

from configs import models
from configs.models import mixtral_8x7b

MODEL = mixtral_8x7b.MODEL | {
    "num_layers": 56,
    "dim": 6144,
    "ffn_dim": 16_384,
    "attention.num_heads": 48,
    "moe.expert_dim": 16_384,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("mixtral_8x22b", variant, MODEL, balance=0.001)
