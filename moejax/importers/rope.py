"""Rotary positions in config.json: ``rope_theta`` and ``rope_scaling`` (transformers 4), ``rope_parameters`` (5)."""

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from moejax.config import ConfigError, RopeConfig
from moejax.importers.keys import Keys

KINDS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}
_NONE = object()


def read_rope(
    keys: Keys,
    theta: float,
    layout: Literal["halves", "interleaved"] = "halves",
    unset: Mapping[str, Any] | None = None,
    longrope: bool = False,
) -> tuple[float, RopeConfig]:
    """``(theta, config)`` of either dialect.

    Args:
      theta: the family's base where the file names none.
      unset: the family's scaling where the file has no word about it.
      longrope: whether the family has LongRoPE with scales of its own (PhiMoE), which others derive.

    Raises:
      ConfigError: an unknown kind or key of scaling, or two dialects that disagree.
    """
    base = keys.get("rope_theta", float, theta)
    old, new = keys.get("rope_scaling", dict, None), keys.get("rope_parameters", dict, None)
    if unset and old is None and new is None and "rope_scaling" in keys:
        raise keys.refuse(
            "rope_scaling", "transformers 4 takes null for no scaling and 5 for the family's own: write it out, with "
            '{"rope_type": "default"} for none'
        )  # fmt: skip
    found = [
        (name, _one(keys, name, value)) for name, value in (("rope_scaling", old), ("rope_parameters", new)) if value
    ]
    if "rope_theta" in keys:
        for name, part in found:
            if part.get("rope_theta", base) != base:
                raise ConfigError(
                    f"{keys.path}: rope_theta={base} and {name}.rope_theta={part['rope_theta']} disagree: keep one"
                )
    kinds = {**KINDS, "longrope": "longrope"} if longrope else KINDS
    read = [(_theta(keys, name, part, base), _scaling(keys, name, part, layout, kinds)) for name, part in found]
    if len(read) == 2 and read[0] != read[1]:
        raise ConfigError(f"{keys.path}: rope_scaling and rope_parameters disagree: keep one of the two dialects")
    if read:
        return read[0]
    return base, _scaling(keys, "rope_scaling", dict(unset or {}), layout, kinds)


def _theta(keys: Keys, name: str, part: dict[str, Any], base: float) -> float:
    """The base beside a scaling: transformers 5 keeps it there."""
    value = part.get("rope_theta", base)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{keys.path}: {name}.rope_theta={value!r}: expected a number")
    return float(value)


def _one(keys: Keys, name: str, value: dict[str, Any]) -> dict[str, Any]:
    """The settings; of those written for each kind of layer, the one that all share."""
    parts = [part for part in value.values() if isinstance(part, dict)]
    if not parts:
        return value
    if len(parts) < len(value) or any(part != parts[0] for part in parts):
        raise keys.refuse(name, "layers with rotary positions of their own are not built")
    return parts[0]


