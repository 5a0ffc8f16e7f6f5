"""What the commands share: flags and errors, reading a config, opening a workdir safely, and the facts in it."""

import dataclasses
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging

import kernels_pallas
from kernels_pallas.grouped_matmul.ffn import Weights
from moejax import count, validate
from moejax.config import ConfigError, ExperimentConfig, config_hash, from_mapping, to_dict
from moejax.data import Corpus
from moejax.experts import GATED
from moejax.results import ResultsError, environment_facts, write_atomically

BINDING = ("model", "data", "train", "init_from")
"""Groups of fields that a workdir's checkpoints depend on; evaluation, table and mesh may change between calls."""
FREE = ("cache_dir", "log_every", "checkpoint_every", "keep_checkpoints")
"""Fields in those groups that change no number."""
SCORED = ("max_tokens",)
"""Fields of ``eval`` that validation scores depend on: the best checkpoint is chosen among equal ones only."""


Define = Callable[[flags.FlagValues, list[str] | None], None]
"""``(values, argv)``; argv None: that of the process."""
Command = Callable[[flags.FlagValues], int]


def launch(define: Define, command: Command) -> None:
    """Runs a program: ``define`` makes its flags, ``command`` reads them and returns the exit code.

    What a user can mend is one paragraph on standard error and exit code 2, without a traceback.
    """
    define(flags.FLAGS, None)
    logging.set_verbosity(logging.WARNING)  # JAX's notes on platforms that are not there

    def parser(argv: list[str]) -> list[str]:
        code = guarded(lambda: parse_flags(argv, flags.FLAGS))
        return argv[:1] if code == 0 else sys.exit(code)

    app.run(lambda argv: sys.exit(guarded(lambda: command(flags.FLAGS))), flags_parser=parser)


def call(define: Define, command: Command, arguments: Sequence[str]) -> int:
    """The same program inside this process, with flags of its own; returns the exit code."""
    values, argv = flags.FlagValues(), ["program", *arguments]
    define(values, argv)

    def parsed() -> int:
        parse_flags(argv, values)
        return command(values)

    return guarded(parsed)


