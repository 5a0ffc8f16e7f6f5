"""DeepSeek-V3 (2412.19437): latent attention; sigmoid scores with a selection bias, groups scored by their best two.

config.json of deepseek-ai/DeepSeek-V3; checked: defaults of ``DeepseekV3Config``. The multi-token-prediction layer is
left out.
"""

from ml_collections import ConfigDict

from configs import models
from configs.models import deepseek_v2

MODEL = deepseek_v2.MODEL | {
    "vocab_size": 129_280,
    "num_layers": 61,
    "dim": 7168,
    "ffn_dim": 18_432,
    "attention.rope.mscale": 1.0,
    "attention.rope.mscale_all_dim": 1.0,
    "moe.first_dense": 3,
    "moe.num_experts": 256,
    "moe.expert_dim": 2048,
    "moe.shared_experts": 1,
    "moe.router.name": "sigmoid_bias",
    "moe.router.k": 8,
    "moe.router.groups_kept": 4,
    "moe.router.group_score": "top2_sum",
    "moe.router.renormalise": True,
    "moe.router.scale": 2.5,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("deepseek_v3", variant, MODEL)
