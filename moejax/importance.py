"""Neuron importance: one pass of a model over calibration text, and the file that keeps what came of it.

What is summed stands in :mod:`moejax.neurons`; what is done with it in :mod:`moejax.partition.reconstruct`. The pass
streams: it holds one batch, and five numbers for each neuron. No limit is in force, so that the sums are over the pairs
that the router makes.

Letters: L MoE layers, E experts as the router knows them, F expert hidden.
"""

import contextlib
import dataclasses
import json
import zipfile
import zlib
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import ConfigError, ModelConfig
from moejax.data import Batch
from moejax.data.cache import replacing
from moejax.model import Decoder, build, layer_groups, moe_layer_ids
from moejax.neurons import METRICS
from moejax.partition import reconstruct
from moejax.sharding import RouterState, put_batch, tree_shardings
from moejax.train import token_nll

SCHEMA, VERSION = "moejax.importance", 1
SEEN = ("tokens", "positions", "segment_ids", "mask")


@dataclasses.dataclass(frozen=True)
class Importance:
    """Sums over calibration text; those of two texts are added."""

    sums: dict[str, Float[np.ndarray, "L E F"]]
    """By metric, float64."""
    pairs: Float[np.ndarray, "L E"]
    """Pairs of token and expert that they are over."""
    tokens: int

    def __add__(self, other: "Importance") -> "Importance":
        sums = {name: self.sums[name] + other.sums[name] for name in METRICS}
        return Importance(sums, self.pairs + other.pairs, self.tokens + other.tokens)

    def orders(self) -> dict[str, Int[np.ndarray, "L E F"]]:
        """The order of neurons by each metric."""
        return {name: reconstruct.order(values) for name, values in self.sums.items()}


def measure(model: Decoder, batches: Iterable[Batch], mesh: jax.sharding.Mesh) -> Importance:
    """The importance of each neuron of the model's routed experts, over the real tokens of ``batches``.

    Args:
      batches: as of :func:`moejax.data.eval_batches`; read once.
      mesh: its devices share each batch. Sums are the same on any.

    Raises:
      ConfigError: no text.
      FloatingPointError: a sum is NaN or infinite, which no order of neurons can be made of.
    """
    graph, params, router_state = _placed(model, mesh)

    @jax.jit
    def run(params: nnx.State, router_state: nnx.State, batch: dict[str, Array], key: Array) -> Any:
        return _forward(nnx.merge(graph, params, router_state), batch, key, neurons=True).neurons

    moe, total = model.config.moe, None
    for i, batch in enumerate(batches):
        with jax.set_mesh(mesh):
            put = put_batch({name: batch[name] for name in SEEN}, mesh)
            made = jax.device_get(run(params, router_state, put, _key(i)))
        stored = {name: np.asarray(getattr(made, name), np.float64) for name in (*METRICS, "pairs")}
        sums = {name: reconstruct.joined(stored[name], moe.parts, moe.parts_apart) for name in METRICS}
        # each part has all pairs of its expert
        pairs = reconstruct.joined(stored["pairs"][..., None], moe.parts, moe.parts_apart)[..., 0]
        part = Importance(sums, pairs, int(np.sum(batch["mask"])))
        total = part if total is None else total + part
    if total is None or not total.tokens:
        raise ConfigError("neuron importance: there is no text to measure it on")
    broken = [
        layer
        for i, layer in enumerate(moe_layer_ids(model.config))
        if not all(np.isfinite(values[i]).all() for values in total.sums.values())
    ]
    if broken:
        raise FloatingPointError(
            f"layer {broken[0]}: what its neurons do is NaN or infinite; the model or its input is broken"
        )
    return total


