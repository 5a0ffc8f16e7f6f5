"""Sweeps configurations of the Hopper kernels on a device and keeps the fastest in `tuned/<device>.json`.

    python scripts/tune_kernels.py [--shape NAME ...] [--operation forward transposed gated outer] [--rows N ...]
        [--minutes M] [--survivors S] [--limit N] [--repeats R] [--target_ms MS] [--again] [--output FILE.json]
    python scripts/tune_kernels.py --dry_run [--lower]              # the plan, without a GPU; --lower: compile it too
    python scripts/tune_kernels.py --interpret --output FILE.json   # the same steps in Pallas' interpreter, on a CPU

Two rounds for each operation and shape. First the default, an earlier choice, and every tile with as many stages as fit
shared memory; then the fastest few of these (`--survivors`) with other clusters and orders and with a stage less.
Every candidate is checked against float32 before it is timed; a wrong one is reported, gets no time and makes the exit
code 1. A candidate is timed in turn with the default, so that a change of the card's clock counts for both: its
seconds are the default's times the median ratio. At last the fastest meets the default anew, for longer, and is
taken if it gains more than the uncertainty of that ratio.

The file is written after every candidate. A call goes on where the last one on the same commit, JAX and device ended;
a candidate during which the process died is passed over, one that Ctrl-C or SIGTERM stopped is not. `--again` times
everything anew.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import importlib.metadata
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, NoReturn

import jax

from kernels_pallas.grouped_matmul import specs
from kernels_pallas.grouped_matmul.bench import DECODE_ROWS
from kernels_pallas.grouped_matmul.mosaic_gpu import backend, candidates, tuning
from kernels_pallas.grouped_matmul.mosaic_gpu.candidates import first_round, label, most_candidates, second_round
from kernels_pallas.grouped_matmul.mosaic_gpu.trial import (
    DTYPE,
    Bench,
    Problem,
    Settings,
    compared,
    interpreted,
    lower,
    make_threads,
)
from kernels_pallas.rivals import command
from kernels_pallas.rivals.case import WrongResult
from kernels_pallas.rivals.rows import commit

FINAL_ROUNDS = 3  # as many timings decide as a candidate has, times this
HANGS = 120  # seconds after which a candidate that was started counts as hanging
INTERRUPTED = 130  # what shells report of a process that Ctrl-C ended
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def write(path: pathlib.Path, table: dict[str, Any]) -> None:
    """Replaces the file as a whole, so that nobody ever reads half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(table, indent=1) + "\n")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@dataclasses.dataclass
class Sweep:
    """One call of the tuner.

    Attributes:
        path: the file.
        device: kind of the device.
        settings: of the timing.
        survivors: how many of the first round go into the second.
        limit: candidates of a problem at most.
        minutes: after which no candidate starts.
        again: times again what was timed on this commit.
        make: makes the bench of a problem.
        say: takes progress.
        wrong: what was reported as wrong.
    """

    path: pathlib.Path
    device: str
    settings: Settings
    survivors: int = 2
    limit: int | None = None
    minutes: float = float("inf")
    again: bool = False
    make: Callable[[Problem, Settings], Any] = Bench
    say: Callable[[str], None] = lambda text: print(text, flush=True)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.until = time.monotonic() + 60 * self.minutes
        self.search: Search | None = None
        self.commit, self.versions = commit(), {p: importlib.metadata.version(p) for p in ("jax", "jaxlib")}
        self.table = tuning.read(self.path) if self.path.exists() else {"choices": []}
        if self.table.get("device", self.device) != self.device:
            raise ValueError(
                f"--output={self.path} is of {self.table['device']}, this is {self.device}: name another file"
            )

    @property
    def over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.until

    def stored(self, problem: Problem) -> dict[str, Any] | None:
        """The problem's choice in the file."""
        key = dataclasses.asdict(problem)
        return next((c for c in self.table["choices"] if key.items() <= c.items()), None)

    def save(self, problem: Problem, choice: dict[str, Any]) -> None:
        """Puts the problem's choice into the file."""
        others = [c for c in self.table["choices"] if c is not self.stored(problem)]
        new = dataclasses.asdict(problem) | choice | {"commit": self.commit, "jax": self.versions["jax"]}
        choices = sorted([*others, new], key=lambda c: (c["operation"], *(c[name] for name in tuning.SIZES)))
        self.table = {"device": self.device, "versions": self.versions, "commit": self.commit, "choices": choices}
        write(self.path, self.table)

    def run(self, todo: Iterable[Problem]) -> int:
        """Sweeps one problem after the other; the exit code."""
        try:
            for problem in todo:
                if self.over:
                    self.say(f"stopped before {problem}: --minutes={self.minutes:g} are over; call again to go on")
                    break
                self.search = Search(self, problem)
                self.search.run()
        except KeyboardInterrupt:
            self.say(self.kept)
            return INTERRUPTED
        for line in self.wrong:
            self.say(line)
        return 1 if self.wrong else 0

    @property
    def kept(self) -> str:
        """What Ctrl-C and SIGTERM leave."""
        return f"interrupted: {self.path} keeps what is done; call again to go on"

    def end(self, number: int, frame: object) -> NoReturn:
        """Handles Ctrl-C and SIGTERM by ending the process.

        Nothing is raised: kernels that are interpreted run in callbacks, where XLA makes an error of its own of an
        exception, and neither they nor a compilation in another thread can be stopped.
        """
        if self.search is not None and self.search.trying:
            self.search.note({})
        os.write(2, f"{self.kept}\n".encode())  # a print may be under way
        os._exit(128 + number)


