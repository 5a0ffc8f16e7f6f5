"""What ``experiments.drop_speed`` times of one MoE layer: a prefill, the experts' kernels alone, and decoding.

Letters: T tokens, P pairs, E experts, D model, F expert hidden.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels_pallas
from experiments import drop_scores, ep_speed
from experiments.drop_scores import Arm, Setting
from kernels_pallas.grouped_matmul.ffn import Weights
from kernels_pallas.grouped_matmul.mosaic_gpu.trial import compared
from kernels_pallas.rivals import timing
from moejax import limits, partition, thresholds
from moejax.config import ConfigError
from moejax.experts import grouped_ffn
from moejax.moe import MoELayer
from moejax.results import ResultRow
from moejax.thresholds import ScoreTable
from moejax.types import InFlight, Limit, RouteContext

ERROR = 1e-2
"""Relative norm of the difference of two forms in bfloat16: hidden values and outputs are rounded to 2^-9, and each
sub-expert's output by itself."""
WRONG_TOKEN, WRONG_SHARE = 5e-2, 1e-3
"""A token may differ by more where two programs' scores, equal up to their last bits, lie on the two sides of a
threshold or of the top-k: so many at most."""
DRAWS = 32
"""Steps of one decoding program, each with tokens of its own."""
SPLIT_RATE = 0.25
"""Arms of this rate, and the one without a limit, are profiled too."""
PUBLISHED = "MoE 1.17-1.23x, end to end 1.07-1.12x at 22-27 % (2508.18376, Figure 10, H20)"


@dataclasses.dataclass(frozen=True)
class How:
    """How to measure."""

    rates: list[float]
    batches: list[int]
    """Tokens of a decoding step."""
    decode_rate: float
    repeats: int
    target_ms: float
    profile: bool
    tiny: bool


@dataclasses.dataclass(frozen=True)
class Ready:
    """A layer with its tokens and arms."""

    setting: Setting
    layer: MoELayer
    x: jax.Array
    table: ScoreTable
    arms: list[Arm]
    run: dict[str, Callable[..., Any]]
    """:func:`layer_output` for each kind of arm."""
    sizes: dict[str, jax.Array]
    """Rows of each group, by the label of the arm."""
    facts: dict[str, dict[str, Any]]
    """What each arm drops and its error, by its label."""


# --- programs -------------------------------------------------------------------------------------


def layer_output(layer: MoELayer, x: jax.Array, in_force: tuple[Limit, ...]) -> tuple[jax.Array, jax.Array]:
    """What is timed: the output, and the rows of each group of the experts, which the layer has at hand. Metrics are
    not asked for, so that none is computed."""
    flight = layer.begin(x, RouteContext(), in_force)
    assert not isinstance(flight.plan, tuple)
    return layer.complete(flight, x)[0], flight.plan.group_sizes[0]


def steps(layer: MoELayer, xs: jax.Array, in_force: tuple[Limit, ...]) -> tuple[jax.Array, jax.Array]:
    """The layer on one batch after another."""
    return lax.scan(lambda none, x: (none, layer_output(layer, x, in_force)), None, xs)[1]


def flight_of(layer: MoELayer, x: Any, in_force: tuple[Limit, ...]) -> InFlight:
    """A layer's flight without data: what is static of it."""
    return jax.eval_shape(lambda layer, x, f: layer.begin(x, RouteContext(), f), layer, x, in_force)


def compiled(jobs: Mapping[Any, tuple[Callable[..., Any], tuple]]) -> dict[Any, Callable[..., Any]]:
    """The programs of functions on their arguments, compiled beside one another."""
    lowered = {name: jax.jit(fn).lower(*arguments) for name, (fn, arguments) in jobs.items()}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        made = pool.map(lambda one: one.compile(), lowered.values())
        return dict(zip(lowered, made, strict=True))


def programs(fn: Callable[..., Any], layer: Any, x: jax.Array, arms: list[Arm]) -> dict[str, Callable[..., Any]]:
    """A program of ``fn`` for each kind of arm."""
    return compiled({arm.program: (fn, (layer, x, arm.limits)) for arm in arms})


def with_config(layer: MoELayer, **changes: Any) -> MoELayer:
    """The same arrays under another config."""
    other = jax.tree.map(lambda leaf: leaf, layer)
    other.config = dataclasses.replace(layer.config, **changes)
    return other


# --- timing ---------------------------------------------------------------------------------------


