"""Capacity-Aware Inference (2503.05066): Tables 1 to 3, the factor sweep, and quality at equal latency.

Every arm reads the same held-out batches with the same weights; only the limit differs. Limits act within one batch of
``table.batch_size`` sequences, padding excluded, so the batch shape is part of each row. What a table compares stands
in ``experiments.capacity_settings``; ``table.tables`` names those that are made. One that is done is not made again.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import capacity_settings as settings
from experiments.capacity_settings import BASELINE, METRIC, Curve, Setting
from experiments.papers.arms import Arms
from moejax.config import ConfigError, ExperimentConfig, config_hash
from moejax.data import TOKEN_CLASSES, eval_batches
from moejax.evaluate import DomainScore, bits_per_byte
from moejax.loop import Run
from moejax.metrics import load_summary
from moejax.model import build
from moejax.results import ResultRow, append_rows, read_rows
from moejax.sharding import token_shards
from moejax.train import TrainState, score_fn, split
from moejax.types import MoEMetrics
from moejax.validate import has_experts
from moejax.verdicts import Arm, SeedDifferences, judge

PAPER = "capacity_aware"
PUBLISHED_METRIC = "average accuracy of 8 tasks, OLMoE-1B-7B (%)"


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError, before any training, for tables, arms or factors that cannot be made."""
    settings.check(config)
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

    Tables that were made before with the same config and weights are kept, not made again; a table that was stopped
    goes on with the next arm.

    Raises:
      ConfigError: a static buffer overflowed, so that pairs were lost that no limit had dropped.
    """
    out, states = workdir / "results.jsonl", {seed: run.best()[0] for seed, run in runs.items()}
    shards = token_shards(next(iter(runs.values())).mesh)
    shared = row_facts(PAPER, config, list(states.values()), shards, facts)
    arms = Arms(workdir, shared, say)
    scoring = _Scoring(runs, states, arms)
    ranks = settings.ranks_of(config, shards)
    for table in (name for name in settings.TABLES if name in config.table.tables):
        mine = made_before(out, shared)
        old = {r.row for r in mine if r.table == table}
        asked = settings.settings(table, config, ranks, curves_of([r for r in mine if r.table == "sweep"]))
        if old >= {*(s.name for s in asked), *(c.name for c in settings.contrasts(table, config))}:
            say(f"table {PAPER} {table}: done before")
            continue
        rows = _make_one(table, config, asked, scoring, shared | {"table": table}, say)
        if table == "latency":
            rows += [by_latency(r) for r in mine if r.table == "sweep" and r.extra.get("x", 0) >= PLOTTED]
        append_rows(out, rows)
    arms.done()


def row_facts(
    paper: str, config: ExperimentConfig, states: list[TrainState], shards: int, facts: dict[str, Any]
) -> dict[str, Any]:
    """What all rows of a paper's tables say of where they come from. A limit acts on each device's own tokens, so the
    batch is that of one of the ``shards``."""
    return {
        "paper": paper, "scale": config.scale, "config": config.name, "config_hash": config_hash(config),
        "checkpoint_hash": weights_hash(states), "data_hash": facts["data"]["hash"],
        "batch_shape": (config.table.batch_size // shards, config.data.seq_len),
        **{k: facts[k] for k in ("command", "commit", "dirty", "device", "device_count", "versions")},
    }  # fmt: skip


def made_before(out: Path, shared: dict[str, Any]) -> list[ResultRow]:
    """The rows in ``out`` of the same paper, config and weights."""
    same = ("paper", "config_hash", "checkpoint_hash")
    return [row for row in read_rows(out) if all(getattr(row, k) == shared[k] for k in same)]


def _make_one(
    table: str,
    config: ExperimentConfig,
    asked: list[Setting],
    scoring: "_Scoring",
    shared: dict[str, Any],
    say: Callable[[str], None],
) -> list[ResultRow]:
    ranks = asked[0].ranks
    on = f", {ranks} virtual ranks" if ranks > 1 else ""
    say(f"table {PAPER} {table}: {len(asked) - 1} settings on {len(scoring.runs)} seed(s){on}")
    measured: dict[str, dict[int, _Measured]] = {}
    for setting in asked:
        measured[setting.name] = by_seed = {seed: scoring.measure(seed, setting) for seed in scoring.runs}
        first = next(iter(by_seed.values()))
        say(f"  {setting.name:24s} {np.mean([m.mean for m in by_seed.values()]):.4f} bits per byte   "
            f"dropped {first.dropped:6.2%}   load over all text, max/mean {first.busiest:.2f}"
            + ("" if table == "1" else f"   added {first.added:6.2%}   busiest rank {first.critical:,.0f} rows")
            )  # fmt: skip
    whole = np.mean([m.critical for m in measured[BASELINE].values()])
    rows = [_value_row(setting, measured[setting.name], config, float(whole), shared) for setting in asked]
    for judgement in judge(settings.contrasts(table, config), {n: _arm(by_seed) for n, by_seed in measured.items()}):
        rows.append(ResultRow(**shared, **judgement.row_fields(), unit="bits per byte"))
        say(f"  {judgement.contrast.name:38s} {judgement.verdict}")
    return rows


PLOTTED = 0.5
"""Lowest factor of the sweep that stands in the plot over latency: below it quality falls off the scale."""


def by_latency(row: ResultRow) -> ResultRow:
    """A row of the sweep as a point of the table "latency": the same measurement over another axis."""
    x = {"x": row.extra["latency"], "x_name": settings.LATENCY}
    return dataclasses.replace(row, table="latency", extra=row.extra | x)


def curves_of(rows: list[ResultRow]) -> dict[str, Curve]:
    """What the sweep's rows say of each arm, by factor."""
    found: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in settings.ARMS}
    for row in rows:
        if row.kind == "value" and row.extra["arm"] in found:
            point = (row.extra["x"], row.extra["dropped_share"], row.extra["latency"])
            found[row.extra["arm"]].append(point)
    empty = Curve((0.0, 1.0), (1.0, 0.0), (0.0, 1.0))  # before the sweep: names of rows are asked, not their factors
    return {
        arm: Curve(*map(tuple, zip(*sorted(points), strict=True))) if points else empty for arm, points in found.items()
    }


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One arm on one seed."""

    by_domain: dict[str, DomainScore]
    critical: float
    """Rows of the busiest rank, summed over batches and layers."""
    dropped: float
    """Share of pairs."""
    added: float
    """Pairs that an expanded limit added, as a share of those routed."""
    busiest: float
    """Load of the busiest expert over the mean, over all text, of the layer where it is largest."""
    lost_share: float
    """Share of tokens without an expert, mean over layers."""

    @property
    def mean(self) -> float:
        return float(np.mean([score.bits_per_byte for score in self.by_domain.values()]))


def refuse_overflow(pairs: float) -> None:
    """Raises ConfigError if pairs were lost that nothing had dropped."""
    if pairs:
        raise ConfigError(
            f"{pairs:.0f} pairs overflowed a static buffer: such a row is not published. Choose another "
            "config.model.moe.implementation."
        )


def _measured(by_domain: dict[str, DomainScore], metrics: MoEMetrics, critical: float) -> _Measured:
    load, m = load_summary(metrics), jax.device_get(metrics)
    refuse_overflow(sum(load["overflow"]))
    dropped, added = (float(v.sum() / m.routed.sum()) for v in (m.dropped, m.added))
    lost = float(np.mean(load["lost_share"]))
    return _Measured(by_domain, critical, dropped, added, max(load["max_over_mean"]), lost)


class _Scoring:
    """The models of all seeds, under limits, on virtual ranks, with fewer experts per token."""

    def __init__(self, runs: dict[int, Run], states: dict[int, TrainState], arms: Arms) -> None:
        self.runs, self.states, self.arms = runs, states, arms
        self._programs: dict[tuple[int, int], Callable] = {}
        self._made: dict[tuple, _Measured] = {}

    def measure(self, seed: int, setting: Setting) -> _Measured:
        """Held-out bits per byte of every domain, and what the layers did."""
        again = (seed, setting.name, setting.ranks) if setting.name == BASELINE else None
        if again not in self._made:
            (made,) = self.arms.measured(_Measured, seed, [setting], functools.partial(self._measure, seed))
            if again is None:
                return made
            self._made[again] = made
        return self._made[again]

    def _measure(self, seed: int, setting: Setting) -> _Measured:
        run, config = self.runs[seed], self.runs[seed].config
        scorer = run.scorer(self.states[seed], limits=setting.limits)
        critical = 0.0
        if setting.ranks > 1 or setting.k:
            key = (setting.ranks, setting.k)
            scorer.run = self._programs.get(key) or self._programs.setdefault(key, self._program(run, *key))
        program = scorer.run

        def counted(*arguments: Any) -> tuple:
            nonlocal critical
            result = program(*arguments)
            rows = np.asarray(result[2].computed, np.float64)  # [L, E]
            critical += rows.reshape(rows.shape[0], setting.ranks, -1).sum(axis=2).max(axis=1).sum()
            return result

        scorer.run = counted
        text = config.eval.final_split
        by_domain = {
            domain: bits_per_byte(
                scorer,
                eval_batches(
                    run.corpus,
                    domain,
                    text,
                    batch_size=config.table.batch_size,
                    max_tokens=config.table.max_tokens,
                ),
                run.corpus.tokenizer,
            )
            for domain in run.corpus.domains
            if text in run.corpus.splits(domain)
        }
        if scorer.metrics is None:
            raise ConfigError("table.name='capacity_aware' needs a model with experts: set model.moe")
        return _measured(by_domain, scorer.metrics, critical)

    @staticmethod
    def _program(run: Run, ranks: int, k: int) -> Callable:
        moe = run.config.model.moe
        router = dataclasses.replace(moe.router, k=k or moe.router.k)
        model = dataclasses.replace(
            run.config.model, moe=dataclasses.replace(moe, virtual_ranks=ranks, router=router)
        )  # fmt: skip
        graphdef, *_ = split(jax.eval_shape(lambda: build(model)))
        return score_fn(graphdef, run.mesh, len(TOKEN_CLASSES))


def _arm(by_seed: Mapping[int, _Measured]) -> Arm:
    first = next(iter(by_seed.values()))
    pieces = [(domain, nll, size) for domain, s in first.by_domain.items() for nll, size in s.per_batch]
    share = float(np.mean([m.dropped + m.added for m in by_seed.values()]))
    return Arm(
        by_seed={seed: m.mean for seed, m in by_seed.items()},
        batches=[nll / np.log(2) / size for _, nll, size in pieces],
        weights=[size for _, _, size in pieces],
        strata=[domain for domain, _, _ in pieces],
        exercised_share=min(share, 1.0) if share > 0 else None,
    )


def _value_row(
    setting: Setting, by_seed: Mapping[int, _Measured], config: ExperimentConfig, whole: float, shared: dict
) -> ResultRow:
    values = [m.mean for m in by_seed.values()]
    interval = SeedDifferences(values).interval() if len(values) >= 3 else None
    first, table, published = next(iter(by_seed.values())), shared["table"], setting.published
    dropped, added, lost, critical = (
        float(np.mean([getattr(m, name) for m in by_seed.values()]))
        for name in ("dropped", "added", "lost_share", "critical")
    )
    theirs = PUBLISHED_METRIC
    if table != "1":
        theirs = settings.PUBLISHED_METRIC.get(table, "").format(settings.published_model(config))
    x, x_name = (setting.factor, "capacity factor") if table != "latency" else (critical / whole, settings.LATENCY)
    plotted = x is not None and setting.name != BASELINE and table in ("1", "sweep", "latency")
    return ResultRow(
        kind="value", row=setting.name, metric=METRIC, unit="bits per byte", value=float(np.mean(values)),
        values_by_seed={seed: m.mean for seed, m in by_seed.items()},
        interval=interval, interval_kind="95 %, t over seeds" if interval else "",
        baseline_row="" if setting.name == BASELINE else BASELINE,
        published=published, published_metric=theirs if published is not None else "",
        exercised_share=min(dropped + added, 1.0),
        extra={
            "arm": setting.arm, **({"x": x, "x_name": x_name} if plotted else {}),
            "dropped_share": dropped,
            "tokens_without_expert_share": lost,
            "load_max_over_mean_all_text": first.busiest,
            **({} if table == "1" else {"added_share": added, "latency": critical / whole, "ranks": setting.ranks,
                                        "factor_used": setting.factor}),
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
