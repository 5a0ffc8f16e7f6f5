"""The first command: a small MoE trained on text from this machine's own Python, and Table 1 of Capacity-Aware
Inference on it.

    bash scripts/quickstart.sh            # about 5 minutes on 2 cores after set-up
    bash scripts/quickstart.sh --short    # a minute, to see that everything works; its model is undertrained

It is ``configs/papers/capacity_aware.py:tiny`` without its other tables; ``:short`` cuts the training and the table.
"""

from ml_collections import ConfigDict

from configs.papers import capacity_aware


def get_config(variant: str = "full") -> ConfigDict:
    if variant not in ("full", "short"):
        raise ValueError(f"variant {variant!r}: choose full or short")
    config = capacity_aware.get_config("tiny")
    config.name = f"quickstart:{variant}"
    config.table.tables = ("1",)
    if variant == "short":
        config.train.steps = 30
        config.train.warmup_steps = 5
        config.train.log_every = 10
        config.train.eval_every = 30
        config.train.checkpoint_every = 30
        config.eval.max_tokens = 24 * 128
        config.eval.final_max_tokens = 24 * 128
        config.eval.task_limit = 12
        config.table.factors = (1.0, 0.5)
        config.table.max_tokens = 12 * 128 * 8
    return config
