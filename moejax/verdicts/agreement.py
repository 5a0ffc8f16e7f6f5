"""Whether a row that was measured again agrees with the stored one, and by which rule (``docs/results.md``)."""

import dataclasses
import math

from moejax.results import ResultRow

SAME = 0.005
"""Tolerance in the same setting, where a rerun is equal or nearly so: the margin under which no contrast counts (bits
per byte; shares), and relative for other units."""
ELSEWHERE = 0.02
"""Relative, in another setting: it rounds otherwise, and training amplifies rounding until two runs differ as two seeds
do. Seeds of the lab model differ by s = 0.6 % (``capacity_aware_lab.jsonl``, "no limit"); 2 sqrt(2) s = 1.8 %."""
ELSEWHERE_TOUCHED = 0.06
"""The same where a mechanism drops or changes pairs: s is 2 % there (median of that table's rows)."""
SPEED = 0.25
"""Relative, for speeds and times on one kind of device: clocks, neighbours and caches move them by as much."""
SPEEDS = ("tokens_per_s", "mfu", "seconds", "training_seconds", "ms", "speedup")
COUNTS = ("count", "tokens", "pairs", "experts", "bytes", "parameters", "steps", "layers")
"""Units whose values are exact."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    agrees: bool
    stored: float
    now: float
    rule: str
    """What was compared, in words with figures."""

    @property
    def exact(self) -> bool:
        return self.stored == self.now


def is_speed(row: ResultRow) -> bool:
    """Whether the row's value belongs to one kind of device."""
    return row.metric.split("/")[0] in SPEEDS


def is_count(row: ResultRow) -> bool:
    return row.kind == "value" and (row.unit in COUNTS or isinstance(row.value, int))


def differences(stored: ResultRow, now: ResultRow) -> list[str]:
    """What differs between the settings of two rows, one phrase for each; code, device, versions, data, config."""
    found = [
        f"{name.replace('_', ' ')} {old or 'not known'} -> {new or 'not known'}"
        for name in ("commit", "device", "device_count", "data_hash", "config_hash", "batch_shape")
        if (old := getattr(stored, name)) != (new := getattr(now, name))
    ]
    when = [word for word, row in (("then", stored), ("now", now)) if row.dirty]
    if when:
        found.append(f"uncommitted changes {' and '.join(when)}")
    names = dict.fromkeys([*stored.versions, *now.versions])
    return found + [
        f"{name} {stored.versions.get(name, 'not known')} -> {now.versions.get(name, 'not known')}"
        for name in names
        if stored.versions.get(name) != now.versions.get(name)
    ]


def same_setting(stored: ResultRow, now: ResultRow) -> bool:
    """Whether both were measured by one commit, on one kind of device, with one set of versions, data and config."""
    names = ("commit", "device", "device_count", "data_hash", "config_hash", "batch_shape", "versions")
    return bool(stored.commit) and all(getattr(stored, name) == getattr(now, name) for name in names)


def agreement(stored: ResultRow, now: ResultRow) -> Agreement:
    """Compares a row with its stored self, by the first rule that fits.

    1. A count is equal.
    2. A row with an interval: the new value (the difference, of a contrast) lies in the stored interval.
    3. A speed or time: within ``SPEED``.
    4. Several seeds: within the stored seeds' range or rule 5's tolerance, whichever is wider.
    5. One seed: within a tolerance for the same setting (:func:`same_setting`) or for another.

    Raises:
      ValueError: one of them has no value; or they are of two kinds.
    """
    if stored.kind != now.kind:
        raise ValueError(f"row {stored.id}: a {stored.kind} cannot be compared with a {now.kind}")
    field = "difference" if stored.kind == "contrast" else "value"
    a, b = getattr(stored, field), getattr(now, field)
    if a is None or b is None:
        raise ValueError(f"row {stored.id}: {'the stored row' if a is None else 'the new row'} has no {field}")
    if is_count(stored):
        return Agreement(a == b, a, b, "a count must be equal")
    if stored.interval is not None:
        low, high = stored.interval
        rule = f"inside the stored interval [{low:.6g}, {high:.6g}] ({stored.interval_kind or 'kind not stated'})"
        return Agreement(low <= b <= high, a, b, rule)
    if is_speed(stored):
        close = a == b or (a > 0 and b > 0 and abs(math.log(b / a)) <= math.log1p(SPEED))
        return Agreement(close, a, b, f"within {SPEED:.0%} either way, as speeds on one kind of device are")
    tolerance, why = _tolerance(stored, a, same_setting(stored, now))
    seeds = stored.values_by_seed.values() if stored.kind == "value" else ()
    spread = max(seeds) - min(seeds) if len(seeds) > 1 else 0.0
    if spread > tolerance:
        return Agreement(abs(b - a) <= spread, a, b, f"within {spread:.4g}, the range of its {len(seeds)} seeds")
    return Agreement(abs(b - a) <= tolerance, a, b, f"within {tolerance:.4g}: {why}")


def _tolerance(row: ResultRow, value: float, same: bool) -> tuple[float, str]:
    """Absolute tolerance of a row without interval, and its reason."""
    share, name = row.unit.startswith("share"), row.metric.split("/")[0]
    margin = row.margin if row.kind == "contrast" and row.margin is not None else SAME
    if same:
        if share and row.extra.get("n"):
            return max(SAME, 2 / row.extra["n"]), "same setting, two examples or half a percent"
        if share or row.kind == "contrast" or row.unit in ("bits per byte", "bits/byte"):
            return margin, "same setting, the margin under which no contrast counts"
        return SAME * abs(value), f"same setting, {SAME:.1%} of the value"
    error = row.extra.get("stderr")
    if share and error:
        return 2 * math.sqrt(2) * error, "another setting, 2 sqrt(2) standard errors: two models, two samples"
    relative = ELSEWHERE_TOUCHED if row.exercised_share else ELSEWHERE
    why = f"another setting, where two runs differ as two seeds do: {relative:.0%}"
    if row.kind == "contrast":
        return relative, f"{why} of a bit per byte"
    if name in ("ppl", "perplexity") and value > 1:  # the logarithm moves by that share
        return value * (value**relative - 1), f"{why} of its logarithm"
    return relative * abs(value), f"{why} of the value"
