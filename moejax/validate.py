"""Checks across fields, made before anything compiles and before any file is touched."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from moejax import attention, limits, losses, plan, routing
from moejax.config import ConfigError, ExperimentConfig, ModelConfig, MoEConfig
from moejax.dispatch import DISPATCHERS, resolve
from moejax.model import moe_layer_ids

AT_LEAST = {
    "train.steps": 0, "train.batch_size": 1, "train.accumulate": 1, "train.log_every": 1, "train.eval_every": 1,
    "train.checkpoint_every": 1, "train.keep_checkpoints": 1, "train.weight_decay": 0, "train.final_fraction": 0,
    "train.mtp_weight": 0, "train.b1": 0, "train.b2": 0,
    "eval.batch_size": 1, "eval.max_tokens": 0, "eval.final_max_tokens": 0, "eval.task_limit": 0,
    "watch.dead_experts": 0, "watch.min_load_entropy": 0, "watch.max_busiest": 0, "watch.min_router_entropy": 0,
    "watch.min_pairs": 1,
    "table.batch_size": 1, "table.max_tokens": 0, "table.margin": 0, "mesh.expert": 1, "mesh.model": 1,
}  # fmt: skip
MODEL_AT_LEAST = {
    "vocab_size": 0, "num_layers": 1, "dim": 1, "ffn_dim": 1, "logit_softcap": 0, "init_scale": 0, "norm_eps": 0,
    "attention.num_heads": 1, "attention.num_kv_heads": 1, "attention.head_dim": 1,
    "moe.first_dense": 0, "moe.every": 1, "moe.shared_experts": 0, "moe.capacity_factor": 0, "moe.router.jitter": 0,
    "moe.router.bias_update_rate": 0, "moe.shared_dim": 0, "moe.zero_experts": 0, "mtp_layers": 0,
    "moe.ep_buffer_factor": 0, "moe.ep_chunks": 1, "moe.virtual_ranks": 1, "moe.parts": 1,
}  # fmt: skip
BELOW_ONE = {"train.b1", "train.b2", "moe.router.jitter"}
"""Of these, the fields that must also be below 1."""


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError with the field, the value, the rule and a way out.

    With ``model_from="init_from"`` the model is not known yet (:func:`moejax.pretrained.adopt`): nothing is said of it.
    """
    known = config.model_from != "init_from"
    if known:
        check_model(config.model)
    train = config.train
    _ranges(config, AT_LEAST, "")
    if not 0 < train.learning_rate < float("inf"):
        raise ConfigError(f"train.learning_rate={train.learning_rate}: must be a finite number above 0")
    if not train.clip_norm > 0:
        raise ConfigError(f"train.clip_norm={train.clip_norm}: must be above 0; a large number switches clipping off")
    for name in ("min_load_entropy", "max_busiest", "min_router_entropy"):
        if (value := getattr(config.watch, name)) > 1:
            raise ConfigError(f"watch.{name}={value}: it is a share, at most 1; 0 switches the warning off")
    if config.mesh.data < 1 and config.mesh.data != -1:
        raise ConfigError(f"mesh.data={config.mesh.data}: must be 1 or more, or -1 for all devices that are left")
    if train.batch_size % train.accumulate:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not divisible by train.accumulate={train.accumulate}: "
            "choose a divisor"
        )
    if train.steps == 0 and not config.init_from:
        raise ConfigError("train.steps=0 evaluates weights as they are: name them with init_from=DIR, or train")
    if train.steps == 0 and len(config.table.seeds) > 1:
        raise ConfigError(
            f"table.seeds={config.table.seeds} are training seeds, and train.steps=0 trains nothing: set table.seeds=()"
        )
    if train.steps and not 0 <= train.warmup_steps < train.steps:
        raise ConfigError(f"train.warmup_steps={train.warmup_steps} must lie in [0, train.steps={train.steps})")
    _check_prediction(config)
    if config.data.source == "files" and not config.data.domains:
        raise ConfigError("data.source='files' needs data.domains={name: {train: PATH, valid: PATH}}")
    if config.data.seq_len < 2:
        raise ConfigError(f"data.seq_len={config.data.seq_len}: must be 2 or more")
    moe = config.model.moe
    if known and has_experts(config.model):
        _check_real_ranks(config)
        _check_divides(moe, f"mesh axis 'expert'={config.mesh.expert}", config.mesh.expert)
        if moe.dispatcher == "ep":
            limits.check_ranks(limits.of_config(moe), moe, config.mesh.expert)


