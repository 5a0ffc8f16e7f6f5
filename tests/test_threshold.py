"""Threshold dropping (DualSparse-MoE, 2508.18376): the rule in loops, its forms in the layer, thresholds by load."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.replay import pairs_that_differ
from kernels_pallas.grouped_matmul import groups
from moejax import dispatch, limits, partition, replay, trace
from moejax.config import ConfigError, MoEConfig, RouterConfig
from moejax.limits import threshold as thresholds
from moejax.limits.threshold import STEPS
from moejax.moe import MoELayer
from moejax.sharding import batch_sharding
from moejax.types import RouteContext
from tests import moe_fakes as fakes
from tests import test_virtual_ranks as ranks
from tests.small import quick_compilation

F = 128
"""Two blocks of the kernels' extents."""


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


# --- the rule -----------------------------------------------------------------------------------------------------


def by_loop(table, threshold, gap=None):
    """``(valid, level)`` after the paper's section 3.2 and 3.4, pair by pair."""
    valid, level = np.asarray(table.valid).copy(), np.zeros(table.valid.shape, int)
    score = np.asarray(table.score)
    token = np.arange(len(valid)) if table.token is None else np.asarray(table.token)
    lower, upper = (threshold, threshold) if gap is None else (threshold - gap, threshold + gap)
    for r, k in np.argwhere(np.asarray(table.valid)):
        whole = sum(score[i, j] for i, j in np.argwhere(np.asarray(table.valid)) if token[i] == token[r])
        share = score[r, k] / whole if whole > 0 else 0.0
        if threshold > 0 and lower > 0 and share <= lower:
            valid[r, k] = False
        if threshold > 0 and share <= upper:
            level[r, k] = 1
    return valid, level if gap is not None else None


@pytest.mark.parametrize("gap", [None, 0.0, 0.03, 0.4])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.26])
def test_the_rule_in_loops(threshold: float, gap: float | None):
    rng = np.random.default_rng(3)
    first = fakes.random_table(rng, 20, 4, 8, drop=0.2, masked=3)
    zero = dataclasses.replace(first, score=first.score.at[2].set(0.0))  # all scores of a token underflowed
    pairs = fakes.table(
        rng.integers(0, 8, (24, 1)), rng.uniform(0.1, 1, (24, 1)), np.ones((24, 1)), rng.random((24, 1)) > 0.2, 8,
        token=np.r_[np.arange(8), rng.integers(0, 8, 16)],
    )  # fmt: skip
    for table in (first, zero, pairs):
        kept = limits.threshold_drop(threshold, gap=gap)(table, RouteContext())
        valid, level = by_loop(table, np.float32(threshold), None if gap is None else np.float32(gap))
        np.testing.assert_array_equal(kept.valid, valid)
        if gap is None:
            assert kept.level is None
        else:
            np.testing.assert_array_equal(np.where(valid, kept.level, 0), np.where(valid, level, 0))
        np.testing.assert_array_equal(kept.weight, table.weight)  # nothing is renormalised


def test_scores_that_are_nan_stay():
    """A broken router shows in the outputs with the limit as without: nothing of its tokens is dropped or halved."""
    table = fakes.random_table(np.random.default_rng(4), 6, 4, 8)
    broken = dataclasses.replace(table, score=table.score.at[0].set(jnp.nan).at[1, 2].set(jnp.nan))
    for options in ({}, {"gap": 0.1}, {"load_aware": "paper", "ranks": 2}, {"load_aware": "water", "ranks": 2}):
        limit = limits.threshold_drop(0.24, **options)
        kept, wanted = (limit(each, RouteContext(expert_dim=16)) for each in (broken, table))
        assert np.asarray(kept.valid)[:2].all()
        assert not np.asarray(kept.valid)[2:].all() and not np.asarray(wanted.valid)[:2].all()
        assert kept.level is None or not np.asarray(kept.level)[:2].any()


