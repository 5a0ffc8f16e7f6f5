"""gpt-oss-20b (2508.10925): gpt-oss-120b with fewer layers and experts. config.json of openai/gpt-oss-20b."""

from ml_collections import ConfigDict

from configs import models
from configs.models import gpt_oss_120b

MODEL = gpt_oss_120b.MODEL | {
    "num_layers": 24,
    "attention.window_layers": tuple(range(0, 24, 2)),
    "moe.num_experts": 32,
}


def get_config(variant: str = "full") -> ConfigDict:
    return models.make("gpt_oss_20b", variant, MODEL, balance=0.001)
