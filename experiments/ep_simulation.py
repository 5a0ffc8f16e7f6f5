r"""What capacity limits would save on 8 ranks of expert parallelism: a simulation from times of one device.

    python -m experiments.ep_simulation [--models=olmoe,mixtral] [--output=simulated.jsonl]
    python -m experiments.ep_simulation --models=olmoe,mixtral --times=olmoe=a.csv,mixtral=b.csv --seconds_fixed=5e-4 \
        --exchange_seconds_per_row=1e-7
    python -m experiments.ep_simulation --seconds_per_row=2e-7 --seconds_fixed=5e-4 --exchange_seconds_per_row=1e-7

The time of an MoE layer is that of its busiest rank::

    seconds_fixed + exchange_seconds_per_row * rows + expert time(rows) + expert time(rows of shared experts)

Expert time is linear, or read between the points of ``--times`` (``rows,seconds`` lines, measured on one device:
``experiments.expert_times``). Times are those of OLMoE's layer; of another model experts cost by D F, unless a file of
its own says what, and the rest by D. Loads are lognormal quantiles with the
max/mean that the paper observed (7 OLMoE, 5 DeepSeek-V2-Lite, 3 Qwen1.5-MoE and Mixtral), the same in every layer;
experts lie on ranks at random, averaged over ``--placements``; every rank sends the same share. Without flags times are
one bar of the paper's OLMoE chart, read off (gate 0.55, experts 4.15, permute and exchange 2.2 ms, without a limit):
the OLMoE baseline is then theirs, and nothing else is fitted. Published figures (2503.05066, Figures 4 and 5) stand
beside: 8 H20, six for Qwen.
"""

import csv
import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from absl import flags

from experiments import session
from moejax.config import ConfigError
from moejax.replication import rank_loads, replicate
from moejax.results import ResultRow, append_rows, environment_facts

BREAKDOWN = {"gate": 0.55e-3, "experts": 4.15e-3, "exchange": 2.2e-3}
MOE_SHARE = 0.71
"""Of the end-to-end time without a limit: what Figure 5 and Figure 4 say together of OLMoE, Token Drop, factor 2
(1.14 and 1.21). The other rows of Figure 5 take it over."""
TOKENS = 32_768
"""Of each rank. Of times that are linear only its product with them matters; of measured ones, that the busiest rank's
rows have less than 2^31 numbers, from which on kernels may need wider indices."""
FACTORS = (2.0, 1.5, 1.0)
NOTE = "simulation of 8 ranks (Qwen: 6) from times of one device; nothing was run on several"


@dataclasses.dataclass(frozen=True)
class Model:
    experts: int
    k: int
    ranks: int
    skew: float
    """Observed load, max/mean over experts."""
    dim: int
    width: int
    """Hidden width of an expert."""
    shared: int
    """Shared experts, in widths of a routed one: every rank computes its own tokens' part of them."""
    layer: dict[str, tuple[float, float, float]]
    """Figure 4 by arm, at :data:`FACTORS`."""
    whole: dict[tuple[str, float], float]
    """Figure 5 by arm and factor."""


TD, XD = "token drop", "expanded drop"
MODELS = {
    "olmoe": Model(64, 8, 8, 7.0, 2048, 1024, 0, {TD: (1.21, 1.30, 1.46), XD: (1.16, 1.25, 1.36)},
                   {(TD, 2.0): 1.14, (XD, 2.0): 1.12}),
    "deepseek": Model(64, 6, 8, 5.0, 2048, 1408, 2, {TD: (1.12, 1.23, 1.37), XD: (1.09, 1.15, 1.31)},
                      {(TD, 2.0): 1.11, (XD, 2.0): 1.08}),
    "qwen": Model(60, 4, 6, 3.0, 2048, 1408, 4, {TD: (1.10, 1.13, 1.18), XD: (1.03, 1.08, 1.13)},
                  {(TD, 1.5): 1.10, (XD, 1.5): 1.07}),
    "mixtral": Model(8, 2, 8, 3.0, 4096, 14336, 0, {TD: (1.44, 1.89, 2.55), XD: (1.43, 1.86, 2.51)},
                     {(TD, 1.5): 1.87, (XD, 1.5): 1.85}),
}  # fmt: skip


