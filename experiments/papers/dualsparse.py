"""DualSparse-MoE (2508.18376): partition and fine-tuning, threshold dropping against its rivals, and its ablations.

Every arm of a table reads the same held-out batches. Thresholds, importance, betas and pruned experts come from
validation text alone. What a table compares stands in ``experiments.dualsparse_settings``; ``table.tables`` names those
that are made. One that is done is not made again.

Neurons are stored in the order in which training left them, so "partition" halves an expert arbitrarily, as the paper's
does. Half pairs, skipping and pruning run in the layer itself, with thresholds and betas as run-time values.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from experiments import dualsparse_settings as settings
from experiments.dualsparse_settings import METRIC, Setting
from experiments.papers.arms import Arms
from experiments.papers.capacity_aware import made_before, refuse_overflow, row_facts
from experiments.trace import in_turn
from moejax import checkpoint, importance, limits, pruning, thresholds
from moejax.config import ConfigError, ExperimentConfig, ModelConfig
from moejax.data import Batch, eval_batches, train_iterator
from moejax.evaluate import DomainScore, bits_per_byte
from moejax.loop import Run
from moejax.model import build, moe_layer_ids
from moejax.partition.complete import split_moe
from moejax.partition.reconstruct import reconstructed
from moejax.partition.stored import split_checkpoint
from moejax.results import ResultRow, append_rows
from moejax.sharding import TOKEN_AXES, put_batch, token_shards, tree_shardings
from moejax.thresholds import Rule, ScoreTable
from moejax.train import Scorer, Trainer, TrainState, score_fn, split
from moejax.types import Limit, MoEMetrics
from moejax.validate import has_experts
from moejax.verdicts import Arm, SeedDifferences, judge, judge_value

PAPER = "dualsparse"
CALIBRATION = "valid"
TUNE_RATE = 0.1
"""Peak learning rate of fine-tuning, as a share of training's."""
TUNE_SEED = 1_000
"""Added to the training seed, for the order of the data."""


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError, before any training, for tables that cannot be made."""
    if not has_experts(config.model):
        raise ConfigError("table.name='dualsparse' needs a model with experts: model.moe.first_dense leaves none")
    if config.eval.final_split == CALIBRATION:
        raise ConfigError(
            f"eval.final_split={CALIBRATION!r}: these tables calibrate on that text, so they report on another; set "
            "it to 'test'"
        )
    settings.check(config)


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
      ConfigError: a static buffer overflowed, so that pairs were lost that nothing had dropped; no calibration text.
    """
    out, states = workdir / "results.jsonl", {seed: run.best()[0] for seed, run in runs.items()}
    shards = token_shards(next(iter(runs.values())).mesh)
    shared = row_facts(PAPER, config, list(states.values()), shards, facts)
    arms = Arms(workdir, shared, say)
    models = {
        seed: Models(run, states[seed], functools.partial(arms.measured, Measured, seed)) for seed, run in runs.items()
    }
    for table in (name for name in settings.TABLES if name in config.table.tables):
        mine = made_before(out, shared)
        old = {r.row for r in mine if r.table == table}
        asked = settings.settings(table, config)
        if old and old >= {*(s.name for s in asked), *(c.name for c in settings.contrasts(table, config))}:
            say(f"table {PAPER} {table}: done before")
            continue
        say(f"table {PAPER} {table}: {len(asked)} settings on {len(models)} seed(s)")
        this = shared | {"table": table}
        append_rows(
            out, _layers(config, models, this) if table == "layers" else _rows(config, asked, models, this, say)
        )
    arms.done()


