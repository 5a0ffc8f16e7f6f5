"""Results rows: one JSON object per line of ``results.jsonl``, and the only source of figures in tables and
reports.

Reading needs neither JAX nor a device. Schema and rules: ``docs/results.md``.
"""

import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import tempfile
import typing
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

ID_FIELDS = ("paper", "table", "row", "metric", "scale", "config_hash")
"""What a row *is*. Two rows that agree in these are the same measurement; the later replaces the earlier, unless they
say that they were measured on other data."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class ResultsError(ValueError):
    """A results file or row that cannot be used. The message names file, line, rule and way out."""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One measured value, or one contrast of two arms (``**Judgement.row_fields()`` fills a contrast).

    Raises:
      ResultsError: a missing name, an unknown kind, a number that is not finite, or an interval upside down.
    """

    kind: Literal["value", "contrast"]
    paper: str
    """Module of the paper, e.g. "capacity_aware"."""
    table: str
    row: str
    """Label of the row in the table; for a contrast its name."""
    metric: str
    """A part after ``/`` names a domain or task: "bits_per_byte/english"."""
    unit: str = ""
    value: float | None = None
    """Mean over seeds. None: not run."""
    values_by_seed: dict[int, float] = dataclasses.field(default_factory=dict)
    interval: tuple[float, float] | None = None
    interval_kind: str = ""
    """How the interval was made: "95 %, t over seeds", "bootstrap over batches, one model"."""
    baseline_row: str = ""
    """Label of the row that this one is compared with."""
    published: float | None = None
    published_metric: str = ""
    """What the paper measured and on which model, where it is not ``metric``."""
    verdict: str | None = None
    """One of ``verdicts.VERDICTS``, perhaps with " (one model)". None: the row has none of its own."""
    verdict_note: str = ""
    arm_a: str = ""
    arm_b: str = ""
    sign: str = ""
    """Of a contrast, in the metric: "a > b" or "a < b"."""
    claim: str = ""
    """Of a contrast: "better" or "no_loss"."""
    margin: float | None = None
    difference: float | None = None
    """Of a contrast: metric(a) - metric(b)."""
    exercised_share: float | None = None
    """Share of pairs, in [0, 1], that the mechanism touched."""
    scale: str = ""
    config: str = ""
    """The config's name, e.g. "capacity_aware:lab"."""
    config_hash: str = ""
    data_hash: str = ""
    checkpoint_hash: str = ""
    batch_shape: tuple[int, ...] = ()
    """(sequences, tokens per sequence) of one evaluation batch: limits act within a batch."""
    command: str = ""
    commit: str = ""
    """Git commit of the code. Empty: not known."""
    dirty: bool | None = None
    """Whether tracked files differed from the commit. None: not known."""
    device: str = ""
    device_count: int = 0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    time: str = dataclasses.field(default_factory=_now)
    """ISO 8601, UTC."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Plots read "arm", "x" and "x_name" (or "capacity_factor"); anything else JSON takes may be here."""
    id: str = ""
    """Filled in: 12 hex digits of the SHA-256 of ``ID_FIELDS``."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected = {str: str, dict[str, str]: dict, dict[str, Any]: dict}.get(field.type)
            if expected is not None and not isinstance(value, expected):
                raise ResultsError(f"{field.name}={value!r}: expected {expected.__name__}")
        for name in ("paper", "table", "row", "metric"):
            if not getattr(self, name):
                raise ResultsError(f"{name}='': a row needs a non-empty string here")
        if self.kind not in ("value", "contrast"):
            raise ResultsError(f"kind={self.kind!r}: choose 'value' or 'contrast'")
        try:
            seeds = {int(seed): value for seed, value in self.values_by_seed.items()}
        except (AttributeError, TypeError, ValueError):
            raise ResultsError(f"values_by_seed={self.values_by_seed!r}: expected {{seed: value}}") from None
        object.__setattr__(self, "values_by_seed", seeds)
        for name in ("interval", "batch_shape"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.batch_shape, tuple):
            raise ResultsError(f"batch_shape={self.batch_shape!r}: expected (sequences, tokens per sequence)")
        if self.interval is not None and not (isinstance(self.interval, tuple) and len(self.interval) == 2):
            raise ResultsError(f"interval={self.interval!r}: expected two numbers (lo, hi), or None")
        numbers = {name: getattr(self, name) for name in _NUMBERS if getattr(self, name) is not None}
        numbers |= {f"values_by_seed[{seed}]": value for seed, value in seeds.items()}
        numbers |= {f"interval[{i}]": end for i, end in enumerate(self.interval or ())}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ResultsError(
                    f"{name}={number!r}: expected a finite number; without one use None and a verdict_note"
                )
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise ResultsError(f"interval={self.interval!r}: the lower end is above the upper; give (lo, hi)")
        object.__setattr__(self, "id", row_id(self))


_NUMBERS = ("value", "published", "margin", "difference", "exercised_share")


def row_id(row: ResultRow) -> str:
    """12 hex digits of the SHA-256 of ``ID_FIELDS`` as a JSON list: the same on every machine."""
    names = json.dumps([getattr(row, field) for field in ID_FIELDS], ensure_ascii=True)
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def to_line(row: ResultRow) -> str:
    """The row as one line of JSON, without the newline.

    Raises:
      ResultsError: ``extra`` holds what JSON cannot.
    """
    try:
        return json.dumps(dataclasses.asdict(row), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultsError(
            f"row {row.row!r}, extra={row.extra!r}: not JSON ({error}); give plain numbers and text"
        ) from error


def from_line(line: str) -> ResultRow:
    """Reads one line.

    Raises:
      ResultsError: not a JSON object, an unknown or missing field, a value that breaks its rule.
    """
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ResultsError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ResultsError(f"expected a JSON object, got {type(fields).__name__}")
    known = {f.name for f in dataclasses.fields(ResultRow)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ResultsError(f"unknown fields {unknown}: own fields belong in 'extra'")
    stated = fields.pop("id", "")
    try:
        row = ResultRow(**fields)
    except TypeError as error:
        raise ResultsError(f"missing fields: {error}") from error
    if stated and stated != row.id:
        raise ResultsError(
            f"id={stated!r} does not belong to {', '.join(ID_FIELDS)} (expected {row.id!r}): edited by hand?"
        )
    return row


def scan_rows(path: str | os.PathLike[str]) -> tuple[list[ResultRow], list[str]]:
    """The readable rows of a file and one message for each line that is not; an absent file has neither.

    Of rows with the same id the last wins, in the place of the first.
    """
    path = Path(path)
    if not path.exists():
        return [], []
    text = path.read_bytes().decode("utf-8", errors="replace")
    rows: dict[str, ResultRow] = {}
    problems = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = from_line(line)
        except ResultsError as error:
            cut = number == len(lines)  # no newline after it: a writer was stopped here
            what = "the last line is cut off" if cut else "broken line"
            problems.append(
                f"{path}:{number}: {what}: {error}. The other lines are independent of it: "
                f"delete it (sed -i {number}d {path}) or mend it, then run the command of the lost row again."
            )
        else:
            rows[row.id] = row
    return list(rows.values()), problems


def read_rows(path: str | os.PathLike[str]) -> list[ResultRow]:
    """All rows of a file in order; [] if there is none.

    Raises:
      ResultsError: a broken or cut-off line, by file and line number.
    """
    rows, problems = scan_rows(path)
    if problems:
        raise ResultsError(problems[0])
    return rows


def append_rows(path: str | os.PathLike[str], rows: Iterable[ResultRow]) -> None:
    """Adds rows; one with the id of an earlier row takes its place, if it was measured on the same data.

    The whole file is written anew beside the old one and renamed over it, so a reader or a crash sees the old
    rows or the new ones, never a mixture. Writers on one machine wait for each other.

    Raises:
      ResultsError: the file has a broken line (it is left as it is), a row holds what JSON cannot, or a row would take
        the place of one of other data.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        merged = {row.id: row for row in read_rows(path)}
        for row in rows:
            if (earlier := merged.get(row.id)) is not None and _other_data(earlier, row):
                raise ResultsError(
                    f"{path}: row {row.id} ({row.row!r}, {row.metric}) is there, measured on other data (data_hash was "
                    f"{earlier.data_hash}, is {row.data_hash}), and would be lost: nothing was written. Use another "
                    "file, or delete that row"
                )
            merged[row.id] = row
        write_atomically(path, "".join(to_line(row) + "\n" for row in merged.values()))


