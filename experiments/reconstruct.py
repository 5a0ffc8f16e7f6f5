"""Sorts the neurons of a checkpoint's experts by importance, so that the leading half of each is the important one.

    python -m experiments.reconstruct --checkpoint=runs/mine --output=runs/mine-sorted [--metric=auto] [--tokens=131072]
        [--split=train] [--config=FILE] [--importance=FILE]

One pass over calibration text measures five metrics for each neuron (``moejax.neurons``); what is sorted computes what
it computed. ``--metric=auto`` takes the metric whose leading half alone loses least on text that the sums have not
seen. ``--output`` is a workdir that every command takes, with the sums in ``importance.npz``; without it the tables are
printed and nothing is written. ``--importance`` takes such a file in place of the pass, to sort by another metric. What
the order is for: ``docs/dualsparse.md``.
"""

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import calibration, session
from experiments.generate import check_tokenizer
from experiments.trace import chosen_domains, in_turn, mesh_of
from moejax import derived, importance, limits, pretrained, validate
from moejax.config import ConfigError, ExperimentConfig
from moejax.data import Batch, eval_batches, load_corpus
from moejax.importance import Importance
from moejax.limits.pieces import BLOCK, ROUNDED
from moejax.model import moe_layer_ids
from moejax.neurons import METRICS
from moejax.partition import reconstruct
from moejax.results import environment_facts

FILE = "importance.npz"
"""In the folder that is written: the sums, of the neurons as they stood before."""
JUDGED = 16
"""One batch in so many is left out of the sums and judges the metrics."""
LISTED = 8
"""Numbers of leading columns that are listed, at most."""


def held_back(batches: Iterator[Batch], judging: list[Batch]) -> Iterator[Batch]:
    """``batches``, of one domain, without those that go to ``judging``: one in :data:`JUDGED`, of fewer the last. A
    single batch is both."""
    last, judged = None, False  # whether one of these judges; others may be in the list
    for i, batch in enumerate(batches):
        if last is not None:
            yield last
        last = None if i % JUDGED == JUDGED - 1 else batch
        if last is None:
            judging.append(batch)
            judged = True
        only = i == 0
    if last is not None:
        if judged or only:
            yield last
        if not judged:
            judging.append(last)


def held_back_of_each(streams: list[Iterator[Batch]], judging: list[Batch]) -> Iterator[Batch]:
    """:func:`held_back` domain by domain, a batch of each after the other: of all of them in a row, how many domains
    there are and in which order would say which of them judge."""
    return in_turn([held_back(stream, judging) for stream in streams])


def told(batches: Iterator[Batch]) -> Iterator[Batch]:
    """``batches``, with a line of progress now and then."""
    begin = said = time.monotonic()
    tokens = 0
    for batch in batches:
        yield batch
        tokens += int(batch["mask"].sum())
        if time.monotonic() - said > calibration.SAY_EVERY:
            said = time.monotonic()
            session.say(f"  {tokens:,} tokens, {tokens / (said - begin):,.0f} tokens/s")


def with_flags(config: ExperimentConfig, values: flags.FlagValues) -> ExperimentConfig:
    """The checkpoint's config with the text, batch and devices that the flags ask for.

    Raises:
      ConfigError: a value that cannot work, or a model without experts.
    """
    if not validate.has_experts(config.model):
        raise ConfigError("--checkpoint is of a model without experts: there are no neurons to sort")
    return calibration.with_text(config, values)


