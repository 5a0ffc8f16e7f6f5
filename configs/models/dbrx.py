"""DBRX: 16 experts, 4 of them for each token, layer norms without a bias, and queries, keys and values clipped to 8.

config.json of databricks/dbrx-base; the file itself could not be compared: its sizes are those of copies of it, and the
architecture was checked with ``DbrxForCausalLM``, whose norms have PyTorch's epsilon of 1e-5.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 100_352,
    "num_layers": 40,
    "dim": 6144,
    "ffn_dim": 10_752,
    "norm": "layer",
    "norm_eps": 1e-5,
    "attention.num_heads": 48,
    "attention.num_kv_heads": 8,
    "attention.head_dim": 128,
    "attention.clip_qkv": 8.0,
    "attention.rope_theta": 5e5,
    "moe.num_experts": 16,
    "moe.expert_dim": 10_752,
    "moe.router.k": 4,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("dbrx", variant, MODEL, balance=0.05)
