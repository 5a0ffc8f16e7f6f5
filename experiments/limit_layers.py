"""What ``experiments.limit_speed`` times: arms, how popular experts are, and an MoE layer.

Letters: T tokens, E experts, L layers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from experiments import capacity_settings, drop_scores, ep_simulation, rank_layers
from experiments.drop_layers import INTERVAL
from experiments.drop_scores import SHAPES, Setting
from experiments.rank_layers import NONE, Arm
from moejax import limits, replicas, trace
from moejax.config import ConfigError
from moejax.replication import max_over_mean, rank_loads
from moejax.results import ResultRow
from moejax.types import Limit

BUDGETS = (1.0, 1.5)
EXPERT_LEVEL = ("token drop", "expanded drop", "expanded drop, top-k first")
"""Arms of ``capacity_settings.ARMS`` that cap each expert."""
FAMILIES = ("token_drop", "expanded_drop", "others", "topk_first")
"""Of arms, in the order in which they are measured."""
TOGETHER = 2
"""Families whose programs are compiled beside one another, and that take turns."""


# --- arms -----------------------------------------------------------------------------------------


def lower_ks(k: int) -> list[int]:
    """Three quarters of the experts per token, and half of them."""
    return sorted({max(1, 3 * k // 4), max(1, k // 2)} - {k}, reverse=True)


BASE = dataclasses.replace(NONE, facts={"arm": capacity_settings.BASELINE})


def families(k: int, factors: list[float]) -> dict[str, list[Arm]]:
    """The arms of each of :data:`FAMILIES`; :data:`BASE` is measured beside all of them."""

    def arm(name: str, limit: Limit, factor: float | None = None) -> Arm:
        label = name if factor is None else capacity_settings.row_name(name, factor)
        return Arm(label, (limit,), facts={"arm": name, "factor": factor})

    token, expanded, top_first = (
        [arm(name, capacity_settings.ARMS[name](f), f) for f in factors] for name in EXPERT_LEVEL
    )
    others = [arm("device budget", limits.device_budget(f), f) for f in BUDGETS]
    others.append(arm("measured budget", limits.measured_budget()))
    others += [Arm(f"top-{fewer} of {k}", k=fewer, facts={"arm": "lower top-k"}) for fewer in lower_ks(k)]
    others.append(Arm("replication", copies=True, facts={"arm": "replication"}))
    return dict(zip(FAMILIES, (token, expanded, others, top_first), strict=True))


# --- popularity -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loads:
    """How popular the experts of each layer are."""

    means: Callable[[int], Float[np.ndarray, "E"]]
    """Of the logits of a model's layer, by its number."""
    single: int
    """The layer that a single one stands for."""
    name: str
    """For rows; "": those of the shape."""
    source: str


def loads_of(setting: Setting, text: str, ranks: int) -> Loads:
    """What ``--loads`` says.

    Raises:
      ConfigError: a skew that the paper did not observe; a file that is no trace, or one of experts that do not divide
        the setting's.
    """
    experts, k, scale = setting.moe.num_experts, setting.moe.router.k, setting.shape.scale
    if not text:
        base = drop_scores.popularity(setting)
        return Loads(lambda i: np.random.default_rng(i).permutation(base) if i else base, 0, "", setting.scores)
    if text == "paper":
        skew = ep_simulation.MODELS[setting.name].skew if setting.name in ep_simulation.MODELS else 0.0
        if not 1 < skew < experts / k:
            able = ", ".join(name for name in SHAPES if name in ep_simulation.MODELS)
            raise ConfigError(
                f"--loads=paper: no skew was observed that {setting.name} with {experts} experts, {k} for each token, "
                f"can have: choose --shape of {able} (not --tiny), or give a trace"
            )
        even = ep_simulation.loads_of(experts, skew)
        share = lambda i: np.random.default_rng(i).permutation(even)  # noqa: E731
        single, name, source = (
            0,
            "the paper's skew",
            f"lognormal with max/mean {skew:g}, as 2503.05066 observed, in random order",
        )
    else:
        table, single, source = from_trace(Path(text), experts, ranks)
        name = f"loads of {Path(text).name}"
        share = lambda i: table[i % len(table)]  # noqa: E731
    told = f"normal logits x {scale:g}, experts' means for loads: {source}"
    return Loads(lambda i: solve_means(share(i), k, scale), single, name, told)


