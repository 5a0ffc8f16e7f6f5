"""What each table of DualSparse-MoE (2508.18376) compares: settings, contrasts stated before the run, and the published
figures. ``experiments.papers.dualsparse`` measures them.

Thresholds are found on validation text for a drop rate that is stated here: (dropped pairs + what halved pairs skip) /
routed pairs. Arms are therefore compared at equal work, and the rate that each has on held-out text stands in its row.

The paper's gap of 0.01 between a threshold and the two of 2T-Drop is for models whose tokens have about 8 experts. A
score's scale is 1/k, so here it is ``GAP / k``: 0.01 for 8. Few pairs lie within it; "wide" arms have ``WIDE`` times as
much.
"""

import dataclasses

from moejax import pruning, routing
from moejax.config import ConfigError, ExperimentConfig
from moejax.neurons import METRICS
from moejax.partition.complete import split_moe
from moejax.thresholds import Spread
from moejax.verdicts import Contrast

METRIC = "bits_per_byte"
BASELINE = "no drop"
TABLES = ("1", "2", "3", "thresholds", "importance", "layers")
MODELS = ("mixtral", "olmoe", "deepseek", "qwen")
PARTS = (1, 2, 4)
RATE = 0.25
"""Of routed work; published: 22 to 27 %."""
GAP = 0.08
WIDE = 4
TUNED_RATES = {1: 0.203, 2: 0.210, 4: 0.239}
"""What the paper's thresholds drop in its Table 1 (T = .30, .15, .08)."""
SWEEP = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60)
EXACT = {"float32": 1e-4, "bfloat16": 5e-3}
"""Bits per byte that a batch may change by where a partition is exact: rounding, by the type of the computation."""
BEST = {"mixtral": "gate_abs", "olmoe": "gate_abs", "deepseek": "gate_up_abs", "qwen": "gate_abs"}
"""The paper's importance metric for each model; for Qwen, of which it says nothing, the more frequent one."""
OURS = "output"
LAYERS_STEPS = 8
"""Table "layers": thresholds in each 1/k."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table: a model, and what of its work is dropped."""

    name: str
    arm: str
    model: str = "base"
    """"base"; "order:METRIC" (neurons sorted); "parts:P" (split completely); "tuned:P" (and fine-tuned); "kept:R"
    (experts pruned); "top:K" (fewer experts per token)."""
    rule: str = ""
    """"": all is computed. "1T", "2T": thresholds for ``rate``. "EES": skipping with the median beta of each layer.
    "best": a token's best pair alone, with all of its weight."""
    rate: float = 0.0
    gap: float = 0.0
    spread: Spread = "global"
    published: float | None = None
    plotted: bool = False


def published_model(config: ExperimentConfig) -> str:
    """The published model that the config's is like, by its name; Mixtral where it says nothing."""
    text = f"{config.name} {config.init_from}".lower()
    return next((name for name in MODELS if name in text), "mixtral")


def parts_of(config: ExperimentConfig) -> list[int]:
    """Into how many parts the experts of Table 1 are split."""
    return [p for p in PARTS if config.model.moe.expert_dim % p == 0]


