"""Which settings of attention go together."""

import dataclasses
from typing import Any

from moejax.config import AttentionConfig, ConfigError, ModelConfig, RopeConfig
from moejax.rope import rotated_dims

LATENT_ONLY = ("query_rank", "latent_rank", "rope_head_dim", "value_head_dim", "scale_latents")
GROUPED_ONLY = ("qk_norm", "sinks")
SCALING = {
    "none": (),
    "linear": ("factor",),
    "yarn": (
        "factor", "original_length", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
        "attention_factor",
    ),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
"""The fields of RopeConfig that each scaling reads, beside ``layout`` and ``fraction``."""


def check(config: ModelConfig) -> None:
    """Raises ConfigError where a setting of attention is out of range, at odds with another, or would be ignored."""
    a = config.attention
    for name in ("window", "softmax_scale", "query_rank"):
        if not getattr(a, name) >= 0:
            raise ConfigError(f"attention.{name}={getattr(a, name)}: must be 0 or more")
    if not 0 < a.rope_theta < float("inf"):
        raise ConfigError(f"attention.rope_theta={a.rope_theta}: must be a finite number above 0")
    _check_window(a, config.num_layers)
    if a.qk_norm_over != "head" and not a.qk_norm:
        raise ConfigError(
            f"attention.qk_norm_over={a.qk_norm_over!r} is not read with attention.qk_norm=False: set that, or 'head'"
        )
    if a.kind == "latent":
        _check_latent(a)
    else:
        _check_grouped(a)
    _check_scaling(a.rope, a.rope_theta)


def _check_window(a: AttentionConfig, num_layers: int) -> None:
    if a.window_layers and not a.window:
        raise ConfigError(
            f"attention.window_layers={a.window_layers} need attention.window: set the tokens that they see, or ()"
        )
    wrong = [i for i in a.window_layers if not 0 <= i < num_layers]
    if wrong or len(set(a.window_layers)) < len(a.window_layers):
        raise ConfigError(
            f"attention.window_layers={a.window_layers} must be different layers in [0, num_layers={num_layers})"
        )


def _check_grouped(a: AttentionConfig) -> None:
    if a.num_heads % a.num_kv_heads:
        raise ConfigError(
            f"attention.num_heads={a.num_heads} is not a multiple of num_kv_heads={a.num_kv_heads}: "
            "every key/value head serves the same number of query heads"
        )
    for name in LATENT_ONLY:
        if getattr(a, name):
            raise ConfigError(
                f"attention.{name}={getattr(a, name)} is of latent attention, and attention.kind={a.kind!r}: "
                "set kind='latent', or leave it out"
            )
    if a.sinks and a.implementation == "cudnn":
        raise ConfigError(
            "attention.implementation='cudnn' has no attention.sinks: take 'auto' or 'xla', which compute them unfused"
        )
    if not 0 < a.rope.fraction <= 1:
        raise ConfigError(f"attention.rope.fraction={a.rope.fraction}: must lie in (0, 1]")
    dims = rotated_dims(a.rope, a.head_dim)
    if a.rope.fraction == 1 and dims % 2:
        raise ConfigError(f"attention.head_dim={dims} is odd: rotary positions rotate pairs of dimensions")
    if dims % 2 or not dims:
        raise ConfigError(
            f"attention.rope.fraction={a.rope.fraction} of attention.head_dim={a.head_dim} is {dims} dimensions: "
            "rotary positions rotate pairs, so it must come to an even number, 2 or more"
        )


def _check_latent(a: AttentionConfig) -> None:
    for name in ("latent_rank", "rope_head_dim", "value_head_dim"):
        if getattr(a, name) < 1:
            raise ConfigError(
                f"attention.{name}={getattr(a, name)} with attention.kind='latent': must be 1 or more; head_dim are "
                "the dimensions of a query or key head without position"
            )
    if a.rope_head_dim % 2:
        raise ConfigError(f"attention.rope_head_dim={a.rope_head_dim} is odd: rotary positions rotate pairs")
    if a.num_kv_heads != a.num_heads:
        raise ConfigError(
            f"attention.num_kv_heads={a.num_kv_heads} with attention.kind='latent': each of the {a.num_heads} heads "
            f"has keys and values of its own, so set num_kv_heads={a.num_heads}"
        )
    for name in GROUPED_ONLY:
        if getattr(a, name):
            raise ConfigError(f"attention.{name}=True is of attention.kind='grouped': latent attention has none")
    if a.implementation == "cudnn":
        raise ConfigError(
            "attention.implementation='cudnn' wants values as wide as keys, and attention.kind='latent' has not: "
            "take 'auto' or 'xla'"
        )
    if a.rope.fraction != 1:
        raise ConfigError(
            f"attention.rope.fraction={a.rope.fraction} with attention.kind='latent': rope_head_dim says how many "
            "dimensions rotate, so leave it at 1"
        )


def _check_scaling(rope: RopeConfig, theta: float) -> None:
    read = ("layout", "fraction", "scaling", *SCALING[rope.scaling])
    for field in dataclasses.fields(rope):
        value = getattr(rope, field.name)
        if field.name not in read and value != field.default:
            raise ConfigError(
                f"attention.rope.{field.name}={value} is not read with attention.rope.scaling={rope.scaling!r}: "
                f"leave it at {field.default}, or take a scaling that reads it"
            )

    def must(name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"attention.rope.{name}={getattr(rope, name)} with scaling={rope.scaling!r}: {rule}")

    if rope.scaling == "none":
        return
    must("factor", 1 <= rope.factor < float("inf"), "must be 1 or more, the extended context over the original one")
    if rope.scaling == "linear":
        return
    must("original_length", rope.original_length >= 1, "set it to the context of the pretraining, in tokens")
    if rope.scaling == "llama3":
        must("low_freq_factor", rope.low_freq_factor > 0, "must be above 0")
        must(
            "high_freq_factor", rope.high_freq_factor > rope.low_freq_factor,
            f"must be above low_freq_factor={rope.low_freq_factor}",
        )  # fmt: skip
        return
    _check_yarn(rope, theta, must)


def _check_yarn(rope: RopeConfig, theta: float, must: Any) -> None:
    if theta <= 1:
        raise ConfigError(f"attention.rope_theta={theta} with attention.rope.scaling='yarn': must be above 1")
    must("beta_slow", rope.beta_slow > 0, "must be above 0")
    must("beta_fast", rope.beta_fast > rope.beta_slow, f"must be above beta_slow={rope.beta_slow}")
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        must(name, getattr(rope, name) >= 0, "must be 0 or more")
    if rope.attention_factor:
        must("mscale", not rope.mscale, "attention_factor takes its place, so leave it at 0")
    elif bool(rope.mscale) != bool(rope.mscale_all_dim):
        raise ConfigError(
            f"attention.rope.mscale={rope.mscale} and mscale_all_dim={rope.mscale_all_dim}: published implementations "
            "differ where only one is set; set both, or say what multiplies cos and sin by attention_factor"
        )
