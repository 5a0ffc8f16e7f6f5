"""One training step: what it optimises, what it must not depend on, and what it leaves alone."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import checkpoint, count, losses, routing
from moejax.config import AttentionConfig, ExperimentConfig, MeshConfig, ModelConfig, RouterConfig, TrainConfig
from moejax.meter import Meter
from moejax.model import build
from moejax.progress import TrainProgress
from moejax.sharding import make_mesh
from moejax.train import StepMetrics, Trainer, TrainState, optimizer, schedule, token_nll
from tests.small import VOCAB, flat, quick_compilation, random_batch, small_config, small_model, start

BYTE_LENGTHS = np.arange(VOCAB) % 4  # ids 0, 4, 8, ... stand for no text


def light(model: ModelConfig, layers: int) -> ModelConfig:
    """With fewer operations to compile."""
    return dataclasses.replace(model, num_layers=layers, activation="relu", attention=AttentionConfig(2, 2, 8))


ONE_LAYER = light(small_model(first_dense=0, every=1), 1)
BIAS = RouterConfig(name="sigmoid_bias", bias_update_rate=0.125)


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def trainer(config: ExperimentConfig, devices: int = 1) -> Trainer:
    return Trainer(config, BYTE_LENGTHS, make_mesh(MeshConfig(), jax.devices()[:devices]))


def steps(made: Trainer, count: int) -> tuple[TrainState, list[StepMetrics]]:
    state, metrics = start(made), []
    for seed in range(count):
        state, m = made.step(state, random_batch(seed=seed))
        metrics.append(jax.device_get(m))
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def plain() -> Trainer:
    return trainer(small_config(ONE_LAYER))


@pytest.fixture(scope="module")
def three_steps(plain: Trainer) -> tuple[TrainState, list[StepMetrics]]:
    return steps(plain, 3)


# --- the step -----------------------------------------------------------------------------------------------------


def test_a_repeated_batch_is_learnt(plain: Trainer):
    state, batch = start(plain), random_batch()
    seen = []
    for _ in range(4):
        state, metrics = plain.step(state, batch)
        seen.append(float(metrics.ce))
    assert int(state.step) == 4
    assert seen[1] < seen[0] - 0.02
    assert seen[3] < seen[1]


def test_the_same_start_gives_the_same_run(plain: Trainer, three_steps: tuple):
    chex.assert_trees_all_equal(flat(steps(plain, 3)[0]), flat(three_steps[0]))


def test_initialisation(plain: Trainer):
    """Sizes as counted, about uniform predictions, and no two matrices alike; the seed decides."""
    other = flat(trainer(small_config(ONE_LAYER, seed=1)).init().params)
    state = plain.init()
    params = flat(state.params)
    assert sum(leaf.size for leaf in params.values()) == count.parameters(ONE_LAYER).total
    assert int(state.step) == 0
    for name, leaf in params.items():
        kind = name.rpartition("/")[2]
        if kind in MATRICES:
            fan_in = leaf.shape[-2] if kind in ("up", "down", "gate", "kernel") else 16
            assert leaf.std() == pytest.approx(1 / math.sqrt(fan_in), rel=0.25), name
            assert not np.array_equal(leaf, other[name]), name
        else:
            assert set(np.unique(leaf)) == {1.0 if kind == "scale" else 0.0}, name
    assert not np.array_equal(*(leaf for name, leaf in params.items() if name.endswith(("attention/k", "attention/v"))))
    batch = random_batch()
    ce = float(plain.step(state, batch)[1].ce)
    assert ce == pytest.approx(math.log(VOCAB), rel=0.25)


def test_loss_is_per_token_of_the_mask_and_bits_are_of_text(plain: Trainer):
    batch = random_batch()
    state = start(plain)

    @jax.jit
    def forward(params: nnx.State, router_state: nnx.State, piece: dict) -> tuple[jax.Array, Any]:
        model = nnx.merge(plain.graphdef, params, router_state)
        out = model(piece["tokens"], positions=piece["positions"], segment_ids=piece["segment_ids"], mask=piece["mask"])
        return token_nll(out.logits, piece["targets"]), out.metrics

    piece = {name: leaf[0] for name, leaf in batch.items()}
    nll, moe = jax.device_get(forward(state.params, state.router_state, piece))
    mask, targets = piece["mask"], piece["targets"]
    text = mask & (BYTE_LENGTHS[targets] > 0)
    assert 0 < text.sum() < mask.sum() < mask.size
    _, metrics = plain.step(state, batch)
    assert float(metrics.tokens) == mask.sum()
    assert float(metrics.ce) == pytest.approx(nll[mask].mean(), rel=1e-5)
    assert float(metrics.nll) == pytest.approx(nll[text].sum(), rel=1e-5)
    assert float(metrics.text_bytes) == BYTE_LENGTHS[targets][mask].sum()
    weighted, raw = losses.total(moe, dict(plain.config.model.moe.losses))
    assert float(metrics.loss - metrics.ce) == pytest.approx(float(weighted), rel=1e-4)
    assert {name: pytest.approx(float(value), rel=1e-4) for name, value in raw.items()} == metrics.aux


def test_masked_targets_change_nothing(plain: Trainer):
    batch = random_batch()
    other = {**batch, "targets": np.where(batch["mask"], batch["targets"], 7)}
    assert not np.array_equal(other["targets"], batch["targets"])
    one, m1 = plain.step(start(plain), batch)
    two, m2 = plain.step(start(plain), other)
    chex.assert_trees_all_equal(flat(one.params), flat(two.params))
    assert float(m1.loss) == float(m2.loss)


def test_token_nll_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]])) + 3.0  # a shift changes nothing
    np.testing.assert_allclose(token_nll(logits, jnp.array([[0, 2]])), [[math.log(2), -math.log(0.8)]], rtol=1e-6)


# --- independence of how a batch is cut ---------------------------------------------------------------------------


def gradients(config: ExperimentConfig) -> tuple[dict[str, np.ndarray], StepMetrics]:
    """Gradients of the first batch: the optimizer's update is replaced by the gradient itself."""
    made = trainer(config)

    class Keep:
        init = made.optimizer.init

        @staticmethod
        def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            del params
            return grads, state

    made.optimizer = Keep  # type: ignore[assignment]
    before = flat(start(made).params)
    after, metrics = made.step(start(made), random_batch(micros=config.train.accumulate))
    after = flat(after.params)
    return {name: after[name] - before[name] for name in before}, jax.device_get(metrics)


