"""``experiments.run`` from flags to report, in this process; and each mistake as one readable sentence."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import pytest
from absl import flags

from experiments import capacity_settings, run, session
from experiments.training_rows import training_rows
from moejax import checkpoint, metrics
from moejax.config import ExperimentConfig, from_mapping, to_dict
from moejax.data import load_corpus
from moejax.loop import Outcome, Run
from moejax.progress import TrainProgress
from moejax.report import build_report
from moejax.results import ResultRow, read_rows, to_line
from tests.small import execute, flat, load_plain, quick_compilation

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("order", "reverse", "random", "score")
VALUES = ["no limit", *(f"{arm}, factor {factor}" for factor in ("1", "0.5") for arm in ARMS)]
CONTRASTS = [
    f"{a} beats {b} at factor {factor}"
    for factor in ("1", "0.5")
    for a, b in (("score", "random"), ("random", "order"), ("random", "reverse"))
]


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the command itself keeps its programs
    with quick_compilation():
        yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def finished(workspace: Path) -> Path:
    """The workdir of a run with its table that nothing disturbed."""
    workdir = workspace / "finished"
    assert execute(f"--config={workspace / 'small_config.py'}", f"--workdir={workdir}") == 0
    return workdir


@pytest.fixture
def command(workspace: Path) -> list[str]:
    return [f"--config={workspace / 'small_config.py'}"]


def lines(workdir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in metrics.read_metrics(workdir / "metrics.jsonl") if row["kind"] == kind]


def arrays(workdir: Path) -> dict[str, Any]:
    """All arrays of the last checkpoint."""
    model, config, meta = checkpoint.load_model(workdir / "checkpoints" / "6")
    assert meta["step"] == 6 and config.train.steps == 6
    return flat(model)


QUESTIONS = [
    {"context": f"the {word} of", "choices": ["and to in", "is that for"], "gold": i % 2}
    for i, word in enumerate(("as", "was", "with", "be"))
]


def write_task(path: Path, questions: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


# --- what a run leaves behind -------------------------------------------------------------------------------------


def test_files_of_a_workdir(finished: Path):
    present = {path.name for path in finished.iterdir()}
    assert present == {"config.json", "env.json", "metrics.jsonl", "results.jsonl", "checkpoints"}
    config = from_mapping(ExperimentConfig, json.loads((finished / "config.json").read_text()))
    assert config.name == "small:table" and config.model.vocab_size == 320  # as it was resolved
    env = json.loads((finished / "env.json").read_text())
    assert {"command", "commit", "dirty", "device", "device_count", "versions", "config_hash"} <= set(env)
    assert env["data"]["tokenizer"] == "byte" and set(env["data"]["stats"]) == {"a", "b"}
    assert env["parameters"]["active"] < env["parameters"]["total"]
    assert env["grouped_matmul"]["implementation"]
    assert env["data"]["epochs"]["a"] > 0


def test_final_evaluation_stands_beside_n_grams(finished: Path):
    (final,) = lines(finished, "final")
    assert final["step"] == 6 and final["split"] == "test"
    assert set(final["bits_per_byte"]) == set(final["perplexity"]) == {"a", "b"}
    assert set(final["ngram"]) == {"3", "6"} and all(set(by) == {"a", "b"} for by in final["ngram"].values())


def test_rows_of_the_table(finished: Path):
    rows = [row for row in read_rows(finished / "results.jsonl") if row.paper == "capacity_aware"]
    assert [row.row for row in rows] == [*VALUES, *CONTRASTS]
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert (row.paper, row.table, row.metric, row.unit) == ("capacity_aware", "1", "bits_per_byte", "bits per byte")
        assert row.batch_shape == (8, 32) and row.scale == "custom"
        for field in ("config_hash", "data_hash", "checkpoint_hash", "command", "device", "versions", "time"):
            assert getattr(row, field), f"{row.row}: {field}"
        assert (row.device_count, jax.device_count()) == (1, 8)  # of the mesh, not of the machine
        assert len(row.values_by_seed) == 1 and row.value == pytest.approx(row.values_by_seed[0])


def test_rows_of_the_training(finished: Path):
    rows = {row.metric: row for row in read_rows(finished / "results.jsonl") if row.paper == "training"}
    assert {"bits_per_byte/a", "bits_per_byte/b", "tokens_per_s", "mfu"} <= set(rows)
    (final,) = lines(finished, "final")
    for domain in ("a", "b"):
        row = rows[f"bits_per_byte/{domain}"]
        assert row.value == final["bits_per_byte"][domain]
        assert row.extra["byte_3_gram"] == final["ngram"]["3"][domain] and row.extra["split"] == "test"
    assert rows["tokens_per_s"].extra["tokens"] == 6 * 8 * 32


def test_rows_keep_the_place_where_they_were_measured(
    finished: Path, workspace: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
):
    """A finished workdir that is run again on another machine measures nothing, so its rows stay as they are."""
    workdir = shutil.copytree(finished, workspace / "elsewhere")
    facts = session.environment_facts
    monkeypatch.setattr(session, "environment_facts", lambda: {**facts(), "device": "another"})
    for change in ([], ["--config.table.name="]):
        assert execute(*command, f"--workdir={workdir}", *change) == 0
    assert (workdir / "results.jsonl").read_bytes() == (finished / "results.jsonl").read_bytes()


@pytest.mark.parametrize("change", [[], ["--config.table.name="]])
def test_a_lost_row_of_the_training_is_made_again(
    finished: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str]
):
    """What the advice for a broken line promises, on another machine and with another table too."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    file = workdir / "results.jsonl"
    rows = read_rows(file)
    lost = {"mfu", "bits_per_byte/a"}
    file.write_text("".join(to_line(row) + "\n" for row in rows if row.metric not in lost))
    facts = session.environment_facts
    monkeypatch.setattr(session, "environment_facts", lambda: {**facts(), "device": "another"})
    assert execute(*command, f"--workdir={workdir}", *change) == 0
    found = {row.id: row for row in read_rows(file)}
    assert found.keys() == {row.id for row in rows}
    for row in rows:
        assert dataclasses.replace(found[row.id], time=row.time) == row


