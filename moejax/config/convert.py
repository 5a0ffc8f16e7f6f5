"""Mappings to dataclasses and back, and the hash that names a config."""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, cast


class ConfigError(ValueError):
    """A setting that cannot work. The message names the field, the value, the rule and the way out."""


def from_mapping[T](cls: type[T], mapping: Mapping[str, Any], path: str = "config") -> T:
    """Builds the dataclass ``cls`` from a nested mapping.

    Args:
      cls: one of the dataclasses of this module.
      mapping: plain dict or ``ConfigDict``; missing fields take their defaults.
      path: name of ``mapping`` in error messages.

    Raises:
      ConfigError: unknown field, wrong type, value outside a Literal.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cast(Any, cls))}
    values = {}
    for name, value in mapping.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}.{name}: unknown field; {hint}")
        values[name] = _convert(hints[name], value, f"{path}.{name}")
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            choices = ", ".join(repr(a) for a in args)
            close = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            raise ConfigError(
                f"{path}={value!r}: choose one of {choices}" + (f" (did you mean {close[0]!r}?)" if close else "")
            )
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, cast(type, hint)):
            return value
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"{path}={value!r}: expected a group of fields, not a {type(value).__name__}")
        return from_mapping(cast(type, hint), value, path)
    if origin is tuple:
        return _convert_tuple(args, value, path)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _convert_tuple(args: tuple, value: Any, path: str) -> tuple:
    item = args[0]
    if typing.get_origin(item) is tuple and hasattr(value, "items"):  # a mapping kept as sorted pairs: hashable
        _, inner = typing.get_args(item)
        return tuple((str(k), _convert(inner, v, f"{path}.{k}")) for k, v in sorted(value.items()))
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigError(f"{path}={value!r}: expected a tuple, e.g. ({value!r},)")
    return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON values; pairs become objects again, so that ``from_mapping`` reads it back."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            if value and all(isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value):
                return {k: plain(v) for k, v in value}
            return [plain(v) for v in value]
        return value

    return plain(config)


def config_hash(config: Any) -> str:
    """First 12 hex digits of the SHA-256 of the config as sorted JSON, without where data and cache lie, when warnings
    are given and which tables and rows are made, which change no number, and without later fields at their default: the
    hash of a config that does not use them stays what it was."""
    fields = {name: value for name, value in _hashed(config).items() if name != "watch"}
    if isinstance(fields.get("data"), dict):
        fields["data"] = {k: v for k, v in fields["data"].items() if k not in ("root", "cache_dir")}
    if isinstance(fields.get("table"), dict):
        fields["table"] = {k: v for k, v in fields["table"].items() if k not in ("tables", "layer_factors")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _hashed(config: Any) -> dict[str, Any]:
    fields = to_dict(config)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("later") and value == f.default:
            del fields[f.name]
        elif dataclasses.is_dataclass(value):
            fields[f.name] = _hashed(value)
    return fields
