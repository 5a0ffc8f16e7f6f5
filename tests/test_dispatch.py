"""Dispatch and combine: both back ends against a NumPy loop over pairs, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from moejax import dispatch, experts
from moejax.types import SoftRouting
from tests import moe_fakes as fakes
from tests.moe_fakes import context, random_table, router_config, table

T, D, E = 12, 4, 8
BACKENDS = ("local", "dense")


def round_trip(x, factor, weight, routing, backend):
    """Dispatch, an "expert" that multiplies its rows by its own factor, combine."""
    plan = dispatch.PLANS[backend](routing, T)
    xs = dispatch.dispatch(x, plan, backend=backend)
    expert = jnp.searchsorted(jnp.cumsum(plan.group_sizes), jnp.arange(xs.shape[0]), side="right")
    ys = xs * factor.at[expert].get(mode="fill", fill_value=jnp.nan)[:, None]  # rows of no group: NaN
    return dispatch.combine(ys, weight, plan, T, backend=backend)


@functools.partial(fakes.jit, static_argnums=4)
def value_and_grads(x, factor, routing, u, backend):
    def loss(x, factor, weight):
        y = round_trip(x, factor, weight, routing, backend)
        return jnp.sum(y * u), y

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, factor, routing.weight)


def by_loop(x, factor, routing, u):
    """y[t] = sum over valid pairs of weight * factor[expert] * x[t], and its gradients for the cotangent u."""
    x, factor, u, weight = (fakes.f64(a) for a in (x, factor, u, routing.weight))
    expert, valid = np.asarray(routing.expert), np.asarray(routing.valid)
    y, dx, dfactor, dweight = np.zeros_like(x), np.zeros_like(x), np.zeros_like(factor), np.zeros_like(weight)
    for r, k in np.argwhere(valid):
        t = r if routing.token is None else int(routing.token[r])
        e, w = expert[r, k], weight[r, k]
        y[t] += w * factor[e] * x[t]
        dx[t] += w * factor[e] * u[t]
        dfactor[e] += w * x[t] @ u[t]
        dweight[r, k] += factor[e] * x[t] @ u[t]
    return (dx, dfactor, dweight), y


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((T, D), (E,), (T, D))]


def tables(k):
    rng = np.random.default_rng(k)
    one = np.broadcast_to(np.arange(k) + min(3, E - k), (T, k))
    ones = np.ones((T, k))
    return {
        "random": random_table(rng, T, k, E),
        "skewed, empty experts, padding": random_table(rng, T, k, E, skew=2.0, masked=4),
        "dropped pairs": random_table(rng, T, k, E, drop=0.5),
        "k experts for all": table(one, ones, ones, ones, E),
        "all dropped": random_table(rng, T, k, E, drop=1.0),
    }


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_a_loop_over_pairs(backend, k):
    x, factor, u = arrays()
    for name, routing in tables(k).items():
        got = value_and_grads(x, factor, routing, u, backend)
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name),
            got,
            by_loop(x, factor, routing, u),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_expert_choice_tables_too(backend):
    """Rows are pairs: a token in several rows, in none, and rows that hold nothing."""
    x, factor, u = arrays()
    rng = np.random.default_rng(0)
    token = np.concatenate([np.argsort(rng.random(T))[:3] for _ in range(E)])
    expert = np.repeat(np.arange(E), 3)[:, None]
    routing = table(expert, np.ones((24, 1)), rng.random((24, 1)), rng.random((24, 1)) < 0.7, E, token)
    assert len(set(token.tolist())) < T  # the loop below would also pass if each token had a row
    fakes.assert_close(value_and_grads(x, factor, routing, u, backend), by_loop(x, factor, routing, u), 1e-5, 1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_dispatch_and_its_gradient_are_transposes(k):
    """<dispatch(x), u> == <x, dispatch^T(u)>, and likewise combine."""
    x, _, _ = arrays()
    rng = np.random.default_rng(0)
    for routing in tables(k).values():
        plan = dispatch.local_plan(routing, T)
        u = jnp.asarray(rng.normal(size=(T * k, D)), jnp.float32)
        xs, back = jax.vjp(lambda x, plan=plan: dispatch.dispatch(x, plan), x)
        assert float(jnp.vdot(xs, u)) == pytest.approx(float(jnp.vdot(x, back(u)[0])), rel=1e-5, abs=1e-5)
        y, back = jax.vjp(lambda ys, plan=plan, w=routing.weight: dispatch.combine(ys, w, plan, T), u)
        assert float(jnp.vdot(y, x)) == pytest.approx(float(jnp.vdot(u, back(x)[0])), rel=1e-5, abs=1e-5)


def test_a_plan_sorts_pairs_by_expert_and_knows_the_way_back():
    for routing in tables(3).values():
        plan = jax.tree.map(np.asarray, dispatch.local_plan(routing, T))
        expert, valid = np.asarray(routing.expert), np.asarray(routing.valid)
        pairs = sorted((expert[r, k], r * 3 + k) for r, k in np.argwhere(valid))
        n = len(pairs)
        np.testing.assert_array_equal(plan.group_sizes, np.bincount(expert[valid], minlength=E))
        np.testing.assert_array_equal(plan.pair_of_row, [p for _, p in pairs] + [T * 3] * (T * 3 - n))
        np.testing.assert_array_equal(plan.token_of_row, [p // 3 for _, p in pairs] + [T] * (T * 3 - n))
        np.testing.assert_array_equal(plan.row_of_pair[valid], np.argsort([p for _, p in pairs]))
        assert (plan.row_of_pair[~valid] == T * 3).all()
        assert plan.overflow == 0
        dense = dispatch.dense_plan(routing, T)
        np.testing.assert_array_equal(dense.token_of_row[dense.row_of_pair[valid]], np.argwhere(valid)[:, 0])


def test_local_combine_adds_without_scatter():
    """A scatter-add has no fixed order on an accelerator; a sum over k of gathered rows has."""
    x, factor, u = arrays()
    routing = tables(3)["random"]
    plain = value_and_grads.__wrapped__
    jaxpr, dense = (str(jax.make_jaxpr(lambda x, f, b=b: plain(x, f, routing, u, b))(x, factor)) for b in BACKENDS)
    assert "scatter-add" in dense  # what plain autodiff of a gather gives
    assert jaxpr.count("scatter-add") == 1  # of the toy's own factor[expert]
    a, b = (value_and_grads(x, factor, routing, u, "local") for _ in range(2))
    fakes.assert_same(a, b)


def test_bfloat16_rows_are_summed_in_float32():
    """256 + 1 + 1 + 1 in bfloat16 arithmetic stays 256."""
    k = 4
    routing = table(np.broadcast_to(np.arange(k), (T, k)), np.ones((T, k)), np.ones((T, k)), np.ones((T, k)), E)
    plan = dispatch.local_plan(routing, T)
    ys = jnp.where((jnp.arange(T * k) < T)[:, None], 256, 1).astype(jnp.bfloat16) * jnp.ones((1, D), jnp.bfloat16)
    y = dispatch.combine(ys, routing.weight, plan, T)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), np.float32(jnp.bfloat16(259.0)))
    assert float(jnp.bfloat16(259.0)) > 256


def test_a_dense_mixture_is_refused():
    soft = SoftRouting(dispatch=jnp.zeros((T, E, 2)), combine=jnp.zeros((T, E, 2)), probs=jnp.zeros((T, E)))
    for name, plan in dispatch.PLANS.items():
        with pytest.raises(TypeError, match=f"the {name} dispatcher takes pairs, not a SoftRouting"):
            plan(soft, T)


# --- with the grouped FFN -----------------------------------------------------------------------------------


@jax.custom_vjp
def _poison(rows, tail):
    return jnp.where(tail[:, None], jnp.nan, rows)


_poison.defvjp(
    lambda rows, tail: (_poison(rows, tail), tail),
    lambda tail, ct: (jnp.where(tail[:, None], jnp.nan, ct), None),
)


def poisoned(plain):
    """A kernel that leaves NaN in rows past the groups, in its result and in the gradient of its input."""

    def grouped_ffn(xs, group_sizes, *args):
        tail = jnp.arange(xs.shape[0]) >= jnp.sum(group_sizes)
        return _poison(plain(_poison(xs, tail), group_sizes, *args), tail)

    return grouped_ffn


def layer_grads(layer, x, mask):
    """Traced anew at each call, so that a replaced kernel is seen."""

    def loss(layer, x):
        y, metrics = layer(x, context(mask))
        return jnp.sum(jnp.where(mask[..., None], y, 0.0) ** 2), (y, metrics)

    return fakes.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(layer, x)


def by_places(used):
    """A gather that goes by the places where it is told them, as a kernel does; rows that have none get NaN."""

    def gather_rows(x, index, count=None, places=None, implementation=None):
        if places is None:
            return kernels_pallas.gather_rows(x, index, count, implementation=implementation)
        used.append(places.shape)
        rows = jnp.full((index.shape[0], x.shape[1]), jnp.nan, x.dtype)
        return rows.at[places].set(x[:, None], mode="drop", unique_indices=True)

    return gather_rows


@pytest.mark.parametrize(
    "moe",
    [
        {"capacity_factor": 0.75},
        {"capacity_limits": ("threshold_drop:threshold=0.3,gap=0.1",)},
        {"zero_experts": 2},
    ],
    ids=["dropped", "halved", "zero experts"],
)
def test_a_tokens_places_are_the_rows_that_are_its(monkeypatch, moe):
    """A kernel reads each token once and writes it to its places: the same rows as by the index."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, fakes.DIM)), jnp.float32)
    mask = jnp.arange(8)[None] < jnp.asarray([[8], [3]])

    def run():
        layer = fakes.small_layer(**{"router": router_config("topk_of_softmax"), "implementation": "ref"} | moe)
        return layer_grads(layer, x, mask)

    plain, used = run(), []
    monkeypatch.setattr(dispatch.rows, "gather_rows", by_places(used))
    fakes.assert_close(run(), plain, 1e-6, 1e-6)  # the compiler fuses other operations, and rounds elsewhere
    assert used


# Where rows are left over the table of expert choice has no part.
@pytest.mark.parametrize("name", ["topk_of_softmax", pytest.param("expert_choice", marks=pytest.mark.slow)])
def test_nan_in_rows_past_the_groups_reaches_nothing(monkeypatch, name):
    """With padding and dropped pairs there are such rows; kernels may leave anything in them."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, fakes.DIM)), jnp.float32)
    mask = jnp.arange(8)[None] < jnp.asarray([[8], [3]])

    def run(**moe):
        layer = fakes.small_layer(router_config(name), capacity_factor=0.75, implementation="ref", **moe)
        return layer_grads(layer, x, mask)

    plain = run()
    dense = run(dispatcher="dense")
    seen, kernel = [], poisoned(experts.grouped_ffn)
    monkeypatch.setattr(experts, "grouped_ffn", lambda *a: seen.append(a) or kernel(*a))
    got = run()
    assert seen and float(plain[1][1].dropped) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    fakes.assert_same(got, plain)
    # the reference back end, gradients to every weight included (its config differs, so leaf by leaf)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