def test_below_one_over_k_each_token_keeps_a_pair():
    table = fakes.random_table(np.random.default_rng(0), 200, 4, 16, decimals=1)
    even = dataclasses.replace(table, score=jnp.full_like(table.score, 0.3))  # the hardest: all equal
    for each in (table, even):
        kept = limits.threshold_drop(0.2499)(each, RouteContext())
        assert np.asarray(kept.valid).any(axis=1).all()
    assert not np.asarray(limits.threshold_drop(0.2501)(even, RouteContext()).valid).any()


def test_pairs_without_a_computation_stay_and_count_for_the_next_limit():
    """Zero-computation experts: what a later limit makes of a token's other pairs follows from all of its pairs."""
    table = fakes.table([[0, 4, 1]] * 2, [[0.5, 0.1, 0.4]] * 2, [[0.5, 0.1, 0.4]] * 2, np.ones((2, 3)), 6)
    table = dataclasses.replace(table, zero_experts=2)
    drop = limits.threshold_drop(0.15)
    assert np.asarray(drop(table, RouteContext()).valid).all()
    for more in (limits.threshold_drop(0.42), limits.skip_second(0.9)):
        both, alone = (limits.apply(each, table, RouteContext()) for each in ((drop, more), (more,)))
        fakes.assert_same(both, alone)
        np.testing.assert_array_equal(both.valid[0], [True, True, False])


def test_one_and_two_thresholds_in_turn():
    table = fakes.random_table(np.random.default_rng(1), 40, 4, 8)
    two, one = limits.threshold_drop(0.2, gap=0.1, major=64), limits.threshold_drop(0.2)
    kept = limits.apply((two, one), table, RouteContext())
    _, level = by_loop(table, np.float32(0.2), np.float32(0.1))
    valid, _ = by_loop(dataclasses.replace(table, valid=two(table, RouteContext()).valid), np.float32(0.2))
    np.testing.assert_array_equal(kept.valid, valid)
    np.testing.assert_array_equal(np.where(valid, kept.level, 0), np.where(valid, level, 0))
    other = limits.threshold_drop(0.2, gap=0.1)
    for pair in ((two, other), (other, two)):
        with pytest.raises(ValueError, match="two limits halve experts"):
            limits.apply(pair, table, RouteContext())
        with pytest.raises(ConfigError, match="in one way only"):
            limits.check(pair, MoEConfig(expert_dim=128), 1, causal=True)


# --- the layer ----------------------------------------------------------------------------------------------------

ROUTERS = {
    "softmax": RouterConfig(k=3, renormalise=False),
    "sigmoid": RouterConfig(name="sigmoid_bias", k=3, scale=2.5),
    "expert choice": RouterConfig(name="expert_choice", k=3, noncausal="allow"),
}
X = jnp.asarray(np.random.default_rng(5).normal(size=(2, 9, fakes.DIM)), jnp.float32)
MASK = jnp.asarray(np.arange(9)[None] < np.asarray([[9], [6]]))


def run_layer(layer: MoELayer, limit: tuple):
    return layer(X, RouteContext(mask=MASK), limit)


run = fakes.jit(run_layer)
run_as_users_do = jax.jit(run_layer, compiler_options={"xla_backend_extra_options": ""})
"""Compiled without the last of the flags in tests/conftest.py: with it, two forms of a sum may round differently."""


def layer_of(router: RouterConfig, **changes) -> MoELayer:
    changes = {"activation": "swiglu", "expert_dim": F, "expert_bias": True, **changes}
    return fakes.small_layer(router, **changes)


def stored_in_parts(layer: MoELayer, parts: int) -> MoELayer:
    """The same layer with its experts stored as parts."""
    whole = partition.split(layer.store.get(), parts)
    config = dataclasses.replace(layer.config, parts=parts)
    made = jax.tree.map(lambda leaf: leaf, layer)
    made.config = config
    for name in ("up", "down", "gate", "up_bias", "gate_bias", "down_bias"):
        setattr(made.store, name, type(layer.store.up)(getattr(whole, name)))
    return made


