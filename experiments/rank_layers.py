"""An MoE layer on the devices of one host, each a rank of one expert axis, under one limit after another: what each
rank has to do, the check against one device, times and profiles. For ``experiments.limit_speed`` and
``experiments.load_aware_speed``.

The work of each rank is counted first, by as many virtual ranks on one device, whose outputs are also what those of the
ranks are compared with. Buffers are as large as each arm needs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from experiments import ep_speed
from experiments.drop_layers import WRONG_SHARE, WRONG_TOKEN, compiled, difference, gain, in_turn, with_config
from experiments.drop_scores import Setting
from kernels_pallas.rivals import timing
from moejax import dispatch, replication, sharding
from moejax.config import ConfigError, MeshConfig, MoEConfig
from moejax.moe import MoELayer
from moejax.replication import Replicated
from moejax.thresholds import Rule
from moejax.types import Limit, RouteContext

EXTRA = 1
"""Copies beyond E / R on each rank, of an arm with copies."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is in force on all ranks."""

    label: str
    limits: tuple[Limit, ...] = ()
    k: int = 0
    """Experts per token instead of the layer's; 0: those."""
    copies: bool = False
    """The busiest experts have copies (:func:`moejax.replication.replicate`)."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What its row says of it."""

    @property
    def kind(self) -> tuple:
        """Arms of one kind run the same program on one device."""
        return jax.tree.structure(self.limits), self.k


NONE = Arm("none")


@dataclasses.dataclass(frozen=True)
class Counted:
    """What an arm did."""

    before: np.ndarray
    """The router's pairs of each expert, ``[E]``."""
    work: np.ndarray
    """Of each rank, in whole pairs, ``[R]``."""
    factor: float
    """The smallest buffer factor at which nothing overflows, a multiple of 1 / 64."""
    kept: float
    """Of the work, that of the router's own pairs."""


@dataclasses.dataclass(frozen=True)
class Measured:
    counted: Counted
    error: float
    """Relative norm of the difference to one device with virtual ranks."""
    time: timing.Timings
    profile: Callable[[], dict[str, float] | None]
    """Milliseconds of each part of the layer on the first device; None where a profile has no kernels."""
    sent: str
    """What travelled: "tokens" or "pairs"."""


def sent(config: MoEConfig, tokens: int, ranks: int) -> str:
    """What travels of ``tokens`` tokens on each rank."""
    rows = dispatch.buffer_rows(config, (tokens, config.router.k), tokens, ranks)
    return "tokens" if dispatch.sends_tokens(config, tokens, rows) else "pairs"


def output(layer: MoELayer, x: jax.Array, in_force: tuple[Limit, ...]) -> jax.Array:
    """What is timed."""
    return layer(x, RouteContext(), in_force)[0]


def observed(layer: MoELayer, x: jax.Array, in_force: tuple[Limit, ...]) -> tuple[jax.Array, tuple]:
    """The output, and what :func:`counted` needs of each (virtual) rank's decisions."""
    flight = layer.begin(x, RouteContext(record=True), in_force)
    assert flight.record is not None
    made, kept = flight.record.made, flight.record.kept
    return layer.complete(flight, x)[0], (made.expert, kept.expert, kept.valid, kept.level)


def of_ranks(decided: Sequence[np.ndarray | None], ranks: int) -> tuple[Any, ...]:
    """What :func:`observed` gave, ``[R, T, ...]``. Without a limit nothing sees virtual ranks, and a record has one
    rank with the tokens of all of them, in their order."""
    return tuple(None if a is None else a.reshape(ranks, -1, a.shape[-1]) for a in decided)


