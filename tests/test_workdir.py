"""A workdir over its life: calls on other machines and places, weights from elsewhere, a disk that fills up."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import experiments.run
from experiments import session
from moejax import checkpoint, metrics
from moejax.checkpoint import store
from moejax.config import ConfigError
from moejax.loop import Run
from tests.small import execute

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def arguments(workspace: Path) -> list[str]:
    changes = ("model.num_layers=1", "train.log_every=4", "train.eval_every=3")
    return [f"--config={workspace / 'small_config.py'}:plain", *(f"--config.{change}" for change in changes)]


@pytest.fixture(scope="module")
def finished(workspace: Path, arguments: list[str]) -> Path:
    assert execute(*arguments, f"--workdir={workspace / 'finished'}") == 0
    return workspace / "finished"


def after_step(step: int, act: Callable[[Run], Any]) -> pytest.MonkeyPatch:
    """Does something once a training step is done; undo it."""
    patch = pytest.MonkeyPatch()
    put = Run._put
    seen = []

    def counting(self: Run, batch: dict) -> dict:
        seen.append(None)
        if len(seen) == step + 1:  # the batch of the step after it is asked for
            act(self)
        return put(self, batch)

    patch.setattr(Run, "_put", counting)
    return patch


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs that were about to train; they are stopped there, as by Ctrl-C."""
    runs: list[Run] = []

    def train(self: Run, **_: Any) -> None:
        runs.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train", train)
    return runs


def rows(workdir: Path, *without: str) -> list[dict[str, Any]]:
    found = metrics.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in without} for row in found if row["kind"] != "warning"]


def env(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "env.json").read_text())


def same_arrays(one: Path, other: Path, step: int = 6) -> None:
    (a, meta), (b, expected) = (checkpoint.read_all(folder / "checkpoints" / str(step)) for folder in (one, other))
    assert a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
    assert meta["data"] == expected["data"]


# --- stopped and continued ------------------------------------------------------------------------------------------


