"""Hugging Face folders in and out: :func:`load` and :func:`write`.

Read are Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3, gpt-oss and LongCat-Flash, in the layout and
with the keys of transformers 4 and 5, from safetensors files alone; nothing in a folder is executed or unpickled.

===============  ===================================================================================================
``files``        the format: headers, memory maps, a writer
``keys``         config.json strictly: every key is used, known to change no logit, or refused
``configs``      config.json to ModelConfig; ``config_json`` the way back; ``rope`` the part on rotary positions
``tables``       which tensor is which parameter, one table for each family, used in both directions
``matching``     a folder's tensors against a table: all of them used once, all parameters filled; ``report`` the error
``quantised``    float8 in blocks, and mxfp4
``loading``      shards from byte ranges
``writing``      the way back
===============  ===================================================================================================
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from moejax.checkpoint.tree import flatten
from moejax.config import ConfigError, ModelConfig
from moejax.importers import configs, files, loading, writing
from moejax.importers.config_json import differing
from moejax.importers.matching import Match, match
from moejax.importers.tables import is_float32
from moejax.importers.writing import check_new
from moejax.model import Decoder, build
from moejax.sharding import RouterState, Rules, tree_shardings
from moejax.validate import check_model

__all__ = [
    "check",
    "check_new",
    "context_length",
    "differing",
    "is_hugging_face",
    "load",
    "mtp_layers",
    "read_config",
    "write",
]

CONFIG = "config.json"


def is_hugging_face(path: str | Path) -> bool:
    """Whether a folder is a Hugging Face model, readable or not: safetensors, or config.json with a ``model_type``."""
    folder = Path(path).expanduser()
    if (folder / files.INDEX).is_file() or any(folder.glob("*.safetensors")):
        return True
    if not (folder / CONFIG).is_file():
        return False
    try:
        return isinstance(files.read_json(folder / CONFIG).get("model_type"), str)
    except ConfigError:
        return False


def read_config(path: str | Path, mtp_layers: int = 0) -> ModelConfig:
    """The model of a Hugging Face folder, from its config.json alone.

    ``compute_dtype`` is the file's dtype if that is float32, else bfloat16; there are no auxiliary losses.

    Args:
      mtp_layers: multi-token-prediction modules that are wanted; those beyond them are not read.

    Raises:
      ConfigError: no such file, an unknown family, or a key or value that is not supported.
    """
    file = Path(path).expanduser() / CONFIG
    config = configs.read_config(files.read_json(file), file, mtp_layers)
    try:
        check_model(config)
    except ConfigError as error:
        raise ConfigError(f"{file} describes a model that cannot be built: {error}") from error
    return config


def mtp_layers(path: str | Path) -> int:
    """How many multi-token-prediction modules that can be read a folder's config.json says there are."""
    file = Path(path).expanduser() / CONFIG
    return configs.published_modules(files.read_json(file), file)


def context_length(path: str | Path) -> int | None:
    """The longest context that a folder's config.json gives its model; None: it gives none."""
    raw = files.read_json(Path(path).expanduser() / CONFIG)
    given = (raw.get(name) for name in ("max_position_embeddings", "max_seq_len"))  # the second is DBRX's name of it
    return next((value for value in given if type(value) is int and value > 0), None)


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    rules: Rules | None = None,
    mtp_layers: int = 0,
) -> Decoder:
    """The model of a Hugging Face folder.

    Args:
      mesh: where the parameters go; None: the default device.
      dtype: of matrices, and of the computation. Norms, routers and sinks stay float32.
      rules: how parameters are split over the mesh.
      mtp_layers: multi-token-prediction modules that are read too.

    Raises:
      ConfigError: the folder is incomplete or damaged, or not exactly a model that we have.
    """
    folder = Path(path).expanduser()
    config = dataclasses.replace(read_config(folder, mtp_layers), compute_dtype=dtype)
    family, tensors, graph, states, matched = _matched(folder, config)
    _tell(folder, family, config, tensors, matched)
    return nnx.merge(graph, *(_filled(state, matched, mesh, rules, dtype) for state in states))


def check(path: str | Path, mtp_layers: int = 0) -> None:
    """What :func:`load` raises for a folder that is incomplete or not exactly a model of ours; reads headers only."""
    folder = Path(path).expanduser()
    _matched(folder, read_config(folder, mtp_layers))