def _other_data(one: ResultRow, other: ResultRow) -> bool:
    """Whether both say what they were measured on, and share none of it: a row over runs lists the hashes of all, and
    is made again as more are done."""
    hashes, others = (set(row.data_hash.split(", ")) - {""} for row in (one, other))
    return bool(hashes and others) and not hashes & others


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that it exists with its old or its new content at every moment."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes files that only their owner reads
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Holds an advisory lock on the folder itself, which leaves no lock file behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def code_version(folder: Path | None = None) -> tuple[str, bool | None]:
    """Git commit of the code and whether tracked files differ from it; ``("", None)`` outside a checkout.

    A copy without its repository (a container, another machine) may name its commit in ``MOEJAX_COMMIT``.
    """
    if folder is None and os.environ.get("MOEJAX_COMMIT"):
        return os.environ["MOEJAX_COMMIT"], None
    here = Path(__file__).resolve() if folder is None else folder

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here if here.is_dir() else here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        if not here.is_dir():
            git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in another project's checkout
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", None


def environment_facts(devices: bool = True) -> dict[str, Any]:
    """Commit, dirty flag, device and versions: fields of :class:`ResultRow`, for ``ResultRow(..., **facts)``.

    Args:
      devices: ask JAX (imported here only) for the device kind and count. False leaves them empty.
    """
    commit, dirty = code_version()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    facts: dict[str, Any] = {"commit": commit, "dirty": dirty, "versions": versions}
    if devices:
        import jax  # lazily: rows must be readable where JAX is not

        found = jax.devices()
        kinds = typing.cast(list[str], sorted({device.device_kind for device in found}))
        facts |= {"device": ", ".join(kinds), "device_count": len(found)}
    return facts
