"""Results rows: stable ids, replacement, atomic writes, and errors that name file and line."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from moejax import results
from moejax.results import ResultRow, ResultsError, append_rows, from_line, read_rows, scan_rows, to_line
from moejax.verdicts import Arm, Contrast, judge

ROOT = Path(__file__).resolve().parents[1]


def make_row(**fields):
    base: dict[str, Any] = {
        "kind": "value",
        "paper": "capacity_aware",
        "table": "1",
        "row": "score at 1.5",
        "metric": "bits_per_byte",
        "unit": "bits/byte",
        "value": 1.25,
        "scale": "tiny",
        "config_hash": "0123456789ab",
    }
    return ResultRow(**(base | fields))


def test_id_depends_on_what_the_row_is_and_not_on_what_was_measured():
    row = make_row()
    assert row.id == "7a5fd62d5b14"  # the same on every machine
    assert make_row(value=2.0, commit="abc", time="x", values_by_seed={0: 2.0}).id == row.id
    for field in results.ID_FIELDS:
        assert make_row(**{field: "other"}).id != row.id


def test_round_trip_keeps_every_field(tmp_path):
    row = make_row(
        values_by_seed={0: 1.24, 11: 1.26},
        interval=(1.2, 1.3),
        batch_shape=(16, 128),
        published=63.1,
        dirty=False,
        versions={"jax": "1.2.3"},
        extra={"arm": "score", "capacity_factor": 1.5, "note": "é|\n"},
    )
    append_rows(tmp_path / "results.jsonl", [row])
    (read,) = read_rows(tmp_path / "results.jsonl")
    assert dataclasses.asdict(read) == dataclasses.asdict(row)
    assert read.values_by_seed == {0: 1.24, 11: 1.26}
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_a_judgement_fills_a_contrast_row():
    contrast = Contrast.on_metric("score > random", "bits_per_byte", "score", "random")
    arms = {"score": Arm({0: 1.0, 1: 1.1, 2: 1.2}), "random": Arm({0: 1.3, 1: 1.42, 2: 1.5})}
    row = ResultRow(paper="p", table="1", **judge([contrast], arms)[0].row_fields())
    assert (row.kind, row.sign, row.claim, row.margin, row.verdict) == (
        "contrast",
        "a < b",
        "better",
        0.005,
        "direction",
    )
    assert from_line(to_line(row)) == row


def test_the_same_id_replaces_in_place_and_others_stay(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    append_rows(path, [make_row(row="a"), make_row(row="b")])
    append_rows(path, [make_row(row="c"), make_row(row="a", value=9.0)])
    assert [(r.row, r.value) for r in read_rows(path)] == [("a", 9.0), ("b", 1.25), ("c", 1.25)]


def test_a_row_of_other_data_is_not_replaced(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, [make_row(data_hash="aaa"), make_row(row="b"), make_row(row="c", data_hash="aaa")])
    before = path.read_bytes()
    other = make_row(value=9.0, data_hash="bbb")
    for rows in (
        [make_row(row="new"), other],
        [make_row(row="d", data_hash="aaa"), make_row(row="d", data_hash="bbb")],
    ):
        with pytest.raises(ResultsError, match=r"data_hash was aaa, is bbb.* nothing was written\. Use another file"):
            append_rows(path, rows)
        assert path.read_bytes() == before
    # the same data, data that one of them does not name, and a row over runs that is made of more of them
    append_rows(path, [make_row(value=2.0, data_hash="aaa"), make_row(row="b", value=3.0, data_hash="bbb")])
    append_rows(path, [make_row(row="c", value=4.0, data_hash="aaa, bbb")])
    assert [row.value for row in read_rows(path)] == [2.0, 3.0, 4.0]


def test_rows_joined_by_hand_may_repeat_and_the_last_wins(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(to_line(make_row(value=1.0)) + "\n\n" + to_line(make_row(value=2.0)) + "\n")
    assert [r.value for r in read_rows(path)] == [2.0]


def test_no_file_is_no_rows(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_crash_while_writing_leaves_the_old_file_whole(tmp_path, monkeypatch, failing):
    path = tmp_path / "results.jsonl"
    append_rows(path, [make_row(row="a")])
    before = path.read_bytes()

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, crash)
    with pytest.raises(OSError, match="No space left"):
        append_rows(path, [make_row(row="b")])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_writers_at_the_same_time_lose_no_row(tmp_path):
    path = tmp_path / "results.jsonl"
    threads = [threading.Thread(target=append_rows, args=(path, [make_row(row=f"{i}")])) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(r.row) for r in read_rows(path)) == list(range(16))


def test_new_files_are_as_readable_as_the_umask_says(tmp_path):
    append_rows(tmp_path / "r.jsonl", [make_row()])
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "r.jsonl").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"kind": "value",,}', "broken line: not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"kind": "value"}', "missing fields: .*'paper', 'table', 'row'"),
        (
            '{"kind": "value", "paper": "p", "table": "1", "row": "r", "metric": "m", "colour": 1}',
            r"unknown fields \['colour'\]: own fields belong in 'extra'",
        ),
        (
            '{"kind": "value", "paper": "p", "table": "1", "row": "r", "metric": "m", "id": "123"}',
            "id='123' does not belong",
        ),
        (
            '{"kind": "value", "paper": "p", "table": "1", "row": "r", "metric": "m", "value": "1.2"}',
            "value='1.2': expected a finite number",
        ),
        (
            '{"kind": "value", "paper": "p", "table": "1", "row": "r", "metric": "m", "interval": 3}',
            "interval=3",
        ),
        (
            '{"kind": "value", "paper": "p", "table": "1", "row": "r", "metric": "m", "batch_shape": 3}',
            "batch_shape=3",
        ),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_overwritten(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    path.write_text(to_line(make_row(row="a")) + "\n" + line + "\n" + to_line(make_row(row="b")) + "\n")
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=rf"results\.jsonl:2: .*{message}.*sed -i 2d"):
        read_rows(path)
    with pytest.raises(ResultsError, match=r"results\.jsonl:2:"):
        append_rows(path, [make_row(row="c")])
    assert path.read_bytes() == before
    rows, problems = scan_rows(path)
    assert [r.row for r in rows] == ["a", "b"]
    assert len(problems) == 1


def test_a_truncated_last_line_is_called_that(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(to_line(make_row(row="a")) + "\n" + to_line(make_row(row="b"))[:50])
    with pytest.raises(ResultsError, match=r"results\.jsonl:2: the last line is cut off: .*run the command"):
        read_rows(path)


def test_bytes_that_are_not_text_are_a_broken_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(to_line(make_row()).encode() + b"\n\xff\xfe\x00\n")
    with pytest.raises(ResultsError, match=r"results\.jsonl:2: broken line"):
        read_rows(path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"value": float("nan")}, "value=nan: expected a finite number"),
        ({"values_by_seed": {0: float("inf")}}, r"values_by_seed\[0\]=inf"),
        ({"values_by_seed": {0: None}}, r"values_by_seed\[0\]=None"),
        ({"values_by_seed": {"a": 1.0}}, "values_by_seed={'a': 1.0}: expected {seed: value}"),
        ({"interval": (2.0, 1.0)}, "lower end is above the upper"),
        ({"interval": (1.0,)}, "expected two numbers"),
        ({"interval": (None, 1.0)}, r"interval\[0\]=None"),
        ({"kind": "ratio"}, "kind='ratio': choose 'value' or 'contrast'"),
        ({"table": ""}, "table='': a row needs"),
        ({"exercised_share": True}, "exercised_share=True"),
    ],
)
def test_rows_are_checked_when_made(fields, message):
    with pytest.raises(ResultsError, match=message):
        make_row(**fields)


def test_extra_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="not JSON"):
        append_rows(tmp_path / "r.jsonl", [make_row(extra={"x": {1, 2}})])
    assert not (tmp_path / "r.jsonl").exists()


def test_environment_facts_fit_a_row():
    facts = results.environment_facts()
    row = make_row(**facts)
    assert row.device and row.device_count >= 1
    assert set(row.versions) >= {"python", "jax", "flax", "optax", "orbax-checkpoint"}
    json.loads(to_line(row))


def test_code_version_of_a_checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert results.code_version(tmp_path) == ("", None)
    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-q", "-m", "m")
    head = git("rev-parse", "HEAD")
    assert results.code_version(tmp_path) == (head, False)
    assert results.code_version(tmp_path / "a.py") == (head, False)
    (tmp_path / "a.py").write_text("2")
    assert results.code_version(tmp_path) == (head, True)
    (tmp_path / "copy.py").write_text("installed into another project's checkout")
    assert results.code_version(tmp_path / "copy.py") == ("", None)


def test_reading_rows_imports_no_jax(tmp_path):
    append_rows(tmp_path / "r.jsonl", [make_row()])
    code = (
        "import sys\nfrom moejax.results import read_rows\nfrom moejax.report import results_markdown\n"
        f"results_markdown(read_rows({str(tmp_path / 'r.jsonl')!r}))\nassert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
