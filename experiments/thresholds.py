"""From a target to the thresholds of DualSparse-MoE's dropping (2508.18376), and to a checkpoint that has them.

    python -m experiments.thresholds --checkpoint=runs/ca --drop_rate=0.25 --output=runs/ca_fast
    python -m experiments.thresholds --checkpoint=runs/ca --quality=0.005 --output=runs/ca_fast
    python -m experiments.thresholds --checkpoint=runs/ca --threshold=0.08 [--one_threshold | --gap=0.01]
    python -m experiments.thresholds --checkpoint=runs/ca --curve=rows.jsonl

``--drop_rate`` is a share of the routed experts' work; ``--quality`` a loss in bits per byte of calibration text, for
which as much as possible is dropped; ``--threshold`` one threshold, to see what it drops. Thresholds are found on
calibration text, the validation split unless ``--split=train``; ``--quality`` is checked once on held-out text
(``eval.final_split``), which takes no part in the search.

``--output`` is a workdir that every command takes as ``--checkpoint``: a config with the limit, ``thresholds.json``
with what was found and measured, and a reference to the weights, which must stay where they are
(``docs/dualsparse.md``).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from absl import flags

from experiments import calibration, session
from experiments.calibration import Calibration, Scored
from experiments.generate import check_tokenizer
from experiments.trace import chosen_domains, mesh_of
from moejax import importers, limits, pretrained, routing, thresholds, validate
from moejax.config import ConfigError, ExperimentConfig, MoEConfig, TableConfig, config_hash, to_dict
from moejax.data import load_corpus
from moejax.importers.writing import new_folder
from moejax.model import moe_layer_ids
from moejax.moe import shared_width
from moejax.results import ResultRow, append_rows, environment_facts, read_rows, write_atomically
from moejax.thresholds import Rule, ScoreTable
from moejax.types import Limit, MoEMetrics

NAME = "thresholds.json"
CURVE_STEPS = 16
"""Thresholds of a curve in each 1/k, the share of an expert whose token has even scores."""
CURVE_END = 0.95
"""Drop rate, over all layers, at which a curve ends."""
FAR = 0.005
"""Drop rates further than this from what was asked for are pointed out."""


# --- what was found -------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """Thresholds and what is known of them, as ``thresholds.json`` tells it."""

    rule: Rule
    thresholds: np.ndarray
    layers: list[int]
    facts: dict[str, Any]

    @property
    def text(self) -> str:
        return self.rule.text(self.thresholds)

    def add_rates(self, table: ScoreTable, config: ExperimentConfig, metrics: MoEMetrics | None) -> None:
        """Rates on the recorded scores, and those that an evaluation with the limit counted."""
        moe, per_token = config.model.moe, float(table.routed.sum() / max(table.tokens, 1) / table.layers)
        rate = table.rate(self.thresholds, self.rule)
        self.facts |= {
            "drop_rate": rate,
            "drop_rate_with_shared_experts": thresholds.with_shared(rate, per_token, moe),
            "drop_rate_by_layer": dict(zip(self.layers, table.rates(self.thresholds, self.rule).tolist(), strict=True)),
            "lost_gate_weight": table.lost_weight(self.thresholds, self.rule),
        }
        if metrics is not None:
            counted, whole = thresholds.drop_rates(metrics), drop_rate(metrics)
            self.facts |= {
                "drop_rate_in_force": whole,
                "drop_rate_in_force_with_shared_experts": thresholds.with_shared(whole, per_token, moe),
                "drop_rate_in_force_by_layer": dict(zip(self.layers, counted.tolist(), strict=True)),
                "tokens_without_expert": float(np.sum(metrics.lost_tokens) / max(np.sum(metrics.tokens), 1)),
            }

    def lines(self, moe: MoEConfig) -> list[str]:
        """For people."""
        facts, gap = self.facts, self.rule.gap
        measured = facts.get("drop_rate_in_force_by_layer")
        head = f"{'layer':>6s} {'threshold':>11s}" + (f" {'major/minor':>17s}" if gap is not None else "")
        lines = [head + f" {'drop rate':>10s}" + (f" {'in force':>10s}" if measured else "")]
        for layer, at in zip(self.layers, self.thresholds.tolist(), strict=True):
            pair = f"{max(at - gap, 0):.4f}/{at + gap:.4f}" if gap is not None and at else "-"
            middle = f" {pair:>17s}" if gap is not None else ""
            last = f" {measured[layer]:10.2%}" if measured else ""
            lines.append(f"{layer:6d} {at:11.5f}{middle} {facts['drop_rate_by_layer'][layer]:10.2%}{last}")
        blank = " " * (12 + (18 if gap is not None else 0))
        totals = {"total": "", "shared": "_with_shared_experts"} if shared_width(moe) else {"total": ""}
        for name, key in totals.items():
            last = f" {facts['drop_rate_in_force' + key]:10.2%}" if measured else ""
            lines.append(f"{name:>6s}{blank} {facts['drop_rate' + key]:10.2%}{last}")
        lines.append(
            "drop rate: share of routed work, by the recorded scores"
            + ("; in force: as evaluation counted it" if measured else "")
            + ("; shared: share of the work of routed and shared experts" if shared_width(moe) else "")
        )
        return lines


def warnings(found: Found, table: ScoreTable, config: ExperimentConfig, rate: float | None, spread: str) -> list[str]:
    """What a user should know of thresholds before using them."""
    k, rows_are_tokens = config.model.moe.router.k, routing.FAMILIES[config.model.moe.router.name].causal
    said = []
    layers = [found.layers[i] for i in thresholds.risky(found.thresholds, found.rule, k) if rows_are_tokens]
    if layers:
        lost = found.facts.get("tokens_without_expert")
        said.append(
            f"in layers {layers} pairs go whole up to 1/k = {1 / k:.4g} of a token's score or above: a token may lose "
            "all its experts" + ("" if lost is None else f" (of tokens and layers, {lost:.2%} do)")
        )
    if rate is None:
        return said
    made = table.rates(found.thresholds, found.rule) if spread == "layer" else [found.facts["drop_rate"]]
    far = [i for i, value in enumerate(made) if abs(value - rate) > FAR]
    if far:
        where = f"layers {[found.layers[i] for i in far]}" if spread == "layer" else "total"
        said.append(
            f"{where}: no threshold of this form drops {rate:.2%}: many pairs have one score, or the gap alone halves "
            "more; the nearest is taken"
        )
    elif abs((counted := found.facts.get("drop_rate_in_force", rate)) - rate) > FAR:
        said.append(
            f"in force {counted:.2%} are dropped, not {rate:.2%}: later layers have other scores where earlier ones "
            "drop (--rounds brings the two together for --drop_rate)"
        )
    return said


def curve_rows(
    table: ScoreTable, rule: Rule, config: ExperimentConfig, layers: list[int], shared: dict[str, Any]
) -> list[ResultRow]:
    """Drop rate over one threshold, by layer and in total (the paper's Figure 12)."""
    step, rows = 1 / (CURVE_STEPS * config.model.moe.router.k), []
    name = "1T" if rule.gap is None else f"2T, gap {rule.gap:g}"
    for i in range(int(1 / step)):
        at = i * step
        for arm, value in [
            *((f"layer {n}", r) for n, r in zip(layers, table.rates(at, rule), strict=True)),
            ("total", table.rate(at, rule)),
        ]:
            rows.append(ResultRow(
                kind="value", paper="dualsparse", table="layers", row=f"{name}, {arm}, T={at:.5g}", metric="drop_rate",
                unit="share of routed work", value=float(value),
                extra={"arm": f"{name}, {arm}", "x": at, "x_name": "threshold", "calibration_tokens": table.tokens},
                **shared,
            ))  # fmt: skip
        if rows[-1].value is not None and rows[-1].value >= CURVE_END:
            break
    return rows


# --- the folder -----------------------------------------------------------------------------------


def limited(config: ExperimentConfig, origin: dict[str, Any], text: str) -> ExperimentConfig:
    """The config of a workdir that stands for the weights of ``origin`` with one limit in force."""
    moe = dataclasses.replace(config.model.moe, capacity_factor=0.0, capacity_limits=(text,))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, moe=moe),
        model_from="config",
        init_from=origin["folder"],
        train=dataclasses.replace(config.train, steps=0),
        table=TableConfig(),
    )


