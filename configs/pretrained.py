"""Published or earlier weights as they are: perplexity and expert load on text; or fine-tuned from there.

    python -m experiments.run --config=configs/pretrained.py:FOLDER --workdir=runs/olmoe
    python -m experiments.run --config=configs/pretrained.py:FOLDER --workdir=runs/tuned --config.train.steps=200

``FOLDER``: a Hugging Face folder of a supported model (``docs/bring_your_checkpoint.md``), or a workdir of ours. The
model and the tokenizer are the folder's; ``--config.model.moe.capacity_factor`` and the other settings that change no
weight are this config's. The text is the built-in corpus unless ``--config.data.source=files`` names another.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(folder: str = "") -> ConfigDict:
    if not folder:
        raise ValueError("name the folder of the weights after a colon: --config=configs/pretrained.py:FOLDER")
    config = base.get_config()
    config.name = "pretrained"
    config.init_from = folder
    config.model_from = "init_from"
    config.model.moe.losses.balance = 0.0
    config.model.moe.losses.z = 0.0

    config.data.tokenizer = "init_from"
    config.data.seq_len = 512

    config.train.steps = 0
    config.train.batch_size = 8
    config.train.learning_rate = 1e-5
    config.train.warmup_steps = 0
    config.train.eval_every = 100
    config.train.checkpoint_every = 100

    config.eval.batch_size = 8
    config.eval.final_max_tokens = 100_000
    return config
