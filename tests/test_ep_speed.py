"""experiments.ep_speed at a tiny size on 2 of the emulated devices: the rows, the checks before timing, the split."""

from pathlib import Path

import numpy as np
import pytest

from experiments import ep_speed, session
from moejax.dispatch import exchange
from moejax.results import read_rows
from tests.small import quick_compilation

TINY = ["--devices=2", "--mib=1", "--dim=64", "--experts=4", "--k=2", "--expert_dim=16", "--tokens=32", "--repeats=2",
        "--target_ms=0"]  # fmt: skip


def run(output: Path, *arguments: str) -> int:
    with quick_compilation():
        return session.call(ep_speed.define_flags, ep_speed.command, [f"--output={output}", *TINY, *arguments])


def test_a_transfer_is_a_share_of_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw = ep_speed.routing_tables
    monkeypatch.setattr(ep_speed, "KINDS", ("dirichlet5",))
    monkeypatch.setattr(ep_speed, "routing_tables", lambda *a: draw(*a, seed=1))
    output = tmp_path / "rows.jsonl"
    assert run(output, "--parts=transfer", "--factors=fit") == 0
    plain, *rows = read_rows(output)
    assert plain.value == 1.0
    assert [row.metric.partition("/")[2] for row in rows] == ["transfer", "packed", "send", "back"] * 2
    assert [row.extra["sent"] for row in rows] == ["pairs"] * 4 + ["tokens"] * 4
    assert {row.extra["sent_rows"] == row.extra["rows"] for row in rows[:4]} == {True}
    assert {row.extra["sent_rows"] for row in rows[4:]} == {rows[4].extra["pairs"]}  # k = 2 of 2 ranks: t rows to each
    for row in rows:
        extra = row.extra
        assert extra["useful_bytes"] == 2 * extra["pairs"] * 64 == 2**20
        assert row.value == pytest.approx(extra["plain_ms"] / extra["median_ms"])
        assert extra["buffer_factor"] * ep_speed.FITS % 1 == 0 and "overflow" not in extra
        assert extra["rows"] >= extra["buffer_factor"] * extra["pairs"]


def test_a_wrong_exchange_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(exchange.TRANSPORTS, "padded", lambda buffer, *rest: exchange.padded(buffer, *rest)[::-1])
    output = tmp_path / "rows.jsonl"
    assert run(output, "--parts=transfer", "--factors=0", "--send=pairs") == 2
    assert "WRONG: padded, pairs, uniform, 0, 1 MiB" in capsys.readouterr().err
    assert len(read_rows(output)) == 1  # the yardstick


@pytest.mark.slow
def test_a_layer_is_timed_by_each_exchange(tmp_path: Path):
    output = tmp_path / "rows.jsonl"
    assert run(output, "--parts=layer", "--factors=fit") == 0
    rows = read_rows(output)
    assert [row.row for row in rows] == [
        "layer, local, weights gathered", "layer, padded, pairs, fit", "layer, chunked 2, pairs, fit",
        "layer, padded, tokens, fit", "layer, chunked 2, tokens, fit",
    ]  # fmt: skip
    for row in rows:
        assert row.value > 0 and row.extra["error"] < 5e-3 and row.extra["overflow"] == 0
        assert "no device events" in row.extra["no_split"]


