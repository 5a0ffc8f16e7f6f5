"""Weights from elsewhere: a checkpoint of ours or a Hugging Face folder, by one path and one set of functions.

Both give the same :class:`~moejax.model.Decoder`, so whatever takes ``--checkpoint=DIR`` or ``config.init_from=DIR``
takes either. A workdir whose run only evaluates (``train.steps=0``) stands for the weights that it began from.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh

from moejax import checkpoint, importers, limits
from moejax.config import ConfigError, DataConfig, ExperimentConfig, ModelConfig, MoEConfig, from_mapping, to_dict
from moejax.data import load_tokenizer
from moejax.model import Decoder, build, moe_layer_ids
from moejax.sharding import RouterState, tree_shardings
from moejax.validate import check_model

FORMAT = "hugging_face"
CHOICES: dict[str, tuple[str, ...]] = {
    "": ("compute_dtype", "layer_loop", "remat", "mtp_layers"),
    "attention": ("implementation",),
    "moe": ("losses", "capacity_factor", "capacity_order", "capacity_limits", "dispatcher", "implementation"),
}
"""Fields of the model, by group, that change no weight (``mtp_layers``: which are read): with
``model_from="init_from"`` they are the config's."""
_SAMPLES, _SAMPLE = 64, 1 << 16

Dtype = Literal["float32", "bfloat16"]


def open_model(
    path: str | Path, *, compute_dtype: Dtype | None = None, mesh: Mesh | None = None, mtp: bool = False
) -> tuple[Decoder, ExperimentConfig, dict[str, Any]]:
    """The model under ``path``, the config of its run, and the meta of its checkpoint (``step``, ``data``, ...).

    Args:
      path: what :func:`moejax.checkpoint.locate` takes, a Hugging Face folder, or a workdir that only evaluates.
      compute_dtype: instead of the config's. Matrices of a Hugging Face folder are kept in it; ours are float32.
      mesh: where the parameters go, experts split over its axis; None: the default device.
      mtp: with all multi-token-prediction modules that there are. False: with those of the run's config, which for a
        Hugging Face folder are none.

    Raises:
      ConfigError: nothing there, or damaged, or of a model that we do not have; no such module.
    """
    path = Path(path).expanduser()
    run = _evaluated(path)
    if run is not None:
        dtype, wanted = compute_dtype or run.model.compute_dtype, run.model.mtp_layers
        model, _, meta = open_model(run.init_from, compute_dtype=dtype, mesh=mesh, mtp=mtp or wanted > 0)
        changed = dataclasses.replace(run.model, compute_dtype=model.config.compute_dtype)
        if mtp:
            changed = dataclasses.replace(changed, mtp_layers=model.config.mtp_layers)
        return _with_config(model, changed), dataclasses.replace(run, model=changed), meta
    if importers.is_hugging_face(path):
        modules = max(importers.mtp_layers(path), 1) if mtp else 0  # 1 of none: the reason is then told
        config = _config_of(path, compute_dtype, modules)
        model = importers.load(path, mesh=mesh, dtype=config.model.compute_dtype, mtp_layers=modules)
        return _with_config(model, config.model), config, {"step": 0, "config": to_dict(config), "data": {}}
    model, config, meta = checkpoint.load_model(path, compute_dtype=compute_dtype)
    if mtp and not config.model.mtp_layers:
        raise ConfigError(f"{path} holds no multi-token-prediction modules: its run had model.mtp_layers=0")
    if mesh is not None:
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.device_put(state, tree_shardings(state, mesh)))
    return model, config, meta


def adopt(config: ExperimentConfig) -> ExperimentConfig:
    """``config`` with what it takes from the weights it begins from: the model, the tokenizer.

    Raises:
      ConfigError: it takes something and names no ``init_from``; nothing is there; a field is set that is not read.
    """
    wants = [name for name, value in (("model_from", config.model_from), ("data.tokenizer", config.data.tokenizer))
             if value == "init_from"]  # fmt: skip
    if not wants:
        return config
    if not config.init_from:
        raise ConfigError(f"{wants[0]}='init_from' needs init_from=DIR: a checkpoint of ours or a Hugging Face folder")
    source = stored_config(config.init_from)
    if config.model_from == "init_from":
        _refuse_unread(config.model)
        _check_modules(config.init_from, source.model.mtp_layers, config.model.mtp_layers)
        # from here on a config like any other: a workdir's config.json says the whole model
        config = dataclasses.replace(config, model=_merge(source.model, config.model), model_from="config")
    if config.data.tokenizer == "init_from":
        theirs = source.data
        changed = {n: getattr(theirs, n) for n in ("tokenizer", "root")} if theirs.tokenizer.startswith("bpe:") else {
            "tokenizer": theirs.tokenizer}  # fmt: skip
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changed))
    check_model(config.model)
    return config


