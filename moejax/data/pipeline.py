"""Examples: windows of a token stream, mixed over domains for training, in order for evaluation.

A window is ``seq_len + 1`` tokens; windows overlap by one token, so every token is a target once. Batches are
dicts of

    tokens, targets    int32 [B, S]   targets[b, s] follows tokens[b, s] in the stream
    segment_ids        int32 [B, S]   number of the document within the window, from 1; 0 on padding
    positions          int32 [B, S]   position in the document; a window that begins inside one starts at 0
    mask               bool  [B, S]   a real target; False only on the padding of evaluation
    domain             int32 [B]      index in ``corpus.domains``
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from moejax.config import ConfigError
from moejax.data.corpus import Corpus

Batch = dict[str, np.ndarray]

_ENDLESS = 1 << 40  # examples; grain's own endless repeat overflows its length in batches of one


def pack(windows: np.ndarray, eot_id: int) -> Batch:
    """Fields of a batch (without ``domain``) from its windows.

    Args:
      windows: int ``[B, S+1]``.
      eot_id: the token that begins each document.
    """
    windows = windows.astype(np.int32)
    tokens = windows[:, :-1]
    begins = tokens == eot_id
    begins[:, 0] = True
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": np.ascontiguousarray(tokens),
        "targets": np.ascontiguousarray(windows[:, 1:]),
        "segment_ids": np.cumsum(begins, axis=1, dtype=np.int32),
        "positions": places - np.maximum.accumulate(np.where(begins, places, 0), axis=1),
        "mask": np.ones(tokens.shape, bool),
    }


def mix_proportions(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Whole proportions for ``grain.MapDataset.mix``; the smallest positive one is 100 (within 0.5 %)."""
    smallest = min(weight for weight in weights if weight > 0)
    return tuple(round(100 * weight / smallest) for weight in weights if weight > 0)


class TrainIterator:
    """Endless training batches; see :func:`train_iterator`."""

    def __init__(self, batches: grain.IterDataset, facts: dict[str, Any]):
        self._iterator: grain.DatasetIterator = iter(batches)
        self._facts = facts

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, as JSON values, with what it depends on."""
        return {**self._facts, "grain": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at the example after ``state``.

        Raises:
          ConfigError: the state is of other texts, another tokenizer, sequence length, batch size, seed or
            mixture.
        """
        for name, value in self._facts.items():
            if state.get(name) != value:
                raise ConfigError(
                    f"data state: {name}={state.get(name)!r} when it was saved, {value!r} now; an exact"
                    " continuation needs the same: restore the setting, or start a new workdir"
                )
        self._iterator.set_state(state["grain"])


def train_iterator(corpus: Corpus, *, batch_size: int, seed: int) -> TrainIterator:
    """Endless batches of the train splits, mixed by ``corpus.weights``.

    Each domain's windows are shuffled anew in each epoch and repeated; domains are interleaved in fixed
    proportions, so every batch has nearly the asked shares. The last tokens of a domain's stream that fill no
    window (fewer than ``seq_len``) are left out. The same corpus, batch size and seed give the same batches,
    whatever was read before ``set_state``.

    Args:
      corpus: texts, weights and tokenizer.
      batch_size: examples per batch, over all devices.
      seed: of the order.

    Raises:
      ConfigError: a train split shorter than one window.
    """
    if batch_size < 1:
        raise ConfigError(f"train.batch_size={batch_size}: must be at least 1")
    indices = [i for i, weight in enumerate(corpus.weights) if weight > 0]
    streams = {i: corpus.tokens(corpus.domains[i], "train").ids for i in indices}
    proportions = mix_proportions(corpus.weights)
    seq_len, eot_id = corpus.seq_len, corpus.tokenizer.eot_id
    parts = []
    for i in indices:
        count = (len(streams[i]) - 1) // seq_len
        if count < 1:
            raise ConfigError(
                f"data.seq_len={seq_len}: the train split of {corpus.domains[i]!r} has {len(streams[i])}"
                f" tokens, fewer than one window of {seq_len + 1}; shorten it or add text"
            )
        # adjacent seeds must not give the same orders one epoch apart (grain adds the epoch to the seed)
        order = int.from_bytes(hashlib.sha256(f"{seed}/{corpus.domains[i]}".encode()).digest()[:4], "little")
        windows = grain.MapDataset.range(count).map(lambda index, i=i: np.array([i, index], np.int64))
        parts.append(windows.shuffle(seed=order).repeat(-(-_ENDLESS // count)))

    def assemble(rows: np.ndarray) -> Batch:
        windows = np.empty((len(rows), seq_len + 1), np.int32)
        for row, (i, index) in enumerate(rows):
            windows[row] = streams[i][index * seq_len : (index + 1) * seq_len + 1]
        return {**pack(windows, eot_id), "domain": rows[:, 0].astype(np.int32)}

    mixed = grain.MapDataset.mix(parts, proportions).batch(batch_size).map(assemble)
    facts = {
        "data": corpus.hash,
        "tokenizer": corpus.tokenizer.hash,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "domains": [corpus.domains[i] for i in indices],
        "proportions": list(proportions),
    }
    # one thread stays a few batches ahead; assembling one is copying, so more threads would gain nothing
    return TrainIterator(mixed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)), facts)


def eval_batches(corpus: Corpus, domain: str, split: str, *, batch_size: int, max_tokens: int = 0) -> Iterator[Batch]:
    """Windows of one split in order; every token but the first end-of-text is a target exactly once.

    All batches have the same shapes: the last window and the last batch are padded with end-of-text tokens,
    ``segment_ids`` 0 and ``mask`` False.

    Args:
      corpus: texts and tokenizer.
      domain, split: what to read.
      batch_size: examples per batch.
      max_tokens: only the first so many targets. 0: all.

    Raises:
      ConfigError: no such domain or split (before the first batch).
    """
    if batch_size < 1:
        raise ConfigError(f"eval.batch_size={batch_size}: must be at least 1")
    if max_tokens < 0:
        raise ConfigError(f"eval.max_tokens={max_tokens}: must be at least 0 (0: all)")
    return _eval_batches(corpus, domain, corpus.tokens(domain, split).ids, batch_size, max_tokens)


def _eval_batches(corpus: Corpus, domain: str, ids: np.ndarray, batch_size: int, max_tokens: int) -> Iterator[Batch]:
    seq_len, eot_id = corpus.seq_len, corpus.tokenizer.eot_id
    targets = len(ids) - 1
    if max_tokens:
        targets = min(targets, max_tokens)
    index = np.full(batch_size, corpus.domains.index(domain), np.int32)
    step = batch_size * seq_len
    for first in range(0, targets, step):
        count = min(step, targets - first)
        flat = np.full(step + 1, eot_id, np.int32)
        flat[: count + 1] = ids[first : first + count + 1]
        windows = flat[np.arange(batch_size)[:, None] * seq_len + np.arange(seq_len + 1)]
        batch = pack(windows, eot_id)
        mask = (np.arange(step) < count).reshape(batch_size, seq_len)
        batch["tokens"] = np.where(mask, batch["tokens"], np.int32(eot_id))
        batch["targets"] = np.where(mask, batch["targets"], np.int32(eot_id))
        for name in ("segment_ids", "positions"):
            batch[name] = np.where(mask, batch[name], np.int32(0))
        yield {**batch, "mask": mask, "domain": index}
