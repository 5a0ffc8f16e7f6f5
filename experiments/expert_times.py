"""Times the experts of one rank on one device by their rows: what ``experiments.ep_simulation`` puts 8 ranks together
from.

    python -m experiments.expert_times --models=olmoe,mixtral --folder=times --output=rows.jsonl [--gb_per_s=450]

For each model the grouped FFN of as many experts as one rank of the simulation has (OLMoE 8, Mixtral 1), in bfloat16,
over rows from an eighth of an even share to what the busiest rank has without a limit. Rows lie on the experts as on
the busiest rank of the simulation's first placement, and each point has a buffer of its own size. The points go to
``FOLDER/MODEL.csv``, lines of rows,seconds that ``--times=MODEL=FOLDER/MODEL.csv`` of the simulation
reads.

Of OLMoE also a whole layer is profiled, which says what a layer costs beside its experts and an exchange: the router by
tokens, permutation and combine by pair. With ``--gb_per_s`` (an all-to-all's, of ``experiments.ep_speed``) the two
trips of a pair are added. The last line is the simulation's command with these times.

The FFN is checked by another back end, on the smallest point, before anything is timed.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import kernels_pallas
from experiments import drop_scores, ep_simulation, ep_speed, session
from experiments.drop_layers import ERROR, compiled, difference, layer_output
from experiments.ep_simulation import MODELS, TOKENS, Model
from kernels_pallas.grouped_matmul.ffn import Weights
from kernels_pallas.rivals import timing
from moejax.config import ConfigError
from moejax.experts import grouped_ffn
from moejax.replication import rank_loads
from moejax.results import ResultRow, append_rows, write_atomically
from moejax.types import ExpertWeights

PAPER, TABLE = "capacity_aware", "expert times, one device"
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Points, in even shares of the rows; beyond them that of the busiest rank without a limit."""
OF_LAYER = "olmoe"
"""The model whose layer is profiled: :class:`~experiments.ep_simulation.Times` are those of its layer."""
TINY = 2**12
"""``--tiny`` divides the rows by this."""


def even_rows(model: Model, tiny: bool) -> float:
    """Rows of a rank where loads are even."""
    rows = ep_simulation.rows_of_mean(model) * model.experts / model.ranks
    return rows / TINY if tiny else rows


def points(model: Model, tiny: bool, placements: int = 200) -> list[np.ndarray]:
    """Rows of each of a rank's experts, for each point."""
    every = ep_simulation.placements(model, placements)
    even = model.experts / model.ranks
    most = max(rank_loads(loads, model.ranks).max() for loads in every) / even
    loads = every[0].reshape(model.ranks, -1)
    share = loads[np.argmax(loads.sum(axis=1))]
    share = share / share.sum()
    found = []
    for times in (*(s for s in SHARES if s < most), most):
        ends = np.round(np.cumsum(share) * round(times * even_rows(model, tiny)))
        found.append(np.diff(ends, prepend=0).astype(np.int32))
    return found


def ffn(weights: ExpertWeights, xs: jax.Array, sizes: jax.Array, implementation: str = "auto") -> jax.Array:
    return grouped_ffn(xs, sizes, weights, "swiglu", implementation)


def back_end(xs: jax.ShapeDtypeStruct, sizes: np.ndarray, weights: ExpertWeights) -> str:
    """The back end that computes them.

    Raises:
      ConfigError: none can.
    """
    given = Weights(weights.gate, weights.up, weights.down)
    told = kernels_pallas.GROUPED_FFN.explain(xs, jnp.asarray(sizes), given, "swiglu", extents=None)
    if told.chosen is None:
        raise ConfigError(f"no back end can run these experts here: {told}")
    return told.chosen


def check(name: str, weights: ExpertWeights, xs: jax.Array, sizes: np.ndarray) -> float:
    """Relative error to the back end ``padded``.

    Raises:
      ConfigError: it is wrong: nothing may be timed.
    """
    got, expected = (jax.jit(functools.partial(ffn, implementation=i))(weights, xs, sizes) for i in ("auto", "padded"))
    error = float(difference(got, expected)[0])
    if not error <= ERROR:
        raise ConfigError(f"WRONG: {name}: the experts' output differs by {error:.1e} from that of the back end "
                          "'padded'; nothing was timed")  # fmt: skip
    return error