def limits_left_out(config: ExperimentConfig) -> str | None:
    """The flag that would put the limits of the weights that ``config`` begins from in force, if they have some and
    ``config``, which takes its model from them, has none. None: nothing is left out."""
    if config.model_from != "init_from" or limits.of_config(config.model.moe):
        return None
    theirs = stored_config(config.init_from).model.moe
    if not limits.of_config(theirs):
        return None
    if theirs.capacity_limits:
        return f'"--config.model.moe.capacity_limits={tuple(theirs.capacity_limits)!r}"'
    order = f" --config.model.moe.capacity_order={theirs.capacity_order}"
    return f"--config.model.moe.capacity_factor={theirs.capacity_factor:g}{order}"


def stored_config(path: str | Path) -> ExperimentConfig:
    """The config of the weights under ``path``, without reading them.

    Raises:
      ConfigError: nothing there, or of a model that we do not have.
    """
    path = Path(path).expanduser()
    run = _evaluated(path)
    if run is not None:
        return run
    if importers.is_hugging_face(path):
        return _config_of(path)
    return from_mapping(ExperimentConfig, checkpoint.read_meta(checkpoint.locate(path)).get("config", {}))


def context_length(path: str | Path) -> int:
    """Tokens that the model under ``path`` is made for: the sequence length of its training, of a Hugging Face folder
    (also one whose weights were rewritten and not trained since) what its config.json says.

    Raises:
      ConfigError: nothing there, or a folder that does not say.
    """
    path = Path(path).expanduser()
    run = _evaluated(path)
    if run is not None:
        return context_length(run.init_from)
    if importers.is_hugging_face(path):
        length = importers.context_length(path)
        if length is None:
            raise ConfigError(
                f"{path / importers.CONFIG} has no max_position_embeddings, so how much the model reads at once is not "
                "known: give it, with --max_length=N"
            )
        return length
    meta = checkpoint.read_meta(checkpoint.locate(path))
    source = next((made.get("source", {}) for made in meta.get("made_by", [])), {})
    if not meta.get("step") and source.get("format") == FORMAT and importers.is_hugging_face(source["folder"]):
        return context_length(source["folder"])
    return from_mapping(ExperimentConfig, meta.get("config", {})).data.seq_len


def origin(path: str | Path) -> dict[str, Any]:
    """Where weights come from, as JSON values, for :func:`still`, :func:`check_fit` and :func:`parameters`.

    Raises:
      ConfigError: as :func:`moejax.checkpoint.origin`.
    """
    path = Path(path).expanduser()
    run = _evaluated(path)
    if run is not None:
        return origin(run.init_from)
    if not importers.is_hugging_face(path):
        return checkpoint.origin(path)
    folder = path.resolve()
    return {"folder": str(folder), "step": 0, "config_hash": None, "weights": fingerprint(folder), "format": FORMAT}


def still(known: Mapping[str, Any]) -> None:
    """Raises ConfigError if the weights that :func:`origin` told of are gone, or are others now."""
    if known.get("format") != FORMAT:
        checkpoint.still(dict(known))
        return
    folder = Path(known["folder"])
    again = f"the run began from {folder} (weights {known['weights']}): put that folder back, or use a new --workdir"
    if not importers.is_hugging_face(folder):
        raise ConfigError(f"init_from: {folder} is gone, and {again}")
    if (found := fingerprint(folder)) != known["weights"]:
        raise ConfigError(f"init_from: {folder} now holds other weights ({found}), and {again}")


def tokenizer_hash(known: Mapping[str, Any]) -> str | None:
    """Hash of the tokenizer that the weights :func:`origin` told of were trained with; None: not recorded."""
    if known.get("format") != FORMAT:
        return checkpoint.read_meta(Path(known["folder"])).get("data", {}).get("tokenizer")
    folder = Path(known["folder"])
    return load_tokenizer(f"pretrained:{folder}").hash if (folder / "tokenizer.json").exists() else None