def _matched(folder: Path, config: ModelConfig) -> tuple[str, dict[str, files.Tensor], nnx.GraphDef, list[Any], Match]:
    """``(family, the folder's tensors, graph and abstract states of the model, what becomes what)``."""
    raw = files.read_json(folder / CONFIG)
    tensors = files.open_folder(folder)
    abstract = jax.eval_shape(lambda: build(config))
    graph, *states = nnx.split(abstract, nnx.Param, RouterState)
    shapes = {name: leaf.shape for state in states for name, leaf in flatten(state).items()}
    family = str(raw["model_type"])
    return family, tensors, graph, states, match(folder, family, config, raw, tensors, shapes)


def _filled(state: Any, matched: Match, mesh: Mesh | None, rules: Rules | None, dtype: str) -> Any:
    leaves = flatten(state)
    if mesh is None:
        shardings = dict.fromkeys(leaves, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = flatten(tree_shardings(state, mesh, rules))
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32 if is_float32(name) else jnp.dtype(dtype), sharding=shardings[name]
        )
        for name, leaf in leaves.items()
    }
    return jax.tree.unflatten(jax.tree.structure(state), list(loading.fill(matched, wanted).values()))


def _tell(folder: Path, family: str, config: ModelConfig, tensors: dict[str, files.Tensor], matched: Match) -> None:
    """What was found, for the log."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    types = sorted({tensor.dtype for tensor in tensors.values()})
    rounded = config.compute_dtype == "bfloat16" and not {"F32", "F16"}.isdisjoint(_matrix_types(matched))
    layouts = ", ".join(f"{layout} in {count} layers" for layout, count in matched.layouts.items()) or "none"
    ignored = "; ".join(f"{len(names)}: {reason}" for reason, names in matched.ignored.items()) or "none"
    logging.getLogger("absl").log(
        logging.WARNING if matched.ignored or rounded else logging.INFO,
        "%s: %s, %d layers, %d files of %.2f GB (%s%s); experts: %s; tensors that are not read: %s",
        folder, family, config.num_layers, len({t.path for t in tensors.values()}), size / 1e9, ", ".join(types),
        ", rounded to bfloat16" if rounded else "", layouts, ignored,
    )  # fmt: skip


def _matrix_types(matched: Match) -> set[str]:
    pieces = (piece for name, parts in matched.pieces.items() if not is_float32(name) for piece in parts)
    return {piece.source.tensors[0].dtype for piece in pieces}


def write(
    model: Decoder | Mapping[str, Any],
    config: ModelConfig,
    path: str | Path,
    family: str | None = None,
    *,
    layout: Literal["per_expert", "fused"] = "per_expert",
    dtype: Literal["float32", "bfloat16"] | None = None,
    source: str | Path | None = None,
    context: int | None = None,
) -> str:
    """Writes a model as a Hugging Face folder that transformers 4 and 5 read; returns the family.

    The folder appears when it is complete. What :func:`load` reads from it with the same dtype is equal bit for bit,
    but for ``scale_embeddings``, which no family has: the scaled embeddings are written, and a matrix for the logits.

    Args:
      model: a model, or its parameters by path, as a checkpoint names them without ``params/`` and ``router_state/``.
      config: of the model.
      path: a new or empty folder.
      family: a ``model_type``; None: the first that computes what this model computes.
      layout: experts as 2-D tensors for each, as published, or fused, as transformers 5 keeps them. gpt-oss is fused.
      dtype: of matrices; None: the model's. What is float32 here (norms, routers, sinks) and does not survive bfloat16
        stays float32.
      source: the Hugging Face folder that the model came from, whose tokenizer files and token ids are taken over.
      context: ``max_position_embeddings``; None: that of ``source``, or what the rope scaling reaches, or 4,096.

    Raises:
      ConfigError: ``path`` is not empty or cannot be written, or no family computes what this model computes.
    """
    if isinstance(model, Decoder):
        _, *states = nnx.split(model, nnx.Param, RouterState)
        model = {name: leaf for state in states for name, leaf in flatten(state).items()}
    folder = Path(source).expanduser() if source is not None else None
    return writing.write(
        model,
        config,
        Path(path).expanduser(),
        family=family,
        layout=layout,
        dtype=dtype,
        source=folder,
        context=context,
    )
