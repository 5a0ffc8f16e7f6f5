"""Loads a checkpoint once, for ``experiments.load_memory``, which watches this process from outside.

    python -m experiments.load_once FOLDER moejax|orbax MESH

Prints a line when JAX is ready, waits for one, loads, prints what it holds, and lives until its input ends.
"""

import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from orbax.checkpoint import v1 as ocp

from moejax import importers
from moejax.checkpoint import flatten
from moejax.config import MeshConfig
from moejax.importers import files
from moejax.importers.matching import match
from moejax.model import build
from moejax.plan import parse_mesh
from moejax.sharding import RouterState, make_mesh

Arrays = dict[str, jax.Array]
"""Parameters by path."""


def by_moejax(folder: Path, mesh: jax.sharding.Mesh) -> Arrays:
    _, *states = nnx.split(importers.load(folder, mesh=mesh), nnx.Param, RouterState)
    return {name: leaf for state in states for name, leaf in flatten(state).items()}


def by_orbax(folder: Path, mesh: jax.sharding.Mesh) -> Arrays:
    """Orbax's own reader, each tensor as it lies in the file; then our stacks, layer by layer and each source given up.

    One device: a tensor of one expert has no axis that could be split over the mesh.
    """
    place = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    tensors = files.open_folder(folder)
    want = {n: jax.ShapeDtypeStruct(t.shape, jnp.bfloat16, sharding=place) for n, t in tensors.items()}
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
        loaded: Any = ocp.load(str(folder), want)
    config = importers.read_config(folder)
    _, *states = nnx.split(jax.eval_shape(lambda: build(config)), nnx.Param, RouterState)
    shapes = {name: leaf.shape for state in states for name, leaf in flatten(state).items()}
    raw = files.read_json(folder / "config.json")
    pieces = match(folder, str(raw["model_type"]), config, raw, tensors, shapes).pieces
    made = {}
    for name, parts in pieces.items():
        layers = []
        for _, layer in itertools.groupby(parts, lambda part: part.lead[:1]):
            experts = list(layer)
            row, sources = experts[0].row, [loaded.pop(part.source.tensors[0].name) for part in experts]
            stack = stacked(sources, row.factored, row.permutation)
            layers.append(stack if row.count else stack[0])
            jax.block_until_ready(layers)
            del sources
        whole = stacked(layers, layers[0].shape, tuple(range(layers[0].ndim)))
        whole = whole if name.startswith("groups/") else whole[0]
        made[name] = jax.block_until_ready(whole.astype(jnp.float32) if importers.is_float32(name) else whole)
    return made


@functools.partial(jax.jit, static_argnums=(1, 2))
def stacked(values: list[jax.Array], shape: tuple[int, ...], order: tuple[int, ...]) -> jax.Array:
    return jnp.stack([value.reshape(shape).transpose(order) for value in values])


def main(folder: Path, program: str, mesh_text: str) -> None:
    mesh = make_mesh(parse_mesh(mesh_text, MeshConfig(data=1)))
    jax.block_until_ready(jnp.zeros(1) + 1)
    print("ready", flush=True)
    sys.stdin.readline()
    begin = time.perf_counter()
    arrays = {"moejax": by_moejax, "orbax": by_orbax}[program](folder, mesh).values()
    seconds = time.perf_counter() - begin
    shards = [shard.data.nbytes for array in arrays for shard in array.addressable_shards]
    told = {
        "seconds": seconds, "held_bytes": sum(shards), "largest_shard_bytes": max(shards),
        "parameters": sum(math.prod(array.shape) for array in arrays),
        "on_host": mesh.devices.flat[0].platform == "cpu",
        "device": mesh.devices.flat[0].device_kind, "device_count": mesh.size,
    }  # fmt: skip
    print(json.dumps(told), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
