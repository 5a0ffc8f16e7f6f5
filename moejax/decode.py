"""Decoding (seam 8): a step over model and cache; greedy and sampled."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax import routing
from moejax.config import ConfigError, ModelConfig
from moejax.dispatch import token_shards
from moejax.model import Cache, Decoder
from moejax.types import Limit

FUSED_LENGTH = 64
"""Fused attention on a GPU takes prompts of a multiple of this (:mod:`moejax.attention.grouped`): they are padded."""

AT_A_TIME = 8
"""Tokens that one program makes, unless told otherwise: the host waits for the device once for all of them."""

BROKEN = -1
"""Stands for a token where the logits hold NaN: they name none, whatever a sampler would draw from them."""

Sampler = Callable[[Float[Array, "B V"], PRNGKeyArray], Int[Array, "B"]]


def greedy(logits: Float[Array, "B V"], key: PRNGKeyArray) -> Int[Array, "B"]:
    """The most likely token."""
    del key
    return jnp.argmax(logits, axis=-1)


def sampled(temperature: float = 1.0, top_k: int = 0) -> Sampler:
    """Draws from ``softmax(logits / temperature)``, of the ``top_k`` most likely tokens where that is above 0."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be above 0; for the most likely token use greedy")

    def sample(logits: Float[Array, "B V"], key: PRNGKeyArray) -> Int[Array, "B"]:
        if top_k:
            threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits < threshold, -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature)

    return sample


@functools.partial(jax.jit, static_argnames="places")
def prefill(
    model: Decoder, tokens: Int[Array, "B S"], lengths: Int[Array, "B"], places: int, limits: tuple[Limit, ...] = ()
) -> tuple[Float[Array, "B V"], Cache]:
    """A new cache of ``places`` for each row, at least the longest of ``lengths``, that holds that many tokens of each;
    logits after them. What follows them in ``tokens`` is padding.

    Dropless but for ``limits``, whatever the config's own.
    """
    cache = model.init_cache(tokens.shape[0], places)
    out = model(tokens, cache=cache, limits=limits, at=lengths - 1, prompt=lengths)
    assert out.cache is not None
    return out.logits[:, 0], out.cache


