"""Times the exchange of expert parallelism on the devices of one host, and a whole MoE layer by exchange.

    python -m experiments.ep_speed --output=ep.jsonl [--mib=64,256] [--exchanges=padded,ragged] [--factors=fit,0] \
        [--send=pairs,tokens] [--chunks=2,4] [--parts=transfer,layer] [--dim=2048 --experts=64 --k=8] \
        [--expert_dim=1024 --tokens=8192]

All devices are ranks of one expert axis. Useful bytes are those of one device: its valid pairs x D x 2 (bfloat16). The
unit of the transfers is a plain ``lax.all_to_all`` of as many bytes in the same process: a share of 1 is its speed.

``transfer``
    The rows alone, from buffer to buffer.
``packed``
    With the gather of tokens into the buffer before, and the order by expert after.
``send``
    With the plan (one sort) and the exchange of counts too: all of the outward trip.
``back``
    The way back with the weighted sum, and without the plan.

"pairs" and "tokens" say what travels (``moe.ep_send``). Useful bytes are those of pairs in either case: tokens, each
sent once to a rank, deliver them with fewer, so that a share may be above 1.

Routing is uniform, and drawn from Dirichlet(5) for the experts' popularity. A factor is ``moe.ep_buffer_factor``; "fit"
is the smallest multiple of 1/64 at which nothing overflows, 0 the worst case. Each exchange is checked before it is
timed: every row must reach its expert and come back exactly. A layer's split into route, permute, communicate, experts
and combine is of the kernels' time in a profile of the devices; without device events (a CPU) there is none.
"""

import dataclasses
import gzip
import itertools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import session
from kernels_pallas.rivals import timing
from moejax import dispatch, moe, sharding
from moejax.config import ConfigError, MeshConfig, MoEConfig, RouterConfig
from moejax.dispatch import exchange
from moejax.dispatch.expert_parallel import Plan, rows_by_rank
from moejax.dispatch.shards import AXIS
from moejax.results import ResultRow, append_rows
from moejax.types import RouteContext, Routing

PAPER, TABLE = "speed", "expert_parallelism"
PARTS = ("route", "permute", "communicate", "experts", "combine", "other")
SCOPES = {
    "communicate": "communicate", "experts": "experts", "combine": "combine", "dispatch": "permute", "route": "route",
    "limit": "route",
}  # fmt: skip
"""Named scopes of ``moejax.moe``, the inner ones first, with the part of a layer that they are."""
KINDS = ("uniform", "dirichlet5")
TRANSPORT_VARIABLES = ("NCCL_P2P_DISABLE",)
TRANSPORT_FLAGS = ("xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel",)
"""Environment variables, and flags in XLA_FLAGS, that change how devices reach one another: a row says which were
set."""
MARKS = 128
LARGEST = 15
FITS = 64
"""Factors that fit are multiples of 1 / FITS."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of one device, and how to measure."""

    experts: int
    k: int
    dim: int
    expert_dim: int
    tokens: int
    """Of the layer."""
    repeats: int
    target_ms: float

    def config(self, **changes: Any) -> MoEConfig:
        router = RouterConfig(name="topk_of_softmax", k=self.k)
        return MoEConfig(num_experts=self.experts, expert_dim=self.expert_dim, router=router, losses=(), **changes)


# --- routing --------------------------------------------------------------------------------------


def routing_tables(kind: str, setting: Setting, tokens: int, ranks: int, seed: int = 0) -> np.ndarray:
    """Experts of each token, distinct, ``[ranks * tokens, K]``: popularities are equal, or drawn from Dirichlet(5)."""
    rng = np.random.default_rng(seed)
    popularity = np.ones(setting.experts) if kind == "uniform" else rng.dirichlet(np.full(setting.experts, 5.0))
    # Gumbel top-k: K draws without replacement.
    noise = rng.gumbel(size=(ranks * tokens, setting.experts)).astype(np.float32) + np.log(popularity, dtype=np.float32)
    return np.argpartition(-noise, setting.k - 1, axis=1)[:, : setting.k].astype(np.int32)


