"""The LongCat block, placements of dense layers, and whole models with the settings of published ones."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.attention import attention_input
from moejax.blocks import LongCatBlock
from moejax.config import RopeConfig
from moejax.model import layer_groups, moe_layer_ids, repeated_patterns
from moejax.sharding import batch_sharding
from moejax.train import Trainer
from tests import moe_fakes as fakes
from tests import small
from tests.moe_fakes import context, model_config, router_config
from tests.small import quick_compilation, small_config, small_model
from tests.test_moe import MASK, B, S, assert_as_on_one_device, hidden, mesh_of, model_value_and_grad, placed

LONGCAT = {
    "wiring": "longcat",
    "moe": {"router": router_config("softmax_bias", k=3, renormalise=False, scale=2.0), "zero_experts": 2},
}


@functools.cache
def longcat():
    """Its selection bias is small, as trained ones are, so that the scores matter."""
    model = fakes.small_model(**LONGCAT)
    for group in model.groups:
        for block in group.blocks:
            bias = block.moe.router.arrays["bias"]
            bias[...] = bias[...] * 0.05
    return model


def test_the_longcat_block_is_its_equations():
    config = model_config(**LONGCAT)
    block = fakes.filled(lambda: LongCatBlock(config, True, jax.random.key(0)))
    tokens = attention_input(None, None, jnp.asarray(MASK), None, (B, S))
    x, ctx = hidden(), context(MASK)

    @fakes.jit
    def both(b, x):
        h = x + b.attention(b.attention_norm(x), tokens)[0]
        z = b.ffn_norm(h)
        m, metrics = b.moe(z, ctx)
        h = h + b.ffn(z)
        h = h + b.attention_2(b.attention_norm_2(h), tokens)[0]
        y = h + b.ffn_2(b.ffn_norm_2(h)) + m
        return (y, metrics), b(x, tokens, ctx, None, None)

    (y, metrics), (got, report, cache) = both(block, x)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)
    fakes.assert_close(report.metrics, metrics)
    assert cache is None
    names = {str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(block))}
    first = {"attention_norm", "attention", "ffn_norm", "ffn"}
    assert names == first | {f"{name}_2" for name in first} | {"moe"}
    with pytest.raises(ValueError, match="experts in every block"):
        LongCatBlock(config, False, jax.random.key(0))


def test_what_stands_between_begin_and_the_end_does_not_touch_the_experts():
    """Overlap is by data dependence: the experts' rows depend on the first attention, on nothing behind it."""
    block = fakes.filled(lambda: LongCatBlock(model_config(**LONGCAT), True, jax.random.key(0)))
    tokens = attention_input(None, None, None, None, (B, S))

    @fakes.jit
    def slopes(block):
        def experts(block):
            return block(hidden(), tokens, context(), None, None)[1].metrics.z_sum

        return jax.grad(experts)(block)

    grads = slopes(block)
    for name in ("ffn", "attention_2", "ffn_2", "ffn_norm_2", "attention_norm_2"):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(getattr(grads, name))), name
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads.attention))


@pytest.mark.slow  # with latent attention: test_parity.py
def test_longcat_with_two_caches_is_longcat_without():
    model, tokens = longcat(), jnp.asarray(fakes.tokens(2, 7))

    @fakes.jit
    def run(model, tokens):
        cache = model.init_cache(2, 8)
        first = model(tokens[:, :4], cache=cache)
        logits = [first.logits]
        cache = first.cache
        for i in range(4, 7):
            out = model(tokens[:, i : i + 1], cache=cache)
            logits.append(out.logits)
            cache = out.cache
        return model(tokens).logits, jnp.concatenate(logits, axis=1), cache

    whole, stepwise, cache = run(model, tokens)
    np.testing.assert_allclose(stepwise, whole, rtol=1e-4, atol=1e-4)
    assert [len(block) for group in cache.layers for block in group] == [2]  # one block, two attentions
    a, b = cache.layers[0][0]
    assert not np.allclose(a.k, b.k)


# --- placement ----------------------------------------------------------------------------------------------


def spelled(groups):
    return [flag for pattern, repeats in groups for flag in pattern * repeats]


@pytest.mark.parametrize(("first_dense", "every"), list(itertools.product(range(5), range(1, 4))))
def test_groups_without_dense_layers_are_what_they_were(first_dense, every):
    """Checkpoints hold arrays by group and place in its pattern: these groups must never change."""
    for layers in (4, 7):
        config = small_model(first_dense=first_dense, every=every)
        config = type(config)(**{**vars(config), "num_layers": layers})
        dense = min(first_dense, layers)
        repeats, tail = divmod(layers - dense, every)
        pattern = (False,) * (every - 1) + (True,)
        expected = [((False,), dense)] if dense else []
        expected += [(pattern, repeats)] if repeats else []
        expected += [((False,) * tail, 1)] if tail else []
        assert layer_groups(config) == expected


def of_layers(layers, dense, **moe):
    return model_config(num_layers=layers, moe={"dense_layers": dense, **moe})