def loads_of(experts: int, skew: float) -> np.ndarray:
    """Lognormal quantiles with mean 1 and maximum ``skew``, largest first.

    Raises:
      ConfigError: a skew that no distribution has.
    """
    if not 1 <= skew < experts:
        raise ConfigError(f"skew={skew:g}: max/mean over {experts} experts lies in [1, {experts})")
    normal = np.asarray([NormalDist().inv_cdf(1 - (i + 0.5) / experts) for i in range(experts)])

    def with_spread(spread: float) -> np.ndarray:
        loads = np.exp(spread * (normal - normal[0]))
        return loads / loads.mean()

    low, high = 0.0, 100.0
    for _ in range(100):
        spread = (low + high) / 2
        low, high = (low, spread) if with_spread(spread)[0] > skew else (spread, high)
    return with_spread(low)


# --- rows of each rank, in units of an expert's mean load -----------------------------------------


def token_drop(loads: np.ndarray, ranks: int, factor: float) -> np.ndarray:
    return rank_loads(np.minimum(loads, factor), ranks)


def expanded_drop(loads: np.ndarray, ranks: int, factor: float, most: float) -> np.ndarray:
    """A rank's own tokens fill its experts to capacity, other ranks' are dropped as in Token Drop. ``most``: an
    expert's load if every token chose it, n/k."""
    own, others = min(factor, most), np.minimum(loads, factor)
    return rank_loads(own / ranks + others * (ranks - 1) / ranks, ranks)


def device_budget(loads: np.ndarray, ranks: int, factor: float) -> np.ndarray:
    return np.minimum(rank_loads(loads, ranks), factor * len(loads) / ranks)


def measured_budget(loads: np.ndarray, ranks: int) -> np.ndarray:
    rows = rank_loads(loads, ranks)
    return np.minimum(rows, np.sort(rows)[-2])


# --- times --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Times:
    fixed: float
    exchange: float
    """Seconds for each row of the busiest rank."""
    experts: Callable[[float], float]
    """Rows -> seconds, of OLMoE's experts."""
    measured: Mapping[str, Callable[[float], float]] = dataclasses.field(default_factory=dict)
    """The same of a model's own experts, by its name, where they were measured."""

    @property
    def timed(self) -> set[str]:
        """The models whose own experts these times are of."""
        return {"olmoe", *self.measured}

    def layer(self, name: str, rows: float) -> float:
        """Seconds of a layer of the model ``name`` whose busiest rank has ``rows`` rows for its routed experts."""
        model, of = MODELS[name], MODELS["olmoe"]
        dim, experts = model.dim / of.dim, self.measured.get(name, self.experts)
        scale = 1.0 if name in self.measured else dim * model.width / of.width
        shared = experts(TOKENS * model.shared) if model.shared else 0.0
        return dim * (self.fixed + self.exchange * rows) + scale * (experts(rows) + shared)


def read_times(path: Path) -> Callable[[float], float]:
    """Expert time from ``rows,seconds`` lines; linear between points, and on along the last two beyond them.

    Raises:
      ConfigError: no such file, fewer than two points, or times that are none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file) if line and not line[0].lstrip().startswith(("#", "rows"))]
        points = sorted({float(rows): float(seconds) for rows, seconds in lines}.items())
    except OSError as error:
        raise ConfigError(
            f"--times={path} cannot be read ({error.strerror}): give a file of rows,seconds lines"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--times={path}: a line is not rows,seconds ({error})") from error
    rows, seconds = np.asarray(points, np.float64).reshape(-1, 2).T
    if len(rows) < 2 or not np.isfinite(points).all() or (rows < 0).any() or (seconds <= 0).any():
        raise ConfigError(f"--times={path}: give two lines or more with rows of 0 or more and seconds above 0")
    slope = (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2])

    def at(load: float) -> float:
        beyond = max(load - rows[-1], 0.0) * max(slope, 0.0)
        return float(np.interp(load, rows, seconds)) + beyond

    return at


def rows_of_mean(model: Model) -> float:
    """Rows of one expert's mean load, over all ranks' tokens."""
    return TOKENS * model.ranks * model.k / model.experts


def placements(model: Model, count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    loads = loads_of(model.experts, model.skew)
    return [rng.permutation(loads) for _ in range(1 if model.experts == model.ranks else count)]


def default_times(count: int) -> Times:
    """The paper's bar of OLMoE without a limit, spread over the rows that its busiest rank has here."""
    model = MODELS["olmoe"]
    rows = rows_of_mean(model) * np.mean([rank_loads(loads, model.ranks).max() for loads in placements(model, count)])
    per_row = BREAKDOWN["experts"] / rows
    return Times(BREAKDOWN["gate"], BREAKDOWN["exchange"] / rows, lambda load: per_row * load)