def test_rows_of_an_evaluation_that_was_stopped_before_they_were_written(
    finished: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They are added by the next call, under the config of that evaluation, beside those of the one before."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    file, before = workdir / "results.jsonl", read_rows(finished / "results.jsonl")
    quiz = write_task(tmp_path / "quiz.jsonl", QUESTIONS)
    command = [*command, f"--workdir={workdir}", f"--config.eval.tasks=('{quiz}',)", "--config.table.name="]

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "append_rows", stopped)
        assert execute(*command) == 130
    asked = json.loads((workdir / "env.json").read_text())["config_hash"]
    assert read_rows(file) == before and asked not in {row.config_hash for row in before}
    assert execute(*command, "--config.watch.dead_experts=2", "--config.mesh.data=2") == 0
    new = [row for row in read_rows(file) if row not in before]
    assert {row.config_hash for row in new} == {asked}
    assert {row.metric for row in new} > {row.metric for row in before if row.paper == "training"} | {"acc/quiz"}


def by_name(workdir: Path) -> dict[str, ResultRow]:
    return {row.row: row for row in read_rows(workdir / "results.jsonl") if row.paper == "capacity_aware"}


def test_arms_are_measured_and_dropped_shares_counted(finished: Path):
    rows = by_name(finished)
    base = rows["no limit"]
    assert base.published == 64.0 and base.extra["dropped_share"] == 0.0 and base.baseline_row == ""
    assert rows["score, factor 1"].published == 61.1 and rows["score, factor 0.5"].published is None
    for name in VALUES[1:]:
        row = rows[name]
        assert row.baseline_row == "no limit" and row.value is not None
        assert row.extra["x"] == float(name.rpartition(" ")[2]) and row.extra["arm"] == name.partition(",")[0]
        assert row.exercised_share == row.extra["dropped_share"] > 0
        domains = [row.extra[f"bits_per_byte/{domain}"] for domain in ("a", "b")]
        assert row.value == pytest.approx(sum(domains) / 2)
    for factor in ("1", "0.5"):  # every order drops the same number of pairs in the first layer, nearly so after it
        shares = [rows[f"{arm}, factor {factor}"].extra["dropped_share"] for arm in ARMS]
        assert max(shares) - min(shares) < 0.05
    assert rows["score, factor 0.5"].extra["dropped_share"] >= 0.5  # at factor 1/2 at most half of the pairs stay
    assert len({rows[name].value for name in VALUES}) == len(VALUES)