def grads(layer: MoELayer, limit: tuple):
    def loss(layer: MoELayer, x):
        return jnp.sum(jnp.sin(layer(x, RouteContext(mask=MASK), limit)[0]))

    return fakes.jit(jax.grad(loss, argnums=(0, 1)))(layer, X)


FORMS = {
    "softmax": ("extent", "split", "2 parts"),
    "expert choice": ("extent", "2 parts"),
    "sigmoid": ("extent", "split", "2 parts", "4 parts"),
}


@pytest.mark.parametrize("name", ["softmax", "expert choice", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_the_fast_form_is_the_reference_form(name: str):
    """Extents, sub-experts split while computing, and sub-experts that are stored: values, metrics; and by hand. (The
    slow case has all; a router takes no part in how experts compute.)"""
    layer, threshold = layer_of(ROUTERS[name]), 0.33

    def computed(form: str):
        if form.endswith("parts"):
            limit = limits.threshold_drop(threshold, gap=0.04)
            return run(stored_in_parts(layer, int(form.split()[0])), (limit,))
        return run(layer, (limits.threshold_drop(threshold, gap=0.04, form=form),))

    made = {form: computed(form) for form in FORMS[name]}
    y, metrics = made["extent"]
    for other, other_metrics in made.values():
        np.testing.assert_allclose(other, y, rtol=1e-5, atol=1e-5)
        fakes.assert_same(other_metrics, metrics)
    assert float(metrics.skipped) > 0 and float(metrics.dropped) > 0
    balance = metrics.routed.sum() - metrics.dropped + metrics.added - metrics.overflow
    assert float(balance) == float(metrics.computed.sum())
    # By hand: experts on each kept pair, with F or F / 2 neurons.
    record = layer.begin(X, RouteContext(mask=MASK, record=True), (limits.threshold_drop(threshold, gap=0.04),)).record
    kept, w = jax.tree.map(lambda leaf: np.asarray(leaf[0]), record.kept), layer.store.get()
    total = np.zeros((18, fakes.DIM))
    halved = 0
    for r, k in np.argwhere(kept.valid):
        token = r if kept.token is None else kept.token[r]
        e, n = kept.expert[r, k], F // 2 if kept.level[r, k] else F
        halved += int(n < F)
        x = np.asarray(X.reshape(18, -1)[token], np.float64)
        gate = x @ np.asarray(w.gate[e, :, :n], np.float64) + w.gate_bias[e, :n]
        up = x @ np.asarray(w.up[e, :, :n], np.float64) + w.up_bias[e, :n]
        out = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(w.down[e, :n], np.float64) + w.down_bias[e] * n / F
        total[token] += kept.weight[r, k] * out
    assert halved * 0.5 == float(metrics.skipped)
    np.testing.assert_allclose(np.asarray(y).reshape(18, -1), total, rtol=2e-4, atol=2e-4)


def test_gradients_of_the_forms_agree():
    layer = layer_of(ROUTERS["softmax"])
    made = [grads(layer, (limits.threshold_drop(0.33, gap=0.04, form=form),)) for form in ("extent", "split")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *made)


def test_no_threshold_is_no_limit_and_no_gap_is_one_threshold():
    layer = layer_of(ROUTERS["softmax"])
    whole, dropping, halving = (
        run_as_users_do(layer, limit)
        for limit in ((), (limits.threshold_drop(0.0),), (limits.threshold_drop(0.0, gap=0.01),))
    )
    fakes.assert_same(dropping, whole)
    np.testing.assert_array_equal(halving[0], whole[0])
    one, two = (run_as_users_do(layer, (limits.threshold_drop(0.33, gap=gap),)) for gap in (None, 0.0))
    np.testing.assert_array_equal(one[0], two[0])
    assert float(two[1].skipped) == 0 and float(one[1].dropped) == float(two[1].dropped) > 0
    assert one[1].skipped is None


def test_thresholds_are_run_time_values_and_may_differ_by_layer():
    model, rng = fakes.small_model(moe={"num_experts": 4}), np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, fakes.VOCAB, (2, 8)), jnp.int32)
    compiled = []

    @jax.jit
    def drops(model, limit):
        compiled.append(1)
        return model(ids, limits=limit).metrics.dropped

    by_layer = drops(model, (limits.threshold_drop((0.49, 0.0)),))
    other = drops(model, (limits.threshold_drop((0.0, 0.45)),))
    assert len(compiled) == 1
    assert by_layer[0] > 0 == by_layer[1] and other[0] == 0 < other[1]


