"""Routers: each law runs over the registry, so that a new family is tested by being registered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses, routing
from moejax.config import ConfigError, MoEConfig, RouterConfig
from tests import moe_fakes as fakes
from tests.moe_fakes import DIM, EXPERTS, FAMILIES, NONCAUSAL, TOKEN_CHOICE, context, router_config

T = 24
REAL = 18
MASK = np.arange(T) < REAL


def hidden(seed=0, count=T):
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


@functools.partial(fakes.jit, static_argnums=0)
def _route(config, x, weights, ctx):
    return routing.FAMILIES[config.name].route(x, weights, ctx, config)


def route(config, x, weights, mask=None, **more):
    return _route(config, jnp.asarray(x), weights, context(np.ones(len(x), bool) if mask is None else mask, **more))


@functools.cache
def layer_loss(name):
    """``(layer, x, mask, a) -> gradients to layer and x, y, metrics`` in training, noise included.

    The loss reads the outputs of real tokens and, times ``a``, every auxiliary loss that the family can feed.
    """
    noisy = routing.FAMILIES[name].noisy
    names = [n for n in sorted(losses.LOSSES) if noisy or n not in losses.NEEDS_NOISE]
    u = jnp.asarray(hidden(9))

    @fakes.jit
    def run(layer, x, mask, auxiliary):
        def loss(layer, x):
            ctx = context(mask[None], key=jax.random.key(7), train=True)
            y, metrics = layer(x[None], ctx)
            aux = sum(losses.LOSSES[n](metrics) for n in names)
            return jnp.sum(jnp.where(mask[:, None], y[0] * u, 0.0)) + auxiliary * aux, (y[0], metrics)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    return run


def run_layer(name, x, mask=MASK, auxiliary=1.0):
    layer = fakes.small_layer(router_config(name), implementation="ref")
    (layer_grads, dx), (y, metrics) = layer_loss(name)(layer, jnp.asarray(x), jnp.asarray(mask), auxiliary)
    return layer_grads, np.asarray(dx), np.asarray(y), metrics


# --- over the registry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_table_is_well_formed_and_float32_for_bfloat16_input(name):
    x, weights = jnp.asarray(hidden()).astype(jnp.bfloat16), fakes.router_weights(name)
    made = route(router_config(name), x, weights, MASK)
    for field in ("weight", "score", "probs", "logits"):
        assert getattr(made, field).dtype == jnp.float32, field
    assert made.expert.dtype == jnp.int32 and made.valid.dtype == bool
    # bfloat16 has 8 bits: a logit computed in it would be off by 1e-2, not by 1e-5
    np.testing.assert_allclose(made.logits, fakes.f64(x) @ fakes.f64(weights["kernel"]), rtol=1e-5, atol=1e-5)
    rows = np.arange(T) if made.token is None else np.asarray(made.token)
    assert made.expert.shape == made.weight.shape == made.score.shape == made.valid.shape
    assert np.asarray(made.expert).min() >= 0 and np.asarray(made.expert).max() < EXPERTS
    pairs = [(rows[r], int(made.expert[r, k])) for r, k in np.argwhere(np.asarray(made.valid))]
    assert len(set(pairs)) == len(pairs)  # no token meets an expert twice
    assert not np.asarray(made.valid)[~MASK[rows]].any()
    np.testing.assert_array_equal(made.score, np.take_along_axis(np.asarray(made.probs)[rows], made.expert, axis=1))


@pytest.mark.parametrize("name", FAMILIES)
def test_scale_multiplies_weights_only(name):
    weights = fakes.router_weights(name)
    one, scaled = (route(router_config(name, scale=s), hidden(), weights) for s in (1.0, 4.0))
    np.testing.assert_array_equal(scaled.weight, 4 * one.weight)
    fakes.assert_same((one.expert, one.score, one.valid), (scaled.expert, scaled.score, scaled.valid))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_of_the_layers_output_reaches_every_array_of_the_router(name):
    grads = run_layer(name, hidden())[0]
    plain = run_layer(name, hidden(), auxiliary=0.0)[0]  # the auxiliary losses must not be what saves a family
    for array, spec in routing.FAMILIES[name].arrays(DIM, EXPERTS).items():
        for g in (grads, plain):
            size = np.abs(np.asarray(g.router.arrays[array][...])).max()
            assert np.isfinite(size)
            assert (size > 1e-4) if spec.kind == "param" else size == 0, f"{name}.{array}: gradient {size}"


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing_outside_itself(name):
    x, other = hidden(), hidden(5)
    other[:REAL] = x[:REAL]
    other[REAL:] *= 30
    grads, dx, y, metrics = run_layer(name, x)
    grads2, dx2, y2, metrics2 = run_layer(name, other)
    np.testing.assert_array_equal(y[:REAL], y2[:REAL])
    fakes.assert_same(metrics, metrics2)
    fakes.assert_close(grads, grads2)
    np.testing.assert_allclose(dx[:REAL], dx2[:REAL], rtol=1e-5, atol=1e-6)
    assert not dx[REAL:].any() and not dx2[REAL:].any()
    assert metrics.tokens == REAL
    # ... and real tokens count: the same change made to them is seen
    assert not np.array_equal(run_layer(name, other[::-1])[2][:REAL], y[:REAL])


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_later_tokens_change_nothing_before_them(name):
    for cut in (1, 7, REAL - 1):
        x = hidden()
        later = x.copy()
        later[cut:] = hidden(3)[cut:]
        np.testing.assert_array_equal(run_layer(name, x)[2][:cut], run_layer(name, later)[2][:cut])
        weights = fakes.router_weights(name)
        a, b = (route(router_config(name), v, weights, MASK) for v in (x, later))
        for field in ("expert", "weight", "score", "valid", "probs"):
            np.testing.assert_array_equal(getattr(a, field)[:cut], getattr(b, field)[:cut], err_msg=field)


@pytest.mark.parametrize("name", NONCAUSAL)
def test_a_family_that_is_not_causal_does_look_ahead(name):
    """Else ``causal=False`` would refuse a router for nothing, and the causality test above could not fail."""
    x = hidden()
    later = x.copy()
    later[T // 2 :] = 3 * hidden(3)[T // 2 :]
    all_real = np.ones(T, bool)
    before, after = (run_layer(name, v, all_real)[2][: T // 2] for v in (x, later))
    assert np.abs(before - after).max() > 1e-3


# --- what the checks refuse ---------------------------------------------------------------------------------


def test_a_noncausal_router_is_refused_in_a_decoder_unless_asked_for():
    for name in NONCAUSAL:
        with pytest.raises(ConfigError, match=rf"router.name='{name}'.*noncausal='allow'"):
            routing.family(RouterConfig(name=name), EXPERTS)
        assert routing.family(RouterConfig(name=name, noncausal="allow"), EXPERTS).name == name
        assert routing.family(RouterConfig(name=name), EXPERTS, causal_model=False).name == name
    for name in TOKEN_CHOICE:
        routing.family(router_config(name, noncausal="refuse"), EXPERTS)
    assert "expert_choice" in NONCAUSAL


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RouterConfig(k=0), r"router.k=0 must lie in \[1, num_experts=8\]"),
        (RouterConfig(k=9), r"router.k=9 must lie in \[1, num_experts=8\]"),
        (RouterConfig(name="softmax_of_topk", k=1), "router.k=1 does not fit.*constant 1"),
        (RouterConfig(name="switch", k=2), "router.k=2 does not fit.*top-1"),
        (RouterConfig(name="topk_softmax"), "router.name='topk_softmax': choose one of .*topk_of_softmax"),
    ],
)
def test_configs_that_cannot_work_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        routing.family(config, EXPERTS)


def test_a_family_registers_once():
    with pytest.raises(ValueError, match="'switch' is registered twice"):
        routing.register("switch")(routing.switch)


# --- token choice by softmax --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_topk_of_softmax_by_hand(k):
    x, weights = hidden(), fakes.router_weights("topk_of_softmax")
    p = fakes.softmax(fakes.f64(x) @ fakes.f64(weights["kernel"]))
    expert = fakes.topk_rows(p, k)
    chosen = np.take_along_axis(p, expert, 1)
    plain = route(RouterConfig(k=k, renormalise=False), x, weights)
    np.testing.assert_array_equal(plain.expert, expert)
    np.testing.assert_allclose(plain.weight, chosen, rtol=1e-5)
    made = route(RouterConfig(k=k), x, weights)
    np.testing.assert_array_equal(made.expert, expert)
    np.testing.assert_allclose(made.probs, p, rtol=1e-5)
    np.testing.assert_allclose(made.score, chosen, rtol=1e-5)
    # k = 1 would be the constant 1, without a gradient: it keeps p
    np.testing.assert_allclose(made.weight, chosen if k == 1 else chosen / chosen.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_softmax_of_topk_is_topk_of_softmax_renormalised(k):
    x, weights = hidden(), fakes.router_weights("topk_of_softmax")
    a = route(RouterConfig(name="softmax_of_topk", k=k), x, weights)
    b = route(RouterConfig(name="topk_of_softmax", k=k), x, weights)
    np.testing.assert_array_equal(a.expert, b.expert)
    fakes.assert_close((a.weight, a.probs, a.score), (b.weight, b.probs, b.score))


@pytest.mark.parametrize("name", ["topk_of_softmax", "softmax_of_topk", "noisy_topk", "sigmoid_bias"])
def test_weights_sum_to_one_where_promised(name):
    made = route(router_config(name), hidden(), fakes.router_weights(name), key=jax.random.key(0), train=True)
    np.testing.assert_allclose(jnp.sum(made.weight, axis=1), 1, rtol=1e-6)


def test_switch_weight_is_the_probability():
    made = route(router_config("switch"), hidden(), fakes.router_weights("switch"))
    np.testing.assert_array_equal(made.weight[:, 0], jnp.max(made.probs, axis=1))
    assert float(made.weight.max()) < 0.999


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_ties_go_to_the_experts_with_lower_ids(name):
    weights = jax.tree.map(jnp.zeros_like, fakes.router_weights(name))
    made = route(router_config(name), hidden(), weights)
    np.testing.assert_array_equal(made.expert, np.broadcast_to(np.arange(made.expert.shape[1]), made.expert.shape))


def test_jitter_scales_inputs_in_training_only():
    x, weights = hidden(), fakes.router_weights("switch")
    config = router_config("switch", jitter=0.01)
    plain = route(router_config("switch"), x, weights)
    np.testing.assert_array_equal(route(config, x, weights).logits, plain.logits)
    jittered = route(config, x, weights, key=jax.random.key(0), train=True)
    bound = 0.01 * np.abs(x) @ np.abs(np.asarray(weights["kernel"])) + 1e-5
    moved = np.abs(jittered.logits - plain.logits)
    assert (moved <= bound).all() and moved.max() > 1e-3
    with pytest.raises(ValueError, match=r"draws noise in training: pass RouteContext\(key="):
        route(config, x, weights, train=True)


# --- noisy top-k --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_smooth_load_is_the_chance_to_be_chosen(k):
    """By the tower rule: averaged over all noise, the chance under fresh noise is the frequency of being chosen."""
    x, weights, draws = hidden(count=4), fakes.router_weights("noisy_topk"), 5000
    config = RouterConfig(name="noisy_topk", k=k)

    @fakes.jit
    def average(keys):
        def one(key):
            made = routing.noisy_topk(jnp.asarray(x), weights, context(key=key, train=True), config)
            noise = jnp.log(made.probs) - made.logits  # of each expert, up to a constant of the row
            gap = (noise - noise[:, :1]) ** 2
            return jnp.sum(jax.nn.one_hot(made.expert, EXPERTS), axis=1), made.load_prob, gap

        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.vmap(one)(keys))

    chosen, load, gap = average(jax.random.split(jax.random.key(0), draws))
    # five standard errors of a frequency, and of a variance
    np.testing.assert_allclose(load, chosen, atol=5 * np.sqrt(0.25 / draws))
    assert float(chosen.max()) - float(chosen.min()) > 0.2  # it tells experts apart
    variance = (np.log1p(np.exp(fakes.f64(x) @ fakes.f64(weights["noise"]))) + 1e-2) ** 2
    np.testing.assert_allclose(gap[:, 1:], (variance + variance[:, :1])[:, 1:], rtol=5 * np.sqrt(2 / draws))


def test_noise_is_drawn_in_training_only():
    x, weights = hidden(), fakes.router_weights("noisy_topk")
    still = route(router_config("noisy_topk"), x, weights)
    same = route(router_config("softmax_of_topk"), x, weights)
    fakes.assert_same((still.expert, still.probs), (same.expert, same.probs))
    fakes.assert_close(still.weight, same.weight)
    noisy = route(router_config("noisy_topk"), x, weights, key=jax.random.key(1), train=True)
    assert np.abs(noisy.probs - still.probs).max() > 0.01
    np.testing.assert_array_equal(noisy.logits, still.logits)  # the z-loss reads logits without noise
    assert still.load_prob is None and noisy.load_prob is not None
    with pytest.raises(ValueError, match="RouteContext"):
        route(router_config("noisy_topk"), x, weights, train=True)


# --- sigmoid with a selection bias --------------------------------------------------------------------------


def test_selection_bias_moves_the_choice_and_never_the_weight():
    x, weights = hidden(), fakes.router_weights("sigmoid_bias")
    s = fakes.sigmoid(fakes.f64(x) @ fakes.f64(weights["kernel"]))
    config = router_config("sigmoid_bias", renormalise=False)
    pushed = weights | {"bias": jnp.zeros(EXPERTS).at[5].set(10.0)}
    made = route(config, x, pushed)
    np.testing.assert_array_equal(made.expert[:, 0], 5)
    np.testing.assert_allclose(made.weight, np.take_along_axis(s, np.asarray(made.expert), 1), rtol=1e-5)
    biased = route(config, x, weights)
    np.testing.assert_array_equal(biased.expert, fakes.topk_rows(s + fakes.f64(weights["bias"]), 2))
    renormalised = route(router_config("sigmoid_bias"), x, pushed)
    chosen = np.take_along_axis(s, np.asarray(made.expert), 1)
    np.testing.assert_allclose(renormalised.weight, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)


def test_bias_update_rule_by_hand():
    config = RouterConfig(name="sigmoid_bias", bias_update_rate=0.5)
    routed = jnp.asarray([[4.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    new = routing.update_selection_bias({"bias": jnp.ones((2, 4))}, routed, config, 4)
    np.testing.assert_array_equal(new["bias"], [[0.5, 1.5, 1.5, 1.0], [1.0, 1.0, 1.0, 1.0]])


def test_bias_update_rule_balances_loads():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(DIM, EXPERTS)).astype(np.float32) * 0.3
    drift = (rng.normal(size=DIM) * 1.5).astype(
        np.float32
    )  # all tokens lean one way, so that some experts are favoured
    config, bias, routed = router_config("sigmoid_bias", bias_update_rate=0.01), jnp.zeros(EXPERTS), []
    for _ in range(150):
        x = drift + rng.normal(size=(256, DIM)).astype(np.float32)
        made = route(config, x, {"kernel": jnp.asarray(kernel), "bias": bias})
        routed.append(np.bincount(np.asarray(made.expert).ravel(), minlength=EXPERTS).astype(np.float32))
        bias = routing.update_selection_bias({"bias": bias}, jnp.asarray(routed[-1]), config, EXPERTS)["bias"]
    violation = lambda loads: loads.max() / loads.mean() - 1  # noqa: E731  # MaxVio of the paper
    assert violation(routed[0]) > 1.5
    assert violation(sum(routed[-50:])) < 0.1


# --- expert choice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "k", "real"), [(8, 2, T), (8, 2, 18), (8, 3, 5), (8, 8, 10), (7, 1, 21), (7, 2, 1)]
)
def test_expert_choice_by_hand(experts, k, real):
    """Each expert takes its ceil(n k / E) best real tokens. E = 7, n = 21: XLA's float32 21 / 7 is above 3."""
    x, weights = hidden(), fakes.router_weights("expert_choice", experts=experts)
    made = route(RouterConfig(name="expert_choice", k=k), x, weights, np.arange(T) < real)
    p = fakes.softmax(fakes.f64(x) @ fakes.f64(weights["kernel"]))
    got = {e: [] for e in range(experts)}
    for row in range(made.expert.shape[0]):
        if made.valid[row, 0]:
            got[int(made.expert[row, 0])].append(int(made.token[row]))
            assert float(made.weight[row, 0]) == pytest.approx(
                p[int(made.token[row]), int(made.expert[row, 0])], rel=1e-5
            )
    capacity = -(-real * k // experts)
    for e in range(experts):
        assert sorted(got[e]) == sorted(np.argsort(-p[:real, e], kind="stable")[:capacity].tolist())


def test_router_defaults_pass_their_own_check():
    assert routing.family(MoEConfig().router, MoEConfig().num_experts).name == "topk_of_softmax"


# --- settings that some families implement ------------------------------------------------------------------


def grouped_by_numpy(scores, groups, kept, group_score, k):
    """Experts of each token: its best groups first, then the best of their experts; ties to lower ids."""
    chosen = []
    for row in scores:
        size = len(row) // groups
        parts = [sorted(row[g * size : (g + 1) * size], reverse=True) for g in range(groups)]
        value = [part[0] if group_score == "max" else part[0] + part[1] for part in parts]
        best = sorted(range(groups), key=lambda g: (-value[g], g))[:kept]
        chosen.append(sorted((e for e in range(len(row)) if e // size in best), key=lambda e: (-row[e], e))[:k])
    return np.asarray(chosen)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bias_on_the_logits_is_added_or_refused(name):
    config = router_config(name, bias=True)
    if "bias" not in routing.FAMILIES[name].settings:
        with pytest.raises(ConfigError, match=rf"router.bias=True: router.name='{name}' does not implement it"):
            routing.family(config, EXPERTS)
        return
    x, weights = hidden(), fakes.router_weights(name)
    assert set(routing.router_arrays(config, DIM, EXPERTS)) == {*weights, "logit_bias"}
    bias = np.linspace(-2, 2, EXPERTS)
    made = route(config, x, weights | {"logit_bias": jnp.asarray(bias, jnp.float32)})
    np.testing.assert_allclose(made.logits, fakes.f64(x) @ fakes.f64(weights["kernel"]) + bias, rtol=1e-5, atol=1e-5)
    assert not np.allclose(made.weight, route(router_config(name), x, weights).weight, atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_group_limited_choice_is_numpys_or_refused(name, group_score):
    config = router_config(name, k=3, groups=4, groups_kept=2, group_score=group_score) if name != "switch" else None
    config = config or router_config(name, groups=4, groups_kept=2, group_score=group_score)
    if "groups" not in routing.FAMILIES[name].settings:
        with pytest.raises(ConfigError, match=rf"router.groups=4: router.name='{name}' does not implement it"):
            routing.family(config, EXPERTS)
        return
    x, weights = hidden(), fakes.router_weights(name)
    logits = fakes.f64(x) @ fakes.f64(weights["kernel"])
    scores = fakes.sigmoid(logits) if name == "sigmoid_bias" else fakes.softmax(logits)
    selection = scores
    if "bias" in weights:  # below 0 throughout: an expert of a group that was left out must not win with a 0
        weights["bias"] = weights["bias"] - 2
        selection = scores + fakes.f64(weights["bias"])
        assert selection.max() < 0
    expert = grouped_by_numpy(selection, 4, 2, group_score, 3)
    made = route(config, x, weights)
    np.testing.assert_array_equal(made.expert, expert)
    chosen = np.take_along_axis(scores, expert, 1)
    np.testing.assert_allclose(made.weight, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)
    assert (expert != fakes.topk_rows(selection, 3)).any()  # the groups matter
    other = "max" if group_score == "top2_sum" else "top2_sum"
    assert (expert != grouped_by_numpy(selection, 4, 2, other, 3)).any()  # and so does their score


def test_softmax_bias_by_hand():
    x, weights = hidden(), fakes.router_weights("softmax_bias")
    s = fakes.softmax(fakes.f64(x) @ fakes.f64(weights["kernel"]))
    expert = fakes.topk_rows(s + fakes.f64(weights["bias"]), 2)
    made = route(router_config("softmax_bias", renormalise=False, scale=6.0), x, weights)
    np.testing.assert_array_equal(made.expert, expert)
    np.testing.assert_allclose(made.weight, 6 * np.take_along_axis(s, expert, 1), rtol=1e-5)
    assert (expert != fakes.topk_rows(s, 2)).any()


def test_update_towards_even_share_by_hand():
    """N = 2 experts that compute and Z = 2 that do not: each of the two should have a quarter of all pairs."""
    config = RouterConfig(name="softmax_bias", bias_update_rate=0.5)
    routed = jnp.asarray([[6.0, 2.0, 0.0, 0.0], [4.0, 4.0, 8.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    new = routing.update_towards_even_share({"bias": jnp.ones((3, 4))}, routed, config, 2)
    expected = [[0.75, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.125, 1.125, 1.0, 1.0]]
    np.testing.assert_allclose(new["bias"], expected, rtol=1e-6)
    sigmoid = routing.update_selection_bias({"bias": jnp.ones((3, 4))}, routed, config, 2)
    np.testing.assert_array_equal(sigmoid["bias"], [[0.5, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0] * 4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, r"router.groups=3 does not divide num_experts=8: choose one of \[1, 2, 4, 8\]"),
        ({"groups": 0}, r"router.groups=0 does not divide"),
        ({"groups": 4, "groups_kept": 5}, r"router.groups_kept=5 must lie in \[1, router.groups=4\]"),
        ({"groups_kept": 2}, r"router.groups_kept=2 must lie in \[1, router.groups=1\]"),
        ({"groups": 4, "k": 3}, r"router.k=3 is more than the 2 experts .* keep 2 groups or more"),
        ({"groups": 8, "groups_kept": 4, "group_score": "top2_sum"}, r"a group of one expert has no two best"),
        ({"name": "softmax_of_topk", "renormalise": False}, r"renormalise=False: .* sum to 1 by construction"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        routing.family(router_config(changes.pop("name", "topk_of_softmax"), **changes), EXPERTS)
    with pytest.raises(ConfigError, match=r"groups=3 does not divide num_experts \+ zero_experts=10"):
        routing.family(router_config(groups=3), EXPERTS, zero_experts=2)
    with pytest.raises(ValueError, match=r"settings=\['sinks'\] must be among"):
        routing.register("new", settings=("sinks",))(routing.switch)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_router_that_is_nan_is_not_hidden(name, sign):
    """One expert is NaN for all tokens, of either sign: every token that has an expert has it, or all are NaN."""
    config = router_config(name)
    layer = fakes.small_layer(config, implementation="ref")
    for key, array in layer.router.arrays.items():
        if array[...].ndim == 2 and array[...].shape[1] >= EXPERTS:
            layer.router.arrays[key][...] = array[...].at[:, 1].set(jnp.copysign(jnp.nan, sign))
    y, _ = layer(jnp.asarray(hidden())[None], context(np.ones(T, bool)[None]))
    broken = np.isnan(np.asarray(y)).all(axis=-1)
    assert broken.any() if name in NONCAUSAL else broken.all()