def _check_prediction(config: ExperimentConfig) -> None:
    modules, weight = config.model.mtp_layers, config.train.mtp_weight
    if weight and not modules:
        raise ConfigError(
            f"train.mtp_weight={weight} weighs the loss of multi-token-prediction modules, and model.mtp_layers=0: set "
            "that to 1 or more, or the weight to 0"
        )
    if modules and config.train.steps and not weight:
        raise ConfigError(
            f"model.mtp_layers={modules} with train.mtp_weight=0: training would move their weights by weight decay "
            "alone; set the weight (DeepSeek-V3: 0.3, later 0.1), or mtp_layers=0"
        )
    if weight and modules >= config.data.seq_len:
        raise ConfigError(
            f"model.mtp_layers={modules} needs data.seq_len above it, not {config.data.seq_len}: module k predicts the "
            "token k + 1 places on"
        )


def _ranges(config: Any, least: Mapping[str, int], prefix: str) -> None:
    for path, low in least.items():
        value = functools.reduce(getattr, path.split("."), config)
        if not value >= low:  # also refuses NaN
            raise ConfigError(f"{prefix}{path}={value}: must be {low} or more")
        if value == float("inf"):
            raise ConfigError(f"{prefix}{path}={value}: must be a finite number, {low} or more")
        if path in BELOW_ONE and not value < 1:
            raise ConfigError(f"{prefix}{path}={value}: must be {low} or more, and below 1")


def has_experts(config: ModelConfig) -> bool:
    return bool(moe_layer_ids(config))


def _check_placement(config: ModelConfig) -> None:
    moe, layers = config.moe, config.num_layers
    outside = [i for i in moe.dense_layers if not 0 <= i < layers]
    if outside or len(set(moe.dense_layers)) != len(moe.dense_layers):
        raise ConfigError(
            f"moe.dense_layers={moe.dense_layers}: must name layers once each, in [0, num_layers={layers})"
            + (f"; {outside[0]} is none of them" if outside else "")
        )
    if config.wiring == "longcat" and (moe.first_dense or moe.every != 1 or moe.dense_layers):
        raise ConfigError(
            f"model.wiring='longcat' has experts in every block, but moe.first_dense={moe.first_dense}, "
            f"moe.every={moe.every}, moe.dense_layers={moe.dense_layers}: set them to 0, 1 and (), or wiring='standard'"
        )


def check_model(config: ModelConfig) -> None:
    _ranges(config, MODEL_AT_LEAST, "model.")
    attention.check(config)
    moe = config.moe
    _check_placement(config)
    for name, value in (("logit_scale", config.logit_scale), ("moe.router.scale", moe.router.scale)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"model.{name}={value}: must be a finite number above 0; 1 changes nothing")
    if config.sandwich_norm and config.wiring != "standard":
        raise ConfigError(
            f"model.sandwich_norm=True with model.wiring={config.wiring!r}: its blocks have no norm after attention "
            "and FFN; set it to False, or wiring='standard'"
        )
    if config.mtp_layers and config.wiring != "standard":
        raise ConfigError(
            f"model.mtp_layers={config.mtp_layers} with model.wiring={config.wiring!r}: modules of that kind are not "
            "known (LongCat-Flash's own has a dense block): set it to 0, or wiring='standard'"
        )
    if not has_experts(config):
        return
    for name in ("num_experts", "expert_dim"):
        if getattr(moe, name) < 1:
            raise ConfigError(f"moe.{name}={getattr(moe, name)}: must be 1 or more")
    if moe.expert_dim % moe.parts:
        choices = [d for d in range(1, moe.expert_dim + 1) if moe.expert_dim % d == 0]
        raise ConfigError(
            f"moe.parts={moe.parts} does not divide moe.expert_dim={moe.expert_dim}: choose one of {choices}"
        )
    if moe.part_order == "part" and moe.parts == 1:
        raise ConfigError(
            "moe.part_order='part' says how the parts of experts are numbered, and moe.parts=1: set that to 2 or more, "
            "or part_order='expert'"
        )
    causal = routing.family(moe.router, moe.num_experts, zero_experts=moe.zero_experts).causal
    limits.check(limits.of_config(moe), moe, len(moe_layer_ids(config)), causal=causal)
    if moe.shared_dim and not moe.shared_experts:
        raise ConfigError(
            f"moe.shared_dim={moe.shared_dim} is the width of shared experts, but moe.shared_experts=0: set that to 1 "
            "or more, or leave shared_dim at 0"
        )
    losses.check(moe)
    if moe.dispatcher not in DISPATCHERS:
        raise ConfigError(f"moe.dispatcher={moe.dispatcher!r}: choose one of {', '.join(sorted(DISPATCHERS))}")
    _check_ranks(moe)