# --- thresholds by load -------------------------------------------------------------------------------------------


def shares_and_devices(rng, skew, gap):
    table = fakes.random_table(rng, 120, 4, 16, skew=skew, drop=0.05)
    share = np.asarray(limits.normalised(table), np.float64)
    return table, share, np.asarray(table.expert) // 4


def work(table, share, device, thresholds, gap):
    """Post-drop work of each device, in whole pairs."""
    done = np.zeros(len(thresholds))
    for r, k in np.argwhere(np.asarray(table.valid)):
        t = thresholds[device[r, k]]
        lower, upper = (t, t) if gap is None else (t - gap, t + gap if t > 0 else 0.0)
        if share[r, k] <= lower and lower > 0:
            continue
        done[device[r, k]] += 0.5 if gap is not None and upper > 0 and share[r, k] <= upper else 1.0
    return done


@pytest.mark.parametrize("gap", [None, 0.02])
@pytest.mark.parametrize("skew", [0.0, 0.2])
def test_water_filling_ends_at_the_same_maximum_and_drops_least(skew: float, gap: float | None):
    threshold = 0.25
    for seed in range(4):
        table, share, device = shares_and_devices(np.random.default_rng(seed), skew, gap)
        before, everywhere = (work(table, share, device, [t] * 4, gap) for t in (0.0, threshold))
        kept = limits.threshold_drop(threshold, gap=gap, load_aware="water", ranks=4)(table, RouteContext())
        half = np.zeros(table.valid.shape) if kept.level is None else 0.5 * np.asarray(kept.level)
        after = np.bincount(device.ravel(), (np.asarray(kept.valid) * (1 - half)).ravel(), minlength=4)
        assert after.max() == everywhere.max() <= before.max()
        assert (after >= everywhere).all() and (after <= before).all()
        # The lowest step of each device that reaches the maximum, found by trying all.
        steps = np.arange(STEPS + 1, dtype=np.float32) * np.float32(threshold) / STEPS
        for d in range(4):
            tried = [work(table, share, device, [t] * 4, gap)[d] for t in steps]
            assert after[d] == next(w for w in tried if w <= everywhere.max())


@pytest.mark.parametrize("gap", [None, 0.02])
def test_thresholds_by_load_count_what_was_halved_before_as_the_work_that_is_left(gap: float | None):
    """After another 2T limit; with major neurons of its own where the second has no gap."""
    table, _, device = shares_and_devices(np.random.default_rng(0), 0.2, gap)
    major = {"major": 30} if gap is None else {}  # of 40 neurons; else half
    part = 0.75 if gap is None else 0.5
    ctx = RouteContext(expert_dim=40)
    first = limits.threshold_drop(0.22, gap=0.04, **major)(table, ctx)
    share = np.asarray(limits.normalised(first))

    def left(kept) -> np.ndarray:
        done = np.where(np.asarray(kept.level) == 1, part, 1.0) * np.asarray(kept.valid)
        return np.bincount(device.ravel(), done.ravel(), minlength=4)

    def second(rule: str, threshold: float = 0.25):
        return limits.threshold_drop(threshold, gap=gap, load_aware=rule, ranks=0 if rule == "none" else 4)(first, ctx)

    before, everywhere, after = left(first), left(second("none")), left(second("water"))
    assert not np.allclose(before / before.mean(), np.bincount(device[np.asarray(first.valid)]) / first.valid.sum() * 4)
    assert after.max() == everywhere.max() and (after >= everywhere).all() and (after <= before).all()
    steps = np.arange(STEPS + 1, dtype=np.float32) * np.float32(0.25) / STEPS
    tried = np.stack([left(second("none", float(t))) for t in steps])
    for d in range(4):
        assert after[d] == next(w for w in tried[:, d] if w <= everywhere.max())
    scaled = 0.25 * np.minimum(1, before / before.mean())
    lower = scaled if gap is None else scaled - gap
    np.testing.assert_array_equal(
        second("paper").valid, np.asarray(first.valid) & ((share > lower[device]) | (lower[device] <= 0))
    )