def check_fit(known: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises ConfigError unless the weights that :func:`origin` told of are whole and of a model with this config.

    Reads no array.
    """
    folder = Path(known["folder"])
    if known.get("format") != FORMAT:
        like = nnx.split(jax.eval_shape(lambda: build(config)), nnx.Param, RouterState)
        for tree, prefix in zip(like[1:], ("params/", "router_state/"), strict=True):
            checkpoint.check_fit(folder, tree, prefix=prefix)
        _check_order(folder, config.moe)
        return
    importers.check(folder, config.mtp_layers)
    theirs = _merge(importers.read_config(folder), config)
    if len(moe_layer_ids(config)) == config.num_layers and config.wiring == "standard":
        theirs = dataclasses.replace(theirs, ffn_dim=config.ffn_dim)  # there is no dense layer to have it
    different = _differences(to_dict(theirs), to_dict(config), "model")
    if different:
        raise ConfigError(
            f"init_from={folder} holds another model: {'; '.join(different[:8])}"
            + (f"; and {len(different) - 8} more" if len(different) > 8 else "")
            + " (there, here). Set model_from='init_from' to take the model of those weights"
        )


def changed(known: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """What makes ``config`` another function than the checkpoint of ours that :func:`origin` told of, whose weights fit
    it: each field with both values. Reads no array. None for a Hugging Face folder, which :func:`check_fit` refuses."""
    if known.get("format") == FORMAT:
        return []
    stored = checkpoint.read_meta(Path(known["folder"])).get("config", {})
    try:
        there = from_mapping(ExperimentConfig, stored).model if "model" in stored else config
    except ConfigError as error:
        return [f"a config that cannot be read here ({error}): what differs is not known"]
    there = dataclasses.replace(there, vocab_size=config.vocab_size, mtp_layers=config.mtp_layers)
    return [f"model.{name}={one!r}, here it is {two!r}" for name, one, two in importers.differing(there, config)]


def parameters(known: Mapping[str, Any], params: Any, router_state: Any, *, mesh: Mesh, dtype: Dtype) -> tuple:
    """``(params, router_state)`` of the weights that :func:`origin` told of, placed as these abstract trees are.

    ``dtype`` is that of matrices from a Hugging Face folder; weights of ours are as they were saved.

    Raises:
      ConfigError: they cannot be read, or do not fit.
    """
    folder = Path(known["folder"])
    if known.get("format") != FORMAT:
        one, _ = checkpoint.load(folder, params, prefix="params/")
        other, _ = checkpoint.load(folder, router_state, prefix="router_state/")
        return one, other
    modules = len({path[1] for path, _ in nnx.to_flat_state(params) if path[0] == "mtp"})
    model = importers.load(folder, mesh=mesh, dtype=dtype, mtp_layers=modules)
    _, one, other = nnx.split(model, nnx.Param, RouterState)
    return one, other


def fingerprint(folder: Path) -> str:
    """16 hex digits that stand for the weights of a Hugging Face folder: SHA-256 over its config and, of each file of
    weights, the size, the beginning and samples. It tells one checkpoint from another, not a flipped bit."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(size - _SAMPLE, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------------


def _check_order(folder: Path, moe: MoEConfig) -> None:
    """Raises ConfigError where experts are stored in as many parts, of the same shapes, in another order."""
    stored = checkpoint.read_meta(folder).get("config", {})
    there = stored.get("model", {}).get("moe", {}).get("part_order", "expert")
    if moe.parts > 1 and there != moe.part_order:
        raise ConfigError(
            f"init_from={folder} holds experts in moe.parts={moe.parts} parts with moe.part_order={there!r}, here "
            f"{moe.part_order!r}: set that to {there!r}, or merge the checkpoint and split it again, with python -m "
            "experiments.partition"
        )


def _evaluated(path: Path) -> ExperimentConfig | None:
    """The config of a workdir whose run only evaluates; None for anything else.

    Its ``init_from`` is the folder that the run read, wherever a relative path leads now.

    Raises:
      ConfigError: the config cannot be read; the weights are gone, or others now.
    """
    file = path / "config.json"
    if not file.is_file() or importers.is_hugging_face(path):
        return None
    try:
        stored = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}): restore it, or give the checkpoint's folder") from error
    if not isinstance(stored, dict) or stored.get("train", {}).get("steps") != 0:
        return None
    run, known = from_mapping(ExperimentConfig, stored), _origin_of(path)
    if known is None:
        return run
    still(known)
    return dataclasses.replace(run, init_from=known["folder"])