def counted(
    made: Int[np.ndarray, "R T K"],
    expert: Int[np.ndarray, "R T k"],
    valid: Bool[np.ndarray, "R T k"],
    level: Int[np.ndarray, "R T k"] | None,
    *,
    experts: int,
    skip: float = 0.5,
    copies: Replicated | None = None,
) -> Counted:
    """Loads and buffers, from the decisions of R ranks.

    Args:
      made: expert of each pair of the router.
      expert, valid, level: of each pair after limits. The first columns are the router's.
      experts: E.
      skip: share of an expert that a pair of level 1 leaves out.
      copies: where the experts lie; None: in their order, E / R on each rank.
    """
    ranks, tokens, own = made.shape
    before = np.bincount(made.ravel(), minlength=experts)
    of_rank = experts // ranks
    if copies is not None:
        slots, each = np.asarray(copies.slots_of_expert), np.asarray(copies.copies)
        token = np.arange(tokens)[:, None]  # as Replicated.remap has it, of a rank's own tokens
        expert, of_rank = slots[expert, token % each[expert]], len(copies.expert_of_slot) // ranks
    rank = expert // of_rank
    done = valid * (1.0 if level is None else 1.0 - skip * level)
    work = np.bincount(rank.ravel(), done.ravel(), minlength=ranks)
    most = max(np.bincount(r[v], minlength=ranks).max() for r, v in zip(rank, valid, strict=True))
    factor = math.ceil(most / (tokens * own / ranks) * ep_speed.FITS) / ep_speed.FITS
    return Counted(before, work, factor, float(done[..., :own].sum()))


def with_k(layer: MoELayer, k: int) -> MoELayer:
    """The same arrays with ``k`` experts per token; 0: as it is."""
    if not k:
        return layer
    other = with_config(layer, router=dataclasses.replace(layer.config.router, k=k))
    other.router.config = other.config.router
    return other


def placed[Module: nnx.Module](layer: Module, mesh: Mesh) -> Module:
    """A layer, or a model, with its arrays where the rules put them on ``mesh``."""
    graph, state = nnx.split(layer)
    return nnx.merge(graph, jax.device_put(state, sharding.tree_shardings(state, mesh)))


def on_ranks(
    setting: Setting,
    layer: MoELayer,
    tokens: Float[Array, "T D"],
    arms: Sequence[Arm],
    mesh: Mesh,
    repeats: int,
    target_ms: float,
) -> tuple[dict[str, Measured], dict[str, str]]:
    """What was measured of each arm, all in turn, and of those whose outputs are wrong, which are not timed, why.

    ``arms`` begin with one without a limit. ``tokens``: of all ranks.
    """
    ranks, experts = mesh.size, setting.moe.num_experts
    x = tokens.reshape(ranks, -1, tokens.shape[-1])
    skip = Rule(expert_dim=setting.moe.expert_dim).skip
    virtual = {arm.kind: with_k(with_config(layer, virtual_ranks=ranks), arm.k) for arm in arms}
    run = compiled({arm.kind: (observed, (virtual[arm.kind], x, arm.limits)) for arm in arms})
    expected, decided = {}, {}
    for arm in arms:
        y, decided[arm.label] = run[arm.kind](virtual[arm.kind], x, arm.limits)
        expected[arm.label], decided[arm.label] = jax.device_get((y, decided[arm.label]))
    del run, virtual
    loads = np.bincount(decided[arms[0].label][0].ravel(), minlength=experts)
    copies = placement(loads, ranks)
    counts = {
        arm.label: counted(
            *of_ranks(decided.pop(arm.label), ranks), experts=experts, skip=skip, copies=copies if arm.copies else None
        )
        for arm in arms
    }

    bases = {False: placed(layer, mesh)}
    if any(arm.copies for arm in arms):
        bases[True] = with_config(bases[False])
        replication.store_copies(bases[True], copies, mesh)

    def spread(arm: Arm) -> MoELayer:
        fields = {"dispatcher": "ep", "ep_buffer_factor": counts[arm.label].factor}
        return with_k(with_config(bases[arm.copies], **fields), arm.k)

    with jax.set_mesh(mesh):
        xs = jax.device_put(x, NamedSharding(mesh, P(sharding.TOKEN_AXES)))
        arguments = {arm.label: (spread(arm), xs, arm.limits) for arm in arms}
        made = compiled({label: (output, given) for label, given in arguments.items()})
        errors, wrong = {}, {}
        for arm in arms:
            y = jax.device_get(made[arm.label](*arguments[arm.label]))
            error, share = map(float, difference(jnp.asarray(y), jnp.asarray(expected.pop(arm.label))))
            errors[arm.label] = error
            if share > WRONG_SHARE:
                wrong[arm.label] = (
                    f"{share:.2%} of the tokens differ by more than {WRONG_TOKEN:g} from one device with {ranks} "
                    "virtual ranks"
                )
        right = [arm.label for arm in arms if arm.label not in wrong]
        calls = {name: functools.partial(made[name], *arguments[name]) for name in right}
        times = in_turn(calls, repeats, target_ms) if calls else {}
    profiles = {name: functools.partial(ep_speed.profiled, made[name], arguments[name], None) for name in right}
    found = {}
    for name in right:
        what = sent(arguments[name][0].config, x.shape[1], ranks)
        found[name] = Measured(counts[name], errors[name], times[name], profiles[name], what)
    return found, wrong


