"""Times load-aware threshold dropping (DualSparse-MoE, 2508.18376, section 3.3) on the devices of one host.

    python -m experiments.load_aware_speed --shape=olmoe,mixtral --output=rows.jsonl
        [--rate=0.25] [--send=auto] [--tokens=8192] [--devices=2] [--tiny]

All devices are ranks of one expert axis, each with its own tokens and its run of the experts in their natural order, so
every layer waits for the busiest rank. Arms: no limit; 1T-Drop and 2T-Drop (the paper's gap) with one threshold that
drops ``--rate`` of the routed work; the same with thresholds by load, by the paper's rule and by water-filling.

The work of each rank is counted, before and after. The *predicted* speed-up of an arm is the busiest rank's work
without a limit over that with it; a row says what share of it was measured, for the whole layer, and what the experts
alone took in a profile. What copies of busy experts would reach without dropping (EPLB) stands beside it, as the ratio
of the busiest rank to the mean. Buffers are as large as each arm needs. The skew of R ranks is at most R: the published
1.41x is of 8 ranks and has no place in these rows.

``--send`` is the layer's ``moe.ep_send``: with "pairs" the exchange shrinks with what is dropped, with "tokens" it is
less from the start and stays as it is, and so does its share of the time. Each arm is compared with no limit and the
same choice.

Before timing, each arm's outputs are compared with those of one device with as many virtual ranks. Whose scores and
popularity: ``experiments/drop_scores.py``.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from absl import flags
from jax.sharding import Mesh

from experiments import drop_scores, rank_layers, session
from experiments.drop_layers import INTERVAL
from experiments.drop_scores import PAPER_GAP, SHAPES, Setting
from experiments.rank_layers import NONE, Arm
from moejax import limits, thresholds
from moejax.config import ConfigError
from moejax.results import ResultRow, append_rows
from moejax.thresholds import Rule

PAPER, TABLE = "dualsparse", "load_aware_speed"
Send = Literal["auto", "pairs", "tokens"]


def arms_of(one: float, two: float) -> list[Arm]:
    """The arms, by the thresholds of 1T-Drop and 2T-Drop."""
    found = [NONE]
    for name, threshold, gap in (("1T", one, None), ("2T", two, PAPER_GAP)):
        for rule in ("none", "paper", "water"):
            label = name if rule == "none" else f"{name}, {rule}"
            limit = limits.threshold_drop(threshold, gap=gap, load_aware=rule)
            found.append(Arm(label, (limit,), facts={"threshold": float(np.float32(threshold))}))
    return found


def rows_of(
    setting: Setting, mesh: Mesh, rate: float, repeats: int, target_ms: float, shared: dict
) -> Iterator[ResultRow]:
    """A row for each arm.

    Raises:
      ConfigError: outputs that are not those of one device.
    """
    layer = drop_scores.make_layer(setting)
    tokens = drop_scores.make_tokens(setting, mesh.size * setting.tokens)
    table = drop_scores.scores_of(layer, tokens[None])
    rules = (Rule(None), Rule(PAPER_GAP, 0, setting.moe.expert_dim))
    arms = arms_of(*(float(thresholds.solve(table, rate, rule)[0]) for rule in rules))
    found, wrong = rank_layers.on_ranks(setting, layer, tokens, arms, mesh, repeats, target_ms)
    for label, why in wrong.items():
        raise ConfigError(f"WRONG: {setting.name}, {label}: {why}; no row was written")
    skew, none = rank_layers.skew_of(found[NONE.label].counted.before, mesh.size), found[NONE.label].profile()
    for arm in arms:
        speedup, interval, facts = rank_layers.facts_of(found, arm)
        split = rank_layers.split_facts(none if arm is NONE else found[arm.label].profile(), none)
        yield ResultRow(
            **shared, row=f"{setting.name}, {arm.label}", metric="speedup/layer", unit="times no limit", value=speedup,
            interval=interval, interval_kind=INTERVAL,
            extra=facts | skew | split | {"threshold": 0.0} | arm.facts | {
                "asked_rate": rate, "tokens": setting.tokens, "scores": setting.scores,
            },
        )  # fmt: skip


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    flags.DEFINE_list("shape", ["olmoe"], f"Layers: {', '.join(SHAPES)}.", flag_values=values)
    flags.DEFINE_float("rate", 0.25, "Share of the routed work that T drops.", 0.0, 0.99, flag_values=values)
    flags.DEFINE_enum("send", "auto", get_args(Send), "What travels between the devices.", flag_values=values)
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
    settings = [drop_scores.setting_of(name, tiny=values.tiny) for name in dict.fromkeys(values.shape)]
    mesh = rank_layers.mesh_of(values.devices, settings)
    shared = session.row_facts(PAPER, TABLE)
    for setting in settings:
        tokens = setting.tokens if values.tiny else values.tokens
        chosen = dataclasses.replace(setting, tokens=tokens, moe=dataclasses.replace(setting.moe, ep_send=values.send))
        for row in rows_of(chosen, mesh, values.rate, values.repeats, values.target_ms, shared):
            append_rows(Path(values.output), [row])
            session.say(f"{row.row:28s} {row.value:.3f}x {row.extra['median_ms']:.3f} ms   predicted "
                        f"{row.extra['predicted']:.3f}x   dropped {row.extra['drop_rate']:.1%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
