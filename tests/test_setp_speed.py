"""experiments.setp_speed at a tiny size on emulated devices: what each way sends, the check before timing, rows."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import session, setp_speed
from experiments.ep_speed import Setting, routing_tables
from moejax.config import ConfigError
from moejax.plan.compiled import collective_bytes
from moejax.results import read_rows
from moejax.types import Routing
from tests.small import quick_compilation

TOKENS = 32
COUNTS = {
    "ETP": {"all-gather": 2, "all-to-all": 3, "reduce-scatter": 1},  # rows out, rows back, and counts of rows
    "ETP, tokens first": {"all-gather": 2, "all-to-all": 3, "reduce-scatter": 1},  # the second: experts of each token
    "S-ETP": {"all-to-all": 3},
    "S-ETP, tokens": {"all-to-all": 4},  # gate weights too
}


def run(output: Path, *arguments: str) -> int:
    with quick_compilation():
        return session.call(
            setp_speed.define_flags, setp_speed.command, [f"--output={output}", "--tiny", "--repeats=1", *arguments]
        )


@pytest.mark.parametrize(
    ("groups", "tensor", "ways"),
    [
        (4, 2, ("ETP", "S-ETP", "S-ETP, tokens")),
        pytest.param(4, 2, setp_speed.WAYS, marks=pytest.mark.slow),
        pytest.param(2, 4, setp_speed.WAYS, marks=pytest.mark.slow),
    ],
)
def test_what_each_way_sends(groups: int, tensor: int, ways: tuple[str, ...]):
    """Collectives of the compiled programs; bytes of the two ways of the paper are equal where buffers fit."""
    setting = Setting(experts=8, k=2, dim=16, expert_dim=8, tokens=TOKENS, repeats=1, target_ms=0)
    grid = setp_speed.Grid(groups, tensor, 8)
    expert = routing_tables("uniform", setting, TOKENS, 8)
    x = jax.ShapeDtypeStruct((8 * TOKENS, 16), jnp.float32)
    sent, pairs_of = {}, {}
    for way in ways:
        factor = setp_speed.fitted(expert, grid, way)
        with quick_compilation():
            made = setp_speed.compiled(
                setp_speed.round_trip(setting, grid, way, factor, check=True), grid.mesh(way), (x, expert)
            )
        text = made.as_text()
        assert setp_speed.counted(text) == COUNTS[way], way
        rows = setp_speed.buffer_size(setting, grid, way, factor, TOKENS)
        pairs_of[way] = rows
        sent[way] = setp_speed.wire_bytes(setting, grid, way, rows, TOKENS)
        found, unknown = collective_bytes(text)
        ranks, ids = (8, 8 * tensor) if way.startswith("S-ETP") else (groups, 8)
        counts = 4 * ids * (ranks - 1) / ranks  # of the rows for each expert, int32
        from_text = found["all-to-all"] * (ranks - 1) / ranks - counts
        # A result of all devices' arrays, of which one's own is not sent; a result that all others' parts are added to.
        from_text += (found.get("all-gather", 0) / tensor + found.get("reduce-scatter", 0)) * (tensor - 1)
        if way == "S-ETP, tokens":  # a place and a weight for each pair, and the number of tokens
            from_text -= (2 * 4 * pairs_of["S-ETP"] + 4 * ranks) * (ranks - 1) / ranks
        if way == "ETP":
            from_text -= 4 * 8 / groups * (tensor - 1)  # sizes of a group's experts
        if way == "ETP, tokens first":
            from_text -= 4 * TOKENS * 2 * (tensor - 1)  # experts of each token
        assert sent[way] == from_text and unknown == 0
        most = np.stack([np.bincount(e, minlength=groups) for e in expert.reshape(8, -1) // (8 // groups)]).max()
        if way == "ETP":
            assert most <= rows / groups < most + 8
    assert sent["ETP"] == sent["S-ETP"]


def test_rows_are_written_for_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(setp_speed, "checked", lambda *args: None)  # another test's
    output = tmp_path / "rows.jsonl"
    assert run(output, "--devices=4", "--measure=collectives") == 0
    rows = read_rows(output)
    assert [row.row for row in rows] == [f"{way}, 2 x 2 devices, 0.01 MiB" for way in setp_speed.WAYS]
    for row in rows:
        extra = row.extra
        assert row.value == pytest.approx(extra["input_bytes"] / extra["median_ms"] / 1e6)
        assert extra["input_bytes"] == 4 * 64 * extra["tokens"] and extra["type"] == "float32"
        expected = dict(zip(("all-gather", "all-to-all", "reduce-scatter"), (1, 2, 1), strict=True))
        assert extra["collectives"] == ({"all-to-all": 2} if row.row.startswith("S-ETP") else expected)
    assert rows[0].extra["times_as_fast"] == 1 and rows[0].extra["wire_bytes"] == rows[2].extra["wire_bytes"]


@pytest.mark.slow
def test_a_layer_and_whole_trips_are_checked_and_timed(tmp_path: Path):
    output = tmp_path / "rows.jsonl"
    assert run(output, "--devices=4", "--measure=trip,layer") == 0
    rows = read_rows(output)
    trips, layers = rows[:4], {row.row: row for row in rows[4:]}
    assert all(row.metric == "bandwidth/trip" and row.value > 0 for row in trips)
    true, true_tokens, soft, soft_tokens = (
        layers[f"layer, {label}, 2 x 2 devices"].extra
        for label in ("ETP by the mesh axis model", "ETP by the mesh axis model, tokens", "S-ETP", "S-ETP, tokens")
    )
    assert len(layers) == 4 and all(row["error"] < 1e-5 for row in (true_tokens, soft, soft_tokens))
    assert soft["collectives"] == {"all-to-all": 3} and soft_tokens["collectives"] == {"all-to-all": 4}
    assert true["collectives"] == {"all-to-all": 3, "all-reduce": true["in_loops"]}
    assert true_tokens["collectives"] == {"all-to-all": 4, "all-reduce": true_tokens["in_loops"]}


def test_a_layer_alone_exchanges_no_rows_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(setp_speed, "bandwidth_rows", lambda *args: asked.append("bandwidth") or [])
    monkeypatch.setattr(setp_speed, "layer_rows", lambda *args: asked.append("layer") or [])
    assert run(tmp_path / "rows.jsonl", "--devices=4", "--measure=layer") == 0 and asked == ["layer"]
    assert run(tmp_path / "rows.jsonl", "--devices=4", "--measure=trip") == 0 and asked == ["layer", "bandwidth"]


def test_what_does_not_come_back_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    """Each part of an expert swapped with that of its neighbour in the group."""
    spread = setp_speed.Grid.spread

    def swapped(grid: setp_speed.Grid, table: Routing) -> Routing:
        made = spread(grid, table)
        return dataclasses.replace(made, expert=made.expert ^ 1)

    setting = Setting(experts=4, k=2, dim=16, expert_dim=8, tokens=TOKENS, repeats=1, target_ms=0)
    x = np.ones((4 * TOKENS, 16), np.float32)
    args = (setting, setp_speed.Grid(2, 2, 4), "S-ETP", 0.0, x, routing_tables("uniform", setting, TOKENS, 4))
    with quick_compilation():
        monkeypatch.setattr(setp_speed.Grid, "spread", swapped)
        with pytest.raises(ConfigError, match=r"WRONG: S-ETP: [1-9]"):
            setp_speed.checked(*args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor=3"], "--tensor=3: devices that share an expert, 2 or more, must divide the 8 devices"),
        (["--tensor=1"], "--tensor=1"),
        (["--experts=5"], "--experts=5 must divide over 4 groups"),
        (["--expert_dim=7"], "--expert_dim=7 must divide over --tensor=2"),
        (["--measure=all"], "--measure=all: choose of collectives, trip, layer"),
        (["--mib=0"], "--mib=0: give numbers above 0"),
        (["--factor=-1"], "--factor=-1: give 'fit', 0 or a positive number"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys, arguments: list[str], message: str):
    assert run(tmp_path / "rows.jsonl", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()