def write_folder(output: Path, config: ExperimentConfig, found: Found, origin: dict[str, Any]) -> None:
    """Writes the workdir whole, or nothing.

    Raises:
      ConfigError: something is there by now, or nothing can be made there.
    """
    env = {"command": session.command_line(), **environment_facts(), "config_hash": config_hash(config)}
    files = {"config.json": to_dict(config), "env.json": env | {"init_from": origin}, NAME: found.facts}
    with new_folder(output) as folder:
        for name, value in files.items():
            write_atomically(folder / name, json.dumps(value, indent=1, sort_keys=True) + "\n")


# --- command --------------------------------------------------------------------------------------


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    add: dict[str, Any] = {"flag_values": values}
    session.define_checkpoint_flag(values)
    flags.DEFINE_float("drop_rate", None, "Share of the routed work to drop; half pairs count half.", 0.0, 1.0, **add)
    flags.DEFINE_float("quality", None, "Largest loss in bits per byte of calibration text.", 0.0, **add)
    flags.DEFINE_float("threshold", None, "One threshold for all layers, to see what it drops.", **add)
    flags.DEFINE_float("gap", 0.01, "2T-Drop: half the distance between its two thresholds.", 0.0, **add)
    flags.DEFINE_bool("one_threshold", False, "1T-Drop: pairs are computed whole or not at all.", **add)
    flags.DEFINE_integer("major", 0, "2T-Drop: leading neurons of a half pair; 0: half of them.", 0, **add)
    flags.DEFINE_enum(
        "spread", "layer", list(get_args(thresholds.Spread)),
        "layer: each layer drops the rate. global: one threshold. weight: the rate in total, least gate weight lost.",
        **add,
    )  # fmt: skip
    flags.DEFINE_string("output", None, "Folder to make: the checkpoint with these thresholds.", **add)
    flags.DEFINE_bool("replace", False, "In place of limits that the checkpoint's config has.", **add)
    flags.DEFINE_string("curve", None, "File for results rows: drop rate over threshold by layer.", **add)
    calibration.define_flags(values, argv)
    flags.DEFINE_integer(
        "rounds", 2, "Passes for --drop_rate; from the second on with the thresholds of the one before in force.", 1,
        **add,
    )  # fmt: skip
    flags.DEFINE_float("resolution", 0.01, "Step of the drop rate that --quality is searched with.", **add)
    flags.DEFINE_bool(
        "check", True, "Also evaluate calibration text without and with the limit: losses, rates in force.", **add
    )


