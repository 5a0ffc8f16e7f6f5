"""Reading checkpoints: what is found, what fits, and whether it is still what was saved."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from moejax import interrupt
from moejax.checkpoint import checksums
from moejax.checkpoint.checksums import Damaged
from moejax.checkpoint.tree import flatten
from moejax.config import ConfigError, ExperimentConfig, from_mapping
from moejax.model import Decoder, build
from moejax.sharding import RouterState
from moejax.validate import check_model

WEIGHTS = ("params/", "router_state/")
"""Arrays that make the model; the others are the optimizer's and the step."""


def load(folder: Path, like: Any, *, prefix: str = "") -> tuple[Any, dict[str, Any]]:
    """Reads the arrays that ``like`` names (below ``prefix``) from one step folder, and its meta. Other arrays are not
    read. What is read is compared with its checksums; a checkpoint older than those is loaded with a note.

    Raises:
      ConfigError: an array is missing or has another shape, a file of the folder cannot be read, or something in it
        is not what was saved.
    """
    wanted = {f"{prefix}{name}": leaf for name, leaf in flatten(like).items()}
    with _reading(folder):
        stored, record = _listing(folder)
    _require_fit(folder, wanted, stored)
    with _reading(folder):
        abstract = {name: _abstract(leaf, stored[name].dtype) for name, leaf in wanted.items()}
        arrays, meta = _read(folder, stored, record, abstract)
    if record is None:
        _note_without(folder)
    leaves = [
        array
        if array.dtype == leaf.dtype and isinstance(array, jax.Array)
        else jax.device_put(_cast(array, leaf.dtype), _sharding(leaf))
        for array, leaf in zip(arrays.values(), wanted.values(), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), meta


def check_fit(folder: Path, like: Any, *, prefix: str = "") -> None:
    """Raises ConfigError where :func:`load` would find an array missing or of another shape; reads no array."""
    with _reading(folder):
        stored, _ = _listing(folder)
    _require_fit(folder, {f"{prefix}{name}": leaf for name, leaf in flatten(like).items()}, stored)


def _require_fit(folder: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ConfigError(
            f"checkpoint {folder} lacks {len(missing)} arrays of this model, e.g. {missing[:3]}: "
            "was it made with another config?"
        )
    differing = [
        f"{n}: {tuple(stored[n].shape)} != {tuple(w.shape)}"
        for n, w in wanted.items()
        if tuple(stored[n].shape) != w.shape
    ]
    if differing:
        raise ConfigError(
            f"checkpoint {folder} has {len(differing)} arrays of another shape than this model, e.g. {differing[:3]}"
        )


def read_meta(folder: Path) -> dict[str, Any]:
    """The JSON text that lies beside the arrays of a step folder.

    Raises:
      ConfigError: it cannot be read.
    """
    with _reading(folder):
        return _read(folder, {}, checksums.read(folder), {})[1]


def read_all(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every array of a step folder, by path and in host memory, and its meta, compared with its checksums.

    Raises:
      ConfigError: something is damaged, cut short or missing.
    """
    with _reading(folder):
        return _read_all(folder)


def fingerprint(folder: Path) -> str:
    """16 hex digits that stand for the weights in a step folder: SHA-256 over names and checksums of their arrays.

    Raises:
      ConfigError: they cannot be read.
    """
    with _reading(folder):
        record = checksums.read(folder)
        sums = record["arrays"] if record is not None else checksums.of_values(_read_all(folder)[0])
    lines = [f"{name} {value}" for name, value in sorted(sums.items()) if name.startswith(WEIGHTS)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def origin(path: str | Path) -> dict[str, Any]:
    """Where weights come from, as JSON values: ``folder``, ``step``, ``config_hash`` and ``weights``
    (:func:`fingerprint`) of the step folder that ``path`` means.

    Raises:
      ConfigError: as :func:`locate` and :func:`read_meta`.
    """
    folder = locate(path)
    meta = read_meta(folder)
    return {
        "folder": str(folder),
        "step": meta.get("step"),
        "config_hash": meta.get("config_hash"),
        "weights": fingerprint(folder),
    }


def still(known: dict[str, Any]) -> dict[str, Any]:
    """``known``, an :func:`origin`, if its step folder is there and holds the same weights.

    Raises:
      ConfigError: it is gone, or holds others.
    """
    folder = Path(known["folder"])
    again = (
        f"the run began from step {known['step']} in {folder} (weights {known['weights']}): put that folder back, "
        "or begin again in a new --workdir"
    )
    if not (folder / "arrays").is_dir():
        raise ConfigError(f"init_from: {folder} is gone, and {again}")
    if (found := fingerprint(folder)) != known["weights"]:
        raise ConfigError(f"init_from: {folder} now holds other weights ({found}), and {again}")
    return known


def load_model(
    path: str | Path, *, compute_dtype: Literal["float32", "bfloat16"] | None = None
) -> tuple[Decoder, ExperimentConfig, dict[str, Any]]:
    """The model that a checkpoint holds, on the default device, with the config of its run and its meta.

    Args:
      path: as :func:`locate` takes it.
      compute_dtype: instead of the config's; parameters stay float32.

    Raises:
      ConfigError: no finished checkpoint there, or one that cannot be read or is of another model.
    """
    folder = locate(path)
    meta = read_meta(folder)
    if "config" not in meta:
        raise ConfigError(f"checkpoint {folder} names no config: it is not one of experiments.run")
    config = from_mapping(ExperimentConfig, meta["config"])
    check_model(config.model)
    if compute_dtype:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=compute_dtype))
    graph, params, router_state = nnx.split(jax.eval_shape(lambda: build(config.model)), nnx.Param, RouterState)
    arrays, _ = load(folder, {"params": params, "router_state": router_state})
    return nnx.merge(graph, arrays["params"], arrays["router_state"]), config, meta


def steps_in(directory: Path) -> list[int]:
    """Steps that have a finished checkpoint in ``directory``, in order: folders that are named by a number alone."""
    if not directory.is_dir():
        return []
    return sorted(int(child.name) for child in directory.iterdir() if child.name.isdigit() and child.is_dir())


def score_of(folder: Path) -> float | None:
    """Validation score that a step folder was saved with; None for none, and for NaN, which compares with nothing.

    Raises errors of many kinds where it cannot be read.
    """
    record, older = checksums.read(folder), folder / "metrics" / "metrics"
    if record is not None:
        score = record["score"]
    else:
        score = float(json.loads(older.read_bytes())["score"]) if older.exists() else None
    return None if score is None or math.isnan(score) else score


def best_in(directory: Path) -> int | None:
    """Step with the best validation score; the newest where none was scored; None without a checkpoint.

    Raises:
      ConfigError: a score cannot be read.
    """
    scored = []
    for step in steps_in(directory):
        with _reading(directory / str(step)):
            if (score := score_of(directory / str(step))) is not None:
                scored.append((score, step))
    return min(scored)[1] if scored else max(steps_in(directory), default=None)


def locate(path: str | Path) -> Path:
    """The step folder that ``path`` means: a step folder, a ``checkpoints`` folder, or a workdir (best on validation).

    Raises:
      ConfigError: nothing there is a finished checkpoint.
    """
    path = Path(path).resolve()
    if (path / "arrays").is_dir():
        return path
    for folder in (path / "checkpoints", path):
        best = best_in(folder)
        if best is not None:
            return folder / str(best)
    raise ConfigError(
        f"{path}: no finished checkpoint there; give a workdir, its checkpoints folder, one step folder "
        "or a Hugging Face folder (config.json and *.safetensors)"
    )


# --- one folder -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(folder: Path) -> Generator[None]:
    """Orbax raises errors of many kinds, few of which name the checkpoint; all become one that does.

    It also takes a KeyboardInterrupt for a file that cannot be read: Ctrl-C and SIGTERM must not look like damage."""
    quieten()
    shown = sys.unraisablehook
    # after an error it closes the event loop that its reads still want to report to
    sys.unraisablehook = lambda found: None if "Event loop is closed" in str(found.exc_value) else shown(found)
    with interrupt.noted() as came:
        try:
            yield
        except Exception as error:
            if came:
                raise came[0] from error
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"checkpoint {folder} {_what(error)}. {_way_out(folder)}") from error
        finally:
            sys.unraisablehook = shown
        if came:  # and it went on
            raise came[0]


def _what(error: Exception) -> str:
    """What is wrong with a checkpoint that cannot be read."""
    if isinstance(error, Damaged):
        return f"is damaged: {error}"
    first: BaseException = error
    while inner := first.__cause__ or first.__context__:
        first = inner
    why = (str(first).strip() or "no further word").splitlines()[0]
    return f"cannot be read: a file of it is damaged, cut short or missing ({type(first).__name__}: {why[:200]})"


def quieten() -> None:
    """Keeps Orbax's own lines off the screen: it logs each save several times, and what fails before it raises."""
    logging.getLogger("absl").addFilter(_wanted)  # once, however often it is asked for
    warnings.filterwarnings("ignore", "coroutine 'PyTreeHandler._background_load' was never awaited", RuntimeWarning)


def _wanted(record: logging.LogRecord) -> bool:
    if "orbax" not in record.pathname:
        return True
    if record.levelno < logging.WARNING or record.exc_info:
        return False
    known = ("Skipping merge of OCDBT", "Failed to get metadata for checkpointable")
    return not any(text in record.getMessage() for text in known)


def _way_out(folder: Path) -> str:
    """What a user can do about a damaged folder; the one that is offered instead has been read and compared."""
    undo = f"copy it again, or delete this folder ({folder})"
    for step in reversed(steps_in(folder.parent)):
        other = folder.parent / str(step)
        if other == folder:
            continue
        with contextlib.suppress(Exception):  # whatever is wrong with it, it is not the one to offer
            _read_all(other)
            return (
                f"The newest undamaged checkpoint beside it is that of step {step}. Nothing was deleted: {undo}; "
                f"the same command then goes on from step {step}"
            )
    return f"No other checkpoint beside it is undamaged: {undo} and begin again, or start a new --workdir"


def _listing(folder: Path) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    """Shape and type of each array of a step folder, by name, and its record of checksums."""
    stored = ocp.metadata(str(folder), "arrays").metadata
    if not isinstance(stored, Mapping):
        raise Damaged("the list of its arrays is damaged, or a file of them is missing or cut short")
    record = checksums.read(folder)
    if record is not None and record["arrays"].keys() != stored.keys():
        odd = sorted(record["arrays"].keys() ^ stored.keys())
        raise Damaged(f"the list of its arrays is not what was saved: {odd[:3]}")
    return stored, record


def _read(
    folder: Path, stored: Mapping[str, Any], record: Mapping[str, Any] | None, abstract: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of ``abstract``, as it says, and the meta, compared with ``record``."""
    items: dict[str, Any] = {"meta": None}
    if abstract:
        items["arrays"] = {name: abstract.get(name, ocp.PLACEHOLDER) for name in stored}
    out = ocp.load_checkpointables(str(folder), items)
    text = out["meta"]["json"]
    arrays = {name: out["arrays"][name] for name in abstract}
    if record is not None:
        checksums.compare(record, {name: checksums.on_host(array) for name, array in arrays.items()}, text)
    return arrays, json.loads(text)


def _read_all(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    stored, record = _listing(folder)
    abstract = {name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in stored.items()}
    return _read(folder, stored, record, abstract)


def _abstract(leaf: Any, dtype: Any) -> Any:
    """The type that was saved, as checksums are of its bytes, where ``leaf`` lies; on the host where JAX would cast."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return np.broadcast_to(np.zeros((), dtype), leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=_sharding(leaf))


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _cast(array: Any, dtype: Any) -> Any:
    alone = isinstance(getattr(array, "sharding", None), jax.sharding.SingleDeviceSharding)
    if alone and not jax.sharding.get_abstract_mesh().empty:
        array = np.asarray(array)  # where a mesh is in force no program takes an array that lies on one device
    return array.astype(dtype)


@functools.cache
def _note_without(folder: Path) -> None:
    """Once for each folder: its parts are read one after the other."""
    logging.getLogger("absl").warning(
        "checkpoint %s was made before there were checksums: it is loaded, but damage in it would not be seen", folder
    )