def _origin_of(workdir: Path) -> dict[str, Any] | None:
    """What a workdir's ``env.json`` says that its run began from.

    Raises:
      ConfigError: it is damaged, so that nothing says which weights those were.
    """
    file = workdir / "env.json"
    try:
        return json.loads(file.read_bytes()).get("init_from")
    except OSError:  # interrupted before it was written: config.json says it too
        return None
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is no JSON object ({error}): restore it, or give the checkpoint's folder") from error


def _config_of(folder: Path, compute_dtype: Dtype | None = None, mtp_layers: int = 0) -> ExperimentConfig:
    """A config for a Hugging Face folder: its model and tokenizer, the built-in texts."""
    model = importers.read_config(folder, mtp_layers)
    check_model(model)
    if compute_dtype:
        model = dataclasses.replace(model, compute_dtype=compute_dtype)
    folder = folder.resolve()
    data = DataConfig(tokenizer=f"pretrained:{folder}", seq_len=512)
    return ExperimentConfig(name=folder.name, model=model, data=data, init_from=str(folder), model_from="init_from")


def _with_config(model: Decoder, config: ModelConfig) -> Decoder:
    """The same weights in a model that is built for ``config``, which may have fewer multi-token-prediction modules."""
    graph = nnx.split(jax.eval_shape(lambda: build(config)), nnx.Param, RouterState)[0]
    _, *states = nnx.split(model, nnx.Param, RouterState)
    if config.mtp_layers < model.config.mtp_layers:
        kept = [
            {p: leaf for p, leaf in nnx.to_flat_state(s) if p[0] != "mtp" or int(str(p[1])) < config.mtp_layers}
            for s in states
        ]
        states = [nnx.from_flat_state(leaves) for leaves in kept]
    return nnx.merge(graph, *states)


def _check_modules(path: str | Path, there: int, wanted: int) -> None:
    """Raises ConfigError where more multi-token-prediction modules are wanted than the weights under ``path`` have."""
    folder = Path(path).expanduser()
    if _evaluated(folder) is None and importers.is_hugging_face(folder):
        importers.read_config(folder, wanted)
    elif wanted > there:
        raise ConfigError(
            f"model.mtp_layers={wanted}: the run of init_from={path} has {there or 'no'} multi-token-prediction "
            f"modules: set it to {there}, or begin from weights that have them"
        )


def _merge(weights: ModelConfig, choices: ModelConfig) -> ModelConfig:
    """The model of ``weights`` with the fields of ``choices`` that change no weight."""
    for group, names in CHOICES.items():
        if group:
            changed = {n: getattr(getattr(choices, group), n) for n in names}
            weights = dataclasses.replace(weights, **{group: dataclasses.replace(getattr(weights, group), **changed)})
        else:
            weights = dataclasses.replace(weights, **{n: getattr(choices, n) for n in names})
    return weights


def _refuse_unread(model: ModelConfig) -> None:
    """Raises ConfigError for a field of ``model`` that is set and would be ignored."""
    neutral = ModelConfig(vocab_size=model.vocab_size) if not model.vocab_size else ModelConfig()
    different = _differences(to_dict(_merge(neutral, model)), to_dict(model), "model")
    if different:
        name, _, values = different[0].partition("=")
        read = sorted({n for names in CHOICES.values() for n in names})
        raise ConfigError(
            f"{name}={values.split(', ')[-1]} is not read with model_from='init_from', where the model is the one of "
            f"the weights; settings that change no weight are {', '.join(read)}"
        )


def _differences(there: Any, here: Any, path: str) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        names = sorted(there.keys() | here.keys())
        return [line for n in names for line in _differences(there.get(n), here.get(n), f"{path}.{n}")]
    return [] if there == here else [f"{path}={there!r}, {here!r}"]
