"""Algorithms 1 and 2 of 2503.05066 and the other limits, as obvious loops in float64, and tables to run them on."""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from moejax.types import Routing
from tests import moe_fakes as fakes

TOKENS, K, EXPERTS = 24, 3, 8
LOCAL = (2, 3)


def routed(rng, *, skew=0.0, masked=0, decimals=None, renormalise=False, rows=TOKENS, k=K, experts=EXPERTS, drop=0.0):
    """A token-choice Routing whose probabilities, scores and weights belong together, as a softmax router makes them.

    ``decimals`` rounds the probabilities, so that many are tied; ``drop`` is a share of pairs that are gone already.
    """
    probs = fakes.softmax(1.5 * rng.normal(size=(rows, experts)) - skew * np.arange(experts))
    probs = probs if decimals is None else probs.round(decimals)
    probs = probs.astype(np.float32)
    expert = fakes.topk_rows(probs, k)
    score = np.take_along_axis(probs, expert, 1)
    weight = score / np.maximum(score.sum(1, keepdims=True), 1e-20) if renormalise else score
    valid = (np.arange(rows) < rows - masked)[:, None] & (rng.random((rows, k)) >= drop)
    arrays: dict[str, Any] = {  # NumPy's, so that the loops below are quick
        "expert": expert.astype(np.int32), "weight": weight.astype(np.float32), "score": score, "valid": valid,
        "probs": probs, "logits": np.log(np.maximum(probs, 1e-9)),
    }  # fmt: skip
    return Routing(**arrays)


def cases():
    """``{name: (table, mask)}``: random, tied, skewed, padded, thinned, empty."""
    rng = np.random.default_rng(0)
    tables = {
        "random": (routed(rng), 0),
        "tied": (routed(rng, decimals=1), 0),
        "skewed": (routed(rng, skew=1.0), 0),
        "padded": (routed(rng, skew=0.5, masked=7, decimals=2), 7),
        "thinned": (routed(rng, skew=0.5, drop=0.3), 0),
        "empty": (routed(rng, masked=TOKENS), TOKENS),
    }
    return {name: (table, np.arange(TOKENS) < TOKENS - masked) for name, (table, masked) in tables.items()}


def room(factor, pairs, experts=EXPERTS, rounding="floor"):
    """The capacity in exact arithmetic; ``factor`` as its decimal reads."""
    exact = Fraction(str(factor)) * Fraction(pairs, experts)
    if rounding == "ceil":
        return math.ceil(exact)
    return max(math.floor(exact), 1) if rounding == "at_least_one" and factor > 0 else math.floor(exact)


def pairs_of(made):
    """``[(row, column)]`` of the valid pairs."""
    return [(int(r), int(c)) for r, c in np.argwhere(made.valid)]


def best(candidates, key, most):
    """The first ``most`` by descending key; among equals the earlier candidate."""
    return sorted(candidates, key=lambda c: -key(c))[:most]


def token_drop(made, factor):
    """Algorithm 1: the set of (token, expert) that stay."""
    most, kept = room(factor, len(pairs_of(made))), set()
    for e in range(EXPERTS):
        column = [(r, c) for r, c in pairs_of(made) if made.expert[r, c] == e]
        kept |= {(r, e) for r, c in best(column, lambda p: float(made.score[p]), most)}
    return kept


def expanded_drop(made, mask, factor, *, local=range(EXPERTS), priority="score", floor=0.0):
    """Algorithm 2: the candidates of a token are its own pairs and its rank's experts."""
    most, kept = room(factor, len(pairs_of(made))), set()
    for e in range(EXPERTS):
        column = [(1.0, float(made.score[r, c]), r) for r, c in pairs_of(made) if made.expert[r, c] == e]
        for r in range(TOKENS):  # no token twice: what it has, or the router once had, is no candidate
            score = float(made.probs[r, e])
            if e in local and mask[r] and e not in made.expert[r] and (score > floor or floor <= 0):
                column.append((0.0, score, r))
        column.sort(key=lambda c: c[2])  # among equals the earlier token
        if priority == "topk":
            column = best(best(column, lambda c: c[1], len(column)), lambda c: c[0], most)
        else:
            column = best(column, lambda c: c[1], most)
        kept |= {(r, e) for _, _, r in column}
    return kept


def reroute(made, factor, rounds):
    """Section 3b of the digest, round by round."""
    most = room(factor, len(pairs_of(made)))
    score = {(r, e): float(made.probs[r, e]) for r in range(TOKENS) for e in range(EXPERTS)}
    held = {(r, int(made.expert[r, c])) for r, c in pairs_of(made)}
    wanted = {r: sum(t == r for t, _ in held) for r in range(TOKENS)}
    for r in range(TOKENS):
        for c in range(K):
            if not made.valid[r, c]:
                score[r, int(made.expert[r, c])] = -1.0
    for i in range(rounds):
        for r in range(TOKENS) if i else ():
            short = wanted[r] - sum(t == r for t, _ in held)
            free = [e for e in range(EXPERTS) if (r, e) not in held and score[r, e] >= 0]
            held |= {(r, e) for e in best(free, lambda e, r=r: score[r, e], max(short, 0))}
        for e in range(EXPERTS):
            column = sorted(r for r, x in held if x == e)
            stay = best(column, lambda r, e=e: score[r, e], most)
            for r in set(column) - set(stay):
                held.remove((r, e))
                score[r, e] = -1.0
    return held


def expert_drop(made, count):
    load = [sum(made.expert[p] == e for p in pairs_of(made)) for e in range(EXPERTS)]
    skipped = sorted(range(EXPERTS), key=lambda e: load[e])[:count]
    return {(r, int(made.expert[r, c])) for r, c in pairs_of(made) if made.expert[r, c] not in skipped}


def device_budget(made, factor, ranks):
    size, kept = EXPERTS // ranks, set()
    most = room(factor * size if factor != math.inf else 10**6, len(pairs_of(made)))
    for device in range(ranks):
        there = [(r, c) for r, c in pairs_of(made) if made.expert[r, c] // size == device]
        kept |= {(r, int(made.expert[r, c])) for r, c in best(there, lambda p: float(made.score[p]), most)}
    return kept


def measured_budget(made, ranks, seconds):
    """Drops from the slowest device what it needs beyond the second-slowest."""
    size, kept = EXPERTS // ranks, set()
    there = [[p for p in pairs_of(made) if made.expert[p] // size == d] for d in range(ranks)]
    time = [Fraction(len(pairs)) * Fraction(s) for pairs, s in zip(there, seconds, strict=True)]
    second = sorted(time)[-2]
    for device, pairs in enumerate(there):
        most = len(pairs) if time[device] <= second else math.floor(second / Fraction(seconds[device]))
        kept |= {(r, int(made.expert[r, c])) for r, c in best(pairs, lambda p: float(made.score[p]), most)}
    return kept


def kept_set(table):
    """The set of (token, expert) of a Routing; no pair may stand twice."""
    valid, expert = np.asarray(table.valid), np.asarray(table.expert)
    token = np.arange(len(valid)) if table.token is None else np.asarray(table.token)
    pairs = [(int(token[r]), int(expert[r, c])) for r, c in np.argwhere(valid)]
    assert len(set(pairs)) == len(pairs)
    return set(pairs)


def loads(table, experts=EXPERTS):
    return np.bincount([e for _, e in kept_set(table)], minlength=experts)