def _scaling(
    keys: Keys, name: str, part: dict[str, Any], layout: Literal["halves", "interleaved"], kinds: Mapping[str, Any]
) -> RopeConfig:
    left = {key: value for key, value in part.items() if key != "rope_theta" and value is not None}

    def refuse(key: str, why: str) -> ConfigError:
        return ConfigError(f"{keys.path}: {name}.{key}={part.get(key)!r} is not supported: {why}")

    kind = left.pop("rope_type", left.get("type", "default"))
    if left.pop("type", kind) != kind:
        raise refuse("type", f"rope_type={kind!r} is another kind")
    if not isinstance(kind, str) or kind not in kinds:
        key = "rope_type" if "rope_type" in part else "type"
        raise refuse(key, f"rotary scalings are {', '.join(kinds)}; another would need its formula in moejax/rope.py")
    if left.pop("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("partial_rotary_factor", "this family rotates all dimensions of a head")

    def number(key: str, default: Any = _NONE) -> Any:
        value = left.pop(key, default)
        if value is _NONE:
            raise ConfigError(f"{keys.path}: {name} of kind {kind!r} has no {key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{keys.path}: {name}.{key}={value!r}: expected a number")
        return float(value)

    fields: dict[str, Any] = {"layout": layout, "scaling": kinds[kind]}
    if kind not in ("default", "longrope"):
        fields["factor"] = number("factor")
    if kind in ("yarn", "llama3", "longrope"):
        context = keys.get("max_position_embeddings", int, None)
        original = number("original_max_position_embeddings", _NONE if context is None else context)
        if original != int(original) or original < 1:
            raise refuse("original_max_position_embeddings", "it is a number of tokens")
        fields["original_length"] = int(original)
    if kind == "llama3":
        fields |= {key: number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "longrope":
        left.pop("factor", None)  # both scales are given, and nothing else would read it
        fields |= {key: number(key) for key in ("short_mscale", "long_mscale")}
        for key in ("short_factor", "long_factor"):
            factors = left.pop(key, None)
            if not isinstance(factors, list) or any(type(f) not in (int, float) for f in factors):
                raise refuse(key, "expected a list of numbers, one for each pair of dimensions")
            fields[key] = tuple(float(f) for f in factors)
    if kind == "yarn":
        fields |= _yarn(keys, left, number, refuse)
    elif left.get("original_max_position_embeddings") is not None:
        del left["original_max_position_embeddings"]  # no formula of the other kinds has it
    if left:
        raise ConfigError(f"{keys.path}: {name} of kind {kind!r} has keys that are not known for it: {left}")
    return RopeConfig(**fields)


def _yarn(keys: Keys, left: dict[str, Any], number: Any, refuse: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"truncate": left.pop("truncate", True)}
    if not isinstance(fields["truncate"], bool):
        raise refuse("truncate", "expected true or false")
    # 0 counts as not given, as in transformers
    fields["beta_fast"], fields["beta_slow"] = number("beta_fast", 32.0) or 32.0, number("beta_slow", 1.0) or 1.0
    fields |= {key: number(key, 0.0) for key in ("mscale", "mscale_all_dim", "attention_factor")}
    one, all_dim = fields["mscale"], fields["mscale_all_dim"]
    if bool(one) != bool(all_dim):
        if all_dim or one != 1.0:
            raise refuse(
                "mscale" if one else "mscale_all_dim",
                "with only one of mscale and mscale_all_dim, transformers and DeepSeek's own code differ: write both",
            )
        fields["mscale"] = 0.0  # both take m(1)
    if fields["attention_factor"] < 0:
        raise refuse("attention_factor", "expected a number above 0")
    return fields


def write_rope(theta: float, rope: RopeConfig) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which transformers 4 and 5 and vLLM read."""
    names = {kind: name for name, kind in KINDS.items()}
    part: dict[str, Any] = {"rope_type": names.get(rope.scaling, rope.scaling)}
    if rope.scaling not in ("none", "longrope"):
        part["factor"] = rope.factor
    if rope.scaling in ("yarn", "llama3", "longrope"):
        part["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        part |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "longrope":
        part |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
        part |= {"short_mscale": rope.short_mscale, "long_mscale": rope.long_mscale}
    if rope.scaling == "yarn":
        part |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        given = {
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
            "attention_factor": rope.attention_factor,
        }
        part |= {key: value for key, value in given.items() if value}
    return {"rope_theta": theta, "rope_scaling": None if rope.scaling == "none" else part}


def note_length(keys: Keys, rope: RopeConfig) -> None:
    """Says where the context that a file names is not the one that its scaling reaches; no number depends on it."""
    context = keys.get("max_position_embeddings", int, None)
    if rope.scaling == "yarn" and context is not None and context != round(rope.factor * rope.original_length):
        logging.getLogger("absl").info(
            "%s: max_position_embeddings=%d is not factor %g times %d; the factor is used as it is written",
            keys.path, context, rope.factor, rope.original_length,
        )  # fmt: skip
