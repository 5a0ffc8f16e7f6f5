"""Sums of wide tables: ``wide_sum`` against a loop over pairs, and where rows' combine uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from kernels_pallas.gather_rows import combine_rows
from moejax import dispatch
from moejax.dispatch import rows, wide
from moejax.sharding import MESH_AXES, batch_sharding
from moejax.types import DispatchPlan
from tests import moe_fakes as fakes
from tests.small import quick_compilation

T, K, P, D = 18, 17, 136, 3
"""Three blocks, the last of one column. With 136 rows at most 16 blocks are further ones: 8 tokens with 17 pairs."""


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def pairs(counts, seed=0):
    """A table in which so many columns of each token name a row, each row once; the others lie out of bounds."""
    rng = np.random.default_rng(seed)
    held = np.zeros((len(counts), K), bool)
    for token, count in enumerate(counts):
        held[token, rng.permutation(K)[:count]] = True
    table = np.full(held.shape, P + seed % 2, np.int32)
    table[held] = rng.permutation(P)[: held.sum()]
    return table


def arrays(table, seed=0):
    """Rows, NaN where the table names none, and weights."""
    rng = np.random.default_rng(seed)
    ys = rng.normal(size=(P, D)).astype(np.float32)
    ys[np.setdiff1d(np.arange(P), table)] = np.nan
    return ys, rng.normal(size=table.shape).astype(np.float32)


def by_loop(ys, weight, table):
    total = np.zeros((len(table), ys.shape[1]))
    for token, column in np.argwhere(table < len(ys)):
        total[token] += np.float64(weight[token, column]) * ys[table[token, column]]
    return total


run = jax.jit(wide.wide_sum)
plain = jax.jit(functools.partial(combine_rows, implementation="ref"))


def check(counts, seed=0):
    table = pairs(counts, seed)
    ys, weight = arrays(table, seed)
    got = run(ys, weight, table)
    np.testing.assert_allclose(got, by_loop(ys, weight, table), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(got, plain(ys, table, weight), rtol=1e-6, atol=1e-5)


COUNTS = {
    "none": [0] * T,
    "one each": [1] * T,
    "a block each": [8] * 17 + [0],
    "about the ends of blocks": [0, 8, 9, 16, 0, 17, 0, 0, 0, 7, 1, 0, 17, 15, 0, 9, 10, 0],
    "one more than a block": [0, 9, 9] * 6,
    "as many further blocks as there can be": [17, 0, 0, 17] + [0] * 8 + [17] * 6,
    "all on one token": [0] * 5 + [17] + [0] * 12,
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_a_loop_over_pairs(counts):
    check(counts)


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, K), min_size=T, max_size=T), seed=st.integers(0, 2**16))
def test_equals_a_loop_over_pairs_of_any_table(counts, seed):
    before = np.cumsum([0, *counts[:-1]])
    check(np.clip(counts, 0, np.maximum(P - before, 0)).tolist(), seed)  # at most P in all


def test_the_last_row_by_a_negative_index():
    table = pairs([0] * T)
    table[0, 9], table[1, 2], table[1, 3] = -1, 3, -P - 1
    ys, weight = arrays(table % P)
    expected = np.zeros((T, D), np.float32)
    expected[:2] = weight[0, 9] * ys[-1], weight[1, 2] * ys[3]
    np.testing.assert_array_equal(run(ys, weight, table), expected)
    np.testing.assert_array_equal(plain(ys, table, weight), expected)


def test_bfloat16_rows_are_summed_in_float32_over_blocks_too():
    """256 + 1 + 1 + ... in bfloat16 arithmetic stays 256. On two emulated ranks, one with ones only."""
    table = np.tile(np.arange(K, dtype=np.int32), (2, 1))
    ys = jnp.ones((2 * K, D), jnp.bfloat16).at[0].set(256)
    with dispatch.emulated(2):
        split = ys, jnp.ones((2, K)), table
        y = jax.jit(lambda: dispatch.per_shard(lambda *a: wide.wide_sum(*a[:-1]), split, (), stacked=False))()
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32).reshape(2, D), [[272.0] * D, [K] * D])


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [9, 16, 17, 33])
def test_further_blocks_are_what_rows_can_fill(columns):
    """By a table of the most blocks that some tokens can fill with some rows."""
    worth = [(count, -(-count // wide.BLOCK) - 1) for count in range(columns + 1)]
    best = np.zeros(101, int)
    for tokens in range(1, 7):
        best = np.max([np.r_[np.zeros(n, int), best[: 101 - n] + max(b, 0)] for n, b in worth], axis=0)
        bound = np.asarray([wide.further_blocks(size, tokens, columns) for size in range(101)])
        assert (bound >= best).all()
        assert (bound - best).max() <= 1  # a token that is not filled up may be counted as one


def test_it_is_used_where_it_saves_visits():
    assert wide.visits(65536, 8192, 40) == 8 * (8192 + 7943) + 4 * 8192 == 161_848  # of 327,680
    assert wide.visits(65536, 16384, 32) == 8 * (16384 + 7864) + 3 * 16384 == 243_136  # of 524,288
    assert wide.pays(65536, 8192, 40) and wide.pays(65536, 16384, 32)
    assert not wide.pays(8192 * 40, 8192, 40)  # as many rows as pairs
    assert not wide.pays(65536, 8192, 16) and not wide.pays(100, 8192, 8)  # narrow
    assert not wide.pays(512, 64, 40)  # few tokens
    assert not wide.pays(0, 0, 40)


def test_each_block_is_made_once_and_without_scatter_add():
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((P, D), np.float32), ((T, K), np.float32), ((T, K), np.int32))]
    text = jax.jit(wide.wide_sum).lower(*shapes).as_text()
    listed = wide.further_blocks(P, T, K)
    gathered = [line.split("->")[-1] for line in text.splitlines() if '"stablehlo.gather"' in line]
    assert sum(f"tensor<{T}x{D}xf32>" in line for line in gathered) == wide.BLOCK + 2
    assert sum(f"tensor<{listed}x{D}xf32>" in line for line in gathered) == wide.BLOCK
    assert "scatter-add" not in str(jax.make_jaxpr(wide.wide_sum)(*shapes))
    assert "optimization_barrier" in text


# --- rows' combine ----------------------------------------------------------------------------------------------------


def plan_of(token_of_row, row_of_pair, pair_of_row):
    return DispatchPlan(token_of_row, row_of_pair, pair_of_row, jnp.zeros(1, jnp.int32), None, jnp.int32(0))


def ways(table):
    """A table's plan as arrays: token of each row, row of each pair, pair of each row."""
    pair_of_row = np.full(P, table.size, np.int32)
    pair_of_row[table[table < P]] = np.flatnonzero(table < P)
    return pair_of_row // K, table, pair_of_row


