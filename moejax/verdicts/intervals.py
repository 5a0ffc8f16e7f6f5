"""Intervals of a mean difference over seeds or over evaluation batches, and Holm's correction."""

import math
from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float
from scipy import stats

ALPHA = 0.05
RESAMPLES = 10_000
MIN_BATCHES = 8
"""Fewest evaluation batches that are resampled. With 8, the strictest level in use (5 % / 3) reads the 4th of
10,000 resamples from either end; with fewer it would soon read past the last one."""


class Sample(Protocol):
    """A mean with an interval at any level, and the p-value that belongs to it."""

    mean: float
    kind: str

    def interval(self, alpha: float) -> tuple[float, float]: ...
    def p_value(self, border: float) -> float: ...


class SeedDifferences:
    """Per-seed differences: ``mean +- t(n-1, 1-alpha/2) s / sqrt(n)`` with the sample standard deviation
    ``s``."""

    kind = "t over seeds"

    def __init__(self, differences: Sequence[float] | Float[np.ndarray, "N"]) -> None:
        values = np.asarray(differences, dtype=np.float64)
        if len(values) < 2:
            raise ValueError(f"{len(values)} seeds: a standard deviation needs at least 2")
        self.n = len(values)
        self.mean = float(values.mean())
        self.error = float(values.std(ddof=1) / math.sqrt(self.n))

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The two-sided interval of coverage ``1 - alpha``."""
        half = float(stats.t.ppf(1 - alpha / 2, self.n - 1)) * self.error
        return self.mean - half, self.mean + half

    def p_value(self, border: float) -> float:
        """Two-sided, of "the mean is ``border``"."""
        if self.error == 0.0:
            return 1.0 if self.mean == border else 0.0
        return float(2 * stats.t.sf(abs(self.mean - border) / self.error, self.n - 1))


class BatchBootstrap:
    """Paired bootstrap over evaluation batches of one model: expanded percentile interval, seeded.

    The statistic is the weighted mean of per-batch differences within each stratum, averaged over strata. A
    plain percentile interval is too narrow for few batches, so its tail is ``Phi(-sqrt(n/(n-1)) t(n-1,
    1-alpha/2))`` in place of ``alpha/2`` (Hesterberg 2015, "expanded percentile"), ``n`` being the batches of
    the smallest stratum. Batches count as exchangeable within a stratum; what another training seed would
    change is not in the interval.

    Raises:
      ValueError: lengths that differ, weights that are not positive, fewer than two batches in a stratum.
    """

    kind = "bootstrap over batches, one model"

    def __init__(
        self,
        differences: Sequence[float] | Float[np.ndarray, "N"],
        weights: Sequence[float] | Float[np.ndarray, "N"] | None = None,
        strata: Sequence[Hashable] | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        values = np.asarray(differences, dtype=np.float64)
        mass = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
        names = [0] * len(values) if strata is None else list(strata)
        if not (len(values) == len(mass) == len(names)):
            raise ValueError(f"{len(values)} differences, {len(mass)} weights, {len(names)} strata: one per batch")
        if not np.all(mass > 0):
            raise ValueError(f"weights: smallest is {mass.min()}, must be positive; leave empty batches out")
        groups = [np.array([i for i, name in enumerate(names) if name == group]) for group in dict.fromkeys(names)]
        self.n = min((len(group) for group in groups), default=0)
        if self.n < 2:
            raise ValueError(f"{self.n} batches in a stratum: resampling needs at least 2")
        rng = np.random.default_rng(seed)
        self.mean = float(np.mean([np.average(values[g], weights=mass[g]) for g in groups]))
        self.means = np.mean([_resampled_means(values[g], mass[g], resamples, rng) for g in groups], axis=0)

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The two-sided interval of coverage ``1 - alpha``."""
        spread = math.sqrt(self.n / (self.n - 1)) * float(stats.t.ppf(1 - alpha / 2, self.n - 1))
        tail = float(stats.norm.sf(spread))
        low, high = np.quantile(self.means, (tail, 1 - tail))
        return float(low), float(high)

    def p_value(self, border: float) -> float:
        """The level at which an end of the interval reaches ``border``; at least what the resamples can
        resolve."""
        below, above = np.count_nonzero(self.means <= border), np.count_nonzero(self.means >= border)
        tail = (min(below, above) + 1) / (len(self.means) + 1)
        spread = max(0.0, float(stats.norm.isf(min(tail, 0.5)))) / math.sqrt(self.n / (self.n - 1))
        return float(2 * stats.t.sf(spread, self.n - 1))


def _resampled_means(
    values: Float[np.ndarray, "N"], mass: Float[np.ndarray, "N"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "resamples"]:
    total = values * mass
    means = []
    step = max(1, 2_000_000 // len(values))  # bounds the index array to 16 MB
    for start in range(0, resamples, step):
        index = rng.integers(0, len(values), (min(step, resamples - start), len(values)))
        means.append(total[index].sum(1) / mass[index].sum(1))
    return np.concatenate(means)


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> tuple[list[float], list[float]]:
    """Holm's step-down procedure (Holm 1979).

    Sorted ascending, ``p_(j)`` (j = 1..k) is compared with ``alpha / (k - j + 1)``; the first that exceeds
    its level and all after it are not rejected.

    Returns:
      Adjusted p-values (rejected iff <= alpha), and for each hypothesis the level at which it was decided:
      its own ``alpha / (k - j + 1)`` up to the step where the procedure stopped, from there on that step's.
      An interval of coverage ``1 - level`` leaves the tested value out iff Holm rejects.
    """
    k = len(p_values)
    adjusted, levels = [1.0] * k, [alpha] * k
    running, level, stopped = 0.0, alpha, False
    for rank, i in enumerate(sorted(range(k), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (k - rank) * p_values[i]))
        if not stopped:
            level = alpha / (k - rank)
            stopped = p_values[i] > level
        adjusted[i], levels[i] = running, level
    return adjusted, levels