def check_flags(values: flags.FlagValues) -> None:
    """Raises ConfigError for flags that do not go together, before anything is read."""
    if not values.checkpoint:
        raise ConfigError("--checkpoint is missing: see python -m experiments.thresholds --help")
    targets = [name for name in ("drop_rate", "quality", "threshold") if values[name].value is not None]
    if len(targets) > 1 or not (targets or values.curve):
        raise ConfigError(
            f"{' and '.join(f'--{name}' for name in targets) or 'no target'}: give one of --drop_rate=0.25, "
            "--quality=0.005 and --threshold=0.08, or --curve=rows.jsonl alone"
        )
    if values.output and not targets:
        raise ConfigError("--output needs a target, e.g. --drop_rate=0.25")
    if values.one_threshold and (values["gap"].present or values.major):
        raise ConfigError("--one_threshold is 1T-Drop, which halves no pair: leave --gap and --major out")
    if values.drop_rate is not None:
        thresholds.check_rate(values.drop_rate)  # NaN is in every range that a flag knows
    if values.quality is not None:
        if not values.check:
            raise ConfigError("--quality is found by evaluation: leave --nocheck out")
        thresholds.check_search(values.quality, values.resolution)
    if values.curve:
        session.check_output(values.curve, "curve")
        read_rows(values.curve)
    if values.output:
        importers.check_new(Path(values.output).expanduser())


def rule_of(values: flags.FlagValues, config: ExperimentConfig) -> Rule:
    """The form of dropping that the flags ask for.

    Raises:
      ConfigError: the model cannot have it.
    """
    moe = config.model.moe
    rule = Rule(None if values.one_threshold else values.gap, values.major, moe.expert_dim)
    layers = len(moe_layer_ids(config.model))
    first = values.threshold if values.threshold is not None else 0.0
    if not 0 <= first < 1:
        raise ConfigError(f"--threshold={first}: a share of a token's scores, at least 0 and below 1")
    limits.check(rule.limit([first] * layers), moe, layers, causal=routing.FAMILIES[moe.router.name].causal)
    if moe.router.k == 1 and routing.FAMILIES[moe.router.name].causal:
        raise ConfigError(
            f"router.name={moe.router.name!r} with k=1: a token's one expert has all of its score, so that a threshold "
            "drops nothing or everything; split its experts first (python -m experiments.partition)"
        )
    return rule