class Search:
    """The candidates of one problem."""

    def __init__(self, sweep: Sweep, problem: Problem) -> None:
        self.sweep, self.problem = sweep, problem
        self.default, old = problem.default(), sweep.stored(problem)
        same = old is not None and (old.get("commit"), old.get("jax")) == (sweep.commit, sweep.versions["jax"])
        goes_on = old is not None and same and not sweep.again
        # Of a sweep that goes on: what was there before it began, so that it tries the same again.
        found = old and old.get("earlier" if goes_on else "config")
        self.earlier = type(self.default)(**found) if found else None
        old = old if old is not None and goes_on else {}
        self.timed: dict[str, float] = dict(old.get("timed", {}))
        self.deadly: list[str] = [*old.get("deadly", []), *([old["trying"]] if "trying" in old else [])]
        self.complete = bool(old.get("complete"))
        self.tried: dict[tuning.Config, float] = {}
        self.programs: dict[tuning.Config, Any] = {}
        self.failed: set[tuning.Config] = set()
        self.bench: Any = None
        self.fresh = 0
        self.trying = False

    def run(self) -> None:
        """Both rounds, then the decision."""
        say, sweep = self.sweep.say, self.sweep
        for name in self.deadly:
            say(f"{self.problem}: passes over {name}, during which a process died")
        self.measure(first_round(self.problem, self.earlier))
        if self.default not in self.tried:
            return say(f"{self.problem}: the default was not timed, so that nothing is decided")
        self.measure(second_round(sorted(self.tried, key=self.tried.__getitem__)[: sweep.survivors]))
        if self.complete and not self.fresh:
            return say(f"{self.problem}: done before on this commit ({len(self.tried)} candidates); --again repeats it")
        self.decide()

    def measure(self, configs: list[tuning.Config]) -> None:
        """Times those that are new, some at a time: a group is compiled together before any of it is timed."""
        room = None if self.sweep.limit is None else max(0, self.sweep.limit - len(self.tried) - len(self.failed))
        done = {*self.tried, *self.failed}
        configs = [c for c in configs if c not in done and label(c) not in self.deadly][:room]
        self.tried |= {c: self.timed[label(c)] for c in configs if label(c) in self.timed}
        new = [c for c in configs if c not in self.tried]
        size = min(8, os.cpu_count() or 1)
        for group in (new[i : i + size] for i in range(0, len(new), size)):
            if self.sweep.over:
                return
            for config, program in zip(group, self.compile(group), strict=True):
                if self.sweep.over:
                    return
                self.fresh += 1
                self.trying = True
                self.attempt(config, program)
                self.trying = False

    def compile(self, configs: list[tuning.Config]) -> list[Any]:
        self.bench = self.bench or self.sweep.make(self.problem, self.sweep.settings)
        return self.bench.compile(configs)

    def attempt(self, config: tuning.Config, program: Any) -> None:
        """Checks and times one."""
        name, say = label(config), self.sweep.say
        if isinstance(program, Exception):
            self.failed.add(config)
            reason = " ".join(str(program).split())[:200]
            return say(f"{self.problem}: {name} does not compile: {type(program).__name__}: {reason}")
        self.note({"trying": name})
        try:
            with watched(self.sweep.settings):
                self.bench.check(program)
                seconds = self.seconds(config, program)
        except WrongResult as error:
            self.failed.add(config)
            self.sweep.wrong.append(f"WRONG RESULT, not taken: {self.problem}: {name}: {error}")
            say(self.sweep.wrong[-1])
            return self.note({})
        except KeyboardInterrupt:
            self.note({})
            raise
        self.tried[config] = self.timed[name] = seconds
        self.programs[config] = program
        ratio = f"{self.tried.get(self.default, seconds) / seconds:.3f} of the default's speed"
        say(f"{self.problem}: {len(self.tried)} {name}: {1e3 * seconds:.4g} ms, {ratio}")
        self.note({})

    def seconds(self, config: tuning.Config, program: Any) -> float:
        """Of one call, at the clock that the default was timed at."""
        if config == self.default or self.default not in self.tried:
            return self.bench.time(program)[0].median
        return self.tried[self.default] * compared(*self.bench.time(self.program(self.default), program))[0]

    def program(self, config: tuning.Config) -> Any:
        """Compiled if it is not yet, as where an earlier call timed it."""
        if config not in self.programs:
            (self.programs[config],) = self.compile([config])
        return self.programs[config]

    def note(self, more: dict[str, Any]) -> None:
        """Writes what is known so far, unless that would replace an earlier choice by less."""
        old = self.earlier
        known = old is None or old in self.tried or old in self.failed or label(old) in self.deadly
        if self.default not in self.tried or not known:
            return
        kept = old if old is not None and old in self.tried else self.default
        self.keep(kept, self.tried[kept], self.tried[self.default], 0.0, {"complete": False} | more)

    def keep(self, config: tuning.Config, seconds: float, default: float, noise: float, more: dict[str, Any]) -> None:
        choice = {"config": dataclasses.asdict(config), "seconds": seconds, "default_seconds": default, "spread": noise}
        choice |= {"tried": len(self.tried), "rule": config == self.default, **more, "timed": self.timed}
        choice |= {"earlier": dataclasses.asdict(self.earlier)} if self.earlier else {}
        self.sweep.save(self.problem, choice | ({"deadly": self.deadly} if self.deadly else {}))

    def decide(self) -> None:
        """The default and the fastest of the others in turn; writes the choice."""
        complete = {"complete": not self.sweep.over}
        rival = min((c for c in self.tried if c != self.default), key=self.tried.__getitem__, default=None)
        if rival is None:
            seconds = self.tried[self.default]
            return self.keep(self.default, seconds, seconds, 0.0, complete)
        old, new = self.bench.time(self.program(self.default), self.program(rival), rounds=FINAL_ROUNDS)
        ratio, noise = compared(old, new)
        better = 1 - ratio > noise
        chosen, seconds = (rival, ratio * old.median) if better else (self.default, old.median)
        self.keep(chosen, seconds, old.median, noise * old.median, complete)
        gain = f"{label(rival)} takes {ratio:.4f} +- {noise:.4f} of the default's {1e3 * old.median:.4g} ms"
        self.sweep.say(f"{self.problem}: takes {'it' if better else 'the default'}: {gain}")


