"""Capacity-Aware Inference (2503.05066), Table 1: Token Drop by order, reverse order, random and score.

Every arm reads the same held-out batches with the same weights; only the limit differs. Limits act within one batch of
``table.batch_size`` sequences, padding excluded, so the batch shape is part of each row.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.config import ConfigError, ExperimentConfig, config_hash
from moejax.data import eval_batches
from moejax.evaluate import DomainScore, bits_per_byte
from moejax.limits import token_drop
from moejax.loop import Run
from moejax.metrics import load_summary
from moejax.results import ResultRow, append_rows, read_rows
from moejax.sharding import token_shards
from moejax.train import TrainState
from moejax.validate import has_experts
from moejax.verdicts import Arm, Contrast, SeedDifferences, judge

PAPER, TABLE, METRIC = "capacity_aware", "1", "bits_per_byte"
BASELINE = "no limit"
PRIMARY_FACTOR = 1.0
PUBLISHED_METRIC = "average accuracy of 8 tasks, OLMoE-1B-7B (%)"
PUBLISHED = {
    BASELINE: 64.0,
    ("order", 2.0): 60.8, ("reverse", 2.0): 60.8, ("random", 2.0): 61.3, ("score", 2.0): 64.0,
    ("order", 1.5): 55.1, ("reverse", 1.5): 56.0, ("random", 1.5): 59.1, ("score", 1.5): 63.1,
    ("order", 1.0): 51.8, ("reverse", 1.0): 52.0, ("random", 1.0): 53.1, ("score", 1.0): 61.1,
}  # fmt: skip


def row_name(arm: str, factor: float) -> str:
    return f"{arm}, factor {factor:g}"


def contrasts(config: ExperimentConfig) -> list[Contrast]:
    """Stated before any run: score beats random, random beats order and reverse; primary at factor 1.0."""
    claims = (("score", "random"), ("random", "order"), ("random", "reverse"))
    return [
        Contrast.on_metric(
            f"{a} beats {b} at factor {factor:g}", METRIC, row_name(a, factor), row_name(b, factor),
            margin=config.table.margin, primary=factor == PRIMARY_FACTOR,
        )
        for factor in config.table.factors
        for a, b in claims
        if a in config.table.arms and b in config.table.arms
    ]  # fmt: skip


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError, before any training, for arms or factors that the table cannot have."""
    table = config.table
    for name in ("arms", "factors"):
        values = getattr(table, name)
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"table.{name}={values}: name at least one, each once")
    for arm in table.arms:
        for factor in table.factors:
            token_drop(factor, arm)
    if not has_experts(config.model):
        raise ConfigError("table.name='capacity_aware' needs a model with experts: model.moe.first_dense leaves none")


