"""``experiments.run --row=ID``: a row is found, measured again, and compared by stated rules."""

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import rerun, session, sweep
from moejax.results import ResultRow, append_rows, environment_facts, read_rows
from moejax.verdicts.agreement import (
    ELSEWHERE,
    ELSEWHERE_TOUCHED,
    SAME,
    SPEED,
    agreement,
    differences,
    same_setting,
)
from tests.small import execute, quick_compilation, write_workspace

ROOT = Path(__file__).resolve().parent.parent


def row(**fields: Any) -> ResultRow:
    shared: dict[str, Any] = {
        "kind": "value",
        "paper": "training",
        "table": "final",
        "row": "small",
        "metric": "bits_per_byte/a",
        "unit": "bits per byte",
        "value": 2.0,
        "commit": "c",
        "device": "cpu",
        "device_count": 1,
        "command": "python -m experiments.run --config=configs/quickstart.py --workdir=runs/x",
    }
    return ResultRow(**{**shared, **fields})


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "now", "agrees", "rule"),
    [
        ({"unit": "experts", "value": 7.0}, 7.0, True, "a count must be equal"),
        ({"unit": "experts", "value": 7.0}, 7.000001, False, "a count"),
        ({"unit": "", "value": 1_000_000}, 1_000_001, False, "a count"),
        ({"interval": (1.9, 2.1), "interval_kind": "95 %, t over seeds"}, 2.09, True, "[1.9, 2.1] (95 %, t over"),
        ({"interval": (1.9, 2.1)}, 2.11, False, "inside the stored interval"),
        ({}, 2.0 + 0.9 * SAME, True, "the margin under which no contrast counts"),
        ({}, 2.0 - 1.1 * SAME, False, "the margin"),
        ({"values_by_seed": {0: 1.9, 1: 2.1}}, 2.15, True, "the range of its 2 seeds"),
        ({"values_by_seed": {0: 1.9, 1: 2.1}}, 2.21, False, "the range"),
        (
            {"metric": "acc/t", "unit": "share", "value": 0.5, "extra": {"n": 100, "stderr": 0.05}},
            0.519,
            True,
            "two ex",
        ),
        ({"metric": "acc/t", "unit": "share", "value": 0.5, "extra": {"n": 100, "stderr": 0.05}}, 0.53, False, "two"),
        ({"metric": "tokens_per_s", "unit": "tokens/s", "value": 100.0}, 100 * (1 + SPEED) - 0.1, True, "speeds"),
        ({"metric": "tokens_per_s", "unit": "tokens/s", "value": 100.0}, 100 / (1 + SPEED) - 0.1, False, "speeds"),
    ],
)
def test_rules_in_the_same_setting(stored: dict[str, Any], now: float, agrees: bool, rule: str):
    before = row(**stored)
    found = agreement(before, dataclasses.replace(before, value=now, interval=None))
    assert found.agrees is agrees and rule in found.rule, found.rule
    assert found.exact is (before.value == now)


@pytest.mark.parametrize(
    ("stored", "now", "agrees", "rule"),
    [
        ({}, 2.0 * (1 + 0.9 * ELSEWHERE), True, "another setting, where two runs differ as two seeds do: 2%"),
        ({}, 2.0 * (1 - 1.1 * ELSEWHERE), False, "2%"),
        ({"exercised_share": 0.3}, 2.0 * (1 + 0.9 * ELSEWHERE_TOUCHED), True, "6%"),
        (
            {"metric": "acc/t", "unit": "share", "value": 0.5, "extra": {"n": 100, "stderr": 0.05}},
            0.6,
            True,
            "standard",
        ),
        ({"metric": "acc/t", "unit": "share", "value": 0.5, "extra": {"n": 100, "stderr": 0.05}}, 0.7, False, "stand"),
        ({"metric": "ppl/t", "unit": "perplexity per target", "value": 1000.0}, 1140.0, True, "logarithm"),
        ({"metric": "ppl/t", "unit": "perplexity per target", "value": 1000.0}, 1160.0, False, "logarithm"),
    ],
)
def test_rules_in_another_setting(stored: dict[str, Any], now: float, agrees: bool, rule: str):
    before = row(**stored)
    found = agreement(before, dataclasses.replace(before, value=now, commit="d"))
    assert found.agrees is agrees and rule in found.rule, found.rule


def test_a_contrast_is_compared_by_its_difference():
    stored = row(kind="contrast", value=None, difference=-0.1, interval=(-0.15, -0.05), margin=0.005)
    assert agreement(stored, dataclasses.replace(stored, difference=-0.06)).agrees
    assert not agreement(stored, dataclasses.replace(stored, difference=-0.04)).agrees
    bare = dataclasses.replace(stored, interval=None)
    assert not agreement(bare, dataclasses.replace(bare, difference=-0.11)).agrees
    assert agreement(bare, dataclasses.replace(bare, difference=-0.11, device="another")).agrees
    with pytest.raises(ValueError, match="no difference"):
        agreement(stored, dataclasses.replace(stored, difference=None))


