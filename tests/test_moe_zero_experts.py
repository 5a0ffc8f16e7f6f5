"""Experts with biases and a clamped activation, zero-computation experts, and what counts them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import limits, losses, metrics, validate
from moejax.config import ConfigError
from moejax.sharding import batch_sharding
from moejax.train import optimizer, split
from moejax.watch import rules
from tests import moe_fakes as fakes
from tests.moe_fakes import DIM, EXPERTS, FAMILIES, context, router_config
from tests.small import small_config, small_model
from tests.test_moe import MASK, assert_as_on_one_device, hidden, mesh_of, placed

ZERO = 3


def clamped(x, expert):
    """gpt-oss's expert on one token, in float64."""
    gate = np.minimum(x @ expert["gate"] + expert["gate_bias"], 7)
    up = np.clip(x @ expert["up"] + expert["up_bias"], -7, 7)
    return (gate * fakes.sigmoid(1.702 * gate) * (up + 1)) @ expert["down"] + expert["down_bias"]


def by_numpy(layer, x, made):
    """Sum over valid pairs, one after the other: weight times the expert's output, or times the token itself."""
    w = layer.store.get()
    names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    y = np.zeros_like(x)
    for r, k in np.argwhere(np.asarray(made.valid)):
        t, e = r if made.token is None else int(made.token[r]), int(made.expert[r, k])
        mine = {name: fakes.f64(getattr(w, name)[e]) for name in names} if e < EXPERTS else {}
        y[t] += float(made.weight[r, k]) * (clamped(x[t], mine) if mine else x[t])
    return y


@functools.cache
def zero_layer(name, **moe):
    """Biases everywhere, so that a row of zeros is not a row without effect."""
    config = router_config(name, bias=True)
    return fakes.small_layer(config, activation="swiglu_clamped", expert_bias=True, zero_experts=ZERO, **moe)


@fakes.jit
def value_and_grads(layer, x, mask):
    def loss(layer, x):
        flight = layer.begin(x, context(mask, record=True), None)
        y, report = layer.complete(flight, x)
        return jnp.sum(jnp.where(mask[..., None], y, 0) ** 2), (y, report, flight.plan)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


# A router sees nothing of what its ids stand for: one that needs no state, one that has a bias, and the one whose table
# has rows of its own.
QUICK = ("topk_of_softmax", "sigmoid_bias", "expert_choice")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_layer_equals_numpy_for_every_router(name):
    layer, x = zero_layer(name, implementation="ref"), 4 * hidden()
    (grads, dx), (y, report, plan) = value_and_grads(layer, x, jnp.asarray(MASK))
    made = jax.tree.map(lambda leaf: leaf[0], report.record.made)
    real = MASK.reshape(-1)
    expected = by_numpy(layer, fakes.f64(x).reshape(-1, DIM), made)[real]
    np.testing.assert_allclose(np.asarray(y).reshape(-1, DIM)[real], expected, rtol=1e-4, atol=1e-4)
    # rows are of experts that compute, and only of those; the others are counted apart
    counts = np.bincount(np.asarray(made.expert)[np.asarray(made.valid)], minlength=EXPERTS + ZERO)
    m = report.metrics
    np.testing.assert_array_equal(plan.group_sizes[0], counts[:EXPERTS])
    np.testing.assert_array_equal(m.routed, counts[:EXPERTS])
    np.testing.assert_array_equal(m.computed, counts[:EXPERTS])
    np.testing.assert_array_equal(m.zero_routed, counts[EXPERTS:])
    np.testing.assert_array_equal(losses.pairs_by_id(m), counts)
    assert m.dropped == m.added == 0
    assert m.lost_tokens == 0 or name == "expert_choice"
    assert counts[:EXPERTS].sum() > 0
    assert counts[EXPERTS:].sum() > 0 or name == "softmax_bias"  # whose random bias outweighs its scores
    for name_of, g in {**layer_arrays(grads), "x": dx}.items():
        assert np.isfinite(g).all(), name_of
        assert np.abs(g).max() > 1e-4 or name_of in ("bias", "noise"), name_of  # the noise is of training only


def layer_arrays(layer):
    w = layer.store.get()
    names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    return layer.router.weights() | {name: getattr(w, name) for name in names}


def test_number_of_experts_that_compute_varies_by_token():
    _, (_, report, _) = value_and_grads(
        zero_layer("topk_of_softmax", implementation="ref"), hidden(), jnp.asarray(MASK)
    )
    made = jax.tree.map(lambda leaf: np.asarray(leaf[0]), report.record.made)
    computing = ((made.expert < EXPERTS) & made.valid).sum(1)[MASK.reshape(-1)]
    assert set(computing) == {0, 1, 2}
    assert float(report.metrics.lost_tokens) == 0  # a token of zero-computation experts alone is not lost


def test_every_dispatcher_and_a_bias_that_is_flipped():
    x, mask = hidden(), jnp.asarray(MASK)
    local, dense = (zero_layer("topk_of_softmax", dispatcher=d, implementation="ref") for d in ("local", "dense"))
    a, b = (value_and_grads(layer, x, mask) for layer in (local, dense))
    assert_as_on_one_device((a[0], a[1][0], a[1][1].metrics), (b[0], b[1][0], b[1][1].metrics))
    for name in ("up_bias", "gate_bias", "down_bias"):
        other = jax.tree.map(lambda leaf: leaf, local)
        getattr(other.store, name)[...] = getattr(local.store, name)[...] * 0
        moved = np.abs(np.asarray(value_and_grads(other, x, mask)[1][0]) - np.asarray(a[1][0])).max()
        assert moved > 1e-2, name