def rows_of(name: str, tiny: bool, repeats: int, target_ms: float, shared: dict[str, Any]) -> Iterator[ResultRow]:
    """A row for each point of a model."""
    model = MODELS[name]
    experts, dim, width = model.experts // model.ranks, model.dim, model.width
    if tiny:
        dim, width = 64, 128

    @jax.jit
    def normal(seed: int) -> ExpertWeights:
        def one(i: int, rows: int, columns: int) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), i)
            return (jax.random.normal(key, (experts, rows, columns)) / math.sqrt(rows)).astype(jnp.bfloat16)

        return ExpertWeights(gate=one(0, dim, width), up=one(1, dim, width), down=one(2, width, dim))

    @functools.partial(jax.jit, static_argnums=0)
    def tokens(rows: int) -> jax.Array:
        return jax.random.normal(jax.random.key(1), (rows, dim), jnp.bfloat16)

    weights, every = normal(0), points(model, tiny)
    abstract = [jax.ShapeDtypeStruct((int(sizes.sum()), dim), jnp.bfloat16) for sizes in every]
    error = check(name, weights, tokens(int(every[0].sum())), every[0])
    run = compiled({i: (ffn, (weights, xs, every[i])) for i, xs in enumerate(abstract)})
    for i, sizes in enumerate(every):
        rows = int(sizes.sum())
        call = functools.partial(run[i], weights, tokens(rows), jnp.asarray(sizes))
        time = timing.repeat(timing.wall_clock(call, jax.block_until_ready), repeats, target_ms)
        del call
        yield ResultRow(
            **shared, row=f"{name}, {experts} experts, {rows} rows", metric="milliseconds/experts", unit="ms",
            value=1e3 * time.median,
            extra=time.fields() | {
                "model": name, "rows": rows, "seconds": time.median, "rows_over_even": rows / even_rows(model, tiny),
                "experts": experts, "dim": dim, "expert_dim": width, "rows_by_expert": sizes.tolist(), "error": error,
                "tflop_per_s": 6.0 * rows * dim * width / time.median / 1e12,
                "implementation": back_end(abstract[i], sizes, weights),
            },
        )  # fmt: skip


def layer_row(tiny: bool, gb_per_s: float, shared: dict[str, Any]) -> ResultRow:
    """What a layer of :data:`OF_LAYER` costs beside its experts and an exchange, by a profile of it on one device."""
    setting = drop_scores.setting_of(OF_LAYER, tiny=tiny)
    layer, x = drop_scores.make_layer(setting), drop_scores.make_tokens(setting, setting.tokens)[None]
    run = jax.jit(layer_output).lower(layer, x, ()).compile()
    jax.block_until_ready(run(layer, x, ()))
    split = ep_speed.profiled(run, (layer, x, ()), None)
    extra: dict[str, Any] = {"model": OF_LAYER, "tokens": setting.tokens, "gb_per_s": gb_per_s}
    if split is None:
        return ResultRow(**shared, row=f"{OF_LAYER}, whole layer", metric="milliseconds/beside experts", unit="ms",
                         extra=extra | {"no_split": "no device events in the profile"})  # fmt: skip
    pairs = setting.tokens * setting.moe.router.k
    trips = 2 * 2 * setting.dim / (1e9 * gb_per_s) if gb_per_s else 0.0  # there and back, two bytes an element
    extra |= {
        "split_ms": split,
        "seconds_fixed": 1e-3 * split["route"] * TOKENS / setting.tokens,
        "exchange_seconds_per_row": 1e-3 * (split["permute"] + split["combine"]) / pairs + trips,
    }
    beside = split["route"] + split["permute"] + split["combine"]
    return ResultRow(**shared, row=f"{OF_LAYER}, whole layer", metric="milliseconds/beside experts", unit="ms",
                     value=beside, extra=extra)  # fmt: skip


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    flags.DEFINE_list("models", ["olmoe", "mixtral"], f"Of {', '.join(MODELS)}.", flag_values=values)
    flags.DEFINE_integer("repeats", 10, "Timings of each point.", 1, flag_values=values)
    flags.DEFINE_integer("target_ms", 50, "Calls of one timing take about so long together.", 0, flag_values=values)
    flags.DEFINE_float("gb_per_s", 0.0, "Of an all-to-all, of each device; 0: left out.", 0.0, flag_values=values)
    flags.DEFINE_bool("tiny", False, "Sizes of a CPU; times mean nothing.", flag_values=values)
    flags.DEFINE_string("folder", None, "Folder for the files MODEL.csv.", flag_values=values)
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if not (values.output and values.folder):
        raise ConfigError("--output and --folder are needed: the results file to append to, and where CSV files go")
    if unknown := [name for name in values.models if name not in MODELS]:
        raise ConfigError(f"--models={unknown[0]}: choose among {', '.join(MODELS)}")
    session.check_output(values.output)
    folder = Path(values.folder)
    session.check_output(folder / "times.csv", "folder")
    shared = session.row_facts(PAPER, TABLE)
    made = {}
    for name in dict.fromkeys(values.models):
        lines = ["rows,seconds"]
        for row in rows_of(name, values.tiny, values.repeats, values.target_ms, shared):
            append_rows(Path(values.output), [row])
            lines.append(f"{row.extra['rows']},{row.extra['seconds']:.9g}")
            session.say(f"{row.row:36s} {row.value:9.3f} ms {row.extra['tflop_per_s']:7.1f} TFLOP/s")
        made[name] = folder / f"{name}.csv"
        write_atomically(made[name], "\n".join(lines) + "\n")
    row = layer_row(values.tiny, values.gb_per_s, shared)
    append_rows(Path(values.output), [row])
    times = ",".join(f"{name}={path}" for name, path in made.items())
    beside = {name: row.extra.get(name, 0.0) for name in ("seconds_fixed", "exchange_seconds_per_row")}
    given = " ".join(f"--{name}={value:.4g}" for name, value in beside.items())
    session.say(f"python -m experiments.ep_simulation --models={','.join(made)} --times={times} {given}")
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
