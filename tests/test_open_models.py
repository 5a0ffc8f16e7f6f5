"""What DBRX, Grok-1, Phi-3.5-MoE and Llama-4-Scout have and the other models do not, each piece against plain NumPy.

Their attention: tests/test_attention.py. Whole models: tests/test_parity.py, where transformers has them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import routing
from moejax.attention import attention_input
from moejax.blocks import Block
from moejax.config import ConfigError, RouterConfig
from moejax.model import layer_facts
from moejax.norm import LayerNorm, make_norm, unit_rms
from moejax.routing import token_mask
from moejax.types import RouteContext
from moejax.validate import check_model
from tests import moe_fakes as fakes
from tests.attention_fakes import grouped
from tests.moe_fakes import DIM, context, router_config

B, S = 2, 5
T = 12


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- norms ------------------------------------------------------------------------------------------------------------


def layer_norm(x, scale, bias, eps):
    x = fakes.f64(x)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * fakes.f64(scale) + bias


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_by_hand_in_float32(bias):
    norm = fakes.filled(lambda: LayerNorm(6, 1e-3, bias))
    assert (norm.bias is not None) == bias
    x = normal(3, 6) + 5
    expected = layer_norm(x, norm.scale[...], fakes.f64(norm.bias[...]) if bias else 0, 1e-3)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    large = jnp.asarray([[256.0, 258.0, 256.0, 258.0, 256.0, 258.0]], jnp.bfloat16)  # the mean is between two bfloat16
    made = norm(large)
    assert made.dtype == jnp.bfloat16
    expected = layer_norm(large, norm.scale[...], fakes.f64(norm.bias[...]) if bias else 0, 1e-3)
    np.testing.assert_allclose(fakes.f64(made), expected, rtol=1e-2, atol=1e-2)


def test_unit_rms_is_an_rms_norm_without_a_scale():
    x = normal(2, 3, 8)
    expected = fakes.f64(x) / np.sqrt((fakes.f64(x) ** 2).mean(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(unit_rms(jnp.asarray(x), 1e-2), expected, rtol=1e-5)


def numpy_norm(norm, x):
    return fakes.f64(x) / np.sqrt((fakes.f64(x) ** 2).mean(-1, keepdims=True) + norm.eps) * fakes.f64(norm.scale[...])


def test_sandwich_norms_stand_before_what_is_added():
    """h = x + norm(attention(norm(x))); y = h + norm(ffn(norm(h))), with four norms of their own."""
    config = fakes.model_config(sandwich_norm=True, ffn_dim=24)
    block = fakes.filled(lambda: Block(config, False, jax.random.key(0)))
    x = normal(B, S, DIM)
    tokens = attention_input(None, None, None, None, (B, S))
    got, _, _ = fakes.jit(lambda block, x: block(x, tokens, RouteContext(), None, None))(block, x)
    places = [range(s + 1) for s in range(S)]
    first = numpy_norm(block.attention_norm, x)
    h = x + numpy_norm(
        block.attention_out_norm, np.stack([grouped(block.attention, row, np.arange(S), places) for row in first])
    )
    z = numpy_norm(block.ffn_norm, h)
    up, gate, down = (fakes.f64(getattr(block.ffn, name)[...]) for name in ("up", "gate", "down"))
    hidden = (z @ gate) * fakes.sigmoid(z @ gate) * (z @ up)
    np.testing.assert_allclose(got, h + numpy_norm(block.ffn_out_norm, hidden @ down), rtol=1e-4, atol=1e-5)


def test_logits_are_scaled_then_biased_then_capped():
    """``cap * tanh((scale * x W + b) / cap)``; each of the three moves them."""
    tokens = fakes.tokens(1, 3)
    settings = {"num_layers": 1, "tie_embeddings": False, "moe": {"first_dense": 1}}
    plain, model = (
        fakes.small_model(**settings, **more)
        for more in ({}, {"logit_scale": 0.5, "logit_bias": True, "logit_softcap": 2.0})
    )
    for name in ("embed", "unembed", "groups", "final_norm"):
        setattr(model, name, getattr(plain, name))
    logits = fakes.jit(lambda model: model(tokens).logits)
    before = fakes.f64(logits(plain))
    bias = fakes.f64(model.unembed_bias[...])
    expected = 2 * np.tanh((0.5 * before + bias) / 2)
    np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert min(np.abs(bias).max(), np.abs(before).max()) > 0.1


# --- routers ----------------------------------------------------------------------------------------------------------


def sparsemixer_row(z, margin):
    """Section 3.1 of 2409.12136 as its released code has it, for one token's logits."""
    chosen, weights, left = [], [], list(range(len(z)))
    for _ in range(2):
        best = max(left, key=lambda j: z[j])
        near = [j for j in left if (z[best] - z[j]) / max(abs(z[j]), z[best]) <= 2 * margin]
        weights.append(np.exp(z[best]) / sum(np.exp(z[j]) for j in near))
        chosen.append(best)
        left.remove(best)
    return chosen, weights