@pytest.mark.parametrize(("major", "part"), [(0, 0.5), (30, 0.75)])
def test_a_measured_budget_counts_what_was_halved_as_the_work_that_is_left(major: int, part: float):
    """From the slowest device go the lowest scores until its work is that of the second-slowest; none more."""
    ctx = RouteContext(expert_dim=40)
    for seed in range(4):
        table, _, device = shares_and_devices(np.random.default_rng(seed), 0.2, 0.04)
        first = limits.threshold_drop(0.22, gap=0.04, major=major)(table, ctx)
        done = np.where(np.asarray(first.level) == 1, part, 1.0) * np.asarray(first.valid)
        before = np.bincount(device.ravel(), done.ravel(), minlength=4)
        slowest, most, spent = before.argmax(), np.sort(before)[-2], 0.0
        expected, score = np.asarray(first.valid).copy(), np.asarray(first.score)
        for r, k in sorted(np.argwhere(expected & (device == slowest)).tolist(), key=lambda p: -score[*p]):
            spent += done[r, k]
            expected[r, k] = spent <= most
        kept = limits.measured_budget(ranks=4)(first, ctx)
        np.testing.assert_array_equal(kept.valid, expected)
        np.testing.assert_array_equal(kept.level, first.level)
        assert most - 1 < (done * expected)[device == slowest].sum() <= most < before[slowest]


def test_a_measured_budget_of_many_pairs_does_not_wrap():
    """320,000 pairs, 11,224 units of work in the mean: more than int32 holds. All are of one device: none may stay."""
    rows, k = 40_000, 8
    table = fakes.random_table(np.random.default_rng(0), rows, k, k)
    level = (np.arange(rows * k).reshape(rows, k) % 3 == 0).astype(np.int32)
    table = dataclasses.replace(table, probs=jnp.ones((rows, 4 * k)), level=jnp.asarray(level), major=4999)
    kept = limits.measured_budget(ranks=4)(table, RouteContext(expert_dim=14336))
    assert not np.asarray(kept.valid).any()


@pytest.mark.parametrize("rule", ["paper", "water"])
def test_load_aware_thresholds_of_many_pairs_do_not_wrap(rule):
    """As above: the one device that has all pairs gets the whole threshold, the others, without any, none."""
    rows, k = 40_000, 8
    table = fakes.random_table(np.random.default_rng(0), rows, k, k)
    level = (np.arange(rows * k).reshape(rows, k) % 3 == 0).astype(np.int32)
    halved = dataclasses.replace(table, probs=jnp.ones((rows, 4 * k)), level=jnp.asarray(level), major=4999)
    limit, context = limits.threshold_drop(0.1, load_aware=rule, ranks=4), RouteContext(expert_dim=14336)
    share = thresholds.normalised(halved)
    device = jnp.zeros_like(halved.expert)
    found = limit.device_thresholds(jnp.float32(0.1), share, device, 4, halved, context)
    np.testing.assert_allclose(found, [0.1, 0.0, 0.0, 0.0], atol=1e-6)


