"""Byte n-gram models: the floor that a language model must beat.

Interpolated Kneser-Ney (Kneser and Ney 1995, in the interpolated form of Chen and Goodman 1998), down to the
uniform distribution over 256 bytes::

    p_k(b | h) = max(c_k(h b) - D_k, 0) / c_k(h) + D_k N_k(h) / c_k(h) * p_{k-1}(b | h')        p_0 = 1/256

``h`` are the k-1 bytes before ``b`` and ``h'`` the last k-2 of them; ``N_k(h)`` counts the distinct bytes
seen after ``h``; ``D_k = n1 / (n1 + 2 n2)`` from the numbers of k-grams seen once and twice. At the highest
order ``c`` counts occurrences, below it the distinct bytes seen before the k-gram. A context never seen
leaves the decision to the next shorter one. Contexts end at the beginning of a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moejax.config import ConfigError
from moejax.data import cache
from moejax.data.corpus import Corpus

MAX_ORDER = 8  # bytes in a 64-bit key
_VERSION = 1  # of cached results


@dataclass(frozen=True)
class _Level:
    """One order: sorted k-grams with discounted probabilities, sorted contexts with what they pass down."""

    grams: np.ndarray
    probabilities: np.ndarray
    contexts: np.ndarray
    passed_down: np.ndarray


class ByteNGram:
    """A byte n-gram model with interpolated Kneser-Ney smoothing.

    Args:
      documents: texts to fit on.
      order: longest n-gram, 1 to 8; 3 is a trigram, with two bytes of context.

    Raises:
      ConfigError: an order outside 1..8, or no bytes at all.
    """

    def __init__(self, documents: Sequence[str | bytes], order: int):
        if not 1 <= order <= MAX_ORDER:
            raise ConfigError(f"order={order}: an n-gram of bytes has order 1 to {MAX_ORDER}")
        data, depth = _join(documents, order)
        if not len(data):
            raise ConfigError("documents: no bytes to fit an n-gram model on")
        self.order = order
        grams, counts = np.unique(_keys(data, order)[depth >= order], return_counts=True)
        levels = [_level(grams, counts)]
        for k in range(order - 1, 0, -1):
            # every (k+1)-gram is one distinct byte before its last k bytes; documents shorter than an order
            # leave none, and then occurrences are counted instead
            if len(grams):
                grams, counts = np.unique(grams & np.uint64(256**k - 1), return_counts=True)
            else:
                grams, counts = np.unique(_keys(data, k)[depth >= k], return_counts=True)
            levels.append(_level(grams, counts))
        self._levels = levels[::-1]

    def probabilities(self, documents: Sequence[str | bytes]) -> np.ndarray:
        """float64: the probability of each byte of ``documents``, given those before it in its document."""
        data, depth = _join(documents, self.order)
        result = np.full(len(data), 1 / 256)
        for k, level in enumerate(self._levels, 1):
            reached = np.flatnonzero(depth >= k)
            keys = _keys(data, k)[reached]
            # sorted look-ups walk the table in order, and repeated ones are made once
            asked, back = np.unique(keys, return_inverse=True)
            own = _look_up(level.grams, level.probabilities, asked, 0.0)
            passed_down = _look_up(level.contexts, level.passed_down, asked >> np.uint64(8), 1.0)
            result[reached] = own[back] + passed_down[back] * result[reached]
        return result

    def next_byte(self, context: bytes) -> np.ndarray:
        """float64 ``[256]``: probabilities of the byte after ``context``, the beginning of a document."""
        rows = [context + bytes([b]) for b in range(256)]
        return self.probabilities(rows)[len(context) :: len(context) + 1]

    def bits_per_byte(self, documents: str | bytes | Sequence[str | bytes]) -> float:
        """Mean of ``-log2 p`` over the bytes of ``documents``. Ends of documents are given, not predicted.

        Raises:
          ConfigError: no bytes.
        """
        texts = [documents] if isinstance(documents, str | bytes) else documents
        p = self.probabilities(texts)
        if not len(p):
            raise ConfigError("documents: no bytes to score")
        return float(-np.log2(p).mean())


def ngram_baseline(corpus: Corpus, order: int, split: str = "valid", max_train_bytes: int = 0) -> dict[str, float]:
    """Bits per byte of n-gram models by domain, each fitted on the train split of its own domain.

    One model per domain is the stronger baseline: a model fitted on all domains would first have to tell them
    apart. Results are kept in the corpus cache.

    Args:
      corpus: texts.
      order: 3 for a trigram.
      split: what is scored.
      max_train_bytes: fit on about the first so many bytes of each train split. 0: all.

    Returns:
      Bits per byte of the domains that have both a train split and ``split``.
    """
    path = corpus.cache_dir / "ngram" / f"{corpus.hash}.json"
    kept = cache.read_json(path)
    kept = kept if isinstance(kept, dict) else {}
    result = {}
    for domain in corpus.domains:
        if not {"train", split} <= set(corpus.splits(domain)):
            continue
        key = f"{_VERSION} {domain} {split} order={order} max_train_bytes={max_train_bytes}"
        if not isinstance(kept.get(key), float):
            texts = _first_bytes(corpus.documents(domain, "train"), max_train_bytes)
            kept[key] = ByteNGram(texts, order).bits_per_byte(corpus.documents(domain, split))
            cache.write_json(path, kept)
        result[domain] = kept[key]
    return result


def _first_bytes(documents: Sequence[str], limit: int) -> list[bytes]:
    encoded: list[bytes] = []
    left = limit
    for text in documents:
        if limit and left <= 0:
            break
        encoded.append(text.encode()[:left] if limit else text.encode())
        left -= len(encoded[-1])
    return encoded


def _join(documents: Sequence[str | bytes], order: int) -> tuple[np.ndarray, np.ndarray]:
    """All bytes, and for each how many bytes of its document end with it, at most ``order``."""
    parts = [text.encode() if isinstance(text, str) else text for text in documents]
    data = np.frombuffer(b"".join(parts), np.uint8)
    depth = np.full(len(data), order, np.uint8)
    start = 0
    for part in parts:
        depth[start : start + min(order, len(part))] = np.arange(1, min(order, len(part)) + 1)
        start += len(part)
    return data, depth


def _keys(data: np.ndarray, k: int) -> np.ndarray:
    """uint64: the last ``k`` bytes up to each position, the latest in the lowest bits."""
    keys = np.zeros(len(data), np.uint64)
    for back in range(min(k, len(data))):
        keys[back:] |= data[: len(data) - back].astype(np.uint64) << np.uint64(8 * back)
    return keys


def _level(grams: np.ndarray, counts: np.ndarray) -> _Level:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    if not twice and once:
        discount = 0.5  # the estimate would be 1: every k-gram seen once would be forgotten
    # grams are sorted, so those of one context are neighbours
    contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
    distinct = np.diff(np.append(first, len(grams)))
    totals = np.add.reduceat(counts, first) if len(grams) else np.empty(0, counts.dtype)
    probabilities = (counts - discount) / np.repeat(totals, distinct)
    return _Level(grams, probabilities, contexts, discount * distinct / totals)


def _look_up(table: np.ndarray, values: np.ndarray, keys: np.ndarray, missing: float) -> np.ndarray:
    if not len(table):
        return np.full(len(keys), missing)
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[place] == keys, values[place], missing)
