"""Phi-3.5-MoE: 16 experts, two of them by SparseMixer-v2 (2409.12136), layer norms, biases in attention and on the
logits, LongRoPE to 131,072 tokens.

config.json of microsoft/Phi-3.5-MoE-instruct; checked: sizes are the defaults of ``PhimoeConfig``, rotary factors and
biases those of a public training set-up that copies the file. The factors are written without the digits of their
float32 rounding. Up to 4,096 places take the short ones, a longer batch or cache the long ones. Training takes the
plain gradient of the gate weights, not the paper's estimate of a random choice.
"""

from ml_collections import ConfigDict

from configs import models

# fmt: off
SHORT = (
    1.0, 1.04, 1.04, 1.04, 1.05, 1.05, 1.05, 1.05, 1.05, 1.05, 1.05, 1.05, 1.05, 1.05, 1.06, 1.06, 1.07, 1.07,
    1.07, 1.07, 1.14, 1.16, 1.16, 1.16, 1.16, 1.18, 1.2, 1.32, 1.34, 1.35, 1.4, 1.48, 1.5, 1.59, 1.65, 1.72,
    1.9, 1.91, 1.91, 1.99, 2.0, 2.0, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01,
    2.01, 2.01, 2.01, 2.01, 2.01, 2.1, 2.32, 2.42, 2.59, 2.79,
)
LONG = (
    1.02, 1.03, 1.04, 1.05, 1.05, 1.05, 1.06, 1.06, 1.06, 1.06, 1.06, 1.06, 1.1, 1.18, 1.18, 1.37, 1.49, 2.11,
    2.89, 3.95, 4.3, 6.43, 8.09, 10.69, 12.05, 18.23, 18.84, 19.9, 21.42, 26.2, 34.28, 34.59, 38.73, 40.22,
    42.54, 44.0, 47.59, 54.75, 56.19, 57.44, 57.49, 61.2, 61.54, 61.75, 61.78, 62.07, 63.11, 63.43, 63.56,
    63.71, 63.92, 63.94, 63.94, 63.96, 63.98, 64.03, 64.03, 64.03, 64.04, 64.1, 64.19, 64.21, 64.75, 64.96,
)
# fmt: on
MODEL = {
    "vocab_size": 32_064,
    "num_layers": 32,
    "dim": 4096,
    "ffn_dim": 6400,
    "norm": "layer_bias",
    "norm_eps": 1e-5,
    "logit_bias": True,
    "attention.num_heads": 32,
    "attention.num_kv_heads": 8,
    "attention.head_dim": 128,
    "attention.bias": True,
    "attention.output_bias": True,
    "attention.rope.scaling": "longrope",
    "attention.rope.original_length": 4096,
    "attention.rope.short_factor": SHORT,
    "attention.rope.long_factor": LONG,
    "attention.rope.short_mscale": 1.243163121016122,
    "attention.rope.long_mscale": 1.243163121016122,
    "moe.num_experts": 16,
    "moe.expert_dim": 6400,
    "moe.router.name": "sparsemixer",
    "moe.router.k": 2,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("phi35_moe", variant, MODEL, balance=0.001)