def test_water_filling_is_not_misled_by_rounding():
    """With 256 of 300 neurons major, 9 - 3 x 44/300 - 3 x 256/300 is 6 and a bit in float32: more than the target."""
    low, high = [((1, 2), (0.1, 0.9))] * 3 + [((1, 2), (0.2, 0.8))], [((0, 1), (0.5, 0.5))] * 5 + [((0, 2), (0.5, 0.5))]
    expert, score = (np.asarray(v) for v in zip(*low, *high, strict=True))
    table = fakes.table(expert, score, score, np.ones(expert.shape), 3)
    limit = limits.threshold_drop(0.25, gap=0.0, load_aware="water", ranks=3, major=256)
    kept = limit(table, RouteContext(expert_dim=300))
    assert np.asarray(kept.valid)[:4, 0].tolist() == [False, False, False, True]  # the fourth need not go: 6 are left


def test_the_papers_rule_scales_the_threshold_with_the_load():
    table, share, device = shares_and_devices(np.random.default_rng(1), 0.15, None)
    loads = np.bincount(device[np.asarray(table.valid)], minlength=4)
    thresholds = 0.25 * np.minimum(1, loads / loads.mean())
    assert thresholds.min() < 0.2 and thresholds.max() == 0.25
    kept = limits.threshold_drop(0.25, load_aware="paper", ranks=4)(table, RouteContext())
    np.testing.assert_array_equal(kept.valid, np.asarray(table.valid) & (share > thresholds[device]))


@pytest.mark.parametrize("rule", ["none", "paper", "water"])
def test_virtual_ranks_decide_as_real_ones_do(rule: str):
    """Loads are of all ranks, so the thresholds of a device are one everywhere."""
    limit = limits.threshold_drop(0.49, gap=0.05, load_aware=rule, major=64)
    changes = {"expert_dim": F}
    real = ranks.on((1, 4, 1), fakes.small_layer(dispatcher="ep", **changes), (limit,))
    virtual = ranks.on((1, 1, 1), fakes.small_layer(virtual_ranks=4, **changes), (limit,))
    ranks.assert_same_decisions(virtual, real)
    (a, metrics), (b, expected) = virtual[0], real[0]
    np.testing.assert_array_equal(a.kept.level, b.kept.level)
    assert float(metrics.skipped) == float(expected.skipped) > 0 and float(metrics.dropped) > 0


@pytest.mark.parametrize("form", ["extent", "split"])
def test_on_real_ranks_the_output_is_that_of_one_device(form: str):
    limit = (limits.threshold_drop(0.49, gap=0.05, form=form),)
    x, mask = ranks.hidden(), jnp.asarray(ranks.MASK)

    def value(layer, x, mask):
        y, metrics = layer(x, RouteContext(mask=mask), limit)
        return jnp.where(mask[..., None], y, 0), metrics

    expected, metrics = fakes.jit(value)(fakes.small_layer(expert_dim=F), x, mask)
    mesh = ranks.mesh_of((2, 4, 1))
    with jax.set_mesh(mesh):
        split = [jax.device_put(a, batch_sharding(mesh)) for a in (x, mask)]
        y, real = jax.device_get(fakes.jit(value)(fakes.small_layer(dispatcher="ep", expert_dim=F), *split))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert float(real.skipped) == float(metrics.skipped) > 0 and float(real.overflow) == 0
    np.testing.assert_array_equal(real.computed, metrics.computed)


# --- bad input ----------------------------------------------------------------------------------------------------