def table_of(expert: jax.Array, num_experts: int) -> Routing:
    """A Routing that keeps every pair, with weights of 1."""
    ones = jnp.ones_like(expert, jnp.float32)
    flat = jnp.zeros_like(expert, jnp.float32, shape=(expert.shape[0], num_experts))
    return Routing(expert=expert, weight=ones, score=ones, valid=expert >= 0, probs=flat, logits=flat)


def fitting_factor(expert: np.ndarray, setting: Setting, ranks: int) -> float:
    """The smallest multiple of 1 / 64 with room for every rank's pairs for every destination."""
    destination = expert.reshape(ranks, -1) // (setting.experts // ranks)
    most = max(np.bincount(one, minlength=ranks).max() for one in destination)
    return math.ceil(most / (destination.shape[1] / ranks) * FITS) / FITS


# --- the exchange ---------------------------------------------------------------------------------


def on_ranks(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """``fn`` on each rank's share of its arguments' leading axes, compiled."""

    def run(*args: Any) -> Any:
        return dispatch.per_shard(lambda *a: fn(*a[:-1]), args, None)

    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return compiled(*args)

    compiled = jax.jit(run)
    return call


def programs(setting: Setting, config: MoEConfig, mesh: Mesh) -> dict[str, Callable[..., Any]]:
    """What is timed of one exchange, ``plan``, which makes what some of it takes, and ``check``."""
    dispatcher = dispatch.ExpertParallel(config)
    move = exchange.TRANSPORTS[dispatcher.transport]

    def plan(expert: jax.Array) -> Plan:
        return dispatcher.plan(table_of(expert, setting.experts), expert.shape[0])

    def mine(plan: Plan) -> Plan:
        return jax.tree.map(lambda leaf: leaf[0], plan)

    def transfer(buffer: jax.Array, plan: Plan) -> jax.Array:
        return move(buffer, *rows_by_rank(mine(plan)), AXIS)

    def packed(x: jax.Array, expert: jax.Array, plan: Plan) -> jax.Array:
        return dispatcher.outward(x, table_of(expert, setting.experts), mine(plan))

    def back(ys: jax.Array, expert: jax.Array, plan: Plan) -> jax.Array:
        return dispatcher.homeward(ys, table_of(expert, setting.experts).weight, mine(plan), expert.shape[0])

    def send(x: jax.Array, expert: jax.Array) -> jax.Array:
        return dispatcher.send(x, table_of(expert, setting.experts))[0][0]

    def check(x: jax.Array, expert: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens that came back changed, rows at a wrong expert, pairs that overflowed."""
        table = table_of(expert, setting.experts)
        ys, plans = dispatcher.send(x, table)
        back = dispatcher.give_back(ys, table.weight, plans, x.shape[0])
        expected = (setting.k * x.astype(jnp.float32)).astype(x.dtype)
        named = dataclasses.replace(table, weight=expert % MARKS + 1.0)  # small enough for bfloat16
        marked, _ = dispatcher.send(jnp.ones_like(x[:, :8]), named, weigh=True)
        ends = jnp.cumsum(dispatcher.group_sizes(plans)[0])
        row = jnp.arange(marked[0].shape[0])
        group = jnp.sum(row[:, None] >= ends, axis=1) + jax.lax.axis_index(AXIS) * ends.shape[0]
        wrong = (row < ends[-1]) & (marked[0][:, 0].astype(jnp.float32) != group % MARKS + 1)
        return jnp.sum(jnp.any(back != expected, axis=1)), jnp.sum(wrong), dispatcher.overflow(plans)

    made = {"plan": plan, "transfer": transfer, "packed": packed, "send": send, "back": back, "check": check}
    return {name: on_ranks(fn, mesh) for name, fn in made.items()}


def plain(buffer: jax.Array) -> jax.Array:
    """The yardstick: one dense all-to-all."""
    return jax.lax.all_to_all(buffer, AXIS, 0, 0, tiled=True)


def timed(setting: Setting, call: Callable[..., Any], *args: Any) -> timing.Timings:
    batch = timing.wall_clock(lambda: call(*args), jax.block_until_ready)
    return timing.repeat(batch, setting.repeats, setting.target_ms)


def transfer_rows(
    setting: Setting,
    mesh: Mesh,
    mib: int,
    names: list[str],
    sends: list[str],
    factors: list[str],
    shared: dict[str, Any],
) -> Iterator[ResultRow]:
    """Rows of one payload: the yardstick, then each routing, exchange, what travels, and factor."""
    ranks = mesh.size
    tokens = -(-mib * 2**20 // (2 * setting.dim * setting.k * ranks)) * ranks  # an even share is whole
    pairs, where = tokens * setting.k, NamedSharding(mesh, P(sharding.TOKEN_AXES))
    useful = 2 * pairs * setting.dim
    # Of few bits: the sum of k equal rows, and that of a rank's share of them, are exact in bfloat16.
    x = np.random.default_rng(1).integers(-LARGEST, LARGEST + 1, (ranks * tokens, setting.dim))
    x = jax.device_put(jnp.asarray(x, jnp.bfloat16), where)
    whole = jax.jit(lambda x: jnp.tile(x, (setting.k, 1)), out_shardings=where)(x)
    unit = timed(setting, on_ranks(plain, mesh), whole)

    def row(label: str, what: str, time: timing.Timings | None, **extra: Any) -> ResultRow:
        sizes: dict[str, Any] = {
            "payload_mib": mib, "useful_bytes": useful, "pairs": pairs, "dim": setting.dim, "ranks": ranks,
            "k": setting.k, "experts": setting.experts,
        }  # fmt: skip
        if time is not None:
            sizes |= time.fields() | {"gb_per_s": useful / time.median / 1e9, "plain_ms": 1e3 * unit.median}
        value = None if time is None else unit.median / time.median
        return ResultRow(**shared, row=label, metric=f"share of plain all-to-all/{what}", unit="share", value=value,
                         extra=sizes | extra)  # fmt: skip

    yield row(f"plain, {mib} MiB", "transfer", unit)
    for kind in KINDS:
        expert = routing_tables(kind, setting, tokens, ranks)
        placed = jax.device_put(expert, where)
        for name, sent, factor in itertools.product(names, sends, factors):
            fitted = fitting_factor(expert, setting, ranks) if factor == "fit" else float(factor)
            config = setting.config(dispatcher="ep", ep_exchange=name, ep_send=sent, ep_buffer_factor=fitted)
            label = f"{name}, {sent}, {kind}, {'fits' if factor == 'fit' else factor}, {mib} MiB"
            capacity = dispatch.buffer_rows(config, (tokens, setting.k), tokens, ranks)
            travel = min(tokens, capacity) if sent == "tokens" else capacity
            extra = {"exchange": name, "sent": sent, "routing": kind, "buffer_factor": fitted,
                     "rows": ranks * capacity, "sent_rows": ranks * travel}  # fmt: skip
            try:
                run = programs(setting, config, mesh)
                changed, wrong, lost = (int(np.sum(n)) for n in run["check"](x, placed))
                if lost:
                    extra["overflow"] = lost
                elif changed or wrong:
                    raise ConfigError(
                        f"WRONG: {label}: {changed} tokens came back changed, {wrong} rows at a wrong expert; "
                        "nothing was timed"
                    )
                made = run["plan"](placed)
                buffer, ys = (
                    dispatch.merge_shards(on_ranks(lambda x, n=n: jnp.resize(x, (n, setting.dim)), mesh)(x))
                    for n in (ranks * travel, ranks * capacity)
                )
                yield row(label, "transfer", timed(setting, run["transfer"], buffer, made), **extra)
                del buffer
                yield row(label, "packed", timed(setting, run["packed"], x, placed, made), **extra)
                yield row(label, "send", timed(setting, run["send"], x, placed), **extra)
                yield row(label, "back", timed(setting, run["back"], ys, placed, made), **extra)
                del ys
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                yield row(label, "send", None, **extra, not_run="out of memory")


# --- the layer ------------------------------------------------------------------------------------


def layer_settings(
    names: list[str], sends: list[str], factors: list[str], chunks: list[int]
) -> list[tuple[str, dict[str, Any]]]:
    """Label and config fields of each layer that is timed: weights gathered first, then each exchange."""
    found: list[tuple[str, dict[str, Any]]] = [("local, weights gathered", {"dispatcher": "local"})]
    for factor, sent in itertools.product(factors, sends):
        what = {"dispatcher": "ep", "ep_buffer_factor": factor, "ep_send": sent}
        found += [(f"{name}, {sent}, {factor}", what | {"ep_exchange": name}) for name in names]
        found += [(f"chunked {n}, {sent}, {factor}", what | {"ep_exchange": "chunked", "ep_chunks": n}) for n in chunks]
    return found


def layer_rows(
    setting: Setting,
    mesh: Mesh,
    settings: list[tuple[str, dict[str, Any]]],
    shared: dict[str, Any],
    profile: Path | None,
) -> Iterator[ResultRow]:
    """A whole layer's forward pass in bfloat16 by each setting, checked against the first, and its split."""
    ranks, rng = mesh.size, np.random.default_rng(0)
    where = NamedSharding(mesh, P(sharding.TOKEN_AXES))
    x = jax.device_put(rng.standard_normal((ranks, setting.tokens, setting.dim), np.float32), where)
    x = x.astype(jnp.bfloat16)
    expected, fitted = None, 0.0
    for label, given in settings:
        factor = given.get("ep_buffer_factor")
        fields = given if factor is None else given | {"ep_buffer_factor": fitted if factor == "fit" else float(factor)}
        with jax.set_mesh(mesh):
            layer = placed_layer(setting.config(**fields), setting, mesh)
            if not fitted:
                routed = jax.jit(lambda layer, x: layer.begin(x, RouteContext(record=True)).record)(layer, x)
                fitted = fitting_factor(np.asarray(routed.kept.expert), setting, ranks)

            @jax.jit
            def run(layer: moe.MoELayer, x: jax.Array) -> Any:
                y, metrics = layer(x, RouteContext())
                return y, metrics.overflow

            compiled = run.lower(layer, x).compile()
            y, overflow = compiled(layer, x)
            expected = np.asarray(y, np.float32) if expected is None else expected
            error = float(np.linalg.norm(np.asarray(y, np.float32) - expected) / np.linalg.norm(expected))
            extra: dict[str, Any] = fields | {
                "error": error, "overflow": float(overflow), "tokens": setting.tokens, "ranks": ranks,
                "dim": setting.dim, "expert_dim": setting.expert_dim, "experts": setting.experts, "k": setting.k,
            }  # fmt: skip
            if error > 5e-3 and not float(overflow):
                raise ConfigError(f"WRONG: {label}: differs from the first layer by {error:.1e}; nothing was timed")
            time = timed(setting, compiled, layer, x)
            split = profiled(compiled, (layer, x), profile)
        extra |= time.fields()
        if split is None:
            extra["no_split"] = "no device events in the profile"
        else:
            extra["split_ms"] = split
        yield ResultRow(**shared, row=f"layer, {label}", metric="milliseconds/forward", unit="ms",
                        value=1e3 * time.median, extra=extra)  # fmt: skip


def placed_layer(config: MoEConfig, setting: Setting, mesh: Mesh) -> moe.MoELayer:
    """A layer with random weights in bfloat16, where the rules put them; the same for every exchange."""

    layer = moe.MoELayer(config, setting.dim, "swiglu", jax.random.key(0))
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim == 3 else leaf, state)
    return nnx.merge(graph, jax.device_put(state, sharding.tree_shardings(state, mesh)))


# --- profiles -------------------------------------------------------------------------------------


def part_of(op_name: str) -> str:
    """The part of a layer that an operation belongs to, by the named scopes in its ``op_name``."""
    words = set(re.findall(r"\w+", op_name))
    return next((part for scope, part in SCOPES.items() if scope in words), "other")


def parts_of_program(text: str) -> dict[str, str]:
    """The part of each instruction of a compiled program's text that carries an ``op_name``."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*op_name="([^"]*)"', text, re.MULTILINE)
    return {name: part_of(op_name) for name, op_name in found}


KERNELS = {
    "communicate": r"all.to.all|ncclDevKernel", "permute": "(gather|scatter)_rows", "combine": "combine_rows",
    "experts": "grouped",
}  # fmt: skip
"""Kernels that are known by name, the first that fits: a collective's, our own for rows, those of the grouped FFN."""


def split_of_events(events: Iterable[tuple[str, float]], parts: dict[str, str]) -> dict[str, float] | None:
    """Nanoseconds of each part, of ``(kernel, nanoseconds)``; None without events. A kernel is named like its
    instruction, with underscores; those that are not are told by :data:`KERNELS`."""
    by_kernel = {re.sub(r"\W", "_", name): part for name, part in parts.items()}
    sums = dict.fromkeys(PARTS, 0.0)
    for name, duration in events:
        part = by_kernel.get(re.sub(r"\W", "_", name))
        if part is None:
            part = next((part for part, form in KERNELS.items() if re.search(form, name)), "other")
        sums[part] += duration
    return sums if any(sums.values()) else None


def device_events(folder: Path) -> Iterator[tuple[str, float]]:
    """``(kernel, nanoseconds)`` of the first GPU's kernels in a profile's folder. Their HLO instruction is not asked
    for: within a command buffer it is that of the buffer."""
    for path in sorted(folder.rglob("*.xplane.pb*")):
        data = path.read_bytes()
        made = jax.profiler.ProfileData.from_serialized_xspace(gzip.decompress(data) if path.suffix == ".gz" else data)
        for plane in made.planes:
            if not plane.name.startswith("/device:GPU:0"):
                continue
            for line in plane.lines:
                if "Stream" not in line.name:
                    continue
                for event in line.events:
                    yield event.name, float(event.duration_ns)


def profiled(compiled: Any, args: tuple, keep: Path | None, calls: int = 3) -> dict[str, float] | None:
    """Milliseconds of kernels of each part in one call, on the first device; None where a profile has no kernels."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        before = set(folder.rglob("*.xplane.pb*"))
        with jax.profiler.trace(str(folder)):
            for _ in range(calls):
                out = compiled(*args)
            jax.block_until_ready(out)
        fresh = [path.parent for path in folder.rglob("*.xplane.pb*") if path not in before]
        events = [event for parent in dict.fromkeys(fresh) for event in device_events(parent)]
    split = split_of_events(events, parts_of_program(compiled.as_text()))
    return None if split is None else {part: ns / 1e6 / calls for part, ns in split.items()}


# --- the command ----------------------------------------------------------------------------------


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    for name, default, text in (
        ("mib", ["64"], "Useful MiB of each device."),
        ("exchanges", ["padded"], "Transports: padded, ragged."),
        ("send", ["pairs", "tokens"], "What travels: pairs, tokens."),
        ("factors", ["fit", "0"], "Buffer factors: fit, 0 (the worst case) or a number."),
        ("chunks", ["2"], "Pieces of the layers that are chunked."),
        ("parts", ["transfer", "layer"], "What to measure."),
    ):
        flags.DEFINE_list(name, default, text, flag_values=values)
    for name, default, text in (
        ("experts", 64, "Experts."), ("k", 8, "Choices of a token."), ("dim", 2048, "Model width."),
        ("expert_dim", 1024, "Hidden width of an expert."), ("tokens", 8192, "Tokens of each device, for the layer."),
        ("devices", 0, "Devices to use, as ranks of one expert axis; 0: all."), ("repeats", 20, "Timings of each."),
        ("target_ms", 50, "Calls of one timing take about so long together."),
    ):  # fmt: skip
        flags.DEFINE_integer(name, default, text, lower_bound=0, flag_values=values)
    flags.DEFINE_string("profile", None, "Folder that keeps the profiles; None: they are read and removed.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if not values.output:
        raise ConfigError("--output is needed: the results file to append to")
    session.check_output(values.output)
    devices = jax.devices()[: values.devices or None]
    check_flags(values, len(devices))
    setting = Setting(values.experts, values.k, values.dim, values.expert_dim, values.tokens, values.repeats,
                      values.target_ms)  # fmt: skip
    mesh = sharding.make_mesh(MeshConfig(data=1, expert=len(devices)), devices)
    told = transport_settings(os.environ)
    shared = session.row_facts(PAPER, TABLE)
    shared["command"] = " ".join([*told, shared["command"]])

    def measured() -> Iterator[ResultRow]:
        if "transfer" in values.parts:
            for mib in values.mib:
                yield from transfer_rows(setting, mesh, int(mib), values.exchanges, values.send, values.factors, shared)
        if "layer" in values.parts:
            wanted = layer_settings(values.exchanges, values.send, values.factors, [int(n) for n in values.chunks])
            yield from layer_rows(setting, mesh, wanted, shared, Path(values.profile) if values.profile else None)

    for row in measured():
        if told:
            row = dataclasses.replace(
                row, row=", ".join([row.row, *(text.removeprefix("XLA_FLAGS=") for text in told)])
            )
        append_rows(Path(values.output), [row])  # each at once: a limit of time then loses one row
        shown = row.extra.get("not_run") if row.value is None else f"{row.value:.3f} {row.unit}"
        session.say(f"{row.row:44s} {row.metric:36s} {shown}")
    return 0


def transport_settings(environment: Mapping[str, str]) -> list[str]:
    """Those of the settings above that are set, as a shell would set them."""
    found = [f"{name}={environment[name]}" for name in TRANSPORT_VARIABLES if name in environment]
    flags = environment.get("XLA_FLAGS", "").split()
    return found + [f"XLA_FLAGS={flag}" for flag in flags if flag.lstrip("-").partition("=")[0] in TRANSPORT_FLAGS]


def check_flags(values: flags.FlagValues, devices: int) -> None:
    """Raises ConfigError for what cannot be measured, before anything is."""
    if devices < 2:
        raise ConfigError("one device exchanges nothing: run on a host with two or more, or emulate them on the CPU by "
                          "XLA_FLAGS=--xla_force_host_platform_device_count=2")  # fmt: skip
    if values.experts % devices or not 1 <= values.k <= values.experts:
        raise ConfigError(f"--experts={values.experts} must divide over {devices} devices, and --k={values.k} lie in "
                          "[1, experts]")  # fmt: skip
    for name in values.exchanges:
        if name not in exchange.TRANSPORTS:
            raise ConfigError(f"--exchanges={name}: choose of {', '.join(exchange.TRANSPORTS)}")
        exchange.resolve(name)
    for flag, known in (("parts", ("transfer", "layer")), ("send", ("pairs", "tokens"))):
        for name in getattr(values, flag):
            if name not in known:
                raise ConfigError(f"--{flag}={name}: choose of {', '.join(known)}")
    for flag in ("mib", "chunks"):
        for text in getattr(values, flag):
            if not text.isdigit() or not int(text):
                raise ConfigError(f"--{flag}={text}: give whole numbers of 1 or more")
    for text in values.factors:
        if text != "fit" and not re.fullmatch(r"\d+(\.\d+)?", text):
            raise ConfigError(f"--factors={text}: give 'fit', 0 or a positive number")


if __name__ == "__main__":
    session.launch(define_flags, command)
