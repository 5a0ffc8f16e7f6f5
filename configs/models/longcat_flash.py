"""LongCat-Flash (2509.01322): two latent attentions and two dense FFNs in each block, experts on a shortcut around
the second half; 512 experts and 256 that return their input, so that tokens take more or less computation.

config.json of meituan-longcat/LongCat-Flash-Chat; checked: defaults of ``LongcatFlashConfig``.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 131_072,
    "num_layers": 28,
    "dim": 6144,
    "ffn_dim": 12_288,
    "wiring": "longcat",
    "norm_eps": 1e-5,
    "attention.kind": "latent",
    "attention.num_heads": 64,
    "attention.num_kv_heads": 64,
    "attention.head_dim": 128,
    "attention.query_rank": 1536,
    "attention.latent_rank": 512,
    "attention.rope_head_dim": 64,
    "attention.value_head_dim": 128,
    "attention.scale_latents": True,
    "attention.rope_theta": 1e7,
    "attention.rope.layout": "interleaved",
    "moe.num_experts": 512,
    "moe.expert_dim": 2048,
    "moe.zero_experts": 256,
    "moe.router.name": "softmax_bias",
    "moe.router.k": 12,
    "moe.router.renormalise": False,
    "moe.router.scale": 6.0,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("longcat_flash", variant, MODEL)
