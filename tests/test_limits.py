"""Limits against a brute-force reference of Algorithm 1 of 2503.05066, and the laws of their neutral settings."""

import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import limits
from moejax.config import ConfigError, RouterConfig
from moejax.limits import pieces
from tests import moe_fakes as fakes
from tests.moe_fakes import EXPERT_DIM, EXPERTS, context, random_table, router_config, table

ORDERS = ("score", "order", "reverse", "random")
KEY = jax.random.key(3)
apply = fakes.jit(lambda limit, routing, ctx: limit(routing, ctx))


def drop(factor, order="score"):
    return limits.token_drop(factor, order)


def capacity(factor, routing):
    """floor(factor t k / n) in exact arithmetic; ``factor`` as its decimal reads."""
    pairs, experts = int(np.asarray(routing.valid).sum()), routing.probs.shape[-1]
    return math.floor(Fraction(str(factor)) * pairs / experts)


def brute_force(routing, order, most):
    """Each expert sorts its column and keeps the first ``most``; among equals the earlier pair stays."""
    routing = jax.tree.map(np.asarray, routing)
    keep = np.zeros(routing.valid.shape, bool)
    token = np.arange(len(keep)) if routing.token is None else routing.token
    for e in range(routing.probs.shape[-1]):
        column = [(r, k) for r, k in np.argwhere(routing.valid) if routing.expert[r, k] == e]
        key = {
            "score": lambda rk: -float(routing.score[rk]),
            "order": lambda rk: token[rk[0]],
            "reverse": lambda rk: -token[rk[0]],
        }[order]
        for pair in sorted(column, key=key)[:most]:  # sorted() is stable
            keep[pair] = True
    return keep


def loads(routing, valid=None):
    valid = np.asarray(routing.valid if valid is None else valid)
    return np.bincount(np.asarray(routing.expert)[valid], minlength=routing.probs.shape[-1])