def leading_losses(
    model: Decoder,
    orders: Mapping[str, Int[np.ndarray, "L E F"]],
    columns: int,
    batches: Iterable[Batch],
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Loss in nats per token where every pair's expert computes only the first ``columns`` neurons of an order, for
    each of ``orders``; ``"all"``: with all neurons. What the others would add is left out by zeros in ``down``, and
    of the down bias there is as large a share as of the neurons, as in a halved pair.

    Raises:
      ConfigError: no text.
      FloatingPointError: a loss is NaN or infinite.
    """
    graph, params, router_state = _placed(model, mesh)
    masks = {name: reconstruct.leading(order, columns) for name, order in orders.items()}
    masks["all"] = np.ones_like(next(iter(masks.values())))
    moe, repeated = model.config.moe, {}
    for name, mask in masks.items():
        stored = reconstruct.in_parts(mask, moe.parts, moe.parts_apart)[..., None]
        share = np.float32(1.0 if name == "all" else columns / moe.expert_dim)
        repeated[name] = (by_store(model.config, stored), share)

    @jax.jit
    def run(params: nnx.State, router_state: nnx.State, left: tuple, batch: dict, key: Array):
        kept, share = left  # neurons of each store, and the share of the down bias
        flat = dict(nnx.to_flat_state(params))
        for path, variable in flat.items():
            store, name = "/".join(map(str, path[:-1])), path[-1]
            if store in kept and name == "down":
                flat[path] = variable.replace(jnp.where(kept[store], variable[...], 0))
            if store in kept and name == "down_bias":
                flat[path] = variable.replace((share * variable[...]).astype(variable[...].dtype))
        out = _forward(nnx.merge(graph, nnx.from_flat_state(flat), router_state), batch, key)
        return jnp.sum(jnp.where(batch["mask"], token_nll(out.logits, batch["targets"]), 0.0))

    sums, tokens = dict.fromkeys(masks, 0.0), 0
    for i, batch in enumerate(batches):
        with jax.set_mesh(mesh):
            put = put_batch({name: batch[name] for name in (*SEEN, "targets")}, mesh)
            for name, left in repeated.items():
                sums[name] += float(run(params, router_state, left, put, _key(i)))
        tokens += int(np.sum(batch["mask"]))
    if not tokens:
        raise ConfigError("neuron importance: there is no text to judge the metrics on")
    if broken := [name for name, value in sums.items() if not np.isfinite(value)]:
        raise FloatingPointError(
            f"the loss with the leading {columns} neurons by {broken[0]!r} is {sums[broken[0]]}; the model is broken"
        )
    return {name: value / tokens for name, value in sums.items()}


def by_store(config: ModelConfig, values: np.ndarray) -> dict[str, np.ndarray]:
    """One value for each MoE layer ``[L, ...]`` as those of each expert store ``[repeats, ...]``, by its path."""
    made, first = {}, 0
    for g, (pattern, repeats) in enumerate(layer_groups(config)):
        places = [b for b, is_moe in enumerate(pattern) if is_moe]
        of_group = values[first : first + len(places) * repeats]
        for i, b in enumerate(places):
            made[f"groups/{g}/blocks/{b}/moe/store"] = of_group[i :: len(places)]
        first += len(of_group)
    return made


def _forward(model: Decoder, batch: dict[str, Array], key: Array, **settings: Any) -> Any:
    return model(
        batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], mask=batch["mask"],
        limits=(), key=key, **settings,
    )  # fmt: skip


def _key(batch: int) -> Array:
    return jax.random.fold_in(jax.random.key(0), batch)


def _placed(model: Decoder, mesh: jax.sharding.Mesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model on the mesh's devices. No token travels: devices that hold some of the experts gather the others."""
    moe = dataclasses.replace(model.config.moe, dispatcher="local")
    config = dataclasses.replace(model.config, moe=moe)
    graph = nnx.split(jax.eval_shape(lambda: build(config)), nnx.Param, RouterState)[0]
    _, *states = nnx.split(model, nnx.Param, RouterState)
    params, router_state = (jax.device_put(state, tree_shardings(state, mesh)) for state in states)
    return graph, params, router_state


# --- the file -------------------------------------------------------------------------------------


def save(path: Path, importance: Importance, meta: Mapping[str, Any]) -> None:
    """Writes one ``.npz``: an array for each metric, ``pairs``, ``meta`` as JSON. It appears when it is complete."""
    facts = {"schema": SCHEMA, "version": VERSION, "tokens": importance.tokens, **meta}
    arrays: dict[str, Any] = {**importance.sums, "pairs": importance.pairs}
    with replacing(path) as file:
        np.savez(file, **arrays, meta=np.array(json.dumps(facts, sort_keys=True)))


def read(path: Path) -> tuple[Importance, dict[str, Any]]:
    """What :func:`save` wrote.

    Raises:
      ConfigError: no such file, or not one of these, or damaged.
    """
    with _reading(path), np.load(path, allow_pickle=False) as archive:
        meta = json.loads(str(archive["meta"]))
        if (meta["schema"], meta["version"]) != (SCHEMA, VERSION):
            raise ConfigError(
                f"{path} is {meta['schema']!r} of version {meta['version']}; this program reads {SCHEMA!r} of version "
                f"{VERSION}: measure again"
            )
        sums = {name: archive[name] for name in METRICS}
        made = Importance(sums, archive["pairs"], meta["tokens"])
    if any(v.shape != made.sums["gate"].shape for v in sums.values()) or made.pairs.shape != sums["gate"].shape[:2]:
        raise ConfigError(f"{path}: its arrays do not fit together; measure again")
    return made, meta


@contextlib.contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} cannot be read as neuron importance: it is cut short, damaged, or of another kind "
            f"({type(error).__name__}: {str(error)[:120]}); experiments.reconstruct writes such a file"
        ) from error
