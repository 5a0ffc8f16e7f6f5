"""Times load-aware threshold dropping (DualSparse-MoE, 2508.18376, section 3.3) on the devices of one host.

    python -m experiments.load_aware_speed --shape=olmoe,mixtral --output=rows.jsonl
        [--rate=0.25] [--tokens=8192] [--devices=2] [--tiny]

All devices are ranks of one expert axis, each with its own tokens and its run of the experts in their natural order, so
every layer waits for the busiest rank. Arms: no limit; 1T-Drop and 2T-Drop (the paper's gap) with one threshold that
drops ``--rate`` of the routed work; the same with thresholds by load, by the paper's rule and by water-filling.

The work of each rank is counted, before and after. The *predicted* speed-up of an arm is the busiest rank's work
without a limit over that with it; a row says what share of it was measured, for the whole layer, and what the experts
alone took in a profile. What copies of busy experts would reach without dropping (EPLB) stands beside it, as the ratio
of the busiest rank to the mean. Buffers are as large as each arm needs. The skew of R ranks is at most R: the published
1.41x is of 8 ranks and has no place in these rows.

Before timing, each arm's outputs are compared with those of one device with as many virtual ranks. Whose scores and
popularity: ``experiments/drop_scores.py``.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import drop_scores, ep_speed, session
from experiments.drop_layers import INTERVAL, WRONG_SHARE, WRONG_TOKEN, difference, gain, in_turn, with_config
from experiments.drop_scores import PAPER_GAP, SHAPES, Setting
from moejax import limits, replication, sharding, thresholds
from moejax.config import ConfigError, MeshConfig
from moejax.moe import MoELayer
from moejax.results import ResultRow, append_rows, environment_facts
from moejax.thresholds import Rule
from moejax.types import Limit, RouteContext

PAPER, TABLE = "dualsparse", "load_aware_speed"
EXTRA = 1
"""Copies beyond E / R on each rank, in the figure of replication."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A limit of all ranks."""

    label: str
    limits: tuple[Limit, ...] = ()


@dataclasses.dataclass(frozen=True)
class Counted:
    """What an arm did."""

    before: np.ndarray
    """Pairs of each expert, ``[E]``."""
    work: np.ndarray
    """Of each rank, in whole pairs, ``[R]``."""
    factor: float
    """The smallest buffer factor at which nothing overflows, a multiple of 1 / 64."""


def arms_of(one: float, two: float) -> list[Arm]:
    """The arms, by the thresholds of 1T-Drop and 2T-Drop."""
    found = [Arm("none")]
    for name, threshold, gap in (("1T", one, None), ("2T", two, PAPER_GAP)):
        for rule in ("none", "paper", "water"):
            label = name if rule == "none" else f"{name}, {rule}"
            found.append(Arm(label, (limits.threshold_drop(threshold, gap=gap, load_aware=rule),)))
    return found


def placed(layer: MoELayer, mesh: Mesh) -> MoELayer:
    """The layer with its arrays where the rules put them on ``mesh``."""
    graph, state = nnx.split(layer)
    return nnx.merge(graph, jax.device_put(state, sharding.tree_shardings(state, mesh)))


def output(layer: MoELayer, x: jax.Array, in_force: tuple[Limit, ...]) -> jax.Array:
    return layer(x, RouteContext(), in_force)[0]


def count(setting: Setting, layer: MoELayer, x: jax.Array, arm: Arm, ranks: int) -> Counted:
    """Loads and buffers of an arm, by ``ranks`` virtual ranks on one device."""

    @jax.jit
    def decisions(layer: MoELayer, x: jax.Array, in_force: tuple[Limit, ...]) -> tuple:
        record = layer.begin(x, RouteContext(record=True), in_force).record
        assert record is not None
        return record.made.expert, record.kept.valid, record.kept.level

    expert, valid, level = jax.device_get(decisions(layer, x, arm.limits))
    experts, pairs = setting.moe.num_experts, expert.shape[1] * setting.moe.router.k
    rank = expert // (experts // ranks)
    skip = Rule(expert_dim=setting.moe.expert_dim).skip
    done = valid * (1.0 if level is None else 1.0 - skip * level)
    work = np.bincount(rank.ravel(), done.ravel(), minlength=ranks)
    most = max(np.bincount(r[v], minlength=ranks).max() for r, v in zip(rank, valid, strict=True))
    factor = math.ceil(most / (pairs / ranks) * ep_speed.FITS) / ep_speed.FITS
    return Counted(np.bincount(expert.ravel(), minlength=experts), work, factor)


