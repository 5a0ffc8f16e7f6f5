"""Times a config's training step and its evaluation by each back end of the experts, in one process on random tokens.

    python -m experiments.speed --config=configs/papers/capacity_aware.py:h100 --output=speed.jsonl \
        [--implementations=auto,padded,lax] [--repeats=20] [--vocab_size=8192]

Appends one results row for each back end and pass: median tokens per second with its spread, the time to compile, peak
memory. Loss and gradient norm of the first step must agree between back ends, or the command fails. One that refuses
the config or runs out of memory gets a row without a value that says so. Tokens are random, so the router's load is
that of an untrained one.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import session
from moejax import sharding, validate
from moejax.config import ConfigError, ExperimentConfig, config_hash
from moejax.results import ResultRow, append_rows
from moejax.train import Trainer, score_fn

PAPER, TABLE = "speed", "end_to_end"
TOLERANCE = 1e-2
"""Relative difference of first loss and gradient norm between back ends: they round bfloat16 at different places."""

First = tuple[float, float]
"""Loss and gradient norm of the first step."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of one call, for each repeat, and what else is known of the program."""

    seconds: tuple[float, ...]
    compile_seconds: float
    extra: dict[str, Any]


def random_batch(config: ExperimentConfig, micros: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Tokens of no meaning in the shape of a training batch, `[micros, B, S]`; nothing is masked."""
    shape = (micros, config.train.batch_size // micros, config.data.seq_len)
    tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, (*shape[:2], shape[2] + 1), np.int32)
    positions = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape)
    return {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "positions": positions,
            "segment_ids": np.zeros(shape, np.int32), "mask": np.ones(shape, bool)}  # fmt: skip


def repeat(call: Callable[[], Any], repeats: int) -> tuple[tuple[float, ...], float]:
    """Seconds of `repeats` calls, each waited for, and of the first one, which compiles."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter() - begin
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return tuple(seconds), first


def peak_bytes() -> int | None:
    """Peak memory of the first device since the process began; None where the device does not tell."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def time_passes(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, repeats: int
) -> tuple[dict[str, Timed], tuple[float, float]]:
    """Training step and evaluation of a batch by the config's back end; loss and gradient norm of the first step."""
    trainer = Trainer(config, np.ones(config.model.vocab_size, np.int32), mesh)
    state, steps = trainer.init(), []
    host = random_batch(config, config.train.accumulate)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, sharding.TOKEN_AXES))
    batch = {name: jax.device_put(value, spec) for name, value in host.items()}

    def step() -> Any:
        nonlocal state
        state, result = trainer.step(state, batch)
        steps.append((result.loss, result.grad_norm))
        return result.loss

    found: dict[str, Timed] = {}
    seconds, compiled = repeat(step, repeats)
    found["train"] = Timed(seconds, compiled, {"peak_bytes": peak_bytes()})
    score = score_fn(trainer.graphdef, mesh)
    flat = sharding.put_batch({name: value.reshape(-1, *value.shape[2:]) for name, value in host.items()}, mesh)
    params, router_state, key = state.params, state.router_state, jax.random.key(0)
    seconds, compiled = repeat(lambda: score(params, router_state, flat, None, key)[0], repeats)
    found["evaluate"] = Timed(seconds, compiled, {"peak_bytes": peak_bytes()})
    loss, grad_norm = steps[0]
    return found, (float(loss), float(grad_norm))


def rate(tokens: int, seconds: Sequence[float]) -> tuple[float, dict[str, Any]]:
    """Median tokens per second of calls that take these seconds, and its spread for the row."""
    low, high = np.percentile(seconds, [10, 90])
    spread = {"p10": tokens / float(high), "p90": tokens / float(low), "repeats": len(seconds)}
    return tokens / float(np.median(seconds)), spread


def rows_of(
    config: ExperimentConfig,
    shared: dict[str, Any],
    name: str,
    timed: dict[str, Timed] | str,
    first: tuple[float, float] | None,
) -> list[ResultRow]:
    """A row for each pass; `timed` as text: why there are no times."""
    tokens, rows = config.train.batch_size * config.data.seq_len, []
    for which in ("train", "evaluate"):
        more: dict[str, Any] = {"implementation": name, "layers": config.model.num_layers}
        value = None
        if isinstance(timed, str):
            more["not_run"] = timed
        else:
            one = timed[which]
            value, spread = rate(tokens, one.seconds)
            more |= spread | {"first_call_seconds": one.compile_seconds, **one.extra}
            more |= dict(zip(("first_loss", "first_grad_norm"), first or (), strict=False))
        rows.append(
            ResultRow(**shared, row=name, metric=f"tokens_per_s/{which}", unit="tokens/s", value=value, extra=more)
        )
    return rows


def measure(config: ExperimentConfig, names: list[str], output: Path, repeats: int, say: Callable[[str], None]) -> int:
    """Times each back end and appends its rows; 1 if the losses of two of them differ.

    Raises:
      ConfigError: no back end of that name, or one that does not divide over the devices.
    """
    mesh = sharding.make_mesh(config.mesh)
    shards = sharding.token_shards(mesh)
    validate.check_devices(config, shards)
    expected: First | None = None
    shared = session.row_facts(PAPER, TABLE) | {
        "scale": config.scale, "config": config.name, "config_hash": config_hash(config),
        "batch_shape": (config.train.batch_size, config.data.seq_len),
    }  # fmt: skip
    agree = True
    for name in names:
        moe = dataclasses.replace(config.model.moe, implementation=name)
        mine = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
        first: First | None = None
        timed: dict[str, Timed] | str
        label = name
        try:
            chosen = session.grouped_matmul_facts(mine, shards)["implementation"]
            label = chosen if name == "auto" else name
            timed, first = time_passes(mine, mesh, repeats)
        except ConfigError as error:
            if "cannot run here" not in str(error) and "refuse" not in str(error):
                raise
            timed = str(error)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            lines = str(error).splitlines()
            timed = "out of memory: " + next(line for line in lines if "RESOURCE_EXHAUSTED" in line).strip()[:200]
        gc.collect()  # the state of the last back end must not count against the next
        if first is not None:
            expected = expected or first
            if not np.allclose(first, expected, rtol=TOLERANCE, atol=0):
                say(f"WRONG: {label} has loss and gradient norm {first} in step one, the first {expected}: no row")
                agree = False
                continue
        rows = rows_of(mine, shared, label, timed, first)
        append_rows(output, rows)
        for row in rows:
            value = row.extra.get("not_run") if row.value is None else f"{row.value:,.0f} tokens/s"
            say(f"{label:12s} {row.metric:22s} {value}")
    return 0 if agree else 1


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    session.define_config_flag(values, argv)
    flags.DEFINE_list("implementations", ["auto"], "Back ends; auto: what runs by default.", flag_values=values)
    flags.DEFINE_integer("repeats", 20, "Timed calls of each pass.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("vocab_size", 8192, "Where the config leaves it to the tokenizer.", flag_values=values)
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if values.config is None or not values.output:
        raise ConfigError("--config and --output are needed: a config file, and the results file to append to")
    session.check_output(values.output)
    config = session.read_config(values.config)
    if config.model.vocab_size == 0:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=values.vocab_size))
    return measure(config, values.implementations, Path(values.output), values.repeats, session.say)


if __name__ == "__main__":
    session.launch(define_flags, command)
