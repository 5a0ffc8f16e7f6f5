"""OLMoE-like lab model: fine-grained experts in every layer, top-k of softmax without renormalisation, QK-norm.

    python -m experiments.run --config=configs/lab/olmoe_like.py:tiny --workdir=runs/olmoe_like

``:h100`` has 32 experts of width 96, top-4 (OLMoE-1B-7B: 64 of width 1024, top-8).
"""

from ml_collections import ConfigDict

from configs import lab


def get_config(variant: str = "tiny") -> ConfigDict:
    config = lab.make("olmoe_like", variant)
    moe = config.model.moe
    moe.num_experts, moe.expert_dim, moe.router.k = (16, 48, 4) if variant == "tiny" else (32, 96, 4)
    moe.router.renormalise = False
    config.model.attention.qk_norm = True
    return config