def rows_of(
    setting: Setting, mesh: Mesh, rate: float, repeats: int, target_ms: float, shared: dict
) -> Iterator[ResultRow]:
    """A row for each arm.

    Raises:
      ConfigError: outputs that are not those of one device.
    """
    ranks = mesh.size
    layer = drop_scores.make_layer(setting)
    tokens = drop_scores.make_tokens(setting, ranks * setting.tokens)
    table = drop_scores.scores_of(layer, tokens[None])
    x = tokens.reshape(ranks, setting.tokens, -1)
    rules = (Rule(None), Rule(PAPER_GAP, 0, setting.moe.expert_dim))
    arms = arms_of(*(float(thresholds.solve(table, rate, rule)[0]) for rule in rules))
    virtual = with_config(layer, virtual_ranks=ranks)
    counted = {arm.label: count(setting, virtual, x, arm, ranks) for arm in arms}
    expected = {arm.label: jax.jit(output)(virtual, x, arm.limits) for arm in arms}
    calls, programs, errors = {}, {}, {}
    with jax.set_mesh(mesh):
        xs = jax.device_put(x, NamedSharding(mesh, P(sharding.TOKEN_AXES)))
        for arm in arms:
            fields = {"dispatcher": "ep", "ep_buffer_factor": counted[arm.label].factor}
            spread = placed(with_config(layer, **fields), mesh)
            arguments = (spread, xs, arm.limits)
            programs[arm.label] = (jax.jit(output).lower(*arguments).compile(), arguments)
            y = jax.device_get(programs[arm.label][0](*arguments))
            error, wrong = map(float, difference(jnp.asarray(y), expected.pop(arm.label)))
            if wrong > WRONG_SHARE:
                raise ConfigError(
                    f"WRONG: {setting.name}, {arm.label}: {wrong:.2%} of the tokens differ by more than "
                    f"{WRONG_TOKEN:g} from one device with {ranks} virtual ranks; nothing was timed"
                )
            errors[arm.label] = error
            calls[arm.label] = functools.partial(*programs[arm.label][:1], *arguments)
        times = in_turn(calls, repeats, target_ms)
        splits = {label: ep_speed.profiled(run, arguments, None) for label, (run, arguments) in programs.items()}
    loads = counted["none"].before
    copies = replication.replicate(loads, ranks, min(EXTRA, setting.moe.num_experts * (ranks - 1) // ranks))
    skew = {
        "max_over_mean": replication.max_over_mean(replication.rank_loads(loads, ranks)),
        "max_over_mean_replicated": replication.max_over_mean(replication.rank_loads(loads, ranks, copies)),
        "extra_experts_per_rank": EXTRA,
    }
    for arm in arms:
        mine, whole = counted[arm.label], counted["none"]
        speedup, interval = gain(times["none"], times[arm.label])
        predicted = float(whole.work.max() / mine.work.max())
        extra: dict[str, Any] = {
            **times[arm.label].fields(), **skew, "predicted": predicted, "share_of_predicted": speedup / predicted,
            "drop_rate": float(1 - mine.work.sum() / whole.work.sum()), "work_by_rank": mine.work.tolist(),
            "threshold": float(arm.limits[0].threshold) if arm.limits else 0.0,  # ty: ignore[missing-attribute]
            "asked_rate": rate, "ep_buffer_factor": mine.factor, "error": errors[arm.label], "ranks": ranks,
            "tokens": setting.tokens, "scores": setting.scores,
        }  # fmt: skip
        if (split := splits[arm.label]) is None:
            extra["no_split"] = "no device events in the profile"
        else:
            extra["split_ms"] = split
            extra["experts_speedup"] = splits["none"]["experts"] / max(split["experts"], 1e-9)  # ty: ignore
        yield ResultRow(
            **shared, row=f"{setting.name}, {arm.label}", metric="speedup/layer", unit="times no limit", value=speedup,
            interval=interval, interval_kind=INTERVAL, extra=extra,
        )  # fmt: skip


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    flags.DEFINE_list("shape", ["olmoe"], f"Layers: {', '.join(SHAPES)}.", flag_values=values)
    flags.DEFINE_float("rate", 0.25, "Share of the routed work that T drops.", 0.0, 0.99, flag_values=values)
    flags.DEFINE_integer("tokens", 8192, "Tokens of each device.", 1, flag_values=values)
    flags.DEFINE_integer("devices", 0, "Devices to use; 0: all.", 0, flag_values=values)
    flags.DEFINE_integer("repeats", 20, "Timings of each arm.", 1, flag_values=values)
    flags.DEFINE_integer("target_ms", 20, "Calls of one timing take about so long together.", 0, flag_values=values)
    flags.DEFINE_bool("tiny", False, "Sizes of a CPU; times mean nothing.", flag_values=values)
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if not values.output:
        raise ConfigError("--output is needed: the results file to append to")
    wrong = [name for name in values.shape if name not in SHAPES]
    if wrong or not values.shape:
        raise ConfigError(f"--shape={','.join(values.shape)}: choose of {', '.join(SHAPES)}")
    session.check_output(values.output)
    devices = jax.devices()[: values.devices or None]
    settings = [drop_scores.setting_of(name, tiny=values.tiny) for name in dict.fromkeys(values.shape)]
    for setting in settings:
        if len(devices) < 2 or setting.moe.num_experts % len(devices):
            raise ConfigError(
                f"{len(devices)} devices: {setting.name} needs two or more that divide its {setting.moe.num_experts} "
                "experts; emulate them on the CPU by XLA_FLAGS=--xla_force_host_platform_device_count=2"
            )
    mesh = sharding.make_mesh(MeshConfig(data=1, expert=len(devices)), devices)
    facts = environment_facts()
    shared: dict[str, Any] = {
        "kind": "value", "paper": PAPER, "table": TABLE, "command": session.command_line(),
        **{name: facts[name] for name in ("commit", "dirty", "device", "device_count", "versions")},
    }  # fmt: skip
    for setting in settings:
        sized = setting if values.tiny else dataclasses.replace(setting, tokens=values.tokens)
        for row in rows_of(sized, mesh, values.rate, values.repeats, values.target_ms, shared):
            append_rows(Path(values.output), [row])
            session.say(f"{row.row:28s} {row.value:.3f}x {row.extra['median_ms']:.3f} ms   predicted "
                        f"{row.extra['predicted']:.3f}x   dropped {row.extra['drop_rate']:.1%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
