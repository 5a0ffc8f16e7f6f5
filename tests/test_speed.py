"""experiments.speed: a row for each back end and pass, from one tiny config."""

import dataclasses

import pytest

from experiments import speed
from moejax.results import read_rows
from tests.small import small_config, small_model

pytestmark = pytest.mark.usefixtures("compiled_once")


def config_of_one_layer():
    config = small_config(dataclasses.replace(small_model(first_dense=0, every=1), num_layers=1), steps=4, batch_size=8)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=16))


def test_a_row_for_each_back_end_and_pass_and_one_that_refuses_says_why(tmp_path):
    said = []
    code = speed.measure(config_of_one_layer(), ["auto", "ref", "mosaic_gpu"], tmp_path / "r.jsonl", 2, said.append)
    assert code == 0
    rows = {(row.row, row.metric): row for row in read_rows(tmp_path / "r.jsonl")}
    assert len(rows) == 6
    for name in ("cpu_tiled", "ref"):  # auto is written under the name of what it chose
        for which in ("train", "evaluate"):
            row = rows[name, f"tokens_per_s/{which}"]
            assert row.value is not None
            assert row.extra["p10"] <= row.value <= row.extra["p90"]
            assert row.extra["repeats"] == 2
    ours, ref = (rows[name, "tokens_per_s/train"].extra for name in ("cpu_tiled", "ref"))
    for name in ("first_loss", "first_grad_norm"):
        assert ours[name] == pytest.approx(ref[name], rel=1e-4)
    refused = rows["mosaic_gpu", "tokens_per_s/train"]
    assert refused.value is None
    assert "Hopper" in refused.extra["not_run"]


def test_gradients_that_differ_are_no_figures(tmp_path, monkeypatch):
    timed = {which: speed.Timed((1.0,), 1.0, {}) for which in ("train", "evaluate")}
    firsts = iter([(2.0, 1.0), (2.0, 1.1)])
    monkeypatch.setattr(speed, "time_passes", lambda *args: (timed, next(firsts)))
    said = []
    code = speed.measure(config_of_one_layer(), ["auto", "ref"], tmp_path / "r.jsonl", 1, said.append)
    assert code == 1
    assert {row.row for row in read_rows(tmp_path / "r.jsonl")} == {"cpu_tiled"}
    assert any("WRONG: ref" in line for line in said)
