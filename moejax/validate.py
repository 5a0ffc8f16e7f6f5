"""Checks across fields, made before anything compiles and before any file is touched."""

import functools
from collections.abc import Mapping
from typing import Any

from moejax import losses, routing
from moejax.config import ConfigError, ExperimentConfig, ModelConfig
from moejax.dispatch import PLANS

AT_LEAST = {
    "train.steps": 1, "train.batch_size": 1, "train.accumulate": 1, "train.log_every": 1, "train.eval_every": 1,
    "train.checkpoint_every": 1, "train.keep_checkpoints": 1, "train.weight_decay": 0, "train.final_fraction": 0,
    "eval.batch_size": 1, "eval.max_tokens": 0, "eval.final_max_tokens": 0, "eval.task_limit": 0,
    "watch.dead_experts": 0, "watch.min_load_entropy": 0, "watch.max_busiest": 0, "watch.min_router_entropy": 0,
    "watch.min_pairs": 1,
    "table.batch_size": 1, "table.max_tokens": 0, "table.margin": 0, "mesh.expert": 1, "mesh.model": 1,
}  # fmt: skip
MODEL_AT_LEAST = {
    "vocab_size": 0, "num_layers": 1, "dim": 1, "ffn_dim": 1, "logit_softcap": 0, "init_scale": 0,
    "attention.num_heads": 1, "attention.num_kv_heads": 1, "attention.head_dim": 1,
    "moe.first_dense": 0, "moe.every": 1, "moe.shared_experts": 0, "moe.capacity_factor": 0, "moe.router.jitter": 0,
}  # fmt: skip


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError with the field, the value, the rule and a way out."""
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
    if not 0 <= train.warmup_steps < max(train.steps, 1):
        raise ConfigError(f"train.warmup_steps={train.warmup_steps} must lie in [0, train.steps={train.steps})")
    if config.data.source == "files" and not config.data.domains:
        raise ConfigError("data.source='files' needs data.domains={name: {train: PATH, valid: PATH}}")
    if config.data.seq_len < 2:
        raise ConfigError(f"data.seq_len={config.data.seq_len}: must be 2 or more")
    moe = config.model.moe
    if has_experts(config.model) and moe.num_experts % config.mesh.expert:
        choices = [d for d in range(1, moe.num_experts + 1) if moe.num_experts % d == 0]
        raise ConfigError(
            f"moe.num_experts={moe.num_experts} not divisible by mesh axis 'expert'={config.mesh.expert}: "
            f"choose one of {choices}"
        )


def _ranges(config: Any, least: Mapping[str, int], prefix: str) -> None:
    for path, low in least.items():
        value = functools.reduce(getattr, path.split("."), config)
        if not value >= low:  # also refuses NaN
            raise ConfigError(f"{prefix}{path}={value}: must be {low} or more")


def has_experts(config: ModelConfig) -> bool:
    return config.moe.first_dense + config.moe.every <= config.num_layers


def check_model(config: ModelConfig) -> None:
    attention = config.attention
    _ranges(config, MODEL_AT_LEAST, "model.")
    if attention.num_heads % attention.num_kv_heads:
        raise ConfigError(
            f"attention.num_heads={attention.num_heads} is not a multiple of num_kv_heads={attention.num_kv_heads}: "
            "every key/value head serves the same number of query heads"
        )
    if attention.head_dim % 2:
        raise ConfigError(f"attention.head_dim={attention.head_dim} is odd: rotary positions rotate halves")
    moe = config.moe
    if not has_experts(config):
        return
    for name in ("num_experts", "expert_dim"):
        if getattr(moe, name) < 1:
            raise ConfigError(f"moe.{name}={getattr(moe, name)}: must be 1 or more")
    routing.family(moe.router, moe.num_experts)
    losses.check(moe)
    if moe.dispatcher not in PLANS:
        raise ConfigError(f"moe.dispatcher={moe.dispatcher!r}: choose one of {', '.join(sorted(PLANS))}")


def check_devices(config: ExperimentConfig, token_shards: int) -> None:
    """Divisibility that is known only with the devices in hand."""
    micro = config.train.batch_size // config.train.accumulate
    if micro % token_shards:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} / train.accumulate={config.train.accumulate} = {micro} "
            f"sequences do not divide over {token_shards} devices (mesh data x expert): choose a multiple of "
            f"{token_shards * config.train.accumulate}"
        )
    for name, size in (
        ("eval.batch_size", config.eval.batch_size),
        ("table.batch_size", config.table.batch_size),
    ):
        if size % token_shards:
            raise ConfigError(
                f"{name}={size} does not divide over {token_shards} devices: choose a multiple of {token_shards}"
            )
