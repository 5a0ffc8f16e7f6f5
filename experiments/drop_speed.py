"""Times threshold dropping (DualSparse-MoE, 2508.18376) against drop rate, on one device.

    python -m experiments.drop_speed --shape=olmoe,mixtral --output=rows.jsonl \
        [--parts=layer,experts,decode,model] [--rates=0,0.1,0.25,0.4,0.5] [--batches=1,16,128,512] [--tiny]

``layer``
    An MoE layer on the tokens of a prefill: router, limit, dispatch, experts and combine, with the shared experts where
    the model has some. 1T-Drop and 2T-Drop, the latter with the paper's gap of 0.01 and with one that makes half of the
    dropped work come from halved pairs. Experts stand in their natural order.
``experts``
    The grouped FFN alone, on the group sizes and extents of the same arms.
``decode``
    The layer on a batch of single tokens, at a drop rate of ``--decode_rate``, with ``opportunistic_drop`` beside it;
    steps run in one program, as in generation. Experts touched, and the bytes that must move.
``model``
    Prefill of a whole random model (of ``olmoe`` alone, after all layers), thresholds for each layer solved on its own
    scores.

Before anything is timed, outputs are compared with those of the reference form (two sub-experts where F halves into
them) by another back end. All arms take turns, timing by timing, so that a change of the card's clock counts for all;
a speed-up is the median of paired ratios, with its 90 % interval. The proportional limit of a drop rate r is
1 / (1 - r), with r a share of the work of routed and shared experts. Whose scores: ``experiments/drop_scores.py``.

``--tiny`` runs everything at sizes of a CPU, where times mean nothing. What ``--seconds`` leaves no time for is said,
and the exit code is 1.
"""

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import drop_layers, drop_scores, session
from experiments.decode_speed import prompts, random_model
from experiments.drop_layers import PUBLISHED, How, chosen, figures, in_turn, ready, row_of
from experiments.drop_scores import SHAPES, Arm, Setting
from experiments.speed import rate as per_second
from moejax import decode, limits, thresholds
from moejax.config import ConfigError, config_hash
from moejax.results import ResultRow, append_rows
from moejax.thresholds import ScoreTable
from moejax.types import Limit, MoEMetrics

PAPER, TABLE = "dualsparse", "speed"
PARTS = (*drop_layers.PARTS, "model")
MODEL = "olmoe"
"""The shape whose whole model is timed: 14 GB of weights."""
MODEL_BATCH, MODEL_CONTEXT = 16, 1024

# --- a whole model --------------------------------------------------------------------------------


