"""Verdicts: what a comparison of two arms shows, decided by rules that were fixed before it ran.

A :class:`Contrast` states the arms, the sign in the metric, the kind of claim and the margin *before* a run;
:func:`judge` takes what was measured and returns one :class:`Judgement` for each. ``docs/results.md`` has the
rules in prose.
"""

from moejax.verdicts.contrast import Arm, Contrast, better_sign
from moejax.verdicts.intervals import ALPHA, MIN_BATCHES, RESAMPLES, BatchBootstrap, SeedDifferences, holm
from moejax.verdicts.rules import (
    DIRECTION,
    INCONCLUSIVE,
    NOT_EXERCISED,
    NOT_REPRODUCED,
    NOT_RUN,
    ONE_MODEL,
    REPRODUCED,
    VERDICTS,
    Judgement,
    at_chance,
    count_verdicts,
    judge,
    judge_value,
    side_of,
)

__all__ = [
    "ALPHA",
    "DIRECTION",
    "INCONCLUSIVE",
    "MIN_BATCHES",
    "NOT_EXERCISED",
    "NOT_REPRODUCED",
    "NOT_RUN",
    "ONE_MODEL",
    "REPRODUCED",
    "RESAMPLES",
    "VERDICTS",
    "Arm",
    "BatchBootstrap",
    "Contrast",
    "Judgement",
    "SeedDifferences",
    "at_chance",
    "better_sign",
    "count_verdicts",
    "holm",
    "judge",
    "judge_value",
    "side_of",
]
