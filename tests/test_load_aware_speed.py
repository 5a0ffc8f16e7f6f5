"""experiments.load_aware_speed at a tiny size on 2 of the emulated devices: what its rows count, the check before."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import drop_layers, drop_scores, load_aware_speed, rank_layers, session
from moejax import limits
from moejax.config import MoEConfig, RouterConfig
from moejax.results import read_rows
from moejax.types import RouteContext
from tests.small import quick_compilation

TINY = ["--tiny", "--devices=2", "--repeats=1", "--target_ms=0"]


def run(output: Path, *arguments: str) -> int:
    call = [f"--output={output}", *TINY, *arguments]
    with quick_compilation():
        return session.call(load_aware_speed.define_flags, load_aware_speed.command, call)


@pytest.mark.parametrize("in_force", [(limits.threshold_drop(0.3, gap=0.1),), ()])
def test_counts_of_virtual_ranks_are_those_of_a_loop(in_force):
    setting = drop_scores.setting_of("olmoe", tiny=True)
    with quick_compilation():
        layer = drop_layers.with_config(drop_scores.make_layer(setting), virtual_ranks=2)
        x = drop_scores.make_tokens(setting, 2 * setting.tokens).reshape(2, setting.tokens, -1)
        begin = jax.jit(lambda layer, x: layer.begin(x, RouteContext(record=True), in_force).record)
        record = jax.device_get(begin(layer, x))
    kept = record.kept
    decided = rank_layers.of_ranks((record.made.expert, kept.expert, kept.valid, kept.level), 2)
    found = rank_layers.counted(*decided, experts=setting.moe.num_experts)
    _, expert, valid, level = decided
    work, to, half = np.zeros(2), np.zeros((2, 2)), setting.moe.num_experts // 2
    for source, token, k in np.argwhere(valid):
        device = int(expert[source, token, k]) // half
        work[device] += 0.5 if level is not None and level[source, token, k] else 1.0
        to[source, device] += 1
    np.testing.assert_array_equal(found.work, work)
    share = to.max() / (setting.tokens * setting.moe.router.k / 2)
    assert share <= found.factor < share + 1 / 64


def test_rows_say_what_travels():
    config = MoEConfig(num_experts=8, router=RouterConfig(k=4), dispatcher="ep", ep_buffer_factor=0.5)
    assert rank_layers.sent(config, 64, 2) == "pairs"  # 64 of them for each rank
    assert rank_layers.sent(dataclasses.replace(config, ep_buffer_factor=1.0), 64, 2) == "tokens"


def test_thresholds_by_load_drop_less_for_the_same_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arms = load_aware_speed.arms_of
    monkeypatch.setattr(load_aware_speed, "arms_of", lambda *a: [arm for arm in arms(*a) if arm.label[:2] != "1T"])
    output = tmp_path / "rows.jsonl"
    assert run(output) == 0
    none, *rows = read_rows(output)
    assert [row.row for row in rows] == ["olmoe, 2T", "olmoe, 2T, paper", "olmoe, 2T, water"]
    assert none.value == 1 and none.extra["drop_rate"] == 0 and none.extra["max_over_mean"] > 1
    everywhere, paper, water = (row.extra for row in rows)
    assert everywhere["drop_rate"] == pytest.approx(0.25, abs=0.02)
    assert water["predicted"] == everywhere["predicted"] > 1  # the busiest rank drops as much
    assert water["drop_rate"] < paper["drop_rate"] < everywhere["drop_rate"]
    for row in rows:
        extra = row.extra
        assert extra["predicted"] == max(none.extra["work_by_rank"]) / max(extra["work_by_rank"])
        assert extra["share_of_predicted"] == row.value / extra["predicted"]


@pytest.mark.slow  # the same check: tests/test_drop_speed.py
def test_a_wrong_output_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(load_aware_speed, "arms_of", lambda *a: [rank_layers.NONE])
    monkeypatch.setattr(rank_layers, "difference", lambda a, b: (1.0, 0.5))
    assert run(tmp_path / "rows.jsonl") == 2
    assert "WRONG: olmoe, none: 50.00% of the tokens" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_flags_that_cannot_be_measured(tmp_path: Path, capsys):
    assert run(tmp_path / "rows.jsonl", "--shape=gpt") == 2
    assert "--shape=gpt: choose of olmoe" in capsys.readouterr().err
    assert run(tmp_path / "rows.jsonl", "--devices=1") == 2
    assert "1 devices: olmoe needs two or more" in capsys.readouterr().err
