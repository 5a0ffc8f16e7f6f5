"""Checkpoints that are made of other checkpoints: one way to read what a model is rewritten from, and one to write the
outcome as a workdir that every command takes.

The outcome stands for itself: the whole model in our format, its config, and of a run of ours the optimizer's state,
the step and the place in the data, so that training goes on where it stood.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moejax import checkpoint, importers, pretrained
from moejax.config import ConfigError, ExperimentConfig, MeshConfig, TrainConfig, config_hash, to_dict
from moejax.importers.writing import new_folder
from moejax.results import environment_facts, write_atomically
from moejax.sharding import RouterState, make_mesh
from moejax.validate import check_model


@dataclasses.dataclass
class Source:
    """What is rewritten."""

    config: ExperimentConfig
    """Of a run of ours its own; of other weights one with their model and tokenizer."""
    arrays: dict[str, Any]
    """By path, as checkpoints name them, in host memory."""
    meta: dict[str, Any]
    score: float | None
    """Of validation, where it was measured."""
    origin: dict[str, Any]
    """Where the weights are: :func:`moejax.pretrained.origin`."""
    trains: bool
    """Whether an optimizer's state is among the arrays, so that training can go on."""


def stored(path: str | Path) -> ExperimentConfig:
    """The config that :func:`read` gives, without reading an array.

    Raises:
      ConfigError: nothing there, or of a model that we do not have.
    """
    config = pretrained.stored_config(path)
    check_model(config.model)
    if config.train.steps and config.model_from != "init_from":
        return config
    return dataclasses.replace(config, train=TrainConfig(), init_from="", model_from="config")


def read(path: str | Path) -> Source:
    """The weights under ``path``: a workdir (its best checkpoint on validation), a step folder, a workdir that only
    evaluates, or a Hugging Face folder, whose matrices keep their type.

    Raises:
      ConfigError: nothing there, or damaged, or of a model that we do not have.
    """
    config, origin = stored(path), pretrained.origin(path)
    if origin.get("format") == pretrained.FORMAT:
        model, _, meta = pretrained.open_model(path, mesh=make_mesh(MeshConfig(data=1), _host()))
        _, params, router_state = nnx.split(model, nnx.Param, RouterState)
        arrays = checkpoint.flatten({"params": params, "router_state": router_state})
        meta = {**meta, "data": {"tokenizer": pretrained.tokenizer_hash(origin)}}
        return Source(config, {name: np.asarray(array) for name, array in arrays.items()}, meta, None, origin, False)
    folder = Path(origin["folder"])
    arrays, meta = checkpoint.read_all(folder)
    if pretrained.stored_config(path).train.steps:
        trains = any(name.startswith("opt_state/") for name in arrays)
        return Source(config, arrays, meta, checkpoint.score_of(folder), origin, trains)
    arrays = {name: array for name, array in arrays.items() if name.startswith(("params/", "router_state/"))}
    meta = {"step": meta["step"], "data": {"tokenizer": pretrained.tokenizer_hash(origin)}}
    return Source(config, arrays, meta, None, origin, False)


def check_new(output: str | Path) -> None:
    """Raises ConfigError unless a workdir can be made at ``output``: nothing is overwritten."""
    importers.check_new(Path(output).expanduser())
    if jax.process_count() > 1:
        raise ConfigError("checkpoints are rewritten by one process: start it without --distributed")


def write(
    output: str | Path,
    source: Source,
    config: ExperimentConfig,
    arrays: Mapping[str, Any],
    record: Mapping[str, Any],
    files: Mapping[str, str | Callable[[Path], None]] | None = None,
) -> Path:
    """Writes a workdir that holds ``arrays`` and appears when it is complete; returns its step folder.

    Args:
      source: what they were made of, for its step, place in the data and score.
      config: of the model that they are.
      record: what was done, as JSON values. The checkpoint's meta lists those of all rewritings under "made_by".
      files: further files of the workdir, by name: their text, or what writes them.

    Raises:
      ConfigError: ``output`` is not new, or cannot be written; the arrays are not those of ``config.model``.
    """
    check_model(config.model)
    output, step = Path(output).expanduser(), int(source.meta["step"])
    facts = environment_facts()
    done = {**record, "source": source.origin, "commit": facts["commit"]}
    meta = source.meta | {
        "config": to_dict(config), "config_hash": config_hash(config),
        "made_by": [*source.meta.get("made_by", []), done],
        "since_log": [],  # sums of the old experts' loads
    }  # fmt: skip
    with new_folder(output) as folder:
        checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
        try:
            checkpoints.save(step, dict(arrays), meta, score=source.score)
            checkpoints.close()
        except BaseException:
            with contextlib.suppress(Exception):  # its writers end before the folder goes
                checkpoints.close()
            raise
        write_atomically(folder / "config.json", json.dumps(to_dict(config), indent=1, sort_keys=True) + "\n")
        env = facts | {"command": record.get("command"), "config_hash": config_hash(config)} | _known(source)
        write_atomically(folder / "env.json", json.dumps(env, indent=1, sort_keys=True) + "\n")
        for name, content in (files or {}).items():
            if isinstance(content, str):
                write_atomically(folder / name, content)
            else:
                content(folder / name)
    return output / "checkpoints" / str(step)


def _host() -> list[jax.Device]:
    """Where arrays are put together that no device computes with: the CPU, unless JAX was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[:1]
    except RuntimeError:
        return jax.local_devices()[:1]


def _known(source: Source) -> dict[str, Any]:
    """What a run that goes on is held to: its texts, and the weights that it began from."""
    if not source.trains:
        return {}
    try:
        env = json.loads((Path(source.origin["folder"]).parent.parent / "env.json").read_bytes())
        return {name: env[name] for name in ("data", "init_from", "sessions") if name in env}
    except (OSError, ValueError, AttributeError, TypeError):  # a step folder that was copied alone
        return {}
