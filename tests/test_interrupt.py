"""Ctrl-C and SIGTERM: one asks, two end the process."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moejax.interrupt import EXIT_CODE, Interrupt

ROOT = Path(__file__).resolve().parent.parent


def test_the_first_signal_asks_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said: list[str] = []
    with Interrupt(said.append) as interrupt:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    (line,) = said
    assert line.startswith("SIGTERM: stopping after this step, with a checkpoint; a second one ends at once")


BUSY = """
import hashlib, sys
from moejax.interrupt import Interrupt
with Interrupt(lambda text: print(text, file=sys.stderr, flush=True)):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C code, like a compilation: no Python handler runs
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_busy_process(first: signal.Signals):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert "stopping after this step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == EXIT_CODE == 130
    assert "ended at once: the same command goes on from the last finished checkpoint" in rest


def test_ctrl_c_while_a_command_is_imported_prints_no_traceback():
    """Python runs a package before the module that ``-m`` names, whose imports take seconds."""
    ask = "import experiments, os, signal; os.kill(os.getpid(), signal.SIGINT)"
    for first, status in (("-m", -signal.SIGINT), ("-c", 1)):
        code = f"import sys; sys.argv[0] = {first!r}\ntry:\n    {ask}\nexcept KeyboardInterrupt:\n    sys.exit(1)"
        made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (made.returncode, made.stderr) == (status, "")


COLLECTING = """
import gc, signal, sys, time
import jax
from moejax import interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, interrupt.terminate)
number = getattr(signal, sys.argv[1])
(theirs,) = (c for c in gc.callbacks if c.__name__ == "_xla_gc_callback")

def _xla_gc_callback(*arguments):
    global number
    theirs(*arguments)
    if number is not None:
        came, number = number, None
        signal.raise_signal(came)

gc.callbacks[gc.callbacks.index(theirs)] = _xla_gc_callback
if sys.argv[2] == "heard":
    interrupt.outlast_collections()
try:
    gc.collect()
    time.sleep(2.0)
    print("not heard")
except KeyboardInterrupt as error:
    print(interrupt.exit_code(error))
"""


@pytest.mark.parametrize(
    ("number", "how", "heard"),
    [("SIGINT", "heard", "130"), ("SIGTERM", "heard", "143"), ("SIGINT", "as it is", "not heard")],
)
def test_a_signal_that_comes_while_jax_collects_garbage_is_heard(number, how, heard):
    """The last case says why it is needed: were it heard without, this could go."""
    done = subprocess.run([sys.executable, "-c", COLLECTING, number, how], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == heard, done.stderr


WHOLE = """
import gc, signal, time
import jax
from moejax import interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, interrupt.terminate)
interrupt.outlast_collections()
many = [[] for _ in range(3_000_000)]
try:
    print("ready", flush=True)
    for _ in range(4):
        gc.collect()
        time.sleep(0.5)
    print("not heard")
except KeyboardInterrupt as error:
    print(interrupt.exit_code(error))
"""


@pytest.mark.parametrize(("number", "heard"), [(signal.SIGINT, "130"), (signal.SIGTERM, "143")])
def test_a_signal_that_comes_during_a_whole_collection_is_heard(number, heard):
    """Python raises it where the callback is entered, before anything in it could catch it."""
    with subprocess.Popen([sys.executable, "-c", WHOLE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(number)
        assert process.communicate(timeout=120)[0].strip() == heard