def test_contrasts_are_stated_before_and_judged_after(finished: Path):
    config = from_mapping(ExperimentConfig, json.loads((finished / "config.json").read_text()))
    stated = capacity_settings.contrasts("1", config)
    assert [c.name for c in stated] == CONTRASTS
    assert [c.primary for c in stated] == [True] * 3 + [False] * 3
    rows = by_name(finished)
    for contrast in stated:
        row = rows[contrast.name]
        a, b = rows[contrast.arm_a], rows[contrast.arm_b]
        assert row.kind == "contrast" and row.sign == "a < b" and row.margin == 0.005
        assert row.difference == pytest.approx(a.value - b.value)
        assert row.verdict and (row.verdict.endswith("(one model)") or row.verdict_note)


def test_the_report_is_built_from_the_workdir(finished: Path, tmp_path: Path):
    text = Path(build_report([finished], tmp_path / "report.html")).read_text(encoding="utf-8")
    for name in ["small:table", *VALUES, *CONTRASTS]:
        assert name in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']https?:", text)


# --- again, and later ---------------------------------------------------------------------------------------------


def test_a_finished_workdir_is_skipped(finished: Path, command: list[str], capsys: pytest.CaptureFixture[str]):
    names = ("metrics.jsonl", "results.jsonl", "config.json")
    before = [(finished / name).read_bytes() for name in names]
    begin = time.monotonic()
    assert execute(*command, f"--workdir={finished}") == 0
    assert time.monotonic() - begin < 15
    assert [(finished / name).read_bytes() for name in names] == before
    said = capsys.readouterr().err
    assert "evaluation of step 6: done before" in said and "table capacity_aware 1: done before" in said
    assert "step 1/" not in said


