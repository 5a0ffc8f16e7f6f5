r"""Continues a text with a trained model, printing as it goes.

    python -m experiments.generate --checkpoint=runs/ca --prompt="def main(" [--max_new_tokens=200]
    python -m experiments.generate --checkpoint=runs/ca --prompt="In the" --temperature=0.8 --top_k=40 --seed=1
    python -m experiments.generate --checkpoint=OLMoE-1B-7B-Instruct --prompt="Why is the sky blue?" --chat
    python -m experiments.generate --checkpoint=runs/ca --prompt="In the" --limit=token_drop:factor=1.5
    python -m experiments.generate --checkpoint=runs/ca --prompt="In the" --limit=opportunistic_drop:keep=1 \
        --limit_decode
    python -m experiments.generate --checkpoint=runs/ca --prompt="In the" --mesh=data=1,expert=4 \
        --replicate=trace.npz --replicas=1

At ``--temperature=0`` (the default) every token is the most likely one. The text ends at an end token of the model.
``--chat`` puts the prompt into the model's own chat template. Tokens per second are printed at the end.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Int

from experiments import limit_flags, replicate_flags, session
from moejax import decode
from moejax.config import ConfigError, DataConfig
from moejax.data import Tokenizer, load_corpus, load_tokenizer
from moejax.data.pretrained import PretrainedTokenizer
from moejax.dispatch import token_shards
from moejax.model import Decoder
from moejax.pretrained import context_length, open_model
from moejax.types import Limit


def tokenizer_of(data: DataConfig, saved: dict[str, Any], vocab_size: int = 0) -> Tokenizer:
    """The tokenizer that a model was trained with; text is read only where the tokenizer was trained on it.

    Args:
      data: of the checkpoint's config.
      saved: state of the data when the checkpoint was made, which holds the tokenizer's hash; empty for weights that
        come with their tokenizer.
      vocab_size: of the model; 0: not checked.

    Raises:
      ConfigError: it cannot be made again, or has become another one, so that ids would mean other text; it has ids
        that the model does not have.
    """
    if data.tokenizer.startswith("bpe-train:"):
        tokenizer = load_corpus(data).tokenizer
    else:
        tokenizer = load_tokenizer(data.tokenizer, root=data.root)
    check_tokenizer(data, tokenizer, saved)
    if vocab_size and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"data.tokenizer={data.tokenizer!r} has {tokenizer.vocab_size} tokens, and the model {vocab_size}: it is "
            "the tokenizer of another model; put the model's own tokenizer.json beside its weights"
        )
    return tokenizer


def check_tokenizer(data: DataConfig, tokenizer: Tokenizer, saved: dict[str, Any]) -> None:
    """Raises ConfigError where ids would mean other text than in training; arguments as for :func:`tokenizer_of`."""
    if data.tokenizer.startswith("pretrained:") and "tokenizer" not in saved:
        return
    if tokenizer.hash != saved.get("tokenizer"):
        raise ConfigError(
            f"data.tokenizer={data.tokenizer!r} is {tokenizer.hash} now and was {saved.get('tokenizer')} when the "
            "model was trained: put the old file or text back (data.root, data.cache_dir), or train again"
        )


CONTEXT = 8
"""Tokens of the prompt that the first piece is decoded with."""


def start_of(tokenizer: Tokenizer, prompt: str, chat: bool) -> Int[np.ndarray, "n"]:
    """Ids that the model continues; arguments and errors as for :func:`stream`."""
    if chat:
        if not isinstance(tokenizer, PretrainedTokenizer):
            raise ConfigError("--chat needs a Hugging Face folder with a chat template: our own models have none")
        start = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    else:
        start = np.concatenate([tokenizer.start_ids, tokenizer.encode(prompt)]).astype(np.int32)
    if not len(start):
        raise ConfigError("--prompt='': this model's tokenizer begins with no token of its own; give some text")
    return start


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    chat: bool = False,
    made: list[int] | None = None,
    limits: tuple[Limit, ...] = (),
    limit_steps: bool = False,
) -> Iterator[str]:
    """Pieces of the continuation of ``prompt``, each of whole characters.

    The tokenizer's start ids go before the prompt. Ids that the tokenizer does not have (a vocabulary is padded to a
    multiple of 64) are never chosen.

    Args:
      chat: the prompt is what a user says, in the model's chat template.
      made: takes the ids that are made.
      limits, limit_steps: as in :func:`moejax.decode.generate`.

    Raises:
      ConfigError: ``chat`` without a chat template; an empty prompt for a model that begins with no token of its own.
    """
    sampler = decode.sampled(temperature, top_k) if temperature else decode.greedy

    def known(logits: jax.Array, key: jax.Array) -> jax.Array:
        drawn = sampler(logits[:1, : tokenizer.vocab_size], key)
        return jnp.broadcast_to(drawn, logits.shape[:1])  # the rows of other devices are this text, and end with it

    start = start_of(tokenizer, prompt, chat)
    made = [] if made is None else made
    ids = start.tolist()
    # A piece is decoded with what stands before it: some vocabularies mark a space by the next token.
    begin, end = max(0, len(ids) - CONTEXT), len(ids)
    tokens = decode.generate(
        model,
        [start] * token_shards() * decode.virtual_ranks(model.config, limits),  # every rank has a row
        max_new_tokens,
        sampler=known,
        key=jax.random.key(seed),
        stop_id=tokenizer.stop_ids,
        limits=limits,
        limit_steps=limit_steps,
    )
    for token in tokens:
        made.append(int(token[0]))
        ids.append(made[-1])
        text = tokenizer.decode(ids[begin:])
        if text.endswith("\ufffd"):  # perhaps the first bytes of a character: shown when it is whole
            yield ""
            continue
        piece = text[len(tokenizer.decode(ids[begin:end])) :]
        if piece:  # special tokens give none, and a space after them is a space still
            begin, end = end, len(ids)
        yield piece
    yield tokenizer.decode(ids[begin:])[len(tokenizer.decode(ids[begin:end])) :]


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    session.define_checkpoint_flag(values)
    flags.DEFINE_string("prompt", None, "Text to continue; may be empty.", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 200, "Tokens to add at most.", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0: the most likely token.", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer("top_k", 0, "Draw among the most likely k tokens; 0: all.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the draws.", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_bool("chat", False, "Put the prompt into the model's chat template.", flag_values=values)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Type of the computation. Default: the config's.", flag_values=values
    )
    limit_flags.define_flags(values)
    session.define_mesh_flag(values)
    replicate_flags.define_flags(values)


def command(values: flags.FlagValues) -> int:
    if not values.checkpoint:
        raise ConfigError("--checkpoint is missing: give the workdir of a run, e.g. --checkpoint=runs/quickstart")
    if values.prompt is None:
        raise ConfigError("--prompt is missing: give the text to continue, or --prompt='' to start from nothing")
    if math.isnan(values.temperature):
        raise ConfigError("--temperature=nan: must be a number, 0 or more")
    try:
        values.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--prompt holds bytes that are no UTF-8 text, at character {error.start}") from error
    if values.top_k and not values.temperature:
        raise ConfigError(
            f"--top_k={values.top_k} draws at random, --temperature=0 does not: set a temperature above 0"
        )
    replicate_flags.check(values)
    with session.on_mesh(values) as mesh:
        model, config, meta = open_model(values.checkpoint, compute_dtype=values.dtype, mesh=mesh)
        limits = limit_flags.given(values, model.config)
        model = replicate_flags.applied(values, model, mesh, limits)
        tokenizer = tokenizer_of(config.data, meta.get("data", {}), model.config.vocab_size)
        made: list[int] = []
        pieces = stream(
            model,
            tokenizer,
            values.prompt,
            values.max_new_tokens,
            temperature=values.temperature,
            top_k=min(values.top_k, tokenizer.vocab_size),
            seed=values.seed,
            chat=values.chat,
            made=made,
            limits=limits,
            limit_steps=values.limit_decode,
        )
        sys.stdout.write("" if values.chat else values.prompt)
        begin = None
        for piece in pieces:
            if begin is None and len(made) > 1:
                begin = time.monotonic()  # the first token, and those of the first program, waited for compilation
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    untimed = 1 + decode.AT_A_TIME
    rate = "too few to time"
    if begin is not None and len(made) > untimed:
        seconds = time.monotonic() - begin
        rate = f"{(len(made) - untimed) / seconds:.1f} tokens/s after the first {untimed}"
    session.say(f"{len(made)} tokens, {rate}")
    with contextlib.suppress(ConfigError):  # a folder that does not say how long
        length, whole = context_length(values.checkpoint), len(start_of(tokenizer, values.prompt, values.chat))
        if (whole := whole + len(made)) > length:
            session.say(
                f"note: prompt and continuation are {whole:,} tokens, and the model was made for {length:,}: what lies "
                "beyond may be much worse"
            )
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