def measured(values: flags.FlagValues, config: ExperimentConfig, columns: int) -> tuple[Importance, dict[str, Any]]:
    """The pass over calibration text, and what is to be known of it."""
    text = calibration.calibration_split(config, values.split or "train")
    mesh = mesh_of(config)
    origin = pretrained.origin(values.checkpoint)
    model, _, meta = pretrained.open_model(values.checkpoint, mesh=mesh)
    corpus = load_corpus(config.data, train=text == "train")
    check_tokenizer(config.data, corpus.tokenizer, meta.get("data", {}))
    session.keep_programs(corpus)
    domains = chosen_domains(corpus, text, values.domains)
    size = config.eval.batch_size
    streams = [eval_batches(corpus, d, text, batch_size=size, max_tokens=values.tokens) for d in domains]
    cut = f"at most {values.tokens:,} tokens of each of" if values.tokens else "all of"
    session.say(f"measuring neurons on {cut} {', '.join(domains)} ({text}), without limits")
    judging: list[Batch] = []
    made = importance.measure(model, told(held_back_of_each(streams, judging)), mesh)
    tokens = sum(int(batch["mask"].sum()) for batch in judging)
    session.say(f"{made.tokens:,} tokens; judging {len(METRICS)} metrics on {tokens:,} others")
    orders = made.orders()
    as_stored = np.broadcast_to(np.arange(config.model.moe.expert_dim), orders[METRICS[0]].shape)
    losses = importance.leading_losses(model, orders | {"as stored": as_stored}, columns, told(iter(judging)), mesh)
    facts = environment_facts()
    return made, {
        "checkpoint": origin, "layers": moe_layer_ids(config.model), "losses": losses, "columns": columns,
        "judged_tokens": tokens, "command": session.command_line(),
        "text": {"split": text, "domains": domains, "data_hash": corpus.hash, "tokenizer_hash": corpus.tokenizer.hash},
        **{name: facts[name] for name in ("commit", "dirty", "device", "versions")},
    }  # fmt: skip


def known(values: flags.FlagValues, config: ExperimentConfig, columns: int) -> tuple[Importance, dict[str, Any]]:
    """What an earlier pass over the same weights made.

    Raises:
      ConfigError: it is of other weights, or cannot be read.
    """
    path = Path(values.importance)
    made, meta = importance.read(path)
    weights = pretrained.origin(values.checkpoint)["weights"]
    moe = config.model.moe
    shape = (len(moe_layer_ids(config.model)), moe.num_experts, moe.expert_dim)
    if meta["checkpoint"]["weights"] != weights or made.sums["gate"].shape != shape:
        raise ConfigError(
            f"--importance={path} was measured on the weights {meta['checkpoint']['weights']} "
            f"({meta['checkpoint']['folder']}), and --checkpoint={values.checkpoint} has {weights}: give the "
            "checkpoint that it was measured on (not the sorted one), or leave the flag out"
        )
    return made, meta


def lines(config: ExperimentConfig, made: Importance, meta: dict[str, Any], metric: str, columns: int) -> list[str]:
    """What a person is told."""
    orders, losses, width = made.orders(), meta["losses"], config.model.moe.expert_dim
    values, order = made.sums[metric], orders[metric]
    text = [f"loss with the leading {meta['columns']} of {width} neurons of every expert, nats per token:"]
    text += [f"  {name:12s} {losses[name]:9.4f} {losses[name] - losses['all']:+9.4f}" for name in losses]
    text.append(f"neurons in common among the leading {columns} (by chance {columns / width:.0%}):")
    text.append(" " * 14 + " ".join(f"{name:>11s}" for name in METRICS))
    for a in METRICS:
        common = [float(np.mean(reconstruct.agreement(orders[a], orders[b], columns))) for b in METRICS]
        text.append(f"  {a:12s}" + " ".join(f"{share:11.1%}" for share in common))
    before, after = (reconstruct.shares(values, o, [columns])[..., 0] for o in (None, order))
    text.append(f"share of {metric!r} in the leading {columns} of {width} neurons, mean over experts:")
    text.append("  layer    before     after   lowest   fewest pairs   experts without")
    for i, layer in enumerate(meta["layers"]):
        low = float(np.min(after[i], where=~np.isnan(after[i]), initial=1.0))
        text.append(
            f"  {layer:5d} {_mean(before[i]):9.1%} {_mean(after[i]):9.1%} {low:8.1%} {made.pairs[i].min():14,.0f} "
            f"{int((made.pairs[i] == 0).sum()):17d}"
        )
    choices = _listed(width)
    held = reconstruct.shares(values, order, choices).reshape(-1, len(choices))
    text.append(f"share of {metric!r} by leading neurons, mean and lowest of all experts:")
    text += [
        f"  {m:6d} {_mean(held[:, i]):9.1%} {float(np.nanmin(held[:, i], initial=1.0)):9.1%}"
        for i, m in enumerate(choices)
    ]
    return text


def _mean(shares: np.ndarray) -> float:
    """Over the experts that have any importance; NaN for none."""
    there = shares[~np.isnan(shares)]
    return float(there.mean()) if there.size else float("nan")


