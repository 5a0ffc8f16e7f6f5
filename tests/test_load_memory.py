"""``experiments.load_memory``: the memory of a process that loads a checkpoint, watched from outside."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import load_memory, load_once, session
from moejax import importers
from moejax.config import MeshConfig
from moejax.results import read_rows
from moejax.sharding import make_mesh

ROOT = Path(__file__).resolve().parent.parent


def call(output: Path, *more: str) -> int:
    return session.call(load_memory.define_flags, load_memory.command, [f"--output={output}", *more])


@pytest.mark.parametrize("gigabytes", [0.5, 2.0, 13.8])
def test_the_checkpoint_has_the_size_that_was_asked_for(gigabytes: float) -> None:
    raw = load_memory.config_json(gigabytes)
    assert load_memory.size_of(load_memory.specs(raw)) == pytest.approx(gigabytes * 1e9, rel=0.1)
    assert (raw["num_hidden_layers"], raw["num_experts"]) == (16, 64)


def small(folder: Path) -> Path:
    """A folder as the command writes it, of fewer and smaller parts."""
    folder.mkdir()
    raw = load_memory.config_json(0.01) | {"num_hidden_layers": 3, "num_experts": 4, "vocab_size": 96}
    sizes = load_memory.write(folder, raw | {"num_experts_per_tok": 2}, shards=3)
    assert 1 < len(sizes) <= 3 and sizes == sorted(sizes)
    return folder


def test_both_programs_load_the_same_model(tmp_path: Path) -> None:
    folder = small(tmp_path / "folder")
    importers.check(folder)
    mesh = make_mesh(MeshConfig(data=1))
    ours, theirs = load_once.by_moejax(folder, mesh), load_once.by_orbax(folder, mesh)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_what_is_read_of_a_process() -> None:
    """Its anonymous memory grows by what it takes, and the peak of all it holds is no less."""
    size = 30_000_000
    before = load_memory.memory(os.getpid())
    # pages of its own: an array may get memory that the allocator kept of one freed before, and take no more
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        taken[:: mmap.PAGESIZE] = b"1" * len(range(0, size, mmap.PAGESIZE))
        after = load_memory.memory(os.getpid())
    assert after["RssAnon"] - before["RssAnon"] == pytest.approx(size, rel=0.1)
    assert after["VmHWM"] >= after["VmRSS"] >= after["RssAnon"]


def test_rows_of_what_was_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two meshes and Orbax, each in a row; on an accelerator the arrays are no part of the host's memory."""
    asked = []

    def watch(folder: Path, program: str, mesh: str, devices: int) -> dict[str, Any]:
        importers.check(folder)
        asked.append((program, mesh, devices))
        return {"on_host": program == "moejax", "held_bytes": 10**9, "anonymous_bytes": 3 * 10**9, "seconds": 1.0,
                "device": "cpu", "device_count": devices}  # fmt: skip

    monkeypatch.setattr(load_memory, "watch", watch)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "7")
    output = tmp_path / "rows.jsonl"
    assert call(output, "--gigabytes=0.01", "--rival=orbax", f"--scratch={tmp_path}") == 0
    assert asked == [("moejax", "data=1", 1), ("moejax", "expert=8", 8), ("orbax", "data=1", 1)]
    one, many, other = read_rows(output)
    assert (many.row, many.device_count) == ("moejax, expert=8, MALLOC_MMAP_THRESHOLD_=7", 8)
    assert (one.value, one.extra["beyond_model_bytes"]) == (3.0, 2 * 10**9)
    assert other.extra["beyond_model_bytes"] == 3 * 10**9
    assert one.extra["checkpoint_bytes"] == sum(one.extra["file_bytes"]) == pytest.approx(0.01e9, rel=0.1)
    assert one.extra["largest_file_bytes"] == max(one.extra["file_bytes"])
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_a_row_of_a_load(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert call(output, "--gigabytes=0.1", "--mesh=expert=2", f"--scratch={tmp_path}") == 0
    (row,) = read_rows(output)
    assert list(tmp_path.iterdir()) == [output]
    assert (row.row, row.device_count) == ("moejax, expert=2", 2)
    found = row.extra
    assert found["checkpoint_bytes"] == pytest.approx(0.1e9, rel=0.2)
    assert found["largest_file_bytes"] == max(found["file_bytes"])
    # All else than experts is on both devices; what is float32 here is small.
    assert 1 < found["held_bytes"] / found["checkpoint_bytes"] < 2
    assert found["largest_shard_bytes"] < found["held_bytes"] / 4
    assert 0.5 < found["anonymous_bytes"] / found["held_bytes"] < 2
    assert found["beyond_model_bytes"] == found["anonymous_bytes"] - found["held_bytes"]
    assert row.value == found["anonymous_bytes"] / 1e9


@pytest.mark.slow
def test_a_load_that_fails_says_why_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    assert call(output, "--gigabytes=0.01", "--mesh=expert=3", f"--scratch={tmp_path}") == 2
    assert "moejax did not load the checkpoint (exit code 1)" in (told := capsys.readouterr().err)
    assert "not divisible by mesh axis 'expert'=3" in told
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    for output, more, words in (
        (rows, "--mesh=experts=2", "AXIS=DEVICES"),
        (rows, "--gigabytes=0", "--gigabytes=0"),
        (rows, "--scratch=/nowhere", "--scratch=/nowhere: there is no such folder"),
        (Path("/nowhere/rows.jsonl"), "--shards=2", "there is no folder /nowhere"),
    ):
        assert call(output, more) == 2
        assert words in capsys.readouterr().err
    full = type(load_memory.shutil.disk_usage(tmp_path))(10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr(load_memory.shutil, "disk_usage", lambda path: full)
    assert call(rows, f"--scratch={tmp_path}") == 2
    assert "has 1.00 GB free, and the checkpoint needs 2.1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_committed_rows_stay_near_one_shard() -> None:
    """What docs/bring_your_checkpoint.md says of them."""
    rows = {row.row: row for row in read_rows(ROOT / "experiments" / "results" / "loading.jsonl")}
    for name in ("moejax, data=1", "moejax, expert=8"):
        found = rows[name].extra
        assert found["checkpoint_bytes"] == pytest.approx(2e9, rel=0.05) and len(found["file_bytes"]) == 4
        assert found["beyond_model_bytes"] < 1.2 * found["largest_shard_bytes"]
