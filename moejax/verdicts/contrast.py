"""What is claimed (:class:`Contrast`) and what was measured (:class:`Arm`).

Notation: ``d = metric(a) - metric(b)``; the *advantage* is ``d`` for the sign ``"a > b"`` and ``-d`` for
``"a < b"``, so it is positive on the claimed side; the *border* is ``+margin`` for "better" and ``-margin``
for "no_loss".
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Sign = Literal["a > b", "a < b"]
Claim = Literal["better", "no_loss"]

_LOWER = (
    "bits_per_byte",
    "mean_bits_per_byte",
    "loss",
    "ce",
    "perplexity",
    "seconds",
    "ms",
    "bytes",
    "dropped_share",
)
_HIGHER = ("accuracy", "tokens_per_s", "mfu", "speedup", "exact_match")
_BETTER_SIGN: dict[str, Sign] = {**dict.fromkeys(_LOWER, "a < b"), **dict.fromkeys(_HIGHER, "a > b")}


def known_sign(metric: str) -> Sign | None:
    """Which sign means "a is better than b" in ``metric``, or None where its direction is not known here.

    What follows the first ``/`` (a domain or task) is not looked at: ``bits_per_byte/english`` is bits per
    byte.
    """
    return _BETTER_SIGN.get(metric.split("/")[0])


def better_sign(metric: str) -> Sign:
    """Which sign means "a is better than b": ``"a < b"`` for bits per byte, ``"a > b"`` for accuracy.

    Raises:
      ValueError: the metric's direction is not known here.
    """
    sign = known_sign(metric)
    if sign is None:
        known = ", ".join(sorted(_BETTER_SIGN))
        raise ValueError(f"metric={metric!r}: no known direction; state the contrast's sign, or use {known}")
    return sign


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One claim about two arms, stated before they run. ``sign`` is in the metric's own direction."""

    name: str
    metric: str
    arm_a: str
    arm_b: str
    sign: Sign
    claim: Claim = "better"
    """"better": a beats b by more than the margin. "no_loss": a is worse than b by less than the margin."""
    margin: float = 0.005
    """In the metric's unit (default: bits per byte)."""
    primary: bool = True
    """At most three of a table are primary and Holm-corrected. Others are reported at plain 95 %."""

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("sign", self.sign, ("a > b", "a < b")),
            ("claim", self.claim, ("better", "no_loss")),
        ):
            if value not in choices:
                raise ValueError(f"contrast {self.name!r}: {field}={value!r}: choose one of {choices}")
        if self.arm_a == self.arm_b:
            raise ValueError(f"contrast {self.name!r}: arm_a=arm_b={self.arm_a!r}: name two different arms")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"contrast {self.name!r}: margin={self.margin}: give a finite number >= 0")
        good = known_sign(self.metric)
        if good is not None and good != self.sign:
            raise ValueError(
                f"contrast {self.name!r}: sign={self.sign!r} claims that {self.arm_a!r} is the worse arm in "
                f"{self.metric}; swap arm_a and arm_b, or use sign={good!r}"
            )

    @classmethod
    def on_metric(cls, name: str, metric: str, better: str, worse: str, **fields: Any) -> "Contrast":
        """The contrast "``better`` beats ``worse``" (or loses nothing to it) with the sign that ``metric``
        asks for.

        Raises:
          ValueError: as :func:`better_sign`, or a field that breaks its rule.
        """
        return cls(name, metric, better, worse, better_sign(metric), **fields)

    @property
    def border(self) -> float:
        """The advantage that the interval must lie above for the claim to hold."""
        return self.margin if self.claim == "better" else -self.margin

    def advantage(self, difference: float) -> float:
        """``metric(a) - metric(b)`` turned so that the claimed side is positive."""
        return difference if self.sign == "a > b" else -difference


@dataclasses.dataclass(frozen=True)
class Arm:
    """What was measured for one arm. Arms of a contrast share checkpoints, tokens and batches."""

    by_seed: Mapping[int, float]
    """Metric by training seed, averaged over data orders and calibration sets. Empty: the arm did not run."""
    batches: Float[np.ndarray, "N"] | Sequence[float] | None = None
    """With one seed: the metric by evaluation batch, in the same order for every arm."""
    weights: Float[np.ndarray, "N"] | Sequence[float] | None = None
    """What the metric averages over in each batch (bytes for bits per byte). None: equal."""
    strata: Sequence[Hashable] | None = None
    """Domain of each batch: resampling stays within one, the statistic is the mean over them. None: one."""
    exercised_share: float | None = None
    """Share of pairs that the arm's mechanism touched. None: the arm has no mechanism (a baseline)."""
