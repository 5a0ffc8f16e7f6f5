"""A family in a process of its own: the parent sends one case as a JSON line, the child answers with JSON lines.

A request with "prepare" asks for the programs of a later case to be compiled, which uses no device and has no answer.
Answers: {"start": name} before an implementation runs, {"row": {...}} after it, {"end": true} after the last one, or
{"failed": reason} if the family has nothing to run.
After a failure that may have spoiled the process (anything but a refusal) the child ends, and the parent starts
a fresh one for what is left. A child that dies, or says nothing for too long, costs the row it was at.
"""

import contextlib
import dataclasses
import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from kernels_pallas.rivals import families
from kernels_pallas.rivals.case import AnyCase, Case, LayerCase, Settings

# These leave the device as it was; after another error (out of memory, an illegal address) only a new process is clean.
HARMLESS = ("NotImplementedError", "ModuleNotFoundError", "ImportError", "ValueError", "WrongResult", "TypeError")
START_SECONDS = 120.0


def families_of(kind: str) -> dict[str, families.Family]:
    """The table of `families` of that name, "GROUPED" or "LAYER"."""
    return {"GROUPED": families.GROUPED, "LAYER": families.LAYER}[kind]


def describe(problem: BaseException, limit: int = 600) -> str:
    """The error as one line."""
    text = " ".join(f"{type(problem).__name__}: {problem}".split())
    return text if len(text) <= limit else text[:limit] + " ..."


def serve(module: Any, case: AnyCase, settings: Settings, done: list[str], send: Callable[[dict], None]) -> bool:
    """Measures what is not in `done`; returns whether the process is still clean."""
    try:
        pending = [(name, run) for name, run in module.measurements(case, settings) if name not in done]
    except Exception as problem:  # say what the family is about is not installed
        send({"failed": describe(problem)})
        return True
    for name, run in pending:
        send({"start": name})
        try:
            result = run()
        except Exception as problem:
            send({"row": {"implementation": name, "error": describe(problem)}})
            if type(problem).__name__ not in HARMLESS:
                if name == pending[-1][0]:
                    send({"end": True})
                return False
        else:
            send({"row": {"implementation": name, **result}})
        gc.collect()
    send({"end": True})
    return True


def prepare(module: Any, case: AnyCase, settings: Settings) -> None:
    """Compiles ahead, where the family can. What fails here fails again, and is told, when it is measured."""
    if hasattr(module, "prepare"):
        with contextlib.suppress(Exception):
            module.prepare(case, settings)


def decode_request(request: dict) -> tuple[AnyCase, Settings, list[str]]:
    """The parts of a request as they were before JSON."""
    kind = Case if "group_sizes" in request["case"] else LayerCase
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in request["case"].items()}
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in request["settings"].items()}
    return kind(**fields), Settings(**settings), request["done"]


