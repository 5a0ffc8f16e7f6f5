"""The model as one callable, and held-out text scored through it."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.config import ConfigError

Batch = dict[str, np.ndarray]
"""``tokens``, ``targets``, ``positions``, ``segment_ids``: int32 [B, S]; ``mask``: bool [B, S], True for
real tokens."""

ScoreFn = Callable[[Batch], tuple[Float[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]]
"""Log-probability of each target (nats), and whether it is the model's most likely token. Right padding is
masked."""


class Tokenizer(Protocol):
    """What evaluation needs of a tokenizer. ``encode`` adds no special tokens."""

    @property
    def eot_id(self) -> int: ...
    @property
    def byte_lengths(self) -> Int[np.ndarray, "V"]: ...
    def encode(self, text: str, /) -> Int[np.ndarray, "n"]: ...


@dataclasses.dataclass(frozen=True)
class DomainScore:
    """How well a model predicts one body of text."""

    nll_nats: float
    """Sum over the text's tokens of -log p(token | tokens before), in nats."""
    bytes: int
    """UTF-8 bytes of those tokens."""
    tokens: int
    bits_per_byte: float
    """``nll_nats / (ln 2 * bytes)``: comparable between tokenizers."""
    perplexity: float
    """``exp(nll_nats / tokens)``, per token: comparable only for one tokenizer."""
    per_batch: tuple[tuple[float, int], ...]
    """``(nll_nats, bytes)`` of each batch, for the paired bootstrap between arms that read the same
    batches."""


def bits_per_byte(score: ScoreFn, batches: Iterable[Batch], tokenizer: Tokenizer) -> DomainScore:
    """Scores held-out text.

    Targets that are padding (mask False) or the end-of-text token count in neither the loss nor the bytes:
    the latter stands for no bytes of the text, so charging for it would make the figure depend on how long
    documents are. The first token of a document is counted where a batch gives it as the target of the
    end-of-text token before it.

    Raises:
      ConfigError: the batches hold no byte of text.
      FloatingPointError: the model gave NaN for a counted token.
    """
    per_batch: list[tuple[float, int]] = []
    tokens = 0
    for batch in batches:
        logprob, _ = call(score, batch)
        targets = np.asarray(batch["targets"])
        counted = np.asarray(batch["mask"], bool) & (targets != tokenizer.eot_id)
        nll = -float(np.sum(logprob[counted], dtype=np.float64))
        if math.isnan(nll):
            raise FloatingPointError(
                f"held-out text, batch {len(per_batch)}: the model gave NaN for {np.isnan(logprob[counted]).sum()} of "
                f"{counted.sum()} tokens; its parameters or inputs are broken"
            )
        per_batch.append((nll, int(np.sum(tokenizer.byte_lengths[targets[counted]], dtype=np.int64))))
        tokens += int(np.count_nonzero(counted))
    total, size = math.fsum(nll for nll, _ in per_batch), sum(size for _, size in per_batch)
    if size == 0:
        raise ConfigError(f"bits_per_byte: {len(per_batch)} batches hold no byte of text; give held-out text to score")
    return DomainScore(total, size, tokens, total / (math.log(2) * size), exp(total / tokens), tuple(per_batch))


def call(score: ScoreFn, batch: Batch) -> tuple[Float[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """``score(batch)`` as host arrays. Raises ValueError when their shapes are not the batch's."""
    logprob, greedy = (np.asarray(x) for x in score(batch))
    shape = batch["tokens"].shape
    if logprob.shape != shape or greedy.shape != shape:
        raise ValueError(f"score gave shapes {logprob.shape} and {greedy.shape} for tokens {shape}; these must agree")
    return logprob, greedy


def exp(x: float) -> float:
    """``e**x``, inf where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))