def from_trace(path: Path, experts: int, ranks: int) -> tuple[np.ndarray, int, str]:
    """Loads of each layer of a trace over their mean, ``[L, E]``; the one with the median skew of ranks; what they are.

    Raises:
      ConfigError: as :func:`loads_of`.
    """
    with trace.read(path) as source:
        there = source.num_experts
        if experts % there:
            raise ConfigError(f"--loads={path} is a trace of {there} experts, which do not divide the {experts} here")
        loads = replicas.recorded_loads(source)
        name, tokens = source.config.name, source.meta["tokens"]
    loads = np.repeat(loads / loads.mean(axis=1, keepdims=True), experts // there, axis=1)
    skews = np.asarray([max_over_mean(rank_loads(layer, ranks)) for layer in loads])
    median = int(np.argsort(skews)[len(skews) // 2])
    each = f", each standing for {experts // there}" if experts > there else ""
    text = f"{path.name} ({name}, {tokens:,} tokens, {there} experts{each}; a single layer's of layer {median})"
    return loads, median, text


def solve_means(share: Float[np.ndarray, "E"], k: int, scale: float, samples: int = 4096) -> Float[np.ndarray, "E"]:
    """Means of logits, with a normal of ``scale`` about them, whose top-k gives each expert its share of the pairs
    (mean 1, at most E / k), by repeated correction on drawn logits."""
    rng, experts = np.random.default_rng(0), len(share)
    noise = scale * rng.standard_normal((samples, experts), np.float32)
    means = np.zeros(experts, np.float32)

    def odds(share: np.ndarray) -> np.ndarray:
        chance = np.clip(share * k / experts, 1e-3, 1 - 1e-3)  # of a token to choose the expert
        return np.log(chance / (1 - chance))

    for turn in range(60):
        chosen = np.argpartition(-(noise + means), k - 1, axis=1)[:, :k]
        got = np.bincount(chosen.ravel(), minlength=experts) * experts / (samples * k)
        means += (scale / (2 + turn / 10) * (odds(share) - odds(got))).astype(np.float32)
    return means - means.mean()


# --- a layer --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class How:
    """How to measure."""

    families: list[str]
    factors: list[float]
    model_factors: list[float]
    loads: str
    layers: int
    repeats: int
    target_ms: float
    tiny: bool
    room: Callable[[str], bool]
    """Whether there is time for something; what there is none for is remembered."""
    wrong: list[str] = dataclasses.field(default_factory=list)
    """What was not timed, and why."""


def layer_rows(setting: Setting, mesh: Mesh, how: How, shared: dict[str, Any]) -> Iterator[ResultRow]:
    """A row for each arm, some families after the others."""
    loads = loads_of(setting, how.loads, mesh.size)
    layer = drop_scores.make_layer(setting)
    tokens = drop_scores.make_tokens(setting, mesh.size * setting.tokens, means=loads.means(loads.single))
    of_family = families(setting.moe.router.k, how.factors)
    for names in itertools.batched(how.families, TOGETHER):
        if not how.room(f"{setting.name}, {' and '.join(names)}"):
            continue
        arms = [BASE, *itertools.chain.from_iterable(of_family[name] for name in names)]
        found, wrong = rank_layers.on_ranks(setting, layer, tokens, arms, mesh, how.repeats, how.target_ms)
        how.wrong.extend(f"{setting.name}, {label}: {why}" for label, why in wrong.items())
        if BASE.label not in found:
            return
        skew = rank_layers.skew_of(found[BASE.label].counted.before, mesh.size)
        none = found[BASE.label].profile()
        for arm in (arm for arm in arms if arm.label in found):
            speedup, interval, facts = rank_layers.facts_of(found, arm)
            split: dict[str, Any] = {"no_split": "no time was left"}
            if arm is BASE or how.room(f"profile of {setting.name}, {arm.label}"):
                split = rank_layers.split_facts(none if arm is BASE else found[arm.label].profile(), none)
            facts |= skew | split | {"tokens": setting.tokens}
            yield row_of(shared, setting, loads, arm, "layer", speedup, interval, facts)


def row_of(
    shared: dict, setting: Setting, loads: Loads, arm: Arm, what: str, speedup: float, interval: tuple, facts: dict
) -> ResultRow:
    of = ", ".join(filter(None, (setting.name, loads.name)))
    factor, method = arm.facts.get("factor"), arm.facts["arm"]
    line = f"{method}, {loads.name}" if loads.name else method  # loads of two kinds are two lines of a plot
    x = {} if factor is None else {"x": factor, "x_name": "capacity factor"}
    return ResultRow(
        **shared, row=f"{of}, {arm.label}", metric=f"speedup/{what}", unit="times no limit", value=speedup,
        interval=interval, interval_kind=INTERVAL, baseline_row="" if arm is BASE else f"{of}, {BASE.label}",
        exercised_share=min(1.0, facts["drop_rate"] + facts["added_share"]),
        extra=facts | arm.facts | x | {"shape": setting.name, "loads": loads.source, "method": method, "arm": line},
    )  # fmt: skip