def model_rows(setting: Setting, how: How, shared: dict[str, Any]) -> Iterator[ResultRow]:
    """Prefill of a random model: its routers' scores are those of normal hidden states, so thresholds are solved on
    them, one for each layer."""
    batch, context = (2, 16) if how.tiny else (MODEL_BATCH, MODEL_CONTEXT)
    given = setting.config.model
    config = dataclasses.replace(
        given, moe=dataclasses.replace(given.moe, expert_dim=setting.moe.expert_dim), vocab_size=given.vocab_size or 512
    )
    model = random_model(config)
    tokens = jnp.asarray(prompts(config, batch, context))
    lengths = jnp.full(batch, context, jnp.int32)
    scores = jax.jit(scores_of_model)

    def collected(in_force: tuple[Limit, ...]) -> ScoreTable:
        share, weight, _ = jax.device_get(scores(model, tokens, in_force))
        table = ScoreTable(len(share))
        table.add(share, weight, batch * context)
        return table

    arms, base = [Arm("none")], collected(())
    for rate in filter(None, how.rates):
        for kind, rule in drop_scores.rules_of(base, rate, config.moe.expert_dim).items():
            at, table = thresholds.fit(lambda in_force: collected(in_force) if in_force else base, rate, rule)
            facts = {"thresholds": at.tolist(), "gap": rule.gap, "half_share": drop_scores.half_share(table, at, rule)}
            arms.append(Arm(kind, rate, rule.limit(at), facts))
    drops = {arm.label: thresholds.drop_rates(scores(model, tokens, arm.limits)[2]) for arm in arms}

    def call(arm: Arm) -> Any:
        return decode.prefill(model, tokens, lengths, context, arm.limits)[0]

    times = in_turn({arm.label: functools.partial(call, arm) for arm in arms}, max(2, how.repeats // 2), how.target_ms)
    for arm in arms:
        found, gone = figures(arm, times), float(drops[arm.label].mean())
        speed, spans = per_second(batch * context, times[arm.label].seconds)
        facts = arm.facts | {
            "asked_rate": arm.rate, "drop_rate": gone, "drop_rate_by_layer": drops[arm.label].tolist(),
            "proportional_limit_of_experts": 1 / (1 - gone), "tokens_per_s": speed, "tokens_per_s_spread": spans,
            "layers": config.num_layers, "batch": batch, "context": context, "score_quantiles": quantiles(base),
            "scores": "a random model's own: its hidden states meet routers as they were drawn",
            "published": PUBLISHED,
        }  # fmt: skip
        yield row_of(shared, f"{setting.name}, {arm.label}", "speedup/prefill", found, **facts)


def scores_of_model(
    model: Any, tokens: jax.Array, in_force: tuple[Limit, ...]
) -> tuple[jax.Array, jax.Array, MoEMetrics]:
    """Normalised scores and gate weights of each layer's pairs, and what limits did."""
    out = model(tokens, limits=in_force, record=True)
    made = jax.tree.map(lambda leaf: leaf[:, 0], out.routing.made)
    return jax.vmap(limits.normalised)(made), made.weight, out.metrics


def quantiles(table: ScoreTable) -> dict[str, float]:
    """Of the normalised scores, over all layers."""
    below = np.cumsum(table.pairs.sum(0))
    return {f"{q:.0%}": float(np.searchsorted(below, q * below[-1])) / thresholds.BINS for q in (0.1, 0.25, 0.5, 0.9)}


# --- the command ----------------------------------------------------------------------------------


def measured(
    names: list[str], parts: list[str], how: How, facts: dict[str, Any], room: Callable[[str], bool]
) -> Iterator[ResultRow]:
    """All rows, those of whole models last; ``room(what)``: whether there is time for another part."""
    settings = {name: drop_scores.setting_of(name, tiny=how.tiny) for name in dict.fromkeys(names)}
    shared = {
        name: facts | {"config": setting.config.name, "config_hash": config_hash(setting.config),
                       "scale": setting.config.scale, "batch_shape": (1, setting.tokens)}
        for name, setting in settings.items()
    }  # fmt: skip
    wanted = [part for part in drop_layers.PARTS if part in parts]
    for name, setting in settings.items():
        if wanted and room(f"{name}: {', '.join(wanted)}"):
            yield from layer_rows(setting, wanted, how, shared[name], room)
            gc.collect()
    if "model" in parts and MODEL in settings and room(f"{MODEL}: model"):
        back_end = session.grouped_matmul_facts(settings[MODEL].config, 1)["implementation"]
        for row in model_rows(settings[MODEL], how, shared[MODEL]):
            yield dataclasses.replace(row, extra={"implementation": back_end} | row.extra)


def layer_rows(
    setting: Setting, parts: list[str], how: How, shared: dict[str, Any], room: Callable[[str], bool]
) -> Iterator[ResultRow]:
    """Rows of one layer, with its sizes and back end."""
    it = ready(setting, how)
    sizes = {"tokens": setting.tokens, "dim": setting.dim, "experts": setting.moe.num_experts,
             "k": setting.moe.router.k, "expert_dim": setting.moe.expert_dim, "scores": setting.scores}  # fmt: skip
    back_ends = {arm.label: chosen(it, setting.tokens, arm) for arm in it.arms}
    for part in parts:
        if room(f"{setting.name}: {part}"):
            for row in drop_layers.PARTS[part](it, how, shared):
                back_end = back_ends.get(row.row.partition(", ")[2])
                yield dataclasses.replace(row, extra={"implementation": back_end, **sizes} | row.extra)


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    for name, default, text in (
        ("shape", ["olmoe"], f"Layers, measured in this order: {', '.join(SHAPES)}."),
        ("parts", list(PARTS), "What to measure."),
        ("rates", ["0", "0.1", "0.25", "0.4", "0.5"], "Drop rates: shares of the routed work."),
        ("batches", ["1", "16", "128", "512"], "Tokens of a decoding step."),
    ):
        flags.DEFINE_list(name, default, text, flag_values=values)
    flags.DEFINE_float("decode_rate", 0.25, "Drop rate of decoding.", 0.0, 0.99, flag_values=values)
    flags.DEFINE_integer("repeats", 20, "Timings of each arm.", 1, flag_values=values)
    flags.DEFINE_integer("target_ms", 20, "Calls of one timing take about so long together.", 0, flag_values=values)
    flags.DEFINE_integer("seconds", 360, "No part begins after so many seconds.", 1, flag_values=values)
    flags.DEFINE_bool("profile", True, "Profile some layers for the split into their parts.", flag_values=values)
    flags.DEFINE_bool("tiny", False, "Sizes of a CPU; times mean nothing.", flag_values=values)
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", flag_values=values)


def how_of(values: flags.FlagValues) -> How:
    """Raises ConfigError for flags that cannot be measured."""
    if not values.output:
        raise ConfigError("--output is needed: the results file to append to")
    for flag, known in (("shape", tuple(SHAPES)), ("parts", PARTS)):
        wrong = [name for name in getattr(values, flag) if name not in known]
        if wrong or not getattr(values, flag):
            raise ConfigError(f"--{flag}={','.join(getattr(values, flag))}: choose of {', '.join(known)}")
    rates = [_number(text) for text in values.rates]
    if not rates or not all(rate is not None and 0 <= rate < 1 for rate in rates):
        raise ConfigError(f"--rates={','.join(values.rates)}: shares of the routed work, at least 0 and below 1")
    wrong = [text for text in values.batches if not text.isdigit() or int(text) < 1]
    if wrong or not values.batches:
        raise ConfigError(f"--batches={','.join(values.batches)}: whole numbers of 1 or more, with commas")
    session.check_output(values.output)
    return How(
        [rate for rate in rates if rate is not None], [int(text) for text in values.batches], values.decode_rate,
        values.repeats, values.target_ms, values.profile, values.tiny,
    )  # fmt: skip


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def command(values: flags.FlagValues) -> int:
    how, begin = how_of(values), time.monotonic()
    left_out: list[str] = []
    shared = session.row_facts(PAPER, TABLE)

    def room(what: str) -> bool:
        spent = time.monotonic() - begin
        if spent > values.seconds:
            left_out.append(what)
            return False
        session.say(f"{what} ({spent:.0f} s)")
        return True

    for row in measured(values.shape, values.parts, how, shared, room):
        append_rows(Path(values.output), [row])  # each at once: a limit of time then loses one row
        share = row.extra.get("share_of_proportional_limit")
        told = f"{share:.0%} of the proportional limit" if share else ""
        session.say(f"{row.row:36s} {row.metric:20s} {row.value:6.3f} {row.extra['median_ms']:9.3f} ms {told}")
    if left_out:
        session.say(f"left out after --seconds={values.seconds}: {'; '.join(left_out)}")
    return 1 if left_out else 0


if __name__ == "__main__":
    session.launch(define_flags, command)
