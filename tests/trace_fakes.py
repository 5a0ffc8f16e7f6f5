"""Models whose routing is recorded, and their traces as files."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import trace
from moejax.config import MeshConfig, RouterConfig
from moejax.limits import of_config
from moejax.model import Decoder
from moejax.sharding import make_mesh, put_batch, token_shards
from moejax.types import MoEMetrics
from tests import moe_fakes as fakes
from tests.small import random_batch, small_config

SHAPE = (8, 12)
LAYERS = 2


def model_of(router: RouterConfig, *, layer_loop: Any = "scan", remat: Any = "none", **moe: Any) -> Decoder:
    """Random weights, two layers, both MoE."""
    return fakes.small_model(moe={"router": router} | moe, layer_loop=layer_loop, remat=remat)


def batches(count: int = 2) -> list[dict[str, np.ndarray]]:
    """Packed batches of two documents a row, padded at some ends; the last is mostly padding."""
    made = []
    for i in range(count):
        batch = {name: leaf[0] for name, leaf in random_batch(batch=SHAPE[0], seq=SHAPE[1], seed=i).items()}
        if i == count - 1:
            batch["mask"][3:] = False
        tokens = batch["tokens"] % fakes.VOCAB
        made.append(batch | {"tokens": tokens, "domain": np.full(SHAPE[0], i % 2, np.int32)})
    return made


def mesh_of(devices: int) -> jax.sharding.Mesh:
    expert = 2 if devices > 1 else 1
    return make_mesh(MeshConfig(data=devices // expert, expert=expert), jax.devices()[:devices])


def record(
    path: Path, model: Decoder, *, limits: Any = None, devices: int = 1, count: int = 2, **settings: Any
) -> list[MoEMetrics]:
    """Writes the trace of ``model`` on :func:`batches`; returns what the model said of each batch on line."""
    mesh = mesh_of(devices)

    @jax.jit
    def run(model: Decoder, batch: dict, limits: Any, key: jax.Array) -> tuple:
        out = model(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], mask=batch["mask"],
            limits=limits, key=key, record=True,
        )  # fmt: skip
        return out.routing, out.metrics

    in_force = of_config(model.config.moe) if limits is None else limits
    meta = trace.header(
        small_config(model.config), in_force, ranks=token_shards(mesh), batch_shape=SHAPE, seed=0, **settings
    )
    said, requests = [], 0
    with trace.writing(path, meta, trace.router_state(model)) as writer, jax.set_mesh(mesh):
        for i, batch in enumerate(batches(count)):
            key = jax.random.fold_in(jax.random.key(0), i)
            put = put_batch({k: v for k, v in batch.items() if k != "domain"}, mesh if devices > 1 else None)
            record, metrics = run(model, put, limits, key)
            chunk = trace.chunk_of(record, batch, requests)
            requests = int(chunk.tokens["requests"].max()) + 1
            assert writer.add(chunk)
            said.append(jax.device_get(metrics))
    return said
