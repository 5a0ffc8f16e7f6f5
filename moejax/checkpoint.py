"""Checkpoints: Orbax behind one small class, and which experts a save holds (seam 9).

Arrays are stored flat, by their path in the training state (``params/groups/0/blocks/0/moe/store/up``), as global
arrays with the expert axis whole: a checkpoint does not depend on the mesh that wrote it. Beside them lies one JSON
text with the step, the config, the position in the data and what else the caller hands in.

Saves are asynchronous and atomic (a step folder without Orbax's commit mark does not count). The newest few are kept,
and the best one on validation.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from moejax.config import ConfigError, ExperimentConfig, from_mapping
from moejax.model import Decoder, build
from moejax.sharding import RouterState
from moejax.validate import check_model

CheckpointPolicy = Callable[[int, np.ndarray], np.ndarray]
"""Seam 9: ``(step, loads[L, E]) -> bool[L, E]``, which experts this save holds."""


def all_experts(step: int, loads: np.ndarray) -> np.ndarray:
    """The default policy: every save is a full one."""
    del step
    return np.ones_like(loads, dtype=bool)


def flatten(tree: Any) -> dict[str, Any]:
    """``{path: leaf}`` with slash-separated paths that name every container key."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_part(k) for k in path if _part(k)): leaf for path, leaf in leaves}


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            text = str(getattr(key, attribute))
            return (
                "" if text in ("value", "raw_value") else text
            )  # the inside of an nnx.Variable is no level of its own
    return str(key)


class Checkpoints:
    """Checkpoints of one run under ``directory``.

    ``writer=False`` leaves the folder as it is: a run that is saving there at this moment is not disturbed.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 2, policy: CheckpointPolicy = all_experts, writer: bool = True
    ) -> None:
        self.directory = Path(directory).resolve()
        self.policy = policy
        policies = ocp.training.preservation_policies
        logging.getLogger("absl").addFilter(_quiet)
        preserve = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=lambda m: m["score"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._orbax = ocp.training.Checkpointer(
            str(self.directory), preservation_policy=cast(Any, preserve), cleanup_tmp_directories=writer
        )

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        *,
        score: float | None,
        loads: np.ndarray | None = None,
    ) -> None:
        """Starts an asynchronous save; waits for the one before it. ``score``: validation, lower is better."""
        if loads is not None and not self.policy(step, loads).all():
            raise ValueError(
                "this class writes full checkpoints: a partial policy needs a store that merges versions at restore"
            )
        self._orbax.wait()
        self._orbax.save_checkpointables_async(
            step,
            {"arrays": flatten(state), "meta": {"json": json.dumps(meta)}},
            metrics=None if score is None else {"score": float(score)},
            force=True,
        )

    def steps(self) -> list[int]:
        self._orbax.wait()
        return sorted(c.step for c in self._orbax.checkpoints)

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> int | None:
        """Step with the best validation score; the newest where none was scored."""
        self._orbax.wait()
        scored = [(cast(dict, c.metrics)["score"], c.step) for c in self._orbax.checkpoints if c.metrics]
        return min(scored)[1] if scored else self.latest()

    def restore(self, like: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """State and meta of ``step``, placed as ``like`` is (arrays or ShapeDtypeStructs with shardings)."""
        return load(self.directory / str(step), like)

    def close(self) -> None:
        self._orbax.wait()
        self._orbax.close()


def load(folder: Path, like: Any, *, prefix: str = "") -> tuple[Any, dict[str, Any]]:
    """Reads the arrays that ``like`` names (below ``prefix``) from one step folder, and its meta. Other arrays are not
    read.

    Raises:
      ConfigError: an array is missing or has another shape, or a file of the folder cannot be read.
    """
    wanted = {f"{prefix}{name}": leaf for name, leaf in flatten(like).items()}
    with _reading(folder):
        stored = ocp.checkpointables_metadata(str(folder)).metadata["arrays"]
        if stored is None:
            raise ValueError("the list of its arrays is damaged, or a file of them is missing or cut short")
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
    abstract = {name: _abstract(wanted[name]) if name in wanted else ocp.PLACEHOLDER for name in stored}
    with _reading(folder):
        out = ocp.load_checkpointables(str(folder), {"arrays": abstract, "meta": None})
        meta = json.loads(out["meta"]["json"])
    return jax.tree.unflatten(jax.tree.structure(like), [out["arrays"][name] for name in wanted]), meta


def read_meta(folder: Path) -> dict[str, Any]:
    """The JSON text that lies beside the arrays of a step folder.

    Raises:
      ConfigError: it cannot be read.
    """
    with _reading(folder):
        return json.loads(ocp.load_checkpointables(str(folder), {"meta": None})["meta"]["json"])


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


@contextlib.contextmanager
def _reading(folder: Path) -> Generator[None]:
    """Orbax raises errors of many kinds, few of which name the checkpoint; all become one that does."""
    try:
        yield
    except Exception as error:
        why = (str(error).strip() or "no further word").splitlines()[0]
        raise ConfigError(
            f"checkpoint {folder} cannot be read: a file of it is damaged, cut short or missing "
            f"({type(error).__name__}: {why[:160]}). Copy it again, or delete this folder: the run then goes on "
            "from the checkpoint before it"
        ) from error


def locate(path: str | Path) -> Path:
    """The step folder that ``path`` means: a step folder, a ``checkpoints`` folder, or a workdir (best on validation).

    Raises:
      ConfigError: nothing there is a finished checkpoint.
    """
    path = Path(path).resolve()
    if (path / "arrays").is_dir():
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir()):
            checkpoints = Checkpoints(folder, writer=False)
            best = checkpoints.best()
            checkpoints.close()
            if best is not None:
                return folder / str(best)
    raise ConfigError(
        f"{path}: no finished checkpoint there; give a workdir, its checkpoints folder or one step folder"
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _quiet(record: logging.LogRecord) -> bool:
    """Orbax logs each save several times; warnings stay, but for one about the JSON text (nothing to merge)."""
    return record.levelno >= logging.WARNING and "Skipping merge of OCDBT" not in record.getMessage()