def test_the_layer_on_eight_devices_equals_one():
    layer, x = zero_layer("sigmoid_bias", implementation="ref"), hidden()

    def run(layer, x, mask):
        def loss(layer, x):
            y, m = layer(x, context(mask))
            return jnp.sum(jnp.where(mask[..., None], y, 0) ** 2) + losses.balance(m), (y, m)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    expected = fakes.jit(run)(layer, x, jnp.asarray(MASK))
    mesh = mesh_of((2, 4, 1))
    with jax.set_mesh(mesh):
        got = fakes.jit(run)(placed(layer, mesh), jax.device_put(x, batch_sharding(mesh)), jnp.asarray(MASK))
    assert_as_on_one_device(got, expected)


def test_a_limit_keeps_every_pair_of_a_zero_computation_expert():
    """Four of the six pairs go to expert 3, which computes nothing; the mean load is that of the other three."""
    table = fakes.table(
        [[0, 3], [0, 3], [0, 3], [1, 3]], np.full((4, 2), 0.5), np.ones((4, 2)), np.ones((4, 2), bool), 4
    )
    free = jax.tree.map(lambda leaf: leaf, table)
    free = type(table)(**{**vars(table), "zero_experts": 1})
    np.testing.assert_allclose(limits.mean_load(table, context()), 8 / 4)
    np.testing.assert_allclose(limits.mean_load(free, context()), 4 / 3)
    kept = limits.apply((limits.token_drop(1.0),), free, context())  # capacity floor(4 / 3) = 1
    np.testing.assert_array_equal(kept.valid[:, 0], [True, False, False, True])
    assert kept.valid[:, 1].all()
    nothing = limits.apply((limits.token_drop(0.0),), free, context())
    assert not nothing.valid[:, 0].any() and nothing.valid[:, 1].all()


def test_loads_are_of_the_experts_that_compute():
    _, (_, report, _) = value_and_grads(
        zero_layer("topk_of_softmax", implementation="ref"), hidden(), jnp.asarray(MASK)
    )
    m = jax.tree.map(lambda leaf: leaf[None], report.metrics)
    row = metrics.load_row({"a": m, "b": m})
    assert np.asarray(row["utilisation"]).shape == (1, EXPERTS)
    share = float(m.zero_routed.sum() / (m.zero_routed.sum() + m.routed.sum()))
    assert row["zero_share"] == pytest.approx([share]) and 0 < share < 1
    assert "zero_share" not in metrics.load_summary(jax.tree.map(lambda leaf: leaf, replace_zero(m)))
    # uniform routing has a balance loss of 1, whatever computes
    even = type(m)(**{**vars(replace_zero(m)), "routed": jnp.ones(6), "zero_routed": jnp.ones(2),
                      "prob_sum": jnp.full(8, 0.5), "tokens": jnp.float32(4)})  # fmt: skip
    assert float(losses.balance(even)) == pytest.approx(1)
    (rule,) = [r for r in rules(small_config().watch, EXPERTS + ZERO) if r.name == "router entropy"]
    assert rule.value({"entropy": np.log([EXPERTS + ZERO])}, EXPERTS) == pytest.approx(1)


def replace_zero(m):
    return type(m)(**{**vars(m), "zero_routed": None})


def test_shared_dim_is_the_width_of_the_shared_experts():
    layer = fakes.small_layer(shared_experts=1, shared_dim=5)
    assert layer.shared.up.shape == (DIM, 5)
    assert fakes.small_layer(shared_experts=2).shared.up.shape == (DIM, 2 * fakes.EXPERT_DIM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"shared_dim": 5}}, r"moe.shared_dim=5 .* moe.shared_experts=0: set that to 1"),
        ({"moe": {"zero_experts": -1}}, r"model.moe.zero_experts=-1: must be 0 or more"),
        ({"moe": {"router": router_config(k=7), "zero_experts": 2}}, r"k=7 must lie in \[1, num_experts \+ zero_exp"),
        ({"moe": {"dense_layers": (2,)}}, r"dense_layers=\(2,\): must name layers .* \[0, num_layers=2\); 2 is none"),
        ({"moe": {"dense_layers": (0, 0)}}, r"moe.dense_layers=\(0, 0\): must name layers once each"),
        ({"wiring": "longcat", "moe": {"first_dense": 1}}, r"wiring='longcat' has experts in every block, but .*=1"),
        ({"wiring": "longcat", "moe": {"dense_layers": (1,)}}, r"wiring='longcat' .*moe.dense_layers=\(1,\)"),
        ({"wiring": "longcat", "moe": {"every": 2}}, r"wiring='longcat' .*moe.every=2"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate.check_model(fakes.model_config(**changes))
    validate.check_model(small_model(zero_experts=2, dense_layers=(1,), shared_experts=1, shared_dim=5))


def test_weight_decay_spares_the_experts_biases():
    _, params, _ = split(fakes.small_model(moe={"expert_bias": True, "router": router_config(bias=True)}))
    tx = optimizer(small_config().train, params)
    decay = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])  # no gradient
    updates = decay(params)
    decayed = {str(path[-1]) for path, leaf in nnx.to_flat_state(updates) if np.any(np.asarray(leaf[...]))}
    assert {"up", "gate", "down", "kernel"} <= decayed
    assert not decayed & {"up_bias", "gate_bias", "down_bias", "logit_bias", "scale"}
