"""From contrasts and measurements to verdicts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.verdicts.contrast import Arm, Contrast
from moejax.verdicts.intervals import (
    ALPHA,
    MIN_BATCHES,
    RESAMPLES,
    BatchBootstrap,
    Sample,
    SeedDifferences,
    holm,
)

REPRODUCED = "reproduced"
DIRECTION = "direction"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
NOT_EXERCISED = "not exercised"
NOT_RUN = "not run"
VERDICTS = (REPRODUCED, DIRECTION, NOT_REPRODUCED, INCONCLUSIVE, NOT_EXERCISED, NOT_RUN)
ONE_MODEL = " (one model)"
"""Suffix of a verdict that rests on one trained model and a bootstrap over its evaluation batches."""

MIN_SEEDS = 3
MAX_PRIMARY = 3
MIN_EXERCISED = 0.01


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The outcome of one contrast. ``difference`` and ``interval`` are of ``metric(a) - metric(b)``."""

    contrast: Contrast
    verdict: str
    note: str
    difference: float | None = None
    interval: tuple[float, float] | None = None
    interval_kind: str = ""
    p_value: float | None = None
    """Two-sided, of "the advantage equals the border"; Holm-adjusted for primary contrasts."""
    differences_by_seed: dict[int, float] = dataclasses.field(default_factory=dict)
    exercised_share: float | None = None

    def row_fields(self) -> dict[str, Any]:
        """Keyword arguments of ``results.ResultRow`` for a row of kind "contrast"."""
        c = self.contrast
        return {
            "kind": "contrast",
            "row": c.name,
            "metric": c.metric,
            "arm_a": c.arm_a,
            "arm_b": c.arm_b,
            "sign": c.sign,
            "claim": c.claim,
            "margin": c.margin,
            "value": self.difference,
            "difference": self.difference,
            "values_by_seed": dict(self.differences_by_seed),
            "interval": self.interval,
            "interval_kind": self.interval_kind,
            "verdict": self.verdict,
            "verdict_note": self.note,
            "exercised_share": self.exercised_share,
        }


@dataclasses.dataclass(frozen=True)
class _Untestable:
    verdict: str
    why: str


def at_chance(value: float, stderr: float, chance: float) -> bool:
    """Whether a task's baseline is within two standard errors of chance, so that it can show nothing."""
    return abs(value - chance) <= 2 * stderr


def side_of(interval: tuple[float, float], contrast: Contrast) -> str:
    """Where an interval of the *advantage* lies: ``DIRECTION``, ``NOT_REPRODUCED`` or ``INCONCLUSIVE``.

    "better", margin m: direction iff ``lo > m``; not reproduced (within +-m or opposite) iff ``hi <= m``.
    "no_loss": direction (the loss stays under m) iff ``lo > -m``; not reproduced iff ``hi <= -m``.
    """
    low, high = interval
    if low > contrast.border:
        return DIRECTION
    return NOT_REPRODUCED if high <= contrast.border else INCONCLUSIVE