# --- rows of the table --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    model: str
    arm: str
    factor: float | None
    busiest: float
    """Rows of the busiest rank over those of an even share, mean over placements."""
    dropped: float
    """Share of the router's pairs that are not computed."""
    layer: float
    """Speed-up over no limit."""
    published: float | None


def simulate(name: str, times: Times, count: int, spare: int = 1) -> list[Outcome]:
    """Every arm on one model."""
    model = MODELS[name]
    even, unit, most = model.experts / model.ranks, rows_of_mean(model), model.experts / model.k
    every = placements(model, count)

    def mean_time(rows: list[np.ndarray]) -> float:
        return float(np.mean([times.layer(name, r.max() * unit) for r in rows]))

    base = [rank_loads(loads, model.ranks) for loads in every]

    def outcome(arm: str, factor: float | None, rows: list[np.ndarray], dropped: float = 0.0) -> Outcome:
        published = model.layer[arm][FACTORS.index(factor)] if factor in FACTORS and arm in model.layer else None
        busiest = float(np.mean([r.max() for r in rows])) / even
        return Outcome(name, arm, factor, busiest, dropped, mean_time(base) / mean_time(rows), published)

    def lost(rows: list[np.ndarray]) -> float:
        return 1 - float(np.mean([r.sum() for r in rows])) / model.experts

    made = [outcome("no limit", None, base)]
    for factor in FACTORS:
        dropped = float(np.mean(np.maximum(every[0] - factor, 0)))
        made.append(outcome(TD, factor, [token_drop(n, model.ranks, factor) for n in every], dropped))
        made.append(outcome(XD, factor, [expanded_drop(n, model.ranks, factor, most) for n in every], dropped))
        budget = [device_budget(n, model.ranks, factor) for n in every]
        made.append(outcome("device budget", factor, budget, lost(budget)))
    measured = [measured_budget(n, model.ranks) for n in every]
    made.append(outcome("measured budget", None, measured, lost(measured)))
    made.append(outcome(f"replication, {spare} spare slot a rank", None,
                        [rank_loads(n, model.ranks, replicate(n, model.ranks, spare)) for n in every]))  # fmt: skip
    fewer = model.k - 1
    made.append(outcome(f"top-{fewer} of {model.k}", None, [r * fewer / model.k for r in base], 1 / model.k))
    return made


def result_rows(outcomes: list[Outcome], command: str, own: Container[str]) -> list[ResultRow]:
    """Rows of two tables, each marked as a simulation. ``own``: models whose own experts were timed; of the others it
    was OLMoE's, by their size."""
    facts, rows = environment_facts(), []
    facts["command"] = command
    for o in outcomes:
        label = o.arm if o.factor is None else f"{o.arm}, factor {o.factor:g}"
        whole = 1 / (1 - MOE_SHARE + MOE_SHARE / o.layer)
        for table, metric, value, published in (
            ("figure 4, simulation", "layer_speedup", o.layer, o.published),
            ("figure 5, simulation", "whole_speedup", whole, MODELS[o.model].whole.get((o.arm, o.factor or 0.0))),
        ):
            rows.append(ResultRow(
                kind="value", paper="capacity_aware", table=table, row=f"{o.model}: {label}", metric=metric,
                unit="times as fast as no limit, simulated", value=value, scale="custom", config="ep_simulation",
                baseline_row=f"{o.model}: no limit" if o.arm != "no limit" else "",
                published=published,
                published_metric="measured on 8 H20 (6 for Qwen), 2503.05066" if published else "",
                verdict_note=NOTE,
                extra={"simulation": True, "arm": f"{o.model}: {o.arm}", "busiest_over_even": o.busiest,
                       "dropped_share": o.dropped, "experts_timed": o.model if o.model in own else "olmoe, by size",
                       **({"x": o.factor, "x_name": "capacity factor"} if o.factor else {})},
                **facts,
            ))  # fmt: skip
    return rows


