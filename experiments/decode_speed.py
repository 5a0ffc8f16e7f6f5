"""Times prefill and decoding of a random model of a config, beside transformers on the same weights.

    python -m experiments.decode_speed --config=configs/models/olmoe_1b_7b.py --output=rows.jsonl \
        [--rival=transformers] [--batches=1,16,128] [--context=1024] [--new_tokens=128] [--repeats=5]

Appends a results row for each batch size, pass and program: median tokens per second and its spread. Prefill is timed
for batches of at most ``--prefill_batch`` rows, which is also how the cache of a larger batch is filled. The rival
(``experiments/decode_rival.py``) reads the weights from a folder that our export wrote, in a process of its own; the
logits of the two must agree before anything is timed. Weights are random, so the router's load is that of an untrained
one.
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
from moejax.results import ResultRow, append_rows, environment_facts

PAPER, TABLE = "speed", "decode"
TOLERANCE = 5e-2
"""Largest error of the logits after a prompt, as a share of the largest logit: both round bfloat16 in every layer, at
different places. A wrong weight or flag is off by about 1."""

Times = dict[str, list[float]]
"""Seconds of each repeat, by ``prefill/BATCH`` or ``decode/BATCH``."""


def random_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A model whose matrices have the type of the computation, as imported ones do; made where it stays."""

    def make() -> Decoder:
        model = build(config, seed)
        graph, state = nnx.split(model)
        paths = dict(nnx.to_flat_state(state))
        cast = {
            path: leaf if importers.is_float32("/".join(map(str, path))) else leaf.replace(leaf[...].astype(dtype))
            for path, leaf in paths.items()
        }
        return nnx.merge(graph, nnx.from_flat_state(cast))

    dtype = jnp.dtype(config.compute_dtype)
    return jax.jit(make)()


def prompts(config: ModelConfig, batch: int, context: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, config.vocab_size, (batch, context), np.int32)


def filled(model: Decoder, tokens: np.ndarray, room: int, slice_rows: int) -> tuple[jax.Array, Cache]:
    """Logits after each row of ``tokens``, and a cache that holds them with ``room`` places more."""
    parts = []
    for first in range(0, len(tokens), slice_rows):
        rows = jnp.asarray(tokens[first : first + slice_rows])
        cache = model.init_cache(len(rows), tokens.shape[1] + room)
        parts.append(decode.forward_cached(model, rows, jnp.ones(rows.shape, bool), cache))
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
            logits, cache = filled(model, tokens, new_tokens * (repeats + 2), prefill_batch)
            state = [decode.greedy(logits, jax.random.key(0)), cache]

            def extend() -> jax.Array:
                made, state[1] = decode.extend(
                    model, state[0], state[1], jax.random.key(0), jnp.int32(0), decode.greedy, new_tokens
                )
                state[0] = made[-1]
                return made

            return extend

        times[f"decode/{batch}"] = list(repeat(run(), repeats)[0])
    return times


def time_rival(folder: Path, asked: dict[str, Any]) -> tuple[Times, np.ndarray, str] | str:
    """Times of transformers, its logits after the first prompt, its version; or why there are none."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return "torch and transformers are not installed"
    request, answer = folder / "asked.json", folder / "answer"
    request.write_text(json.dumps(asked), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, decode_rival.__file__, str(folder), str(request), str(answer)], capture_output=True, text=True
    )
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1][:300]}"
    told = json.loads(answer.with_suffix(".json").read_text(encoding="utf-8"))
    return told["times"], np.load(answer.with_suffix(".npy")), told["version"]


def rows_of(
    shared: dict[str, Any], name: str, times: Times | str, sizes: dict[str, int], **more: Any
) -> list[ResultRow]:
    """A row for each pass; ``times`` as text: why there are none."""
    rows = []
    for what, tokens in sizes.items():
        value, extra = None, dict(more)
        if isinstance(times, str):
            extra["not_run"] = times
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
    facts = environment_facts()
    shared: dict[str, Any] = {
        "kind": "value", "paper": PAPER, "table": TABLE, "scale": config.scale, "config": config.name,
        "config_hash": config_hash(config), "batch_shape": (max(batches), values.context),
        "command": session.command_line(),
        **{name: facts[name] for name in ("commit", "dirty", "device", "device_count", "versions")},
    }  # fmt: skip
    made = random_model(model)
    rival: Any = None
    if values.rival == "transformers":
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            family = importers.write(made, model, folder, context=values.context + values.new_tokens)
            say(f"the same weights for transformers ({family}): written")
            rival = time_rival(
                folder,
                {"batches": batches, "context": values.context, "new_tokens": values.new_tokens,
                 "prefill_batch": values.prefill_batch, "repeats": values.repeats, "vocab_size": model.vocab_size,
                 "dtype": model.compute_dtype},
            )  # fmt: skip
    rows = []
    if rival is not None:
        version = {}
        if not isinstance(rival, str):
            theirs, version = rival[1], {"transformers": rival[2]}
            ours = np.asarray(filled(made, prompts(model, 1, values.context), 1, 1)[0])
            error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            say(f"logits after a prompt differ by {error:.2e} of the largest")
            if not error < TOLERANCE:
                say(f"WRONG: more than {TOLERANCE:g}: no rows")
                return 1
            version["logits_error"] = error
            rival = rival[0]
        rows += rows_of(shared, "transformers", rival, passes, layers=model.num_layers, **version)
    times = time_ours(made, batches, values.context, values.new_tokens, values.prefill_batch, values.repeats)
    back_end = session.grouped_matmul_facts(config, 1)["implementation"]
    rows += rows_of(shared, "moejax", times, passes, layers=model.num_layers, implementation=back_end)
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
    if not Path(values.output).absolute().parent.is_dir():
        raise ConfigError(f"--output={values.output}: there is no folder {Path(values.output).parent}; make it first")
    config = session.read_config(values.config)
    if config.model.vocab_size == 0:
        raise ConfigError("model.vocab_size=0: set it, there is no tokenizer here")
    # both programs share the device: neither may take all of its memory at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    batch = dataclasses.replace(config.train, batch_size=max(int(b) for b in values.batches), accumulate=1)
    return measure(dataclasses.replace(config, train=batch), values, session.say)


if __name__ == "__main__":
    session.launch(define_flags, command)
