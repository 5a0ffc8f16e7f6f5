"""Trains and evaluates many configs, one process each, and makes one table of them.

    python -m experiments.sweep --config=configs/quickstart.py:short \\
        --sweep=configs/sweeps/rate_and_k.py --workdir=runs/rate_and_k

The sweep file has a function ``sweep()`` that yields dicts of config fields (``docs/sweeps.md``). All points are
checked before the first starts. The same command goes on where an earlier one stopped; what is finished is skipped.
"""

import fnmatch
import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from experiments import session, sweep_table
from experiments.sweep_points import Point, arguments_of, read_points
from experiments.sweep_runs import LEDGER, PROGRAM, STOPPED, Ledger, Runner, indented, only_one
from moejax.config import ConfigError
from moejax.results import append_rows, write_atomically

CSV, RESULTS = "sweep.csv", "results.jsonl"


def selected(points: Sequence[Point], patterns: Sequence[str]) -> list[Point]:
    """The points whose label or folder is a pattern or matches it (``*`` for any text); all without one.

    Raises:
      ConfigError: a pattern that no point matches; the message lists the labels.
    """
    if not patterns:
        return list(points)
    for pattern in patterns:
        if not any(_matches(point, pattern) for point in points):
            labels = list(dict.fromkeys(point.label for point in points))
            raise ConfigError(f"--only={pattern!r}: no such point; there are {labels}")
    return [point for point in points if any(_matches(point, pattern) for pattern in patterns)]


def _matches(point: Point, pattern: str) -> bool:
    names = (point.label, point.name)
    return pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in names)


def show_table(
    points: Sequence[Point], ledger: Ledger, folder: Path, *, table: str, command: str, metrics: Sequence[str]
) -> None:
    """Prints the table of what is finished, and writes it as rows and CSV beside the runs.

    Raises:
      ConfigError: ``metrics`` names one that no run has; the files are written all the same.
      ResultsError: ``results.jsonl`` of the sweep has a broken line; the table is printed before.
    """
    finished = [point for point in points if ledger.status(point) == "finished"]
    found, problems = sweep_table.groups(points, finished, folder, table, command)
    for problem in problems:
        session.say(f"warning: {problem}")
    fields = sweep_table.varied(points)
    title = f"{table}: {len(finished)} of {len(points)} points finished"
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    print(title, flush=True)
    try:
        chosen = sweep_table.chosen_metrics(found, metrics)
        console.print(sweep_table.rich_table(found, fields, chosen))
        print("± is half of a 95 % t interval over seeds, from three seeds on; * is best.", flush=True)
    finally:  # a metric with a typo costs the printed table, not the files of a night
        rows = [row for group in found for row in group.rows]
        if rows:
            write_atomically(folder / CSV, sweep_table.csv_text(found, fields))
            append_rows(folder / RESULTS, rows)
            print(f"{len(rows)} rows in {folder / RESULTS}; all metrics in {folder / CSV}", flush=True)


def run_sweep(
    points: Sequence[Point],
    folder: Path,
    *,
    facts: dict[str, str],
    only: Sequence[Point] | None = None,
    jobs: int = 1,
    retry_failed: bool = False,
    metrics: Sequence[str] = (),
    program: Sequence[str],
) -> int:
    """Runs what is not finished, then makes the table.

    Args:
      facts: "sweep", "config" and "command" of this sweep, for its files.
      only: those of the points that are run. None: all.
      program: command that runs one point, without its flags.

    Returns:
      0: every point that was to run is finished; 1: a point failed or was stopped; 130: this sweep was stopped.

    Raises:
      ConfigError: ``folder`` is in use, is a run's, cannot be written, or its ledger is damaged.
    """
    with only_one(folder) as lock:
        ledger = Ledger(folder, points, facts)
        ledger.write()
        skipped = {"finished"} if retry_failed else {"finished", "failed"}
        wanted = points if only is None else only
        todo = [point for point in wanted if ledger.status(point) not in skipped]
        session.say(
            f"{len(points)} points: {ledger.count('finished')} finished, {ledger.count('failed')} failed before, "
            f"{len(todo)} to run"
        )
        completed = Runner(folder, ledger, lock, jobs=jobs, program=program).run(todo)
        show_table(points, ledger, folder, table=Path(facts["sweep"]).stem, command=facts["command"], metrics=metrics)
    failed = [point for point in wanted if ledger.status(point) == "failed"]
    for point in failed:
        entry = ledger.entry(point)
        session.say(f"failed: {point.name} ({entry['why']}); log {folder / 'logs' / point.name}.log")
        session.say(indented(entry["error"].splitlines()[-1] if entry["error"] else "it said nothing"))
    if failed:
        session.say(f"{len(failed)} of {len(points)} points failed: --retry_failed runs them again")
    if not completed:
        session.say("stopped: the same command continues")
        return STOPPED
    return 0 if all(ledger.status(point) == "finished" for point in wanted) else 1


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    text = "Config file of every point, with a variant after a colon; --config.field=value holds for all points."
    session.define_config_flag(values, argv, text)
    flags.DEFINE_string("sweep", None, "Python file with a function sweep() that yields points.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the sweep; each point has a folder in it.", flag_values=values)
    flags.DEFINE_integer("jobs", 1, "Points that run at a time.", lower_bound=1, flag_values=values)
    flags.DEFINE_multi_string(
        "only", [], "Label or folder of points to run, * for any text; several may be given.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "metric", [], "Metrics of the printed table, * for any text; several may be given.", flag_values=values
    )
    flags.DEFINE_bool("retry_failed", False, "Run points again that failed before.", flag_values=values)
    flags.DEFINE_bool("table_only", False, "Make the table of what is finished, and stop.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Check and list all points, and stop.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    for name, example in (("config", "configs/quickstart.py:short"), ("sweep", "configs/sweeps/rate_and_k.py")):
        if getattr(values, name) is None:
            raise ConfigError(f"--{name} is missing: e.g. --{name}={example}")
    config_file = config_flags.get_config_filename(values["config"])
    common = config_flags.get_override_values(values["config"])
    points = read_points(Path(values.sweep), config_file, common)
    only = selected(points, values.only)
    if values.dry_run:
        for point in only:
            changes = point.arguments[1 + len(common) :]
            print(f"{point.name}\n    {shlex.join(changes) if changes else 'the config as it is'}")
        print(f"{len(only)} of {len(points)} points would run; all {len(points)} are valid")
        return 0
    if not values.workdir:
        raise ConfigError("--workdir is missing: give the folder that this sweep may write, e.g. --workdir=runs/sweep")
    folder = Path(values.workdir)
    words = [*arguments_of(config_file, common), f"--sweep={values.sweep}", f"--workdir={folder}"]
    facts = {
        "sweep": values.sweep,
        "config": config_file,
        "command": " ".join(["python -m experiments.sweep", *map(shlex.quote, words)]),
    }
    if values.table_only:
        if not (folder / LEDGER).exists():
            raise ConfigError(f"--workdir={folder} holds no sweep: run it without --table_only first")
        ledger = Ledger(folder, points, facts)
        show_table(
            points, ledger, folder, table=Path(values.sweep).stem, command=facts["command"], metrics=values.metric
        )
        return 0
    return run_sweep(
        points,
        folder,
        facts=facts,
        only=only,
        jobs=values.jobs,
        retry_failed=values.retry_failed,
        metrics=values.metric,
        program=PROGRAM,
    )


if __name__ == "__main__":
    session.launch(define_flags, command)
