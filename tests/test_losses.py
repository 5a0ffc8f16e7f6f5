"""Auxiliary losses: the value that each docstring states, and that no way of cutting a batch changes one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses, routing
from moejax.config import ConfigError, MoEConfig, RouterConfig
from moejax.moe import summarise
from moejax.types import MoEMetrics
from tests import moe_fakes as fakes
from tests.moe_fakes import DIM, EXPERTS, TOKEN_CHOICE, context, router_config

UNIFORM = {"balance": 1.0, "importance": 0.0, "load": 0.0}


def metrics_of(config, x, weights, mask, train=False):
    """Metrics of a layer without limits."""
    ctx = context(mask, key=jax.random.key(0), train=train)
    made = routing.FAMILIES[config.name].route(x, weights, ctx, config)
    return summarise(made, made, ctx, jnp.int32(0))


summed = fakes.jit(metrics_of, static_argnums=0)
LOSSES = {name: fakes.jit(loss) for name, loss in losses.LOSSES.items()}


def metrics(**fields):
    zeros = {name: jnp.zeros(()) for name in MoEMetrics.__dataclass_fields__ if name != "zero_routed"}
    return MoEMetrics(**(zeros | {name: jnp.asarray(value, jnp.float32) for name, value in fields.items()}))


def from_logits(config, logits, mask=None):
    """Tokens whose router logits are the rows of ``logits``: the router is the identity."""
    logits = np.asarray(logits, np.float32)
    mask = np.ones(len(logits), bool) if mask is None else mask
    return summed(config, logits, {"kernel": jnp.eye(logits.shape[1])}, jnp.asarray(mask))


# --- values that the docstrings state -----------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("name", sorted(UNIFORM))
def test_value_under_uniform_routing(name, k):
    """Token t likes expert t best, then t + 1, and so on around: every expert gets the same, and so does every k."""
    logits = -((np.arange(EXPERTS)[None] - np.arange(EXPERTS)[:, None]) % EXPERTS)
    got = LOSSES[name](from_logits(RouterConfig(k=k), logits))
    assert float(got) == pytest.approx(UNIFORM[name], abs=1e-5)


def test_every_registered_loss_has_a_uniform_value_here():
    assert set(losses.LOSSES) == {*UNIFORM, "z"}


@pytest.mark.parametrize(("name", "value"), [("balance", EXPERTS), ("importance", EXPERTS - 1), ("load", EXPERTS - 1)])
def test_value_when_one_expert_gets_everything(name, value):
    logits = np.where(np.arange(EXPERTS) == 3, 40.0, 0.0) + np.zeros((5, 1))
    assert float(LOSSES[name](from_logits(RouterConfig(k=1), logits))) == pytest.approx(value, rel=1e-5)


def test_balance_by_hand():
    m = metrics(routed=[3, 1], prob_sum=[2.4, 1.6], tokens=4)
    assert float(losses.balance(m)) == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4))
    # counts are constants: d/dP_i = E f_i / T, nothing through f
    grad = jax.grad(lambda m: losses.balance(m))(m)
    np.testing.assert_allclose(grad.prob_sum, [2 * 0.75 / 4, 2 * 0.25 / 4])
    np.testing.assert_array_equal(grad.routed, [0, 0])


def test_importance_and_load_by_hand():
    assert float(losses.importance(metrics(gate_sum=[3, 1]))) == pytest.approx(0.25)  # sd 1, mean 2
    assert float(losses.load(metrics(load_prob_sum=[5, 1, 3]))) == pytest.approx(8 / 3 / 9)  # variance 8/3, mean 3


def test_z_by_hand():
    logits = np.asarray([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [50.0, 0.0, 0.0]])
    lse = np.log(np.exp(logits).sum(1))
    config = RouterConfig(k=1)
    assert float(LOSSES["z"](from_logits(config, logits))) == pytest.approx((lse**2).mean(), rel=1e-5)
    assert float(LOSSES["z"](from_logits(config, np.zeros((2, 4))))) == pytest.approx(np.log(4) ** 2, rel=1e-5)
    masked = LOSSES["z"](from_logits(config, logits, np.asarray([True, True, False])))
    assert float(masked) == pytest.approx((lse[:2] ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_a_batch_without_real_tokens_is_worth_nothing(name):
    m = from_logits(RouterConfig(k=2), np.eye(4), np.zeros(4, bool))
    value, grad = fakes.jit(jax.value_and_grad(losses.LOSSES[name]))(m)
    assert float(value) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


# --- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_neither_micro_batches_nor_padding_change_a_value(name):
    """Sums over pieces, cut or masked in any way, are the sums of the whole; so every loss is the same."""
    x = np.random.default_rng(0).normal(size=(24, DIM)).astype(np.float32)
    weights, config = fakes.router_weights(name), router_config(name)
    whole = summed(config, x, weights, np.ones(24, bool))
    cut = [summed(config, x[i : i + 8], weights, np.ones(8, bool)) for i in (0, 8, 16)]
    places = np.arange(24)
    masked = [
        summed(config, x, weights, m)
        for m in (places < 5, (places >= 5) & (places % 2 == 0), (places >= 5) & (places % 2 == 1))
    ]
    for pieces in (cut, masked):
        together = jax.tree.map(lambda *leaves: sum(leaves), *pieces)
        fakes.assert_close(whole, together, rtol=1e-5, atol=1e-5)
        for loss in LOSSES.values():
            assert float(loss(whole)) == pytest.approx(float(loss(together)), rel=1e-5)
    by_piece = np.mean([float(LOSSES["balance"](m)) for m in cut])
    assert abs(by_piece - float(LOSSES["balance"](whole))) > 1e-3  # a mean over pieces would not do


def test_metrics_of_a_router_by_hand():
    logits = np.asarray([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 5.0, 5.0]])
    m = from_logits(RouterConfig(k=2), logits, np.asarray([True, True, False]))
    p = fakes.softmax(logits)[:2]
    gates = [p[0, 0] / (p[0, 0] + p[0, 1]), p[1, 1] / (p[1, 1] + p[1, 2])]
    expected = {
        "tokens": 2, "routed": [1, 2, 1], "computed": [1, 2, 1], "dropped": 0, "added": 0, "overflow": 0,
        "lost_tokens": 0, "prob_sum": p.sum(0), "gate_sum": [gates[0], 1 - gates[0] + gates[1], 1 - gates[1]],
        "load_prob_sum": [1, 2, 1], "z_sum": (np.log(np.exp(logits[:2]).sum(1)) ** 2).sum(),
        "entropy_sum": -(p * np.log(p)).sum(),
    }  # fmt: skip
    for field, value in expected.items():
        np.testing.assert_allclose(getattr(m, field), value, rtol=1e-5, err_msg=field)


# --- gradients, checks, totals ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_gradient_reaches_the_router(name):
    family = "noisy_topk" if name in losses.NEEDS_NOISE else "topk_of_softmax"
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, DIM)), jnp.float32)
    loss = lambda w: losses.LOSSES[name](metrics_of(router_config(family), x, w, jnp.ones(16, bool), True))  # noqa: E731
    grad = fakes.jit(jax.grad(loss))(fakes.router_weights(family))
    assert np.isfinite(grad["kernel"]).all() and np.abs(grad["kernel"]).max() > 1e-4
    if family == "noisy_topk":
        assert np.abs(grad["noise"]).max() > 1e-4


def test_load_needs_a_router_with_noise():
    with pytest.raises(ConfigError, match=r"moe.losses.load=0.1 .*router.name='switch'.*noisy_topk"):
        losses.check(MoEConfig(losses=(("load", 0.1),), router=router_config("switch")))
    losses.check(MoEConfig(losses=(("load", 0.0),), router=router_config("switch")))
    losses.check(MoEConfig(losses=(("load", 0.1),), router=router_config("noisy_topk")))
    with pytest.raises(ConfigError, match=re.escape("moe.losses.balanse: unknown loss; choose among balance,")):
        losses.check(MoEConfig(losses=(("balanse", 0.1),)))


def test_total_adds_layers_and_logs_their_mean():
    layers = [
        metrics(routed=[3, 1], prob_sum=[2.4, 1.6], tokens=4, z_sum=8.0),
        metrics(routed=[2, 2], prob_sum=[2.0, 2.0], tokens=4, z_sum=4.0),
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    weighted, raw = losses.total(stacked, {"balance": 0.1, "z": 0.5, "importance": 0.0})
    assert float(weighted) == pytest.approx(0.1 * (1.1 + 1.0) + 0.5 * (2.0 + 1.0))
    assert float(raw["balance"]) == pytest.approx((1.1 + 1.0) / 2)
    assert float(raw["z"]) == pytest.approx(1.5)
    assert set(raw) == {"balance", "z", "importance"}  # a zero coefficient is still logged
    assert float(losses.total(stacked, {})[0]) == 0
