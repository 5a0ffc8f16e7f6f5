"""Records what a checkpoint's MoE layers decide on held-out text: a trace, to study limits and routers offline.

    python -m experiments.trace --checkpoint=runs/ca --output=trace.npz [--split=test] [--domains=code,prose]
        [--max_tokens=N] [--max_bytes=N] [--capacity_factor=1.0 --capacity_order=score]

Batches are those of the final evaluation, one domain after the other in turn, so that a trace that ends early has
tokens of all of them. Ctrl-C ends it after the batch in progress with a valid, shorter trace. The format, and what a
trace can and cannot say, stand in ``docs/traces.md``; ``experiments.replay`` reads it.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
from absl import flags
from flax import nnx

from experiments import session
from experiments.generate import check_tokenizer
from experiments.papers.capacity_aware import weights_hash
from moejax import sharding, trace, validate
from moejax.config import ConfigError, ExperimentConfig, MeshConfig
from moejax.data import Batch, Corpus, eval_batches, load_corpus
from moejax.interrupt import Interrupt
from moejax.limits import DropOrder, of_config
from moejax.model import Decoder
from moejax.pretrained import open_model
from moejax.train import TrainState, split

SAY_EVERY = 10.0
"""Seconds between lines of progress."""


def with_flags(config: ExperimentConfig, values: flags.FlagValues) -> ExperimentConfig:
    """The checkpoint's config with the limits, batch and devices that flags ask for, checked.

    Raises:
      ConfigError: a value that cannot work, or a model without experts.
    """
    moe = config.model.moe
    if values.capacity_factor is not None:
        moe = dataclasses.replace(moe, capacity_factor=values.capacity_factor)
    if values.capacity_order is not None:
        if moe.capacity_factor == 0:
            raise ConfigError(f"--capacity_order={values.capacity_order} orders nothing: add --capacity_factor")
        moe = dataclasses.replace(moe, capacity_order=values.capacity_order)
    evaluation = config.eval
    if values.batch_size:
        evaluation = dataclasses.replace(evaluation, batch_size=values.batch_size)
    mesh = MeshConfig(data=values.devices) if values.devices else config.mesh
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe), eval=evaluation, mesh=mesh)
    if not validate.has_experts(config.model):
        raise ConfigError("--checkpoint is of a model without experts: there is no routing to record")
    validate.check_model(config.model)
    return config


def mesh_of(config: ExperimentConfig) -> jax.sharding.Mesh:
    """The config's mesh.

    Raises:
      ConfigError: devices that are not there, or that do not divide a batch.
    """
    try:
        mesh = sharding.make_mesh(config.mesh)
    except ConfigError as error:  # its way out is fields, and those who call this have a flag
        what, _, _ = str(error).partition(": ")
        raise ConfigError(f"{what}: --devices=1 reads batches on one device, --devices=N on N of them") from error
    ranks, size = sharding.token_shards(mesh), config.eval.batch_size
    if size % ranks:
        raise ConfigError(
            f"--batch_size={size} does not divide over {ranks} devices: choose a multiple of {ranks}, or --devices=1"
        )
    return mesh


def chosen_domains(corpus: Corpus, split: str, names: list[str]) -> list[str]:
    """The domains to read: ``names``, or all that have ``split``.

    Raises:
      ConfigError: a domain that is not there, or has no such split.
    """
    there = [domain for domain in corpus.domains if split in corpus.splits(domain)]
    wrong = [name for name in names if name not in there]
    if wrong or not there:
        raise ConfigError(
            f"--domains={','.join(wrong)}: the domains with a {split!r} split are {', '.join(there) or 'none'}"
            if wrong
            else f"--split={split}: no domain has one"
        )
    return names or there


def in_turn(streams: list[Iterator[Batch]]) -> Iterator[Batch]:
    """A batch of each stream after the other, until all are read."""
    while streams:
        left = []
        for stream in streams:
            batch = next(stream, None)
            if batch is not None:
                left.append(stream)
                yield batch
        streams = left


def record(
    model: Decoder,
    config: ExperimentConfig,
    batches: Iterator[Batch],
    output: Path,
    *,
    meta: dict[str, Any],
    seed: int = 0,
    max_bytes: int = 0,
    dtype: str = "float32",
    logits: bool = True,
) -> trace.TraceWriter:
    """Writes the trace of ``batches``; returns the writer, closed, which knows how it ended.

    Raises:
      ConfigError: nothing to record, or a file that cannot be written.
    """
    mesh = mesh_of(config)
    ranks = sharding.token_shards(mesh) * config.model.moe.virtual_ranks
    in_force = of_config(config.model.moe)
    graph, state = nnx.split(model)
    state = jax.device_put(state, sharding.tree_shardings(state, mesh))
    run = trace.record_fn(graph, mesh)
    shape = (config.eval.batch_size, config.data.seq_len)
    header = trace.header(
        config, in_force, ranks=ranks, batch_shape=shape, dtype=dtype, logits=logits, seed=seed, **meta
    )
    begin = said = time.monotonic()
    requests = 0
    key = jax.random.key(seed)
    keys = ("tokens", "positions", "segment_ids", "mask")
    stopping = "stopping after this batch, with a shorter trace; a second one ends at once, without a trace"
    with (
        Interrupt(lambda text: session.say(stopping)) as interrupt,
        trace.writing(output, header, trace.router_state(model), max_bytes=max_bytes) as writer,
    ):
        for i, batch in enumerate(batches):
            put = sharding.put_batch({k: batch[k] for k in keys}, mesh)
            chunk = trace.chunk_of(run(state, put, in_force, jax.random.fold_in(key, i)), batch, requests)
            requests = max(requests, int(chunk.tokens["requests"].max()) + 1)
            if not writer.add(chunk):
                break
            if interrupt.asked:
                writer.ended = "interrupted"
                break
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                session.say(f"{writer.tokens:,} tokens, {writer.tokens / (said - begin):,.0f} tokens/s")
    return writer


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    add: dict[str, Any] = {"flag_values": values}
    session.define_checkpoint_flag(values)
    flags.DEFINE_string("output", None, "File to write (.npz); replaced when the trace is complete.", **add)
    flags.DEFINE_enum("split", None, ["train", "valid", "test"], "Default: the config's eval.final_split.", **add)
    flags.DEFINE_list("domains", [], "Domains to read, with commas. Default: all that have the split.", **add)
    flags.DEFINE_integer("max_tokens", 0, "First tokens of each domain; 0: all.", lower_bound=0, **add)
    flags.DEFINE_integer("max_bytes", 1 << 30, "Size of the file, at most; 0: no bound.", lower_bound=0, **add)
    flags.DEFINE_integer("batch_size", 0, "Sequences of a batch; 0: eval.batch_size.", lower_bound=0, **add)
    flags.DEFINE_integer("devices", 0, "Devices to spread a batch over; 0: the config's mesh.", lower_bound=0, **add)
    flags.DEFINE_float(
        "capacity_factor", None, "Limit in force, instead of the config's model.moe.capacity_factor; 0: none.", **add
    )
    flags.DEFINE_enum(
        "capacity_order", None, list(get_args(DropOrder)), "Instead of the config's model.moe.capacity_order.", **add
    )
    flags.DEFINE_bool("logits", True, "Also keep router logits: replaying another router needs them.", **add)
    flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Type of the kept probabilities and logits.", **add)
    flags.DEFINE_integer("seed", 0, "Of limits and routers that draw at random.", **add)


def command(values: flags.FlagValues) -> int:
    for name in ("checkpoint", "output"):
        if not values[name].value:
            raise ConfigError(f"--{name} is missing: see python -m experiments.trace --help")
    output = Path(values.output)
    session.check_output(output)
    if jax.process_count() > 1:
        raise ConfigError("experiments.trace records on one process: a file of several would hold parts of each batch")
    model, config, meta = open_model(values.checkpoint)
    config = with_flags(config, values)
    mesh_of(config)
    corpus = load_corpus(config.data, train=config.train.steps > 0)
    check_tokenizer(config.data, corpus.tokenizer, meta.get("data", {}))
    text = values.split or config.eval.final_split
    domains = chosen_domains(corpus, text, values.domains)
    size = config.eval.batch_size
    streams = [eval_batches(corpus, d, text, batch_size=size, max_tokens=values.max_tokens) for d in domains]
    bound = f"at most {values.max_bytes / 2**20:,.0f} MiB" if values.max_bytes else "no bound on its size"
    cut = f"the first {values.max_tokens:,} tokens of each of" if values.max_tokens else "all of"
    session.say(f"recording {cut} {', '.join(domains)} ({text}), {bound}; Ctrl-C ends it with a shorter trace")
    _, params, router_state = split(model)
    hashed = weights_hash([TrainState(meta["step"], params, router_state, None)])
    facts = {
        "checkpoint": {"step": meta["step"], "hash": hashed},
        "tokenizer": {"name": corpus.tokenizer.name, "hash": corpus.tokenizer.hash},
        "data": {"hash": corpus.hash, "split": text, "domains": list(corpus.domains), "recorded": domains,
                 "max_tokens": values.max_tokens},
    }  # fmt: skip
    writer = record(
        model, config, in_turn(streams), output, meta=facts, seed=values.seed, max_bytes=values.max_bytes,
        dtype=values.dtype, logits=values.logits,
    )  # fmt: skip
    bytes_written = output.stat().st_size
    session.say(
        f"{output}: {writer.chunks} batches, {writer.tokens:,} tokens, {bytes_written / 2**20:,.1f} MiB "
        f"({math.ceil(bytes_written / max(writer.tokens, 1)):,} bytes a token), step {meta['step']}, "
        f"limits {trace.describe_limits(of_config(config.model.moe)) or 'none'}"
    )
    if writer.ended != "all":
        why = {"max_bytes": f"the next batch would exceed --max_bytes={values.max_bytes:,}", "interrupted": "Ctrl-C"}
        session.say(f"ended early: {why[writer.ended]}; the trace is valid and shorter")
    return 130 if writer.ended == "interrupted" else 0


if __name__ == "__main__":
    session.launch(define_flags, command)