@functools.partial(jax.jit, donate_argnames="cache")
def forward_cached(
    model: Decoder, tokens: Int[Array, "B S"], mask: Array, cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Appends the real tokens among ``tokens``, those of ``mask``, to the cache; logits after each row's last one.

    The cache's memory is reused: what was passed in is gone.

    Decoding is dropless whatever the config's capacity factor: a multiple of the mean load of a few tokens rounds down
    to no pair at all (the published code does not limit single tokens either).
    """
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    out = model(tokens, mask=mask, cache=cache, limits=(), at=last)
    assert out.cache is not None
    return out.logits[:, 0], out.cache


@functools.partial(jax.jit, static_argnames=("sampler", "steps"), donate_argnames="cache")
def extend(
    model: Decoder,
    token: Int[Array, "B"],
    cache: Cache,
    key: PRNGKeyArray,
    begin: Array,
    ended: Bool[Array, "B"],
    stops: Int[Array, "n"],
    sampler: Sampler,
    steps: int,
    limits: tuple[Limit, ...] = (),
) -> tuple[Int[Array, "steps B"], Cache]:
    """The ``steps`` tokens after ``token``, each drawn with ``fold_in(key, i)`` for ``i`` from ``begin`` on. A row that
    has ``ended``, or meets one of ``stops``, repeats its last token.

    One program for all of them: the host is not asked in between. ``limits`` act on the tokens of each step, of rows
    that have not ended.
    """
    alone = jnp.ones((token.shape[0], 1), bool)

    def body(carry: tuple, i: Array) -> tuple[tuple, Array]:
        token, ended, cache = carry
        # Without limits no row depends on another one: then all of them may go on.
        out = model(token[:, None], mask=~ended[:, None] if limits else alone, cache=cache, limits=limits)
        new = _drawn(sampler, out.logits[:, 0], jax.random.fold_in(key, i)).astype(token.dtype)
        new = jnp.where(ended, token, new)
        return (new, ended | jnp.isin(new, stops), out.cache), new

    (_, _, cache), made = jax.lax.scan(body, (token, ended, cache), begin + jnp.arange(steps))
    return made, cache


def _drawn(sampler: Sampler, logits: Float[Array, "B V"], key: PRNGKeyArray) -> Int[Array, "B"]:
    return jnp.where(jnp.isnan(logits).any(axis=-1), BROKEN, sampler(logits, key))


def virtual_ranks(config: ModelConfig, limits: tuple[Limit, ...]) -> int:
    """Ranks that the tokens of a device are split into: those of the config where something sees them, else 1."""
    return config.moe.virtual_ranks if limits or not routing.FAMILIES[config.moe.router.name].causal else 1


def _check_ranks(config: ModelConfig, limits: tuple[Limit, ...], tokens: int, what: str) -> None:
    ranks = virtual_ranks(config, limits)
    if tokens % ranks:
        raise ConfigError(
            f"model.moe.virtual_ranks={ranks} does not divide the {tokens} tokens of {what} on a device: generate for "
            f"a multiple of {ranks} prompts, so that each rank has rows of its own, or set virtual_ranks=1"
        )


def generate(
    model: Decoder,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    *,
    sampler: Sampler = greedy,
    key: PRNGKeyArray | None = None,
    stop_id: int | tuple[int, ...] | None = None,
    pad_to: int = 0,
    at_a_time: int = AT_A_TIME,
    limits: tuple[Limit, ...] = (),
    limit_steps: bool = False,
    ended: Bool[np.ndarray, "B"] | None = None,
) -> Iterator[np.ndarray]:
    """Yields one new token for each row, ``max_new_tokens`` times at most; stops when every row has met ``stop_id``, or
    one of several. A row that has ended repeats its last token until all have.

    The first token comes alone, the others ``at_a_time`` by one program (what it makes too much is thrown away).
    ``sampler`` is part of that program: pass the same function again and nothing is compiled anew.

    Prompts may differ in length: they are padded on the right, to at least ``pad_to`` tokens (so that batches of other
    lengths need no compilation of their own), and padding enters neither cache nor experts.

    ``limits`` act on the prompts, real tokens only, whatever the config's own; with ``limit_steps`` also on the tokens
    of each decoding step. There they want a rounding that leaves a few tokens something (``docs/limits.md``), and no
    draw at random. Rows that have ended are no tokens of a step. With ``virtual_ranks`` in the config each rank limits
    its own rows, one after the other, where the ranks divide them; else their borders cut prompts, padding included.

    ``ended`` tells which rows have: it is written here, and may be by the caller, for what else ends a row, say a stop
    string. That counts from the next program on: with ``at_a_time=1`` from the next token on.

    Raises:
      ValueError: an empty prompt, or ``at_a_time`` below 1.
      ConfigError: virtual ranks do not divide the tokens of the prompts, or of a step that they see.
      FloatingPointError: the model gave NaN.
    """
    if at_a_time < 1:
        raise ValueError(f"at_a_time={at_a_time}: one program makes 1 token or more")
    if max_new_tokens < 1:
        return
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt has no last token to continue from: start it with the end-of-text token")
    key = jax.random.key(0) if key is None else key
    longest = max([pad_to, *(len(p) for p in prompts)])
    places = longest + max_new_tokens  # LongRoPE chooses by them: the same on every device
    if jax.default_backend() == "gpu":
        longest += -longest % FUSED_LENGTH
    rows = max(1, len(prompts) // token_shards())
    _check_ranks(model.config, limits, rows * longest, "the prompts")
    _check_ranks(model.config, limits if limit_steps else (), rows, "a decoding step")
    tokens, lengths = np.zeros((len(prompts), longest), np.int32), np.asarray([len(p) for p in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    logits, cache = prefill(model, jnp.asarray(tokens), jnp.asarray(lengths), places, limits)
    stops = np.atleast_1d(np.asarray(() if stop_id is None else stop_id, np.int32))
    ended = np.zeros(len(prompts), bool) if ended is None else ended
    made = _drawn(sampler, logits, jax.random.fold_in(key, 0))[None]
    count = 0
    while True:
        for new in np.asarray(made):
            if BROKEN in new:
                raise FloatingPointError(
                    f"token {count + 1} of row {new.tolist().index(BROKEN)}: the model gave NaN for its logits; its "
                    "parameters or inputs are broken"
                )
            yield new
            count += 1
            ended |= np.isin(new, stops)
            if ended.all() or count == max_new_tokens:
                return
        in_force = (limits,) if limit_steps and limits else ()
        rows = jnp.asarray(ended), jnp.asarray(stops)
        made, cache = extend(model, made[-1], cache, key, jnp.int32(count), *rows, sampler, at_a_time, *in_force)
