"""Figures of expert load, by their formulas on loads that can be checked by hand."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax import metrics
from moejax.progress import load_cells, show_load
from moejax.report import build_report
from moejax.types import ClassSums, MoEMetrics

EVEN = [30.0, 30.0, 30.0, 30.0]
COLLAPSED = [60.0, 60.0, 0.0, 0.0]  # all 60 tokens on the same two experts
SKEWED = [60.0, 20.0, 20.0, 20.0]  # all tokens choose expert 0


def sums(
    routed: list[list[float]], tokens: float, dropped: float = 0.0, classes: ClassSums | None = None
) -> MoEMetrics:
    table = np.array(routed)
    layers = np.ones(len(table))
    zeros = np.zeros_like(table)
    return MoEMetrics(
        tokens=tokens * layers, routed=table, computed=table, dropped=dropped * layers, added=0 * layers,
        overflow=0 * layers, lost_tokens=0 * layers, prob_sum=zeros, gate_sum=zeros, load_prob_sum=table,
        z_sum=layers, entropy_sum=tokens * layers, by_class=classes,
    )  # fmt: skip


def test_figures_by_hand():
    figures = metrics.load_figures(np.array([EVEN, COLLAPSED, SKEWED]), np.full(3, 60.0), np.array([60.0, 0.0, 30.0]))
    np.testing.assert_array_equal(figures["utilisation"], [[1, 1, 1, 1], [2, 2, 0, 0], [2, 2 / 3, 2 / 3, 2 / 3]])
    np.testing.assert_array_equal(figures["max_over_mean"], [1, 2, 2])
    np.testing.assert_allclose(figures["cv"], [0, 1, math.sqrt((1 + 3 / 9) / 4)])
    np.testing.assert_array_equal(figures["dead"], [0, 2, 0])
    np.testing.assert_array_equal(figures["entropy"], [1, 0, 0.5])
    # k = 2 of E = 4: H runs from ln 2 to ln 4. Shares 1/2 and three times 1/6: H = ln(2) / 2 + ln(6) / 2
    skewed = (math.log(2) / 2 + math.log(6) / 2 - math.log(2)) / math.log(2)
    np.testing.assert_allclose(figures["load_entropy"], [1, 0, skewed], atol=1e-12)
    np.testing.assert_allclose(figures["busiest"], [0, 1, 1], atol=1e-12)


def test_where_there_is_no_choice_nothing_is_uneven():
    figures = metrics.load_figures(np.array([[60.0, 60.0]]), np.array([60.0]), np.array([0.0]))  # k = E
    assert figures["load_entropy"] == [1] and figures["busiest"] == [0]
    empty = metrics.load_figures(np.zeros((1, 4)), np.zeros(1), np.zeros(1))
    assert all(np.isfinite(value).all() for value in empty.values()) and empty["dead"] == [4]


@pytest.mark.parametrize("seed", range(3))
def test_bounds_of_any_load(seed: int):
    """Whatever k distinct experts tokens choose, both figures stay in [0, 1]."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3 * seed, 8) + rng.gumbel(size=(200, 8))
    routed = np.bincount(np.argsort(logits)[:, -3:].ravel(), minlength=8)[None].astype(float)
    figures = metrics.load_figures(routed, np.array([200.0]), np.array([0.0]))
    for name in ("load_entropy", "busiest"):
        assert 0 <= figures[name][0] <= 1
    assert figures["max_over_mean"][0] == pytest.approx(1 + figures["busiest"][0] * (8 / 3 - 1))


def classes(routed: np.ndarray, tokens: list[float], dropped: list[float]) -> ClassSums:
    """One layer; ``routed`` is [C, E]."""
    return ClassSums(np.array([tokens]), routed[None], np.array([dropped]), 0.5 * np.array([tokens]))


def test_a_row_adds_domains_up_and_names_classes():
    code = sums([EVEN], 60, dropped=12, classes=classes(np.array([EVEN, [0.0] * 4]), [60, 0], [12, 0]))
    prose = sums([COLLAPSED], 60, classes=classes(np.array([[0.0] * 4, COLLAPSED]), [0, 60], [0, 0]))
    row = metrics.load_row({"code": code, "prose": prose}, ("words", "digits"))
    total = np.array(EVEN) + COLLAPSED
    np.testing.assert_allclose(row["utilisation"], [total / 60])
    assert row["tokens"] == 120 and row["dropped_share"] == [12 / 240]
    assert row["by_domain"]["code"]["utilisation"] == [[1, 1, 1, 1]]
    assert row["by_domain"]["prose"]["dead"] == [2]
    assert row["by_domain"]["code"]["touched_share"] == 0.1 and row["by_domain"]["prose"]["touched_share"] == 0.0
    assert row["by_domain"]["code"]["dropped_share"] == [0.1] == row["by_class"]["words"]["dropped_share"]
    # shares of all pairs: 3/8, 3/8, 1/8, 1/8; of code a quarter each
    assert row["by_domain"]["code"]["distance"] == [0.25] and row["by_domain"]["prose"]["distance"] == [0.25]
    assert row["by_class"]["digits"]["utilisation"] == row["by_domain"]["prose"]["utilisation"]
    assert [part["share"] for part in row["by_class"].values()] == [0.5, 0.5]
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    alone = metrics.load_row({"code": code}, ("words", "digits"))
    assert list(alone["by_class"]) == ["words"]  # no token of the other
    assert "by_class" not in metrics.load_row({"code": sums([EVEN], 60)})