def value_and_grads():
    """Combine of ``ys`` and dispatch of ``x`` on each device, with the gradients of both; traced anew by each call."""

    def on_shard(ys, weight, x, *rest):
        plan = plan_of(*rest[:3])
        return rows.combine(ys, weight, plan, T), rows.dispatch(x, plan)

    def loss(ys, weight, x, ways, u, v):
        y, xs = dispatch.per_shard(on_shard, (ys, weight, x, *ways), (), stacked=False)
        return jnp.vdot(y, u) + jnp.vdot(xs, v), (y, xs)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def test_combine_and_both_gradients_are_those_of_the_plain_path_on_each_device(monkeypatch):
    """On 8 devices, each with a table of its own, and rows that hold NaN."""
    ranks, rng = 8, np.random.default_rng(0)
    tables = [pairs(counts, seed) for seed, counts in enumerate([*COUNTS.values(), [3] * T])]
    given = [(*arrays(table, seed), *ways(table)) for seed, table in enumerate(tables)]
    ys, weight, *way = (np.concatenate(a) for a in zip(*given, strict=True))
    x, u, v = (rng.normal(size=(ranks * n, D)).astype(np.float32) for n in (T, T, P))
    mesh = Mesh(np.asarray(jax.devices()[:ranks]).reshape(1, ranks, 1), MESH_AXES)
    args = jax.device_put((ys, weight, x, tuple(way), u, v), batch_sharding(mesh))

    calls = []
    monkeypatch.setattr(wide, "wide_sum", lambda *a, made=wide.wide_sum: calls.append(1) or made(*a))
    with jax.set_mesh(mesh):
        expected = value_and_grads()(*args)
        assert not calls
        monkeypatch.setattr(wide, "pays", lambda *shape: True)
        got = value_and_grads()(*args)
    assert len(calls) == 2  # combine, and the gradient of dispatch
    fakes.assert_close(got, expected, 1e-5, 1e-5)
    for i, table in enumerate(tables):
        y = got[1][0][i * T : (i + 1) * T]
        np.testing.assert_allclose(y, by_loop(*given[i][:2], table), rtol=1e-5, atol=1e-5)