def cases():
    rng = np.random.default_rng(0)
    return [
        random_table(rng, 30, 3, 6, decimals=1),  # ties in the score
        random_table(rng, 30, 3, 6, decimals=1, skew=0.5, masked=7),
        random_table(rng, 30, 3, 6, skew=2.0, drop=0.3),  # an earlier limit has dropped some
        random_table(rng, 30, 3, 6, masked=30),  # nothing but padding
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_keeps_what_the_brute_force_reference_keeps(order):
    for routing in cases():
        for factor in (0.0, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 6.0):
            made = apply(drop(factor, order), routing, context(key=KEY))
            most = capacity(factor, routing)
            kept = np.asarray(made.valid)
            if order == "random":
                assert (kept <= np.asarray(routing.valid)).all()
                np.testing.assert_array_equal(loads(routing, kept), np.minimum(loads(routing), most))
            else:
                np.testing.assert_array_equal(kept, brute_force(routing, order, most))
            # nothing but `valid` is touched: weights are not given to anyone, entries stay
            fakes.assert_same((made.expert, made.weight, made.score), (routing.expert, routing.weight, routing.score))


def test_expert_choice_tables_rank_by_the_token_of_each_row():
    rng = np.random.default_rng(0)
    token = rng.permutation(40) % 10
    routing = table(rng.integers(0, 4, (40, 1)), rng.random((40, 1)), np.ones((40, 1)), np.ones((40, 1)), 4, token)
    for order in ORDERS[:3]:
        kept = apply(drop(0.5, order), routing, context()).valid
        np.testing.assert_array_equal(kept, brute_force(routing, order, 5))


def test_rank_in_expert_by_hand():
    routing = table([[0, 1], [0, 1], [1, 0], [0, 1]], np.zeros((4, 2)), np.zeros((4, 2)),
                    [[True, True], [True, False], [True, True], [True, True]], 2)  # fmt: skip
    priority = jnp.asarray([[0.5, 0.1], [0.9, 9.0], [0.1, 0.5], [0.2, 0.7]])
    rank = np.asarray(limits.rank_in_expert(routing, priority))
    expert_0 = [(1, 0), (0, 0), (2, 1), (3, 0)]  # 0.9, then the tie at 0.5 in order of pairs, then 0.2
    expert_1 = [(3, 1), (0, 1), (2, 0)]  # 0.7, then the tie at 0.1; 9.0 is not valid
    for pairs in (expert_0, expert_1):
        assert [rank[pair] for pair in pairs] == list(range(len(pairs)))


# --- capacity -----------------------------------------------------------------------------------------------


def test_the_best_pair_of_a_token_by_hand():
    """The first of the best among the valid ones, be they -inf; NaN is worse than all."""
    nan, inf = math.nan, math.inf
    score = np.asarray([[-inf, -inf, -inf], [nan, 0.5, 0.2], [0.9, 0.9, 1.0], [0.1, 0.2, 0.3], [nan, nan, -inf]])
    valid = np.asarray([[0, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 0]], bool)
    best = pieces.best_of_token(table([[0, 1, 2]] * 5, score, score, valid, 3))
    assert np.asarray(best).tolist() == [
        [False, True, False], [False, True, False], [True, False, False], [False] * 3, [True, False, False],
    ]  # fmt: skip


def test_pairs_are_sorted_by_several_keys():
    """Equal ones, both zeros too, in order of position; infinities at the ends and NaN last."""
    rng = np.random.default_rng(0)
    score = rng.choice(np.asarray([-np.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 0.3, 7, np.inf, np.nan], np.float32), 200)
    group, first = rng.integers(0, 3, 200), rng.random(200) < 0.5
    order = pieces._sorted_by([jnp.asarray(group), jnp.asarray(first), jnp.asarray(score)])
    np.testing.assert_array_equal(order, np.lexsort((score, first, group)))


@pytest.mark.parametrize(("experts", "k"), [(7, 3), (9, 5), (60, 4), (41, 1), (61, 6)])
@pytest.mark.parametrize("rows", [3, 31])
def test_a_factor_of_n_over_k_or_infinity_drops_nothing(experts, k, rows):
    """Also when one expert gets every token; in float32 (n / k) (t k / n) can land below t."""
    expert = np.broadcast_to(np.arange(k), (rows, k))
    routing = table(expert, np.ones((rows, k)), np.ones((rows, k)), np.ones((rows, k)), experts)
    for factor in (experts / k, math.inf):
        assert np.asarray(apply(drop(factor), routing, context()).valid).all()


@pytest.mark.parametrize(("factor", "rows", "experts"), [(1.3, 680, 4), (1.4, 50, 5), (1.0, 82, 41), (1.0, 61 * 7, 61)])
def test_capacity_is_the_floor_of_the_exact_product(factor, rows, experts):
    """1.3 x 170 is 221; in float32 it is 220.99998, and 82 times float32(1 / 41) is below 2."""
    routing = table(np.zeros((rows, 1)), np.ones((rows, 1)), np.ones((rows, 1)), np.ones((rows, 1)), experts)
    assert int(apply(drop(factor), routing, context()).valid.sum()) == capacity(factor, routing)


def test_padding_takes_no_capacity():
    rng = np.random.default_rng(1)
    routing = random_table(rng, 24, 2, 4, skew=1.0)
    shown = jax.tree.map(lambda leaf: leaf[:16], routing)
    mask = np.arange(24) < 16
    padded = table(
        routing.expert, routing.score + 5 * ~mask[:, None], routing.weight, mask[:, None] & np.ones((24, 2), bool), 4
    )
    for order in ORDERS[:3]:
        a, b = (apply(drop(0.75, order), r, context()).valid for r in (shown, padded))
        np.testing.assert_array_equal(a, b[:16])
        assert not b[16:].any() and not a.all()


def test_score_order_does_not_care_for_the_order_of_tokens_and_order_does():
    rng = np.random.default_rng(2)
    routing, shuffle = random_table(rng, 30, 3, 6, skew=1.0), rng.permutation(30)
    shuffled = jax.tree.map(lambda leaf: leaf[shuffle], routing)
    for order, same in (("score", True), ("order", False), ("reverse", False)):
        a, b = (np.asarray(apply(drop(0.75, order), r, context()).valid) for r in (routing, shuffled))
        assert np.array_equal(a[shuffle], b) == same, order


def test_random_order_is_uniform_and_follows_the_key():
    rows, draws = 8, 2000
    routing = table(np.zeros((rows, 1)), np.arange(rows)[:, None], np.ones((rows, 1)), np.ones((rows, 1)), 2)
    kept = fakes.jit(jax.vmap(lambda key: drop(0.5, "random")(routing, context(key=key)).valid[:, 0]))
    frequency = np.asarray(kept(jax.random.split(KEY, draws)), np.float64).mean(0)
    np.testing.assert_allclose(frequency, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / draws))  # 2 of 8, five standard errors
    limit = drop(0.5, "random")
    fakes.assert_same(apply(limit, routing, context(key=KEY)).valid, apply(limit, routing, context(key=KEY)).valid)
    with pytest.raises(ValueError, match=r"TokenDrop\(order='random'\) needs RouteContext\(key="):
        limit(routing, context())


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="order='last': choose one of score, order, reverse, random"):
        drop(1.0, "last")
    for factor in (-0.5, math.nan):
        with pytest.raises(ConfigError, match="multiple of the mean load, 0 or more"):
            drop(factor)


def test_limits_apply_in_turn():
    routing = cases()[0]
    first, second = drop(1.0, "order"), drop(1.0)
    together = fakes.jit(limits.apply)((first, second), routing, context())
    one_by_one = apply(second, apply(first, routing, context()), context())
    np.testing.assert_array_equal(together.valid, one_by_one.valid)
    assert one_by_one.valid.sum() < apply(first, routing, context()).valid.sum() < routing.valid.sum()
    fakes.assert_same(limits.apply((), routing, context()), routing)


# --- inside a layer -----------------------------------------------------------------------------------------

SHAPE = (2, 16)
MASK = np.arange(16)[None] < np.asarray([[16], [9]])


@functools.cache
def layer():
    return fakes.small_layer(router_config(), shared_experts=1, implementation="ref")


