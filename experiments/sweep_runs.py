"""Runs the points of a sweep, each in a process of its own, and keeps a ledger of how each ended."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from experiments.sweep_points import Point
from moejax.config import ConfigError, config_hash
from moejax.interrupt import TERMINATED
from moejax.report.sweeps import LEDGER
from moejax.results import write_atomically

PROGRAM = (sys.executable, "-m", "experiments.run")
LOGS = "logs"
STOPPED = 130
"""Exit code of a run that was asked to stop and saved a checkpoint."""
TAIL = 15
"""Lines of a failed run's output that are shown."""
WAIT = 0.1
"""Seconds between two looks at the processes."""


class Ledger:
    """``DIR/sweep.json``: for each point's folder how its run ended. Written whole, after every change."""

    def __init__(self, folder: Path, points: Sequence[Point], facts: dict[str, Any]) -> None:
        self.path, self.points = folder / LEDGER, points
        self._facts = facts
        self._runs: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                runs = json.loads(self.path.read_text(encoding="utf-8"))["runs"]
                self._runs = {name: dict(entry) for name, entry in runs.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self.path} is damaged ({type(error).__name__}: {error}): delete it; every point is then started "
                    "again, finds its checkpoints, and skips what it has done"
                ) from error

    def entry(self, point: Point) -> dict[str, Any]:
        """What is known of a point as it is configured now; {} for one that never ran, or ran with another config."""
        entry = self._runs.get(point.name, {})
        return entry if entry.get("config_hash") == config_hash(point.config) else {}

    def status(self, point: Point) -> str:
        """ "finished", "failed", "stopped", "running" or "waiting"."""
        status = self.entry(point).get("status", "waiting")
        if status == "finished" and not (self.path.parent / point.name / "config.json").exists():
            return "waiting"  # its folder was deleted
        return status

    def count(self, status: str) -> int:
        return sum(self.status(point) == status for point in self.points)

    def set(self, point: Point, status: str, **fields: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self._runs[point.name] = {
            "status": status, "label": point.label, "seed": point.seed, "overrides": point.overrides,
            "config_hash": config_hash(point.config), "time": now, **fields,
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        content = {**self._facts, "points": [point.name for point in self.points], "runs": self._runs}
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def only_one(folder: Path) -> Generator[int]:
    """Makes ``folder`` and holds its lock; gives the lock's descriptor, for the runs to hold it too.

    So a run that outlives its sweep (which was killed) keeps a second sweep from starting the same point again.

    Raises:
      ConfigError: another sweep or a run of one works in ``folder``, it cannot be written, or it is a run's workdir.
    """
    if (folder / "config.json").exists():
        raise ConfigError(f"--workdir={folder} holds a single run: give the sweep a folder of its own")
    try:
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOGS, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"--workdir={folder} cannot be written ({error.strerror}): choose another folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"--workdir={folder}: another sweep, or a run that one left behind, works here{_pids(folder)}: "
            "wait for it or stop it; --table_only shows what is finished"
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _pids(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        runs = json.loads((folder / LEDGER).read_text(encoding="utf-8"))["runs"]
        if found := [str(entry["pid"]) for entry in runs.values() if entry.get("status") == "running"]:
            return f" (process {', '.join(found)})"
    return ""


@dataclasses.dataclass
class _Active:
    point: Point
    process: subprocess.Popen[bytes]
    log: Path
    offset: int
    """Bytes of the log that earlier calls wrote."""
    begin: float


class Signals:
    """Counts Ctrl-C, SIGTERM and SIGHUP instead of raising, while it is entered.

    A terminal that closes sends SIGHUP more than once, so it counts once; and as nothing can be written to it any more,
    output goes nowhere from then on. SIGHUP that is ignored (``nohup``) stays so.
    """

    def __init__(self) -> None:
        self.count = 0
        self._old: dict[int, Any] = {}
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if number != signal.SIGHUP:
            self.count += 1
            return
        self.count = max(self.count, 1)
        with open(os.devnull, "wb") as nowhere:
            for descriptor in self._terminals:
                if not os.isatty(descriptor):  # it has hung up
                    os.dup2(nowhere.fileno(), descriptor)


class Runner:
    """Starts points, watches them, and writes down how they end. ``run`` may be called once."""

    def __init__(self, folder: Path, ledger: Ledger, lock: int, *, jobs: int, program: Sequence[str]) -> None:
        self.folder, self.ledger, self.lock, self.jobs, self.program = folder, ledger, lock, jobs, program
        self.active: list[_Active] = []
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def run(self, points: Sequence[Point]) -> bool:
        """Runs ``points`` in order, ``jobs`` at a time; False if the user stopped it.

        The first Ctrl-C (or SIGTERM, SIGHUP) is handed on to the runs, which save a checkpoint; then this returns. A
        second Ctrl-C or SIGTERM kills them.
        """
        waiting, heard = list(points), 0
        with self._display(), Signals() as signals:
            try:
                while self.active or (waiting and not signals.count):
                    while waiting and len(self.active) < self.jobs and not signals.count:
                        self._start(waiting.pop(0))
                    if signals.count > heard:
                        heard = signals.count
                        if heard > 1:
                            break
                        self._note(f"stopping: {self._names()} saves a checkpoint; Ctrl-C again ends it at once")
                        self._signal(signal.SIGTERM)
                    for active in [a for a in self.active if a.process.poll() is not None]:
                        self.active.remove(active)
                        self._ended(active, asked=bool(signals.count))
                    self._update()
                    time.sleep(WAIT)
            finally:  # reached with active runs by a second signal or an error of our own
                self._signal(signal.SIGKILL)
                for active in self.active:
                    active.process.wait()
                    self._ended(active, asked=True)
        return not signals.count

    def _start(self, point: Point) -> None:
        command = [*self.program, *point.arguments, f"--workdir={self.folder / point.name}"]
        log = self.folder / LOGS / f"{point.name}.log"
        with log.open("ab") as out:
            out.write(f"$ {shlex.join(command)}\n".encode())
            out.flush()
            offset = out.tell()
            # A session of its own: Ctrl-C of the terminal reaches this process only, which hands it on once.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self.lock,),
            )
        self.active.append(_Active(point, process, log, offset, time.monotonic()))
        self.ledger.set(point, "running", pid=process.pid)
        if self._bar is None:
            self._note(f"[{self._place(point)}] {point.name}: started; log {log}")

    def _ended(self, active: _Active, asked: bool) -> None:
        code, seconds = active.process.returncode, time.monotonic() - active.begin
        point, fields = active.point, {"exit_code": code, "seconds": round(seconds, 1)}
        if code == 0:
            self.ledger.set(point, "finished", **fields)
            self._note(f"[{self._place(point)}] {point.name}: finished in {seconds:,.0f} s")
        elif asked or code in (STOPPED, TERMINATED):
            self.ledger.set(point, "stopped", **fields)
            self._note(f"[{self._place(point)}] {point.name}: stopped; the same command continues it")
        else:
            why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            error = tail(active.log, active.offset)
            self.ledger.set(point, "failed", error=error, why=why, **fields)
            self._note(f"[{self._place(point)}] {point.name}: FAILED ({why}); log {active.log}\n{indented(error)}")

    def _place(self, point: Point) -> str:
        return f"{self.ledger.points.index(point) + 1}/{len(self.ledger.points)}"

    def _names(self) -> str:
        return ", ".join(active.point.name for active in self.active) or "nothing"

    def _signal(self, number: int) -> None:
        for active in self.active:
            if active.process.poll() is None:
                os.killpg(active.process.pid, number)

    # --- what the person who waits sees ---

    @contextlib.contextmanager
    def _display(self) -> Generator[None]:
        if not self.console.is_terminal:
            yield
            return
        now = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        columns = (BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn(), now)
        with Progress(*columns, console=self.console, expand=True) as self._bar:
            self._task = self._bar.add_task("", total=len(self.ledger.points))
            yield
        self._bar = None

    def _update(self) -> None:
        if self._bar is None:
            return
        failed = self.ledger.count("failed")
        text = f"{failed} failed, " if failed else ""
        if self.active:
            first = self.active[0].point
            text += f"step {last_step(self.folder / first.name)}/{first.config.train.steps}"
            text += f" and {len(self.active) - 1} more" if len(self.active) > 1 else ""
            text += f"  {first.name.rpartition('-')[0]}"
        self._bar.update(self._task, completed=self.ledger.count("finished"), description=text)

    def _note(self, text: str) -> None:
        (self._bar.console if self._bar else self.console).print(text, highlight=False, markup=False, soft_wrap=True)


def last_step(workdir: Path) -> int:
    """The last optimizer step that a run has logged, 0 before the first; reads the end of its metrics only."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                return row["step"]
    return 0


def tail(log: Path, offset: int) -> str:
    """What a failed run said last: its error paragraph, or the last lines."""
    with log.open("rb") as file:
        file.seek(max(offset, file.seek(0, os.SEEK_END) - 65536))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join((lines[starts[-1] :] if starts else lines)[-TAIL:])


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
