"""What each table of Capacity-Aware Inference (2503.05066) compares: settings, contrasts stated before the run, and the
published figures. ``experiments.papers.capacity_aware`` measures them.

All tables but the first split the tokens and experts of a batch over ``ranks`` virtual ranks, so that Expanded Drop is
local, as in the paper. The latency of a setting is the number of rows of the busiest rank, summed over batches and MoE
layers, as a share of what it is without a limit: the paper's straggler model at device level (its section 3.1 and
Table 3; a grouped matmul's time follows the sum of a device's loads). It is a count and no time.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from moejax import limits, routing
from moejax.config import ConfigError, ExperimentConfig
from moejax.model import moe_layer_ids
from moejax.types import Limit
from moejax.verdicts import Contrast

METRIC = "bits_per_byte"
BASELINE = "no limit"
TABLES = ("1", "sweep", "2", "3", "latency")
"""In the order in which they are made; "2" and "latency" read factors off the sweep."""
LATENCY = "rows of the busiest rank, as a share of those without a limit"
MODELS = ("olmoe", "deepseek", "qwen", "mixtral")
SHARE = 0.12
"""Pairs that the paper's Token Drop loses where it gains most (Mixtral, factor 1.5: 12 % of pairs, 1.85x as fast).
Small models are less skewed than the published ones: at the paper's factors they may lose next to nothing."""
DROPPED = "12 % dropped"
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
FEW = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Of the arms that the paper has no sweep of."""
EQUAL_TO = ("token drop", 1.0)
"""The arm and factor whose latency the others are brought to."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table: a model under limits."""

    name: str
    arm: str
    limits: tuple[Limit, ...] = ()
    factor: float | None = None
    published: float | None = None
    ranks: int = 1
    """Virtual ranks."""
    k: int = 0
    """Experts per token instead of the model's; 0: those."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """What the sweep measured of one arm, by factor."""

    factors: tuple[float, ...]
    dropped: tuple[float, ...]
    latency: tuple[float, ...]

    def factor_at(self, values: tuple[float, ...], target: float) -> float:
        """The factor at which ``values`` are ``target``, linear between neighbours; at the ends the last factor, and of
        several with one value the lowest."""
        distinct, first = np.unique(values, return_index=True)
        return float(np.interp(target, distinct, np.asarray(self.factors)[first]))


Make = Callable[[float], Limit]
ARMS: dict[str, Make] = {
    "token drop": lambda f: limits.token_drop(f),
    "expanded drop": lambda f: limits.expanded_drop(f, added_weight="like_own"),
    "expanded drop, top-k first": lambda f: limits.expanded_drop(f, priority="topk", added_weight="like_own"),
    "device budget": lambda f: limits.device_budget(f),
    "device budget, expanded": lambda f: limits.device_budget(f, expanded=True, added_weight="like_own"),
}
"""What the sweep varies. Added pairs are weighed on the footing of a token's own: of a router that does not renormalise
(OLMoE, Qwen, DeepSeek) that is the paper's G."""

PUBLISHED_2: dict[str, dict[str, float]] = {
    "olmoe": {BASELINE: 63.5, "expert drop": 60.5, "token drop": 62.3, "expanded drop": 63.2},
    "qwen": {BASELINE: 65.9, "expert drop": 64.4, "token drop": 65.1, "expanded drop": 65.6},
    "deepseek": {BASELINE: 69.3, "expert drop": 65.3, "token drop": 68.2, "expanded drop": 68.9},
    "mixtral": {BASELINE: 74.3, "expert drop": 72.2, "token drop": 73.8, "expanded drop": 74.5},
}
FACTOR_2 = {"olmoe": 2.0, "deepseek": 2.0, "qwen": 1.5, "mixtral": 1.5}
PUBLISHED_METRIC = {
    "2": "average accuracy of 9 tasks, {} (%)",
    "3": "average accuracy, Qwen3-30B-A3B, both levels with Expanded Drop (%)",
}
PUBLISHED_3 = {BASELINE: 75.6, "expanded drop, expert level, factor 1.5": 73.9,
               "expanded drop, device level, factor 1": 74.8}  # fmt: skip


def published_model(config: ExperimentConfig) -> str:
    """The published model that the config's is like, by its name; OLMoE where it says nothing."""
    text = f"{config.name} {config.init_from}".lower()
    return next((name for name in MODELS if name in text), "olmoe")