@pytest.fixture(scope="module")
def run():
    """``limits -> (y, metrics)`` of one layer, and how often it was traced."""
    traces = []

    @fakes.jit
    def forward(layer, x, mask, limit):
        traces.append(None)
        return layer(x, context(mask, key=KEY), limit)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(*SHAPE, fakes.DIM)), jnp.float32)

    def call(*limit, x=x):
        return forward(layer(), x, jnp.asarray(MASK), limit)

    call.traces, call.x = traces, x
    return call


@pytest.mark.parametrize("factor", [EXPERTS / 2, 100.0, math.inf])
def test_a_large_factor_is_no_limit_bit_for_bit(run, factor):
    fakes.assert_same(run(drop(factor)), run())


def test_factor_zero_leaves_the_shared_experts_alone(run):
    y, m = run(drop(0.0))
    np.testing.assert_array_equal(y, layer().shared_output(run.x))
    assert m.lost_tokens == m.tokens == MASK.sum()
    assert m.dropped == 2 * MASK.sum() and not np.asarray(m.computed).any()


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.0, 1.5, 2.0])
def test_dropped_share_is_the_formula_of_the_paper(run, factor):
    """DT = sum relu(N_i - C) / sum N_i; kept and dropped pairs add up; what the losses read stays the router's."""
    _, plain = run()
    _, m = run(drop(factor))
    n, most = np.asarray(plain.routed), math.floor(factor * MASK.sum() * 2 / EXPERTS)
    np.testing.assert_array_equal(m.computed, np.minimum(n, most))
    assert float(m.dropped) == np.maximum(n - most, 0).sum() == n.sum() - np.asarray(m.computed).sum()
    assert m.added == m.overflow == 0
    for field in ("tokens", "routed", "prob_sum", "gate_sum", "load_prob_sum", "z_sum", "entropy_sum"):
        fakes.assert_same(getattr(m, field), getattr(plain, field))


def test_a_dropped_pair_adds_nothing_and_its_weight_goes_to_no_one(run):
    """Against a NumPy sum over the pairs that the reference keeps, with the router's own weights."""
    x = np.asarray(run.x).reshape(-1, fakes.DIM)
    kernel = layer().router.weights()["kernel"]
    p = fakes.softmax(fakes.f64(x) @ fakes.f64(kernel))
    expert = fakes.topk_rows(p, 2)
    score = np.take_along_axis(p, expert, 1)
    made = table(
        expert, score, score / score.sum(1, keepdims=True), np.broadcast_to(MASK.reshape(-1, 1), (32, 2)), EXPERTS
    )
    kept = brute_force(made, "score", capacity(0.75, made))
    y, m = run(drop(0.75))
    made = table(expert, score, made.weight, kept, EXPERTS)
    expected = fakes.moe(fakes.f64(x), made, fakes.experts_of(layer()), "swiglu")
    y = (np.asarray(y) - np.asarray(layer().shared_output(run.x))).reshape(-1, fakes.DIM)
    np.testing.assert_allclose(y[MASK.ravel()], expected[MASK.ravel()], rtol=1e-4, atol=1e-5)
    assert int(m.lost_tokens) == (MASK.ravel() & ~kept.any(1)).sum()


def test_changing_the_factor_does_not_recompile(run):
    run(drop(1.0))
    before = len(run.traces)
    for factor in (0.0, 0.3, 7.0):
        run(drop(factor))
    assert len(run.traces) == before
    run(drop(1.0, "order"))
    assert len(run.traces) == before + 1  # it can count


def test_the_configs_limit_is_used_unless_others_are_given():
    # jit shares nothing here: two configs, eager stages up to the metrics
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, fakes.DIM)), jnp.float32)
    limited = fakes.small_layer(router_config(), capacity_factor=0.5, expert_dim=EXPERT_DIM)
    begin = fakes.jit(lambda layer, limit: layer.begin(x, context(), limit).metrics.dropped[0], static_argnums=1)
    assert float(begin(limited, None)) > 0
    assert float(begin(limited, ())) == 0
    assert limited.config.router == RouterConfig(k=2, noncausal="allow")


@pytest.mark.parametrize(
    "limit",
    [
        limits.token_drop(0.5),
        limits.token_drop(0.5, renormalise=True),
        limits.expanded_drop(0.5),
        limits.reroute(0.5),
        limits.device_budget(0.5, ranks=2),
        limits.measured_budget(ranks=2),
    ],
    ids=lambda limit: type(limit).__name__,
)
def test_scores_that_are_nan_go_first(limit):
    """A broken router shows in the outputs with the limit as without: its pairs are the last to be dropped."""
    table = fakes.random_table(np.random.default_rng(0), 32, 2, 4)
    for nan in (jnp.nan, -jnp.nan):
        broken = dataclasses.replace(table, score=table.score.at[:3].set(nan))
        kept = limit(broken, context(expert_dim=16))
        assert np.asarray(kept.valid)[:3, :2].all() and not np.asarray(kept.valid)[3:, :2].all()