@pytest.mark.slow  # test_soak.py compares such rows too
def test_a_row_whose_steps_two_calls_made(finished: Path, workspace: Path, arguments: list[str]):
    """Stopped at step 2, between the log lines of steps 0 and 4: that of step 4 is the mean of all four steps."""
    workdir = workspace / "stopped"
    patch = after_step(1, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert execute(*arguments, f"--workdir={workdir}") == 130
    finally:
        patch.undo()
    assert checkpoint.steps_in(workdir / "checkpoints") == [2]
    meta = checkpoint.read_meta(workdir / "checkpoints" / "2")
    assert len(meta["since_log"]) == 2 and set(meta["since_log"][0]) == {
        "loss", "ce", "nll", "text_bytes", "tokens", "aux", "grad_norm", "param_norm"}  # fmt: skip
    with (workdir / "metrics.jsonl").open("a") as file:  # as if a kill had come after later rows, and within one
        file.write(json.dumps({"kind": "train", "step": 4, "loss": 0.0}) + '\n{"kind": "valid", "st')
    assert execute(*arguments, f"--workdir={workdir}") == 0
    same_arrays(workdir, finished)
    clock = ("time", "tokens_per_s", "mfu", "layers")
    assert rows(workdir, *clock) == rows(finished, *clock)
    assert [row["step"] for row in rows(workdir) if row["kind"] == "train"] == [4, 6]


def test_ctrl_c_in_the_last_step_begins_no_evaluation(
    finished: Path,
    workspace: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    workdir, validate = workspace / "last", Run.validate

    def interrupted(self: Run, state: Any, step: int) -> float:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return validate(self, state, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "validate", interrupted)
        assert execute(*arguments, f"--workdir={workdir}") == 130
    assert "stopped at step 6 of 6 (interrupted): the same command continues" in capsys.readouterr().err
    assert "final" not in {row["kind"] for row in rows(workdir)}
    assert execute(*arguments, f"--workdir={workdir}") == 0
    same_arrays(workdir, finished)
    assert rows(workdir, "time", "tokens_per_s", "mfu") == rows(finished, "time", "tokens_per_s", "mfu")


def test_rows_that_come_again_are_taken_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    kept = [{"kind": "train", "step": 2}, {"kind": "valid", "step": 4}, {"kind": "note"}]
    kinds = ("final", "tasks", "final_load")
    for rest, more in (
        ([{"kind": "train", "step": 6}, {"kind": "warning", "step": 5}], []),
        ([{"kind": "final_load", "step": 4}, {"kind": "tasks", "step": 4}], []),  # an evaluation that did not end
        ([], [{"kind": kind, "step": 3} for kind in reversed(kinds)]),
        ([], []),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in (*kept, *more, *rest)) + ('{"ki' if rest else ""))
        before = path.stat().st_mtime_ns
        writer = metrics.JsonlWriter(path)
        writer.forget_after(4)
        assert metrics.read_metrics(path) == [*kept, *more]
        assert rest or path.stat().st_mtime_ns == before
        writer.write({"kind": "new"})
        writer.close()
        assert path.read_text().splitlines()[-1] == '{"kind": "new"}'


def test_bytes_that_are_no_text_in_the_metrics_are_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n\xff\xfe{\n{"kind": "train", "step": 2}\n{"kind": "tr\xe2')
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 2]
    writer = metrics.JsonlWriter(path)
    writer.forget_after(1)
    writer.close()
    assert path.read_bytes() == b'{"kind": "train", "step": 1}\n'


def test_env_json_keeps_every_session(
    finished: Path, workspace: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
):
    workdir = shutil.copytree(finished, workspace / "moved" / "elsewhere")  # and it may move
    (first,) = env(workdir)["sessions"]
    # of the devices that are there, those of the mesh
    assert (env(workdir)["device_count"], jax.device_count()) == (1, 8)
    assert first["from_step"] == 0 and {"time", "host", "commit", "device", "versions", "command"} <= set(first)
    facts = session.environment_facts
    monkeypatch.setattr(session, "environment_facts", lambda: {**facts(), "device": "another", "commit": "c0ffee"})
    assert execute(*arguments, f"--workdir={workdir}") == 0
    assert env(workdir)["device"] == "another"
    before, now = env(workdir)["sessions"]
    assert before == first
    assert (now["device"], now["commit"], now["from_step"]) == ("another", "c0ffee", 6)
    older = {k: v for k, v in env(workdir).items() if k != "sessions"}  # as it was before there were sessions
    (workdir / "env.json").write_text(json.dumps(older))
    assert execute(*arguments, f"--workdir={workdir}") == 0
    assert [entry["device"] for entry in env(workdir)["sessions"]] == ["another", "another"]


def test_the_texts_may_move(finished: Path, workspace: Path, arguments: list[str], tmp_path: Path, begun: list[Run]):
    workdir = shutil.copytree(finished, tmp_path / "run")
    root = tmp_path / "root"
    for split in ("train", "valid", "test"):
        shutil.copytree(workspace / split, root / split)
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "config.json").write_text((workdir / "config.json").read_text().replace(str(workspace), "/gone"))
    assert execute(*arguments, f"--workdir={workdir}", f"--config.data.root={root}") == 130
    (run,) = begun
    assert run.corpus.hash == env(finished)["data"]["hash"] and int(run.start()[0].step) == 4


def test_compiled_programs_lie_in_the_data_cache_or_where_the_user_says(workspace: Path, tmp_path: Path):
    class Cached:
        cache_dir = tmp_path

    chosen = jax.config.values["jax_compilation_cache_dir"]
    session.keep_programs(Cached())
    assert jax.config.values["jax_compilation_cache_dir"] == chosen is not None
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        session.keep_programs(Cached())
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)
    assert not (workspace / ".jax_cache").exists()


# --- begun in vain ---------------------------------------------------------------------------------------------------


def test_a_run_that_made_nothing_gives_way_to_another_config(
    finished: Path, tmp_path: Path, arguments: list[str], begun: list[Run], capsys: pytest.CaptureFixture[str]
):
    """It begins anew, with its own facts and from what init_from means now."""
    source, workdir = shutil.copytree(finished, tmp_path / "source"), tmp_path / "run"
    command = [*arguments, f"--workdir={workdir}", "--config.train.steps=2"]
    assert execute(*command, f"--config.init_from={finished}") == 130
    assert {path.name for path in workdir.iterdir()} >= {"config.json", "env.json", "metrics.jsonl"}
    capsys.readouterr()
    other = [*command, f"--config.init_from={source}", "--config.train.learning_rate=0.5"]
    for note in (True, False):  # the second call is the same run
        assert execute(*other) == 130
        assert ("was begun with another config, which made nothing" in capsys.readouterr().err) == note
        assert begun[-1].origin == env(workdir)["init_from"] == checkpoint.origin(source)
    assert len(env(workdir)["sessions"]) == 2
    assert json.loads((workdir / "config.json").read_text())["train"]["learning_rate"] == 0.5


