"""DeepSeekMoE-2B (2401.06066, section 4): the validation model, 63 fine experts and 1 shared in every layer.

No weights were published. Layers, width, heads and experts are those of the paper's appendix A. An expert is a quarter
of the FFN, whose width the paper leaves out: 853 is from its count of expert parameters (1.89 B, table 2). The
vocabulary "8K" is taken as 8,000.
"""

from ml_collections import ConfigDict

from configs import models
from configs.models import deepseek_moe_16b

MODEL = deepseek_moe_16b.MODEL | {
    "vocab_size": 8000,
    "num_layers": 9,
    "dim": 1280,
    "ffn_dim": 4 * 853,
    "attention.num_heads": 10,
    "attention.num_kv_heads": 10,
    "moe.first_dense": 0,
    "moe.num_experts": 63,
    "moe.expert_dim": 853,
    "moe.shared_experts": 1,
    "moe.router.k": 7,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("deepseek_moe_2b", variant, MODEL, balance=0.01)