def in_turn(
    calls: Mapping[str, Callable[[], Any]], repeats: int, target_ms: float, per_call: int = 1
) -> dict[str, timing.Timings]:
    """:func:`kernels_pallas.rivals.timing.in_turns` of JAX programs."""
    return timing.in_turns(calls, jax.block_until_ready, repeats, target_ms, per_call)


def gain(slow: timing.Timings, fast: timing.Timings) -> tuple[float, tuple[float, float]]:
    """How many times as fast ``fast`` is: the median of paired ratios, and its 90 % interval."""
    ratio, half = compared(fast, slow)
    return ratio, (ratio - half, ratio + half)


def figures(arm: Arm, times: dict[str, timing.Timings]) -> dict[str, Any]:
    """Value and interval of an arm's row, and its times; of 2T-Drop also how it compares with 1T-Drop."""
    ratio, interval = gain(times["none"], times[arm.label])
    extra: dict[str, Any] = times[arm.label].fields()
    beside = f"1T, {arm.rate:.0%}"
    if arm.program == "2T" and beside in times:
        extra["speed_over_1t"], extra["speed_over_1t_interval"] = gain(times[beside], times[arm.label])
    return {"value": ratio, "interval": interval, "extra": extra}


INTERVAL = "90 %, bootstrap of the median of paired timings"


def row_of(shared: dict[str, Any], label: str, metric: str, found: dict[str, Any], **extra: Any) -> ResultRow:
    return ResultRow(
        **shared, row=label, metric=metric, unit="times no limit", value=found["value"], interval=found["interval"],
        interval_kind=INTERVAL, extra=extra | found["extra"],
    )  # fmt: skip


# --- getting ready --------------------------------------------------------------------------------


def ready(setting: Setting, how: How) -> Ready:
    """The layer, its arms and what they drop, checked against the reference.

    Raises:
      ConfigError: outputs that are not those of the reference.
    """
    layer = drop_scores.make_layer(setting)
    x = drop_scores.make_tokens(setting, setting.tokens)[None]
    table = drop_scores.scores_of(layer, x)
    arms = drop_scores.arms_of(table, how.rates, setting.moe.expert_dim)
    run = programs(layer_output, layer, x, arms)
    sizes, facts = check(setting, layer, x, arms, run)
    return Ready(setting, layer, x, table, arms, run, sizes, facts)


def dropped(setting: Setting, sizes: np.ndarray, extents: tuple[int, ...] | None, tokens: int) -> dict[str, Any]:
    """What is missing of ``tokens`` tokens' routed work, by the rows of each group (``sizes [..., groups]``), and the
    speed-up that this allows."""
    moe, width = setting.moe, setting.moe.expert_dim
    of_group = np.asarray(extents or (width,)) / width
    rows = sizes.reshape(-1, moe.num_experts, len(of_group)).sum(0, dtype=np.float64)
    routed = float(tokens * moe.router.k)
    rate = 1 - float((rows * of_group).sum()) / routed
    of_all = thresholds.with_shared(rate, moe.router.k, moe)
    return {
        "drop_rate": rate, "drop_rate_with_shared_experts": of_all, "proportional_limit": 1 / (1 - of_all),
        "pairs": routed, "halved_pairs_share": float(rows[:, 1:].sum()) / routed,
        "max_over_mean": float(rows.sum(1).max() / rows.sum(1).mean()),
    }  # fmt: skip


def halves(setting: Setting) -> bool:
    """Whether the major neurons are just one half, so that two sub-experts are the same computation."""
    width = setting.moe.expert_dim
    return 2 * limits.major_columns(width) == width


def reference_of(setting: Setting) -> str:
    return f"padded, {'two sub-experts' if halves(setting) else 'extents'}"