def test_dense_layers_may_stand_anywhere():
    assert layer_groups(of_layers(24, (0,))) == [((False,), 1), ((True,), 23)]
    assert layer_groups(of_layers(24, (0, 23))) == [((False,), 1), ((True,), 22), ((False,), 1)]
    assert layer_groups(of_layers(24, tuple(range(0, 24, 3)))) == [((False, True, True), 8)]
    assert layer_groups(of_layers(9, (0, 3, 5, 7))) == [((False,), 1), ((True,), 2), ((False, True), 3)]
    assert moe_layer_ids(of_layers(9, (0, 3, 5, 7))) == [1, 2, 4, 6, 8]
    # naming layers that are dense anyhow changes no group
    assert layer_groups(of_layers(6, (0, 1), first_dense=2)) == layer_groups(of_layers(6, (), first_dense=2))
    assert moe_layer_ids(of_layers(6, (3,), first_dense=1, every=2)) == [2, 4]


def test_found_patterns_spell_the_layers_with_the_fewest_blocks():
    def fewest(flags):
        best = [0] * (len(flags) + 1)
        for start in reversed(range(len(flags))):
            best[start] = min(
                width + best[start + width * n]
                for width in range(1, len(flags) - start + 1)
                for n in range(1, (len(flags) - start) // width + 1)
                if flags[start : start + width * n] == flags[start : start + width] * n
            )
        return best[0]

    for layers in range(1, 10):
        for flags in itertools.product((False, True), repeat=layers):
            groups = repeated_patterns(flags)
            assert tuple(spelled(groups)) == flags
            assert sum(len(pattern) for pattern, _ in groups) == fewest(flags)
    deep = repeated_patterns(tuple(i % 4 > 0 for i in range(120)))
    assert deep == [((False, True, True, True), 30)]


# --- whole models -------------------------------------------------------------------------------------------

MODELS = {
    "groups": {
        "num_layers": 4,
        "moe": {
            "router": router_config("sigmoid_bias", bias=True, groups=4, groups_kept=2, group_score="top2_sum"),
            "num_experts": 8, "shared_experts": 1, "shared_dim": 12, "dense_layers": (0, 2),
        },
    },
    "gpt-oss": {
        "activation": "swiglu_clamped",
        "moe": {"router": router_config("softmax_of_topk", bias=True), "num_experts": 8, "expert_bias": True},
    },
    "longcat": LONGCAT,
    "dbrx": {"norm": "layer", "attention": {"clip_qkv": 0.5}, "moe": {"num_experts": 8}},
    "grok": {
        "activation": "geglu", "sandwich_norm": True, "logit_scale": 0.6, "attention": {"score_softcap": 2.0},
        "moe": {"num_experts": 8, "router": router_config("topk_of_softmax", renormalise=False)},
    },
    "phi": {
        "norm": "layer_bias", "logit_bias": True,
        "attention": {
            "bias": True, "output_bias": True,
            "rope": RopeConfig(scaling="longrope", original_length=4, short_factor=(1.0, 2.0), long_factor=(3.0, 9.0)),
        },
        "moe": {"num_experts": 8, "router": router_config("sparsemixer", mask_margin=0.3)},
    },
    "llama4": {
        "attention": {
            "window": 3, "window_layers": (0,), "window_kind": "chunks", "no_rope_layers": (1,), "qk_unit_norm": True,
            "temperature": 0.5, "temperature_length": 2,
        },
        "moe": {
            "num_experts": 8, "shared_experts": 1, "weigh": "input",
            "router": router_config("topk_of_sigmoid", k=1, renormalise=False),
        },
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_eight_devices_equals_one(name):
    model, tokens, mask = fakes.small_model(**MODELS[name]), jnp.asarray(fakes.tokens(B, S)), jnp.asarray(MASK)
    expected = fakes.jit(model_value_and_grad)(model, tokens, mask)
    mesh = mesh_of((4, 2, 1))
    with jax.set_mesh(mesh):
        tokens, mask = (jax.device_put(array, batch_sharding(mesh)) for array in (tokens, mask))
        got = fakes.jit(model_value_and_grad)(placed(model, mesh), tokens, mask)
    assert_as_on_one_device(got, expected)


@pytest.mark.slow  # test_zoo_training.py trains it, test_train.py and test_routing.py hold the rule
def test_longcat_trains_and_its_selection_bias_moves_by_the_rule():
    router = router_config("softmax_bias", k=3, bias_update_rate=0.5)
    config = small_model(router, zero_experts=2, every=1, first_dense=0)
    config = type(config)(**{**vars(config), "wiring": "longcat"})
    with quick_compilation():
        trainer: Any = Trainer(small_config(config), np.ones(64, np.int32), mesh_of((4, 2, 1)))
        state = small.start(trainer)
        (before,) = small.flat(state.router_state).values()
        state, metrics = trainer.step(state, small.random_batch())
    (after,) = small.flat(state.router_state).values()
    pairs = np.concatenate([metrics.moe.routed, metrics.moe.zero_routed], axis=1)
    assert pairs.shape == (3, 6) and (pairs.sum(1) == 3 * float(metrics.moe.tokens[0])).all()
    step = 0.5 * (1 / 6 - pairs / pairs.sum(1, keepdims=True))
    step[:, 4:] = 0
    np.testing.assert_allclose((after - before).reshape(3, 6), step, atol=1e-6)
    assert np.abs(step).max() > 0.01
    assert np.isfinite(float(metrics.loss)) and metrics.layer_grad_norm.shape == (3,)
    assert (np.asarray(metrics.layer_grad_norm) > 0).all()
