"""The points of a sweep file: read, checked against the config, and named, all of them before anything runs."""

import dataclasses
import functools
import hashlib
import importlib
import json
import re
import runpy
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments import run, session
from moejax.config import ConfigError, ExperimentConfig, from_mapping, to_dict

SEED = "train.seed"
BASE = "base"
"""Label of the point that changes nothing."""
LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    overrides: dict[str, Any]
    """Full field name to value, sorted, as the checked config has it (an int for a float field is a float here)."""
    config: ExperimentConfig
    arguments: tuple[str, ...]
    """Flags of ``experiments.run`` that give this config."""

    @functools.cached_property
    def name(self) -> str:
        """Name of its folder: readable, and as unique as the overrides; it depends on nothing else, so that a changed
        sweep file finds the runs of the points that stay."""
        digest = hashlib.sha256(json.dumps(self.overrides, sort_keys=True).encode()).hexdigest()[:8]
        parts = [f"{path.rpartition('.')[2]}={shown(value)}" for path, value in self.overrides.items()]
        readable = re.sub(r"[^\w.,=+-]+", "_", ",".join(parts) or BASE)
        return f"{readable[:LONGEST_NAME]}-{digest}"

    @property
    def label(self) -> str:
        """What it changes beside the seed: points of one label are one row of the table."""
        parts = [f"{short_name(path)}={shown(value)}" for path, value in self.overrides.items() if path != SEED]
        return ", ".join(parts) or BASE

    def value(self, path: str) -> Any:
        """The config's value of a field, whether this point sets it or not."""
        return _get(to_dict(self.config), path)

    @property
    def seed(self) -> int:
        return self.config.train.seed


def shown(value: Any) -> str:
    """A value for people: 0.001 rather than 1e-03, (a, b) rather than ('a', 'b')."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(shown, value)) + ")"
    return str(value)


@functools.cache
def _field_names() -> Counter[str]:
    """How many fields of the config end in each dotted ending."""

    def paths(cls: type, prefix: str = "") -> Iterator[str]:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(typing.cast(Any, cls)):
            yield prefix + field.name
            if dataclasses.is_dataclass(hints[field.name]):
                yield from paths(hints[field.name], f"{prefix}{field.name}.")

    endings: Counter[str] = Counter()
    for path in paths(ExperimentConfig):
        parts = path.split(".")
        endings.update(".".join(parts[i:]) for i in range(len(parts)))
    return endings


def short_name(path: str) -> str:
    """The shortest ending of a field's name that no other field of the config has: ``k``, but ``train.batch_size``."""
    parts = path.split(".")
    endings = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
    return next((ending for ending in endings if _field_names()[ending] == 1), path)


def read_points(sweep: Path, config_file: str, common: Mapping[str, Any]) -> list[Point]:
    """All points of a sweep file, in its order.

    Args:
      sweep: Python file with a function ``sweep()`` that yields dicts from field name to value.
      config_file: what ``--config`` names, with its variant.
      common: fields that the command line sets for every point.

    Raises:
      ConfigError: the file cannot be used, or a point is not a checked config: unknown field, wrong type, a field given
        twice, a broken rule, two points of one config. The message names file, point, field and way out.
    """
    base = parse(config_file, common)
    points: list[Point] = []
    first: dict[ExperimentConfig, int] = {}
    for number, overrides in enumerate(_yielded(sweep), start=1):
        try:
            point = _checked(overrides, base, config_file, common)
        except ConfigError as error:
            raise ConfigError(f"{sweep}: point {number}, {overrides!r}: {error}") from error
        if point.config in first:
            raise ConfigError(
                f"{sweep}: points {first[point.config]} and {number}, {overrides!r}, are the same config: "
                "yield it once (a value that is the config's own changes nothing)"
            )
        first[point.config] = number
        points.append(point)
    if not points:
        raise ConfigError(f"{sweep}: sweep() yields no point")
    return points