def _rows(
    config: ExperimentConfig,
    asked: list[Setting],
    models: "Mapping[int, Models]",
    shared: dict[str, Any],
    say: Callable[[str], None],
) -> list[ResultRow]:
    measured: dict[str, dict[int, Measured]] = {}
    for setting in asked:
        measured[setting.name] = by_seed = {seed: model.measure(setting) for seed, model in models.items()}
        bits, dropped, halved, rate = (_mean(by_seed, name) for name in ("mean", "dropped", "halved", "rate"))
        say(f"  {setting.name:40s} {bits:.4f} bits per byte   drop rate {rate:6.2%}: dropped {dropped:6.2%}, "
            f"halved {halved:6.2%}")  # fmt: skip
    rows = [_value_row(setting, measured[setting.name], asked[0].name, config, shared) for setting in asked]
    if shared["table"] == "1":
        rows += [_exact_row(s, measured[s.name], measured[asked[0].name], config, shared)
                 for s in asked[1:] if s.arm == asked[0].arm]  # fmt: skip
    arms = {setting.name: _arm(setting, measured[setting.name]) for setting in asked}
    for judgement in judge(settings.contrasts(shared["table"], config), arms):
        rows.append(ResultRow(**shared, **judgement.row_fields(), unit="bits per byte"))
        say(f"  {judgement.contrast.name:48s} {judgement.verdict}")
    return rows


@dataclasses.dataclass(frozen=True)
class Measured:
    """One arm on one seed."""

    by_domain: dict[str, DomainScore]
    dropped: float
    """Share of pairs that are gone."""
    halved: float
    """Share of pairs of which the major neurons are computed alone."""
    rate: float
    """Drop rate: work that is not done over routed work."""
    rate_with_shared: float
    lost_tokens: float
    """Share of tokens and layers without an expert."""
    facts: dict[str, Any]
    """What was calibrated, as JSON values."""

    @property
    def mean(self) -> float:
        return float(np.mean([score.bits_per_byte for score in self.by_domain.values()]))


# --- rows -------------------------------------------------------------------------------------------------------------


def _mean(by_seed: Mapping[int, Measured], name: str) -> float:
    return float(np.mean([getattr(m, name) for m in by_seed.values()]))


def _arm(setting: Setting, by_seed: Mapping[int, Measured]) -> Arm:
    first = next(iter(by_seed.values()))
    pieces = [(domain, nll, size) for domain, score in first.by_domain.items() for nll, size in score.per_batch]
    # What makes 2T-Drop another method than 1T-Drop is what it halves.
    share = _mean(by_seed, "halved" if setting.rule == "2T" else "dropped")
    return Arm(
        by_seed={seed: m.mean for seed, m in by_seed.items()},
        batches=[nll / np.log(2) / size for _, nll, size in pieces],
        weights=[size for _, _, size in pieces],
        strata=[domain for domain, _, _ in pieces],
        exercised_share=share if setting.rule else None,
    )


def _value_row(
    setting: Setting, by_seed: Mapping[int, Measured], baseline: str, config: ExperimentConfig, shared: dict
) -> ResultRow:
    values, first = [m.mean for m in by_seed.values()], next(iter(by_seed.values()))
    interval = SeedDifferences(values).interval() if len(values) >= 3 else None
    theirs = settings.PUBLISHED_METRIC.get(shared["table"], "")
    theirs = theirs.format(settings.NAMES.get(settings.published_model(config), ""))
    calibrated = {"rate_asked": setting.rate, "gap": setting.gap, "spread": setting.spread} if setting.rule else {}
    at = [m.facts["threshold"] for m in by_seed.values() if "threshold" in m.facts]
    return ResultRow(
        kind="value", row=setting.name, metric=METRIC, unit="bits per byte", value=float(np.mean(values)),
        values_by_seed={seed: m.mean for seed, m in by_seed.items()},
        interval=interval, interval_kind="95 %, t over seeds" if interval else "",
        baseline_row="" if setting.name == baseline else baseline,
        published=setting.published, published_metric=theirs if setting.published is not None else "",
        exercised_share=min(_mean(by_seed, "dropped") + _mean(by_seed, "halved"), 1.0),
        extra={
            "arm": setting.arm, "model": setting.model, **calibrated,
            **({"x": _mean(by_seed, "rate"), "x_name": "drop rate, share of routed work"} if setting.plotted else {}),
            **({"threshold_mean": float(np.mean(at))} if at else {}),
            "dropped_share": _mean(by_seed, "dropped"), "halved_share": _mean(by_seed, "halved"),
            "drop_rate": _mean(by_seed, "rate"), "drop_rate_with_shared_experts": _mean(by_seed, "rate_with_shared"),
            "tokens_without_expert_share": _mean(by_seed, "lost_tokens"),
            "calibrated": {str(seed): m.facts for seed, m in by_seed.items() if m.facts},
            **{f"bits_per_byte/{d}": float(np.mean([m.by_domain[d].bits_per_byte for m in by_seed.values()]))
               for d in first.by_domain},
        },
        **shared,
    )  # fmt: skip