def render(outcomes: list[Outcome]) -> str:
    lines = [NOTE, f"{'model':9s} {'arm':32s} {'factor':>6s} {'busiest/even':>12s} {'dropped':>8s} {'layer':>7s} "
             f"{'published':>9s} {'end to end':>10s} {'published':>9s}"]  # fmt: skip
    for o in outcomes:
        whole = MODELS[o.model].whole.get((o.arm, o.factor or 0.0))
        cells = ("" if o.factor is None else f"{o.factor:g}", f"{o.busiest:.2f}", f"{o.dropped:.1%}", f"{o.layer:.2f}x",
                 f"{o.published:.2f}x" if o.published else "", f"{1 / (1 - MOE_SHARE + MOE_SHARE / o.layer):.2f}x",
                 f"{whole:.2f}x" if whole else "")  # fmt: skip
        lines.append("{:9s} {:32s} {:>6s} {:>12s} {:>8s} {:>7s} {:>9s} {:>10s} {:>9s}".format(o.model, o.arm, *cells))
    return "\n".join(lines)


def define_time_flags(values: flags.FlagValues) -> None:
    """What :func:`times_of` reads."""
    number: dict[str, Any] = {"lower_bound": 0.0, "flag_values": values}
    flags.DEFINE_list(
        "times", [], "CSV of rows,seconds: expert time of one device by load. MODEL=FILE: of that model's own experts.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float("seconds_per_row", None, "Expert time of a row, instead of --times.", **number)
    flags.DEFINE_float("seconds_fixed", None, "What a layer costs whatever the load.", **number)
    flags.DEFINE_float("exchange_seconds_per_row", None, "Permutation and exchange of a row.", **number)
    flags.DEFINE_integer("placements", 200, "Random placements of experts on ranks.", lower_bound=1, flag_values=values)


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    define_time_flags(values)
    flags.DEFINE_list("models", list(MODELS), f"Of {', '.join(MODELS)}.", flag_values=values)
    flags.DEFINE_integer(
        "spare", 1, "Slots of each rank for copies of busy experts.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("output", None, "Results file to add the rows to.", flag_values=values)


def times_of(values: flags.FlagValues, models: Sequence[str] = ()) -> Times:
    """The times that the flags give; without any those of the paper's bar.

    Args:
      models: that ``--times`` may name, and needs times of.

    Raises:
      ConfigError: both forms of expert time, only some of what is needed, a file of a model that there is not.
    """
    given = (values.seconds_per_row, values.seconds_fixed, values.exchange_seconds_per_row)
    if not values.times and all(v is None for v in given):
        return default_times(values.placements)
    parted = [text.rpartition("=") for text in values.times]
    files = {name: path for name, _, path in parted}
    if len(files) < len(parted) or any(name and name not in models for name in files):
        known = f" or MODEL=FILE, each once; models are {', '.join(models)}" if models else "; here one alone"
        raise ConfigError(f"--times={','.join(values.times)}: give FILE{known}")
    if ("" in files and values.seconds_per_row is not None) or not (files or values.seconds_per_row is not None):
        raise ConfigError("--times and --seconds_per_row both say the experts' time: give one of them")
    if values.seconds_fixed is None or values.exchange_seconds_per_row is None:
        raise ConfigError(
            "--seconds_fixed and --exchange_seconds_per_row are missing: times of the paper's bar do not go with your "
            "own expert times; give 0 to leave one out"
        )
    measured = {name: read_times(Path(path)) for name, path in files.items()}
    per_row = values.seconds_per_row
    experts = measured.pop("", None if per_row is None else lambda load: per_row * load) or measured.get("olmoe")
    if lacking := [name for name in models if experts is None and name not in measured]:
        raise ConfigError(
            f"--times={','.join(values.times)} says nothing of {lacking[0]}: add {lacking[0]}=FILE, or the times of "
            "OLMoE's experts as FILE or olmoe=FILE, which are scaled by their size"
        )
    experts = experts or next(iter(measured.values()))  # not asked for: every model has its own
    return Times(values.seconds_fixed, values.exchange_seconds_per_row, experts, measured)


def command(values: flags.FlagValues) -> int:
    if unknown := [name for name in values.models if name not in MODELS]:
        raise ConfigError(f"--models={unknown[0]}: choose among {', '.join(MODELS)}")
    if values.output:
        session.check_output(values.output)
    times = times_of(values, values.models)
    outcomes = [o for name in values.models for o in simulate(name, times, values.placements, values.spare)]
    print(render(outcomes), flush=True)
    if values.output:
        append_rows(Path(values.output), result_rows(outcomes, session.command_line(), times.timed))
        session.say(f"rows in {values.output}")
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
