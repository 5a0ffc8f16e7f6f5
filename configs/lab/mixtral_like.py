"""Mixtral-like lab model: few coarse experts in every layer, softmax of the top-2 logits, grouped-query attention.

    python -m experiments.run --config=configs/lab/mixtral_like.py:tiny --workdir=runs/mixtral_like

``:h100`` has 8 experts of width 448, top-2 (Mixtral-8x7B: 8 of width 14336, top-2; 4 query heads share a key/value
head).
"""

from ml_collections import ConfigDict

from configs import lab


def get_config(variant: str = "tiny") -> ConfigDict:
    config = lab.make("mixtral_like", variant)
    moe = config.model.moe
    moe.num_experts, moe.expert_dim, moe.router.k = (8, 96, 2) if variant == "tiny" else (8, 416, 2)
    moe.router.name = "softmax_of_topk"
    moe.losses = ConfigDict({"balance": 0.02, "z": 0.0})
    config.model.attention.num_kv_heads = 1
    return config