def test_tables_are_distinct_and_as_skewed_as_asked():
    setting = ep_speed.Setting(experts=8, k=3, dim=8, expert_dim=8, tokens=8, repeats=1, target_ms=0)
    loads = {}
    for kind in ep_speed.KINDS:
        table = ep_speed.routing_tables(kind, setting, 500, 2)
        assert table.shape == (1000, 3)
        assert (np.diff(np.sort(table, axis=1), axis=1) > 0).all()
        loads[kind] = np.bincount(table.reshape(-1), minlength=8) / table.size * 8
        factor = ep_speed.fitting_factor(table, setting, 2)
        most = max((rank // 4 == to).sum() for rank in table.reshape(2, -1) for to in (0, 1))
        assert factor - 1 / ep_speed.FITS < most / 750 <= factor
    assert loads["uniform"].max() < 1.1 < 1.3 < loads["dirichlet5"].max()


def test_settings_of_the_transport_are_told():
    flag = "--xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel=false"
    environment = {"NCCL_P2P_DISABLE": "1", "XLA_FLAGS": f"--xla_other=1 {flag}", "NCCL_DEBUG": "INFO"}
    assert ep_speed.transport_settings(environment) == ["NCCL_P2P_DISABLE=1", f"XLA_FLAGS={flag}"]
    assert ep_speed.transport_settings({}) == []


PROGRAM = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %dot.1 = f32[8] dot(%x), metadata={op_name="jit(run)/route/dot_general" stack_frame_id=1}
  %sort.2 = f32[8] sort(%x), metadata={op_name="jit(run)/shard_map/dispatch/sort"}
  %all-to-all.3 = f32[8] all-to-all(%x), metadata={op_name="jit(run)/shard_map/dispatch/communicate/all_to_all"}
  %fusion.4 = f32[8] fusion(%x), metadata={op_name="jit(run)/transpose(jvp(experts))/mul"}
  ROOT %add.5 = f32[8] add(%x), metadata={op_name="jit(run)/combine/add"}
}
"""


def test_a_profile_is_split_by_named_scopes():
    parts = ep_speed.parts_of_program(PROGRAM)
    assert parts == {"dot.1": "route", "sort.2": "permute", "all-to-all.3": "communicate", "fusion.4": "experts",
                     "add.5": "combine"}  # fmt: skip
    events = [("dot_1", 1.0), ("sort_2", 2.0), ("ncclDevKernel_SendRecv(int)", 9.0), ("fusion_4", 4.0),
              ("grouped_gate_up_mosaic_gpu_kernel", 3.0), ("grouped_matmul_mosaic_gpu_kernel", 1.0),
              ("gather_rows_mosaic_gpu_kernel", 0.25), ("scatter_rows_mosaic_gpu_kernel", 0.25),
              ("combine_rows_mosaic_gpu_kernel", 0.25), ("add_5", 5.0), ("MemcpyD2D", 7.0)]  # fmt: skip
    assert ep_speed.split_of_events(events, parts) == {
        "route": 1.0, "permute": 2.5, "communicate": 9.0, "experts": 8.0, "combine": 5.25, "other": 7.0,
    }  # fmt: skip
    assert ep_speed.split_of_events([], parts) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=1"], "one device exchanges nothing"),
        (["--experts=5"], "--experts=5 must divide over 2 devices"),
        (["--exchanges=ragged"], "cannot run on a CPU"),
        (["--exchanges=fast"], "--exchanges=fast: choose of padded, ragged"),
        (["--factors=-1"], "--factors=-1: give 'fit', 0 or a positive number"),
        (["--parts=all"], "--parts=all: choose of transfer, layer"),
        (["--send=rows"], "--send=rows: choose of pairs, tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys, arguments: list[str], message: str):
    assert run(tmp_path / "rows.jsonl", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_page_shows_the_committed_rows():
    root = Path(__file__).parent.parent
    page = (root / "docs/expert_parallelism.md").read_text(encoding="utf-8")
    rows = read_rows(root / "experiments/results/expert_parallelism_h200x2.jsonl")
    value = {(row.row, row.metric): row.value for row in rows}
    for label, shown in (
        *((f"padded, {sent}, uniform, fits, {mib} MiB",) * 2 for sent in ("pairs", "tokens") for mib in (64, 256)),
        *((f"padded, {sent}, uniform, fits, 64 MiB, NCCL_P2P_DISABLE=1",) * 2 for sent in ("pairs", "tokens")),
        ("ragged, uniform, fits, 64 MiB", ""),
    ):  # fmt: skip
        parts = ("transfer", "packed", "send", "back") if shown else ("transfer", "packed", "send")
        shares = [value[label, f"share of plain all-to-all/{what}"] for what in parts]
        assert "| " + " | ".join(f"{100 * share:.1f} %" for share in shares) + (" |" if shown else " | - |") in page
    for sent in ("tokens", "pairs"):
        fit, worst = (value[f"layer, padded, {sent}, {f}", "milliseconds/forward"] for f in ("fit", "0"))
        assert f"| `padded`, {sent} | {fit:.2f} ms | {worst:.2f} ms |" in page
        assert sent == "pairs" or f"costs {100 * (worst / fit - 1):.0f} % more than buffers that fit" in page
    for label in ("chunked 2, tokens, fit", "chunked 2, pairs, fit", "chunked 2, pairs, 0", "local, weights gathered"):
        assert f"{value[f'layer, {label}', 'milliseconds/forward']:.2f} ms" in page
