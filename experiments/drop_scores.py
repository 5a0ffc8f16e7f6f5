"""MoE layers of published models, with random weights and scores as spread as those of the trained ones, and thresholds
for drop rates on them (for ``experiments.drop_speed``).

What a threshold drops depends on the router's scores, and how well the rest runs on the experts' loads. Logits here are
``scale * normal + popularity * (normal quantile of the expert)``, the experts in random order. On a trained lab model
(16 experts, top-4, 350 steps) normal logits of one scale, fitted to the threshold that drops 25 %, give the drop rates
of all others from 3 to 70 % within 2.5 points over all layers, and within 3 in its upper two layers. So one published
pair of threshold and drop rate says the scale of a model (:data:`SHAPES`). ``popularity`` gives the busiest expert as
much as Dirichlet(5) would, on which the kernels' own benchmarks are.

Letters: T tokens, E experts, D model, F expert hidden.
"""

import dataclasses
import importlib
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moejax import limits, thresholds
from moejax.config import ExperimentConfig, MoEConfig, from_mapping
from moejax.moe import MoELayer
from moejax.thresholds import Rule, ScoreTable
from moejax.types import Limit, RouteContext


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer of a published model."""

    config: str
    """File in ``configs/models``."""
    tokens: int
    """Of one prefill."""
    scale: float
    popularity: float
    source: str
    """What ``scale`` is from."""
    published: tuple[float, float] | None = None
    """A threshold of 1T-Drop and the share of routed work that it drops (2508.18376)."""


SHAPES = {
    "olmoe": Shape("olmoe_1b_7b", 16_384, 1.04, 0.26, "OLMoE-1B-7B-Instruct: 21.7 % at 0.08 (Table 2)", (0.08, 0.217)),
    "mixtral": Shape("mixtral_8x7b", 16_384, 1.42, 0.47, "Mixtral-8x7B: 20.3 % at 0.30 (Table 1)", (0.30, 0.203)),
    "deepseek_v2_lite": Shape(
        "deepseek_v2_lite", 16_384, 1.26, 0.29,
        "DeepSeek-V2-Lite-Chat: 27 % of routed and shared work at 0.12 (Table 2), 36 % of routed", (0.12, 0.36),
    ),
    "qwen3": Shape("qwen3_30b_a3b", 32_768, 1.04, 0.21, "that of OLMoE: nothing is published for Qwen3"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """A layer to build, and the tokens that it gets."""

    name: str
    shape: Shape
    config: ExperimentConfig
    moe: MoEConfig
    dim: int
    tokens: int

    @property
    def scores(self) -> str:
        """What a row says of the scores."""
        return f"normal logits x {self.shape.scale:g}, experts' means x {self.shape.popularity:g}: {self.shape.source}"

    @property
    def flops(self) -> float:
        """Of one pair's whole expert."""
        return 6.0 * self.dim * self.moe.expert_dim


def setting_of(name: str, *, tiny: bool = False) -> Setting:
    """The layer of a model in :data:`SHAPES`; ``tiny`` for a try on a CPU: the same flags, 64 tokens, and experts of
    four blocks of the kernels' extents."""
    shape = SHAPES[name]
    module = importlib.import_module(f"configs.models.{shape.config}")
    config = from_mapping(ExperimentConfig, module.get_config("tiny" if tiny else "full"))
    given = config.model.moe
    moe = dataclasses.replace(given, losses=(), expert_dim=256 if tiny else given.expert_dim)
    return Setting(name, shape, config, moe, config.model.dim, 64 if tiny else shape.tokens)


# --- layer and tokens -----------------------------------------------------------------------------


def router_kernel(setting: Setting, seed: int = 0) -> Float[Array, "D E"]:
    """Normal columns, so that normal tokens of width D give logits with a standard deviation of ``scale``."""
    size = (setting.dim, setting.moe.num_experts)
    return setting.shape.scale / setting.dim**0.5 * jax.random.normal(jax.random.key(seed), size)


def make_layer(setting: Setting, seed: int = 0) -> MoELayer:
    """Random weights, in bfloat16 but for the router's, made where they stay."""

    def make() -> MoELayer:
        layer = MoELayer(setting.moe, setting.dim, setting.config.model.activation, jax.random.key(seed))
        graph, state = nnx.split(layer)

        def placed(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
            if path == ("router", "arrays", "kernel"):
                return leaf.replace(router_kernel(setting))
            return leaf if path[0] == "router" else leaf.replace(leaf[...].astype(jnp.bfloat16))

        return nnx.merge(graph, nnx.from_flat_state([(p, placed(p, v)) for p, v in nnx.to_flat_state(state)]))

    return jax.jit(make)()


def popularity(setting: Setting) -> Float[np.ndarray, "E"]:
    """Means of the experts' logits: normal quantiles times the shape's popularity, the experts in random order."""
    experts = setting.moe.num_experts
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / experts) for i in range(experts)], np.float32)
    return setting.shape.popularity * np.random.default_rng(0).permutation(quantiles)


