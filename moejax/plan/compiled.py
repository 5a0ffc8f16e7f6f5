"""XLA's own figures for a config: its step compiled for a mesh of this machine's devices, nothing allocated."""

import contextlib
import dataclasses
import math
import os
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import sharding
from moejax.config import ConfigError, ExperimentConfig, MeshConfig
from moejax.train import Trainer, score_fn

FIELDS = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "mask": jnp.bool_,
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one compiled program, on one device."""

    argument_bytes: int
    temp_bytes: int
    sent: dict[str, int]
    """Bytes of the arrays that each kind of collective makes in one call of the program."""
    uncounted: int
    """Collectives inside loops whose length is known on the device only; they count once in ``sent``."""

    @property
    def total(self) -> int:
        return self.argument_bytes + self.temp_bytes


def devices_for(mesh: MeshConfig) -> list[Any]:
    """Devices of this machine for ``mesh`` (no axis may be -1): its accelerators, or emulated CPU devices.

    Raises:
      ConfigError: there are fewer.
    """
    needed = mesh.data * mesh.expert * mesh.model
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):  # the user's word goes first
        with contextlib.suppress(RuntimeError):  # how many devices a CPU shows can be said before JAX starts only
            jax.config.update("jax_num_cpu_devices", max(needed, jax.config.values["jax_num_cpu_devices"]))
    for platform in (None, "cpu"):
        devices = jax.devices(platform)
        if len(devices) >= needed:
            return devices[:needed]
    raise ConfigError(
        f"--dry_run_compile: the mesh needs {needed} devices and JAX shows {len(jax.devices())} here: leave the flag "
        f"out for a plan by arithmetic, or emulate them on the CPU by JAX_PLATFORMS=cpu and "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
    )


def train_step(config: ExperimentConfig, mesh: MeshConfig) -> Figures:
    """Of the training step. Takes as long as the compilation at the start of a run."""
    devices = sharding.make_mesh(mesh, devices_for(mesh))
    trainer = Trainer(config, np.ones(config.model.vocab_size, np.float32), devices)
    micros = config.train.accumulate
    shape = (micros, config.train.batch_size // micros, config.data.seq_len)
    batch = _batch(shape, NamedSharding(devices, P(None, sharding.TOKEN_AXES)))
    with jax.set_mesh(devices):
        return _figures(trainer.step_fn.lower(trainer.abstract, batch).compile())


def score(config: ExperimentConfig, mesh: MeshConfig) -> Figures:
    """Of an evaluation batch."""
    devices = sharding.make_mesh(mesh, devices_for(mesh))
    trainer = Trainer(config, np.ones(config.model.vocab_size, np.float32), devices)
    batch = _batch((config.eval.batch_size, config.data.seq_len), sharding.batch_sharding(devices))
    state, key = trainer.abstract, jax.eval_shape(lambda: jax.random.key(0))
    run = score_fn(trainer.graphdef, devices)
    with jax.set_mesh(devices):
        return _figures(run.lower(state.params, state.router_state, batch, None, key).compile())


def _batch(shape: tuple[int, ...], where: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in FIELDS.items()}


def _figures(program: Any) -> Figures:
    memory = program.memory_analysis()
    if memory is None:
        raise ConfigError("--dry_run_compile: this platform does not say how much memory a program takes")
    sent, uncounted = collective_bytes(program.as_text())
    return Figures(int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes), sent, uncounted)


# --- collectives in a compiled program --------------------------------------------------------------------------------

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


def collective_bytes(text: str) -> tuple[dict[str, int], int]:
    """``(bytes by kind, collectives in loops of unknown length)`` of a compiled program's text.

    A collective counts as often as the loops around it turn, with the bytes of what it makes.
    """
    calls: dict[str, list[tuple[str, float]]] = {}
    made: dict[str, list[tuple[str, int]]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            entry = current if head[1] else entry
            continue
        if found := _COLLECTIVE.search(line):
            made.setdefault(current, []).append((found[2], _shape_bytes(found[1])))
        loop = _WHILE.search(line)
        trips = _TRIPS.search(line)
        for name in _CALLED.findall(line):
            times = 1.0
            if loop and name == loop[1]:
                times = float(trips[1]) if trips else math.nan
            calls.setdefault(current, []).append((name, times))
        for names in _BRANCHES.findall(line):
            calls.setdefault(current, []).extend((name.strip().lstrip("%"), 1.0) for name in names.split(","))

    sums: Counter[str] = Counter()
    unknown = 0

    def visit(name: str, times: float) -> None:
        nonlocal unknown
        for kind, size in made.get(name, []):
            unknown += math.isnan(times)
            sums[kind] += size if math.isnan(times) else round(size * times)
        for other, factor in calls.get(name, []):
            visit(other, times * factor)

    visit(entry, 1.0)
    return dict(sums), unknown


def _shape_bytes(text: str) -> int:
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in extents.split(",") if n) for dtype, extents in _SHAPE.findall(text)
    )
