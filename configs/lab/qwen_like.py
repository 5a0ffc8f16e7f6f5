"""Qwen1.5-MoE-like lab model: fine-grained experts and gated shared experts, biases on query, key and value.

    python -m experiments.run --config=configs/lab/qwen_like.py:tiny --workdir=runs/qwen_like

``:h100`` has 32 experts of width 80, top-4, and 4 shared behind a sigmoid gate (Qwen1.5-MoE-A2.7B: 60, top-4, 4
shared).
"""

from ml_collections import ConfigDict

from configs import lab


def get_config(variant: str = "tiny") -> ConfigDict:
    config = lab.make("qwen_like", variant)
    moe = config.model.moe
    moe.num_experts, moe.expert_dim, moe.router.k = (16, 40, 4) if variant == "tiny" else (32, 80, 4)
    moe.router.renormalise = False
    moe.shared_experts, moe.shared_gate = 4, "sigmoid"
    moe.losses = ConfigDict({"balance": 0.001, "z": 0.0})
    config.model.attention.bias = True
    if variant == "h100":
        config.train.steps = 700  # slower than its siblings: 800 steps would take more than 90 s
    return config