def make_tokens(
    setting: Setting, count: int, seed: int = 0, means: Float[np.ndarray, "E"] | None = None
) -> Float[Array, "T D"]:
    """Normal tokens with a common mean that gives each expert's logits their mean; None: :func:`popularity`."""
    means = popularity(setting) if means is None else means
    kernel = np.asarray(router_kernel(setting))
    mean = kernel @ np.linalg.solve(kernel.T @ kernel, means)  # the shortest with these logits
    key = jax.random.fold_in(jax.random.key(1), seed)
    return (jax.random.normal(key, (count, setting.dim)) + mean).astype(jnp.bfloat16)


# --- thresholds -----------------------------------------------------------------------------------


def scores_of(layer: MoELayer, x: Float[Array, "1 T D"]) -> ScoreTable:
    """The normalised scores of the pairs that the router makes of ``x``."""

    @jax.jit
    def run(layer: MoELayer, x: Array) -> tuple[Array, Array]:
        record = layer.begin(x, RouteContext(record=True), ()).record
        assert record is not None
        made = jax.tree.map(lambda leaf: leaf[0], record.made)
        return limits.normalised(made), made.weight

    table = ScoreTable(1)
    score, weight = jax.device_get(run(layer, x))
    table.add(score[None], weight[None], x.shape[1])
    return table


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting that is timed. Arms of one kind run the same program."""

    kind: str
    """"none", "1T", "2T half", "2T 0.01" or "opportunistic"."""
    rate: float = 0.0
    """Drop rate that was asked for."""
    limits: tuple[Limit, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}, {self.facts.get('keep', f'{self.rate:.0%}')}"

    @property
    def program(self) -> str:
        return self.kind.split()[0]


PAPER_GAP = 0.01
HALF_SHARE = 0.5
"""Share of the dropped work that comes from halved pairs, in the arms "2T half"."""


def half_share(table: ScoreTable, at: Any, rule: Rule) -> float:
    """Share of the work that thresholds drop which comes from halved pairs."""
    gap, one, gone, halved = rule.gap or 0.0, Rule(None), 0.0, 0.0
    for counts, threshold in zip(table.pairs, np.broadcast_to(at, table.layers), strict=True):
        gone += thresholds.dropped(counts, threshold, rule)
        halved += thresholds.dropped(counts, threshold + gap, one) - thresholds.dropped(counts, threshold - gap, one)
    return float(rule.skip * halved / gone) if gone else 0.0


def half_rule(table: ScoreTable, rate: float, expert_dim: int) -> Rule:
    """2T-Drop whose gap makes :data:`HALF_SHARE` of the dropped work come from halved pairs, on all layers' scores
    taken together."""
    pooled = ScoreTable(1)
    pooled.pairs += table.pairs.sum(axis=0)
    low, high = 0.0, 0.5
    for _ in range(16):
        gap = (low + high) / 2
        rule = Rule(gap, 0, expert_dim)
        at = thresholds.solve(pooled, rate, rule)
        # A threshold of 0: even the lowest with this gap would drop more.
        more = at[0] > 0 and half_share(pooled, at, rule) < HALF_SHARE
        low, high = (gap, high) if more else (low, gap)
    return Rule(low, 0, expert_dim)


def rules_of(table: ScoreTable, rate: float, expert_dim: int) -> dict[str, Rule]:
    """The rule of each kind of arm. Without a rate only 1T-Drop: with a threshold of 0 nothing is halved."""
    paper = Rule(PAPER_GAP, 0, expert_dim)
    two = {"2T half": half_rule(table, rate, expert_dim), f"2T {PAPER_GAP:g}": paper} if rate else {}
    return {"1T": Rule(None)} | two


def arms_of(table: ScoreTable, rates: list[float], expert_dim: int) -> list[Arm]:
    """No limit, then for each rate 1T-Drop, 2T-Drop with :data:`HALF_SHARE`, and 2T-Drop with the paper's gap."""
    arms = [Arm("none")]
    for rate in rates:
        for kind, rule in rules_of(table, rate, expert_dim).items():
            threshold = float(thresholds.solve(table, rate, rule)[0])
            facts = {"threshold": threshold, "gap": rule.gap, "half_share": half_share(table, threshold, rule)}
            arms.append(Arm(kind, rate, (limits.threshold_drop(threshold, gap=rule.gap),), facts))
    return arms