def test_an_evaluation_of_something_else_is_made_anew(
    finished: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Another content of a task file, another batch: what was done before was not asked for."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    quiz = write_task(tmp_path / "quiz.jsonl", QUESTIONS)
    command = [*command, f"--workdir={workdir}", "--config.table.name=", f"--config.eval.tasks=('{quiz}',)"]

    def scored(*change: str) -> int:
        """How many evaluations the call makes."""
        before = len(lines(workdir, "final"))
        assert execute(*command, *change) == 0
        made = len(lines(workdir, "final")) - before
        assert ("evaluation of step 6: done before" in capsys.readouterr().err) == (not made)
        return made

    def newest(metric: str) -> ResultRow:
        return [row for row in read_rows(workdir / "results.jsonl") if row.metric == metric][-1]

    assert [scored(), scored()] == [1, 0]
    assert newest("acc/quiz").extra["n"] == 4
    write_task(quiz, QUESTIONS[:3])
    assert [scored(), scored()] == [1, 0]
    assert newest("acc/quiz").extra["n"] == 3
    assert newest("acc/quiz").batch_shape == newest("bits_per_byte/a").batch_shape == (8, 32)
    assert [scored("--config.eval.batch_size=4"), scored("--config.eval.batch_size=4")] == [1, 0]
    assert newest("acc/quiz").batch_shape == newest("bits_per_byte/a").batch_shape == (4, 32)
    assert newest("tokens_per_s").batch_shape == newest("mfu").batch_shape == (8, 32)
    rows = metrics.read_metrics(workdir / "metrics.jsonl")  # as older code wrote them
    for name in ("batch_size", "task_hashes"):
        del rows[-1]["asked"][name]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scored("--config.eval.batch_size=4") == 1


def test_a_run_under_a_limit(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Its rows say what the limit touched, and its scores are of one batch size."""
    workdir = workspace / "limited"
    command = [f"--config={workspace / 'small_config.py'}:plain", f"--workdir={workdir}", "--config.eval.batch_size=4"]
    command += ["--config.model.moe.capacity_factor=1.0", "--config.train.steps=2"]
    assert execute(*command) == 0
    rows = {row.metric: row for row in read_rows(workdir / "results.jsonl")}
    (load,) = lines(workdir, "final_load")
    for domain in ("a", "b"):
        row = rows[f"bits_per_byte/{domain}"]
        dropped = load["by_domain"][domain]["dropped_share"]  # of each layer, which all have as many pairs
        assert row.exercised_share == pytest.approx(sum(dropped) / len(dropped)) and row.exercised_share > 0
        assert row.batch_shape == (4, 32)
    assert rows["tokens_per_s"].batch_shape == (8, 32) and rows["tokens_per_s"].exercised_share is None
    capsys.readouterr()
    assert execute(*command, "--config.eval.batch_size=8") == 2
    assert "holds a run with another config: config.eval.batch_size was 4, is 8. Use" in capsys.readouterr().err
    assert execute(*command, "--config.eval.final_max_tokens=256") == 0  # what no validation depends on


@pytest.mark.slow  # test_soak.py kills the same command at 20 points
def test_an_interrupted_run_continues_to_the_same_parameters(
    workspace: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    workdir = workspace / "interrupted"
    command = [f"--config={workspace / 'small_config.py'}", f"--workdir={workdir}", "--config.table.name="]
    note = TrainProgress.note

    def interrupting(self: TrainProgress, text: str) -> None:
        note(self, text)
        if text.startswith("compiled"):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainProgress, "note", interrupting)
        assert execute(*command) == 130
    assert "stopped at step 1 of 6 (interrupted): the same command continues" in capsys.readouterr().err
    assert not (workdir / "results.jsonl").exists() and not lines(workdir, "final")
    assert execute(*command) == 0
    assert "resuming at step 1" in capsys.readouterr().err
    chex.assert_trees_all_equal(arrays(workdir), arrays(finished))
    (final,), (expected,) = lines(workdir, "final"), lines(finished, "final")
    assert final["bits_per_byte"] == expected["bits_per_byte"]


def test_max_seconds_ends_well(
    workspace: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = []

    def train(self: Run, *, max_seconds: float) -> Outcome:
        asked.append(max_seconds)
        return Outcome(4, False, "time")

    monkeypatch.setattr(Run, "train", train)
    assert execute(*command, f"--workdir={workspace / 'timed'}", "--max_seconds=50") == 0
    assert 0 < asked[0] <= 50  # what is left after the data was read
    assert "stopped at step 4 of 6 (time): the same command continues" in capsys.readouterr().err


@pytest.mark.slow
def test_seeds_make_intervals(workspace: Path, finished: Path, command: list[str], capsys: pytest.CaptureFixture[str]):
    """A table of three seeds goes on from the one that is there; one without it is refused."""
    workdir = shutil.copytree(finished, workspace / "seeds")
    command = [*command, f"--workdir={workdir}", "--config.table.arms=('random', 'score')"]
    command += ["--config.table.factors=(1.0,)", "--config.table.max_tokens=256"]
    assert execute(*command, "--config.table.seeds=(1, 2)") == 2
    assert "config.train.seed was 0, is 1" in capsys.readouterr().err
    beside = ["--config.table.name=", "--config.train.seed=1", f"--workdir={workdir / 'seeds' / '1'}"]
    assert execute(*command, *beside) == 0  # by a process of its own, as it may
    capsys.readouterr()
    assert execute(*command, "--config.table.seeds=(0, 1, 2)") == 0
    assert len(re.findall("resuming|compiled", capsys.readouterr().err)) == 1  # seed 2 alone is trained
    assert {path.name for path in (workdir / "seeds").iterdir()} == {"1", "2"}
    rows = read_rows(workdir / "results.jsonl")
    new = {row.row: row for row in rows if len(row.values_by_seed) == 3}
    assert list(new) == ["no limit", "random, factor 1", "score, factor 1", "score beats random at factor 1"]
    assert len(rows) == len(new) + len(read_rows(finished / "results.jsonl"))  # what one seed gave stays
    for name, row in new.items():
        assert len(set(row.values_by_seed.values())) == 3
        low, high = row.interval
        assert low < row.value < high, name
    assert "one model" not in new["score beats random at factor 1"].verdict


# --- plans and mistakes -------------------------------------------------------------------------------------------


def test_dry_run_touches_nothing(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(workspace.rglob("*"))
    config = f"--config={workspace / 'small_config.py'}"
    assert execute(config, f"--workdir={tmp_path / 'new'}", "--dry_run") == 0
    plan = capsys.readouterr().out
    assert "small:table" in plan and re.search(r"parameters [\d,]+ total, [\d,]+ active", plan)
    assert "6 steps x 8 sequences x 32 tokens = 1,536 tokens" in plan and "model FLOPs" in plan and "KiB" in plan
    assert "vocabulary: taken from the tokenizer" in plan
    assert not (tmp_path / "new").exists() and sorted(workspace.rglob("*")) == before


def test_dry_run_of_a_published_size_allocates_nothing(capsys: pytest.CaptureFixture[str]):
    assert execute(f"--config={ROOT / 'configs/papers/capacity_aware.py'}:paper", "--dry_run") == 0
    assert "6,919," in capsys.readouterr().out


MISTAKES = {
    "unknown flag": (["--configg=x"], "Unknown command line flag 'configg'"),
    "no config": (["--workdir=x"], "--config is missing"),
    "no such file": (["--config=nowhere.py"], "--config=nowhere.py: the file cannot be loaded: .*No such file"),
    "unknown variant": (["--config=@:big"], r"variant 'big': choose table or plain"),
    "unknown field": (["--config=@", "--config.train.stepz=1"], r"--config.train.stepz=1: .*no field 'stepz'.*steps"),
    "wrong type": (["--config=@", "--config.train.steps=abc"], r"--config.train.steps=abc: invalid literal"),
    "stray argument": (["--config=@", "train.steps=3"], r"arguments \['train.steps=3'\] are not flags"),
    "wrong choice": (["--config=@", "--config.model.activation=relux"], r"activation='relux': choose one of"),
    "k above E": (["--config=@", "--config.model.moe.router.k=5"], r"router.k=5 must lie in \[1, num_experts=4\]"),
    "batch and micro-batches": (["--config=@", "--config.train.accumulate=3"], "batch_size=8 is not divisible by"),
    "batch and devices": (
        ["--config=@", "--config.mesh.data=8", "--config.train.batch_size=12"],
        "batch_size=12 not divisible by",
    ),
    "heads and devices": (
        ["--config=@", "--config.mesh.model=4"],
        "model.attention.num_heads=2 not divisible by mesh axis 'model'=4: .*num_kv_heads=2 not divisible by",
    ),
    "validation and virtual ranks": (
        ["--config=@", "--config.model.moe.virtual_ranks=4", "--config.data.seq_len=30", "--config.eval.batch_size=5"],
        "virtual_ranks=4 does not divide the 150 tokens of an evaluation batch .* eval.batch_size=5 and data.seq_len",
    ),
    "experts and devices": (["--config=@", "--config.mesh.expert=3"], "num_experts=4 not divisible by mesh axis"),
    "too many devices": (["--config=@", "--config.mesh.data=64"], "needs 64 devices, 8 are there"),
    "no workdir": (["--config=@", "--workdir="], "--workdir is missing"),
    "no text": (
        ["--config=@", "--config.data.domains.a.train=absent.txt"],
        "train='absent.txt': .*not exist",
    ),
    "no held-out text": (
        ["--config=@", "--config.data.domains.a.test=", "--config.data.domains.b.test="],
        "no domain has a 'test' split, which eval.final_split reads",
    ),
    "no tokenizer": (["--config=@", "--config.data.tokenizer=bpe:no.json"], "data.tokenizer='bpe:no.json'"),
    "vocabulary": (["--config=@", "--config.model.vocab_size=100"], "model.vocab_size=100 is smaller than"),
    "no task": (["--config=@", "--config.eval.tasks=('no.jsonl',)"], "no.jsonl"),
    "no table": (["--config=@", "--config.table.name=capacity"], "table.name='capacity': there is no module"),
    "unknown arm": (["--config=@", "--config.table.arms=('scor',)"], "order='scor': choose one of"),
    "doubled factor": (["--config=@", "--config.table.factors=(1.0, 1.0)"], "table.factors=.* each once"),
    "back end": (["--config=@", "--config.model.moe.implementation=quick"], "moe.implementation.*'quick' must name"),
    "init_from": (["--config=@", "--config.init_from=nowhere"], "no finished checkpoint there"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_and_touch_nothing(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], mistake: str
):
    arguments, message = MISTAKES[mistake]
    arguments = [a.replace("=@", f"={workspace / 'small_config.py'}") for a in arguments]
    workdir = tmp_path / "new"
    code = execute(f"--workdir={workdir}", *arguments)
    said = capfd.readouterr()
    assert code == 2
    assert re.search(message, said.err)
    (sentence,) = [line for line in said.err.splitlines() if not line.startswith("data: ")]
    assert sentence.startswith("error: ") and "Traceback" not in said.err and said.out == ""
    assert not workdir.exists()


def test_two_tasks_of_one_name(workspace: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, other = (write_task(tmp_path / name / "quiz.jsonl", QUESTIONS) for name in ("a", "b"))
    builtin = write_task(tmp_path / "builtin.jsonl", QUESTIONS)
    command = [*command, f"--workdir={tmp_path / 'new'}", "--config.eval.task_limit=4"]
    for first, second in ((one, other), (one, one), ("builtin", builtin), (builtin, "builtin")):
        assert execute(*command, f"--config.eval.tasks=('{first}', '{second}')") == 2
        said = capsys.readouterr().err
        assert "error: eval.tasks names two tasks '" in said and f"{first}" in said and f" and {second}" in said
        assert "rename a file, or give it a first line" in said and not (tmp_path / "new").exists()
    write_task(other, [{"kind": "multiple_choice", "task": "another"}, *QUESTIONS])  # what it says to do
    config = session.read_config(load_plain(workspace / "small_config.py"))
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, tasks=(str(one), str(other))))
    tasks = run.load_tasks(config, load_corpus(config.data, train=False), 1)
    assert [task.name for task in tasks] == ["quiz", "another"]


def test_tasks_whose_rows_virtual_ranks_cut_are_refused_before_training(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """16 requests of 6 bytes go into rows of 9, of which three stand for one of 34."""
    pairs = [{"good": f"good {i}", "bad": f"bads {i}"} for i in range(8)]
    task = write_task(tmp_path / "pairs.jsonl", [{"kind": "minimal_pairs"}, *pairs])
    command = [f"--config={workspace / 'small_config.py'}:plain", f"--workdir={tmp_path / 'new'}"]
    command += [f"--config.{f}" for f in ("data.seq_len=34", "model.num_layers=1", "train.steps=1")]
    command += ["--config.train.batch_size=4", "--config.train.warmup_steps=0"]
    command += ["--config.model.moe.capacity_factor=1.0", f"--config.eval.tasks=('{task}',)"]
    command += ["--config.model.moe.virtual_ranks=4"]
    assert execute(*command, "--config.eval.batch_size=2") == 2
    said = capsys.readouterr().err
    assert "virtual_ranks=4 does not divide the 54 tokens of a batch of task 'pairs' in 6 rows of 9 on a device" in said
    assert "or eval.batch_size as a multiple of 4" in said and not (tmp_path / "new").exists()
    assert execute(*command, "--config.eval.batch_size=4") == 0  # what it says to do


def test_scores_depend_on_the_batch_where_its_pairs_compete(workspace: Path):
    def bound(**changes: Any) -> bool:
        fields = load_plain(workspace / "small_config.py")
        fields.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        return "batch_size" in session._scored(session.read_config(fields))

    assert not bound()
    assert bound(model__moe__capacity_factor=1.0)
    assert bound(model__moe__capacity_limits=("token_drop:factor=1.0",))
    assert bound(model__moe__router__name="expert_choice", model__moe__router__noncausal="allow")
    assert not bound(model__moe__capacity_factor=1.0, train__steps=0, init_from="x")  # no checkpoint is chosen
    assert not bound(model__moe__capacity_factor=1.0, model__moe__first_dense=99)  # no layer has experts


def test_a_workdir_that_lost_its_config(
    finished: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The newest checkpoint says which run it holds."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "config.json").unlink()
    command = [*command, f"--workdir={workdir}"]
    for change in ("model.dim=32", "train.learning_rate=0.5"):  # the second would fit the arrays
        assert execute(*command, f"--config.{change}") == 2
        name, _, value = change.partition("=")
        assert re.search(
            rf"holds a run with another config: config\.{name} was .*, is {value}", capsys.readouterr().err
        )
        assert not (workdir / "config.json").exists()
    assert execute(*command) == 0
    assert (workdir / "config.json").read_bytes() == (finished / "config.json").read_bytes()


def test_another_config_in_the_same_workdir(
    finished: Path, command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert execute(*command, f"--workdir={finished}", "--config.train.steps=9", "--config.model.dim=32") == 2
    said = capsys.readouterr().err
    assert "holds a run with another config: " in said
    assert "config.model.dim was 16, is 32" in said and "config.train.steps was 6, is 9" in said
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert execute(*command, f"--workdir={blocked}") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_as_a_command(workspace: Path, tmp_path: Path):
    """The same through ``python -m``: exit code, one line, and no workdir."""
    config = f"--config={workspace / 'small_config.py'}"
    call = [sys.executable, "-m", "experiments.run", config, "--config.train.stepz=1", f"--workdir={tmp_path / 'new'}"]
    result = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.fullmatch(r"error: --config.train.stepz=1: .*\n", result.stderr) and result.stdout == ""
    assert not (tmp_path / "new").exists()


def test_config_json_is_the_config_that_ran(finished: Path):
    stored = json.loads((finished / "config.json").read_text())
    _, config, _ = checkpoint.load_model(finished)
    assert to_dict(config) == stored


def test_help_shows_every_flag_of_the_command():
    values = flags.FlagValues()
    run.define_flags(values, ["program"])
    shown = {flag.name for flag in values.get_key_flags_for_module(run)}
    assert shown == set(values) and {"config", "workdir", "dry_run", "mesh", "platform", "row"} <= shown


@pytest.mark.parametrize(("asked", "expected"), [(["quiz.jsonl"], ["acc/quiz"]), ([], []), (None, ["acc/quiz"])])
def test_tasks_of_an_earlier_evaluation_are_in_no_row_of_one_without(tmp_path: Path, asked: Any, expected: list[str]):
    """The same step was evaluated twice, and the second time without tasks; None: before that was written down."""
    config = {"name": "c", "scale": "tiny", "train": {"seed": 0, "batch_size": 2}, "data": {"seq_len": 8},
              "eval": {"batch_size": 4}, "model": {"moe": {"capacity_factor": 0.0}}}  # fmt: skip
    facts = {"config_hash": "0" * 12, "data": {"hash": "a", "epochs": 1.0}, "command": "run", "commit": "c",
             "dirty": False, "device": "cpu", "device_count": 1, "versions": {}}  # fmt: skip
    quiz = {"task": "quiz", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4, "chance": 0.25}
    final = {"kind": "final", "step": 3, "split": "test", "bits_per_byte": {"a": 2.0}, "ngram": {}}
    if asked is not None:
        final["asked"] = {"tasks": asked}
    for name, value in (("config", config), ("env", facts)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    lines = [{"kind": "tasks", "step": 3, "tasks": [quiz]}, final]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = {row.metric: row for row in training_rows(tmp_path)}
    assert [name for name in made if name.startswith("acc")] == expected
    assert made["bits_per_byte/a"].batch_shape == (4, 8)


def test_speed_is_that_of_the_last_call_that_trained(tmp_path: Path):
    """Two calls with other devices, and a third that evaluates only."""
    config = {"name": "c", "scale": "tiny", "train": {"seed": 0, "batch_size": 2}, "data": {"seq_len": 8},
              "eval": {"batch_size": 4}, "model": {"moe": {"capacity_factor": 0.0}}}  # fmt: skip
    call = {"command": "run", "commit": "c", "dirty": False, "device": "cpu", "versions": {}}
    sessions = [call | {"device_count": n, "from_step": step} for n, step in ((8, 0), (2, 4), (1, 8))]
    facts = {**sessions[-1], "config_hash": "0" * 12, "data": {"hash": "a", "epochs": 1.0}, "sessions": sessions,
             "grouped_matmul": {"implementation": "ref"}}  # fmt: skip
    # The first call came to step 6 and was killed: steps 5 and 6 were done again.
    speeds = [(2, 100.0), (4, 110.0), (6, 120.0), (6, 10.0), (8, 14.0)]
    lines = [{"kind": "train", "step": step, "tokens": 9, "time": 1.0, "tokens_per_s": speed, "mfu": speed / 1e3}
             for step, speed in speeds]  # fmt: skip
    lines.append({"kind": "final", "step": 8, "split": "test", "bits_per_byte": {"a": 2.0}, "ngram": {}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in (("config", config), ("env", facts)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    made = {row.metric: row for row in training_rows(tmp_path)}
    assert made["tokens_per_s"].value == 12.0 and made["mfu"].value == pytest.approx(0.012)
    assert made["tokens_per_s"].extra["steps"] == [6, 8] and made["tokens_per_s"].device_count == 2
    assert made["bits_per_byte/a"].device_count == 1
    older = [{name: value for name, value in entry.items() if name != "from_step"} for entry in sessions]
    (tmp_path / "env.json").write_text(json.dumps(facts | {"sessions": older}))
    assert {row.metric: row for row in training_rows(tmp_path)}["tokens_per_s"].value == 57.0  # of 100, 110, 10 and 14
