"""``experiments.sweep``: its points are checked and named before anything runs; runs fail, stop, resume and are
skipped; the table is the mean and t interval over seeds. Most runs here are a fake command that takes milliseconds."""

import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.sweeps import combine, rate_and_k
from experiments import run, session, sweep, sweep_points
from experiments.sweep_runs import Ledger, Signals, last_step, only_one
from moejax.report import build_report
from moejax.results import append_rows, read_rows
from moejax.verdicts import SeedDifferences
from tests.small import write_workspace

ROOT = Path(__file__).resolve().parent.parent

FAKE = '''
"""Stands for experiments.run: notes that it was called, and writes one results row unless told to do otherwise."""
import json, os, pathlib, signal, sys, time

flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as file:
    file.write(workdir.name + "\\n")
behaviour = here / "behaviour" / workdir.name.rpartition("-")[0]
what = behaviour.read_text() if behaviour.exists() else ""
workdir.mkdir(exist_ok=True)
(workdir / "config.json").write_text("{}")
if what == "fail":
    print("error: a rule was broken.\\nWay out: mend it.", file=sys.stderr)
    sys.exit(2)
if what == "crash":
    raise RuntimeError("boom")
if what == "stop" and not (workdir / "checkpoint").exists():
    def save(*_):
        (workdir / "checkpoint").write_text("")
        print("saved", flush=True)
        sys.exit(130)
    signal.signal(signal.SIGTERM, save)
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what in ("stop", "deaf") and not (workdir / "checkpoint").exists():
    (here / "ready").write_text("")
    while True:
        time.sleep(0.02)
if what.startswith("meet"):  # goes on when as many runs are here
    (here / f"met-{workdir.name}").write_text("")
    while len(list(here.glob("met-*"))) < int(what[4:]):
        time.sleep(0.02)
seed, k = int(flags.get("config.train.seed", 0)), int(flags.get("config.model.moe.router.k", 2))
shared = {"kind": "value", "paper": "training", "table": "final", "row": "small", "config": "small",
          "time": "2026-01-01T00:00:00+00:00", "commit": "c" * 40, "device": "cpu", "device_count": 1}
values = {"bits_per_byte/a": ("bits per byte", k + 0.1 * seed), "bits_per_byte/b": ("bits per byte", k + 1.0),
          "tokens_per_s": ("tokens/s", 1000.0 * k)}
with (workdir / "results.jsonl").open("w") as file:
    for metric, (unit, value) in values.items():
        row = {**shared, "metric": metric, "unit": unit, "value": value, "values_by_seed": {str(seed): value}}
        file.write(json.dumps(row) + "\\n")
'''


