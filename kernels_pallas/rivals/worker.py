"""A family in a process of its own (`child.py`): the parent sends cases as JSON lines and gets rows.

A child that failed in a way that may have spoiled it ends, and the parent starts a fresh one for what is left. A child
that dies, or says nothing for too long, costs the row it was at.
"""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from kernels_pallas.rivals.case import AnyCase, Settings
from kernels_pallas.rivals.child import Turns, families_of, pending, serve

START_SECONDS = 120.0


class Inline:
    """A family in this process: for a CPU, where nothing can be spoiled, and for tests."""

    def __init__(self, kind: str, family: str, seconds: float = 0.0):
        self.kind, self.family = kind, family
        self.turns: Turns | None = None

    def rows(self, case: AnyCase, settings: Settings) -> Iterator[dict]:
        """A dictionary for each implementation: its columns, an "error", or "refused"."""
        messages: list[dict] = []
        serve(families_of(self.kind)[self.family].load(), case, settings, [], messages.append)
        for message in messages:
            if "failed" in message:
                yield {"implementation": self.family, "error": message["failed"]}
            elif "row" in message:
                yield message["row"]

    def begin(self, case: AnyCase, settings: Settings) -> tuple[list[str], list[dict]]:
        """See `turns.Process`."""
        failed: list[dict] = []
        todo = pending(families_of(self.kind)[self.family].load(), case, settings, [], failed.append)
        if todo is None:
            return [], [{"implementation": self.family, "error": failed[0]["failed"]}]
        self.turns = Turns(todo, lambda message: None)
        rows = list(self.turns.begin())
        return list(self.turns.runners), rows

    def advance(self, name: str) -> dict | None:
        """See `turns.Process`."""
        assert self.turns is not None
        return self.turns.advance(name)

    def close(self) -> None:
        """Ends the threads of a case that was cut off."""
        if self.turns is not None:
            self.turns.close()


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
        self.command = [sys.executable, "-m", "kernels_pallas.rivals.child", kind, family]
        self.at_turn: list[str] = []
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
        """A dictionary for each implementation: its columns, an "error", or "refused". Timed in turn, those that come
        to a first timing have none yet: they are `at_turn`."""
        done: list[str] = []
        fruitless, reason, self.at_turn = 0, "", []
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
                elif "end" in message or "at_turn" in message:
                    self.at_turn = message.get("at_turn", [])
                    return
            self.close()
            if at is not None and at not in done:
                done.append(at)
                yield {"implementation": at, "error": reason}
            # Nothing was even begun: perhaps the child was about to end when asked. Once more, then give up.
            fruitless = fruitless + 1 if len(done) == before else 0
        yield {"implementation": self.family, "error": reason}

    def begin(self, case: AnyCase, settings: Settings) -> tuple[list[str], list[dict]]:
        """See `turns.Process`."""
        rows = list(self.rows(case, settings))
        return self.at_turn, rows

    def advance(self, name: str) -> dict | None:
        """See `turns.Process`."""
        if self.process is None:
            return {"implementation": name, "error": f"its process ended with another implementation: {self.tail()}"}
        self._tell({"turn": name})
        for message in self._listen():
            if "lost" in message:
                self.close()
                return {"implementation": name, "error": message["lost"]}
            return message.get("row")
        raise AssertionError("a process that is heard says something or is lost")

    def prepare(self, case: AnyCase, settings: Settings) -> None:
        """Asks a child that runs to compile what this case needs; does not wait for it."""
        if self.process is not None and self.process.poll() is None:
            self._send(case, settings, prepare=True)
            self.preparing = True

    def _send(self, case: AnyCase, settings: Settings, done: Sequence[str] = (), prepare: bool = False) -> None:
        request = {"case": dataclasses.asdict(case), "settings": dataclasses.asdict(settings), "done": done}
        self._tell(request | {"prepare": prepare})

    def _tell(self, request: dict) -> None:
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
        yield from self._listen()

    def _listen(self) -> Iterator[dict]:
        """The child's messages, up to what ends a request; {"lost": reason} last."""
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
            if message.keys() & {"end", "failed", "at_turn"}:
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

    def begin(self, case: AnyCase, settings: Settings) -> tuple[list[str], list[dict]]:
        """See `turns.Process`; cases must come in the order of `todo`."""
        if self.at and len(self.members) > 1:  # by itself it measures from now on
            self._prepare(self.at - 1 + len(self.members))  # it had the case before
        self.turn_of = self.members[self.at % len(self.members)]
        self.at += 1
        return self.turn_of.begin(case, settings)

    def advance(self, name: str) -> dict | None:
        """See `turns.Process`."""
        return self.turn_of.advance(name)

    def close(self) -> None:
        """Ends all of them, at once."""
        for member in self.members:
            member.close()


def _forward(stream: Any, answers: queue.Queue) -> None:
    """Lines of the child into the queue, None at its end."""
    for line in stream:
        answers.put(json.loads(line))
    answers.put(None)