def test_the_share_that_limits_touched_is_of_all_layers_pairs():
    m = sums([[60.0, 60.0], [30.0, 30.0]], 60, dropped=9)
    assert metrics.touched_share(m) == 18 / 180
    m = dataclasses.replace(m, added=np.array([6.0, 0.0]), skipped=np.array([0.0, 12.0]))
    assert metrics.touched_share(m) == (18 + 6 + 12) / 180
    assert metrics.touched_share(dataclasses.replace(m, added=np.array([400.0, 0.0]))) == 1.0


def test_percentiles_over_layers():
    row = metrics.load_row({"a": sums([EVEN, COLLAPSED, SKEWED], 60)})
    assert row["percentiles"]["max_over_mean"] == {"p0": 1, "p50": 2, "p90": 2, "p100": 2}
    assert row["percentiles"]["dead"] == {"p0": 0, "p50": 0, "p90": pytest.approx(1.6), "p100": 2}


def test_sums_may_be_on_the_device_or_not():
    m = sums([EVEN], 60)
    there = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, np.float32), m)
    assert metrics.load_summary(there) == metrics.load_summary(m)


def shown(row: dict, capsys: pytest.CaptureFixture) -> str:
    show_load(row, "load:")
    return capsys.readouterr().err


def test_the_summary_in_a_pipe_is_plain_lines(capsys: pytest.CaptureFixture):
    both = {"code": sums([EVEN, SKEWED], 60, dropped=12), "prose": sums([COLLAPSED, SKEWED], 60)}
    text = shown(metrics.load_row(both) | {"layers": [1, 3]}, capsys)
    lines = text.splitlines()
    assert lines[0] == "load:" and lines[1].split()[:3] == ["tokens", "max/mean", "cv"]
    assert [line.split()[0] for line in lines[2:]] == ["layer", "layer", "code", "prose"]
    assert lines[2].split()[:3] == ["layer", "1", "1.50"] and lines[3].split()[:3] == ["layer", "3", "2.00"]
    assert lines[4].split()[:3] == ["code", "50.0%", "2.00"]  # of its worst layer
    assert "10.00%" in lines[4] and len({len(line) for line in lines[1:4]}) <= 2
    heard: list[str] = []
    show_load(metrics.load_row(both) | {"layers": [1, 3]}, "load:", heard.append)
    assert heard == lines


def test_many_layers_are_shown_by_percentiles_and_the_worst():
    loads = [[30.0 + i, 30.0 - i, 30.0, 30.0] for i in range(20)]
    cells = load_cells(metrics.load_row({"a": sums(loads, 60)}) | {"layers": list(range(20))})
    assert [line[0] for line in cells] == [
        "", "layers, p0", "layers, p50", "layers, p90", "layers, p100", "layer 17", "layer 18", "layer 19", "a",
    ]  # fmt: skip


def test_pairs_that_a_buffer_lost_have_a_column_where_there_are_any():
    loads = sums([EVEN, SKEWED], 60)
    assert "overflow" not in load_cells(metrics.load_row({"a": loads}) | {"layers": [1, 3]})[0]
    lost = dataclasses.replace(loads, overflow=np.array([0.0, sum(SKEWED) / 4]))
    cells = load_cells(metrics.load_row({"a": lost}) | {"layers": [1, 3]})
    assert [line[-1] for line in cells] == ["overflow", "0.00%", "25.00%", ""]


def report(workdir: Path, lines: list[dict]) -> str:
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return build_report([workdir]).read_text()


def test_the_report_shows_warnings_failures_and_loads(tmp_path: Path):
    both = {"code": sums([EVEN, SKEWED], 60, dropped=12), "prose": sums([COLLAPSED, SKEWED], 60)}
    load = {"kind": "load", "step": 4, "layers": [1, 3], **metrics.load_row(both)}
    warning = {"kind": "warning", "rule": "dead experts", "state": "onset", "text": "dead experts: layer 1"}
    by_layer = {"max_over_mean": [1.5, 2.0], "load_entropy": [0.9, 0.25], "entropy": [1.0, 0.5]}
    lines = [
        {"kind": "train", "step": 2, "loss": 2.0, "layers": by_layer},
        {**warning, "step": 4}, {**warning, "step": 2, "text": "the newest call began before that"},
        {"kind": "failure", "step": 5, "loss": math.nan, "grad_norm": math.inf, "param_norm": 1.0,
         "where": "in the middle", "layers": [{"layer": 0, "grad_norm": math.nan}]}, load,
    ]  # fmt: skip
    text = report(tmp_path, lines)
    assert "Stopped at step 5: loss nan, gradient norm inf, parameter norm 1. Where: in the middle." in text
    assert "the newest call began before that" in text and "dead experts: layer 1" not in text
    assert "Load entropy, over layers. Last: least 0.250 at step 2" in text
    heads = [text.index(f"{point}</th>") for point in ("p0", "p50", "p90", "p100")]
    assert heads == sorted(heads)
    assert "By domain: max / mean and dead experts of the worst of 2 layers" in text
    assert "By token class" not in text and "Could not be drawn" not in text


def test_the_report_of_a_healthy_or_older_run(tmp_path: Path):
    text = report(tmp_path, [{"kind": "train", "step": 2, "loss": 2.0}, {"kind": "load", "step": 2, "cv": [0.1]}])
    assert "No warning: no collapsing router" in text and "No expert load by domain has been logged" in text
    broken = [{"kind": "warning"}, {"kind": "load", "step": 2, "by_domain": {"a": {}}, "percentiles": {}}]
    assert "Warnings" in report(tmp_path, broken)
