"""``experiments.parity``: a row for each golden model, and what damaged ones and wrong logits do."""

import dataclasses
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments import parity, session
from moejax.report import results_markdown
from moejax.results import ResultRow, read_rows
from tests.goldens import NAMES, ROOT, TOLERANCE, golden

pytestmark = pytest.mark.usefixtures("compiled_once")
BASE = "mixtral-base"


def call(bundle: Path, output: Path, *more: str) -> int:
    given = [f"--bundle={bundle}", f"--output={output}", *more]
    return session.call(parity.define_flags, parity.command, given)


def rewritten(target: Path, change: float) -> None:
    """The base model in one folder only, with one logit moved by ``change`` of the largest."""
    case = golden(BASE)
    logits = case.logits.copy()
    logits[0, 0, 0] += change * np.abs(logits).max()
    file = io.BytesIO()
    np.savez(file, tokens=case.tokens, logits=logits)
    with zipfile.ZipFile(case.path) as old, zipfile.ZipFile(target, "w") as new:
        for member in ("case.json", "config.4.json", "model.safetensors", "golden.npz"):
            new.writestr(member, file.getvalue() if member == "golden.npz" else old.read(member))


def test_a_row_for_each_model_and_no_silence_about_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (ROOT / f"{BASE}.zip").read_bytes()
    bundle, output = tmp_path / "bundle", tmp_path / "rows.jsonl"
    bundle.mkdir()
    (bundle / f"{BASE}.zip").write_bytes(whole)
    assert call(bundle, output) == 0
    (row,) = read_rows(output)
    assert row.value is not None and 0 < row.value < TOLERANCE and row.row == BASE
    assert row.extra["family"] == "mixtral" and row.extra["variant"] == "base"
    assert row.extra["transformers"] == ["4.57.6", "5.17.0"] and 0 < row.extra["cache_error"] < TOLERANCE
    assert list(row.extra["errors"]) == ["model, transformers 4", "model, transformers 5", "fused, transformers 5"]
    (bundle / f"{BASE}.zip").unlink()
    (bundle / "mixtral-cut.zip").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (bundle / "mixtral-flipped.zip").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with zipfile.ZipFile(bundle / "mixtral-lacking.zip", "w") as file:
        file.writestr("case.json", "{}")
    rewritten(bundle / "mixtral-wrong.zip", 2 * TOLERANCE)
    rewritten(bundle / "mixtral-nan.zip", float("nan"))
    capsys.readouterr()
    assert call(bundle, output) == 1
    rows = {row.row: row for row in read_rows(output)}
    assert rows.keys() == {BASE, "mixtral-wrong", "mixtral-nan"}
    assert rows["mixtral-wrong"].value == pytest.approx(2 * TOLERANCE, rel=0.05)
    assert rows["mixtral-nan"].value is None and "not a finite number" in rows["mixtral-nan"].verdict_note
    told = capsys.readouterr().err.splitlines()
    for name in ("cut", "flipped", "lacking"):
        (line,) = [line for line in told if line.startswith(f"mixtral-{name}")]
        assert f"{bundle / f'mixtral-{name}.zip'} is damaged" in line
    for name in ("wrong", "nan"):
        (line,) = [line for line in told if line.startswith(f"mixtral-{name}")]
        assert "NOT UNDER 0.0001" in line
    assert told[-1].startswith("5 of 5 models are not as transformers computed them")


def test_what_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ROOT / f"{BASE}.zip", tmp_path)
    rows = tmp_path / "rows.jsonl"
    for bundle, output, more, words in (
        (tmp_path, "/nowhere/rows.jsonl", (), "there is no folder /nowhere"),
        (tmp_path / "none", rows, (), "none holds no .zip file"),
        (tmp_path, rows, ("--only=qwen",), "whose name contains 'qwen'"),
        ("", rows, (), "--bundle and --output are needed"),
    ):
        assert call(Path(bundle) if bundle else Path(), Path(output), *more, *([] if bundle else ["--bundle="])) == 2
        assert words in capsys.readouterr().err
    assert not rows.exists()


def test_the_committed_rows_are_those_of_the_bundle() -> None:
    """After a change of tests/golden: python -m experiments.parity --bundle=tests/golden --output=that file."""
    rows = {row.row: row for row in read_rows(ROOT.parent.parent / "experiments" / "results" / "parity.jsonl")}
    assert sorted(rows) == NAMES
    for name, row in rows.items():
        assert row.checkpoint_hash == parity.hash_of(ROOT / f"{name}.zip"), name
        assert row.value is not None and row.value < TOLERANCE and row.extra["cache_error"] < TOLERANCE


def test_the_table_has_a_line_for_each_family() -> None:
    extra = {"family": "a", "variant": "no_bias", "bound": 1e-4, "cache_error": 3e-6, "transformers": ["4.57.6"]}
    one = ResultRow(kind="value", paper="parity", table="logits", row="a-x", metric="e", value=2e-6, extra=extra)
    two = dataclasses.replace(
        one, row="a-y", value=1e-6, extra={**extra, "variant": "tied", "transformers": ["5.17.0"]}
    )
    three = dataclasses.replace(one, row="b-x", value=None, extra={**extra, "family": "b"})
    lines = [line for line in results_markdown([one, two, three]).splitlines() if line.startswith("| ")]
    assert lines[1:] == [
        "| a | 2 | no bias, tied | 4.57.6 and 5.17.0 | 2.0e-06 | 3.0e-06 |",
        "| b | 1 | no bias | 4.57.6 | not a number | 3.0e-06 |",
    ]