class Bench:
    """A folder with a config, a sweep file, the fake command, and what it noted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workdir = folder, folder / "out"
        self.config = write_workspace(folder)
        (folder / "behaviour").mkdir()
        (folder / "fake.py").write_text(FAKE)

    def points(self, text: str) -> Path:
        path = self.folder / "sweep_of_k.py"
        path.write_text(
            f"from configs.sweeps.combine import grid, product, seeds, together\n\ndef sweep():\n    {text}\n"
        )
        return path

    def behave(self, name: str, how: str) -> None:
        (self.folder / "behaviour" / name).write_text(how)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return [line.rpartition("-")[0] for line in path.read_text().split()] if path.exists() else []

    def arguments(self, *more: str) -> list[str]:
        return [f"--config={self.config}:plain", f"--sweep={self.folder / 'sweep_of_k.py'}",
                f"--workdir={self.workdir}", *more]  # fmt: skip

    def __call__(self, *more: str) -> int:
        return session.call(sweep.define_flags, sweep.command, self.arguments(*more))

    def statuses(self) -> dict[str, str]:
        runs = json.loads((self.workdir / "sweep.json").read_text())["runs"]
        return {name.rpartition("-")[0]: entry["status"] for name, entry in runs.items()}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, "-S", str(tmp_path / "fake.py")))
    return Bench(tmp_path)


# --- points -----------------------------------------------------------------------------------------------------------


def test_points_combine():
    assert list(combine.grid({"a": (1, 2), "b": "xy"})) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert list(combine.together({"a": (1, 2), "b": (3, 4)})) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert list(combine.product([{"a": 1}], [{"b": 2}, {"b": 3}])) == [{"a": 1, "b": 2}, {"a": 1, "b": 3}]
    assert [p["train.seed"] for p in combine.seeds([{"a": 1}])] == [0, 1, 2]
    assert list(combine.seeds([{}], (7,))) == [{"train.seed": 7}]
    with pytest.raises(ValueError, match=r"'a': 1, 'b': 2.*same number"):
        list(combine.together({"a": (1,), "b": (3, 4)}))
    with pytest.raises(ValueError, match=r"train\.seed is set by two"):
        list(combine.seeds(combine.seeds([{}])))


def read(bench: Bench, text: str) -> list[sweep_points.Point]:
    return sweep_points.read_points(bench.points(text), f"{bench.config}:plain", {})


def test_names_are_readable_and_depend_on_the_point_alone(bench: Bench):
    few = read(bench, "yield {'train.learning_rate': 1, 'model.moe.router.k': 1}")
    many = read(bench, "yield from grid({'model.moe.router.k': (1, 2), 'train.learning_rate': (1.0, 1e-4)})")
    assert few[0].name == many[0].name and few[0].name.startswith("k=1,learning_rate=1-")
    assert few[0].config.train.learning_rate == 1.0 and few[0].overrides["train.learning_rate"] == 1.0
    assert len({point.name for point in many}) == 4
    odd = read(bench, "yield {'data.document_marker': '<| /../ |>' + 200 * 'x'}")[0]
    assert "/" not in odd.name and len(odd.name) < 120
    (base,) = read(bench, "yield {}")
    assert base.label == "base" and base.name.startswith("base-")


def test_labels_leave_out_the_seed_and_name_fields_unmistakably(bench: Bench):
    (point,) = read(bench, "yield {'train.batch_size': 16, 'model.moe.router.k': 1, 'train.seed': 3}")
    assert point.label == "k=1, train.batch_size=16" and point.seed == 3
    assert sweep_points.short_name("model.moe.router.k") == "k"
    assert sweep_points.short_name("train.seed") == "train.seed"  # data.seed is another


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "yield {'train.learning_ratee': 1.0}",
            r"point 1.*train.learning_ratee: unknown field; did you mean 'learning_r",
        ),
        ("yield {'trian.seed': 1}", "trian: unknown field; did you mean 'train'"),
        ("yield {'train.steps': 2.5}", "config.train.steps=2.5: expected int, got float"),
        ("yield {'train.steps': True}", "config.train.steps=True: expected int, got bool"),
        ("yield {'model.compute_dtype': 'float16'}", "choose one of 'float32', 'bfloat16'"),
        ("yield {'model.moe.router.k': 99}", "k=99"),
        ("yield {'train.steps.x': 1}", "train.steps is a field, not a group"),
        ("yield {'train': {'steps': 1}}", "train is a group of fields: set each by its full name, e.g. 'train.steps'"),
        ("yield {'model.moe.losses': {'z': 0.1}}", "e.g. 'model.moe.losses.z'"),
        ("yield {'model.moe.losses.importance': 0.1}", "has no field 'importance'"),
        ("yield {}; yield {'train.seed': 1}; yield {'train.seed': 1}", "points 2 and 3.*are the same config"),
        ("yield {}; yield {'train.seed': 0}", "points 1 and 2.*are the same config"),
        ("yield {'table.seeds': (0, 1), 'train.seed': 1}", "train.seed has no effect, as table.seeds=.*trains those"),
        ("yield {'table.name': 'capacity_awar'}", "no module experiments/papers/capacity_awar.py"),
        ("yield {'table.name': 'capacity_aware'}", "table.arms=.*: name at least one"),
        ("yield 3", "expected a dict from field names to values"),
        ("return ()", "yields no point"),
        ("yield {'a': 1 / 0}", r"sweep\(\) failed: line 4: ZeroDivisionError"),
        ("yield from together({'a': (1,), 'b': ()})", "sweep.. failed: line 4: ValueError: together"),
        ("yield {'train.seed': 1}\ndef sweep(:", "cannot be loaded: line 5: SyntaxError"),
        ("pass\nsweep = 3", r"has no function sweep\(\)"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    bench: Bench, text: str, said: str, capsys: pytest.CaptureFixture[str]
):
    bench.points(text)
    assert bench() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and re.search(said, err), err
    assert not bench.workdir.exists() and bench.calls() == []


def test_flags_are_checked(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.points("yield {'train.steps': 3}")
    for arguments, said in [
        (["--config.train.steps=4"], "train.steps is on the command line too"),
        (["--config.train.stepz=4"], "the config has no field 'stepz'"),
        (["--only=nothing"], "--only='nothing': no such point; there are ['steps=3']"),
        (["--sweep=nowhere.py"], "no such file"),
        (["--table_only"], "holds no sweep"),
        (["--jobs=0"], "jobs"),
    ]:
        assert bench(*arguments) == 2
        assert said in capsys.readouterr().err, said
    assert session.call(sweep.define_flags, sweep.command, []) == 2
    assert "--config is missing" in capsys.readouterr().err
    assert not bench.workdir.exists()


def test_a_dry_run_lists_the_points(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.points("yield from grid({'model.moe.router.k': (1, 2)})")
    assert bench("--dry_run", "--only=k=1") == 0
    said = capsys.readouterr().out
    assert "--config.model.moe.router.k=1\n" in said and "1 of 2 points would run; all 2 are valid" in said
    assert not bench.workdir.exists()


def test_what_the_command_line_sets_holds_for_every_point(bench: Bench):
    bench.points("yield from grid({'model.moe.router.k': (1, 2)})")
    domains = {"mine": {"test": "test/a.txt", "train": "train/a.txt", "valid": "valid/a.txt"}}
    more = [f"--config.data.domains={json.dumps(domains)}", "--config.eval.tasks=('a', 'b')", "--config.name=of mine"]
    assert bench(*more) == 0
    (first,) = (bench.workdir / "logs").glob("k=1-*.log")
    typed = shlex.split(first.read_text().splitlines()[0])
    for flag in more:
        assert flag in typed


def test_the_example_is_a_sweep():
    points = sweep_points.read_points(Path(str(rate_and_k.__file__)), "configs/quickstart.py:short", {})
    assert len(points) == 15 and len({point.label for point in points}) == 5


# --- runs -------------------------------------------------------------------------------------------------------------


def test_runs_make_a_table_with_intervals_and_are_not_run_again(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.points("yield from seeds(grid({'model.moe.router.k': (1, 2)})); yield {'train.steps': 3}")
    assert bench() == 0
    out, err = capsys.readouterr()
    assert len(bench.calls()) == 7 and set(bench.statuses().values()) == {"finished"}
    assert "7 points: 0 finished" in err and "[7/7] steps=3" in err and "7 of 7 points finished" in out
    rows = {(row.row, row.metric): row for row in read_rows(bench.workdir / "results.jsonl")}
    row = rows["k=1", "bits_per_byte/mean"]
    expected = SeedDifferences([1.5, 1.55, 1.6])  # domains are 1 + seed / 10 and 2
    assert row.value == pytest.approx(1.55) and row.interval == pytest.approx(expected.interval())
    assert row.values_by_seed == pytest.approx({0: 1.5, 1: 1.55, 2: 1.6})
    assert (row.paper, row.table, row.extra["x"], row.extra["x_name"]) == ("sweep", "sweep_of_k", 1, "k")
    assert (
        row.command.endswith(" --only=k=1") and "--sweep=" in row.command and row.interval_kind.endswith("over seeds")
    )
    alone = rows["steps=3", "bits_per_byte/mean"]
    assert alone.interval is None and alone.extra["seeds_finished"] == 1
    half = (expected.interval()[1] - expected.interval()[0]) / 2
    assert f"* 1.5500 ± {half:.4f}" in out and f"2.5500 ± {half:.4f}" in out and "3/3" in out and "1/1" in out
    lines = list(csv.DictReader((bench.workdir / "sweep.csv").open()))
    assert len(lines) == 3 * 4 and lines[0]["model.moe.router.k"] == "1" and lines[-1]["train.steps"] == "3"
    assert float(lines[0]["low"]) == pytest.approx(expected.interval()[0])
    log = next((bench.workdir / "logs").glob("k=1,seed=0-*.log")).read_text()
    assert log.startswith(f"$ {sys.executable} -S") and "--config.model.moe.router.k=1" in log

    files = [bench.workdir / name for name in ("results.jsonl", "sweep.csv")]
    before = [file.read_bytes() for file in files]
    assert bench() == 0 and bench("--table_only", "--metric=bits_per_byte/[ab]") == 0
    assert len(bench.calls()) == 7 and [file.read_bytes() for file in files] == before
    assert "bits_per_byte/a" in capsys.readouterr().out
    files[1].unlink()
    assert bench("--table_only", "--metric=accuracy") == 2 and files[1].read_bytes() == before[1]
    assert "there are bits_per_byte/mean, bits_per_byte/a" in capsys.readouterr().err


def test_a_failing_run_costs_itself_only(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.points("yield from grid({'model.moe.router.k': (1, 2, 3)})")
    bench.behave("k=1", "fail")
    bench.behave("k=2", "crash")
    assert bench() == 1
    out, err = capsys.readouterr()
    assert bench.statuses() == {"k=1": "failed", "k=2": "failed", "k=3": "finished"}
    assert "FAILED (exit code 2)" in err and "    error: a rule was broken.\n    Way out: mend it." in err
    assert "    RuntimeError: boom" in err and "2 of 3 points failed: --retry_failed" in err
    assert "1 of 3 points finished" in out
    assert bench() == 1 and len(bench.calls()) == 3
    assert "failed: k=1-" in capsys.readouterr().err
    bench.behave("k=1", "")
    assert bench("--retry_failed") == 1 and bench.calls()[3:] == ["k=1", "k=2"]
    text = Path(build_report([bench.workdir])).read_text()
    assert "2 of 3 points finished, 1 failed" in text and "RuntimeError: boom" in text
    assert bench.statuses()["k=1"] == "finished"


def test_points_may_be_added_and_a_changed_config_is_run_again(bench: Bench):
    bench.points("yield from grid({'model.moe.router.k': (1, 2)})")
    assert bench("--only=k=2") == 0 and bench.calls() == ["k=2"]
    assert bench() == 0
    bench.points("yield from grid({'train.seed': (0, 5), 'model.moe.router.k': (3, 2, 1)})")
    assert bench() == 0
    # k=1 and k=2 without a seed are other points than with the config's own seed
    bench.points("yield from grid({'model.moe.router.k': (3, 2, 1)})")
    assert bench() == 0 and bench.calls()[8:] == ["k=3"]
    assert bench("--config.eval.batch_size=16") == 0 and bench.calls()[9:] == ["k=3", "k=2", "k=1"]


def after(ready: Path, *actions: Callable[[], None]) -> threading.Thread:
    """Does the actions once the file is there."""

    def act() -> None:
        while not ready.exists():
            time.sleep(0.02)
        for action in actions:
            action()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_the_run_cleanly_and_the_same_command_continues(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.points("yield from grid({'model.moe.router.k': (1, 2)})")
    bench.behave("k=1", "stop")
    thread = after(bench.folder / "ready", interrupt)
    assert bench() == 130
    thread.join()
    err = capsys.readouterr().err
    assert "stopping: k=1-" in err and "stopped: the same command continues" in err
    assert bench.statuses() == {"k=1": "stopped"} and bench.calls() == ["k=1"]
    (folder,) = bench.workdir.glob("k=1-*")
    assert (folder / "checkpoint").exists()
    assert bench() == 0 and bench.calls() == ["k=1", "k=1", "k=2"]


def test_a_second_ctrl_c_ends_at_once(bench: Bench):
    bench.points("yield from grid({'model.moe.router.k': (1, 2)})")
    bench.behave("k=1", "deaf")

    def again() -> None:
        log = bench.folder / "log"
        log.write_text("")
        time.sleep(0.5)  # two signals at one moment would count as one
        interrupt()

    thread = after(bench.folder / "ready", interrupt, again)
    assert bench() == 130
    thread.join()
    assert bench.statuses() == {"k=1": "stopped"} and bench.calls() == ["k=1"]
    with only_one(bench.workdir):  # nothing of it is left, or its lock would be
        pass


def test_a_terminal_that_closes_counts_once_and_takes_no_output_with_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started these tests may have it ignored
    ours, terminal = os.openpty()
    with Signals() as signals:
        signals._terminals = [terminal]
        os.close(ours)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.count == 1
        assert os.write(terminal, b"what a closed terminal would refuse") == 35
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.count == 2
    os.close(terminal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.count == 0
    signal.signal(signal.SIGHUP, before)


def test_rows_of_another_config_are_not_those_of_the_point(bench: Bench):
    bench.points("yield {}")
    assert bench() == 0
    (file,) = bench.workdir.glob("base-*/results.jsonl")
    (stored, *_) = read_rows(file)
    old = {"config_hash": "old", "time": "2025-01-01T00:00:00+00:00"}
    append_rows(file, [dataclasses.replace(stored, metric="acc/gone", unit="share", id="", **old)])
    assert bench("--table_only") == 0
    assert {row.metric for row in read_rows(bench.workdir / "results.jsonl")} == {
        "bits_per_byte/mean", "bits_per_byte/a", "bits_per_byte/b", "tokens_per_s",
    }  # fmt: skip


def test_rows_of_a_paper_s_table_are_lines_of_their_own(bench: Bench):
    bench.points("yield from grid({'model.moe.router.k': (1, 2)})")
    assert bench() == 0
    for file in bench.workdir.glob("k=*/results.jsonl"):
        (stored, *_) = read_rows(file)
        made = {"paper": "capacity_aware", "table": "1", "metric": "bits_per_byte/mean", "id": ""}
        append_rows(file, [dataclasses.replace(stored, row=name, **made) for name in ("no limit", "score 1.0")])
    assert bench("--table_only") == 0
    rows = [row for row in read_rows(bench.workdir / "results.jsonl") if row.metric == "bits_per_byte/mean"]
    assert {(row.row, row.extra["arm"], row.extra["x"]) for row in rows} == {
        (f"k={k}{of}", f"k{of}", k) for k in (1, 2) for of in ("", ": no limit", ": score 1.0")
    }


def test_several_jobs_run_beside_each_other(bench: Bench):
    bench.points("yield from grid({'model.moe.router.k': (1, 2, 3)})")
    for k in (1, 2, 3):
        bench.behave(f"k={k}", "meet3")
    assert bench("--jobs=3") == 0  # each waits for the two others
    assert sorted(bench.calls()) == ["k=1", "k=2", "k=3"]


def test_one_sweep_at_a_time(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.points("yield {}")
    with only_one(bench.workdir) as lock:
        left = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
        assert bench() == 2
        assert "another sweep, or a run that one left behind, works here" in capsys.readouterr().err
    assert bench() == 2  # that run outlived its sweep
    left.communicate(b"\n")
    assert bench() == 0


def test_folders_that_cannot_be_used(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.points("yield {}")
    assert bench() == 0
    ledger = bench.workdir / "sweep.json"
    ledger.write_text(ledger.read_text()[:40])
    assert bench() == 2
    assert "sweep.json is damaged" in capsys.readouterr().err
    ledger.unlink()
    with (bench.workdir / "results.jsonl").open("a") as file:
        file.write('{"kind"')
    assert bench() == 2
    out, err = capsys.readouterr()
    assert "1 of 1 points finished" in out and "the last line is cut off" in err
    (bench.workdir / "config.json").write_text("{}")
    assert bench() == 2
    assert "holds a single run" in capsys.readouterr().err
    (bench.folder / "file").write_text("")
    assert bench(f"--workdir={bench.folder / 'file'}") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_deleted_folder_is_run_again(bench: Bench):
    points = read(bench, "yield {}")
    assert bench() == 0
    ledger = Ledger(bench.workdir, points, {})
    assert ledger.status(points[0]) == "finished"
    (bench.workdir / points[0].name / "config.json").unlink()
    assert ledger.status(points[0]) == "waiting"


def test_a_row_of_the_sweep_is_measured_again(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.points("yield from seeds(grid({'model.moe.router.k': (1, 2)}))")
    assert bench() == 0
    rows = read_rows(bench.workdir / "results.jsonl")
    row = next(row for row in rows if (row.row, row.metric) == ("k=2", "bits_per_byte/mean"))
    capsys.readouterr()
    arguments = [f"--row={row.id}", f"--results={bench.workdir}", f"--workdir={bench.folder / 'again'}"]
    assert session.call(run.define_flags, run.command, arguments) == 0
    assert "equal to the last digit" in capsys.readouterr().out
    assert bench.calls()[6:] == [f"k=2,seed={seed}" for seed in range(3)]


def test_the_step_under_way(tmp_path: Path):
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 10}\n{"kind": "train", "step": 20}\n{"kind": "tr'
    )
    assert last_step(tmp_path) == 20