# Large coefficients, so that a wrong auxiliary gradient cannot hide behind the cross entropy's.
AUX = light(small_model(first_dense=0, every=1, losses=(("balance", 1.0), ("importance", 0.5), ("z", 0.1))), 1)


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, np.ndarray], StepMetrics]:
    return gradients(small_config(AUX))


# 4 is slow: the program with a loop over 4 micro-batches also runs in the next test, and 2 hold the law.
@pytest.mark.parametrize("accumulate", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_batch_scope_makes_micro_batches_exact(whole: tuple, accumulate: int):
    grads, metrics = gradients(small_config(AUX, accumulate=accumulate))
    assert whole[0].keys() == grads.keys()
    for name, expected in whole[0].items():
        # A gradient is read as a difference of float32 parameters of size 1, so to 1e-6.
        np.testing.assert_allclose(grads[name], expected, rtol=1e-4, atol=2e-6, err_msg=name)
    for field in ("loss", "ce", "nll", "text_bytes", "tokens", "grad_norm"):
        np.testing.assert_allclose(getattr(metrics, field), getattr(whole[1], field), rtol=1e-5, err_msg=field)
    np.testing.assert_array_equal(metrics.moe.routed, whole[1].moe.routed)
    router = next(v for name, v in whole[0].items() if name.endswith("router/arrays/kernel"))
    assert np.abs(router).max() > 1e-3


def test_micro_scope_differs_where_micro_batches_are_uneven(whole: tuple):
    grads, metrics = gradients(small_config(AUX, accumulate=4, balance_scope="micro"))
    router = next(name for name in grads if name.endswith("router/arrays/kernel"))
    assert np.abs(grads[router] - whole[0][router]).max() > 1e-3
    assert float(metrics.ce) == pytest.approx(float(whole[1].ce), rel=1e-5)  # the cross entropy does not


def test_eight_devices_equal_one(three_steps: tuple):
    made = trainer(small_config(ONE_LAYER), devices=8)
    state, metrics = steps(made, 3)
    assert made.step_fn.found == []  # the state comes out as it went in: one program for all steps
    for name, expected in flat(three_steps[0]).items():
        # Adam divides by the root of a squared gradient, so a rounding error of a tiny one shows more than linearly.
        np.testing.assert_allclose(flat(state)[name], expected, rtol=1e-3, atol=2e-5, err_msg=name)
    for one, eight in zip(three_steps[1], metrics, strict=True):
        assert float(eight.loss) == pytest.approx(float(one.loss), rel=1e-5)
        np.testing.assert_array_equal(eight.moe.routed, one.moe.routed)


# --- optimizer ----------------------------------------------------------------------------------------------------

MATRICES = {"embed", "q", "k", "v", "o", "up", "down", "gate", "kernel"}
VECTORS = {"scale", "q_bias", "k_bias", "v_bias"}


def test_weight_decay_touches_matrices_only():
    """With a zero gradient AdamW multiplies what it decays by 1 - rate x decay, and leaves the rest."""
    made = trainer(small_config(learning_rate=0.5, weight_decay=0.5))
    assert {leaf.ndim for leaf in flat(start(made).params).values()} == {1, 2, 3, 4}  # most are stacked over layers
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), made.abstract.params)
    zeros = jax.tree.map(np.zeros_like, ones)
    updates, _ = jax.jit(made.optimizer.update)(zeros, made.optimizer.init(ones), ones)
    seen = set()
    for name, update in flat(updates).items():
        kind = name.rpartition("/")[2]
        seen.add(kind)
        np.testing.assert_allclose(update, -0.25 if kind in MATRICES else 0.0, err_msg=name)
    assert seen == MATRICES | VECTORS