def child(kind: str, family: str) -> None:
    """Answers requests on stdin until it closes. What libraries print goes to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        module = families_of(kind)[family].load()
    except Exception as problem:
        send({"failed": describe(problem)})
        return
    send({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        case, settings, done = decode_request(request)
        if request["prepare"]:
            prepare(module, case, settings)
        elif not serve(module, case, settings, done, send):
            return


class Inline:
    """A family in this process: for a CPU, where nothing can be spoiled, and for tests."""

    def __init__(self, kind: str, family: str, seconds: float = 0.0):
        self.kind, self.family = kind, family

    def rows(self, case: AnyCase, settings: Settings) -> Iterator[dict]:
        """A dictionary for each implementation: its columns, an "error", or "refused"."""
        messages: list[dict] = []
        serve(families_of(self.kind)[self.family].load(), case, settings, [], messages.append)
        for message in messages:
            if "failed" in message:
                yield {"implementation": self.family, "error": message["failed"]}
            elif "row" in message:
                yield message["row"]

    def close(self) -> None:
        """Nothing to end."""


class Worker:
    """A family in a child process, started at the first case and again whenever it ended.

    Args:
        kind: "GROUPED" or "LAYER" of `families`.
        family: its name there.
        seconds: how long one implementation of one case may take, compiling and checking included, times the
            family's patience.
    """

    def __init__(self, kind: str, family: str, seconds: float):
        self.kind, self.family = kind, family
        self.seconds = seconds * families_of(kind)[family].patience
        self.process: subprocess.Popen | None = None
        self.command = [sys.executable, "-m", "kernels_pallas.rivals.worker", kind, family]
        self.log: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        self.answers: queue.Queue[dict | None] = queue.Queue()

    def environment(self) -> dict[str, str]:
        """The child's: memory is taken as needed, since processes share one device."""
        family = families_of(self.kind)[self.family]
        first = os.environ.get(family.path or "", "")
        root = str(Path(__file__).resolve().parents[2])
        path = [entry for entry in (first, os.environ.get("PYTHONPATH", ""), root) if entry]
        own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": os.pathsep.join(path)}
        return os.environ | own | dict(family.environment)

    def start(self) -> None:
        """Starts the child; does not wait for it."""
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, stderr=self.log, env=self.environment(), text=True
        )
        self.answers = queue.Queue()
        threading.Thread(target=_forward, args=(self.process.stdout, self.answers), daemon=True).start()
        self.greeted = self.preparing = False

    def greet(self) -> None:
        """Waits until the child has loaded, or has ended: to load takes of the device what others measure with."""
        if self.process is None or self.greeted:
            return
        with contextlib.suppress(queue.Empty):
            message = self.answers.get(timeout=START_SECONDS)
            self.greeted = message is not None and "ready" in message
            if not self.greeted:
                self.answers.put(message)  # for who asks it

    def close(self) -> None:
        """Ends the child, at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    stream and stream.close()
            self.process = None

    def tail(self, limit: int = 400) -> str:
        """The end of what the child wrote to stderr, as one line."""
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - 4 * limit))
        text = " ".join(self.log.read().decode(errors="replace").split())
        self.log.seek(0, os.SEEK_END)
        return text[-limit:]

    def rows(self, case: AnyCase, settings: Settings) -> Iterator[dict]:
        """A dictionary for each implementation: its columns, an "error", or "refused"."""
        done: list[str] = []
        fruitless, reason = 0, ""
        while fruitless < 2:
            at, before = None, len(done)
            for message in self._ask(case, settings, done):
                at = message.get("start", at)
                reason = message.get("lost", reason)
                if "row" in message:
                    done.append(message["row"]["implementation"])
                    yield message["row"]
                elif "failed" in message:  # it would fail a second time too
                    yield {"implementation": self.family, "error": message["failed"]}
                    return
                elif "end" in message:
                    return
            self.close()
            if at is not None and at not in done:
                done.append(at)
                yield {"implementation": at, "error": reason}
            # Nothing was even begun: perhaps the child was about to end when asked. Once more, then give up.
            fruitless = fruitless + 1 if len(done) == before else 0
        yield {"implementation": self.family, "error": reason}

    def prepare(self, case: AnyCase, settings: Settings) -> None:
        """Asks a child that runs to compile what this case needs; does not wait for it."""
        if self.process is not None and self.process.poll() is None:
            self._send(case, settings, prepare=True)
            self.preparing = True

    def _send(self, case: AnyCase, settings: Settings, done: Sequence[str] = (), prepare: bool = False) -> None:
        request = {"case": dataclasses.asdict(case), "settings": dataclasses.asdict(settings), "done": done}
        request["prepare"] = prepare
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: who waits for an answer is told
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def _ask(self, case: AnyCase, settings: Settings, done: list[str]) -> Iterator[dict]:
        """The child's messages to one request; {"lost": reason} last if it died or was ended for being late."""
        if self.process is None or self.process.poll() is not None:
            self.close()
            self.start()
        self._send(case, settings, done)
        process = self.process
        assert process is not None
        while True:
            waits = self.preparing or not self.greeted  # for what it was asked before
            limit = max(self.seconds, START_SECONDS) if waits else self.seconds
            started = time.monotonic()
            try:
                message = self.answers.get(timeout=limit)
            except queue.Empty:
                yield {"lost": f"no result in {time.monotonic() - started:.0f} s: {self.tail()}"}
                return
            if message is None:
                yield {"lost": f"the process ended with status {process.wait()}: {self.tail()}"}
                return
            if "ready" in message:
                self.greeted = True
                continue
            self.preparing = False
            yield message
            if "end" in message or "failed" in message:
                return


class Team:
    """Processes of one family that take cases in turn: while one measures, the others compile their next case.

    One measures at a time, and what is compiled ahead does not use the device.

    Args:
        members: the processes.
        todo: all cases in the order in which they will be measured.
        settings: with which they will be.
    """

    def __init__(self, members: Sequence[Worker], todo: Sequence[AnyCase], settings: Settings):
        self.members, self.todo, self.settings = members, todo, settings
        self.at = 0

    def start(self) -> None:
        """Starts all of them, each with its first case."""
        for index, member in enumerate(self.members):
            member.start()
            self._prepare(index)

    def greet(self) -> None:
        """Waits until all have loaded."""
        for member in self.members:
            member.greet()

    def _prepare(self, index: int) -> None:
        if index < len(self.todo):
            self.members[index % len(self.members)].prepare(self.todo[index], self.settings)

    def rows(self, case: AnyCase, settings: Settings) -> Iterator[dict]:
        """As of one worker; cases must come in the order of `todo`."""
        index, self.at = self.at, self.at + 1
        yield from self.members[index % len(self.members)].rows(case, settings)
        self._prepare(index + len(self.members))

    def close(self) -> None:
        """Ends all of them, at once."""
        for member in self.members:
            member.close()


def _forward(stream: Any, answers: queue.Queue) -> None:
    """Lines of the child into the queue, None at its end."""
    for line in stream:
        answers.put(json.loads(line))
    answers.put(None)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2])