def _exact_row(
    setting: Setting,
    split: Mapping[int, Measured],
    whole: Mapping[int, Measured],
    config: ExperimentConfig,
    shared: dict,
) -> ResultRow:
    """The largest change of a batch by a transformation that changes none: a fact without a scale."""
    largest = max(
        abs(a - b) / np.log(2) / size
        for seed in split
        for domain, score in split[seed].by_domain.items()
        for (a, size), (b, _) in zip(score.per_batch, whole[seed].by_domain[domain].per_batch, strict=True)
        if size
    )
    tolerance = settings.EXACT[config.model.compute_dtype]
    verdict, note = judge_value(float(largest), 0.0, same_setting=True, tolerance=tolerance)
    return ResultRow(
        kind="value", row=f"exactness, {setting.name.removeprefix('no training, ')}", metric="largest_change",
        unit="bits per byte", value=float(largest), published=0.0, published_metric="exact by construction",
        verdict=verdict, verdict_note=note, **shared,
    )  # fmt: skip


def _layers(config: ExperimentConfig, models: "Mapping[int, Models]", shared: dict) -> list[ResultRow]:
    """Drop rate over one threshold by layer (the paper's Figure 12), by the recorded scores of calibration text."""
    layers, k = moe_layer_ids(config.model), config.model.moe.router.k
    tables = {seed: model.scores("base") for seed, model in models.items()}
    rule, rows = Rule(None), []
    for step in range(settings.LAYERS_STEPS * k):
        at = step / (settings.LAYERS_STEPS * k)
        rates = {seed: (*table.rates(at, rule), table.rate(at, rule)) for seed, table in tables.items()}
        for i, name in enumerate([*(f"layer {n}" for n in layers), "all layers"]):
            by_seed = {seed: float(values[i]) for seed, values in rates.items()}
            row = ResultRow(
                kind="value", row=f"{name}, T={at:.5g}", metric="drop_rate", unit="share of routed work",
                value=float(np.mean(list(by_seed.values()))), values_by_seed=by_seed,
                extra={"arm": name, "x": at, "x_name": "threshold"}, **shared,
            )  # fmt: skip
            rows.append(row)
        if rows[-1].value is not None and rows[-1].value >= 0.95:
            break
    return rows


Kept = Callable[[Sequence[Setting], Callable[[Setting], Measured]], list[Measured]]


def _nameless(setting: Setting) -> Setting:
    """What is measured, whatever it is called."""
    return dataclasses.replace(setting, name="", arm="", published=None, plotted=False)


