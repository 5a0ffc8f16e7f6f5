"""``experiments.run --row=ID``: measures one results row again, from its stored command, and says whether it agrees."""

import contextlib
import difflib
import glob
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from absl import flags

from experiments import session
from moejax.config import ConfigError
from moejax.interrupt import TERMINATED
from moejax.report.blocks import significant
from moejax.report.compare import flat
from moejax.results import ResultRow, environment_facts, scan_rows, write_atomically
from moejax.verdicts.agreement import agreement, differences, is_speed

COMMITTED = str(Path(__file__).resolve().parent / "results" / "*.jsonl")
MARKER = "rerun.json"
"""In a workdir that was made to measure a row again; names the row."""
AGREES, DISAGREES, CANNOT, STOPPED = 0, 1, 2, 130
LIST = "list"
LISTED = 30
"""Rows that are listed after an unknown id."""

Programs = dict[str, Callable[[list[str]], int]]
"""Module of a command -> function from its arguments to its exit code."""


def find(row_id: str, files: Sequence[str]) -> tuple[ResultRow, Path]:
    """The row of an id and the file that it is in.

    Args:
      files: results files, patterns, or folders with a ``results.jsonl``; empty: the committed ones.

    Raises:
      ConfigError: no such file or row (with ids that are near, and a list), or two files disagree about it.
    """
    found, broken = read(files)
    mine = [(row, path) for row, path in found if row.id == row_id]
    if not mine:
        near = difflib.get_close_matches(row_id, [row.id for row, _ in found], n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        lost = f" {len(broken)} broken line(s) may hold it." if broken else ""
        raise ConfigError(
            f"--row={row_id}: no such row. {hint}{len(found)} rows in {_places(found)}.{lost} "
            f"--row={LIST} shows all of them, --results=FILE reads another file:\n{listing(found[:LISTED])}"
        )
    if any(row != mine[0][0] for row, _ in mine):
        raise ConfigError(
            f"--row={row_id}: {', '.join(str(path) for _, path in mine)} hold different values of it: name one file "
            "with --results=FILE"
        )
    return mine[0]


def read(files: Sequence[str]) -> tuple[list[tuple[ResultRow, Path]], list[str]]:
    """All rows with their files, and the broken lines, which are also said."""
    found: list[tuple[ResultRow, Path]] = []
    problems: list[str] = []
    for pattern in files or [COMMITTED]:
        paths = [Path(name) for name in sorted(glob.glob(pattern))]
        if not paths:
            raise ConfigError(f"--results={pattern}: no such file")
        for path in (p / "results.jsonl" if p.is_dir() else p for p in paths):
            if not path.exists():
                raise ConfigError(f"--results={path}: no such file")
            rows, broken = scan_rows(path)
            found += [(row, path) for row in rows]
            problems += broken
    for problem in problems:
        session.say(f"warning: {problem}")
    return found, problems


def _places(found: Sequence[tuple[ResultRow, Path]]) -> str:
    return ", ".join(dict.fromkeys(str(path) for _, path in found)) or "no file"


def listing(found: Sequence[tuple[ResultRow, Path]]) -> str:
    """Id, what it is, and its value, a line for each row."""
    return "\n".join(f"  {row.id}  {described(row)}" for row, _ in found)


def described(row: ResultRow) -> str:
    value = row.difference if row.kind == "contrast" else row.value
    setting = f" ({row.config})" if row.config and row.config != row.row else ""
    return f"{row.paper} {row.table}{setting}: {row.row}: {row.metric} {significant(value)} {row.unit}".rstrip()


def _device(row: ResultRow, words: Sequence[str]) -> str:
    """The kind of device here. A sweep's runs need the accelerator to themselves, so for them another process asks."""
    if words[2:3] != ["experiments.sweep"]:
        return environment_facts()["device"]
    if "cpu" in row.device.lower():
        return row.device  # any machine has one
    ask = "from moejax.results import environment_facts as f; print(f()['device'])"
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return asked.stdout.strip().splitlines()[-1]


def obstacles(row: ResultRow, words: Sequence[str], device: str) -> list[str]:
    """Why the row cannot be measured again on ``device``; [] if it can, as far as is known before its command runs."""
    found = []
    if (row.difference if row.kind == "contrast" else row.value) is None:
        found.append(f"it has no value to compare with ({row.verdict_note or row.verdict or 'not run'})")
    if not words:
        found.append("it has no command")
    elif words[:2] != ["python", "-m"] or words[2:3] not in (["experiments.run"], ["experiments.sweep"]):
        found.append(f"its command is none of experiments.run or experiments.sweep: {row.command}")
    for word in words:
        for flag in ("--config=", "--sweep="):
            if word.startswith(flag) and not Path(word.removeprefix(flag).partition(":")[0]).exists():
                found.append(f"{word}: there is no such file here (run it from the folder the command was typed in)")
    on_cpu, here_cpu = ("cpu" in name.lower() for name in (row.device, device))
    if row.device and not on_cpu and here_cpu:
        found.append(f"it was measured on {row.device} x {row.device_count}, and here is only {device}")
    elif row.device and row.device != device and is_speed(row):
        found.append(f"it is a speed on {row.device}, which says nothing about {device}")
    return found


def arguments(words: Sequence[str], workdir: Path) -> list[str]:
    """The stored command's flags with another workdir, and without those that end a run early. A flag and its value may
    be one word or two: the folder of the row itself must not be run in."""
    kept, rest = [], iter(words[3:])
    for word in rest:
        name, joined, _ = word.lstrip("-").partition("=")
        if name in ("workdir", "max_seconds", "jobs"):
            if not joined:
                next(rest, None)
            kept += [f"--workdir={workdir}"] * (name == "workdir")
        elif not name.startswith("dry_run"):
            kept.append(word)
    return kept


def claim(folder: Path, row: ResultRow) -> None:
    """Makes the folder of a rerun, or accepts that of an earlier one of the same row.

    Raises:
      ConfigError: the folder holds something else, or cannot be written.
    """
    marker = folder / MARKER
    try:
        if folder.exists() and any(folder.iterdir()):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if json.loads(marker.read_text(encoding="utf-8")).get("row") == row.id:
                    return
            raise ConfigError(
                f"--workdir={folder} is not empty and no earlier rerun of row {row.id}: a row is measured again in a "
                "folder of its own; choose a new one"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, json.dumps({"row": row.id}) + "\n")
    except OSError as error:
        raise ConfigError(f"--workdir={folder} cannot be written ({error.strerror}): choose another folder") from error


def rerun(row_id: str, files: Sequence[str], workdir: str | None, programs: Programs, *, dry_run: bool = False) -> int:
    """Runs the row's command again and compares; ``dry_run``: shows its plan.

    Returns:
      0: agrees; 1: disagrees; 2: cannot be measured again here, and why is said; 130, 143: stopped by Ctrl-C, SIGTERM.

    Raises:
      ConfigError: no such row or file, or a workdir that cannot be used.
    """
    if row_id in (LIST, ""):
        print(listing(read(files)[0]))
        return 0
    row, path = find(row_id, files)
    words = shlex.split(row.command)
    device = _device(row, words)
    print(f"row {row.id}, {described(row)}")
    print(f"  from {path}, measured {row.time} on {row.device or 'a device not named'} x {row.device_count}")
    print(f"  {row.command}", flush=True)
    if why := obstacles(row, words, device):
        print("cannot be measured again here: " + "; ".join(why))
        return CANNOT
    if dry_run:
        return programs[words[2]]([*arguments(words, Path(workdir or "again")), "--dry_run"])
    if workdir:
        claim(Path(workdir), row)
        return _measure(row, path, words, Path(workdir), programs)
    base = Path(tempfile.mkdtemp(prefix="moejax-row-"))
    code = CANNOT
    try:
        code = _measure(row, path, words, base / "run", programs)
    finally:
        if code != DISAGREES:
            shutil.rmtree(base, ignore_errors=True)
    if code == DISAGREES:
        print(f"its folder stays: {base / 'run'}")
    return code


def _measure(row: ResultRow, path: Path, words: Sequence[str], folder: Path, programs: Programs) -> int:
    own = arguments(words, folder)
    with _as_typed(words[2], own):
        code = programs[words[2]](own)
    if code in (STOPPED, TERMINATED):
        session.say("stopped: the same command continues, if --workdir=DIR names its folder")
        return code
    new = _matching(row, scan_rows(folder / "results.jsonl")[0])
    if new is None:
        done = f"its command ended with exit code {code}" if code else "its command does not make this row any more"
        print(f"cannot be measured again here: {done}")
        return CANNOT
    changed = differences(row, new)
    print("setting: " + ("; ".join(changed) or "the same commit, device, versions, data and config"))
    if row.config_hash != new.config_hash and (fields := _config_fields(path.parent, folder)):
        print("config: " + "; ".join(fields))
    found = agreement(row, new)
    by = "equal to the last digit" if found.exact else f"they differ by {found.now - found.stored:+.4g}"
    what = "difference" if row.kind == "contrast" else "value"
    print(f"stored {what} {found.stored:.6g}, now {found.now:.6g} {row.unit}: {by}")
    if row.verdict != new.verdict:
        print(f"verdict was {row.verdict}, is {new.verdict}")
    print(f"{'agrees' if found.agrees else 'DISAGREES'} (rule: {found.rule})")
    return AGREES if found.agrees else DISAGREES


def _config_fields(stored: Path, new: Path) -> list[str]:
    """Fields that differ between the configs of two workdirs; [] where one has none (committed rows)."""
    try:
        old, now = (flat(json.loads((folder / "config.json").read_text())) for folder in (stored, new))
    except (OSError, ValueError):
        return []
    missing = "not there"
    return [
        f"{name} was {old.get(name, missing)!r}, is {now.get(name, missing)!r}"
        for name in sorted(old.keys() | now.keys())
        if old.get(name, missing) != now.get(name, missing)
    ]


def _matching(row: ResultRow, rows: Sequence[ResultRow]) -> ResultRow | None:
    """The new row: that of the same id, or, where the config's hash changed with its fields, of the same names."""
    names = ("kind", "paper", "table", "row", "metric", "scale")
    same = [r for r in rows if all(getattr(r, name) == getattr(row, name) for name in names)]
    return next((r for r in same if r.id == row.id), same[-1] if same else None)


@contextlib.contextmanager
def _as_typed(module: str, own: Sequence[str]) -> Generator[None]:
    """``sys.argv`` as if the command had been typed: the new rows store it."""
    before = sys.argv
    sys.argv = [module.replace(".", "/") + ".py", *own]
    try:
        yield
    finally:
        sys.argv = before


def command(values: flags.FlagValues) -> int:
    """``experiments.run`` with ``--row``."""
    from experiments import run, sweep

    if values.config is not None:
        raise ConfigError("--row=ID takes the stored command's config: leave out --config")
    programs = {
        "experiments.run": lambda own: session.call(run.define_flags, run.command, own),
        "experiments.sweep": lambda own: session.call(sweep.define_flags, sweep.command, own),
    }
    return rerun(values.row, values.results, values.workdir, programs, dry_run=values.dry_run)