def _listed(width: int) -> list[int]:
    """Numbers of leading columns: in steps of the kernels' blocks of 64 where half an expert is rounded up to them."""
    block = BLOCK if width >= ROUNDED else 1
    step = -(-width // (LISTED * block)) * block
    return [*range(step, width, step), width]


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    session.define_checkpoint_flag(values)
    add: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("output", None, "Folder to make: the checkpoint with its neurons sorted.", **add)
    flags.DEFINE_enum("metric", "auto", ["auto", *METRICS], "What is sorted by; auto: what the text likes best.", **add)
    flags.DEFINE_integer("major", 0, "Leading neurons that are judged and listed; 0: half of them.", 0, **add)
    flags.DEFINE_string("importance", None, "An importance.npz of these weights, in place of the pass.", **add)
    calibration.define_flags(values, argv, "train")


def check_flags(values: flags.FlagValues) -> None:
    """Raises ConfigError for flags that do not go together, before anything is read."""
    if not values.checkpoint:
        raise ConfigError("--checkpoint is missing: see python -m experiments.reconstruct --help")
    if jax.process_count() > 1:
        raise ConfigError("experiments.reconstruct runs in one process: sums of several are not put together")
    if values.output:
        derived.check_new(values.output)
    if values.importance:
        given = [n for n in ("split", "domains", "tokens", "batch_size", "devices", "config") if values[n].present]
        if given:
            raise ConfigError(
                f"--importance={values.importance} stands in place of a pass over text: leave --{given[0]} out"
            )


def command(values: flags.FlagValues) -> int:
    check_flags(values)
    return session.all_or_nothing(lambda: sorted_and_told(values))


def sorted_and_told(values: flags.FlagValues) -> int:
    config = with_flags(derived.stored(values.checkpoint), values)
    width = config.model.moe.expert_dim
    columns = limits.major_columns(width, values.major)
    if not 0 < columns < width:
        raise ConfigError(f"--major={columns}: of {width} neurons of an expert, choose more than 0 and fewer than all")
    made, meta = (known if values.importance else measured)(values, config, columns)
    losses = meta["losses"]
    metric = min(METRICS, key=losses.__getitem__) if values.metric == "auto" else values.metric
    session.say("\n".join(lines(config, made, meta, metric, columns)))
    if unreached := int((made.pairs == 0).sum()):
        session.say(f"note: no token of the text chose {unreached} of the experts: their neurons stay as they are")
    if config.model.mtp_layers:
        session.say("note: multi-token-prediction modules are not measured: their experts stay as they are")
    session.say(f"sorted by {metric!r}" + (", the metric that loses least" if values.metric == "auto" else ""))
    if not values.output:
        session.say("nothing is written: --output=DIR writes the sorted checkpoint")
        return 0
    write(values, made, meta, metric)
    return 0


def write(values: flags.FlagValues, made: Importance, meta: dict[str, Any], metric: str) -> None:
    """Writes the sorted checkpoint whole, or nothing.

    Raises:
      ConfigError: the checkpoint is not the one that was measured any more, or the folder cannot be written.
    """
    source = derived.read(values.checkpoint)
    if source.origin["weights"] != meta["checkpoint"]["weights"]:
        raise ConfigError(
            f"--checkpoint={values.checkpoint} holds other weights now than those that were measured: give the step "
            "folder, or wait for the training there to end"
        )
    model = source.config.model
    order = importance.by_store(model, reconstruct.order(made.sums[metric]))
    arrays, moved = reconstruct.reconstructed(source.arrays, order, model.moe.parts_apart)
    record = {
        "what": "reconstruct", "command": session.command_line(), "metric": metric, "asked": values.metric,
        "losses": meta["losses"], "columns": meta["columns"], "tokens": made.tokens, "text": meta["text"],
    }  # fmt: skip
    save = functools.partial(importance.save, importance=made, meta=meta | {"metric": metric})
    folder = derived.write(values.output, source, source.config, arrays, record, {FILE: save})
    session.say(
        f"{values.output}: {len(moved)} arrays sorted, {len(arrays) - len(moved)} as they were, step "
        f"{folder.name}" + (", with the optimizer's state: training goes on" if source.trains else "")
    )


if __name__ == "__main__":
    session.launch(define_flags, command)
