"""OLMoE-1B-7B (2409.02060): 64 fine experts in every layer, top-8 of softmax as it is, QK-norm over the projection.

config.json of allenai/OLMoE-1B-7B-0924; checked: defaults of ``OlmoeConfig``, but expert width 1024 from the paper.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 50_304,
    "num_layers": 16,
    "dim": 2048,
    "ffn_dim": 1024,
    "norm_eps": 1e-5,
    "attention.num_heads": 16,
    "attention.num_kv_heads": 16,
    "attention.head_dim": 128,
    "attention.qk_norm": True,
    "attention.qk_norm_over": "projection",
    "moe.num_experts": 64,
    "moe.expert_dim": 1024,
    "moe.router.k": 8,
    "moe.router.renormalise": False,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("olmoe_1b_7b", variant, MODEL, balance=0.01, z=0.001)
