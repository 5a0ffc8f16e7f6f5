"""DeepSeek-V2-Lite (2405.04434): latent attention without query compression, 64 fine experts and 2 shared.

config.json of deepseek-ai/DeepSeek-V2-Lite; sizes checked against two training set-ups that copy it.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 102_400,
    "num_layers": 27,
    "dim": 2048,
    "ffn_dim": 10_944,
    "attention.kind": "latent",
    "attention.num_heads": 16,
    "attention.num_kv_heads": 16,
    "attention.head_dim": 128,
    "attention.latent_rank": 512,
    "attention.rope_head_dim": 64,
    "attention.value_head_dim": 128,
    "attention.rope.layout": "interleaved",
    "attention.rope.scaling": "yarn",
    "attention.rope.factor": 40.0,
    "attention.rope.original_length": 4096,
    "attention.rope.mscale": 0.707,
    "attention.rope.mscale_all_dim": 0.707,
    "moe.first_dense": 1,
    "moe.num_experts": 64,
    "moe.expert_dim": 1408,
    "moe.shared_experts": 2,
    "moe.router.k": 6,
    "moe.router.renormalise": False,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("deepseek_v2_lite", variant, MODEL, balance=0.001)