def without_limits(config: ExperimentConfig, values: flags.FlagValues) -> ExperimentConfig:
    """The checkpoint's config without limits.

    Raises:
      ConfigError: it has limits and nothing says that they go, or no experts.
    """
    if not validate.has_experts(config.model):
        raise ConfigError("--checkpoint is of a model without experts: there is nothing to drop")
    moe = config.model.moe
    if limits.of_config(moe) and not values.replace:
        held = ", ".join(moe.capacity_limits) or f"capacity_factor={moe.capacity_factor}"
        raise ConfigError(
            f"--checkpoint has limits ({held}): thresholds are for a model without; --replace puts them in their "
            "place, or give the checkpoint that those were made for"
        )
    moe = dataclasses.replace(moe, capacity_factor=0.0, capacity_limits=())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is calibrated: the form of dropping, and the text."""

    rule: Rule
    text: str
    domains: list[str]
    tokens: int


def search(
    values: flags.FlagValues, on: Calibration, asked: Asked, table: ScoreTable, base: Scored | None
) -> tuple[np.ndarray, ScoreTable, Scored | None, dict[str, Any]]:
    """For the flags' target: thresholds, the scores they were solved on, their evaluation on calibration text, facts.

    Args:
      table: of a pass without limits.
      base: evaluation without limits; None: nothing is evaluated.
    """
    rule = asked.rule

    def score(at: np.ndarray) -> Scored:
        made = on.score(rule.limit(at), asked.text, asked.domains, asked.tokens)
        on.expect_one_program()
        return made

    if values.quality is None:
        if values.threshold is not None:
            at, target = np.full(table.layers, values.threshold), {"threshold": values.threshold}
        else:

            def collected(in_force: tuple[Limit, ...]) -> ScoreTable:
                return on.collect(asked.text, asked.domains, asked.tokens, in_force) if in_force else table

            at, table = thresholds.fit(collected, values.drop_rate, rule, values.spread, values.rounds)
            target = {"drop_rate": values.drop_rate, "rounds": values.rounds}
        return at, table, None if base is None else score(at), target
    assert base is not None
    tries: dict[float, tuple[np.ndarray, Scored]] = {}

    def loss(rate: float) -> float:
        at = thresholds.solve(table, rate, rule, values.spread)
        tries[rate] = at, score(at)
        lost = tries[rate][1].mean - base.mean
        session.say(f"  drop rate {rate:6.2%}: {lost:+.5f} bits per byte")
        return lost

    rate = thresholds.largest_rate(loss, values.quality, resolution=values.resolution)
    target = {"quality": values.quality, "resolution": values.resolution, "rate_found": rate,
              "tries": {f"{r:.6g}": made.mean - base.mean for r, (_, made) in sorted(tries.items())}}  # fmt: skip
    if not rate:
        session.say(f"note: dropping {values.resolution:.2%} loses more than {values.quality}: nothing is dropped")
        return np.zeros(table.layers), table, base, target
    return tries[rate][0], table, tries[rate][1], target


def command(values: flags.FlagValues) -> int:
    check_flags(values)
    if jax.process_count() > 1:
        raise ConfigError("experiments.thresholds runs in one process: counts of several are not put together")
    return session.all_or_nothing(lambda: found_and_told(values))


def found_and_told(values: flags.FlagValues) -> int:
    stored = without_limits(pretrained.stored_config(values.checkpoint), values)
    config = calibration.with_text(stored, values)
    text = calibration.calibration_split(config, values.split)
    rule = rule_of(values, stored)
    mesh = mesh_of(config)
    origin = pretrained.origin(values.checkpoint)
    model, _, meta = pretrained.open_model(values.checkpoint, mesh=mesh)
    corpus = load_corpus(config.data, train=text == "train")
    check_tokenizer(config.data, corpus.tokenizer, meta.get("data", {}))
    session.keep_programs(corpus)
    asked = Asked(rule, text, chosen_domains(corpus, text, values.domains), values.tokens)
    layers, moe = moe_layer_ids(config.model), config.model.moe
    cut = f"at most {values.tokens:,} tokens of each of" if values.tokens else "all of"
    session.say(
        f"{values.checkpoint}: MoE layers {layers}, k={moe.router.k} of {moe.num_experts} experts; calibration text: "
        f"{cut} {', '.join(asked.domains)} ({text})"
    )
    on = Calibration(model, config, corpus)
    table = on.collect(text, asked.domains, values.tokens)
    shared = {
        "config_hash": config_hash(config), "data_hash": corpus.hash, "checkpoint_hash": origin["weights"],
        "batch_shape": (config.eval.batch_size, config.data.seq_len), "command": session.command_line(),
        **environment_facts(),
    }  # fmt: skip
    if values.curve:
        named = {"scale": config.scale, "config": config.name}
        append_rows(values.curve, curve_rows(table, rule, config, layers, shared | named))
        session.say(f"{values.curve}: drop rate over threshold by layer, {table.tokens:,} tokens")
        if values.drop_rate is values.quality is values.threshold is None:
            return 0
    base = on.score((), text, asked.domains, values.tokens) if values.check else None
    at, table, scored, target = search(values, on, asked, table, base)
    said = {"split": text, "domains": asked.domains, "tokens": table.tokens, "tokenizer_hash": corpus.tokenizer.hash}
    facts = {
        "target": target, "spread": values.spread, "thresholds": dict(zip(layers, map(float, at), strict=True)),
        "gap": rule.gap, "major": None if rule.gap is None else limits.major_columns(moe.expert_dim, rule.major),
        "limit": rule.text(at), "calibration": said, "checkpoint": origin, **shared,
    }  # fmt: skip
    found = Found(rule, at, layers, facts)
    found.add_rates(table, config, None if scored is None else scored.metrics)
    if base is not None and scored is not None:
        said |= scored.against(base)
    session.say("\n".join(found.lines(moe)))
    tell_loss("calibration text", said)
    if values.quality is not None:
        facts["held_out"] = check_held_out(on, asked, at, values.quality)
    wanted = target.get("drop_rate", target.get("rate_found"))
    for line in warnings(found, table, config, wanted, values.spread):
        session.say(f"note: {line}")
    for line in on.recompiled():
        session.say(f"WARNING: {line}")
    if values.output:
        write_folder(Path(values.output).expanduser(), limited(stored, origin, found.text), found, origin)
        session.say(f"{values.output}: a checkpoint for every command, with the weights of {origin['folder']}")
    print(f"--limit={found.text}", flush=True)
    return 0


def check_held_out(on: Calibration, asked: Asked, at: np.ndarray, bound: float) -> dict[str, Any] | None:
    """Evaluates held-out text once, without and with the limit; None where there is none."""
    text, tokens = on.config.eval.final_split, on.config.eval.final_max_tokens
    domains = [domain for domain in asked.domains if text in on.corpus.splits(domain)]
    if not domains:
        session.say(f"note: no domain has a {text!r} split: the thresholds are not checked on held-out text")
        return None
    base = on.score((), text, domains, tokens)
    # Thresholds of 0 drop nothing; the last bits that their form rounds otherwise are no loss.
    made = on.score(asked.rule.limit(at), text, domains, tokens) if at.any() else base
    facts: dict[str, Any] = {"split": text, "domains": domains, "drop_rate": drop_rate(made.metrics)}
    facts |= made.against(base)
    tell_loss(f"held-out text ({text})", facts)
    if facts["loss"] > bound:
        session.say(f"note: on held-out text the loss is above {bound}: the thresholds stand as they were found")
    return facts | {"within": facts["loss"] <= bound}


def drop_rate(metrics: MoEMetrics) -> float:
    """Over all layers, as an evaluation counted it."""
    pairs = np.asarray(metrics.routed, np.float64).sum(-1)
    return float((thresholds.drop_rates(metrics) * pairs).sum() / max(pairs.sum(), 1))


def tell_loss(name: str, made: dict[str, Any]) -> None:
    if "loss" not in made:
        return
    interval = f", 95 % [{made['interval'][0]:+.5f}, {made['interval'][1]:+.5f}]" if made["interval"] else ""
    session.say(
        f"{name}: {made['baseline']:.4f} bits per byte without, {made['bits_per_byte']:.4f} with the limit "
        f"({made['loss']:+.5f}{interval})"
    )


if __name__ == "__main__":
    session.launch(define_flags, command)
