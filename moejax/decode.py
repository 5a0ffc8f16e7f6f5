"""Decoding (seam 8): a step over model and cache; greedy and sampled."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moejax.model import Cache, Decoder

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


@jax.jit
def forward_cached(
    model: Decoder, tokens: Int[Array, "B S"], mask: Array, cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Appends ``tokens`` to the cache; logits after each row's last real token.

    Decoding is dropless whatever the config's capacity factor: a multiple of the mean load of a few tokens rounds down
    to no pair at all (the published code does not limit single tokens either).
    """
    out = model(tokens, mask=mask, cache=cache, limits=())
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    logits = jnp.take_along_axis(out.logits, last[:, None, None], axis=1)[:, 0]
    assert out.cache is not None
    return logits, out.cache


def generate(
    model: Decoder,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    *,
    sampler: Sampler = greedy,
    key: PRNGKeyArray | None = None,
    stop_id: int | None = None,
    pad_to: int = 0,
) -> Iterator[np.ndarray]:
    """Yields one new token for each row, ``max_new_tokens`` times at most; stops when every row has met ``stop_id``.

    Prompts may differ in length: they are padded on the right, to at least ``pad_to`` tokens (so that batches of other
    lengths need no compilation of their own), and padding enters neither cache nor experts.

    Raises:
      ValueError: an empty prompt.
    """
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt has no last token to continue from: start it with the end-of-text token")
    key = jax.random.key(0) if key is None else key
    longest = max([pad_to, *(len(p) for p in prompts)])
    tokens, mask = np.zeros((len(prompts), longest), np.int32), np.zeros((len(prompts), longest), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    cache = model.init_cache(len(prompts), longest + max_new_tokens)
    logits, cache = forward_cached(model, jnp.asarray(tokens), jnp.asarray(mask), cache)
    done = np.zeros(len(prompts), bool)
    for i in range(max_new_tokens):
        new = sampler(logits, jax.random.fold_in(key, i))
        yield np.asarray(new)
        done |= np.asarray(new) == stop_id
        if (stop_id is not None and done.all()) or i == max_new_tokens - 1:
            return
        logits, cache = forward_cached(model, new[:, None], jnp.ones((len(prompts), 1), bool), cache)