@pytest.mark.parametrize("margin", [0.01, 0.3])
def test_sparsemixer_by_hand(margin):
    config = router_config("sparsemixer", mask_margin=margin)
    x, weights = normal(T, DIM), fakes.router_weights("sparsemixer")
    route = fakes.jit(lambda x, ctx: routing.sparsemixer(x, weights, ctx, config))
    made = route(jnp.asarray(x), context())
    logits = fakes.f64(x) @ fakes.f64(weights["kernel"])
    expected = [sparsemixer_row(row, margin) for row in logits]
    np.testing.assert_array_equal(made.expert, [chosen for chosen, _ in expected])
    np.testing.assert_allclose(made.weight, [w for _, w in expected], rtol=1e-4)
    np.testing.assert_allclose(made.probs, fakes.softmax(logits), rtol=1e-4)
    rivals = (np.asarray(made.weight) < 0.999).mean()
    assert rivals > 0.5 if margin == 0.3 else rivals < 0.5  # a wide margin lets more experts in
    other = route(jnp.asarray(x), context(train=True, key=jax.random.key(1)))
    np.testing.assert_array_equal(other.weight, made.weight)  # training draws nothing: it says so


def test_sparsemixer_has_the_plain_gradient_of_its_weights():
    config, weights = router_config("sparsemixer", mask_margin=0.3), fakes.router_weights("sparsemixer")
    x, u = normal(3, DIM), normal(3, 2, seed=1)

    def value(kernel, of):
        return np.sum(u * of(kernel))

    def weight(kernel):
        return routing.sparsemixer(jnp.asarray(x), {"kernel": kernel}, context(), config).weight

    grad = fakes.jit(jax.grad(lambda kernel: jnp.sum(u * weight(kernel))))(weights["kernel"])
    kernel = fakes.f64(weights["kernel"])

    def by_hand(kernel):
        return np.asarray([sparsemixer_row(row, 0.3)[1] for row in fakes.f64(x) @ kernel])

    for i, j in ((0, 0), (3, 2), (7, 5)):
        step = np.zeros_like(kernel)
        step[i, j] = 1e-5
        slope = (value(kernel + step, by_hand) - value(kernel - step, by_hand)) / 2e-5
        np.testing.assert_allclose(grad[i, j], slope, rtol=1e-3, atol=1e-5)
    assert np.abs(grad).max() > 1e-2


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_topk_of_sigmoid_by_hand(k, renormalise):
    config = RouterConfig(name="topk_of_sigmoid", k=k, renormalise=renormalise)
    x, weights = normal(T, DIM), fakes.router_weights("topk_of_sigmoid")
    made = routing.topk_of_sigmoid(jnp.asarray(x), weights, context(), config)
    score = fakes.sigmoid(fakes.f64(x) @ fakes.f64(weights["kernel"]))
    expert = fakes.topk_rows(score, k)
    chosen = np.take_along_axis(score, expert, 1)
    np.testing.assert_array_equal(made.expert, expert)
    expected = chosen / chosen.sum(1, keepdims=True) if renormalise and k > 1 else chosen
    np.testing.assert_allclose(made.weight, expected, rtol=1e-5)
    # where the scores of two experts are both 1 in float32, their logits still decide
    large = routing.topk_of_sigmoid(jnp.full((1, DIM), 100.0), weights, context(), config)
    assert large.expert[0, 0] == np.argmax(fakes.f64(weights["kernel"]).sum(0))


