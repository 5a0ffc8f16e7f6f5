"""Runs routers, limits and policies on a recorded trace, offline, and prints what they would keep and load.

    python -m experiments.replay --trace=trace.npz --factors=0.5,1,1.5 [--orders=score,random]
    python -m experiments.replay --trace=trace.npz --config=FILE --config.model.moe.router.k=1 --output=out.npz
    python -m experiments.replay --trace=trace.npz --limit=device_budget:factor=1,ranks=4 --limit=reroute:factor=1
    python -m experiments.replay --trace=trace.npz --fit_factors=1.0
    python -m experiments.replay --trace=trace.npz --policy=lru --cached=2,4,8

Router and limits are those of ``--config`` (default: the run's own), limits swept by ``--factors`` and ``--orders``,
or named by ``--limit`` (``docs/limits.md``); ``--fit_factors`` prints a factor for each layer.
``--output`` takes the decisions, in the format of a trace. Exact for the first MoE layer; a later layer's input would
have changed with the earlier ones' decisions, and its figures are of the recorded input (``docs/traces.md``).
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import session
from moejax import replay, trace
from moejax.config import ConfigError, ExperimentConfig, MoEConfig
from moejax.interrupt import exit_code
from moejax.limits import of_config
from moejax.types import Routing


def numbers(values: flags.FlagValues, name: str, kind: type) -> list[Any]:
    """The numbers of a list flag.

    Raises:
      ConfigError: one of them is none, or below 0 (whole numbers: below 1).
    """
    made, given = [], getattr(values, name)
    for text in given:
        try:
            number = kind(text)
        except ValueError as error:
            raise ConfigError(f"--{name}={','.join(given)}: {text!r} is no {kind.__name__}") from error
        if not number >= (1 if kind is int else 0):
            raise ConfigError(f"--{name}: {text} must be {1 if kind is int else 0} or more")
        made.append(number)
    return made


def sweep(moe: MoEConfig, factors: list[float], orders: list[str], texts: Sequence[str] = ()) -> list[MoEConfig]:
    """``moe`` under each order and factor, the dropless one (factor 0) once; or under each limit of ``texts``."""
    if texts:
        return [dataclasses.replace(moe, capacity_factor=0.0, capacity_limits=(text,)) for text in texts]
    made: dict[MoEConfig, None] = {}
    if factors:
        moe = dataclasses.replace(moe, capacity_limits=())
    for order in orders or [moe.capacity_order]:
        for factor in factors or [moe.capacity_factor]:
            # Without a limit no order acts: one entry, whatever orders are swept.
            order_in_force: Any = order if factor else moe.capacity_order
            made[dataclasses.replace(moe, capacity_factor=factor, capacity_order=order_in_force)] = None
    return list(made)


def name_of(moe: MoEConfig) -> str:
    described = trace.describe_limits(of_config(moe))
    limits = [" ".join([limit.pop("name"), *(f"{k}={v}" for k, v in limit.items())]) for limit in described]
    return f"router {moe.router.name} k={moe.router.k}, " + ("; ".join(limits) or "no limit")


def output_of(output: Path, moe: MoEConfig, settings: int) -> Path:
    """The file of one setting: ``output``, or with several of them its name with what it limits."""
    if settings == 1:
        return output
    if moe.capacity_limits:
        return output.with_stem(f"{output.stem}-{re.sub(r'[^a-z0-9.]+', '-', '-'.join(moe.capacity_limits))}")
    return output.with_stem(f"{output.stem}-{moe.capacity_order}-{moe.capacity_factor:g}")


def run_setting(
    source: trace.Trace,
    config: ExperimentConfig,
    setting: replay.Setting,
    *,
    output: Path | None = None,
    policy: str | None = None,
    sizes: tuple[int, ...] = (),
) -> tuple[list[dict[str, Any]], dict[int, np.ndarray], int | None]:
    """One pass over the trace.

    Returns:
      The rows of :meth:`moejax.replay.Tally.rows`; hit rates of each layer by size, with a ``policy``; and how many
      pairs differ from the recorded ones (None where the setting is not the recorded one).
    """
    tally, differ = replay.Tally(), 0
    recorded = (
        setting.router is None
        and setting.ranks == source.ranks
        and trace.describe_limits(setting.limits) == source.meta["limits"]
    )

    def decided(writer: trace.TraceWriter | None) -> Iterator[trace.Chunk]:
        nonlocal differ
        for chunk in source:
            made, sums = replay.decide(chunk, setting, source.state)
            tally.add(sums)
            if recorded:
                differ += pairs_that_differ(made.kept, chunk.kept)
            if writer is not None:
                writer.add(made)
            yield made

    with contextlib.ExitStack() as stack:
        writer = None
        if output is not None:
            facts = {k: source.meta[k] for k in ("checkpoint", "tokenizer", "data", "seed") if k in source.meta}
            meta = trace.header(
                config, setting.limits, ranks=setting.ranks, batch_shape=tuple(source.meta["batch_shape"]),
                dtype=source.meta["dtype"], logits=source.meta["logits"], **facts,
                replay_of={k: source.meta[k] for k in ("config_hash", "router", "limits", "ranks")},
            )  # fmt: skip
            writer = stack.enter_context(trace.writing(output, meta, source.state))
        batches = decided(writer)
        hits = dict(replay.POLICIES[policy](batches, source.num_experts, sizes)) if policy else {}
        for _ in batches:  # what a policy did not ask for
            pass
    return tally.rows(source.layers), hits, differ if recorded else None


def pairs_that_differ(a: Routing, b: Routing) -> int:
    """Pairs that one of the two keeps and the other drops, or that only one of them halves."""
    halved = [kept.valid & (np.zeros_like(kept.valid) if kept.level is None else kept.level == 1) for kept in (a, b)]
    return int(np.sum((a.valid != b.valid) | (halved[0] != halved[1])))


def render(name: str, rows: list[dict[str, Any]]) -> str:
    """The figures of one setting as lines: pairs, tokens and load (before limits -> after)."""
    head = f"{'layer':>6s} {'routed':>12s} {'kept':>12s} {'dropped':>20s} {'added':>10s} {'lost tokens':>18s}"
    lines = [name, f"{head}   {'load max/mean':>14s}   {'CV':>14s}   {'dead':>9s}"]

    def share(part: float, whole: float) -> str:
        return f"{part:,.0f} ({part / max(whole, 1):6.2%})"

    for row in rows:
        (mean0, mean1), (cv0, cv1), (dead0, dead1) = row["max_over_mean"], row["cv"], row["dead"]
        dropped, lost = share(row["dropped"], row["routed"]), share(row["lost"], row["tokens"])
        lines.append(
            f"{row['layer']!s:>6s} {row['routed']:12,.0f} {row['kept']:12,.0f} {dropped:>20s} {row['added']:10,.0f} "
            f"{lost:>18s}"
            f"   {f'{mean0:.2f} -> {mean1:.2f}':>14s}   {f'{cv0:.2f} -> {cv1:.2f}':>14s}   {f'{dead0} -> {dead1}':>9s}"
        )
    if any(row["skipped"] for row in rows):
        total = rows[-1]
        lines.append(
            f"of the kept pairs' work {share(total['skipped'], total['routed'])} of all is skipped: drop rate "
            f"{(total['dropped'] + total['skipped']) / max(total['routed'], 1):.2%}"
        )
    return "\n".join(lines)


def render_hits(policy: str, hits: dict[int, np.ndarray], layers: list[int], num_experts: int) -> str:
    head = f"{policy + ' hit rate':>16s}" + "".join(f"{f'layer {layer}':>10s}" for layer in layers)
    rows = [
        f"{f'{size} of {num_experts} held':>16s}" + "".join(f"{rate:10.2%}" for rate in rates)
        for size, rates in hits.items()
    ]
    return "\n".join([head, *rows])


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    add: dict[str, Any] = {"flag_values": values}
    session.define_config_flag(values, argv, "Config whose model.moe says router and limits. Default: the run's own.")
    flags.DEFINE_string("trace", None, "File that experiments.trace wrote.", **add)
    flags.DEFINE_string("output", None, "File for the decisions, a trace again; several settings: one each.", **add)
    flags.DEFINE_list("factors", [], "Capacity factors to sweep; 0: no limit. Default: the config's.", **add)
    flags.DEFINE_list("orders", [], "Capacity orders to sweep. Default: the config's.", **add)
    flags.DEFINE_multi_string("limit", [], "A limit, e.g. expanded_drop:factor=1.5; several: a setting each.", **add)
    flags.DEFINE_float(
        "fit_factors", None, "Mean of a capacity factor for each layer, fitted to the trace.", 0.0, **add
    )
    flags.DEFINE_integer("ranks", 0, "Ranks to split each batch over; 0: as recorded.", lower_bound=0, **add)
    flags.DEFINE_string("policy", None, f"Of an expert store: {', '.join(sorted(replay.POLICIES))}.", **add)
    flags.DEFINE_list("cached", [], "Experts of each layer that the store holds. Default: a quarter, a half.", **add)


def command(values: flags.FlagValues) -> int:
    if not values.trace:
        raise ConfigError("--trace is missing: see python -m experiments.replay --help")
    output = Path(values.output) if values.output else None
    if output is not None:
        session.check_output(output)
        if output.resolve() == Path(values.trace).resolve():
            raise ConfigError(f"--output={output} is the trace itself: name another file")
    if values.policy and values.policy not in replay.POLICIES:
        raise ConfigError(f"--policy={values.policy}: choose one of {', '.join(sorted(replay.POLICIES))}")
    if values.cached and not values.policy:
        raise ConfigError(f"--cached={','.join(values.cached)} is for a policy: add --policy=lru")
    factors, sizes = numbers(values, "factors", float), numbers(values, "cached", int)
    with trace.read(values.trace) as source:
        config = source.config if values.config is None else session.read_config(values.config)
        sizes = tuple(sizes or sorted({max(1, source.num_experts // 4), max(1, source.num_experts // 2)}))
        if values.limit and (factors or values.orders):
            raise ConfigError("--limit says the whole limit: leave --factors and --orders out, or --limit")
        if values.fit_factors is not None:
            chosen, (fitted, even) = replay.fit_layer_factors(
                source, config.model.moe, values.fit_factors, values.ranks
            )  # fmt: skip
            text = "/".join(f"{factor:g}" for factor in chosen)
            print(f"--limit=token_drop:factor={text}\ngate weight lost in these layers' recorded inputs: {fitted:.3%}, "
                  f"with factor {values.fit_factors:g} in all {even:.3%}", flush=True)  # fmt: skip
            return 0
        moes = sweep(config.model.moe, factors, values.orders, values.limit)
        if values.orders and not any(moe.capacity_factor for moe in moes):
            raise ConfigError(f"--orders={','.join(values.orders)} order nothing: add --factors")
        settings = [replay.setting_of(moe, source, values.ranks) for moe in moes]
        session.say(
            f"{values.trace}: {source.meta['tokens']:,} tokens in {len(source)} batches, MoE layers {source.layers}, "
            f"{source.num_experts} experts, limits act on {settings[0].ranks} rank(s)"
        )
        if source.meta["limits"]:
            session.say(f"note: recorded with {source.meta['limits']} in force: later layers saw what it left")
        agrees = True
        try:
            for moe, setting in zip(moes, settings, strict=True):
                model = dataclasses.replace(source.config.model, moe=moe)
                asked = dataclasses.replace(source.config, model=model)
                file = output_of(output, moe, len(moes)) if output else None
                rows, hits, differ = run_setting(
                    source, asked, setting, output=file, policy=values.policy, sizes=sizes
                )  # fmt: skip
                print(render(name_of(moe), rows), flush=True)
                if hits:
                    print(render_hits(values.policy, hits, source.layers, source.num_experts), flush=True)
                if differ is not None:
                    print(f"the recorded setting: {differ} pairs differ from what the run kept", flush=True)
                    agrees = agrees and differ == 0
                if file is not None:
                    session.say(f"decisions in {file}")
        except KeyboardInterrupt as error:
            session.say("interrupted: files of finished settings stay, the one in progress is not written")
            return exit_code(error)
    return 0 if agrees else 1


if __name__ == "__main__":
    session.launch(define_flags, command)
