"""Copies of hot experts: every pair computed once, the plain layer's output and gradients, and the loads evened out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import dispatch
from moejax.config import ConfigError
from moejax.replication import max_over_mean, rank_loads, replicate, stacked, store_copies
from tests import moe_fakes as fakes
from tests.moe_fakes import DIM, EXPERTS, context, random_table
from tests.small import quick_compilation
from tests.test_dispatch_ep import ROUTERS, with_taste

LOADS = np.asarray([100, 3, 40, 2, 30, 0, 5, 20])


@pytest.mark.parametrize(("ranks", "extra"), [(1, 0), (2, 1), (4, 1), (4, 2), (8, 1), (8, 7)])
@pytest.mark.parametrize("loads", [LOADS, np.zeros(EXPERTS), np.ones(EXPERTS)], ids=["skewed", "none", "even"])
def test_placements_hold_every_expert_and_even_out_the_ranks(ranks, extra, loads):
    placement = replicate(loads, ranks, extra)
    slots, copies = np.asarray(placement.expert_of_slot), np.asarray(placement.copies)
    assert slots.shape == (EXPERTS + ranks * extra,)
    np.testing.assert_array_equal(np.bincount(slots, minlength=EXPERTS), copies)
    assert (copies >= 1).all() and (copies <= ranks).all()
    for expert in range(EXPERTS):
        assert (slots[placement.slots_of_expert[expert]] == expert).all()
        assert len(set(np.asarray(placement.slots_of_expert[expert]).tolist())) == copies[expert]
    before, after = rank_loads(loads, ranks), rank_loads(loads, ranks, placement)
    assert before.sum() == pytest.approx(after.sum())
    if extra:
        assert max_over_mean(after) <= max_over_mean(before)


def test_loads_by_hand():
    """Two ranks, one more slot each: experts 0 and 2 are on both; 30 on one of them, 20 + 5 + 3 fill the other."""
    placement = replicate(LOADS, 2, 1)
    assert np.asarray(placement.copies).tolist() == [2, 1, 2, 1, 1, 1, 1, 1]
    assert max_over_mean(rank_loads(LOADS, 2)) == pytest.approx(145 / 100)
    assert max_over_mean(rank_loads(LOADS, 2, placement)) == pytest.approx(102 / 100)


def test_pairs_are_spread_over_copies_by_token():
    placement = replicate(LOADS, 4, 2)
    table = random_table(np.random.default_rng(0), 32, 3, EXPERTS, drop=0.2)
    table = dataclasses.replace(table, zero_experts=0)
    made = placement.remap(table)
    np.testing.assert_array_equal(placement.expert_of_slot[made.expert], table.expert)
    copy = np.asarray(placement.copies)[table.expert]
    order = np.asarray(placement.slots_of_expert)[np.asarray(table.expert), np.arange(32)[:, None] % copy]
    np.testing.assert_array_equal(made.expert, order)
    np.testing.assert_array_equal(made.valid, table.valid)
    assert made.probs.shape == (32, EXPERTS + 8)
    np.testing.assert_allclose(made.probs.sum(1), table.probs.sum(1), rtol=1e-6)


def test_experts_without_a_computation_stay_last():
    placement = replicate(LOADS, 2, 1)
    table = random_table(np.random.default_rng(0), 16, 3, EXPERTS + 2)
    made = placement.remap(dataclasses.replace(table, zero_experts=2))
    free = np.asarray(table.expert) >= EXPERTS
    assert free.any()
    np.testing.assert_array_equal(np.asarray(made.expert)[free], np.asarray(table.expert)[free] + 2)
    assert made.probs.shape[1] - made.zero_experts == EXPERTS + 2


def test_stored_copies_are_the_experts_arrays():
    """Of one layer and of two that stand stacked, whose placements differ in their most copies."""
    shared = fakes.small_layer(ROUTERS["topk"], implementation="ref", dispatcher="ep")
    layer = jax.tree.map(lambda leaf: leaf, shared)
    placements = [replicate(LOADS, 4, 1), replicate(np.ones(EXPERTS), 4, 1)]
    pair = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), layer)
    before = {name: np.asarray(leaf) for name, leaf in (("up", layer.store.up[...]), ("down", layer.store.down[...]))}
    store_copies(layer, placements[0])
    store_copies(pair, stacked(placements))
    (alone,), (both,) = layer.transforms, pair.transforms
    weights = layer.store.get()
    assert alone.weights(weights) is weights
    for i, placement in enumerate(placements):
        for name, value in before.items():
            expected = value[np.asarray(placement.expert_of_slot)]
            if i == 0:
                np.testing.assert_array_equal(getattr(weights, name), expected)
            np.testing.assert_array_equal(getattr(pair.store, name)[i], (1 + i) * expected)
        mine, wide = placement.slots_of_expert, both.slots_of_expert[i]
        np.testing.assert_array_equal(wide[:, : mine.shape[1]], mine)
        assert (np.asarray(wide[:, mine.shape[1] :]) == np.asarray(mine[:, :1])).all()


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_layer_with_copies_is_the_layer(ranks, stored):
    """Output bit for bit; gradients, sums over copies, within rounding. Over 4 ranks its tokens really travel."""
    plain = with_taste(
        fakes.small_layer(ROUTERS["topk"], implementation="ref", dispatcher="ep"), -0.5 * np.arange(EXPERTS)
    )
    placement = replicate(LOADS, 4, 1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, DIM)), jnp.float32)

    def run(layer, x, transforms):
        def loss(layer, x):
            layer = jax.tree.map(lambda leaf: leaf, layer)
            layer.transforms = nnx.data(transforms)
            y, metrics = layer(x, context())
            return jnp.sum(y**2), (y, metrics)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    copied = jax.tree.map(lambda leaf: leaf, plain)
    transforms = (placement,)
    if stored:
        store_copies(copied, placement)
        transforms = copied.transforms
        copied.transforms = ()
    with quick_compilation(), dispatch.emulated(ranks):
        grads, (y, metrics) = jax.jit(run)(plain, x, ())
        got_grads, (got, got_metrics) = jax.jit(run)(copied, x, transforms)
    np.testing.assert_array_equal(got, y)
    slots = np.asarray(placement.expert_of_slot)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        if a.shape != b.shape:  # a gradient for each copy: an expert's is their sum
            a = jnp.zeros_like(b).at[slots].add(a)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))
    assert got_metrics.computed.shape == (EXPERTS + 4,)
    by_expert = np.bincount(slots, np.asarray(got_metrics.computed), EXPERTS)
    np.testing.assert_array_equal(by_expert, metrics.computed)
    assert float(got_metrics.overflow) == float(got_metrics.dropped) == 0


@pytest.mark.parametrize(
    ("loads", "ranks", "extra", "message"),
    [
        (LOADS, 3, 0, "ranks=3 does not divide the 8 experts"),
        (LOADS, 4, 7, "extra=7: a rank of 4 holds 2 of 8 experts, and has use for 0 to 6"),
        (-LOADS, 4, 1, "loads must be finite and not negative"),
    ],
)
def test_what_cannot_be_placed_is_refused(loads, ranks, extra, message):
    with pytest.raises(ConfigError, match=message):
        replicate(loads, ranks, extra)