def check(
    setting: Setting, layer: MoELayer, x: jax.Array, arms: list[Arm], run: dict[str, Callable[..., Any]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, Any]]]:
    """Rows of each group and facts of each arm, whose outputs by ``run`` are compared with those of the reference form
    by the back end ``padded``.

    Raises:
      ConfigError: one is wrong: nothing may be timed.
    """
    form = "split" if halves(setting) else "extent"

    def in_form(limit: Limit) -> Limit:
        halving = isinstance(limit, limits.ThresholdDrop) and limit.gap is not None
        return dataclasses.replace(limit, form=form) if halving else limit

    def slow(arm: Arm) -> Arm:
        return dataclasses.replace(arm, limits=tuple(map(in_form, arm.limits)))

    reference, all_sizes, facts = with_config(layer, implementation="padded"), {}, {}
    other = programs(layer_output, reference, x, [slow(arm) for arm in arms])
    for arm in arms:
        y, sizes = run[arm.program](layer, x, arm.limits)
        expected, _ = other[arm.program](reference, x, slow(arm).limits)
        error, wrong = (float(value) for value in difference(y, expected))
        if not (error <= ERROR and wrong <= WRONG_SHARE):
            raise ConfigError(
                f"WRONG: {setting.name}, {arm.label}: the output differs by {error:.1e} from that of the reference "
                f"({reference_of(setting)}), {wrong:.2%} of the tokens by more than {WRONG_TOKEN:g}; nothing was timed"
            )
        told = dropped(setting, np.asarray(sizes), flight_of(layer, x, arm.limits).extents, setting.tokens)
        all_sizes[arm.label] = sizes
        facts[arm.label] = arm.facts | told | {
            "asked_rate": arm.rate, "error": error, "checked_against": reference_of(setting),
        }  # fmt: skip
    return all_sizes, facts


