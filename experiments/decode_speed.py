"""Times prefill and decoding of a random model of a config, beside transformers on the same weights.

    python -m experiments.decode_speed --config=configs/models/olmoe_1b_7b.py --output=rows.jsonl \
        [--rival=transformers] [--batches=1,16,128] [--context=1024] [--new_tokens=128] [--repeats=5]

Appends a results row for each batch size, pass and program: median tokens per second and its spread. Prefill is timed
for batches of at most ``--prefill_batch`` rows, which is also how the cache of a larger batch is filled. Every repeat
of decoding begins at the same length. The rival (``experiments/decode_rival.py``) reads the weights from a folder that
our export wrote, in a process of its own, and has the device to itself; the logits of the two must agree before any row
is written. Weights are random, so the router's load is that of an untrained one.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments import decode_rival, session
from experiments.speed import rate, repeat
from moejax import decode, importers
from moejax.config import ConfigError, ExperimentConfig, ModelConfig, config_hash
from moejax.model import Cache, Decoder, build
from moejax.results import ResultRow, append_rows

PAPER, TABLE = "speed", "decode"
TOLERANCE = 1.5
"""Our mean error of the logits after a prompt, over the rival's own in the same type, both against its logits in
float32: rounded routers choose other experts, so that no fixed bound fits all models. A wrong weight or flag is off
by the logits' own size."""
FLOOR = 1e-5
"""Mean errors below this share of the mean logit count as this: float32 against itself."""

Times = dict[str, list[float]]
"""Seconds of each repeat, by ``prefill/BATCH`` or ``decode/BATCH``."""


def random_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A model whose matrices have the type of the computation, as imported ones do, and whose other arrays no more
    digits, as the rival has them; made where it stays."""
    dtype = jnp.dtype(config.compute_dtype)
    digits = jnp.finfo(dtype)

    def rounded(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        value = jax.lax.reduce_precision(leaf[...], digits.nexp, digits.nmant)
        return leaf.replace(value if importers.is_float32("/".join(map(str, path))) else value.astype(dtype))

    def make() -> Decoder:
        graph, state = nnx.split(build(config, seed))
        paths = {path: rounded(path, leaf) for path, leaf in nnx.to_flat_state(state)}
        return nnx.merge(graph, nnx.from_flat_state(paths))

    return jax.jit(make)()


def prompts(config: ModelConfig, batch: int, context: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, config.vocab_size, (batch, context), np.int32)


def filled(model: Decoder, tokens: np.ndarray, room: int, slice_rows: int) -> tuple[jax.Array, Cache]:
    """Logits after each row of ``tokens``, and a cache that holds them with ``room`` places more."""
    parts = []
    for first in range(0, len(tokens), slice_rows):
        rows = jnp.asarray(tokens[first : first + slice_rows])
        lengths = jnp.full(len(rows), tokens.shape[1], jnp.int32)
        parts.append(decode.prefill(model, rows, lengths, tokens.shape[1] + room))
    if len(parts) == 1:
        return parts[0]
    layers = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *(cache.layers for _, cache in parts))
    length = jnp.concatenate([cache.length for _, cache in parts])
    return jnp.concatenate([z for z, _ in parts]), Cache(layers=layers, length=length)


def time_ours(
    model: Decoder, batches: list[int], context: int, new_tokens: int, prefill_batch: int, repeats: int
) -> Times:
    """Seconds of prefill and of decoding ``new_tokens``, of each repeat after the compilation."""
    times: Times = {}
    for batch in batches:
        tokens = prompts(model.config, batch, context)
        if batch <= prefill_batch:
            prefill = functools.partial(filled, model, tokens, new_tokens, batch)
            times[f"prefill/{batch}"] = list(repeat(lambda call=prefill: call()[0], repeats)[0])

        def run(tokens: np.ndarray = tokens) -> Callable[[], Any]:
            logits, cache = filled(model, tokens, new_tokens, prefill_batch)
            token, held = decode.greedy(logits, jax.random.key(0)), [cache]

            def extend() -> jax.Array:
                # places beyond a row's length are free: the same prompt again
                cache = dataclasses.replace(held[0], length=jnp.full(len(tokens), context, jnp.int32))
                rows = jnp.zeros(len(tokens), bool), jnp.zeros(0, jnp.int32)  # none has ended, none will
                made, held[0] = decode.extend(
                    model, token, cache, jax.random.key(0), jnp.int32(0), *rows, decode.greedy, new_tokens
                )
                return made

            return extend

        times[f"decode/{batch}"] = list(repeat(run(), repeats)[0])
    return times


def time_rival(folder: Path, asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | str:
    """What ``decode_rival`` answers: times, what it could not run, its version; its logits after the first prompt,
    ``asked`` (in the type asked for) and ``exact`` (in float32). Or why there is none."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return "torch and transformers are not installed"
    request, answer = folder / "asked.json", folder / "answer"
    request.write_text(json.dumps(asked), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, decode_rival.__file__, str(folder), str(request), str(answer)], capture_output=True, text=True
    )
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1][:300]}"
    with np.load(answer.with_suffix(".npz")) as logits:
        return json.loads(answer.with_suffix(".json").read_text(encoding="utf-8")), dict(logits)


