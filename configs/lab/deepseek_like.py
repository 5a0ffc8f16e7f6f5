"""DeepSeek-V3-like lab model: sigmoid scores with a selection bias (no balance loss), a shared expert, first layer
dense.

    python -m experiments.run --config=configs/lab/deepseek_like.py:tiny --workdir=runs/deepseek_like

``:h100`` has 32 experts of width 96, top-4, 1 shared, scale 2.5 (DeepSeek-V3: 256 of width 2048, top-8, 1 shared).
Attention is plain multi-head: latent attention comes with the imported models.
"""

from ml_collections import ConfigDict

from configs import lab


def get_config(variant: str = "tiny") -> ConfigDict:
    config = lab.make("deepseek_like", variant)
    moe = config.model.moe
    moe.num_experts, moe.expert_dim, moe.router.k = (16, 48, 4) if variant == "tiny" else (32, 96, 4)
    moe.router.name = "sigmoid_bias"
    moe.router.scale = 2.5
    moe.first_dense = 1
    moe.shared_experts = 1
    moe.losses = ConfigDict({"balance": 0.0, "z": 0.0})
    if variant == "h100":
        config.train.steps = 700  # slower than its siblings: 800 steps would take more than 90 s
    return config