def judge(
    contrasts: Sequence[Contrast],
    arms: Mapping[str, Arm],
    *,
    same_setting: bool = False,
    baseline_at_chance: bool = False,
    alpha: float = ALPHA,
    resamples: int = RESAMPLES,
    bootstrap_seed: int = 0,
) -> list[Judgement]:
    """Judges all contrasts of one table; Holm's family is the primary ones *as stated*, whether they ran or
    not.

    Args:
      contrasts: what was claimed beforehand, at most three of them primary.
      arms: what was measured, by arm name. A missing or empty arm gives "not run".
      same_setting: the published model and data were used: a claim that holds is "reproduced", not
      "direction". baseline_at_chance: the table's baseline does not beat chance (:func:`at_chance`): all is
      "not exercised". alpha: 1 - coverage before correction.
      resamples: of the bootstrap.
      bootstrap_seed: the same resamples are used for every contrast.

    Raises:
      ValueError: more than three primary contrasts, two of one name, or arms whose batches differ.
    """
    primary = [c.name for c in contrasts if c.primary]
    if len(primary) > MAX_PRIMARY:
        raise ValueError(f"primary contrasts={primary}: at most {MAX_PRIMARY}; set primary=False on the others")
    if len({c.name for c in contrasts}) != len(contrasts):
        raise ValueError(f"contrasts={[c.name for c in contrasts]}: names must differ")

    samples = [_sample(c, arms, resamples, bootstrap_seed) for c in contrasts]
    # A contrast that cannot be tested keeps its place in the family, with p = 1.
    p_values = [
        1.0 if isinstance(s, _Untestable) else s.p_value(c.border) for c, s in zip(contrasts, samples, strict=True)
    ]
    levels = [alpha] * len(contrasts)
    family = [i for i, c in enumerate(contrasts) if c.primary]
    for i, p, level in zip(family, *holm([p_values[i] for i in family], alpha), strict=True):
        p_values[i], levels[i] = p, level
    judgements = []
    for contrast, sample, p, level in zip(contrasts, samples, p_values, levels, strict=True):
        found = _decide(contrast, sample, arms, p, level, len(family), same_setting)
        judgements.append(_unless_idle(found, baseline_at_chance))
    return judgements


def _common_seeds(contrast: Contrast, arms: Mapping[str, Arm]) -> list[int]:
    return sorted(set(arms[contrast.arm_a].by_seed) & set(arms[contrast.arm_b].by_seed))


def _sample(contrast: Contrast, arms: Mapping[str, Arm], resamples: int, seed: int) -> Sample | _Untestable:
    """The sample of the advantage, or why there is none."""
    missing = [repr(n) for n in (contrast.arm_a, contrast.arm_b) if n not in arms or not arms[n].by_seed]
    if missing:
        return _Untestable(NOT_RUN, f"no measurement of {' and '.join(missing)}")
    a, b = arms[contrast.arm_a], arms[contrast.arm_b]
    seeds = _common_seeds(contrast, arms)
    if len(seeds) >= MIN_SEEDS:
        return SeedDifferences([contrast.advantage(a.by_seed[s] - b.by_seed[s]) for s in seeds])
    if len(seeds) != 1:
        why = f"{len(seeds)} seeds in both arms: an interval needs {MIN_SEEDS}, or 1 with its batches"
        return _Untestable(INCONCLUSIVE, why)
    if a.batches is None or b.batches is None:
        return _Untestable(INCONCLUSIVE + ONE_MODEL, "one seed and no values by evaluation batch: no interval")
    pairs = {
        "number of batches": (len(a.batches), len(b.batches)),
        "weights": tuple(None if w is None else [float(v) for v in w] for w in (a.weights, b.weights)),
        "strata": tuple(None if s is None else list(s) for s in (a.strata, b.strata)),
    }
    for field, (left, right) in pairs.items():
        if left != right:
            raise ValueError(
                f"contrast {contrast.name!r}: {field} of {contrast.arm_a!r} and {contrast.arm_b!r} differ; "
                "a paired bootstrap needs both arms on the same batches in the same order"
            )
    sizes = [len(a.batches)] if a.strata is None else [list(a.strata).count(s) for s in set(a.strata)]
    if min(sizes, default=0) < MIN_BATCHES:
        where = "" if a.strata is None else " in the smallest domain"
        why = f"{min(sizes, default=0)} evaluation batches{where}: a bootstrap needs {MIN_BATCHES}"
        return _Untestable(INCONCLUSIVE + ONE_MODEL, why)
    differences = np.asarray(a.batches, dtype=np.float64) - np.asarray(b.batches, dtype=np.float64)
    advantages = differences if contrast.sign == "a > b" else -differences
    return BatchBootstrap(advantages, a.weights, a.strata, resamples, seed)