def _check_ranks(moe: MoEConfig) -> None:
    _check_divides(moe, f"moe.virtual_ranks={moe.virtual_ranks}", moe.virtual_ranks)
    limits.check_ranks(limits.of_config(moe), moe, moe.virtual_ranks)
    if moe.dispatcher != "ep":
        for name, default in (("ep_exchange", "auto"), ("ep_send", "auto"), ("ep_buffer_factor", 0.0)):
            if getattr(moe, name) != default:
                raise ConfigError(
                    f"moe.{name}={getattr(moe, name)!r} is a setting of moe.dispatcher='ep', and that is "
                    f"{moe.dispatcher!r}, which exchanges nothing: set it to 'ep', or {name}={default!r}"
                )
    if moe.ep_exchange != "chunked" and moe.ep_chunks != MoEConfig.ep_chunks:
        raise ConfigError(
            f"moe.ep_chunks={moe.ep_chunks} is a setting of moe.ep_exchange='chunked', and that is "
            f"{moe.ep_exchange!r}: set it to 'chunked', or ep_chunks={MoEConfig.ep_chunks}"
        )
    if moe.ep_send == "tokens" and not routing.FAMILIES[moe.router.name].causal:
        raise ConfigError(
            f"moe.ep_send='tokens' sends each token once, and with router.name={moe.router.name!r} experts choose, so "
            "that nothing bounds how many pairs a token has: choose 'pairs' or 'auto'"
        )
    if moe.ep_exchange == "chunked" and not routing.FAMILIES[moe.router.name].causal:
        raise ConfigError(
            f"moe.ep_exchange='chunked' cuts tokens into pieces, and with router.name={moe.router.name!r} experts "
            "choose among all of them: choose 'padded' or 'auto'"
        )


def _check_divides(moe: MoEConfig, by: str, ranks: int) -> None:
    stored = moe.stored_experts
    if stored % ranks:
        what = f"moe.num_experts={moe.num_experts}" + (f" x moe.parts={moe.parts}" if moe.parts > 1 else "")
        choices = [d for d in range(1, stored + 1) if stored % d == 0]
        raise ConfigError(f"{what} not divisible by {by}: choose one of {choices}")


def _check_real_ranks(config: ExperimentConfig) -> None:
    moe, ranks = config.model.moe, config.mesh.expert
    if moe.dispatcher == "ep" and ranks > 1 and moe.virtual_ranks > 1:
        raise ConfigError(
            f"moe.virtual_ranks={moe.virtual_ranks} with moe.dispatcher='ep' on mesh.expert={ranks}: limits see the "
            "ranks that there are; set virtual_ranks=1, or moe.dispatcher='local'"
        )


def check_devices(config: ExperimentConfig, token_shards: int) -> None:
    """What is known only with the devices in hand: divisibility, and what the platform has.

    ``token_shards``: devices of the mesh's axes data and expert.

    Raises:
      ConfigError: all that does not divide, each with the field, the value and a way out.
    """
    if config.model.moe.dispatcher == "ep" and config.mesh.expert > 1 and has_experts(config.model):
        resolve(config.model.moe.ep_exchange)
    mesh = dataclasses.replace(config.mesh, data=token_shards // config.mesh.expert)
    if found := plan.problems(config, mesh):
        raise ConfigError("; ".join(str(problem) for problem in found))
