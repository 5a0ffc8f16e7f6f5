"""Ctrl-C and SIGTERM: the first asks the loop to stop, the second ends the process at once."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = 130
"""What a shell shows for a command that Ctrl-C ended."""
TERMINATED = 143
"""And for one that SIGTERM ended, as ``timeout`` and batch systems send it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as Ctrl-C is, so that what is half-written is removed just so."""


def terminate(number: int, frame: object) -> NoReturn:
    """The handler that raises it."""
    raise Terminated


def exit_code(error: KeyboardInterrupt) -> int:
    """Of a command that ``error`` ended."""
    return TERMINATED if isinstance(error, Terminated) else EXIT_CODE


def outlast_collections() -> None:
    """Sends a signal once more that came where Python prints what is raised and forgets it: while JAX collects its
    garbage, which it does in a callback of Python's collector, or in a ``__del__``. A signal that comes during a whole
    collection is raised where the callback is entered, so that nothing within it could catch it."""
    shown = sys.unraisablehook

    def hook(found: Any) -> None:
        if not isinstance(found.exc_value, KeyboardInterrupt):
            shown(found)
            return
        number = signal.SIGTERM if isinstance(found.exc_value, Terminated) else signal.SIGINT
        with contextlib.suppress(RuntimeError):  # while Python leaves no thread can be started
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = hook


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a flag, ``asked``, that the loop reads between steps.

    The second one ends the process with exit code 130, also while the main thread is inside of a compilation: Python
    runs signal handlers between two of its own instructions only, so a thread of ours watches the signals' pipe. Ending
    without any clean-up loses nothing: what is written counts only once it is whole.

    Args:
      say: shows a line to the user.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.asked = False
        self._seen = False
        self._say = say
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._old_pipe = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        self._watcher = threading.Thread(target=self._watch, name="interrupt", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_pipe)
        self._theirs.close()  # ends the watcher
        self._watcher.join()
        self._ours.close()

    def _handle(self, number: int, frame: object) -> None:
        self.asked = True

    def _watch(self) -> None:
        while received := self._ours.recv(16):
            for number in received:
                if number not in SIGNALS:
                    continue
                if self._seen:
                    end_at_once()
                self._seen = True
                with contextlib.suppress(Exception):  # a closed terminal must not end the watch
                    self._say(
                        f"{signal.Signals(number).name}: stopping after this step, with a checkpoint; "
                        "a second one ends at once"
                    )


@contextlib.contextmanager
def noted() -> Generator[list[type[KeyboardInterrupt]]]:
    """The Ctrl-C and SIGTERM that came meanwhile: for calls into code that turns a KeyboardInterrupt into another
    error, or into none. They are raised as ever; where a signal has a handler of its own, or in another thread, nothing
    is noted."""
    came: list[type[KeyboardInterrupt]] = []
    raising = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {number: handler for number, handler in raising.items() if signal.getsignal(number) is handler}
    if threading.current_thread() is not threading.main_thread():
        before = {}

    def handle(number: int, frame: Any) -> None:
        came.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise came[-1]

    for number in before:
        signal.signal(number, handle)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once() -> None:
    """Leaves without clean-up: threads that write would be waited for."""
    shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
    text = f"{shown}\nended at once: the same command goes on from the last finished checkpoint\n"
    os.write(2, text.encode())
    os._exit(EXIT_CODE)
