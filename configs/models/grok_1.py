"""Grok-1: 8 experts of GeGLU, norms before and after attention and experts, capped attention scores.

Checked: ``run.py`` and ``model.py`` of github.com/xai-org/grok-1, the release. What it calls embedding multiplier,
78.38, is sqrt(dim) (``scale_embeddings``); its router is a softmax over all experts, and the two best are not
renormalised; scores are 30 tanh(q k / sqrt(128) / 30). It holds no training code: the balance loss is ours.
"""

from ml_collections import ConfigDict

from configs import models

MODEL = {
    "vocab_size": 131_072,
    "num_layers": 64,
    "dim": 6144,
    "ffn_dim": 32_768,
    "activation": "geglu",
    "tie_embeddings": True,
    "scale_embeddings": True,
    "norm_eps": 1e-5,
    "sandwich_norm": True,
    "logit_scale": 0.5773502691896257,
    "attention.num_heads": 48,
    "attention.num_kv_heads": 8,
    "attention.head_dim": 128,
    "attention.score_softcap": 30.0,
    "moe.num_experts": 8,
    "moe.expert_dim": 32_768,
    "moe.router.k": 2,
    "moe.router.renormalise": False,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("grok_1", variant, MODEL, balance=0.01)