def test_what_differs_is_said():
    stored = row(versions={"jax": "0.10", "numpy": "2"}, dirty=False)
    now = dataclasses.replace(stored, versions={"jax": "0.11", "numpy": "2"}, device="H100", data_hash="d", dirty=True)
    assert differences(stored, now) == ["device cpu -> H100", "data hash not known -> d", "uncommitted changes now",
                                        "jax 0.10 -> 0.11"]  # fmt: skip
    assert not same_setting(stored, now) and same_setting(stored, dataclasses.replace(stored, value=1.0))
    assert not same_setting(row(commit=""), row(commit=""))  # code that is not known is not the same


def test_tolerances_follow_from_the_committed_rows():
    """Two draws of one distribution differ by less than 2 sqrt(2) s in 95 of 100 cases."""
    file = ROOT / "experiments" / "results" / "capacity_aware_lab.jsonl"
    spread = {
        r.row: 2 * 2**0.5 * statistics.stdev(r.values_by_seed.values()) / r.value
        for r in read_rows(file)
        if r.kind == "value" and len(r.values_by_seed) > 2 and r.value is not None
    }
    assert len(spread) > 15
    assert ELSEWHERE / 1.25 < spread.pop("no limit") < ELSEWHERE
    assert ELSEWHERE_TOUCHED / 1.5 < statistics.median(spread.values()) < ELSEWHERE_TOUCHED


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    append_rows(path, [row(), row(row="other", value=3.0)])
    return path


def no_programs(*_: Any) -> int:
    raise AssertionError("nothing may run")


def again(row_id: str, file: Path, **programs: Any) -> int:
    named = {"experiments.run": no_programs, "experiments.sweep": no_programs, **programs}
    return session.guarded(lambda: rerun.rerun(row_id, [str(file)], None, named))


