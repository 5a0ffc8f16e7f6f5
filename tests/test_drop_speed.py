"""experiments.drop_speed at the sizes of a CPU: thresholds for rates, what rows say, the check before timing, and its
programs for CUDA."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import drop_layers, drop_scores, drop_speed, session
from kernels_pallas.grouped_matmul.mosaic_gpu import backend, trial
from kernels_pallas.rivals.timing import Timings
from moejax import limits
from moejax.config import ConfigError
from moejax.results import read_rows
from moejax.thresholds import Rule, ScoreTable
from tests.small import quick_compilation

TINY = ["--tiny", "--rates=0.25", "--batches=2", "--repeats=2", "--target_ms=0", "--noprofile"]
F = 256


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def run(output: Path, *arguments: str) -> int:
    return session.call(drop_speed.define_flags, drop_speed.command, [f"--output={output}", *TINY, *arguments])


# --- scores and thresholds ------------------------------------------------------------------------


def table_of(setting: drop_scores.Setting, tokens: int) -> tuple[ScoreTable, np.ndarray]:
    """Scores of the pairs, and loads, in NumPy."""
    x, kernel = drop_scores.make_tokens(setting, tokens), drop_scores.router_kernel(setting)
    logits = np.asarray(x, np.float32) @ np.asarray(kernel)
    chosen = np.argsort(-logits, axis=1)[:, : setting.moe.router.k]
    share = np.exp(np.take_along_axis(logits, chosen, 1))
    share /= share.sum(1, keepdims=True)
    table = ScoreTable(1)
    table.add(share[None], share[None], tokens)
    return table, np.bincount(chosen.reshape(-1), minlength=setting.moe.num_experts)


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v2_lite", "qwen3")]


@pytest.mark.parametrize("name", ["olmoe", "mixtral", *SLOWER])
def test_scores_drop_what_was_published(name: str):
    setting = dataclasses.replace(drop_scores.setting_of(name), dim=256)
    table, loads = table_of(setting, 3000)
    published = setting.shape.published
    if published is not None:
        assert table.rate(published[0], Rule(None)) == pytest.approx(published[1], abs=0.02)
    busiest = {8: 1.7, 64: 2.3, 128: 2.4}[len(loads)]  # as Dirichlet(5) has it on average
    assert loads.max() / loads.mean() == pytest.approx(busiest, rel=0.15)


def test_arms_drop_the_rate_and_half_of_it_by_halving():
    table, _ = table_of(dataclasses.replace(drop_scores.setting_of("olmoe"), dim=128), 2000)
    arms = drop_scores.arms_of(table, [0.0, 0.1, 0.5], F)
    labels = [arm.label for arm in arms]
    assert labels == ["none", "1T, 0%", *(f"{kind}, {rate}" for rate in ("10%", "50%")
                                          for kind in ("1T", "2T half", "2T 0.01"))]  # fmt: skip
    for arm in arms[1:]:
        rule = Rule(arm.facts["gap"], 0, F)
        assert table.rate(arm.facts["threshold"], rule) == pytest.approx(arm.rate, abs=2e-3)
        (limit,) = arm.limits
        assert isinstance(limit, limits.ThresholdDrop) and (limit.gap is None) == (arm.program == "1T")
        if arm.kind == "2T half":
            assert arm.facts["half_share"] == pytest.approx(0.5, abs=0.01)


# --- figures --------------------------------------------------------------------------------------


def test_speed_ups_are_of_pairs_of_timings():
    """A clock that slows down halfway counts for both."""
    clock = np.array([1.0, 1.0, 1.0, 3.0, 3.0])
    medians = {"none": 6.0, "1T, 25%": 4.0, "2T half, 25%": 5.0}
    times = {name: Timings(tuple(seconds * clock), 1) for name, seconds in medians.items()}
    found = drop_layers.figures(drop_scores.Arm("2T half", 0.25), times)
    assert found["value"] == pytest.approx(1.2) and found["interval"] == pytest.approx((1.2, 1.2))
    assert found["extra"]["speed_over_1t"] == pytest.approx(0.8) and found["extra"]["median_ms"] == 5000
    assert "speed_over_1t" not in drop_layers.figures(drop_scores.Arm("1T", 0.25), times)["extra"]
    assert drop_layers.of_limit(1.2, 1.25) == {
        "proportional_limit": 1.25, "share_of_proportional_limit": pytest.approx(0.96),
        "share_of_gain": pytest.approx(0.8),
    }  # fmt: skip


def test_calls_take_turns():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    made = drop_layers.in_turn(calls, 3, 0.0, per_call=4)
    assert [t.calls for t in made.values()] == [4, 4, 4] and all(len(t.seconds) == 3 for t in made.values())
    assert order[-9:] == list("abcbcacab")


def test_what_is_dropped_and_what_must_move():
    setting = drop_scores.setting_of("deepseek_v2_lite", tiny=True)  # 16 experts, top-4, 2 shared
    sizes = np.zeros((2, 32), int)
    sizes[0, :4] = 2, 1, 0, 4  # expert 0: two rows whole, one half; expert 1: four half
    sizes[1, 30] = 5  # expert 15: five whole
    told = drop_layers.dropped(setting, sizes, (F, F // 2), 4)
    assert told["pairs"] == 16 and told["drop_rate"] == pytest.approx(1 - (2 + 0.5 + 2 + 5) / 16)
    assert told["halved_pairs_share"] == pytest.approx(5 / 16)
    routed, shared = 4 * F, 2 * F
    assert told["drop_rate_with_shared_experts"] == pytest.approx(told["drop_rate"] * routed / (routed + shared))
    layer = jax.eval_shape(lambda: drop_scores.make_layer(setting))
    it = drop_layers.Ready(setting, layer, None, None, [], {}, {}, {})  # ty: ignore[invalid-argument-type]
    moved = drop_layers.moved(it, sizes, (F, F // 2), 3)
    assert moved["touched_experts"] == 1.5 and moved["touched_experts_major_only"] == 0.5
    column = 2 * 3 * 64
    fixed = column * shared + 4 * 64 * 16 + 2 * 2 * 3 * 64
    assert moved["bytes"] == pytest.approx(column * (F + F // 2 + F) / 2 + fixed)


# --- the command ----------------------------------------------------------------------------------


def test_a_wrong_output_is_not_timed():
    setting = drop_scores.setting_of("olmoe", tiny=True)
    arm = drop_scores.Arm("2T half", 0.3, (limits.threshold_drop(0.2, gap=0.04),))
    layer, x = drop_scores.make_layer(setting), drop_scores.make_tokens(setting, setting.tokens)[None]
    made = drop_layers.programs(drop_layers.layer_output, layer, x, [arm])
    sizes, facts = drop_layers.check(setting, layer, x, [arm], made)
    assert sizes[arm.label].shape == (32,) and 0 < facts[arm.label]["error"] < drop_layers.ERROR
    assert facts[arm.label]["checked_against"] == "padded, two sub-experts"

    def wrong(*arguments):
        y, sizes = made["2T"](*arguments)
        return y.at[0, 7].multiply(-1), sizes  # one token of 64

    with pytest.raises(ConfigError, match=r"WRONG: olmoe, 2T half, 30%: .*nothing was timed"):
        drop_layers.check(setting, layer, x, [arm], {"2T": wrong})


@pytest.mark.slow
def test_rows_of_all_parts(tmp_path: Path):
    output = tmp_path / "rows.jsonl"
    assert run(output) == 0
    rows = {(row.row, row.metric): row for row in read_rows(output)}
    arms = ("none", "1T, 25%", "2T half, 25%", "2T 0.01, 25%")
    for part in ("layer", "experts", "decode/2", "prefill"):
        mine = {row: made for (row, metric), made in rows.items() if metric == f"speedup/{part}"}
        assert set(mine) - {f"olmoe, opportunistic, keep={k}" for k in (1, 2)} == {f"olmoe, {arm}" for arm in arms}
        for name, row in mine.items():
            assert row.value is not None and row.interval is not None and row.interval[0] <= row.value
            assert row.extra["implementation"] == "cpu_tiled" and row.extra["repeats"] == 2
            assert ("speed_over_1t" in row.extra) == ("2T" in name)
            if part in ("layer", "experts"):
                rate = 0.0 if name.endswith("none") else 0.25
                assert row.extra["drop_rate"] == pytest.approx(rate, abs=0.01)
                assert row.extra["proportional_limit"] == pytest.approx(1 / (1 - row.extra["drop_rate"]))
                assert row.extra["error"] < drop_layers.ERROR and "OLMoE" in row.extra["scores"]
    assert rows["olmoe, 2T half, 25%", "speedup/experts"].extra["groups"] == 32
    none, kept = (rows[f"olmoe, {arm}", "speedup/decode/2"].extra for arm in ("none", "opportunistic, keep=1"))
    assert kept["touched_experts"] <= 2 < none["touched_experts"] <= 8
    assert kept["bound_by_bytes"] == pytest.approx(none["bytes"] / kept["bytes"])
    prefill = rows["olmoe, 2T 0.01, 25%", "speedup/prefill"].extra
    assert prefill["drop_rate"] == pytest.approx(0.25, abs=0.03) and len(prefill["thresholds"]) == 2


def test_what_no_time_is_left_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(drop_speed.time, "monotonic", iter([0.0, 11.0, 12.0]).__next__)
    assert run(tmp_path / "rows.jsonl", "--seconds=10", "--shape=olmoe") == 1
    told = capsys.readouterr().err
    assert "left out after --seconds=10: olmoe: layer, experts, decode; olmoe: model" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape=gpt"], "--shape=gpt: choose of olmoe, mixtral"),
        (["--parts=layers"], "--parts=layers: choose of layer, experts"),
        (["--rates=0.1,1"], "at least 0 and below 1"),
        (["--rates=much"], "--rates=much: shares of the routed work"),
        (["--batches=0"], "whole numbers of 1 or more"),
        (["--output=/nowhere/rows.jsonl"], "there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys, arguments: list[str], message: str):
    assert run(tmp_path / "rows.jsonl", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


LARGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("olmoe", "mixtral", "qwen3")]


@pytest.mark.parametrize("name", ["deepseek_v2_lite", *LARGER])
def test_two_thresholds_lower_for_cuda(name: str, monkeypatch: pytest.MonkeyPatch):
    """The whole layer of the published size, with extents: two kernels of our own."""
    monkeypatch.setattr(backend, "_hopper", lambda: None)
    setting = drop_scores.setting_of(name)
    layer = drop_layers.with_config(
        jax.eval_shape(lambda: drop_scores.make_layer(setting)), implementation="mosaic_gpu"
    )
    x = jax.ShapeDtypeStruct((1, setting.tokens, setting.dim), jnp.bfloat16)
    limit = (limits.threshold_drop(0.1, gap=0.02),)
    width = setting.moe.expert_dim
    assert drop_layers.flight_of(layer, x, limit).extents == (width, limits.major_columns(width))
    with trial.compiled_for("NVIDIA H100 80GB HBM3", 132):
        lowered = jax.jit(drop_layers.layer_output).trace(layer, x, limit).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 2