@contextlib.contextmanager
def watched(settings: Settings) -> Generator[None]:
    """Ends the process if what runs within hangs: the next call passes over it."""
    if settings.interpret:
        yield
        return
    faulthandler.dump_traceback_later(HANGS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def dry_run(todo: list[Problem], survivors: int, limit: int | None, lowered: bool, say: Callable[[str], None]) -> int:
    """Prints the plan; with `lowered`, compiles each configuration once. 1 if one does not."""
    refused = 0
    seen: set[tuple[str, tuning.Config]] = set()
    for problem in todo:
        first = first_round(problem)
        say(f"{problem}: {most_candidates(problem, survivors, limit)} candidates, of these first:")
        for config in first[:limit]:
            say(f"    {label(config)}")
        for config in [*first, *second_round(first)] if lowered else []:
            if (problem.operation, config) in seen:
                continue
            seen.add((problem.operation, config))
            try:
                lower(problem, config)
            except Exception as error:  # whatever the compiler has to say
                refused += 1
                say(f"REFUSED {problem}: {label(config)}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    total = sum(most_candidates(p, survivors, limit) for p in todo)
    say(f"{len(todo)} problems, {total} candidates" + (f"; {len(seen)} lowered, {refused} refused" if lowered else ""))
    return 1 if refused else 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = [s.name for s in specs.SHAPES.values() if s.kind == "gpu" and s.name != "small_experts"]
    parser.add_argument("--shape", nargs="+", choices=list(specs.SHAPES), default=published)
    parser.add_argument("--operation", nargs="+", choices=list(tuning.CONFIGS), default=list(tuning.CONFIGS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(DECODE_ROWS), help="of decode shapes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no candidate starts after that")
    parser.add_argument("--survivors", type=int, default=2, help="of the first round that go into the second")
    parser.add_argument("--limit", type=int, help="candidates of one problem at most")
    parser.add_argument("--repeats", type=int, default=10, help="timings of each candidate")
    parser.add_argument("--target_ms", type=float, default=10.0, help="how long one timing lasts")
    parser.add_argument("--again", action="store_true", help="time again what was timed on this commit")
    parser.add_argument("--output", type=pathlib.Path, help="default: tuned/<device>.json of the package")
    parser.add_argument("--dry_run", action="store_true", help="print the plan only; needs no device")
    parser.add_argument("--lower", action="store_true", help="with --dry_run: cross-compile each configuration")
    parser.add_argument("--interpret", action="store_true", help="in Pallas' interpreter; needs --output")
    args = parser.parse_args(argv)
    for name in ("survivors", "limit", "repeats", *(["rows"] if args.rows else [])):
        value = getattr(args, name)
        if value is not None and min(value if name == "rows" else [value]) < 1:
            parser.error(f"--{name}={value}: must be at least 1")
    if args.lower and not args.dry_run:
        parser.error("--lower belongs to --dry_run")
    if args.interpret and not args.output:
        parser.error("--interpret needs --output=FILE.json: its times are no choices for a device")
    args.problems = []
    for problem in candidates.problems(args.shape, args.operation, args.rows):
        if reason := backend.refuse_shapes(DTYPE, {"K": problem.k, "N": problem.n}):
            parser.error(f"{problem} cannot run: {reason}; leave this --shape out")
        args.problems.append(problem)
    return args


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs; 1 if a candidate was wrong, 130 if interrupted, 143 by SIGTERM."""
    command.shares_device()
    args = parse(argv)
    if args.dry_run:
        return dry_run(args.problems, args.survivors, args.limit, args.lower, print)
    if not args.interpret and (reason := hopper_is_missing()):
        print(f"error: {reason}; --dry_run prints the plan, --interpret runs it on a CPU", file=sys.stderr)
        return 2
    settings = Settings(args.repeats, args.target_ms, args.interpret)
    if args.interpret:
        make_threads()
    with interpreted() if args.interpret else contextlib.nullcontext():
        device = tuning.device_kind()
        path = args.output or tuning.path_of(device)
        try:
            sweep = Sweep(path, device, settings, args.survivors, args.limit, args.minutes, args.again)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        sweep.say(f"{device}, commit {sweep.commit or '?'}, {len(args.problems)} problems, into {path}")
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler in (signal.default_int_handler, signal.SIG_DFL):  # else ignored, as in a shell's background
                signal.signal(number, sweep.end)
        try:
            return sweep.run(args.problems)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def hopper_is_missing() -> str | None:
    """Why nothing can be timed here."""
    lhs, rhs = jax.ShapeDtypeStruct((64, 64), DTYPE), jax.ShapeDtypeStruct((1, 64, 64), DTYPE)
    return backend.refuse_matmul(lhs, rhs, None)
