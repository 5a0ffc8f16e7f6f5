"""The side of a family's process: it measures what it is asked for, one JSON line after the other (`worker.py` asks).

A request is a case and settings. With "prepare" it asks for the programs of a later case to be compiled, which uses no
device and has no answer. Answers: {"start": name} before an implementation runs, {"row": {...}} after it, {"end": true}
after the last one, or {"failed": reason} if the family has nothing to run. With settings that time in turn (`turns.py`)
{"at_turn": names} follows when all have run up to their first timing; a request {"turn": name} is one timing of one of
them, with the answer {"timed": name}, or its row after the last one.
After a failure that may have spoiled the process (anything but a refusal) it ends.
"""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kernels_pallas.rivals import families, turns
from kernels_pallas.rivals.case import AnyCase, Case, LayerCase, Settings

# These leave the device as it was; after another error (out of memory, an illegal address) only a new process is clean.
HARMLESS = ("NotImplementedError", "ModuleNotFoundError", "ImportError", "ValueError", "WrongResult", "TypeError")


def families_of(kind: str) -> dict[str, families.Family]:
    """The table of `families` of that name, "GROUPED" or "LAYER"."""
    return {"GROUPED": families.GROUPED, "LAYER": families.LAYER}[kind]


def describe(problem: BaseException, limit: int = 600) -> str:
    """The error as one line."""
    text = " ".join(f"{type(problem).__name__}: {problem}".split())
    return text if len(text) <= limit else text[:limit] + " ..."


def pending(
    module: Any, case: AnyCase, settings: Settings, done: list[str], send: Callable[[dict], None]
) -> list[tuple[str, Callable[[], dict]]] | None:
    """What is not in `done`; None, and sent why, if the family has nothing to run."""
    try:
        return [(name, run) for name, run in module.measurements(case, settings) if name not in done]
    except Exception as problem:  # say what the family is about is not installed
        send({"failed": describe(problem)})
        return None


def clean_after(problem: BaseException) -> bool:
    """Whether it left the device as it was."""
    return type(problem).__name__ in HARMLESS


def serve(module: Any, case: AnyCase, settings: Settings, done: list[str], send: Callable[[dict], None]) -> bool:
    """Measures what is not in `done`; returns whether the process is still clean."""
    todo = pending(module, case, settings, done, send)
    if todo is None:
        return True
    for name, run in todo:
        send({"start": name})
        try:
            result = run()
        except Exception as problem:
            send({"row": {"implementation": name, "error": describe(problem)}})
            if not clean_after(problem):
                if name == todo[-1][0]:
                    send({"end": True})
                return False
        else:
            send({"row": {"implementation": name, **result}})
        gc.collect()
    send({"end": True})
    return True


class Turns:
    """The implementations of one case that are timed in turn, in this process.

    Args:
        todo: their names and what measures them.
        send: takes {"start": name} before one begins.
    """

    def __init__(self, todo: Sequence[tuple[str, Callable[[], dict]]], send: Callable[[dict], None]):
        self.runners = {name: turns.Runner(name, run) for name, run in todo}
        self.send, self.clean = send, True

    def begin(self) -> Iterator[dict]:
        """Brings all to their first timing; the rows of those that have none."""
        for name in list(self.runners):
            self.send({"start": name})
            if (row := self.advance(name)) is not None:
                yield row

    def advance(self, name: str) -> dict | None:
        """One timing; its row after the last one."""
        runner = self.runners[name]
        if not runner.advance():
            return None
        if runner.problem is None:
            row = {"implementation": name, **(runner.row or {})}
        else:
            self.clean = self.clean and clean_after(runner.problem)
            row = {"implementation": name, "error": describe(runner.problem)}
        del self.runners[name], runner  # with the error's frames, which hold what was on the device
        gc.collect()
        return row

    def close(self) -> None:
        """Ends what has not come to its end."""
        for runner in self.runners.values():
            runner.close()


def serve_in_turn(
    module: Any,
    case: AnyCase,
    settings: Settings,
    done: list[str],
    send: Callable[[dict], None],
    receive: Callable[[], dict | None],
) -> bool:
    """As `serve`, each timing when it is asked for; ends at once if spoiled before the first one."""
    todo = pending(module, case, settings, done, send)
    if todo is None:
        return True
    mine = Turns(todo, send)
    for row in mine.begin():
        send({"row": row})
        if not mine.clean:
            return False
    send({"at_turn": list(mine.runners)})
    while mine.runners:
        request = receive()
        if request is None:  # the parent ended
            return False
        name = request["turn"]
        row = mine.advance(name)
        send({"timed": name} if row is None else {"row": row})
    return mine.clean


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

    def receive() -> dict | None:
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    while (request := receive()) is not None:
        case, settings, done = decode_request(request)
        if request["prepare"]:
            prepare(module, case, settings)
            continue
        if settings.in_turn:
            clean = serve_in_turn(module, case, settings, done, send, receive)
        else:
            clean = serve(module, case, settings, done, send)
        if not clean:
            return


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2])
