"""The model zoo: published models that this code runs, as presets.

    python -m experiments.run --config=configs/models/olmoe_1b_7b.py --dry_run --mesh=data=8,expert=8
    python -m experiments.run --config=configs/models/olmoe_1b_7b.py:tiny --workdir=runs/olmoe_tiny

``:full`` (the default) is the published size, ``:tiny`` the same architecture at a size that a CPU trains in seconds:
every flag is the published one, only sizes shrink (:func:`shrunk`). Training settings are ours. Models that are counted
but cannot run here are rows of ``python -m experiments.zoo`` without a preset; the row says what is missing.

Each file names the published config.json that its values are from. Where it says "checked", the values were compared
with the file, or with the defaults of its class in transformers 5; the totals of all are held to the published counts
by the zoo's test.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import base

Settings = Mapping[str, Any]
"""Fields of ``config.model`` by dotted name."""


def make(name: str, variant: str, model: Settings, *, balance: float = 0.0, z: float = 0.0) -> ConfigDict:
    """The preset ``name``; ``balance`` and ``z`` are the coefficients of the auxiliary losses."""
    if variant not in ("full", "tiny"):
        raise ValueError(f"variant {variant!r} of configs/models/{name}.py: choose full or tiny")
    config = base.get_config()
    config.name = f"{name}:{variant}"
    config.model.tie_embeddings = False
    config.model.scale_embeddings = False
    config.model.update_from_flattened_dict(model if variant == "full" else {**model, **shrunk(model)})
    config.model.moe.losses = ConfigDict({"balance": balance, "z": z})
    if variant == "full":
        config.scale = "paper"
        config.model.remat = "block"
        config.data.seq_len = 4096
        config.train.learning_rate = 3e-4
        return config
    config.scale = "tiny"
    config.model.compute_dtype = "float32"
    config.data.seq_len = 64
    config.train.steps = 60
    config.train.batch_size = 8
    config.train.learning_rate = 6e-3
    config.train.eval_every = 60
    config.train.checkpoint_every = 60
    config.eval.batch_size = 8
    config.eval.max_tokens = 8 * 64 * 4
    config.eval.final_max_tokens = 8 * 64 * 4
    config.table.batch_size = 8
    return config


def shrunk(model: Settings) -> dict[str, Any]:
    """The sizes of ``:tiny``: small ones for those that ``model`` sets, so that no flag appears or goes."""
    layers = 2 + min(model.get("moe.first_dense", 0), 1)
    several = model["moe.num_experts"] > 8
    heads = model["attention.num_heads"]
    still = (layers - 1,) if model.get("attention.no_rope_layers") else ()
    windows = tuple(i for i in model.get("attention.window_layers", ()) if i < layers and i not in still)
    factors = {name: model.get(f"attention.rope.{name}_factor", ()) for name in ("short", "long")}
    sizes = {
        "vocab_size": 0,
        "num_layers": layers,
        "dim": 64,
        "ffn_dim": 128,
        "attention.num_heads": 4,
        "attention.num_kv_heads": 4 if model["attention.num_kv_heads"] == heads else 2,
        "attention.head_dim": 16,
        "attention.query_rank": 24,
        "attention.latent_rank": 16,
        "attention.rope_head_dim": 8,
        "attention.value_head_dim": 16,
        "attention.window": 16,
        "attention.window_layers": windows,
        "attention.no_rope_layers": still,
        "attention.temperature_length": 16,
        "attention.rope.original_length": 32,
        **{f"attention.rope.{name}_factor": f[:: max(1, len(f) // 8)] for name, f in factors.items()},
        "moe.first_dense": 1,
        "moe.num_experts": 16 if several else 8,
        "moe.expert_dim": 32,
        "moe.zero_experts": 8,
        "moe.router.k": min(model["moe.router.k"], 4),
        "moe.router.groups": 4,
        "moe.router.groups_kept": 2,
    }
    return {name: value for name, value in sizes.items() if model.get(name)}