def ranks_of(config: ExperimentConfig, shards: int) -> int:
    """Virtual ranks of the tables: as many as divide experts and sequences, at most the paper's 8."""
    sequences = config.table.batch_size // shards
    return max(r for r in range(1, 9) if config.model.moe.num_experts % r == 0 and sequences % r == 0)


def row_name(arm: str, factor: float) -> str:
    return f"{arm}, factor {factor:g}"


def settings(table: str, config: ExperimentConfig, ranks: int, curves: Mapping[str, Curve]) -> list[Setting]:
    """The rows of ``table``, the baseline first.

    Args:
      ranks: virtual ranks of all tables but "1".
      curves: what the sweep measured, by arm.
    """
    moe, model = config.model.moe, published_model(config)
    if table == "1":
        base = Setting(BASELINE, BASELINE, published=PUBLISHED_1[BASELINE])
        return [base] + [
            Setting(row_name(arm, f), arm, (limits.token_drop(f, arm),), f, PUBLISHED_1.get((arm, f)))
            for f in config.table.factors
            for arm in config.table.arms
        ]
    if table == "sweep":
        rows = [Setting(row_name(arm, f), arm, (make(f),), f)
                for arm, make in ARMS.items() for f in (SWEEP if arm in PUBLISHED_2["olmoe"] else FEW)]  # fmt: skip
    elif table == "2":
        theirs = PUBLISHED_2[model]
        rows = [Setting("expert drop", "expert drop", (limits.expert_drop(share=0.1),), None, theirs["expert drop"])]
        for arm in ("token drop", "expanded drop", "expanded drop, top-k first"):
            factor = FACTOR_2[model]
            rows.append(Setting(f"{arm}, the paper's factor", arm, (ARMS[arm](factor),), factor, theirs.get(arm)))
            # Of every arm the factor at which Token Drop loses the share: arms of one factor stand beside each other.
            factor = curves["token drop"].factor_at(curves["token drop"].dropped, SHARE)
            rows.append(Setting(f"{arm}, {DROPPED}", arm, (ARMS[arm](factor),), factor))
    elif table == "3":
        rows = [
            Setting(f"{form}, {level} level, factor {f:g}", f"{level} level", (ARMS[arm](f),), f,
                    PUBLISHED_3.get(f"{form}, {level} level, factor {f:g}"))
            for form, pairs in _LEVELS.items() for arm, level, f in pairs
        ]  # fmt: skip
        rows.append(Setting("measured budget", "measured budget", (limits.measured_budget(),)))
    else:
        arm, factor = EQUAL_TO
        curve = curves[arm]
        target = float(np.interp(factor, curve.factors, curve.latency))
        rows = []
        for arm, make in ARMS.items():
            found = curves[arm].factor_at(curves[arm].latency, target)
            rows.append(Setting(f"{arm}, equal latency", arm, (make(found),), found))
        rows += [Setting(f"top-{k} of {moe.router.k}", "lower top-k", k=k) for k in lower_ks(config)]
        rows.append(Setting("measured budget", "measured budget", (limits.measured_budget(),)))
        if by_layer := config.table.layer_factors:
            name = f"token drop, factors {'/'.join(f'{f:g}' for f in by_layer)}"
            rows.append(Setting(name, "token drop, by layer", (limits.token_drop(by_layer),), float(np.mean(by_layer))))
    base = Setting(
        BASELINE, BASELINE, published={"2": PUBLISHED_2[model], "3": PUBLISHED_3}.get(table, {}).get(BASELINE)
    )
    return [dataclasses.replace(row, ranks=ranks) for row in (base, *rows)]


_LEVELS = {
    form: (
        (arm, "expert", 1.5),
        ("device budget, expanded" if "expanded" in form else "device budget", "device", 1.0),
        ("device budget, expanded" if "expanded" in form else "device budget", "device", 1.5),
    )
    for form, arm in (("token drop", "token drop"), ("expanded drop", "expanded drop"))
}

PUBLISHED_1 = {
    BASELINE: 64.0,
    ("order", 2.0): 60.8, ("reverse", 2.0): 60.8, ("random", 2.0): 61.3, ("score", 2.0): 64.0,
    ("order", 1.5): 55.1, ("reverse", 1.5): 56.0, ("random", 1.5): 59.1, ("score", 1.5): 63.1,
    ("order", 1.0): 51.8, ("reverse", 1.0): 52.0, ("random", 1.0): 53.1, ("score", 1.0): 61.1,
}  # fmt: skip
PRIMARY_FACTOR = 1.0