def test_margins_that_cannot_work_are_refused():
    for margin in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"router.mask_margin=.*above 0"):
            routing.family(router_config("sparsemixer", mask_margin=margin), 8)
    with pytest.raises(ConfigError, match=r"router.mask_margin=0.2: .*'switch' does not implement it.*sparsemixer"):
        routing.family(router_config("switch", mask_margin=0.2), 8)
    with pytest.raises(ConfigError, match=r"router.k=3 does not fit .*chooses one expert and then another"):
        routing.family(RouterConfig(name="sparsemixer", k=3), 8)


# --- weights on the experts' input ------------------------------------------------------------------------------------


@functools.cache
def weighing(dispatcher, router):
    return fakes.small_layer(router_config(router, renormalise=False), weigh="input", dispatcher=dispatcher)


@pytest.mark.parametrize(
    ("dispatcher", "router"), [("local", "topk_of_sigmoid"), ("dense", "topk_of_sigmoid"), ("local", "expert_choice")]
)
def test_the_gate_weight_multiplies_what_goes_in(dispatcher, router):
    """``y[t] = sum of f_e(w x[t])`` over its pairs, values and gradients, with padding."""
    layer = weighing(dispatcher, router)
    x, mask = normal(1, T, DIM), np.arange(T) < T - 2
    u = jnp.asarray(normal(1, T, DIM, seed=3))

    def loss(layer, x):
        y, metrics = layer(x, context(mask[None]))
        return jnp.sum(jnp.where(mask[None, :, None], y * u, 0)), (y, metrics)

    def plain(layer, x):
        w, ctx = layer.store.get(), context(mask)
        table = layer.router.family.route(x[0], layer.router.weights(), ctx, layer.router.config)
        token = jnp.arange(T) if table.token is None else table.token
        y = jnp.zeros_like(x[0])
        for k in range(table.expert.shape[1]):
            z = table.weight[:, k, None] * x[0][token]
            e = table.expert[:, k]
            up, gate = (jnp.einsum("rd,rdf->rf", z, leaf[e]) for leaf in (w.up, w.gate))
            out = jnp.einsum("rf,rfd->rd", jax.nn.silu(gate) * up, w.down[e])
            y = y.at[token].add(jnp.where(table.valid[:, k, None], out, 0))
        given = jnp.sum(jnp.where(table.valid, table.weight, 0))
        return jnp.sum(jnp.where(token_mask(ctx, T)[:, None], y * u[0], 0)), (y, given)

    (_, (y, metrics)), grads = fakes.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(layer, x)
    (_, (expected, given)), wanted = fakes.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(
        layer, jnp.asarray(x)
    )
    np.testing.assert_allclose(np.asarray(y[0])[mask], np.asarray(expected)[mask], rtol=1e-4, atol=1e-5)
    fakes.assert_close(grads, wanted, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics.gate_sum.sum(), given, rtol=1e-5)  # metrics tell the router's weights


# --- models -----------------------------------------------------------------------------------------------------------


def test_layers_are_told_their_window_and_whether_they_rotate():
    attention = {"window": 4, "window_layers": (0, 1, 3), "window_kind": "chunks", "no_rope_layers": (2,)}
    config = fakes.model_config(num_layers=4, attention=attention, moe={"first_dense": 1})
    dense, sparse = layer_facts(config)
    assert dense["window"].tolist() == [[4]] and dense["rotates"].tolist() == [[True]]
    assert sparse["rotates"].tolist() == [[True], [False], [True]]
    assert (sparse["window"] == 4).tolist() == [[True], [False], [True]]
    assert layer_facts(fakes.model_config()) == [{}]


def test_make_norm():
    assert isinstance(make_norm(fakes.model_config(norm="layer")), LayerNorm)
    assert make_norm(fakes.model_config(norm="layer")).bias is None
    assert make_norm(fakes.model_config(norm="layer_bias")).bias is not None
    assert not isinstance(make_norm(fakes.model_config()), LayerNorm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_scale": 0.0}, r"model.logit_scale=0.0: must be a finite number above 0"),
        ({"sandwich_norm": True, "wiring": "longcat"}, r"model.sandwich_norm=True with model.wiring='longcat'"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_model(dataclasses.replace(fakes.model_config(), **changes))