def placement(loads: Int[np.ndarray, "E"], ranks: int) -> Replicated:
    """Copies of the busiest experts, :data:`EXTRA` on each rank."""
    return replication.replicate(loads, ranks, EXTRA)


def skew_of(before: np.ndarray, ranks: int) -> dict[str, float | int]:
    """Max/mean of the experts' loads, and of the ranks' without and with copies: without dropping anything."""
    copies = placement(before, ranks)
    return {
        "max_over_mean_experts": replication.max_over_mean(before.astype(np.float64)),
        "max_over_mean": replication.max_over_mean(replication.rank_loads(before, ranks)),
        "max_over_mean_replicated": replication.max_over_mean(replication.rank_loads(before, ranks, copies)),
        "extra_experts_per_rank": EXTRA,
    }


def facts_of(found: Mapping[str, Measured], arm: Arm) -> tuple[float, tuple[float, float], dict[str, Any]]:
    """Speed-up of an arm over the one without a limit, its interval, and the facts of its row but for the profile."""
    mine, none = found[arm.label], found[NONE.label]
    speedup, interval = gain(none.time, mine.time)
    return speedup, interval, {
        **mine.time.fields(), **predicted(speedup, mine.counted.work.max(), none.counted.work.max()),
        "work_by_rank": mine.counted.work.tolist(), "drop_rate": 1 - mine.counted.kept / none.counted.kept,
        "added_share": (mine.counted.work.sum() - mine.counted.kept) / none.counted.kept,
        "ep_buffer_factor": mine.counted.factor, "sent": mine.sent, "error": mine.error,
        "ranks": len(mine.counted.work),
    }  # fmt: skip


def predicted(speedup: float, busiest: float, without: float) -> dict[str, float]:
    """What the work of the busiest rank (``without``: a limit) lets expect, and the share of it that was measured."""
    expected = float(without / busiest) if busiest else 0.0
    return {
        "busiest_before": float(without), "busiest_after": float(busiest), "predicted": expected,
        "share_of_predicted": speedup / expected if expected else 0.0,
    }  # fmt: skip


def split_facts(split: dict[str, float] | None, none: dict[str, float] | None) -> dict[str, Any]:
    """A profile as facts of a row; ``none``: that of the arm without a limit."""
    if split is None or none is None:
        return {"no_split": "no device events in the profile"}
    return {"split_ms": split, "experts_speedup": none["experts"] / max(split["experts"], 1e-9)}


def mesh_of(devices: int, settings: Sequence[Setting]) -> Mesh:
    """``devices`` devices (0: all) as ranks of one expert axis.

    Raises:
      ConfigError: fewer than two, or so many that do not divide the experts.
    """
    there = jax.devices()[: devices or None]
    for setting in settings:
        if len(there) < 2 or setting.moe.num_experts % len(there):
            raise ConfigError(
                f"{len(there)} devices: {setting.name} needs two or more that divide its {setting.moe.num_experts} "
                "experts; emulate them on the CPU by XLA_FLAGS=--xla_force_host_platform_device_count=2"
            )
    return sharding.make_mesh(MeshConfig(data=1, expert=len(there)), there)