# --- models -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model that was made of a run's."""

    model: ModelConfig
    params: nnx.State
    router_state: nnx.State
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Models:
    """The model of one training seed and those that are made of it, with what calibration text says of each."""

    def __init__(self, run: Run, state: TrainState, kept: Kept | None = None) -> None:
        """``kept(settings, measure)`` is what an earlier call measured of the settings, or what ``measure`` gives."""
        self.run, self.config = run, run.config
        self._kept = kept or (lambda together, measure: [measure(setting) for setting in together])
        self.base = Variant(run.config.model, state.params, state.router_state)
        self._programs: dict[tuple[str, ModelConfig], Callable] = {}
        self._made: dict[str, Variant] = {}
        self._scores: dict[str, ScoreTable] = {}
        self._measured: dict[Setting, Measured] = {}
        self._importance: importance.Importance | None = None

    def variant(self, key: str) -> Variant:
        """The model that :attr:`~experiments.dualsparse_settings.Setting.model` names. Two are held beside the base."""
        kind, _, value = key.partition(":")
        if key == "base" or (kind, value) == ("parts", "1"):
            return self.base
        if key not in self._made:
            while len(self._made) > 1:
                del self._made[next(iter(self._made))]
            self._made[key] = _MAKERS[kind](self, value)
        return self._made[key]

    def arrays(self) -> dict[str, np.ndarray]:
        """Of the base, by path, in host memory."""
        flat = checkpoint.flatten({"params": self.base.params, "router_state": self.base.router_state})
        return {name: np.asarray(leaf) for name, leaf in flat.items()}

    def placed(self, model: ModelConfig, arrays: Mapping[str, Any], **facts: Any) -> Variant:
        """Arrays by path on the run's devices, as a model of this config."""
        _, *like = split(jax.eval_shape(lambda: build(model)))
        tree = dict(zip(("params", "router_state"), like, strict=True))
        filled = jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in checkpoint.flatten(tree)])
        on = jax.device_put(filled, tree_shardings(tree, self.run.mesh))
        return Variant(model, on["params"], on["router_state"], facts)

    def ordered(self, metric: str) -> Variant:
        """Neurons in order of importance."""
        if self._importance is None:
            model = nnx.merge(split(jax.eval_shape(lambda: build(self.base.model)))[0], self.base.params,
                              self.base.router_state)  # fmt: skip
            self._importance = importance.measure(model, self.text(), self.run.mesh)
        orders = importance.by_store(self.base.model, self._importance.orders()[metric])
        return self.placed(self.base.model, reconstructed(self.arrays(), orders)[0])

    def in_parts(self, parts: int) -> Variant:
        """The complete transformation."""
        moe = self.base.model.moe
        model = dataclasses.replace(self.base.model, moe=split_moe(moe, parts, "complete"))
        return self.placed(model, split_checkpoint(dict(self.arrays()), moe, parts, "complete"))

    def tuned(self, parts: int) -> Variant:
        """Split, then trained for ``table.tune_steps`` more steps: the same batches for every number of parts."""
        begin = self.base if parts == 1 else self.in_parts(parts)
        train, steps = self.config.train, self.config.table.tune_steps
        train = dataclasses.replace(
            train, steps=steps, learning_rate=TUNE_RATE * train.learning_rate, warmup_steps=steps // 10
        )
        trainer = Trainer(
            dataclasses.replace(self.config, model=begin.model, train=train), np.asarray(self.run.trainer.byte_lengths),
            self.run.mesh,
        )  # fmt: skip
        fresh = trainer.init()
        # The step takes the memory of its state: copies, as the base is used again.
        params, router_state = jax.tree.map(jnp.copy, (begin.params, begin.router_state))
        state = dataclasses.replace(fresh, params=params, router_state=router_state)
        data = train_iterator(self.run.corpus, batch_size=train.batch_size, seed=train.seed + TUNE_SEED)
        loss = []
        for _ in range(steps):
            state, result = trainer.step(state, self._micro_batches(next(data)))
            loss.append(result.ce)
        ends = [float(value) for value in (np.mean(loss[:10]), np.mean(loss[-10:]))]
        return Variant(begin.model, state.params, state.router_state, {"training_loss_first_and_last_10_steps": ends})

    def _micro_batches(self, batch: Batch) -> dict[str, jax.Array]:
        on = NamedSharding(self.run.mesh, PartitionSpec(None, TOKEN_AXES))
        shape = (self.config.train.accumulate, -1, self.config.data.seq_len)
        keys = ("tokens", "targets", "positions", "segment_ids", "mask")
        return {key: jax.device_put(batch[key].reshape(shape), on) for key in keys}

    def kept(self, number: int) -> Variant:
        """Efficient Expert Pruning by enumeration."""
        base = self.base
        definition = split(jax.eval_shape(lambda: build(base.model)))[0]
        choice = pruning.choose(
            definition, base.params, base.router_state, self.text(), number, self.run.mesh, self.put
        )  # fmt: skip
        arrays, model = pruning.pruned(self.arrays(), base.model, choice.kept)
        return self.placed(model, arrays, kept=choice.kept.tolist(), output_error=choice.error.tolist())

    def top(self, k: int) -> Variant:
        """Fewer experts for each token."""
        moe = self.base.model.moe
        moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, k=k))
        return dataclasses.replace(self.base, model=dataclasses.replace(self.base.model, moe=moe))

    # --- calibration ------------------------------------------------------------------------------

    def text(self) -> Iterator[Batch]:
        """Calibration text: a batch of each domain in turn."""
        table, corpus = self.config.table, self.run.corpus
        domains = [domain for domain in corpus.domains if CALIBRATION in corpus.splits(domain)]
        return in_turn([
            eval_batches(corpus, domain, CALIBRATION, batch_size=table.batch_size, max_tokens=table.max_tokens)
            for domain in domains
        ])  # fmt: skip

    def put(self, batch: dict) -> dict:
        return put_batch(batch, self.run.mesh)

    def scores(self, key: str, in_force: tuple[Limit, ...] = ()) -> ScoreTable:
        """Normalised scores, layer by layer. A model with its neurons in another order has those of the base."""
        known = "base" if key.startswith("order:") else key
        if not in_force and known in self._scores:
            return self._scores[known]
        v = self.variant(key)
        collect = self._program("collect", v.model)
        made = thresholds.collect(collect, v.params, v.router_state, self.text(), self.put, in_force=in_force)
        return made if in_force else self._scores.setdefault(known, made)

    def limits_of(self, setting: Setting) -> tuple[tuple[Limit, ...], dict[str, Any]]:
        """What a setting puts in force on its model, and the numbers that were found for it."""
        if setting.rule == "best":
            return (limits.skip_second(1.0),), {}
        if setting.rule == "EES":
            betas = self.betas(setting.model)
            return (limits.skip_second(betas),), {"beta": list(betas)}
        if not setting.rule:
            return (), {}
        rule = Rule(
            setting.gap if setting.rule == "2T" else None, expert_dim=self.variant(setting.model).model.moe.expert_dim
        )
        found = thresholds.solve(self.scores(setting.model), setting.rate, rule, setting.spread)
        # Later layers read what the limit leaves: a second pass with it in force brings the rate nearer.
        found = thresholds.solve(self.scores(setting.model, rule.limit(found)), setting.rate, rule, setting.spread)
        return rule.limit(found), {"limit": rule.text(found), "threshold": float(np.mean(found))}

    def betas(self, key: str) -> tuple[float, ...]:
        """Median over calibration text of a pair's score over its token's best, for each layer."""
        v, ratios = self.variant(key), []
        run = self._program("ratios", v.model)
        for batch in self.text():
            given = self.put({name: batch[name] for name in ("tokens", "positions", "segment_ids", "mask")})
            ratio, skippable = jax.device_get(run(v.params, v.router_state, given))
            ratios.append([row[mask] for row, mask in zip(ratio, skippable, strict=True)])
        return tuple(float(np.median(np.concatenate(layer))) for layer in zip(*ratios, strict=True))

    def _program(self, kind: str, model: ModelConfig) -> Callable:
        if (kind, model) not in self._programs:
            definition = split(jax.eval_shape(lambda: build(model)))[0]
            maker = {"score": score_fn, "collect": thresholds.collect_fn, "ratios": ratios_fn}[kind]
            self._programs[kind, model] = maker(definition, self.run.mesh)
        return self._programs[kind, model]

    # --- measurement ------------------------------------------------------------------------------

    def measure(self, setting: Setting) -> Measured:
        """Held-out bits per byte of every domain, and what the layers did."""
        same = _nameless(setting)
        if same not in self._measured:
            together = self._together(same)
            self._measured |= zip(together, self._kept(together, self._measure), strict=True)
        return self._measured[same]

    def _together(self, setting: Setting) -> tuple[Setting, ...]:
        """What is measured with a setting: all of one fine-tuned model, as another fine-tuning may end elsewhere."""
        if not setting.model.startswith("tuned:"):
            return (setting,)
        all_of_it = [_nameless(s) for s in settings.settings("1", self.config) if s.model == setting.model]
        return tuple(dict.fromkeys([setting, *all_of_it]))

    def _measure(self, setting: Setting) -> Measured:
        in_force, facts = self.limits_of(setting)
        v, corpus, table = self.variant(setting.model), self.run.corpus, self.config.table
        scorer = Scorer(self._program("score", v.model), v.params, v.router_state, self.put, limits=in_force)
        text = self.config.eval.final_split
        by_domain = {
            domain: bits_per_byte(
                scorer,
                eval_batches(corpus, domain, text, batch_size=table.batch_size, max_tokens=table.max_tokens),
                corpus.tokenizer,
            )
            for domain in corpus.domains
            if text in corpus.splits(domain)
        }
        assert scorer.metrics is not None  # a model without experts was refused
        return _measured(by_domain, jax.device_get(scorer.metrics), v.model, self.base.model, v.facts | facts)


