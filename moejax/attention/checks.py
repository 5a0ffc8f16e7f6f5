"""Which settings of attention go together."""

import dataclasses
import math
from typing import Any

from moejax.config import AttentionConfig, ConfigError, ModelConfig, RopeConfig
from moejax.rope import rotated_dims

LATENT_ONLY = ("query_rank", "latent_rank", "rope_head_dim", "value_head_dim", "scale_latents")
GROUPED_ONLY = ("qk_norm", "sinks", "qk_unit_norm", "clip_qkv", "score_softcap", "no_rope_layers")
SCALING = {
    "none": (),
    "linear": ("factor",),
    "yarn": (
        "factor", "original_length", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
        "attention_factor",
    ),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original_length", "short_factor", "long_factor", "short_mscale", "long_mscale"),
}  # fmt: skip
"""The fields of RopeConfig that each scaling reads, beside ``layout`` and ``fraction``."""


def check(config: ModelConfig) -> None:
    """Raises ConfigError where a setting of attention is out of range, at odds with another, or would be ignored."""
    a = config.attention
    for name in ("window", "softmax_scale", "query_rank", "clip_qkv", "score_softcap", "temperature"):
        if not getattr(a, name) >= 0:
            raise ConfigError(f"attention.{name}={getattr(a, name)}: must be 0 or more")
        if getattr(a, name) == math.inf:
            raise ConfigError(f"attention.{name}=inf: must be a finite number, 0 or more")
    if not 0 < a.rope_theta < float("inf"):
        raise ConfigError(f"attention.rope_theta={a.rope_theta}: must be a finite number above 0")
    _check_window(a, config.num_layers)
    _check_rotating(a, config.num_layers)
    if a.qk_norm_over != "head" and not a.qk_norm:
        raise ConfigError(
            f"attention.qk_norm_over={a.qk_norm_over!r} is not read with attention.qk_norm=False: set that, or 'head'"
        )
    if a.kind == "latent":
        _check_latent(a)
    else:
        _check_grouped(a)
    _check_scaling(a, a.rope)


def _check_window(a: AttentionConfig, num_layers: int) -> None:
    if a.window_layers and not a.window:
        raise ConfigError(
            f"attention.window_layers={a.window_layers} need attention.window: set the tokens that they see, or ()"
        )
    if a.window_kind != "sliding" and not a.window:
        raise ConfigError(
            f"attention.window_kind={a.window_kind!r} needs attention.window: set the size of a chunk, or 'sliding'"
        )
    if a.window_kind != "sliding" and a.kind == "latent":
        raise ConfigError(
            f"attention.window_kind={a.window_kind!r} is of attention.kind='grouped': latent attention has 'sliding'"
        )
    _different_layers("window_layers", a.window_layers, num_layers)


def _different_layers(name: str, layers: tuple[int, ...], num_layers: int) -> None:
    if any(not 0 <= i < num_layers for i in layers) or len(set(layers)) < len(layers):
        raise ConfigError(f"attention.{name}={layers} must be different layers in [0, num_layers={num_layers})")


def _check_rotating(a: AttentionConfig, num_layers: int) -> None:
    _different_layers("no_rope_layers", a.no_rope_layers, num_layers)
    if a.temperature and not a.no_rope_layers:
        raise ConfigError(
            f"attention.temperature={a.temperature} acts in layers without rotary positions: name them with "
            "attention.no_rope_layers, or leave it at 0"
        )
    if a.temperature_length < 1:
        raise ConfigError(f"attention.temperature_length={a.temperature_length}: must be 1 or more, in tokens")
    if a.temperature_length != AttentionConfig.temperature_length and not a.temperature:
        raise ConfigError(
            f"attention.temperature_length={a.temperature_length} is not read with attention.temperature=0: set that "
            f"too, or leave it at {AttentionConfig.temperature_length}"
        )
    if a.qk_unit_norm and a.qk_norm:
        raise ConfigError(
            "attention.qk_unit_norm and attention.qk_norm are two norms of queries and keys, after rotation without a "
            "scale and before it with one: choose one"
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
    for name in ("sinks", "score_softcap"):
        if getattr(a, name) and a.implementation == "cudnn":
            raise ConfigError(
                f"attention.implementation='cudnn' has no attention.{name}: take 'auto' or 'xla', which compute it "
                "unfused"
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
            raise ConfigError(
                f"attention.{name}={getattr(a, name)} is of attention.kind='grouped': latent attention has none"
            )
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


def _check_scaling(a: AttentionConfig, rope: RopeConfig) -> None:
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
    for name in SCALING[rope.scaling]:
        value = getattr(rope, name)
        must(name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")
    if rope.scaling == "longrope":
        _check_longrope(a, rope, must)
        return
    must("factor", 1 <= rope.factor < float("inf"), "must be 1 or more, the extended context over the original one")
    if rope.scaling == "linear":
        return
    must("original_length", rope.original_length >= 1, "set it to the context of the pretraining, in tokens")
    if rope.scaling == "llama3":
        must("low_freq_factor", rope.low_freq_factor > 0, "must be above 0")
        must(
            "high_freq_factor", rope.high_freq_factor >= rope.low_freq_factor,
            f"must be low_freq_factor={rope.low_freq_factor} or more",
        )  # fmt: skip
        return
    _check_yarn(rope, a.rope_theta, must)


def _check_longrope(a: AttentionConfig, rope: RopeConfig, must: Any) -> None:
    must("original_length", rope.original_length >= 1, "set it to the context of the pretraining, in tokens")
    pairs = (a.rope_head_dim if a.kind == "latent" else rotated_dims(rope, a.head_dim)) // 2
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        must(name, len(factors) == pairs, f"must have one number for each of the {pairs} pairs of dimensions")
        must(name, all(0 < f < float("inf") for f in factors), "must be finite numbers above 0")
    for name in ("short_mscale", "long_mscale"):
        must(name, 0 < getattr(rope, name) < float("inf"), "must be a finite number above 0")


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
