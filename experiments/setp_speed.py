"""Bandwidth of S-ETP against true expert-tensor parallelism (DualSparse-MoE, 2508.18376) on the devices of one host.

    python -m experiments.setp_speed --output=setp.jsonl [--tensor=2] [--mib=1,4,16,64] [--factor=fit] \
        [--measure=collectives,trip,layer] [--experts=64 --k=8 --dim=2048 --expert_dim=1024 --tokens=8192] [--tiny]

R devices are EP groups times TP = ``--tensor``; each has tokens of its own. Ways to bring them to all parts of their
experts and back:

``ETP``
    As the paper has it: all-to-all over the EP groups and all-gather over the TP devices of one; the experts, each
    device with 1 / TP of their neurons; reduce-scatter and all-to-all back.
``ETP, tokens first``
    The same with the all-gather of tokens before the all-to-all, and the reduce-scatter of their sums after it: a token
    is gathered once, however many experts it has. Not in the paper.
``S-ETP``
    Each pair as TP pairs, one for each part of its expert, and one all-to-all over all R devices each way. Parts stand
    apart (``moe.part_order="part"``), so that a device holds what it holds in ETP.
``S-ETP, tokens``
    The same with each token sent once to each device that has parts for it, and one sum of theirs back
    (``moe.ep_send="tokens"``; not in the paper).

``collectives`` are those of rows alone, from buffer to buffer and back; ``trip`` has plan, counts, packing and the
weighted sum too; both without experts. Bandwidth is the paper's: bytes of the tokens that a device has (``--mib``;
bfloat16, on a CPU float32) over the time of both directions. Timings of the ways alternate, and the ratio to ETP is the
median over such pairs. Routing is uniform. Every way is checked before it is timed: it must bring each token to every
part of its experts, and back.

``layer`` is a whole MoE layer on equal tokens: ``moe.parts`` on R ranks, with parts apart, against the mesh axis
``model``, where the TP devices of a group have the same tokens; each with pairs and with tokens that travel.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import session
from experiments.ep_speed import FITS, Setting, placed_layer, routing_tables, table_of
from kernels_pallas.dispatch import default_platform
from kernels_pallas.rivals import timing
from moejax import dispatch, partition, sharding
from moejax.config import ConfigError, MeshConfig, MoEConfig
from moejax.dispatch.shards import AXIS
from moejax.plan.compiled import collective_bytes
from moejax.results import ResultRow, append_rows
from moejax.types import RouteContext, Routing

PAPER, TABLE = "dualsparse", "s-etp"
TENSOR = "data"
"""Mesh axis of a group's TP devices in ETP: each has tokens of its own, which is what the axis ``data`` is."""
WAYS = ("ETP", "ETP, tokens first", "S-ETP", "S-ETP, tokens")
MEASURES = ("collectives", "trip", "layer")
PUBLISHED = {(4, 2): (1.030, 1.299), (2, 4): (1.092, 1.152)}
"""S-ETP over ETP by (EP, TP) on 8 H20, over input sizes: section 5 of the paper."""


