"""Exact resume: the real command is killed again and again, and must end as if nobody had touched it.

``MOEJAX_SOAK_KILLS`` sets the number of kills of the long test, ``MOEJAX_SOAK_SEED`` where and how they fall.
"""

import contextlib
import itertools
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moejax import checkpoint, metrics
from tests.small import write_workspace

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
SETTINGS = [
    f"--config.train.steps={STEPS}", "--config.train.log_every=5", "--config.train.eval_every=30",
    "--config.train.checkpoint_every=4", "--config.model.num_layers=1", "--config.model.moe.router.name=sigmoid_bias",
]  # fmt: skip
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 300.0
TIMES = ("time", "tokens_per_s", "mfu")
"""Fields of a row that are of the clock."""
WINDOWED = ("max_over_mean", "load_entropy", "entropy", "dead")
"""Figures of layers over the steps that one process made since the last row."""


class Server:
    """Starts runs; see soak_server.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, queue.Queue[str]()
        command = [sys.executable, str(ROOT / "tests" / "soak_server.py")]
        environment = {**os.environ, **ENVIRONMENT}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.put(line)

    def begin(self, workdir: Path, *more: str) -> int:
        """Process id of a new run in ``workdir``."""
        arguments = [f"--config={self.folder / 'small_config.py'}:plain", f"--workdir={workdir}", *SETTINGS, *more]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([arguments, str(self.said(workdir))]) + "\n")
        self._process.stdin.flush()
        return int(self.lines.get(timeout=PATIENCE))

    def end(self, timeout: float = PATIENCE) -> int | None:
        """Exit status of the run; None while it goes on."""
        with contextlib.suppress(queue.Empty):
            return int(self.lines.get(timeout=timeout)) if timeout else int(self.lines.get_nowait())
        return None

    def said(self, workdir: Path) -> Path:
        return self.folder / f"{workdir.name}.log"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("soak")
    write_workspace(folder)
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> tuple[Path, float]:
    """A finished workdir, and about how many seconds a run takes once its programs are compiled."""
    begin = time.monotonic()
    workdir = server.folder / "undisturbed"
    server.begin(workdir)
    assert server.end() == 0, server.said(workdir).read_text()[-3000:]
    return workdir, (time.monotonic() - begin) / 2


# --- where a kill falls -------------------------------------------------------------------------------------------


def saves(workdir: Path) -> tuple[set[str], set[int]]:
    """Steps that have a checkpoint, and the inodes of folders of saves that are under way or were cut off."""
    found: tuple[set[str], set[int]] = (set(), set())
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(workdir / "checkpoints"):
            if entry.name.isdigit():
                found[0].add(entry.name)
            elif "tmp" in entry.name:
                found[1].add(entry.inode())
    return found


def aims(workdir: Path, dice: random.Random, length: float) -> dict[str, Callable[[], bool]]:
    """By name: whether the moment of a kill has come."""
    at = time.monotonic() + dice.uniform(0, length)
    after = dice.randrange(1, 6)
    before, cut_off = saves(workdir)
    text = workdir / "metrics.jsonl"
    size = text.stat().st_size if text.exists() else 0

    def new_saves() -> int:
        return len(saves(workdir)[0] - before)

    def saving() -> bool:
        return bool(saves(workdir)[1] - cut_off)

    return {
        "any time": lambda: time.monotonic() > at,
        "in a save": saving,
        "after a save": lambda: new_saves() > 0,
        "in a later save": lambda: new_saves() >= min(after, 2) and saving(),
        "in a row": lambda: text.exists() and text.stat().st_size > size + 300 * after,
    }


def kill_once(server: Server, workdir: Path, dice: random.Random, aim: str, length: float) -> tuple[str, int | None]:
    """Starts a run, kills it; returns what was done and the status, None where it finished before."""
    number = dice.choice(SIGNALS)
    come = aims(workdir, dice, length)[aim]
    pid = server.begin(workdir)
    deadline = time.monotonic() + PATIENCE
    while not come():
        assert time.monotonic() < deadline, f"{aim} never came"
        if (status := server.end(timeout=0)) is not None:
            assert status == 0, server.said(workdir).read_text()[-3000:]
            return "finished", None
        time.sleep(0.003)  # a save takes longer
    time.sleep(dice.choice((0.0, 0.0, dice.uniform(0, 0.02), dice.uniform(0, 0.3))))
    twice = number != signal.SIGKILL and dice.random() < 0.25
    with contextlib.suppress(ProcessLookupError):
        for _ in range(1 + twice):
            os.kill(pid, number)
            time.sleep(0.002)
    status = server.end()
    what = f"{aim}, {signal.Signals(number).name}{' twice' if twice else ''}"
    expected = {
        signal.SIGKILL: (-signal.SIGKILL,),
        # A signal may come before the command catches any, and a second one when the first has ended the command:
        # while Python leaves, it ends the process by itself.
        signal.SIGINT: (130, -signal.SIGINT),
        signal.SIGTERM: (130, 143, -signal.SIGTERM),
    }[signal.Signals(number)]
    if status == 0:  # it was asked at its very last step, or was done
        return what, None
    assert status in expected, f"{what}: status {status}\n{server.said(workdir).read_text()[-3000:]}"
    return what, status


# --- what must be equal -------------------------------------------------------------------------------------------


def rows(workdir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of metrics.jsonl without what the clock decides, each there once and in order."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == len(metrics.read_metrics(workdir / "metrics.jsonl"))
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found:
        if row["kind"] == "warning":  # a run that goes on says it again
            continue
        key = (row["kind"], row["step"])
        assert key not in kept, f"{key} is there twice"
        kept[key] = {name: value for name, value in row.items() if name not in TIMES}
        if row["kind"] == "train":
            kept[key]["layers"] = {name: v for name, v in row["layers"].items() if name not in WINDOWED}
    for kind in ("train", "valid"):
        steps = [row["step"] for row in found if row["kind"] == kind]
        assert steps == sorted(steps)
    return kept


def require_equal(workdir: Path, expected: Path) -> None:
    """Checkpoints, place in the data and metrics are those of the undisturbed run, bit for bit."""
    ours, theirs = (checkpoint.steps_in(folder / "checkpoints") for folder in (workdir, expected))
    assert ours[-1] == theirs[-1] == STEPS
    best = [checkpoint.locate(folder) for folder in (workdir, expected)]
    assert best[0].name == best[1].name
    for pair in ([folder / "checkpoints" / str(STEPS) for folder in (workdir, expected)], best):
        (arrays, meta), (wanted, wanted_meta) = map(checkpoint.read_all, pair)
        assert arrays.keys() == wanted.keys() and "step" in arrays and any(n.startswith("opt_state/") for n in arrays)
        for name, array in wanted.items():
            assert arrays[name].dtype == array.dtype and arrays[name].tobytes() == array.tobytes(), name
        assert {**meta, "seconds": 0} == {**wanted_meta, "seconds": 0}
    assert rows(workdir) == rows(expected)
    assert not [p for p in workdir.rglob("*") if "tmp" in p.name or "deleted" in p.name or p.name == ".lock"]


def soak(server: Server, undisturbed: tuple[Path, float], kills: int, seed: int, name: str) -> list[str]:
    """Kills runs ``kills`` times, in as many workdirs as that takes; each must end like the undisturbed one."""
    expected, length = undisturbed
    dice = random.Random(seed)
    order = itertools.cycle(aims(expected, dice, length))
    done: list[str] = []
    for number in itertools.count():
        workdir = server.folder / f"{name}-{number}"
        status: int | None = -1
        while status is not None and len(done) < kills:
            what, status = kill_once(server, workdir, dice, next(order), length)
            if status is not None:
                done.append(f"{workdir.name}: {what} -> {status} at {max(map(int, saves(workdir)[0]), default=0)}")
        if status is not None:
            server.begin(workdir)
            assert server.end() == 0, server.said(workdir).read_text()[-3000:]
        require_equal(workdir, expected)
        assert len(json.loads((workdir / "env.json").read_text())["sessions"]) > 0
        if len(done) >= kills:
            return done
    raise AssertionError


def test_twenty_kills_change_nothing(server: Server, undisturbed: tuple[Path, float]):
    done = soak(server, undisturbed, kills=20, seed=0, name="killed")
    print("\n".join(done))
    assert len(done) == 20


@pytest.mark.slow
def test_a_longer_soak(server: Server, undisturbed: tuple[Path, float]):
    kills = int(os.environ.get("MOEJAX_SOAK_KILLS", "200"))
    done = soak(server, undisturbed, kills, int(os.environ.get("MOEJAX_SOAK_SEED", "1")), "soaked")
    print("\n".join(done))
    assert len(done) == kills