def _yielded(sweep: Path) -> Sequence[Any]:
    if not sweep.is_file():
        raise ConfigError(f"--sweep={sweep}: no such file: give a Python file with a function sweep(), docs/sweeps.md")
    try:
        function = runpy.run_path(str(sweep)).get("sweep")
    except Exception as error:
        raise ConfigError(f"--sweep={sweep} cannot be loaded: {_where(error, sweep)}") from error
    if not callable(function):
        raise ConfigError(f"--sweep={sweep} has no function sweep(): define one that yields dicts of config fields")
    try:
        return list(function())
    except Exception as error:
        raise ConfigError(f"--sweep={sweep}: sweep() failed: {_where(error, sweep)}") from error


def _where(error: BaseException, file: Path) -> str:
    """The error with the last line of ``file`` that it passed through."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    return (f"line {line}: " if line else "") + f"{type(error).__name__}: {error}"


def parse(config_file: str, overrides: Mapping[str, Any]) -> ExperimentConfig:
    """The config as ``experiments.run`` would read it from these flags, without the checks across fields."""
    values, argv = flags.FlagValues(), ["run", *arguments_of(config_file, overrides)]
    run.define_flags(values, argv)
    session.parse_flags(argv, values)
    return from_mapping(ExperimentConfig, values.config)


def arguments_of(config_file: str, overrides: Mapping[str, Any]) -> tuple[str, ...]:
    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return repr(tuple(value))
        if isinstance(value, ConfigDict | Mapping):  # of the command line: a group of fields as JSON
            return json.dumps(ConfigDict(value).to_dict())
        return value if isinstance(value, str) else repr(value)

    return (f"--config={config_file}", *(f"--config.{path}={text(value)}" for path, value in overrides.items()))


def _checked(overrides: Any, base: ExperimentConfig, config_file: str, common: Mapping[str, Any]) -> Point:
    if not isinstance(overrides, Mapping) or not all(isinstance(path, str) for path in overrides):
        raise ConfigError("expected a dict from field names to values, e.g. {'train.learning_rate': 1e-3}")
    if twice := sorted(overrides.keys() & common.keys()):
        raise ConfigError(f"--config.{twice[0]} is on the command line too: set it in one place")
    fields = to_dict(base)
    for path, value in overrides.items():
        _set(fields, path, value)
    config = session.read_config(fields)
    if SEED in overrides and config.table.seeds:
        raise ConfigError(
            f"{SEED} has no effect, as table.seeds={config.table.seeds} trains those seeds: empty table.seeds "
            "(--config.table.seeds='()'), or sweep without seeds"
        )
    if config.table.name:
        importlib.import_module(f"experiments.papers.{config.table.name}").check(config)
    plain = to_dict(config)
    exact = {path: _get(plain, path) for path in sorted(overrides)}
    arguments = arguments_of(config_file, {**common, **exact})
    if parse(config_file, {**common, **exact}) != config:
        raise ConfigError(f"{config_file} does not take these values as flags: give its fields the types of the config")
    return Point(exact, config, arguments)


def _get(fields: dict[str, Any], path: str) -> Any:
    return functools.reduce(lambda at, name: at[name], path.split("."), fields)


def _set(fields: dict[str, Any], path: str, value: Any) -> None:
    """Sets ``fields[a][b][c]`` for the path ``a.b.c``; what is not there is made, and refused by the config's check."""
    *groups, name = path.split(".")
    at = fields
    for i, group in enumerate(groups):
        at = at.setdefault(group, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{path}: {'.'.join(groups[: i + 1])} is a field, not a group of fields")
    if isinstance(at.get(name), dict) or isinstance(value, Mapping):
        inner = value if isinstance(value, Mapping) else at[name]
        example = f"{path}.{next(iter(inner), 'field')}"
        raise ConfigError(f"{path} is a group of fields: set each by its full name, e.g. {example!r}")
    at[name] = value