def _decide(
    contrast: Contrast,
    sample: Sample | _Untestable,
    arms: Mapping[str, Arm],
    p_value: float,
    level: float,
    family: int,
    same_setting: bool,
) -> Judgement:
    """The verdict that the interval alone gives."""
    if isinstance(sample, _Untestable) and sample.verdict == NOT_RUN:
        return Judgement(contrast, sample.verdict, sample.why)
    a, b = arms[contrast.arm_a], arms[contrast.arm_b]
    by_seed = {s: a.by_seed[s] - b.by_seed[s] for s in _common_seeds(contrast, arms)}
    shares = [arm.exercised_share for arm in (a, b) if arm.exercised_share is not None]
    judgement = Judgement(
        contrast,
        INCONCLUSIVE,
        "",
        difference=float(np.mean(list(by_seed.values()))) if by_seed else None,
        differences_by_seed=by_seed,
        exercised_share=min(shares, default=None),
    )
    if isinstance(sample, _Untestable):
        return dataclasses.replace(judgement, verdict=sample.verdict, note=sample.why)

    low, high = sample.interval(level)
    verdict = side_of((low, high), contrast)
    if same_setting and verdict == DIRECTION:
        verdict = REPRODUCED
    one_model = isinstance(sample, BatchBootstrap)
    kind = f"{100 * (1 - level):.4g} %, {sample.kind}"
    if not contrast.primary:
        kind += "; secondary, not corrected"
    elif family > 1:
        kind += f"; Holm over {family}"
    note = f"advantage {sample.mean:+.4f} [{low:+.4f}, {high:+.4f}], border {contrast.border:+.4f}"
    left_out = sorted(set(a.by_seed) ^ set(b.by_seed))
    if left_out:
        note += f"; seeds {left_out} are in one arm only and left out"
    return dataclasses.replace(
        judgement,
        verdict=verdict + (ONE_MODEL if one_model else ""),
        note=note,
        # The bootstrap's own estimate, so that it lies in the interval it is shown with.
        difference=contrast.advantage(sample.mean),
        interval=(low, high) if contrast.sign == "a > b" else (-high, -low),
        interval_kind=kind,
        p_value=p_value,
    )


def _unless_idle(judgement: Judgement, baseline_at_chance: bool) -> Judgement:
    """Replaces the verdict by "not exercised" where the mechanism or the task could not show anything."""
    share = judgement.exercised_share
    if judgement.verdict == NOT_RUN:
        return judgement
    if share is not None and share < MIN_EXERCISED:
        why = f"the mechanism touched {share:.2%} of pairs, under {MIN_EXERCISED:.0%}"
    elif baseline_at_chance:
        why = "the baseline is within two standard errors of chance"
    else:
        return judgement
    return dataclasses.replace(judgement, verdict=NOT_EXERCISED, note=f"{why}; {judgement.note}")


def judge_value(
    value: float | None, published: float | None, *, same_setting: bool, tolerance: float = 0.0
) -> tuple[str | None, str]:
    """Verdict and note of one value: for scale-free facts (bytes, counts, exactness) or the published model
    and data.

    Returns ``(None, why)`` where the value was measured in another setting: the loss of a small model neither
    confirms nor refutes an accuracy of a large one; the table's contrasts are judged in its place.
    """
    if value is None:
        return NOT_RUN, "no measurement"
    if published is None:
        return None, "nothing was published to compare with"
    if not same_setting:
        return None, "another model, data or metric than the published value: judged by contrasts only"
    off = abs(value - published)
    note = f"off by {off:.4g}, tolerance {tolerance:.4g}"
    return (REPRODUCED if off <= tolerance else NOT_REPRODUCED), note


def count_verdicts(verdicts: Sequence[str | None]) -> dict[str, int]:
    """How often each verdict occurs. Every base verdict is listed, with 0 too; suffixed ones apart."""
    counts = dict.fromkeys(VERDICTS, 0)
    for verdict in verdicts:
        if verdict:
            counts[verdict] = counts.get(verdict, 0) + 1
    return counts