def make_table(
    config: ExperimentConfig,
    runs: dict[int, Run],
    workdir: Path,
    facts: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Evaluates every arm on each seed's best checkpoint and appends the rows to ``workdir/results.jsonl``.

    Rows that were made before with the same config and weights are kept, not made again.

    Raises:
      ConfigError: a static buffer overflowed, so that pairs were lost that no limit had dropped.
    """
    out = workdir / "results.jsonl"
    states = {seed: run.best()[0] for seed, run in runs.items()}
    weights = weights_hash(list(states.values()))
    hashed = config_hash(config)
    old = [
        r
        for r in read_rows(out)
        if (r.paper, r.table, r.config_hash, r.checkpoint_hash) == (PAPER, TABLE, hashed, weights)
    ]
    claims = contrasts(config)
    settings = [(arm, factor) for factor in config.table.factors for arm in config.table.arms]
    if {r.row for r in old} >= {BASELINE, *(row_name(*s) for s in settings), *(c.name for c in claims)}:
        say(f"table {PAPER} {TABLE}: done before")
        return
    say(f"table {PAPER} {TABLE}: Token Drop, {len(settings)} settings on {len(runs)} seed(s)")
    measured: dict[str, dict[int, _Measured]] = {}
    for name, limits in [(BASELINE, ()), *((row_name(*s), (token_drop(s[1], s[0]),)) for s in settings)]:
        measured[name] = {seed: _measure(run, states[seed], limits) for seed, run in runs.items()}
        first = next(iter(measured[name].values()))
        say(f"  {name:24s} {np.mean([m.mean for m in measured[name].values()]):.4f} bits per byte   "
            f"dropped {first.dropped:6.2%}   load over all text, max/mean {first.busiest:.2f}")  # fmt: skip
    shards = token_shards(next(iter(runs.values())).mesh)  # a limit acts on each device's own tokens
    judgements = judge(claims, {name: _arm(by_seed) for name, by_seed in measured.items()})
    shared: dict[str, Any] = {
        "paper": PAPER, "table": TABLE, "scale": config.scale, "config": config.name, "config_hash": hashed,
        "checkpoint_hash": weights,
        "data_hash": facts["data"]["hash"], "batch_shape": (config.table.batch_size // shards, config.data.seq_len),
        **{k: facts[k] for k in ("command", "commit", "dirty", "device", "device_count", "versions")},
    }  # fmt: skip
    rows = [_value_row(BASELINE, measured[BASELINE], PUBLISHED[BASELINE], "", None, shared)]
    for arm, factor in settings:
        name = row_name(arm, factor)
        rows.append(_value_row(name, measured[name], PUBLISHED.get((arm, factor)), arm, factor, shared))
    for judgement in judgements:
        rows.append(ResultRow(**shared, **judgement.row_fields(), unit="bits per byte"))
        say(f"  {judgement.contrast.name:38s} {judgement.verdict}")
    append_rows(out, rows)


class _Measured:
    """One arm on one seed."""

    def __init__(self, by_domain: dict[str, DomainScore], load: dict[str, list], dropped: float) -> None:
        self.by_domain, self.dropped = by_domain, dropped
        self.mean = float(np.mean([s.bits_per_byte for s in by_domain.values()]))
        self.busiest = max(load["max_over_mean"])
        self.lost_share = float(np.mean(load["lost_share"]))


def _measure(run: Run, state: TrainState, limits: tuple) -> _Measured:
    config = run.config
    scorer = run.scorer(state, limits=limits)
    split = config.eval.final_split
    by_domain = {
        domain: bits_per_byte(
            scorer,
            eval_batches(
                run.corpus,
                domain,
                split,
                batch_size=config.table.batch_size,
                max_tokens=config.table.max_tokens,
            ),
            run.corpus.tokenizer,
        )
        for domain in run.corpus.domains
        if split in run.corpus.splits(domain)
    }
    if scorer.metrics is None:
        raise ConfigError("table.name='capacity_aware' needs a model with experts: set model.moe")
    load = load_summary(scorer.metrics)
    overflow = sum(load["overflow"])
    if overflow:
        raise ConfigError(
            f"{overflow:.0f} pairs overflowed a static buffer: such a row is not published. Choose another "
            "config.model.moe.implementation."
        )
    m = jax.device_get(scorer.metrics)
    return _Measured(by_domain, load, float(m.dropped.sum() / m.routed.sum()))


def _arm(by_seed: dict[int, _Measured]) -> Arm:
    first = next(iter(by_seed.values()))
    pieces = [(domain, nll, size) for domain, s in first.by_domain.items() for nll, size in s.per_batch]
    share = float(np.mean([m.dropped for m in by_seed.values()]))
    return Arm(
        by_seed={seed: m.mean for seed, m in by_seed.items()},
        batches=[nll / np.log(2) / size for _, nll, size in pieces],
        weights=[size for _, _, size in pieces],
        strata=[domain for domain, _, _ in pieces],
        exercised_share=share if share > 0 else None,
    )


def _value_row(
    name: str,
    by_seed: dict[int, _Measured],
    published: float | None,
    arm: str,
    factor: float | None,
    shared: dict,
) -> ResultRow:
    values = [m.mean for m in by_seed.values()]
    interval = SeedDifferences(values).interval() if len(values) >= 3 else None
    first = next(iter(by_seed.values()))
    return ResultRow(
        kind="value", row=name, metric=METRIC, unit="bits per byte", value=float(np.mean(values)),
        values_by_seed={seed: m.mean for seed, m in by_seed.items()},
        interval=interval, interval_kind="95 %, t over seeds" if interval else "",
        baseline_row="" if name == BASELINE else BASELINE,
        published=published, published_metric=PUBLISHED_METRIC if published is not None else "",
        exercised_share=float(np.mean([m.dropped for m in by_seed.values()])),
        extra={
            "arm": arm or BASELINE, **({"x": factor, "x_name": "capacity factor"} if factor is not None else {}),
            "dropped_share": float(np.mean([m.dropped for m in by_seed.values()])),
            "tokens_without_expert_share": float(np.mean([m.lost_share for m in by_seed.values()])),
            "load_max_over_mean_all_text": first.busiest,
            **{f"bits_per_byte/{d}": float(np.mean([m.by_domain[d].bits_per_byte for m in by_seed.values()]))
               for d in first.by_domain},
        },
        **shared,
    )  # fmt: skip


def weights_hash(states: list[TrainState]) -> str:
    """12 hex digits over all parameters of all seeds' checkpoints."""
    digest = hashlib.sha256()
    for state in states:
        for leaf in jax.tree.leaves((state.params, state.router_state)):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:12]