WRONG = {
    "threshold_drop": "needs threshold",
    "threshold_drop:threshold=1.5": "at least 0 and below 1",
    "threshold_drop:threshold=0.1,gap=-1": "gap=-1",
    "threshold_drop:threshold=0.1,major=64": "of 2T-Drop",
    "threshold_drop:threshold=0.1,ranks=2": "load_aware",
    "threshold_drop:threshold=0.1,load_aware=yes": "one of none, paper, water",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_texts(text: str):
    with pytest.raises(ConfigError, match=WRONG[text]):
        limits.parse(text)


CHECKED = {
    "threshold_drop:threshold=0.1/0.2": ({}, "2 thresholds for 3 MoE layers"),
    "threshold_drop:threshold=0.1,gap=0.01,major=48,form=extent": ({"expert_dim": 96}, "multiples of 64"),
    "threshold_drop:threshold=0.1,gap=0.01,major=32": ({"expert_dim": 96}, "exactly one half"),
    "threshold_drop:threshold=0.1,gap=0.01,major=40": ({"expert_dim": 96, "parts": 4}, "choose major=24"),
    "threshold_drop:threshold=0.1,gap=0.01,major=96": ({"expert_dim": 96}, "below moe.expert_dim"),
    "threshold_drop:threshold=0.1,load_aware=water,ranks=3": ({}, "ranks=3 does not divide"),
}


@pytest.mark.parametrize("text", CHECKED)
def test_limits_that_do_not_fit_the_model(text: str):
    changes, said = CHECKED[text]
    with pytest.raises(ConfigError, match=said):
        limits.check([limits.parse(text)], MoEConfig(**changes), 3, causal=True)


def test_blocks_are_those_of_the_kernels():
    assert thresholds.BLOCK == groups.EXTENT_BLOCK
    found = {f: limits.major_columns(f) for f in (96, 192, 255, 256, 300, 416, 768, 1408, 2880)}
    assert found == {96: 48, 192: 96, 255: 128, 256: 128, 300: 192, 416: 256, 768: 384, 1408: 704, 2880: 1472}
    assert limits.major_columns(1408, 768) == 768
    assert limits.halving(1408).extents == (1408, 704) and limits.halving(192).split == 2


# --- traces -------------------------------------------------------------------------------------------------------


def test_a_replay_counts_the_work_that_is_skipped():
    rng = np.random.default_rng(2)
    table = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None, None], fakes.random_table(rng, 24, 4, 8, skew=0.2))
    tokens = {name: np.zeros((1, 24), np.int32) for name in trace.TOKEN_ARRAYS} | {"mask": np.ones((1, 24), bool)}
    chunk = trace.Chunk(table, table, tokens, None)
    for expert_dim, share in ((96, 0.5), (600, 1 - 320 / 600)):  # half of 600, in blocks of 64
        setting = replay.Setting((limits.threshold_drop(0.24, gap=0.04),), None, 1, expert_dim=expert_dim)
        decided, sums = replay.decide(chunk, setting, {})
        halved = np.sum(np.asarray(decided.kept.valid) & (np.asarray(decided.kept.level) == 1))
        assert float(sums.skipped[0]) == pytest.approx(share * halved, rel=1e-6) and halved > 0
        other = dataclasses.replace(decided.kept, level=np.zeros_like(decided.kept.level))
        assert pairs_that_differ(decided.kept, other) == halved and pairs_that_differ(other, other) == 0
        tally = replay.Tally()
        tally.add(sums)
        assert tally.rows([0])[-1]["skipped"] == float(sums.skipped[0])


@pytest.mark.parametrize("parts", [1, 2])
def test_pairs_that_overflow_a_buffer_are_counted_once(parts: int):
    """A pair of which one part found no row was not computed: the balance of the metrics holds, in whole pairs."""
    limit = (limits.threshold_drop(0.49, gap=0.05),)
    layer = fakes.small_layer(dispatcher="ep", expert_dim=F, ep_buffer_factor=0.25, parts=parts)
    x = jnp.concatenate([ranks.hidden()] * 4, axis=1)  # enough rows that 8 for each destination are too few
    with dispatch.emulated(4):
        _, m = jax.device_get(fakes.jit(lambda layer, x: layer(x, RouteContext(), limit))(layer, x))
    assert float(m.overflow) > 0 and float(m.skipped) > 0
    assert float(m.routed.sum() - m.dropped + m.added - m.overflow) == float(m.computed.sum())