MADE: dict[str, Callable[[Path], Any]] = {
    "a row": lambda folder: (folder / "metrics.jsonl").write_text('{"kind": "failure", "step": 1}\n'),
    "part of a row": lambda folder: (folder / "metrics.jsonl").write_text('{"ki'),
    "half a checkpoint": lambda folder: (folder / "checkpoints" / "2.half").mkdir(parents=True),
    "results": lambda folder: (folder / "results.jsonl").write_text(""),
    "other seeds": lambda folder: (folder / "seeds" / "1").mkdir(parents=True),
    "the user's": lambda folder: (folder / "notes.txt").write_text("mine"),
}


@pytest.mark.parametrize("made", MADE)
def test_a_run_that_made_something_does_not(
    finished: Path, tmp_path: Path, arguments: list[str], made: str, capsys: pytest.CaptureFixture[str]
):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in session.BEGUN:
        shutil.copy(finished / name, workdir / name)
    MADE[made](workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert execute(*arguments, f"--workdir={workdir}", "--config.train.learning_rate=0.5") == 2
    assert "holds a run with another config: config.train.learning_rate was" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


# --- locks ----------------------------------------------------------------------------------------------------------


def test_a_lock_that_a_killed_process_left(tmp_path: Path):
    (tmp_path / session.LOCK).write_text("process 1 on nowhere since 2020\n")
    for _ in range(2):
        with session._alone(tmp_path):
            assert f"process {os.getpid()} on " in (tmp_path / session.LOCK).read_text()
            with (
                pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on .* use another --workdir"),
                session._alone(tmp_path),
            ):
                pass
        assert list(tmp_path.iterdir()) == []


# --- weights from elsewhere -----------------------------------------------------------------------------------------


def test_fine_tuning_from_a_folder(
    finished: Path, workspace: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    workdir = workspace / "tuned"
    arguments = [*arguments, f"--workdir={workdir}", f"--config.init_from={finished}", "--config.train.steps=2"]
    assert execute(*arguments, "--config.train.learning_rate=1e-30") == 0
    folder = checkpoint.locate(finished)
    expected = {"folder": str(folder), "step": int(folder.name), "weights": checkpoint.fingerprint(folder)}
    expected["config_hash"] = env(finished)["config_hash"]
    for place in (finished, finished / "checkpoints", folder):
        assert checkpoint.origin(place) == expected
    arrays, meta = checkpoint.read_all(workdir / "checkpoints" / "2")
    assert meta["init_from"] == env(workdir)["init_from"] == expected
    theirs, _ = checkpoint.read_all(folder)
    for name, array in theirs.items():
        if name.startswith("params/"):
            np.testing.assert_allclose(arrays[name], array, rtol=1e-5)
    again = [*arguments, "--config.train.learning_rate=1e-30"]
    assert "init_from: the checkpoint" not in capsys.readouterr().err
    assert execute(*again) == 0 and env(workdir)["init_from"] == expected
    assert "done before" in capsys.readouterr().err


def test_a_model_that_is_another_function_of_the_same_weights_is_told(
    finished: Path, workspace: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    """Once, each field with both values; what changes no function is not named, and nothing is refused."""
    there = json.loads((finished / "config.json").read_text())["model"]
    changes = {"moe.router.k": 1, "attention.rope_theta": 5e5, "remat": "block", "layer_loop": "unroll"}
    given = [f"--config.model.{name}={value}" for name, value in changes.items()]
    command = [
        *arguments, *given, f"--workdir={workspace / 'other'}", f"--config.init_from={finished}",
        "--config.train.steps=2",
    ]  # fmt: skip
    assert there["moe"]["router"]["k"] == 2 and execute(*command) == 0
    (line,) = (text for text in capsys.readouterr().err.splitlines() if "init_from: the checkpoint" in text)
    theta = f"with model.attention.rope_theta={there['attention']['rope_theta']}, here it is 500000.0"
    k = "with model.moe.router.k=2, here it is 1"
    assert line == f"note: init_from: the checkpoint was trained {theta}; {k}"
    assert execute(*command) == 0 and "init_from: the checkpoint" not in capsys.readouterr().err


def test_tasks_of_a_model_with_longrope_have_rows_of_its_original_length(
    workspace: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
):
    seen = []
    monkeypatch.setattr(experiments.run, "evaluate_tasks", lambda *args, **how: seen.append(how["short"]) or [])
    rope = {"scaling": "longrope", "original_length": 5, "short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4}
    given = [f"--config.model.attention.rope.{name}={value}" for name, value in rope.items()]
    command = [*arguments, f"--workdir={workspace / 'long'}", "--config.train.steps=2"]
    assert execute(*command, *given) == 0 and seen == [5]


def test_a_run_keeps_to_the_weights_that_it_began_from(
    finished: Path, tmp_path: Path, arguments: list[str], begun: list[Run], capsys: pytest.CaptureFixture[str]
):
    """What init_from means may change under way: the run there goes on, and another step becomes its best."""
    source, workdir = shutil.copytree(finished, tmp_path / "source"), tmp_path / "tuned"
    arguments = [*arguments, f"--workdir={workdir}", f"--config.init_from={source}", "--config.train.steps=2"]
    assert execute(*arguments) == 130  # before its first checkpoint
    assert "interrupted: what was finished is kept" in capsys.readouterr().err
    best = checkpoint.locate(source)
    assert env(workdir)["init_from"]["folder"] == str(best)
    shutil.copytree(source / "checkpoints" / "6", source / "checkpoints" / "7")
    content = json.loads((source / "checkpoints" / "7" / "checksums" / "checksums.json").read_text())
    content["record"]["score"] = 0.0
    content["crc32"] = checkpoint.checksums._of_record(content["record"])
    (source / "checkpoints" / "7" / "checksums" / "checksums.json").write_text(json.dumps(content))
    assert checkpoint.locate(source).name == "7"
    shutil.move(best, tmp_path / "away")
    assert execute(*arguments) == 2
    assert f"init_from: {best} is gone, and the run began from step {best.name}" in capsys.readouterr().err
    shutil.move(tmp_path / "away", best)
    assert execute(*arguments) == 130
    assert begun[-1].origin == env(workdir)["init_from"] and begun[-1].origin["folder"] == str(best)
    expected, _ = checkpoint.read_all(best)
    found = checkpoint.flatten({"params": begun[-1].start()[0].params})
    assert all(np.array_equal(array, expected[name]) for name, array in found.items()) and found


# --- a full disk ----------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_stops_the_training(
    finished: Path, workspace: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
):
    """The real writer fails from step 3 on; room is made, and the same command ends as if nothing had been."""
    workdir, before = workspace / "full", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(run: Run) -> None:
        assert run.checkpoints.steps() == [2]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    patch = after_step(2, fill)
    try:
        assert execute(*arguments, f"--workdir={workdir}") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        patch.undo()
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "the checkpoint of step 3 cannot be saved" in sentence and "File too large" in sentence
    assert "The last good checkpoint is that of step 2" in sentence and "from step 2" in sentence
    assert store.steps_in(workdir / "checkpoints") == [2]
    checkpoint.read_all(workdir / "checkpoints" / "2")
    assert execute(*arguments, f"--workdir={workdir}") == 0
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())
    same_arrays(workdir, finished)


def test_a_disk_without_room_is_told_before_the_training(
    workspace: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    usage = shutil.disk_usage(workspace)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert execute(*arguments, f"--workdir={workspace / 'small'}") == 2
    said = capsys.readouterr().err
    assert "error: no checkpoint can be saved in" in said and "1,000 bytes (1.0 kB) were free" in said
    assert "There is no checkpoint yet" in said and "compiling" not in said


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EFBIG, "a file may not become")],
)
def test_a_full_disk_elsewhere_is_one_sentence(number: int, said: str, capsys: pytest.CaptureFixture[str]):
    def fails() -> int:
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    assert session.guarded(fails) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and "(metrics.jsonl): what was finished is kept" in error
    with pytest.raises(OSError):  # a mistake of ours is not hidden
        session.guarded(lambda: os.stat("/nowhere").st_size)