@jax.jit
def difference(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Relative norm of ``a - b``, and the share of tokens whose own is above :data:`WRONG_TOKEN`."""
    a, b = (z.reshape(-1, z.shape[-1]).astype(jnp.float32) for z in (a, b))
    off, size = jnp.linalg.norm(a - b, axis=-1), jnp.linalg.norm(b, axis=-1)
    wrong = ~(off <= WRONG_TOKEN * size)  # NaN is wrong; a token without experts is 0 in both
    return jnp.linalg.norm(off) / jnp.linalg.norm(size), jnp.mean(wrong, dtype=jnp.float32)


# --- a prefill ------------------------------------------------------------------------------------


def layer_rows(it: Ready, how: How, shared: dict[str, Any]) -> Iterator[ResultRow]:
    """The whole layer."""
    calls = {arm.label: functools.partial(it.run[arm.program], it.layer, it.x, arm.limits) for arm in it.arms}
    times = in_turn(calls, how.repeats, how.target_ms)
    for arm in it.arms:
        found, facts = figures(arm, times), dict(it.facts[arm.label])
        facts |= of_limit(found["value"], facts["proportional_limit"])
        facts |= {"published": PUBLISHED} if it.setting.shape.published else {}
        if how.profile and arm.rate in (0.0, SPLIT_RATE):
            split = ep_speed.profiled(it.run[arm.program], (it.layer, it.x, arm.limits), None)
            facts |= {"split_ms": split} if split else {"no_split": "no device events in the profile"}
        yield row_of(shared, f"{it.setting.name}, {arm.label}", "speedup/layer", found, **facts)


def of_limit(speedup: float, limit: float) -> dict[str, Any]:
    """A speed-up as a share of the proportional limit, and its gain over 1 as a share of the limit's: the stricter."""
    gain = (speedup - 1) / (limit - 1) if limit > 1 else None
    return {"proportional_limit": limit, "share_of_proportional_limit": speedup / limit, "share_of_gain": gain}


def experts_rows(it: Ready, how: How, shared: dict[str, Any]) -> Iterator[ResultRow]:
    """The experts' kernels on the same rows and group sizes. Their limit counts routed work alone."""
    activation, implementation = it.layer.activation, it.layer.config.implementation
    xs = jax.jit(lambda layer, x: layer.begin(x, RouteContext(), ()).xs[0])(it.layer, it.x)
    weights = it.layer.store.get()
    jobs = {}
    for arm in it.arms:
        flight = flight_of(it.layer, it.x, arm.limits)

        def ffn(weights: Any, xs: jax.Array, sizes: jax.Array, flight: InFlight = flight) -> jax.Array:
            parts = partition.split(weights, flight.split)
            return grouped_ffn(xs, sizes, parts, activation, implementation, flight.extents)

        jobs[arm.program] = (ffn, (weights, xs, it.sizes[arm.label]))
    run = compiled(jobs)
    calls = {arm.label: functools.partial(run[arm.program], weights, xs, it.sizes[arm.label]) for arm in it.arms}
    times = in_turn(calls, how.repeats, how.target_ms)
    for arm in it.arms:
        found, facts = figures(arm, times), dict(it.facts[arm.label])
        done = it.setting.flops * facts["pairs"] * (1 - facts["drop_rate"])
        facts |= of_limit(found["value"], 1 / (1 - facts["drop_rate"])) | {
            "groups": len(it.sizes[arm.label]), "tflop_per_s": done / times[arm.label].median / 1e12,
        }  # fmt: skip
        yield row_of(shared, f"{it.setting.name}, {arm.label}", "speedup/experts", found, **facts)


# --- decoding -------------------------------------------------------------------------------------


def decode_arms(it: Ready, rate: float) -> list[Arm]:
    """Arms of one rate, by the thresholds of the prefill's tokens, and opportunistic dropping."""
    k = it.setting.moe.router.k
    keeps = sorted({max(1, k // 2), max(1, k // 4)}, reverse=True)
    opportunistic = [
        Arm("opportunistic", 0.0, (limits.opportunistic_drop(keep=keep),), {"keep": f"keep={keep}"}) for keep in keeps
    ]
    return drop_scores.arms_of(it.table, [rate], it.setting.moe.expert_dim) + opportunistic


def moved(it: Ready, sizes: np.ndarray, extents: tuple[int, ...] | None, batch: int) -> dict[str, float]:
    """Experts touched in a step, of ``sizes [steps, groups]``, and the bytes that a step must move: the columns of
    experts that some row needs, the router, shared experts, tokens in and out."""
    moe, dim = it.setting.moe, it.setting.dim
    widths = np.asarray(extents or (moe.expert_dim,))
    needed = np.where(sizes.reshape(len(sizes), -1, len(widths)) > 0, widths, 0).max(-1)
    shared = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(it.layer.shared))
    fixed = 4 * dim * moe.num_experts + shared + 2 * 2 * batch * dim
    return {
        "touched_experts": float((needed > 0).sum(1).mean()),
        "touched_experts_major_only": float(((needed > 0) & (needed < moe.expert_dim)).sum(1).mean()),
        "bytes": float(2 * 3 * dim * needed.sum(1).mean() + fixed),
    }


def decode_rows(it: Ready, how: How, shared: dict[str, Any]) -> Iterator[ResultRow]:
    """Steps of single tokens, by batch size."""
    arms, draws = decode_arms(it, how.decode_rate), 2 if how.tiny else DRAWS
    for batch in how.batches:
        xs = drop_scores.make_tokens(it.setting, draws * batch, seed=batch)
        xs = xs.reshape(draws, batch, 1, it.setting.dim)
        run = programs(steps, it.layer, xs, arms)
        calls = {arm.label: functools.partial(run[arm.program], it.layer, xs, arm.limits) for arm in arms}
        times = in_turn(calls, how.repeats, how.target_ms, per_call=draws)
        facts = {}
        for arm in arms:
            sizes = np.asarray(calls[arm.label]()[1])
            extents = flight_of(it.layer, xs[0], arm.limits).extents
            told = dropped(it.setting, sizes, extents, batch * draws)
            rates = {name: told[name] for name in ("drop_rate", "drop_rate_with_shared_experts")}
            facts[arm.label] = arm.facts | rates | moved(it, sizes, extents, batch)
        for arm in arms:
            mine, found = facts[arm.label], figures(arm, times)
            mine |= {
                "asked_rate": arm.rate, "tokens": batch, "bound_by_bytes": facts["none"]["bytes"] / mine["bytes"],
                "gb_per_s": mine["bytes"] / times[arm.label].median / 1e9, "implementation": chosen(it, batch, arm),
            }  # fmt: skip
            yield row_of(shared, f"{it.setting.name}, {arm.label}", f"speedup/decode/{batch}", found, **mine)


def chosen(it: Ready, tokens: int, arm: Arm) -> str:
    """The back end that computes the experts for so many tokens of an arm.

    Raises:
      ConfigError: none can.
    """
    x = jax.ShapeDtypeStruct((tokens, 1, it.setting.dim), it.x.dtype)
    flight = flight_of(it.layer, x, arm.limits)
    xs, sizes = (jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in (flight.xs, flight.plan.group_sizes))  # ty: ignore
    w = jax.eval_shape(lambda: partition.split(it.layer.store.get(), flight.split))
    name = it.layer.config.implementation
    told = kernels_pallas.GROUPED_FFN.explain(
        xs, sizes, Weights(w.gate, w.up, w.down), it.layer.activation,
        extents=None if flight.extents is None else sizes, implementation=None if name == "auto" else name,
    )  # fmt: skip
    if told.chosen is None:
        raise ConfigError(f"no back end can run {it.setting.name} here: {told}")
    return told.chosen


PARTS: dict[str, Callable[[Ready, How, dict[str, Any]], Iterator[ResultRow]]] = {
    "layer": layer_rows, "experts": experts_rows, "decode": decode_rows,
}  # fmt: skip
"""What of a layer can be timed."""