def test_weight_decay_touches_every_matrix_of_latent_attention():
    """The rotary key's has no heads: its width is an axis of its own."""
    latent = AttentionConfig(
        kind="latent", num_heads=2, num_kv_heads=2, head_dim=4, rope_head_dim=2, value_head_dim=4, query_rank=4,
        latent_rank=4, bias=True, output_bias=True,
    )  # fmt: skip
    abstract = jax.eval_shape(lambda: build(dataclasses.replace(ONE_LAYER, attention=latent)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), nnx.split(abstract, nnx.Param, ...)[1])
    tx = optimizer(TrainConfig(learning_rate=0.5, weight_decay=0.5, warmup_steps=0), params)
    updates, _ = jax.jit(tx.update)(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    attention = {n.rpartition("attention/")[2]: np.any(u) for n, u in flat(updates).items() if "attention/" in n}
    vectors = {"q_down_bias", "kv_down_bias", "k_rope_bias", "o_bias", "q_down_norm/scale", "kv_norm/scale"}
    assert {name for name, decays in attention.items() if not decays} == vectors
    assert {"k_rope", "q_down", "q", "kv_down", "k_up", "v_up", "o"} == attention.keys() - vectors


def test_gradients_are_clipped_by_global_norm():
    made = trainer(small_config(ONE_LAYER, clip_norm=1e-3))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), made.abstract.params)
    _, state = jax.jit(made.optimizer.update)(ones, made.optimizer.init(ones), ones)
    first = [leaf for name, leaf in flat(state).items() if "/mu/" in name]
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in first))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-4)  # (1 - b1) of the clipped gradient


def test_schedule_by_hand():
    rate = schedule(TrainConfig(steps=110, warmup_steps=10, learning_rate=2.0, final_fraction=0.1))
    assert [float(rate(s)) for s in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0])
    assert float(rate(60)) == pytest.approx((2.0 + 0.2) / 2)  # half way down the cosine
    assert [float(rate(s)) for s in (110, 500)] == pytest.approx([0.2, 0.2])
    assert float(schedule(TrainConfig(steps=10, warmup_steps=0, learning_rate=2.0))(0)) == pytest.approx(2.0)


# --- router state -------------------------------------------------------------------------------------------------


def test_selection_bias_moves_by_its_rule_alone():
    """5 layers, the first dense, then one MoE in two: groups, patterns and repeats must map onto metrics in order."""
    made = trainer(small_config(light(small_model(BIAS), 5)))
    state = start(made)
    (name,) = flat(state.router_state)
    assert name == "groups/1/blocks/1/moe/router/arrays/bias"
    for untouched in (state.params, state.opt_state):
        assert not any(key.endswith("arrays/bias") for key in flat(untouched))
    expected = np.zeros((2, 4), np.float32)
    for seed in range(3):
        before = flat(state.router_state)[name]
        np.testing.assert_array_equal(before, expected)
        state, metrics = made.step(state, random_batch(seed=seed))
        routed = np.asarray(metrics.moe.routed)
        assert routed.shape == (2, 4)
        assert (np.sign(routed[0] - routed[0].mean()) != np.sign(routed[1] - routed[1].mean())).any()
        expected = before + 0.125 * np.sign(routed.mean(axis=1, keepdims=True) - routed)
    np.testing.assert_array_equal(flat(state.router_state)[name], expected)