def agreement(ours: np.ndarray, theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean errors against ``exact``, as shares of its mean size: ours and the rival's own."""
    size = np.abs(theirs["exact"]).mean()
    errors = {"mean_error": ours, "transformers_mean_error": theirs["asked"]}
    return {name: float(np.abs(z - theirs["exact"]).mean() / size) for name, z in errors.items()}


def rows_of(
    shared: dict[str, Any], name: str, times: Times, sizes: dict[str, int], failed: dict[str, str], **more: Any
) -> list[ResultRow]:
    """A row for each pass; without a value where ``failed`` says why."""
    rows = []
    for what, tokens in sizes.items():
        value, extra = None, dict(more)
        if what in failed:
            extra["not_run"] = failed[what]
        else:
            value, spread = rate(tokens, times[what])
            extra |= spread
        rows.append(
            ResultRow(**shared, row=name, metric=f"tokens_per_s/{what}", unit="tokens/s", value=value, extra=extra)
        )
    return rows


def measure(config: ExperimentConfig, values: flags.FlagValues, say: Callable[[str], None]) -> int:
    """Times both programs and appends their rows; 1 if their logits differ."""
    model, batches = config.model, [int(b) for b in values.batches]
    passes = {f"prefill/{b}": b * values.context for b in batches if b <= values.prefill_batch}
    passes |= {f"decode/{b}": b * values.new_tokens for b in batches}
    shared = session.row_facts(PAPER, TABLE) | {
        "scale": config.scale, "config": config.name, "config_hash": config_hash(config),
        "batch_shape": (max(batches), values.context),
    }  # fmt: skip
    made = random_model(model)
    rival: Any = None
    if values.rival == "transformers":
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            family = importers.write(made, model, folder, context=values.context + values.new_tokens)
            say(f"the same weights for transformers ({family}): written")
            del made  # the device is the rival's alone
            rival = time_rival(
                folder,
                {"batches": batches, "context": values.context, "new_tokens": values.new_tokens,
                 "prefill_batch": values.prefill_batch, "repeats": values.repeats, "vocab_size": model.vocab_size,
                 "dtype": model.compute_dtype},
            )  # fmt: skip
        made = random_model(model)
    rows = []
    if isinstance(rival, str):
        rows += rows_of(shared, "transformers", {}, passes, dict.fromkeys(passes, rival), layers=model.num_layers)
    elif rival is not None:
        told, logits = rival
        ours = np.asarray(filled(made, prompts(model, 1, values.context), 1, 1)[0])
        errors = agreement(ours, logits)
        say(", ".join(f"{name} {error:.2e}" for name, error in errors.items()) + " of the mean logit in float32")
        if not errors["mean_error"] <= TOLERANCE * max(errors["transformers_mean_error"], FLOOR):
            say(f"WRONG: ours is more than {TOLERANCE:g} times theirs: no rows")
            return 1
        facts = {"transformers": told["version"], "layers": model.num_layers, **errors}
        rows += rows_of(shared, "transformers", told["times"], passes, told["failed"], **facts)
    times = time_ours(made, batches, values.context, values.new_tokens, values.prefill_batch, values.repeats)
    back_end = session.grouped_matmul_facts(config, 1)["implementation"]
    rows += rows_of(shared, "moejax", times, passes, {}, layers=model.num_layers, implementation=back_end)
    append_rows(Path(values.output), rows)
    for row in rows:
        found = row.extra.get("not_run") if row.value is None else f"{row.value:,.0f} tokens/s"
        say(f"{row.row:14s} {row.metric:28s} {found}")
    return 0


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    session.define_config_flag(values, argv)
    flags.DEFINE_list("batches", ["1", "16", "128"], "Rows decoded at a time.", flag_values=values)
    flags.DEFINE_integer("context", 1024, "Tokens of each prompt.", 1, flag_values=values)
    flags.DEFINE_integer("new_tokens", 128, "Tokens decoded in one timed call.", 1, flag_values=values)
    flags.DEFINE_integer("prefill_batch", 16, "Rows of one prefill, at most.", 1, flag_values=values)
    flags.DEFINE_integer("repeats", 5, "Timed calls of each pass.", 1, flag_values=values)
    flags.DEFINE_enum("rival", "none", ["none", "transformers"], "What to time beside it.", flag_values=values)
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if values.config is None or not values.output:
        raise ConfigError("--config and --output are needed: a config file, and the results file to append to")
    wrong = [b for b in values.batches if not b.isdigit() or int(b) < 1]
    if wrong or not values.batches:
        raise ConfigError(f"--batches={','.join(values.batches)}: whole numbers of 1 or more, with commas")
    session.check_output(values.output)
    config = session.read_config(values.config)
    if config.model.vocab_size == 0:
        raise ConfigError("model.vocab_size=0: set it, there is no tokenizer here")
    # both programs share the device: neither may take all of its memory at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    batch = dataclasses.replace(config.train, batch_size=max(int(b) for b in values.batches), accumulate=1)
    return measure(dataclasses.replace(config, train=batch), values, session.say)


if __name__ == "__main__":
    session.launch(define_flags, command)