def kept_of(config: ExperimentConfig) -> list[int]:
    """Experts that pruning keeps: three quarters and half of them, where so few sets can be tried."""
    moe = config.model.moe
    found = []
    for kept in (moe.num_experts * 3 // 4, moe.num_experts // 2):
        try:
            pruning.sets_of(config.model, kept)
            found.append(kept)
        except ConfigError:
            continue
    return found


def lower_k(config: ExperimentConfig) -> int:
    """One expert less for each token; 0: the router's family has no such form."""
    router = config.model.moe.router
    family, k = routing.FAMILIES[router.name], router.k - 1
    return k if k >= family.min_k or (k == 1 and family.sums_to_one) else 0


def skipping_rate(config: ExperimentConfig) -> float:
    """What Efficient Expert Skipping drops with the median: half of all pairs but the best."""
    k = config.model.moe.router.k
    return (k - 1) / (2 * k)


def reconstructed(config: ExperimentConfig) -> str:
    return f"order:{BEST[published_model(config)]}"


def settings(table: str, config: ExperimentConfig) -> list[Setting]:
    """The rows of ``table``, the baseline first. Table "layers" has none: its rows are counts."""
    moe, family = config.model.moe, published_model(config)
    gap, sorted_ = GAP / moe.router.k, reconstructed(config)
    if table == "1":
        rows = []
        for parts in parts_of(config):
            theirs = PUBLISHED_1[parts]
            rows.append(Setting(f"no training, P={parts}", "no training", f"parts:{parts}", published=theirs[0]))
        if config.table.tune_steps:
            for parts in parts_of(config):
                theirs = PUBLISHED_1[parts]
                model = f"tuned:{parts}"
                rows.append(Setting(f"fine-tuned, P={parts}", "fine-tuned", model, published=theirs[1]))
                rows.append(
                    Setting(f"fine-tuned + 1T, P={parts}", "fine-tuned + 1T", model, "1T", TUNED_RATES[parts],
                            published=theirs[2])
                )  # fmt: skip
        return rows
    base = Setting(BASELINE, BASELINE)
    if table == "2":
        theirs = PUBLISHED_2.get(family, (None,) * 4)
        return [
            dataclasses.replace(base, published=theirs[0]),
            Setting("1T", "1T", "base", "1T", RATE, published=theirs[1]),
            Setting("2T partition", "2T partition", "base", "2T", RATE, gap, published=theirs[2]),
            Setting("2T reconstruct", "2T reconstruct", sorted_, "2T", RATE, gap, published=theirs[3]),
            Setting("2T reconstruct, our metric", "2T reconstruct", f"order:{OURS}", "2T", RATE, gap),
            Setting("2T partition, wide", "2T partition, wide", "base", "2T", RATE, WIDE * gap),
            Setting("2T reconstruct, wide", "2T reconstruct, wide", sorted_, "2T", RATE, WIDE * gap),
            Setting("2T reconstruct, a rate for each layer", "2T by layer", sorted_, "2T", RATE, gap, "layer"),
            Setting("2T reconstruct, least weight lost", "2T by weight", sorted_, "2T", RATE, gap, "weight"),
        ]
    if table == "3":
        rate, theirs = skipping_rate(config), PUBLISHED_3 if family == "mixtral" else {}
        rows = [
            base,
            Setting("2T partition", "2T partition", "base", "2T", rate, gap, published=theirs.get("2T partition")),
            Setting("2T reconstruct", "2T reconstruct", sorted_, "2T", rate, gap,
                    published=theirs.get("2T reconstruct")),
            Setting("EES", "EES", "base", "EES", rate, published=theirs.get("EES")),
        ]  # fmt: skip
        for kept in kept_of(config):
            share = kept / moe.num_experts
            rows.append(Setting(eep(config, kept), "EEP", f"kept:{kept}", published=theirs.get(share)))
            rows.append(
                Setting(f"{eep(config, kept)} + EES", "EEP + EES", f"kept:{kept}", "EES", rate,
                        published=theirs.get(-share))
            )  # fmt: skip
        if k := lower_k(config):
            whole, less = f"top-{k} of {moe.router.k}", 1 - k / moe.router.k
            able = k >= routing.FAMILIES[moe.router.name].min_k
            rows.append(Setting(whole, "lower top-k", f"top:{k}" if able else "base", "" if able else "best", less))
            rows.append(
                Setting(f"2T reconstruct, as much as top-{k}", "2T reconstruct", sorted_, "2T", less, gap)
            )  # fmt: skip
        return rows
    if table == "thresholds":
        return [base] + [
            Setting(f"{arm}, {rate:.0%} dropped", arm, model, rule, rate, width, plotted=True)
            for arm, model, rule, width in (("1T", "base", "1T", 0.0), ("2T reconstruct", sorted_, "2T", gap))
            for rate in SWEEP
        ]
    if table == "importance":
        theirs = PUBLISHED_IMPORTANCE if family == "deepseek" else {}
        return [
            base,
            Setting("as stored", "as stored", "base", "2T", RATE, WIDE * gap),
            *(
                Setting(words(metric), words(metric), f"order:{metric}", "2T", RATE, WIDE * gap,
                        published=theirs.get(metric))
                for metric in METRICS
            ),
        ]  # fmt: skip
    return []


def eep(config: ExperimentConfig, kept: int) -> str:
    return f"EEP, {kept} of {config.model.moe.num_experts} experts"


def words(metric: str) -> str:
    """An importance metric as the paper writes it; ours is gate weight x |gate-up| x norm of the down row."""
    return {
        "gate": "gate", "gate_abs": "|gate|", "gate_up": "gate-up", "gate_up_abs": "|gate-up|", "output": "our metric",
    }[metric]  # fmt: skip


PUBLISHED_METRIC = {
    "1": "average accuracy of 9 tasks, Mixtral-8x7B (%)",
    "2": "average accuracy of 9 tasks, {} (%)",
    "3": "relative change of GSM8K, Mixtral-8x7B-Instruct (%)",
    "importance": "average accuracy of 9 tasks, DeepSeek-V2-Lite-Chat (%)",
}
NAMES = {"mixtral": "fine-tuned Mixtral 8/32", "olmoe": "OLMoE-Instruct", "deepseek": "DeepSeek-V2-Lite-Chat"}
PUBLISHED_1 = {1: (70.18, 70.53, 70.29), 2: (70.18, 70.86, 70.76), 4: (70.19, 71.12, 70.88)}
"""By P: without training, fine-tuned, fine-tuned and 1T-Drop."""
PUBLISHED_2 = {
    "mixtral": (71.12, 70.88, 70.90, 71.04),
    "olmoe": (65.91, 65.10, 65.11, 65.63),
    "deepseek": (67.83, 67.27, 67.37, 67.65),
}
"""No drop, 1T, 2T by partition, 2T by reconstruction."""
PUBLISHED_3: dict[str | float, float] = {
    "2T partition": 0.5, "2T reconstruct": 1.2, "EES": -2.4, 0.75: -8.0, 0.5: -25.9, -0.75: -14.9, -0.5: -36.4,
}  # fmt: skip
"""Pruned models by the share of experts that they keep, with EES under its negative."""
PUBLISHED_IMPORTANCE = {"gate": 67.17, "gate_abs": 67.29, "gate_up": 66.79, "gate_up_abs": 67.65}


def contrasts(table: str, config: ExperimentConfig) -> list[Contrast]:
    """Stated before any run."""
    margin = config.table.margin

    def better(name: str, a: str, b: str, primary: bool = False, claim: str = "better") -> Contrast:
        return Contrast.on_metric(name, METRIC, a, b, margin=margin, primary=primary, claim=claim)

    if table == "1":
        parts = parts_of(config)
        base = f"no training, P={parts[0]}"
        found = [
            better(f"partition without training equal, P={p}", f"no training, P={p}", base, True, "no_loss")
            for p in parts[1:]
        ]
        if config.table.tune_steps:
            tuned = [f"fine-tuned, P={p}" for p in parts]
            if len(parts) > 1:
                found.append(better("fine-tuning gains more in parts", tuned[-1], tuned[0], True))
            found.append(better("fine-tuning gains", tuned[0], base))
            found += [
                better(f"1T loses nothing after fine-tuning, P={p}", f"fine-tuned + 1T, P={p}", name, False, "no_loss")
                for p, name in zip(parts, tuned, strict=True)
            ]
        return found
    if table == "2":
        return [
            better("2T reconstruct loses less than 1T", "2T reconstruct", "1T", True),
            better("reconstruct beats partition", "2T reconstruct", "2T partition", True),
            better("2T reconstruct loses nothing", "2T reconstruct", BASELINE, True, "no_loss"),
            better("the second threshold alone beats 1T", "2T partition", "1T"),
            better("wide: 2T reconstruct loses less than 1T", "2T reconstruct, wide", "1T"),
            better("wide: reconstruct beats partition", "2T reconstruct, wide", "2T partition, wide"),
            better("our metric beats the paper's", "2T reconstruct, our metric", "2T reconstruct"),
            better("least weight lost beats one threshold", "2T reconstruct, least weight lost", "2T reconstruct"),
            better("a rate for each layer beats one threshold", "2T reconstruct, a rate for each layer",
                   "2T reconstruct"),
        ]  # fmt: skip
    if table == "3":
        kept, k = kept_of(config), lower_k(config)
        found = [better("2T reconstruct beats EES", "2T reconstruct", "EES", True)]
        found += [
            better(f"2T reconstruct beats {eep(config, r)}", "2T reconstruct", eep(config, r), r == kept[0])
            for r in kept
        ]
        found += [better(f"2T reconstruct beats {eep(config, r)} + EES", "2T reconstruct", f"{eep(config, r)} + EES")
                  for r in kept]  # fmt: skip
        if k:
            found.append(better("2T reconstruct beats lower top-k at equal work", f"2T reconstruct, as much as top-{k}",
                                f"top-{k} of {config.model.moe.router.k}", True))  # fmt: skip
        return found
    if table == "thresholds":
        at = "{}, {:.0%} dropped".format
        return [
            better("1T: 5 % lose nothing", at("1T", 0.05), BASELINE, True, "no_loss"),
            better("2T reconstruct: 10 % lose nothing", at("2T reconstruct", 0.10), BASELINE, True, "no_loss"),
            better("1T: quality falls from 25 to 50 %", at("1T", 0.25), at("1T", 0.50), True),
            *(
                better(f"2T reconstruct loses less than 1T at {rate:.0%}", at("2T reconstruct", rate), at("1T", rate))
                for rate in SWEEP
            ),
        ]
    if table == "importance":
        return [
            better("|gate| beats gate", words("gate_abs"), words("gate"), True),
            better("|gate-up| beats gate-up", words("gate_up_abs"), words("gate_up"), True),
            better("our metric beats |gate-up|", words("output"), words("gate_up_abs"), True),
            *(better(f"{words(metric)} beats as stored", words(metric), "as stored") for metric in METRICS),
        ]
    return []


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError, before any training, for tables that cannot be made."""
    table, moe = config.table, config.model.moe
    if not table.tables or len(set(table.tables)) != len(table.tables):
        raise ConfigError(f"table.tables={table.tables}: name at least one, each once")
    if wrong := [name for name in table.tables if name not in TABLES]:
        raise ConfigError(f"table.tables={table.tables}: {wrong[0]!r} is none of {', '.join(TABLES)}")
    if table.tune_steps < 0:
        raise ConfigError(f"table.tune_steps={table.tune_steps}: steps of fine-tuning, 0 or more")
    if table.tune_steps and not config.train.steps:
        raise ConfigError(
            f"table.tune_steps={table.tune_steps} with train.steps=0, where weights are evaluated as they are: set "
            "table.tune_steps to 0, or train some steps"
        )
    if not routing.FAMILIES[moe.router.name].causal:
        raise ConfigError(
            f"router.name={moe.router.name!r}: its rows are pairs, and these tables compare the experts of a token"
        )
    if moe.router.k < 2:
        raise ConfigError(f"router.k={moe.router.k}: a token's one expert has all of its score; take two or more")
    if moe.parts > 1 or moe.router.copies > 1:
        raise ConfigError(
            f"moe.parts={moe.parts}, router.copies={moe.router.copies}: the tables split experts themselves; merge "
            "them first (python -m experiments.partition --form=merge)"
        )
    for parts in parts_of(config)[1:] if "1" in table.tables else ():
        split_moe(moe, parts, "complete")
