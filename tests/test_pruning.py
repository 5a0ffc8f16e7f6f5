"""Efficient Expert Pruning: every set of experts against loops in NumPy, and what the choice makes of a model."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from moejax import pruning
from moejax.config import ConfigError, RouterConfig
from moejax.partition.complete import prune
from moejax.sharding import RouterState
from tests import moe_fakes as fakes
from tests.small import small_model

EXPERTS, KEPT, TOKENS = 5, 3, 12


def routed_by_hand(x, layer, kept):
    """The layer's routed output if only ``kept`` exist: top-2 of the softmax over them."""
    p = fakes.softmax(x @ fakes.f64(layer.router.arrays["kernel"][...])[:, kept])
    chosen = fakes.topk_rows(p, 2)
    y = np.zeros_like(x)
    for t, row in enumerate(chosen):
        whole = p[t, row].sum() if layer.router.config.renormalise else 1
        for c in row:
            y[t] += p[t, c] / whole * fakes.ffn(x[t], *fakes.experts_of(layer)[kept[c]], layer.activation)
    return y


@pytest.mark.parametrize(("renormalise", "activation"), [(True, "swiglu"), (False, "gelu")])
def test_the_error_of_every_set_is_that_of_a_layer_without_the_others(renormalise, activation):
    config = fakes.router_config(k=2, renormalise=renormalise)
    layer = fakes.small_layer(config, activation=activation, num_experts=EXPERTS, implementation="ref")
    x = np.random.default_rng(0).normal(size=(TOKENS, fakes.DIM)).astype(np.float32)
    mask = np.arange(TOKENS) < TOKENS - 3
    sets = pruning.sets_of(fakes.model_config(moe={"num_experts": EXPERTS, "router": config}), KEPT)
    assert [tuple(s) for s in sets.tolist()] == list(itertools.combinations(range(EXPERTS), KEPT))
    errors, whole = map(np.asarray, fakes.jit(pruning.set_errors)(layer, x, mask, sets))
    real = fakes.f64(x)[mask]
    full = routed_by_hand(real, layer, list(range(EXPERTS)))
    expected = [np.linalg.norm(routed_by_hand(real, layer, list(kept)) - full) for kept in sets]
    np.testing.assert_allclose(errors, expected, rtol=1e-4)
    np.testing.assert_allclose(whole, np.linalg.norm(full), rtol=1e-5)


def test_the_best_set_of_each_layer_is_chosen_and_is_what_a_pruned_layer_computes(compiled_once):
    """Two batches: their norms are summed, as in the published code."""
    model = fakes.small_model(moe={"num_experts": 4, "implementation": "ref"})
    model_def, params, router_state = nnx.split(model, nnx.Param, RouterState)
    mesh = jax.make_mesh((1, 1, 1), ("data", "expert", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    places = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    fixed = {"positions": places, "segment_ids": np.ones_like(places), "mask": places < np.asarray([[6], [4]])}
    rows = [{"tokens": fakes.tokens(2, 6, seed), **fixed} for seed in range(2)]
    choice = pruning.choose(model_def, params, router_state, rows, 3, mesh, lambda batch: batch)
    assert choice.sets == 4 and choice.kept.shape == (2, 3)
    sums = np.zeros((2, 4))
    layers = pruning.moe_layers(model)
    for row in rows:
        out = pruning.inputs_fn(model_def, mesh)(params, router_state, row)
        assert out.shape == (2, 1, 12, fakes.DIM)
        for i, layer in enumerate(layers):
            real = fakes.f64(out[i, 0])[row["mask"].reshape(-1)]
            full = routed_by_hand(real, layer, [0, 1, 2, 3])
            sums[i] += [np.linalg.norm(routed_by_hand(real, layer, list(s)) - full)
                        for s in itertools.combinations(range(4), 3)]  # fmt: skip
    best = np.asarray(list(itertools.combinations(range(4), 3)))[sums.argmin(1)]
    np.testing.assert_array_equal(choice.kept, best)
    # the arrays of moejax.partition.complete.prune are that layer
    kept = choice.kept[0]
    arrays = {"router/arrays/kernel": layers[0].router.arrays["kernel"][...], "store/up": layers[0].store.up[...]}
    arrays, small = prune(arrays, model.config.moe, kept)
    assert small.num_experts == 3 and small.router.k == 2
    np.testing.assert_array_equal(arrays["store/up"], layers[0].store.up[...][kept])
    np.testing.assert_array_equal(arrays["router/arrays/kernel"], layers[0].router.arrays["kernel"][...][:, kept])


def test_what_cannot_be_enumerated_is_refused():
    def refused(why, kept=3, router=None, **moe):
        with pytest.raises(ConfigError, match=why):
            pruning.sets_of(small_model(router, **moe), kept)

    refused("kept=1: experts that stay, from router.k=2 to 3", kept=1)
    refused("kept=4: experts that stay", kept=4)
    refused("1,251,677,700 sets of experts", kept=24, num_experts=36)
    refused("merge parts first", parts=2)
    refused("no grouped router", router=RouterConfig(groups=2), num_experts=4)
    refused("weights must multiply outputs", weigh="input")
    refused("rows be tokens", router=RouterConfig("expert_choice", noncausal="allow"))
    model = fakes.small_model()
    split = nnx.split(model, nnx.Param, RouterState)
    with pytest.raises(ConfigError, match="needs calibration text"):
        pruning.choose(*split, [], 3, jax.make_mesh((1,), ("data",)), lambda batch: batch)