_MAKERS: dict[str, Callable[[Models, str], Variant]] = {
    "order": lambda models, metric: models.ordered(metric),
    "parts": lambda models, parts: models.in_parts(int(parts)),
    "tuned": lambda models, parts: models.tuned(int(parts)),
    "kept": lambda models, number: models.kept(int(number)),
    "top": lambda models, k: models.top(int(k)),
}


def ratios_fn(definition: nnx.GraphDef, mesh: jax.sharding.Mesh) -> Callable:
    """A compiled ``(params, router_state, batch) ->`` :func:`moejax.limits.score_ratios` of each layer ``[L, T K]``."""

    @jax.jit
    def run(params: nnx.State, router_state: nnx.State, batch: dict) -> Any:
        out = nnx.merge(definition, params, router_state)(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], mask=batch["mask"],
            limits=(), record=True,
        )  # fmt: skip
        found = jax.vmap(jax.vmap(limits.score_ratios))(out.routing.made)
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1), found)

    def ratios(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return run(*arguments)

    return ratios


def _measured(
    by_domain: dict[str, DomainScore],
    metrics: MoEMetrics,
    model: ModelConfig,
    base: ModelConfig,
    facts: dict[str, Any],
) -> Measured:
    refuse_overflow(float(np.sum(metrics.overflow)))
    pairs, tokens = float(np.sum(metrics.routed)), float(np.sum(metrics.tokens))
    skipped = 0.0 if metrics.skipped is None else float(np.sum(metrics.skipped))
    dropped, part = float(np.sum(metrics.dropped)), Rule(0.0, expert_dim=model.moe.expert_dim).skip
    # Work is counted against the model as it was trained: its experts per token, each of its width.
    whole = pairs * base.moe.router.k / model.moe.router.k * base.moe.expert_dim
    rate = 1 - (pairs - dropped - skipped) * model.moe.expert_dim / whole
    return Measured(
        by_domain=by_domain, dropped=dropped / pairs, halved=skipped / part / pairs, rate=rate,
        rate_with_shared=thresholds.with_shared(rate, base.moe.router.k, base.moe),
        lost_tokens=float(np.sum(metrics.lost_tokens)) / tokens, facts=facts,
    )  # fmt: skip