def test_an_update_rule_sees_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """A rule is written for ``routed[E]``: a mean over all its elements must not mix stacked layers."""

    def rule(state: dict, routed: jax.Array, config: RouterConfig, num_experts: int) -> dict:
        return {"bias": state["bias"] + routed - jnp.mean(routed)}

    family = dataclasses.replace(routing.FAMILIES["sigmoid_bias"], update=rule)
    monkeypatch.setitem(routing.FAMILIES, "sigmoid_bias", family)
    made = trainer(small_config(light(small_model(BIAS), 5)))
    abstract = jax.eval_shape(made._step, made.abstract, random_batch())[1].moe
    counts = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    routed = np.array([[1, 2, 3, 4], [10, 20, 30, 60]], np.float32)
    new = made._update_routers(start(made).router_state, dataclasses.replace(counts, routed=routed))
    (bias,) = flat(new).values()
    np.testing.assert_allclose(bias, routed - routed.mean(axis=1, keepdims=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_model_without_experts_has_no_expert_metrics(accumulate: int):
    made = trainer(small_config(small_model(first_dense=3), accumulate=accumulate))
    state, metrics = jax.eval_shape(made._step, made.abstract, random_batch(micros=accumulate))
    assert metrics.moe is None and metrics.aux == {} and metrics.loss.shape == ()
    assert checkpoint.flatten(state.router_state) == {}


# --- beside the step ----------------------------------------------------------------------------------------------


def test_meter_means_and_rates(plain: Trainer, three_steps: tuple, monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 14.0, 14.0])
    monkeypatch.setattr("moejax.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(flops_per_token=5.0, peak=1000.0)
    for metrics in three_steps[1]:
        meter.add(metrics)
    row, _ = meter.row()
    tokens = sum(float(m.tokens) for m in three_steps[1])
    assert row["tokens_per_s"] == pytest.approx(tokens / 4.0)
    assert row["mfu"] == pytest.approx(tokens / 4.0 * 5.0 / 1000.0)
    assert row["loss"] == pytest.approx(np.mean([float(m.loss) for m in three_steps[1]]))
    bits = sum(float(m.nll) for m in three_steps[1]) / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(bits / sum(float(m.text_bytes) for m in three_steps[1]))
    assert row["load_max_over_mean"] >= 1.0 and row["dropped_share"] == 0.0 and row["overflow"] == 0.0
    assert set(row["aux"]) == {"balance", "z"}


def test_meter_sums_what_static_buffers_lost(three_steps: tuple, capsys: pytest.CaptureFixture):
    """Of every step since the last row, not of the last one alone; a reader is told, and warned once."""
    meter, shown = Meter(flops_per_token=5.0, peak=1000.0), TrainProgress(9, 0)
    routed = sum(float(m.moe.routed.sum()) for m in three_steps[1])
    for lost in ((2, 3, 0), (0, 0, 0), (1, 0, 0)):
        for metrics, of_step in zip(three_steps[1], lost, strict=True):
            overflow = jnp.zeros_like(metrics.moe.overflow).at[0].set(of_step)
            meter.add(dataclasses.replace(metrics, moe=dataclasses.replace(metrics.moe, overflow=overflow)))
        row, _ = meter.row()
        assert row["overflow"] == sum(lost) and row["overflow_share"] == pytest.approx(sum(lost) / routed)
        shown.metrics(row | {"step": 3})
    said = capsys.readouterr().err.splitlines()
    assert [("overflow 0." in line, "raise model.moe.ep_buffer_factor" in line) for line in said] == [
        (False, True), (True, False), (False, False), (True, False)
    ]  # fmt: skip


def test_meter_counts_what_halved_pairs_skip(three_steps: tuple, capsys: pytest.CaptureFixture):
    meter = Meter(flops_per_token=5.0, peak=1000.0)
    last = three_steps[1][-1]
    skipped = 0.25 * np.asarray(last.moe.routed).sum(axis=1)
    meter.add(dataclasses.replace(last, moe=dataclasses.replace(last.moe, skipped=skipped)))
    row, _ = meter.row()
    assert row["skipped_share"] == pytest.approx(0.25)
    TrainProgress(9, 0).metrics(row | {"step": 3})
    assert "dropped 0.00%  skipped 25.00% of the work" in capsys.readouterr().err


def test_meter_leaves_compilation_and_pauses_out(three_steps: tuple, monkeypatch: pytest.MonkeyPatch):
    # made at 0; first step compiled by 50; steps until 53; validation until 90; steps until 92
    clock = iter([0.0, 50.0, 53.0, 90.0, 92.0, 92.0])
    monkeypatch.setattr("moejax.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(flops_per_token=5.0, peak=1000.0)
    first, second, third = three_steps[1]
    meter.add(first)
    meter.leave_out()
    meter.add(second)
    meter.pause()
    meter.pause()  # a second pause (validation, then a save) counts nothing twice
    meter.go_on()
    meter.add(third)
    row, _ = meter.row()
    assert row["tokens_per_s"] == pytest.approx((float(second.tokens) + float(third.tokens)) / 5.0)
    assert row["loss"] == pytest.approx(np.mean([float(m.loss) for m in three_steps[1]]))