def guarded(action: Callable[[], int | None]) -> int:
    """Exit code of ``action``; an error that a user can mend is printed and gives 2."""
    try:
        return action() or 0
    except (ConfigError, ResultsError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def parse_flags(argv: list[str], values: flags.FlagValues) -> None:
    """Parses ``argv`` into ``values``.

    Raises:
      ConfigError: an unknown flag or field, a value of the wrong type, a config file or variant that is not there.
    """
    try:
        rest = values(argv)
        if "config" in values and values["config"].value is not None:
            values["config"].value.keys()  # a file that failed to load raises when it is first touched
    except Exception as error:  # ml_collections raises AttributeError, KeyError, OSError, ... of its own
        raise ConfigError(_flag_error(error, argv)) from error
    if len(rest) > 1:
        raise ConfigError(f"arguments {rest[1:]} are not flags: write --flag=value, fields as --config.field=value")


def _flag_error(error: BaseException, argv: list[str]) -> str:
    inner = error
    while inner.args and isinstance(inner.args[0], BaseException):
        inner = inner.args[0]
    lines = [line.strip() for line in str(inner.args[0] if inner.args else inner).splitlines() if line.strip()]
    if isinstance(error, AttributeError | KeyError):
        name = lines[0].strip("'\"")
        given = [a for a in argv if name in a.partition("=")[0].split(".")]
        return f"{given[0] if given else name}: the config has no field {name!r}. {' '.join(lines[1:])}".strip()
    config = next((a for a in argv if a.startswith("--config=")), "--config")
    if isinstance(error, OSError):
        return f"{config}: the file cannot be loaded: {lines[-1]}"
    if any(line.startswith("Traceback") for line in lines):
        last = lines[-1]
        return f"{config}: {last.removeprefix('ValueError: ')}" if last.startswith("ValueError: ") else str(error)
    return " ".join(lines)


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def read_config(config_dict: Any) -> ExperimentConfig:
    """The checked config.

    Raises:
      ConfigError: see ``moejax.config`` and ``moejax.validate``.
    """
    config = from_mapping(ExperimentConfig, config_dict)
    validate.check(config)
    table = config.table.name
    if table and importlib.util.find_spec(f"experiments.papers.{table}") is None:
        raise ConfigError(f"table.name={table!r}: there is no module experiments/papers/{table}.py")
    return config


def open_workdir(workdir: Path, config: ExperimentConfig) -> None:
    """Makes the folder and writes ``config.json``, unless it holds a run with another config.

    Raises:
      ConfigError: the folder cannot be written, or holds another run; the message lists the fields that differ.
    """
    stored = workdir / "config.json"
    new = to_dict(config)
    if stored.exists():
        try:
            old = json.loads(stored.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{stored} is not JSON ({error}): restore it, or use another --workdir") from error
        different = [
            line for group in BINDING for line in _differences(old.get(group), new.get(group), f"config.{group}")
        ]
        for name in SCORED:
            different += _differences(old.get("eval", {}).get(name), new["eval"][name], f"config.eval.{name}")
        if different:
            raise ConfigError(
                f"--workdir={workdir} holds a run with another config: {'; '.join(different[:8])}. "
                "Use another --workdir, or the old settings to continue that run."
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(stored, json.dumps(new, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written ({error.strerror}): choose a folder that you may write"
        ) from error


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [line for n in names if n not in FREE for line in _differences(old.get(n), new.get(n), f"{path}.{n}")]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


def command_line() -> str:
    """The command as typed: the module, then its arguments, without the cache's place, which changes no result."""
    module = Path(sys.argv[0]).stem
    arguments = [a for a in sys.argv[1:] if not a.lstrip("-").startswith("config.data.cache_dir")]
    return " ".join(["python -m", f"experiments.{module}", *(shlex.quote(a) for a in arguments)])


def grouped_matmul_facts(config: ExperimentConfig, token_shards: int) -> dict[str, Any]:
    """Which back end computes the experts here, and why the others do not.

    Raises:
      ConfigError: ``model.moe.implementation`` names none, or one that refuses.
    """
    model, moe = config.model, config.model.moe
    dtype = jnp.dtype(model.compute_dtype)
    pairs = config.train.batch_size // config.train.accumulate * config.data.seq_len * moe.router.k // token_shards
    up = jax.ShapeDtypeStruct((moe.num_experts, model.dim, moe.expert_dim), dtype)
    down = jax.ShapeDtypeStruct((moe.num_experts, moe.expert_dim, model.dim), dtype)
    shapes: Any = (up if model.activation in GATED else None, up, down)
    weights = Weights(*shapes)
    try:
        explanation = kernels_pallas.GROUPED_FFN.explain(
            jax.ShapeDtypeStruct((pairs, model.dim), dtype),
            jax.ShapeDtypeStruct((moe.num_experts,), jnp.int32),
            weights,
            model.activation,
            implementation=None if moe.implementation == "auto" else moe.implementation,
        )
    except ValueError as error:
        raise ConfigError(f"model.moe.implementation: {error}") from error
    if explanation.chosen is None:
        raise ConfigError(f"model.moe.implementation={moe.implementation!r} cannot run here: {explanation}")
    return {"implementation": explanation.chosen, "refused": explanation.refusals, "rows": pairs}


def write_env(workdir: Path, config: ExperimentConfig, corpus: Corpus, token_shards: int) -> dict[str, Any]:
    """Writes ``env.json``: command, commit, device, versions, back end, parameters and data; returns it."""
    parameters = count.parameters(config.model)
    facts = {
        "command": command_line(),
        **environment_facts(),
        "process_count": jax.process_count(),
        "config_hash": config_hash(config),
        "grouped_matmul": grouped_matmul_facts(config, token_shards),
        "parameters": {"total": parameters.total, "active": parameters.active},
        "flops_per_token": count.forward_flops_per_token(config.model, config.data.seq_len),
        "data": {
            "hash": corpus.hash,
            "stats": corpus.stats(),
            "tokenizer": corpus.tokenizer.name,
            "epochs": corpus.epochs(config.train.steps * config.train.batch_size * config.data.seq_len),
        },
    }
    write_atomically(workdir / "env.json", json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return facts


def with_seed(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The config with another training seed (initialisation and data order)."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
