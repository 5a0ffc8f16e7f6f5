"""gpt-oss-120b (2508.10925): attention sinks, a window in every second layer, clamped swiglu, biases everywhere.

config.json of openai/gpt-oss-120b; checked: defaults of ``GptOssConfig``, but layers and YaRN. How the router was
balanced in training is not published.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 201_088,
    "num_layers": 36,
    "dim": 2880,
    "ffn_dim": 2880,
    "activation": "swiglu_clamped",
    "norm_eps": 1e-5,
    "attention.num_heads": 64,
    "attention.num_kv_heads": 8,
    "attention.head_dim": 64,
    "attention.bias": True,
    "attention.output_bias": True,
    "attention.sinks": True,
    "attention.window": 128,
    "attention.window_layers": tuple(range(0, 36, 2)),
    "attention.rope_theta": 150_000.0,
    "attention.rope.scaling": "yarn",
    "attention.rope.factor": 32.0,
    "attention.rope.original_length": 4096,
    "attention.rope.truncate": False,
    "moe.num_experts": 128,
    "moe.expert_dim": 2880,
    "moe.expert_bias": True,
    "moe.router.name": "softmax_of_topk",
    "moe.router.k": 4,
    "moe.router.bias": True,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("gpt_oss_120b", variant, MODEL, balance=0.001)