def lower_ks(config: ExperimentConfig) -> list[int]:
    """Fewer experts per token, down to half of them, as the router's family allows."""
    router = config.model.moe.router
    k, least = router.k, routing.FAMILIES[router.name].min_k
    return [fewer for fewer in range(k - 1, 0, -1) if 2 * fewer >= k and fewer >= least]


def contrasts(table: str, config: ExperimentConfig) -> list[Contrast]:
    """Stated before any run."""
    margin = config.table.margin

    def better(name: str, a: str, b: str, primary: bool = False, claim: str = "better") -> Contrast:
        return Contrast.on_metric(name, METRIC, a, b, margin=margin, primary=primary, claim=claim)

    if table == "1":
        claims = (("score", "random"), ("random", "order"), ("random", "reverse"))
        return [
            better(f"{a} beats {b} at factor {f:g}", row_name(a, f), row_name(b, f), primary=f == PRIMARY_FACTOR)
            for f in config.table.factors
            for a, b in claims
            if a in config.table.arms and b in config.table.arms
        ]
    if table == "sweep":
        return [
            better("1.5 is near-baseline (token drop)", row_name("token drop", 1.5), BASELINE, True, "no_loss"),
            better("1.5 is near-baseline (expanded drop)", row_name("expanded drop", 1.5), BASELINE, True, "no_loss"),
            better("steep fall below 1.0", row_name("token drop", 1.0), row_name("token drop", 0.5), True),
            better("3 is no limit (token drop)", row_name("token drop", 3.0), BASELINE, False, "no_loss"),
        ]
    if table == "2":
        found = []
        for where in (DROPPED, "the paper's factor"):
            first = where == DROPPED
            token, expanded = f"token drop, {where}", f"expanded drop, {where}"
            found += [
                better(f"expanded drop beats token drop ({where})", expanded, token, first),
                better(f"token drop beats expert drop ({where})", token, "expert drop", first),
                better(f"expanded drop loses nothing ({where})", expanded, BASELINE, first, "no_loss"),
                better(f"top-k first beats the paper's form ({where})",
                       f"expanded drop, top-k first, {where}", expanded),
            ]  # fmt: skip
        return found
    if table == "3":
        return [
            better(f"device level 1.0 beats expert level 1.5 ({form})", f"{form}, device level, factor 1",
                   f"{form}, expert level, factor 1.5", form == "expanded drop")
            for form in _LEVELS
        ] + [better("measured budget loses nothing", "measured budget", BASELINE, False, "no_loss")]  # fmt: skip
    equal = "{}, equal latency".format
    return [
        better("expanded drop beats token drop at equal latency", equal("expanded drop"), equal("token drop"), True),
        better("device budget beats token drop at equal latency", equal("device budget"), equal("token drop"), True),
        better("top-k first beats the paper's form at equal latency", equal("expanded drop, top-k first"),
               equal("expanded drop"), True),
        better("device level beats expert level, both expanded, at equal latency", equal("device budget, expanded"),
               equal("expanded drop")),
    ]  # fmt: skip


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError, before any training, for tables, arms or factors that cannot be made."""
    table = config.table
    for name in ("tables", "arms", "factors"):
        values = getattr(table, name)
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"table.{name}={values}: name at least one, each once")
    if wrong := [name for name in table.tables if name not in TABLES]:
        raise ConfigError(f"table.tables={table.tables}: {wrong[0]!r} is none of {', '.join(TABLES)}")
    if {"2", "latency"} & set(table.tables) and "sweep" not in table.tables:
        raise ConfigError(
            f"table.tables={table.tables}: '2' and 'latency' take factors from the sweep; add 'sweep' to them"
        )
    for arm in table.arms:
        for factor in table.factors:
            limits.token_drop(factor, arm)
    if table.layer_factors:
        if "latency" not in table.tables:
            raise ConfigError(
                f"table.layer_factors={table.layer_factors} are those of a row of the table 'latency': add it to "
                "table.tables"
            )
        layers = len(moe_layer_ids(config.model))
        try:
            limits.check([limits.token_drop(table.layer_factors)], config.model.moe, layers, causal=True)
        except ConfigError as error:
            raise ConfigError(f"table.layer_factors={table.layer_factors}: {error}") from error
