"""Times capacity limits (Capacity-Aware Inference, 2503.05066) on the devices of one host, against the capacity factor.

    python -m experiments.limit_speed --shape=olmoe,mixtral --output=rows.jsonl [--parts=layer,model] [--devices=2]
        [--families=token_drop,expanded_drop] [--factors=2,1.5,1,0.75,0.5] [--loads=paper] [--tokens=8192]
        [--seconds=150] [--tiny]

All devices are ranks of one expert axis, each with its own tokens and its run of the experts in their natural order, so
every layer waits for the busiest rank. Arms, by ``--families``: no limit, beside each; Token Drop by score; Expanded
Drop in the paper's form and (``topk_first``) in the one that never displaces a token's own pair; ``others``: a budget
for each device, the measured budget, fewer experts per token, and, exact, copies of the busiest experts (EPLB), stored.

``layer``
    An MoE layer: router, limit, dispatch, exchange, experts, combine; its split from a profile.
``model``
    Prefill of a whole random model (``--layers`` of it; of the first of ``--shape``, after all layers), at
    ``--model_factors``, without ``topk_first``.

Work is counted by as many virtual ranks on one device, and outputs are compared with theirs before anything is timed.
The *predicted* speed-up of an arm is the busiest rank's work without a limit over that with it; a row says what share
of it was measured. Of R ranks the busiest has at most R times the mean, so no published speed-up (8 GPUs) has a place
in these rows.

``--loads`` says how popular the experts are: as in ``experiments/drop_scores.py`` (the default); ``paper``, with the
max/mean of experts that the paper observed (7 OLMoE, 3 Mixtral), in random order; or a trace of ``experiments.trace``,
whose loads they get: the layer those of the trace's layer with the median skew of ranks, a model's layer i those of
layer i mod L. Where the trace has fewer experts, each stands for as many neighbours. In a whole model what the random
layers before have computed moves the logits too, and makes loads more skewed than that; rows say how skewed they were.
"""

import dataclasses
import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from jax.sharding import Mesh

from experiments import drop_scores, rank_layers, session
from experiments.drop_scores import SHAPES, Setting
from experiments.limit_layers import FAMILIES, How, layer_rows, loads_of
from experiments.limit_models import model_rows
from moejax.config import ConfigError, config_hash
from moejax.results import ResultRow, append_rows

PAPER, TABLE = "capacity_aware", "limit_speed"
PARTS = ("layer", "model")


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    given: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_list("shape", ["olmoe"], f"Layers, in this order: {', '.join(SHAPES)}.", **given)
    flags.DEFINE_list("parts", list(PARTS), f"Of {', '.join(PARTS)}.", **given)
    flags.DEFINE_list("families", list(FAMILIES), f"Of arms: {', '.join(FAMILIES)}.", **given)
    flags.DEFINE_list("factors", ["2", "1.5", "1", "0.75", "0.5"], "Capacity factors of the layer's arms.", **given)
    flags.DEFINE_list("model_factors", ["1.5", "1", "0.5"], "Capacity factors of the whole model's arms.", **given)
    flags.DEFINE_string("loads", "", "Experts' popularity: a trace's file, or 'paper'; '': the shape's.", **given)
    flags.DEFINE_integer("layers", 0, "Layers of the whole model; 0: all.", 0, **given)
    flags.DEFINE_integer("tokens", 8192, "Tokens of each device, for a layer.", 1, **given)
    flags.DEFINE_integer("devices", 0, "Devices to use; 0: all.", 0, **given)
    flags.DEFINE_integer("repeats", 20, "Timings of each arm.", 1, **given)
    flags.DEFINE_integer("target_ms", 20, "Calls of one timing take about so long together.", 0, **given)
    flags.DEFINE_integer("seconds", 360, "No part, and no profile of one, begins after so many seconds.", 1, **given)
    flags.DEFINE_bool("tiny", False, "Sizes of a CPU; times mean nothing.", **given)
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", **given)


def factors_of(flag: str, texts: list[str]) -> list[float]:
    """Raises ConfigError for what is no factor above 0."""
    try:
        factors = [float(text) for text in texts]
    except ValueError:
        factors = []
    if not factors or not all(0 < factor < math.inf for factor in factors):
        raise ConfigError(f"--{flag}={','.join(texts)}: capacity factors, above 0, with commas")
    return list(dict.fromkeys(factors))


def command(values: flags.FlagValues) -> int:
    begin = time.monotonic()
    if not values.output:
        raise ConfigError("--output is needed: the results file to append to")
    for flag, given, known in (
        ("shape", values.shape, tuple(SHAPES)), ("parts", values.parts, PARTS),
        ("families", values.families, FAMILIES),
    ):  # fmt: skip
        if not given or not set(given) <= set(known):
            raise ConfigError(f"--{flag}={','.join(given)}: choose of {', '.join(known)}")
    session.check_output(values.output)
    settings = [drop_scores.setting_of(name, tiny=values.tiny) for name in dict.fromkeys(values.shape)]
    mesh = rank_layers.mesh_of(values.devices, settings)
    left_out: list[str] = []

    def room(what: str) -> bool:
        if time.monotonic() - begin > values.seconds:
            left_out.append(what)
            return False
        return True

    how = How(
        list(dict.fromkeys(values.families)), factors_of("factors", values.factors),
        factors_of("model_factors", values.model_factors), values.loads, values.layers, values.repeats,
        values.target_ms, values.tiny, room,
    )  # fmt: skip
    for setting in settings:
        loads_of(setting, how.loads, mesh.size)  # what it refuses is refused before anything is measured
    shared = session.row_facts(PAPER, TABLE)
    for row in measured(settings, values.parts, values.tokens, mesh, how, shared):
        append_rows(Path(values.output), [row])  # each at once: a limit of time then loses one row
        session.say(f"{row.row:44s} {row.metric:16s} {row.value:.3f}x {row.extra['median_ms']:9.3f} ms   predicted "
                    f"{row.extra['predicted']:.3f}x   dropped {row.extra['drop_rate']:.1%}")  # fmt: skip
    for text in how.wrong:
        session.say(f"WRONG, and not timed: {text}")
    if left_out:
        session.say(f"left out after --seconds={values.seconds}: {'; '.join(left_out)}")
    return 1 if left_out or how.wrong else 0


def measured(
    settings: list[Setting], parts: list[str], tokens: int, mesh: Mesh, how: How, shared: dict[str, Any]
) -> Iterator[ResultRow]:
    """All rows, those of the whole model last."""
    jobs = [("layer", layer_rows, setting) for setting in settings] + [("model", model_rows, settings[0])]
    for part, rows, setting in jobs:
        if part in parts and how.room(f"{setting.name}: {part}"):
            sized = setting if how.tiny else dataclasses.replace(setting, tokens=tokens)
            config = setting.config
            facts = {"config": config.name, "config_hash": config_hash(config), "scale": config.scale}
            yield from rows(sized, mesh, how, shared | facts)
            gc.collect()


if __name__ == "__main__":
    session.launch(define_flags, command)
