"""Continues a text with a trained model, printing as it goes.

    python -m experiments.generate --checkpoint=runs/ca --prompt="def main(" [--max_new_tokens=200]
    python -m experiments.generate --checkpoint=runs/ca --prompt="In the" --temperature=0.8 --top_k=40 --seed=1

At ``--temperature=0`` (the default) every token is the most likely one. The text ends at the end-of-text token.
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import session
from moejax import decode
from moejax.checkpoint import load_model
from moejax.config import ConfigError, DataConfig
from moejax.data import Tokenizer, load_corpus, load_tokenizer
from moejax.model import Decoder


def tokenizer_of(data: DataConfig, saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a model was trained with; text is read only where the tokenizer was trained on it.

    Args:
      data: of the checkpoint's config.
      saved: state of the data when the checkpoint was made, which holds the tokenizer's hash.

    Raises:
      ConfigError: it cannot be made again, or has become another one, so that ids would mean other text.
    """
    if data.tokenizer.startswith("bpe-train:"):
        tokenizer = load_corpus(data).tokenizer
    else:
        tokenizer = load_tokenizer(data.tokenizer, root=data.root)
    if tokenizer.hash != saved.get("tokenizer"):
        raise ConfigError(
            f"data.tokenizer={data.tokenizer!r} is {tokenizer.hash} now and was {saved.get('tokenizer')} when the "
            "model was trained: put the old file or text back (data.root, data.cache_dir), or train again"
        )
    return tokenizer


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of the continuation of ``prompt``, each of whole characters; an end-of-text token goes before the prompt.

    Ids that the tokenizer does not have (a vocabulary is padded to a multiple of 64) are never chosen.
    """
    sampler = decode.sampled(temperature, top_k) if temperature else decode.greedy

    def known(logits: jax.Array, key: jax.Array) -> jax.Array:
        return sampler(logits[:, : tokenizer.vocab_size], key)

    start = np.concatenate([[tokenizer.eot_id], tokenizer.encode(prompt)]).astype(np.int32)
    made: list[int] = []
    shown = 0
    tokens = decode.generate(
        model, [start], max_new_tokens, sampler=known, key=jax.random.key(seed), stop_id=tokenizer.eot_id
    )
    for token in tokens:
        made.append(int(token[0]))
        whole = tokenizer.decode(made).rstrip("\ufffd")  # what may be the first bytes of a character waits for the rest
        yield whole[shown:]
        shown = len(whole)
    yield tokenizer.decode(made)[shown:]


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    flags.DEFINE_string("checkpoint", None, "Workdir, its checkpoints folder, or one step folder.", flag_values=values)
    flags.DEFINE_string("prompt", None, "Text to continue; may be empty.", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 200, "Tokens to add at most.", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0: the most likely token.", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer("top_k", 0, "Draw among the most likely k tokens; 0: all.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the draws.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if not values.checkpoint:
        raise ConfigError("--checkpoint is missing: give the workdir of a run, e.g. --checkpoint=runs/quickstart")
    if values.prompt is None:
        raise ConfigError("--prompt is missing: give the text to continue, or --prompt='' to start from nothing")
    if values.top_k and not values.temperature:
        raise ConfigError(
            f"--top_k={values.top_k} draws at random, --temperature=0 does not: set a temperature above 0"
        )
    model, config, meta = load_model(values.checkpoint)
    tokenizer = tokenizer_of(config.data, meta.get("data", {}))
    sys.stdout.write(values.prompt)
    pieces = stream(
        model,
        tokenizer,
        values.prompt,
        values.max_new_tokens,
        temperature=values.temperature,
        top_k=min(values.top_k, tokenizer.vocab_size),
        seed=values.seed,
    )
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