def row_type() -> np.dtype:
    """bfloat16; on a CPU float32, as XLA's compiler aborts there on a reduce-scatter of bfloat16 (JAX 0.11.2)."""
    return jnp.dtype(jnp.float32 if default_platform() == "cpu" else jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Devices of both: ``groups * tensor`` of them."""

    groups: int
    tensor: int
    experts: int

    @property
    def ranks(self) -> int:
        return self.groups * self.tensor

    def mesh(self, way: str) -> Mesh:
        """With the token axes of a way; the first axis runs slowest, so a device has the same tokens in each."""
        soft = way.startswith("S-ETP")
        config = MeshConfig(data=1, expert=self.ranks) if soft else MeshConfig(data=self.tensor, expert=self.groups)
        return sharding.make_mesh(config, jax.devices()[: self.ranks])

    @property
    def in_parts(self) -> dict[str, Any]:
        """Of S-ETP's :class:`MoEConfig`. Rank ``p groups + g`` has part p of the experts of group g, as the device of
        that number has in :meth:`mesh` of the other ways."""
        return {"parts": self.tensor, "part_order": "part"}

    def spread(self, table: Routing) -> Routing:
        """``table`` over parts."""
        return partition.spread(table, self.tensor, apart=True)

    def pieces(self, ids: Any) -> tuple[Any, Any]:
        """``(expert, part)`` of ids that :meth:`spread` gave."""
        return ids % self.experts, ids // self.experts


def fitted(expert: np.ndarray, grid: Grid, way: str) -> float:
    """The smallest multiple of 1 / 64 with room for every device's pairs for every destination."""
    size = grid.experts // grid.groups
    group = expert.reshape(grid.ranks, -1) // size  # a part's pairs are as many as its expert's
    if way == "ETP, tokens first":  # a device sends those of all its group's devices
        group = np.concatenate(np.split(group, grid.tensor), axis=1)
    most = max(np.bincount(one, minlength=grid.groups).max() for one in group)
    return math.ceil(most / (group.shape[1] / grid.groups) * FITS) / FITS


# --- the ways -----------------------------------------------------------------------------------------------------


def pretend(grid: Grid, rows: jax.Array, sizes: jax.Array, tensor: jax.Array | None) -> jax.Array:
    """In the place of the experts: rows times ``(expert % 2 + 1) (part + 1)``. ``tensor``: the part that this device
    computes of each; None: groups are those of parts."""
    group = jnp.sum(jnp.arange(rows.shape[0])[:, None] >= jnp.cumsum(sizes), axis=1)
    ids = jax.lax.axis_index(AXIS) * sizes.shape[0] + group
    expert, part = grid.pieces(ids) if tensor is None else (ids, tensor)
    return rows * ((expert % 2 + 1) * (part + 1)).astype(rows.dtype)[:, None]


def compiled(fn: Callable[..., Any], mesh: Mesh, args: tuple[Any, ...]) -> Any:
    """``fn`` on each device's share of the leading axes of ``args``."""

    def run(*args: Any) -> Any:
        return dispatch.per_shard(lambda *a: fn(*a[:-1]), args, None)

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(*args).compile()


def config_of(setting: Setting, grid: Grid, way: str, factor: float) -> MoEConfig:
    """Of the layer's dispatcher."""
    sent = "tokens" if way == "S-ETP, tokens" else "pairs"
    parts = grid.in_parts if way.startswith("S-ETP") else {}
    return setting.config(dispatcher="ep", ep_send=sent, ep_buffer_factor=factor, **parts)


def round_trip(setting: Setting, grid: Grid, way: str, factor: float, check: bool) -> Callable[..., Any]:
    """``(x, experts of each token) -> (what comes back, overflow)``. Only ``check`` has something in the experts'
    place."""
    soft = way.startswith("S-ETP")
    dispatcher = dispatch.ExpertParallel(config_of(setting, grid, way, factor))

    def work(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        return pretend(grid, rows, sizes, None if soft else jax.lax.axis_index(TENSOR)) if check else rows

    def gathered(leaf: jax.Array) -> jax.Array:
        return jax.lax.all_gather(leaf, TENSOR, tiled=True)

    def scattered(leaf: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(leaf, TENSOR, tiled=True)

    def trip(x: jax.Array, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = way == "ETP, tokens first"
        if first:
            x, expert = gathered(x), gathered(expert)
        table = table_of(expert, setting.experts)
        table = grid.spread(table) if soft else table
        (rows,), plans = dispatcher.send(x, table)
        (sizes,) = dispatcher.group_sizes(plans)
        if way == "ETP":
            of_all, sizes = gathered(rows), gathered(sizes[None])
            made = [work(*one) for one in zip(jnp.split(of_all, grid.tensor), sizes, strict=True)]
            ys = scattered(jnp.concatenate(made))
        else:
            ys = work(rows, sizes)
        y = dispatcher.give_back((ys,), table.weight, plans, x.shape[0])
        return scattered(y) if first else y, dispatcher.overflow(plans)

    return trip


def collectives(way: str) -> Callable[..., Any]:
    """Both directions of rows alone, and of tokens where the way gathers them: ``(buffer, tokens) -> what came back``.
    The barriers stand in the place of the experts."""

    def exchanged(buffer: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(buffer, AXIS, 0, 0, tiled=True)

    def both(buffer: jax.Array, x: jax.Array) -> Any:
        if way == "ETP":
            held = jax.lax.optimization_barrier(jax.lax.all_gather(exchanged(buffer), TENSOR, tiled=True))
            return exchanged(jax.lax.psum_scatter(held, TENSOR, tiled=True))
        back = exchanged(jax.lax.optimization_barrier(exchanged(buffer)))
        if way.startswith("S-ETP"):
            return back
        x = jax.lax.optimization_barrier(jax.lax.all_gather(x, TENSOR, tiled=True))
        return back, jax.lax.psum_scatter(x, TENSOR, tiled=True)

    return both


def buffer_size(setting: Setting, grid: Grid, way: str, factor: float, tokens: int) -> int:
    """Rows of a device's send buffer."""
    config = config_of(setting, grid, way, factor)
    ranks = grid.ranks if config.parts > 1 else grid.groups
    tokens *= grid.tensor if way == "ETP, tokens first" else 1
    table = (tokens, setting.k * config.parts)
    capacity = dispatch.buffer_rows(config, table, tokens, ranks, config.stored_experts, config.parts)
    return ranks * (min(tokens, capacity) if dispatch.sends_tokens(config, tokens, capacity) else capacity)


def wire_bytes(setting: Setting, grid: Grid, way: str, rows: int, tokens: int) -> int:
    """Bytes that a device sends in both directions together, padding too, by rings; counts, places and gate weights
    apart. ``rows``: of its send buffer."""
    of_tensor = grid.tensor - 1
    if way.startswith("S-ETP"):
        sent = rows * (grid.ranks - 1) / grid.ranks
    else:
        sent = rows * (grid.groups - 1) / grid.groups + of_tensor * (rows if way == "ETP" else tokens)
    return round(2 * sent * setting.dim * row_type().itemsize)


def checked(setting: Setting, grid: Grid, way: str, factor: float, x: np.ndarray, expert: np.ndarray) -> None:
    """Raises ConfigError unless every token came back as the sum over its experts' parts, and nothing overflowed."""
    mesh = grid.mesh(way)
    where = NamedSharding(mesh, P(sharding.TOKEN_AXES))
    args = tuple(jax.device_put(a, where) for a in (jnp.asarray(x, row_type()), expert))
    y, overflow = compiled(round_trip(setting, grid, way, factor, check=True), mesh, args)(*args)
    y, of_parts = np.asarray(y, np.float32).reshape(x.shape), grid.tensor * (grid.tensor + 1) // 2
    expected = x * (expert % 2 + 1).sum(axis=1, keepdims=True) * of_parts
    wrong = int((~np.isclose(y, expected, rtol=2**-7, atol=0)).any(axis=1).sum())  # exact up to 256 in bfloat16
    if wrong or int(np.sum(overflow)):
        raise ConfigError(
            f"WRONG: {way}: {wrong} tokens came back changed, {int(np.sum(overflow))} pairs overflowed; nothing was "
            "timed"
        )


# --- timing -------------------------------------------------------------------------------------------------------


def in_turn(setting: Setting, calls: dict[str, Callable[[], Any]]) -> dict[str, timing.Timings]:
    """Timings of each call, in turn, ``setting.repeats`` times."""
    return timing.in_turns(calls, jax.block_until_ready, setting.repeats, setting.target_ms)


def ratio(of: timing.Timings, to: timing.Timings) -> dict[str, float]:
    """How many times as fast as ``to``: median over pairs, and percentiles."""
    each = np.asarray(to.seconds) / np.asarray(of.seconds)
    return {
        "times_as_fast": float(np.median(each)), "times_as_fast_p10": float(np.percentile(each, 10)),
        "times_as_fast_p90": float(np.percentile(each, 90)),
    }  # fmt: skip


def counted(text: str) -> dict[str, int]:
    """Collectives of each kind in a compiled program's text."""
    found = re.findall(r" (all-to-all|all-gather|reduce-scatter|all-reduce)(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in sorted(set(found))}


def bandwidth_rows(
    setting: Setting, grid: Grid, mib: float, factor: str, measure: list[str], shared: dict[str, Any]
) -> Iterator[ResultRow]:
    """Rows of one input size."""
    itemsize = row_type().itemsize
    tokens = max(1, round(mib * 2**20 / (itemsize * setting.dim)))
    x = np.random.default_rng(1).integers(-1, 2, (grid.ranks * tokens, setting.dim)).astype(np.float32)
    expert = routing_tables("uniform", setting, tokens, grid.ranks)
    factors = {way: fitted(expert, grid, way) if factor == "fit" else float(factor) for way in WAYS}
    for way in WAYS:
        checked(setting, grid, way, factors[way], x, expert)
    for what in (name for name in measure if name != "layer"):
        calls: dict[str, Callable[[], Any]] = {}
        extra: dict[str, dict[str, Any]] = {}
        for way in WAYS:
            rows, mesh = buffer_size(setting, grid, way, factors[way], tokens), grid.mesh(way)
            where = NamedSharding(mesh, P(sharding.TOKEN_AXES))
            held = jax.device_put(jnp.asarray(x, row_type()), where)
            if what == "trip":
                fn = round_trip(setting, grid, way, factors[way], check=False)
                args = (held, jax.device_put(expert, where))
            else:
                fn = collectives(way)
                args = (jnp.zeros((grid.ranks * rows, setting.dim), row_type(), device=where), held)
            run = compiled(fn, mesh, args)
            calls[way] = lambda run=run, args=args: run(*args)
            sent = wire_bytes(setting, grid, way, rows, tokens)
            extra[way] = {"rows": rows, "buffer_factor": factors[way], "wire_bytes": sent,
                          "collectives": counted(run.as_text())}  # fmt: skip
        times = in_turn(setting, calls)
        size = itemsize * tokens * setting.dim
        at = f"{grid.groups} x {grid.tensor} devices, {mib:g} MiB"
        for way, time in times.items():
            sizes: dict[str, Any] = {
                "mib": mib, "input_bytes": size, "tokens": tokens, "dim": setting.dim, "type": str(row_type()),
                "k": setting.k, "experts": setting.experts, "groups": grid.groups, "tensor": grid.tensor,
                "x": mib, "x_name": "MiB of tokens on a device", "arm": way,
            }  # fmt: skip
            if way == "S-ETP" and (grid.groups, grid.tensor) in PUBLISHED:
                sizes["published_times_as_fast"] = PUBLISHED[grid.groups, grid.tensor]
            yield ResultRow(
                **shared, row=f"{way}, {at}", metric=f"bandwidth/{what}", unit="GB/s", value=size / time.median / 1e9,
                baseline_row="" if way == "ETP" else f"ETP, {at}",
                extra=sizes | extra[way] | time.fields() | ratio(time, times["ETP"]),
            )  # fmt: skip


# --- the layer ----------------------------------------------------------------------------------------------------


def layer_rows(setting: Setting, grid: Grid, shared: dict[str, Any]) -> Iterator[ResultRow]:
    """A whole layer's forward pass on equal tokens: on the mesh axis ``model``, and with parts."""
    true = MeshConfig(data=1, expert=grid.groups, model=grid.tensor)
    soft = MeshConfig(data=1, expert=grid.ranks)
    meshes: dict[str, tuple[MeshConfig, dict[str, Any]]] = {
        "ETP by the mesh axis model": (true, {"ep_send": "pairs"}),
        "ETP by the mesh axis model, tokens": (true, {"ep_send": "tokens"}),
        "S-ETP": (soft, grid.in_parts | {"ep_send": "pairs"}),
        "S-ETP, tokens": (soft, grid.in_parts | {"ep_send": "tokens"}),
    }
    x = np.random.default_rng(0).standard_normal((grid.ranks, setting.tokens, setting.dim), np.float32)
    made, calls, expected = {}, {}, None
    for label, (config, parts) in meshes.items():
        mesh = sharding.make_mesh(config, jax.devices()[: grid.ranks])
        with jax.set_mesh(mesh):
            layer = placed_layer(setting.config(dispatcher="ep", **parts), setting, mesh)
            here = jax.device_put(jnp.asarray(x, row_type()), sharding.batch_sharding(mesh))
            run = jax.jit(lambda layer, x: layer(x, RouteContext())[0]).lower(layer, here).compile()
            y = np.asarray(run(layer, here), np.float32)
        expected = y if expected is None else expected
        error = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
        if error > 2e-2:  # parts are rounded to bfloat16 one by one before they are summed
            raise ConfigError(f"WRONG: layer, {label}: differs from ETP by {error:.1e}; nothing was timed")
        text = run.as_text() or ""
        sent, uncounted = collective_bytes(text)
        made[label] = {"error": error, "collectives": counted(text), "made_bytes": sent, "in_loops": uncounted}
        calls[label] = lambda run=run, args=(layer, here): run(*args)
    times = in_turn(setting, calls)
    first = next(iter(times))
    for label, time in times.items():
        yield ResultRow(
            **shared, row=f"layer, {label}, {grid.groups} x {grid.tensor} devices", metric="milliseconds/forward",
            unit="ms", value=1e3 * time.median,
            extra=made[label] | time.fields() | ratio(time, times[first]) | {
                "tokens": setting.tokens, "dim": setting.dim, "expert_dim": setting.expert_dim, "k": setting.k,
                "experts": setting.experts, "groups": grid.groups, "tensor": grid.tensor,
            },
        )  # fmt: skip


# --- the command --------------------------------------------------------------------------------------------------

TINY = {"mib": ["0.01"], "experts": 8, "dim": 64, "expert_dim": 16, "tokens": 32, "repeats": 2, "target_ms": 0, "k": 2}


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    flags.DEFINE_list("mib", ["1", "4", "16", "64"], "MiB of tokens that a device has.", flag_values=values)
    flags.DEFINE_list("measure", list(MEASURES), f"Of {', '.join(MEASURES)}.", flag_values=values)
    flags.DEFINE_string("factor", "fit", "Buffers: fit, 0 (the worst case) or a number.", flag_values=values)
    for name, default, text in (
        ("tensor", 2, "TP: devices that share an expert."), ("devices", 0, "Devices to use; 0: all."),
        ("experts", 64, "Experts; groups of TP devices must divide them."),
        ("k", 8, "Choices of a token."), ("dim", 2048, "Model width."), ("expert_dim", 1024, "Hidden width."),
        ("tokens", 8192, "Tokens of each device, for the layer."), ("repeats", 20, "Timings of each."),
        ("target_ms", 50, "Calls of one timing take about so long together."),
    ):  # fmt: skip
        flags.DEFINE_integer(name, default, text, lower_bound=0, flag_values=values)
    flags.DEFINE_bool("tiny", False, "Sizes of a second on a CPU, to see that it runs.", flag_values=values)
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", flag_values=values)


def read_flags(values: flags.FlagValues) -> tuple[Setting, Grid]:
    """Raises ConfigError for what cannot be measured, before anything is."""
    if values.tiny:
        for name, value in TINY.items():
            if not values[name].present:
                values[name].value = value
    devices = min(values.devices or jax.device_count(), jax.device_count())
    tensor = values.tensor
    if tensor < 2 or devices % tensor:
        raise ConfigError(
            f"--tensor={tensor}: devices that share an expert, 2 or more, must divide the {devices} devices; emulate "
            "them on the CPU by XLA_FLAGS=--xla_force_host_platform_device_count=8"
        )
    groups = devices // tensor
    experts = values.experts
    if experts % groups or not 1 <= values.k <= experts:
        raise ConfigError(f"--experts={experts} must divide over {groups} groups of devices, and --k={values.k} lie in "
                          "[1, experts]")  # fmt: skip
    if values.expert_dim % tensor:
        raise ConfigError(f"--expert_dim={values.expert_dim} must divide over --tensor={tensor}")
    for name in values.measure:
        if name not in MEASURES:
            raise ConfigError(f"--measure={name}: choose of {', '.join(MEASURES)}")
    for text in values.mib:
        if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
            raise ConfigError(f"--mib={text}: give numbers above 0")
    if values.factor != "fit" and not re.fullmatch(r"\d+(\.\d+)?", values.factor):
        raise ConfigError(f"--factor={values.factor}: give 'fit', 0 or a positive number")
    setting = Setting(experts, values.k, values.dim, values.expert_dim, values.tokens, values.repeats, values.target_ms)
    return setting, Grid(groups, tensor, experts)


def command(values: flags.FlagValues) -> int:
    if not values.output:
        raise ConfigError("--output is needed: the results file to append to")
    session.check_output(values.output)
    setting, grid = read_flags(values)
    shared = session.row_facts(PAPER, TABLE)

    def measured() -> Iterator[ResultRow]:
        for mib in values.mib if set(values.measure) - {"layer"} else ():
            yield from bandwidth_rows(setting, grid, float(mib), values.factor, values.measure, shared)
        if "layer" in values.measure:
            yield from layer_rows(setting, grid, shared)

    for row in measured():
        append_rows(Path(values.output), [row])  # each at once: a limit of time then loses one row
        session.say(f"{row.row:44s} {row.metric:22s} {row.value:9.3f} {row.unit:5s} "
                    f"{row.extra['times_as_fast']:5.2f} x")  # fmt: skip
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
