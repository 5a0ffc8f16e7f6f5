"""DeepSeekMoE-145B (2401.06066, section 7): 128 fine experts and 4 shared, first layer dense, top-12.

No weights were published. An expert is an eighth of the FFN, whose width the paper leaves out: 1408 is what the
published 144.6 B parameters need. The vocabulary is that of the 16B model.
"""

from ml_collections import ConfigDict

from configs import models
from configs.models import deepseek_moe_16b

MODEL = deepseek_moe_16b.MODEL | {
    "num_layers": 62,
    "dim": 4096,
    "ffn_dim": 8 * 1408,
    "attention.num_heads": 32,
    "attention.num_kv_heads": 32,
    "moe.num_experts": 128,
    "moe.shared_experts": 4,
    "moe.router.k": 12,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("deepseek_moe_145b", variant, MODEL, balance=0.003)