def test_an_unknown_id_is_answered_with_near_ones_and_a_list(file: Path, capsys: pytest.CaptureFixture[str]):
    known = row().id
    near = known[:-1] + ("0" if known[-1] != "0" else "1")
    assert again(near, file) == 2
    err = capsys.readouterr().err
    assert f"--row={near}: no such row. did you mean {known}?" in err
    assert f"  {known}  training final: small: bits_per_byte/a 2 bits per byte" in err
    with file.open("a") as out:
        out.write("{broken\n")
    assert again("zzz", file) == 2
    err = capsys.readouterr().err
    assert "results.jsonl:3: broken line" in err and "1 broken line(s) may hold it" in err and "did you mean" not in err
    assert again("zzz", file.parent / "none.jsonl") == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_all_rows_are_listed(capsys: pytest.CaptureFixture[str]):
    assert execute("--row=list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(len(read_rows(path)) for path in (ROOT / "experiments" / "results").glob("*.jsonl"))


def test_a_dry_run_shows_the_plan_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stored = row(command=f"{row().command} --config.train.steps=70")
    append_rows(tmp_path / "r.jsonl", [stored])
    assert execute(f"--row={stored.id}", f"--results={tmp_path / 'r.jsonl'}", "--dry_run") == 0
    out = capsys.readouterr().out
    assert f"row {stored.id}, training final: small" in out and "training 70 steps" in out
    assert list(tmp_path.iterdir()) == [tmp_path / "r.jsonl"]


def test_rows_of_one_id_in_two_files(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "b").mkdir()
    append_rows(tmp_path / "b" / "results.jsonl", [row(value=2.5)])
    files = [str(file), str(tmp_path / "b")]
    assert session.guarded(lambda: rerun.rerun(row().id, files, None, {})) == 2
    assert "hold different values of it" in capsys.readouterr().err


def test_flags_that_do_not_go_together(file: Path, capsys: pytest.CaptureFixture[str]):
    assert execute(f"--row={row().id}", "--config=configs/base.py") == 2
    assert "leave out --config" in capsys.readouterr().err
    assert execute(f"--results={file}") == 2
    assert "--results goes with --row=ID" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"device": "NVIDIA H100 80GB HBM3"}, "it was measured on NVIDIA H100 80GB HBM3 x 1, and here is only cpu"),
        (
            {"device": "TPU v5p", "command": "python -m experiments.sweep --sweep=configs/sweeps/rate_and_k.py"},
            "it was m",
        ),
        ({"command": ""}, "it has no command"),
        (
            {"command": "python -m kernels_pallas.bench --x=1"},
            "its command is none of experiments.run or experiments.sweep",
        ),
        (
            {"command": "python -m experiments.run --config=configs/gone.py:tiny"},
            "--config=configs/gone.py:tiny: there is",
        ),
        ({"value": None, "verdict_note": "no GPU"}, "it has no value to compare with (no GPU)"),
        ({"metric": "mfu", "device": "AMD cpu"}, "it is a speed on AMD cpu, which says nothing about cpu"),
    ],
)
def test_what_is_missing_is_said(fields: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stored = row(**fields)
    append_rows(tmp_path / "r.jsonl", [stored])
    assert again(stored.id, tmp_path / "r.jsonl") == 2
    assert f"cannot be measured again here: {said}" in capsys.readouterr().out


def test_the_row_s_own_folder_is_left_alone_however_the_flag_was_typed():
    begin, new = ["python", "-m", "experiments.run"], Path("new")
    words = [*begin, "--config", "c.py", "--workdir", "runs/x", "--max_seconds", "3", "--config.train.steps", "5"]
    assert rerun.arguments(words, new) == ["--config", "c.py", "--workdir=new", "--config.train.steps", "5"]
    words = [*begin, "--config=c.py", "-workdir=runs/x", "--max_seconds=3", "--dry_run"]
    assert rerun.arguments(words, new) == ["--config=c.py", "--workdir=new"]


def test_how_the_command_ends(file: Path, capsys: pytest.CaptureFixture[str]):
    asked = []

    def ends(code: int, *rows: ResultRow) -> Any:
        def program(own: list[str]) -> int:
            asked.append(own)
            folder = Path(own[1].removeprefix("--workdir="))
            if rows:
                append_rows(folder / "results.jsonl", rows)
            return code

        return {"experiments.run": program}

    here = environment_facts()
    stored = row(command=row().command + " --max_seconds=3 --config.train.steps=2", **here)
    append_rows(file, [stored])
    assert [again(stored.id, file, **ends(code)) for code in (130, 143)] == [130, 143]
    assert asked[0][::2] == ["--config=configs/quickstart.py", "--config.train.steps=2"]
    assert not Path(asked[0][1].removeprefix("--workdir=")).parent.exists()
    assert again(stored.id, file, **ends(2)) == 2
    assert "its command ended with exit code 2" in capsys.readouterr().out
    assert again(stored.id, file, **ends(0)) == 2
    assert "does not make this row any more" in capsys.readouterr().out
    assert again(stored.id, file, **ends(0, stored)) == 0
    assert "setting: uncommitted changes" in capsys.readouterr().out or not here["dirty"]
    # fields of the config were added since: another hash, the same names
    assert again(stored.id, file, **ends(0, dataclasses.replace(stored, config_hash="new", value=2.03))) == 0
    said = capsys.readouterr().out
    assert "config hash not known -> new" in said and "agrees (rule: within 0.04: another setting" in said
    assert again(stored.id, file, **ends(0, dataclasses.replace(stored, value=2.03))) == 1
    said = capsys.readouterr().out
    folder = Path(said.rpartition("its folder stays: ")[2].strip())
    assert "DISAGREES" in said and (folder / "results.jsonl").exists()


# --- a real run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles fast and keeps everything, here and in the sweep's process, so that the second run compiles nothing."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with quick_compilation():
        yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_a_real_sweep_whose_row_agrees_with_itself_but_not_when_tampered(
    quick: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    config = write_workspace(tmp_path)
    (tmp_path / "short.py").write_text("def sweep():\n    yield {'model.moe.router.k': 1, 'train.steps': 2}\n")
    out = tmp_path / "out"
    arguments = [f"--config={config}:plain", f"--sweep={tmp_path / 'short.py'}", f"--workdir={out}"]
    arguments += ["--config.model.num_layers=1", "--config.eval.final_max_tokens=256"]
    assert session.call(sweep.define_flags, sweep.command, arguments) == 0, capfd.readouterr().err
    rows = {row.metric: row for row in read_rows(out / "results.jsonl")}
    a, b = (rows[f"bits_per_byte/{domain}"].value for domain in "ab")
    assert a and b and rows["bits_per_byte/mean"].value == pytest.approx((a + b) / 2)
    assert rows["tokens_per_s"].row == "k=1, steps=2" and rows["tokens_per_s"].device == "cpu"
    (point,) = out.glob("k=1,steps=2-*")
    fields = json.loads((point / "config.json").read_text())
    assert (fields["model"]["moe"]["router"]["k"], fields["train"]["steps"], fields["model"]["num_layers"]) == (1, 2, 1)

    file, second = point / "results.jsonl", out / "second"
    stored = next(r for r in read_rows(file) if r.metric == "bits_per_byte/a")
    capfd.readouterr()
    assert execute(f"--row={stored.id}", f"--results={point}", f"--workdir={point}") == 2
    assert "is not empty and no earlier rerun" in capfd.readouterr().err
    assert execute(f"--row={stored.id}", f"--results={file}", f"--workdir={second}") == 0
    said = capfd.readouterr().out
    assert "equal to the last digit" in said and "agrees (rule:" in said
    (new,) = (r for r in read_rows(second / "results.jsonl") if r.metric == stored.metric)
    assert new.id == stored.id and new.value == stored.value
    assert new.command == stored.command.replace(str(point), str(second))

    assert stored.value is not None
    append_rows(file, [dataclasses.replace(stored, value=1.1 * stored.value)])
    assert execute(f"--row={stored.id}", f"--results={file}", f"--workdir={second}") == 1
    assert "DISAGREES" in capfd.readouterr().out
    assert json.loads((second / "rerun.json").read_text()) == {"row": stored.id}
