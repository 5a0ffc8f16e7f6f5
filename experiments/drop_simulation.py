"""What threshold dropping saves on ranks of expert parallelism, and what its load-aware thresholds add: a simulation
from a trace's routing and times of one device (DualSparse-MoE, 2508.18376, section 3.3 and Figure 11).

    python -m experiments.trace --checkpoint=runs/model --output=trace.npz
    python -m experiments.drop_simulation --trace=trace.npz [--ranks=8] [--threshold=0.1 | --drop_rate=0.25]
        [--gap=0.01] [--times=times.csv --seconds_fixed=5e-4 --exchange_seconds_per_row=1e-7] [--spare=1]
        [--output=simulated.jsonl]

Experts lie on the ranks in their natural order. One threshold T for all arms: the largest that a rank may have. Work is
counted batch by batch and layer by layer: pairs of each rank, a halved one as the share of its neurons that is left.
``busiest`` is the largest rank's work over an even share of the routed work, ``load gain`` that of no dropping over it
(each a mean of times: sums over batches and layers). A layer takes::

    seconds_fixed + max over ranks (exchange_seconds_per_row * pairs + expert time(work)) + expert time(shared experts)

with ``--tokens`` tokens on a rank, whatever the batch of the trace had. Times are those of a layer of this model;
without flags those of ``experiments.ep_simulation``, read off a chart of OLMoE. Replication keeps all pairs: the
busiest experts of the whole trace get copies in ``--spare`` slots more on each rank (``moejax.replication``).

Loads of layers after the first are those of the recorded inputs: dropping would have changed them.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import ep_simulation, session
from moejax import limits, routing, trace
from moejax.config import ConfigError, ExperimentConfig
from moejax.moe import shared_width
from moejax.replication import rank_loads, replicate
from moejax.results import ResultRow, append_rows, environment_facts
from moejax.types import RouteContext, Routing

PAPER, TABLE = "dualsparse", "figure 11, simulation"
PUBLISHED = 1.41
"""MoE speed-up of 2T with the paper's load-aware thresholds: DeepSeek-V2-Lite-Chat on 8 H20, EP of 8."""
NOTE = "simulation of {ranks} ranks from a trace and times of one device; nothing was run on several"
RULES = ("none", "paper", "water")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to drop. ``form``: none, 1T, 2T."""

    form: str
    load_aware: str = "none"

    @property
    def name(self) -> str:
        return self.form if self.load_aware == "none" else f"{self.form}, load-aware: {self.load_aware}"

    def limits(self, threshold: tuple[float, ...], gap: float, ranks: int) -> tuple:
        if self.form == "no drop":
            return ()
        aware: dict[str, Any] = {} if self.load_aware == "none" else {"load_aware": self.load_aware, "ranks": ranks}
        return (limits.threshold_drop(threshold, gap=gap if self.form == "2T" else None, **aware),)


NONE = Arm("no drop")
ARMS = (NONE, *(Arm(form, rule) for form in ("1T", "2T") for rule in RULES))


class Loads:
    """Of every batch and layer, by arm: pairs and work of each rank, ``[batches, L, ranks]``; and the work of each
    expert without dropping."""

    def __init__(self, ranks: int, experts: int, major: float) -> None:
        self.ranks, self.experts, self.major = ranks, experts, major
        self.pairs: dict[Arm, list[np.ndarray]] = {arm: [] for arm in ARMS}
        self.work: dict[Arm, list[np.ndarray]] = {arm: [] for arm in ARMS}
        self.of_experts: list[np.ndarray] = []
        self.tokens: list[int] = []

    def add(self, chunk: trace.Chunk, threshold: tuple[float, ...], gap: float, expert_dim: int) -> None:
        """One batch."""
        layers = chunk.made.expert.shape[0]
        made = jax.tree.map(lambda leaf: leaf.reshape(layers, -1, leaf.shape[-1]), chunk.made)
        self.tokens.append(int(chunk.tokens["mask"].sum()))
        self.of_experts.append(rank_sums(made.expert, np.asarray(made.valid, np.float64), self.experts, self.experts))
        for arm in ARMS:
            valid, level = jax.device_get(left(made, arm.limits(threshold, gap, self.ranks), expert_dim))
            pairs = np.asarray(valid, np.float64)
            done = pairs if level is None else pairs * np.where(level == 1, self.major, 1.0)
            self.pairs[arm].append(rank_sums(made.expert, pairs, self.experts, self.ranks))
            self.work[arm].append(rank_sums(made.expert, done, self.experts, self.ranks))


@functools.partial(jax.jit, static_argnames="expert_dim")
def left(made: Routing, in_force: tuple, expert_dim: int) -> tuple[jax.Array, jax.Array | None]:
    """Which pairs of each layer limits leave, and at which level. All tokens are one rank's: loads are of them all."""

    def of_layer(made: Routing, layer: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        kept = limits.apply(limits.for_layer(in_force, layer), made, RouteContext(expert_dim=expert_dim))
        return kept.valid, kept.level

    return jax.vmap(of_layer)(made, jnp.arange(made.expert.shape[0]))


def rank_sums(expert: np.ndarray, value: np.ndarray, experts: int, ranks: int) -> np.ndarray:
    """Sums of ``value`` over the pairs of each layer and rank, ``[L, ranks]``; zero-computation experts lie on none."""
    layers = expert.shape[0]
    device = np.minimum(expert.reshape(layers, -1).astype(np.int64) // (experts // ranks), ranks)
    index = device + (ranks + 1) * np.arange(layers)[:, None]
    sums = np.bincount(index.ravel(), value.ravel(), minlength=layers * (ranks + 1))
    return sums.reshape(layers, ranks + 1)[:, :ranks]


def collect(source: trace.Trace, threshold: tuple[float, ...], gap: float, ranks: int) -> Loads:
    """Loads of all arms, from one pass over the trace."""
    moe = source.config.model.moe
    made = Loads(ranks, source.num_experts, limits.major_columns(moe.expert_dim) / moe.expert_dim)
    for chunk in source:
        made.add(chunk, threshold, gap, moe.expert_dim)
    return made


def threshold_for(source: trace.Trace, rate: float) -> float:
    """The threshold, one for all layers, at which 1T-Drop drops the share ``rate`` of all pairs."""
    shares = []
    for chunk in source:
        made = chunk.made
        score = np.where(made.valid, made.score, 0.0)
        whole = score.sum(axis=-1, keepdims=True)
        counts = made.valid & (made.expert < source.num_experts)
        shares.append((score / np.where(whole > 0, whole, 1.0))[counts])
    return float(np.quantile(np.concatenate(shares), rate, method="lower"))


# --- times --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    arm: str
    drop_rate: float
    busiest: float
    """Work of the busiest rank over an even share of the routed work."""
    gain: float
    """That of no dropping over this one's."""
    layer: float
    """Speed-up of the layer over no dropping, by the times."""
    published: float | None = None


def seconds(times: ep_simulation.Times, pairs: np.ndarray, work: np.ndarray, unit: np.ndarray, shared: float) -> float:
    """Mean over batches, by their tokens, of the sum over layers. ``unit``: rows for each pair of a batch."""
    total = 0.0
    for rows, done, scale in zip(pairs, work, unit, strict=True):
        of_layers = [
            max(times.exchange * r * scale + times.experts(w * scale) for r, w in zip(*layer, strict=True))
            for layer in zip(rows, done, strict=True)
        ]
        total += (sum(of_layers) + len(of_layers) * (times.fixed + shared)) / scale
    return total / float(np.sum(1 / unit))


def outcomes(
    made: Loads, config: ExperimentConfig, times: ep_simulation.Times, tokens: int, spare: int
) -> list[Outcome]:
    """Every arm, and replication."""
    moe, ranks = config.model.moe, made.ranks
    unit = ranks * tokens / np.maximum(np.asarray(made.tokens, np.float64), 1)
    width = shared_width(moe)
    shared = times.experts(tokens * width / moe.expert_dim) if width else 0.0
    whole = np.stack(made.work[NONE])
    even = whole.mean(axis=2).sum()
    none = whole.max(axis=2).sum()
    slowest = seconds(times, whole, whole, unit, shared)

    def outcome(name: str, pairs: np.ndarray, work: np.ndarray, published: float | None = None) -> Outcome:
        most = work.max(axis=2).sum()
        taken = seconds(times, pairs, work, unit, shared)
        return Outcome(name, 1 - float(work.sum() / whole.sum()), float(most / even), float(none / most),
                       slowest / taken, published)  # fmt: skip

    found = []
    for arm in ARMS:
        published = PUBLISHED if arm == Arm("2T", "paper") and ranks == 8 else None
        found.append(outcome(arm.name, np.stack(made.pairs[arm]), np.stack(made.work[arm]), published))
    if spare:
        of_experts = np.stack(made.of_experts)
        placed = [replicate(layer, ranks, spare) for layer in of_experts.sum(axis=0)]
        spread = np.asarray([[rank_loads(n, ranks, p) for n, p in zip(b, placed, strict=True)] for b in of_experts])
        found.append(outcome(f"replication, {spare} spare slot{'s' * (spare > 1)} a rank", spread, spread))
    return found


def by_layer(made: Loads, spare: int) -> list[tuple[float, float]]:
    """Max/mean of the ranks of each layer, mean over batches: in natural order, and with replication."""
    rows = []
    for layer in np.moveaxis(np.stack(made.of_experts), 1, 0):
        placement = replicate(layer.sum(axis=0), made.ranks, spare)
        natural, copied = (
            np.stack([rank_loads(batch, made.ranks, p) for batch in layer]).max(axis=1).sum() for p in (None, placement)
        )
        even = max(layer.sum() / made.ranks, 1e-20)
        rows.append((float(natural / even), float(copied / even)))
    return rows


# --- the command --------------------------------------------------------------------------------------------------


def render(found: list[Outcome], layers: list[tuple[int, tuple[float, float]]], head: str) -> str:
    lines = [head, f"{'layer':>6s} {'max/mean':>9s} {'replicated':>11s}"]
    lines += [f"{layer:6d} {natural:9.2f} {copied:11.2f}" for layer, (natural, copied) in layers]
    lines.append(f"{'arm':34s} {'drop rate':>9s} {'busiest':>8s} {'load gain':>10s} {'layer':>8s} {'published':>10s}")
    for o in found:
        published = f"{o.published:.2f}x" if o.published else ""
        lines.append(f"{o.arm:34s} {o.drop_rate:9.1%} {o.busiest:8.2f} {o.gain:9.2f}x {o.layer:7.2f}x {published:>10s}")
    return "\n".join(lines)


def result_rows(
    found: list[Outcome], source: trace.Trace, threshold: tuple[float, ...], gap: float, ranks: int, command: str
) -> list[ResultRow]:
    """A row for each arm, marked as a simulation."""
    config, facts = source.config, environment_facts()
    facts["command"] = command
    text = "/".join(f"{t:.4g}" for t in threshold)
    at = f"T={text}, {ranks} ranks"
    return [
        ResultRow(
            kind="value", paper=PAPER, table=TABLE, row=f"{o.arm}, {at}", metric="layer_speedup",
            unit="times as fast as no drop, simulated", value=o.layer, scale="custom", config=config.name,
            config_hash=source.meta["config_hash"], batch_shape=tuple(source.meta["batch_shape"]),
            baseline_row="" if o.arm == NONE.name else f"{NONE.name}, {at}", published=o.published,
            published_metric="measured on 8 H20, DeepSeek-V2-Lite-Chat, 2508.18376, Figure 11" if o.published else "",
            verdict_note=NOTE.format(ranks=ranks),
            extra={"simulation": True, "arm": o.arm, "drop_rate": o.drop_rate, "busiest_over_even": o.busiest,
                   "load_gain": o.gain, "threshold": list(threshold), "gap": gap, "ranks": ranks,
                   "trace_tokens": source.meta["tokens"]},
            **facts,
        )
        for o in found
    ]  # fmt: skip


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    whole: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("trace", None, "File that experiments.trace wrote, without a limit in force.", **whole)
    flags.DEFINE_integer("ranks", 8, "Ranks of expert parallelism.", lower_bound=2, **whole)
    flags.DEFINE_list("threshold", [], "T, or one for each MoE layer.", **whole)
    flags.DEFINE_float("drop_rate", None, "Instead: T at which 1T drops this share of pairs.", 0.0, 1.0, **whole)
    flags.DEFINE_float("gap", 0.01, "Of 2T: T - gap and T + gap.", 0.0, 1.0, **whole)
    flags.DEFINE_integer("tokens", ep_simulation.TOKENS, "Tokens of each rank.", lower_bound=1, **whole)
    flags.DEFINE_integer("spare", 1, "Slots of each rank for copies of busy experts; 0: none.", lower_bound=0, **whole)
    flags.DEFINE_string("output", None, "Results file to add the rows to.", **whole)
    ep_simulation.define_time_flags(values)


def read_threshold(values: flags.FlagValues, source: trace.Trace) -> tuple[float, ...]:
    """Raises ConfigError for none, both, or what is no threshold."""
    if bool(values.threshold) == (values.drop_rate is not None):
        raise ConfigError("give --threshold=T, or --drop_rate=0.25 for the T that drops so much: one of them")
    if values.drop_rate is not None:
        return (threshold_for(source, values.drop_rate),)
    try:
        made = tuple(float(text) for text in values.threshold)
    except ValueError as error:
        raise ConfigError(f"--threshold={','.join(values.threshold)}: give numbers") from error
    if len(made) not in (1, len(source.layers)):
        raise ConfigError(
            f"--threshold={','.join(values.threshold)}: {len(made)} thresholds for {len(source.layers)} MoE layers; "
            "give one for each, or one"
        )
    return made


def command(values: flags.FlagValues) -> int:
    if not values.trace:
        raise ConfigError("--trace is missing: record one with experiments.trace --checkpoint=DIR --output=FILE")
    if values.output:
        session.check_output(values.output)
    times = ep_simulation.times_of(values)
    with trace.read(values.trace) as source:
        if not routing.FAMILIES[source.router.name].causal:
            raise ConfigError(f"{values.trace} is of router.name={source.router.name!r}, where experts choose tokens: "
                              "their loads are equal, and there is nothing to even out")  # fmt: skip
        experts = source.num_experts
        if experts % values.ranks:
            divisors = [d for d in range(2, experts + 1) if experts % d == 0]
            raise ConfigError(f"--ranks={values.ranks} does not divide the {experts} experts: choose one of {divisors}")
        if values.spare > experts - experts // values.ranks:
            raise ConfigError(f"--spare={values.spare}: a rank of {values.ranks} has use for "
                              f"{experts - experts // values.ranks} copies at most")  # fmt: skip
        threshold = read_threshold(values, source)
        limits.threshold_drop(threshold, gap=values.gap)  # refuses what is out of range
        if source.meta["limits"]:
            session.say(f"note: recorded with {source.meta['limits']} in force: later layers saw what it left")
        per_layer = threshold if len(threshold) > 1 else threshold * len(source.layers)
        made = collect(source, per_layer, values.gap, values.ranks)
        found = outcomes(made, source.config, times, values.tokens, values.spare)
        text = "/".join(f"{t:.4g}" for t in threshold)
        head = f"{NOTE.format(ranks=values.ranks)}\n{source.meta['tokens']:,} tokens, {experts} experts, T={text}"
        layers = list(zip(source.layers, by_layer(made, values.spare), strict=True))
        print(render(found, layers, head), flush=True)
        if values.output:
            rows = result_rows(found, source, threshold, values.gap, values.ranks, session.command_line())
            append_rows(Path(values.output), rows)
            session.say(f"rows in {values.output}")
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
