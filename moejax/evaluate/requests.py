"""Items of tasks as token sequences, and these as padded batches of few shapes."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from moejax.config import ConfigError, RopeConfig
from moejax.evaluate.scoring import Batch, Tokenizer
from moejax.tasks import Task

WIDE = 2048
"""Sequence length above which rows are as wide as the requests need."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A token sequence whose tokens from ``start`` on are scored, each given all before it."""

    tokens: Int[np.ndarray, "n"]
    start: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What has to be scored for one task, and which request serves which item."""

    requests: list[Request]
    """Without repetitions: the reference terms of yes and no are computed once."""
    options: list[list[int]]
    """For each item the requests of its options."""
    neutral: list[list[int]]
    """For each item the requests of its options' reference terms; empty without ``acc_pmi``."""
    cut: list[int]
    """Requests of each item whose context was cut."""


def encode_request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """``eot + encode(context + continuation)``, scored from where it departs from ``encode(context)``.

    The text is tokenised whole, as in training. Where a token spans the boundary, it belongs to the
    continuation, so that every byte of the continuation is always scored (with the few of the context that
    share its first token).

    Raises:
      ConfigError: the continuation is empty or adds no token.
    """
    whole = np.asarray(tokenizer.encode(context + continuation), np.int32)
    prefix = np.asarray(tokenizer.encode(context) if context else [], np.int32)
    n = min(len(whole), len(prefix))
    differs = np.flatnonzero(whole[:n] != prefix[:n])
    common = int(differs[0]) if len(differs) else n
    if common == len(whole):
        raise ConfigError(f"continuation={continuation!r} adds no token to its context; there is nothing to score")
    return Request(np.concatenate([np.array([tokenizer.eot_id], np.int32), whole]), 1 + common)


def prepare(task: Task, tokenizer: Tokenizer, seq_len: int) -> Plan:
    """Tokenises a task and cuts the contexts that do not fit.

    Raises:
      ConfigError: no items, an empty option, or an option longer than ``seq_len``.
    """
    plan = Plan([], [], [], [])
    if not task.items:
        raise ConfigError(f"task {task.name!r} has no items; there is nothing to score")
    known: dict[tuple[bytes, int], int] = {}
    reference = np.asarray(tokenizer.encode(task.neutral) if task.neutral else [], np.int32)
    reference = np.concatenate([np.array([tokenizer.eot_id], np.int32), reference])

    def add(requests: list[Request]) -> list[int]:
        # All lose the same number of tokens, so that no option is judged on more context than another.
        surplus = max(0, *(len(r.tokens) - 1 - seq_len for r in requests))
        indices = []
        for request in requests:
            drop = min(surplus, request.start - 1)
            plan.cut[-1] += drop > 0
            request = Request(request.tokens[drop:], request.start - drop)
            key = (request.tokens.tobytes(), request.start)
            if key not in known:
                known[key] = len(plan.requests)
                plan.requests.append(request)
            indices.append(known[key])
        return indices

    for item in task.items:
        plan.cut.append(0)
        requests = []
        for option, context in enumerate(item.contexts):
            if not item.choices[option].strip():
                raise ConfigError(f"{item.id}: option {option} is empty; there is nothing to score")
            request = encode_request(tokenizer, context, item.continuation(option))
            if (length := len(request.tokens) - request.start) > seq_len:
                raise ConfigError(
                    f"{item.id}: option {option} has {length} tokens, more than seq_len={seq_len}; "
                    f"use a longer seq_len or a tokenizer with longer tokens, or leave the row out"
                )
            requests.append(request)
        plan.options.append(add(requests))
        if task.kind == "multiple_choice":
            choices = [r.tokens[r.start :] for r in requests]
            plan.neutral.append(add([Request(np.concatenate([reference, c]), len(reference)) for c in choices]))
    return plan


def bucket_lengths(seq_len: int) -> tuple[int, ...]:
    """Row lengths that occur: an eighth, a quarter, a half and all of ``seq_len``, rounded up."""
    return tuple(sorted({-(-seq_len // parts) for parts in (8, 4, 2, 1)}))


def window_of(longest: int, seq_len: int) -> int:
    """``seq_len``, halved while that holds ``longest`` tokens and it is above ``WIDE``: the short requests of a model
    of 131,072 tokens are not padded to an eighth of these."""
    while seq_len > WIDE and -(-seq_len // 2) >= longest:
        seq_len = -(-seq_len // 2)
    return seq_len


def narrow_rows(rope: RopeConfig) -> int:
    """``short`` of :func:`request_batches`: LongRoPE chooses its factors by the width of a batch."""
    return rope.original_length if rope.scaling == "longrope" else 0


def request_batches(
    requests: Sequence[Request], batch_size: int, seq_len: int, short: int = 0
) -> Iterator[tuple[Batch, list[tuple[int, int]]]]:
    """Batches of one request a row, and ``(request, row)`` for each row that holds one.

    Rows are padded on the right, short batches below, with mask False and segment 0. Requests go to the
    shortest bucket that holds them; what would not fill a batch of its bucket goes to the next one, so that
    fewer shapes are compiled. But ``short`` is a bucket of its own, and no request of up to so many tokens goes
    beyond it.
    """
    lengths = np.array([len(r.tokens) - 1 for r in requests])
    pending: list[int] = []
    shorter = 0
    last = {seq_len, short} if 0 < short < seq_len else {seq_len}
    for size in sorted({*bucket_lengths(seq_len), *last}):
        pending += np.flatnonzero((lengths > shorter) & (lengths <= size)).tolist()
        shorter, rows = size, batch_size * (seq_len // size)
        if not pending or (size not in last and len(pending) < rows):
            continue
        pending.sort(key=lambda i: lengths[i])
        for begin in range(0, len(pending), rows):
            chunk = pending[begin : begin + rows]
            tokens, targets = np.zeros((rows, size), np.int32), np.zeros((rows, size), np.int32)
            mask = np.zeros((rows, size), bool)
            for row, index in enumerate(chunk):
                n = lengths[index]
                tokens[row, :n], targets[row, :n] = requests[index].tokens[:-1], requests[index].tokens[1:]
                mask[row, :n] = True
            positions = np.where(mask, np.arange(size, dtype=np.int32), 0).astype(np.int32)
            batch = {"tokens": tokens, "targets": targets, "positions": positions}
            batch |= {"segment_ids": mask.astype(np.int32), "mask": mask}
            yield batch, [(index, row) for row, index in enumerate(chunk)]
        pending = []
