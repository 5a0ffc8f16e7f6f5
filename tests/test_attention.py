"""Grouped and latent attention against plain NumPy, each setting, caches, and the checks of settings."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.attention import (
    AttentionInput,
    KVCache,
    LatentAttention,
    LatentCache,
    attention_input,
    check,
    empty_cache,
    make_attention,
)  # fmt: skip
from moejax.attention.inputs import shares
from moejax.attention.latent import softmax_scale
from moejax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig, RopeConfig
from moejax.model import build, layer_groups, layer_windows
from moejax.norm import RMSNorm
from moejax.sharding import make_mesh, tree_shardings
from tests import moe_fakes as fakes
from tests.attention_fakes import LATENT, grouped, latent

B, S, DIM = 2, 8, 12
YARN = RopeConfig(scaling="yarn", factor=4.0, original_length=8, beta_fast=4.0, beta_slow=0.5, layout="interleaved",
                  mscale=0.7, mscale_all_dim=0.4)  # fmt: skip
LONG = RopeConfig(scaling="longrope", original_length=7, short_factor=(1.0, 2.0, 3.0), long_factor=(4.0, 1.0, 7.0),
                  short_mscale=1.1, long_mscale=1.3)  # fmt: skip
PLAIN = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope_theta": 50.0}
CASES = {
    "grouped": PLAIN,
    "gpt-oss": PLAIN | {"bias": True, "output_bias": True, "sinks": True, "window": 3,
                        "rope": RopeConfig(scaling="yarn", factor=4.0, original_length=8, truncate=False)},
    "olmoe": PLAIN | {"qk_norm": True, "qk_norm_over": "projection", "softmax_scale": 0.3},
    "partial": PLAIN | {"qk_norm": True, "rope": RopeConfig(fraction=0.67, layout="interleaved")},
    "latent": LATENT | {"rope_theta": 50.0},
    "deepseek": LATENT | {"query_rank": 8, "bias": True, "output_bias": True, "rope": YARN},
    "longcat": LATENT | {"query_rank": 8, "scale_latents": True, "window": 4, "softmax_scale": 0.4},
    "dbrx": PLAIN | {"clip_qkv": 0.6, "bias": True},
    "grok": PLAIN | {"score_softcap": 0.5},
    "phi": PLAIN | {"bias": True, "rope": LONG},
    "llama4": PLAIN | {"qk_unit_norm": True, "window": 3, "window_kind": "chunks",
                       "rope": RopeConfig(layout="interleaved")},
    "llama4, no positions": PLAIN | {"qk_unit_norm": True, "no_rope_layers": (0,), "temperature": 0.7,
                                     "temperature_length": 3},
}  # fmt: skip


def attention(seed=0, **settings):
    config = AttentionConfig(**settings)
    check(ModelConfig(attention=config))
    return fakes.filled(lambda: make_attention(config, DIM, 1e-6, jax.random.key(0), 1.0), seed)


def inputs(module, **more):
    """Positions are not places, so that one cannot stand for the other."""
    positions = jnp.asarray([[0, 2, 3, 4, 6, 7, 9, 10], [5, 6, 7, 8, 9, 10, 11, 12]])
    made = attention_input(positions, None, None, None, (B, S))
    window, still = module.config.window, module.config.no_rope_layers
    facts = {"window": jnp.int32(window) if window else None, "rotates": jnp.bool_(False) if still else None}
    return dataclasses.replace(made, **facts, **more)


def x_of(seed=1):
    return np.random.default_rng(seed).normal(size=(B, S, DIM)).astype(np.float32)


@fakes.jit
def whole(module, x, tokens):
    return module(x, tokens)[0]


@fakes.jit
def in_pieces(module, x, tokens):
    """Seven tokens, then one, into a cache with room to spare."""
    cache, out = empty_cache(module.config, (B, S + 2), jnp.float32), []
    for first, end in [(0, 7), (7, 8)]:
        part = {name: getattr(tokens, name)[:, first:end] for name in ("positions", "index")}
        piece = dataclasses.replace(tokens, **part, places=S + 2)
        y, cache = module(x[:, first:end], piece, cache)
        out.append(y)
    return jnp.concatenate(out, axis=1), cache


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_numpy_with_and_without_a_cache(name):
    """For latent attention the two are the plain and the absorbed form."""
    module, x = attention(**CASES[name]), x_of()
    tokens, window = inputs(module), module.config.window or S

    def seen(b):
        chunks = module.config.window_kind == "chunks"
        return [range(max(0, s - (p % window if chunks else window - 1)), s + 1) for s, p in enumerate(positions[b])]

    positions = np.asarray(tokens.positions)
    reference = latent if isinstance(module, LatentAttention) else grouped
    if tokens.rotates is not None:
        reference = functools.partial(grouped, rotates=False)
    expected = [reference(module, fakes.f64(x[b]), positions[b], seen(b)) for b in range(B)]
    assert np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(whole(module, x, tokens), expected, rtol=1e-4, atol=1e-5)
    cached, cache = in_pieces(module, x, tokens)
    np.testing.assert_allclose(cached, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(cache, LatentCache if reference is latent else KVCache)
    for leaf in jax.tree.leaves(cache):
        assert (np.abs(leaf[:, :S]).max(axis=tuple(range(2, leaf.ndim))) > 0).all() and not leaf[:, S:].any()


CHANGES = [
    ("gpt-oss", {"sinks": False}), ("gpt-oss", {"window": 2}), ("gpt-oss", {"window": 0}), ("gpt-oss", {"bias": False}),
    ("gpt-oss", {"output_bias": False}), ("gpt-oss", {"softmax_scale": 1.0}), ("olmoe", {"qk_norm_over": "head"}),
    ("olmoe", {"softmax_scale": 0.0}), ("grouped", {"rope_theta": 51.0}), ("deepseek", {"bias": False}),
    ("deepseek", {"output_bias": False}), ("deepseek", {"rope": RopeConfig(layout="interleaved")}),
    ("deepseek", {"rope": dataclasses.replace(YARN, mscale=1.4, mscale_all_dim=0.8)}),
    ("longcat", {"scale_latents": False}), ("longcat", {"window": 3}), ("longcat", {"softmax_scale": 0.0}),
    ("dbrx", {"clip_qkv": 0.0}), ("grok", {"score_softcap": 0.0}), ("llama4", {"qk_unit_norm": False}),
    ("llama4", {"window_kind": "sliding"}), ("llama4, no positions", {"temperature": 0.1}),
    ("llama4, no positions", {"temperature_length": 2}),
    ("llama4, no positions", {"no_rope_layers": (), "temperature": 0.0, "temperature_length": 8192}),
    ("phi", {"rope": dataclasses.replace(LONG, original_length=8)}),
    ("phi", {"rope": dataclasses.replace(LONG, long_mscale=1.0)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[f"{n}-{c}" for n, c in CHANGES])
def test_each_setting_moves_the_output(name, change):
    """On the same weights, with all norm scales 1.5; the same settings give the same."""
    modules, x = [attention(**(CASES[name] | c)) for c in ({}, {}, change)], x_of()
    for module in modules:
        for key, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                value[...] = getattr(modules[0], key)[...]
            elif isinstance(value, RMSNorm):
                value.scale[...] = jnp.full_like(value.scale[...], 1.5)
    before, same, after = (np.asarray(m(x, inputs(m))[0]) for m in modules)
    np.testing.assert_array_equal(before, same)
    assert np.abs(before - after).max() > 1e-3


# --- sinks --------------------------------------------------------------------------------------------------


def test_sinks_take_their_share_and_never_overflow():
    scores = jnp.asarray([[[[2.0, 1.0, 5.0]], [[300.0, 299.0, 0.0]]]])
    mask = jnp.asarray([[[[True, True, False]]]])
    by_hand = np.exp([2, 1]) / (np.exp(2) + np.exp(1) + np.exp(3))
    got = np.asarray(shares(scores, mask, jnp.asarray([3.0, 0.0])))
    np.testing.assert_allclose(got[0, 0, 0], [*by_hand, 0], rtol=1e-6)
    np.testing.assert_allclose(got[0, 1, 0], [1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0], rtol=1e-6)
    assert not np.asarray(shares(scores, mask, jnp.asarray([1e4, 1e4]))).any()  # all to the sink
    none = shares(scores, mask)
    np.testing.assert_allclose(shares(scores, mask, jnp.full(2, -1e30)), none, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(none).sum(-1), 1, rtol=1e-6)
    gradient = jax.grad(lambda sinks: shares(scores, mask, sinks)[0, 0, 0, 0])(jnp.asarray([3.0, 3.0]))
    share, left = by_hand[0], np.exp(3) / (np.exp(2) + np.exp(1) + np.exp(3))
    np.testing.assert_allclose(gradient, [-share * left, 0], rtol=1e-5)


def test_the_library_core_runs_where_there_are_no_sinks_and_only_there(monkeypatch):
    asked = []

    def core(q, k, v, **more):
        asked.append(more["implementation"])
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", core)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    settings = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 64}
    tokens = AttentionInput(*[jnp.broadcast_to(jnp.arange(64), (1, 64))] * 2)
    for more in ({}, {"window": 8}, {"softmax_scale": 0.1}, {"output_bias": True}):
        module = attention(**settings, **more)
        jax.eval_shape(lambda m: m(jnp.zeros((1, 64, DIM), jnp.bfloat16), tokens), module)
        jax.eval_shape(lambda m: m(jnp.zeros((1, 64, DIM), jnp.float32), tokens), module)
    assert asked == ["cudnn", "xla"] * 4
    module = attention(**settings, sinks=True)
    jax.eval_shape(lambda m: m(jnp.zeros((1, 64, DIM), jnp.bfloat16), tokens), module)
    assert len(asked) == 8


# --- latent attention ---------------------------------------------------------------------------------------


def test_softmax_scale_of_latent_attention():
    config = AttentionConfig(**LATENT)
    assert softmax_scale(config) == pytest.approx(1 / math.sqrt(LATENT["head_dim"] + LATENT["rope_head_dim"]))
    with_yarn = dataclasses.replace(config, rope=YARN)
    assert softmax_scale(with_yarn) == pytest.approx(softmax_scale(config) * (0.04 * math.log(4) + 1) ** 2)
    assert softmax_scale(dataclasses.replace(with_yarn, softmax_scale=0.5)) == 0.5


def test_what_a_cache_holds():
    """Values for each token and layer: 2 G N, or rank and rotary dimensions, whatever the number of heads."""
    for settings, values in ((PLAIN, 2 * 2 * 6), (LATENT, 7 + 4)):
        for wiring, attentions in (("standard", 1), ("longcat", 2)):
            config = fakes.model_config(attention=settings, wiring=wiring, num_layers=3)
            model = jax.eval_shape(lambda config=config: build(config))
            made = jax.eval_shape(lambda model=model: model.init_cache(2, 10))
            assert sum(leaf.size for leaf in jax.tree.leaves(made.layers)) == 2 * 10 * 3 * attentions * values
    cache = empty_cache(AttentionConfig(**LATENT), (3, 2, 10), jnp.bfloat16)
    assert isinstance(cache, LatentCache)
    assert cache.latent.shape == (3, 2, 10, 7) and cache.k_rope.shape == (3, 2, 10, 4)
    assert cache.latent.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek"])
def test_bfloat16_stays_close_to_float32(name):
    module, x = attention(**CASES[name]), x_of()
    narrow = whole(module, jnp.asarray(x, jnp.bfloat16), inputs(module))
    wide = np.asarray(whole(module, x, inputs(module)))
    assert narrow.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(narrow, np.float32) - wide) / np.linalg.norm(wide)
    assert 0 < error < 0.02  # 8 bits


# --- windows by layer ---------------------------------------------------------------------------------------


def test_windows_stand_in_the_order_of_layers():
    attention = {"window": 5, "window_layers": (0, 3, 4)}
    config = fakes.model_config(num_layers=6, attention=attention, moe={"first_dense": 1, "every": 2})
    made = layer_windows(config)
    assert made is not None and [w.shape for w in made] == [(r, len(p)) for p, r in layer_groups(config)]
    flat = np.concatenate([w.ravel() for w in made])
    assert [i for i, w in enumerate(flat) if w == 5] == [0, 3, 4] and (flat[[1, 2, 5]] > 10**9).all()
    every = layer_windows(fakes.model_config(attention={"window": 5}))
    assert every is not None and (np.concatenate([w.ravel() for w in every]) == 5).all()
    assert layer_windows(fakes.model_config()) is None


def test_only_the_layers_that_have_the_window_forget():
    """Two layers see over 2 (w - 1) tokens at most; one without a window, over all."""
    tokens = fakes.tokens(1, 12)
    other = tokens.copy()
    other[0, 0] = (other[0, 0] + 1) % fakes.VOCAB
    for layers, first_same in (((), 5), ((0,), None)):
        model = fakes.small_model(attention={"window": 3, "window_layers": layers}, moe={"first_dense": 2})
        run = fakes.jit(lambda m, t: m(t).logits)
        a, b = (np.asarray(run(model, t)) for t in (tokens, other))
        moved = np.abs(a - b).max(-1)[0] > 1e-6
        assert moved[:5].all()
        assert moved.all() if first_same is None else not moved[first_same:].any()


def test_scan_equals_unroll_with_windows():
    tokens, made = fakes.tokens(2, 9), []
    for loop in ("scan", "unroll"):
        attention = {"window": 3, "window_layers": (1,)}
        model = fakes.small_model(num_layers=3, layer_loop=loop, attention=attention, moe={"first_dense": 3})
        made.append(fakes.jit(lambda m, t: m(t).logits)(model, tokens))
    np.testing.assert_allclose(*made, rtol=1e-4, atol=1e-5)


# --- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek"])
def test_heads_over_the_model_axis_equal_one_device(name):
    """Every array's axes have a rule; a norm over all heads spans devices."""
    norms = {"qk_norm": True, "qk_norm_over": "projection"}
    more = {"num_heads": 4, "num_kv_heads": 4} if name == "deepseek" else norms
    module, x = attention(**(CASES[name] | more)), x_of()
    tokens = inputs(module)

    def both(module, x):
        cache = empty_cache(module.config, (B, S), jnp.float32)
        return module(x, tokens)[0], module(x, tokens, cache)[0]

    run = fakes.jit(both)
    expected = run(module, x)
    mesh = make_mesh(MeshConfig(data=1, model=2), jax.devices()[:2])
    graph, state = nnx.split(module)
    placed = nnx.merge(graph, jax.device_put(state, tree_shardings(state, mesh)))
    assert placed.q[...].sharding.spec[1] == "model" and placed.o[...].sharding.spec[0] == "model"
    if name == "deepseek":
        assert placed.k_up[...].sharding.spec[1] == "model" and not any(placed.kv_down[...].sharding.spec)
    with jax.set_mesh(mesh):
        got = run(placed, x)
    fakes.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# --- settings that do not go together -----------------------------------------------------------------------

YARN_PLAIN = {"scaling": "yarn", "factor": 4.0, "original_length": 64}
REFUSED = {
    "no rank": ({**LATENT, "latent_rank": 0}, r"attention.latent_rank=0 with attention.kind='latent': must be 1"),
    "no rotary dims": ({**LATENT, "rope_head_dim": 0}, r"attention.rope_head_dim=0 with"),
    "no value dims": ({**LATENT, "value_head_dim": 0}, r"attention.value_head_dim=0 with"),
    "odd rotary dims": ({**LATENT, "rope_head_dim": 3}, r"rope_head_dim=3 is odd"),
    "negative rank": ({**LATENT, "query_rank": -1}, r"query_rank=-1: must be 0 or more"),
    "shared heads": ({**LATENT, "num_kv_heads": 1}, r"num_kv_heads=1 with .*set num_kv_heads=3"),
    "qk_norm in latent": ({**LATENT, "qk_norm": True}, r"attention.qk_norm=True is of attention.kind='grouped'"),
    "sinks in latent": ({**LATENT, "sinks": True}, r"attention.sinks=True is of attention.kind='grouped'"),
    "fused latent": ({**LATENT, "implementation": "cudnn"}, r"'cudnn' wants values as wide as keys"),
    "fraction of latent": ({**LATENT, "rope": RopeConfig(fraction=0.5)}, r"rope.fraction=0.5 with .*leave it at 1"),
    "rank in grouped": ({"latent_rank": 8}, r"latent_rank=8 is of latent attention, and attention.kind='grouped'"),
    "scale in grouped": ({"scale_latents": True}, r"scale_latents=True is of latent attention"),
    "fused sinks": ({"sinks": True, "implementation": "cudnn"}, r"implementation='cudnn' has no attention.sinks"),
    "kv heads": ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads=4 is not a multiple of num_kv_heads=3"),
    "odd head": ({"head_dim": 7}, r"attention.head_dim=7 is odd"),
    "odd share": ({"head_dim": 8, "rope": RopeConfig(fraction=0.4)}, r"fraction=0.4 of .*head_dim=8 is 3 dimensions"),
    "no share": ({"head_dim": 8, "rope": RopeConfig(fraction=0.1)}, r"is 0 dimensions"),
    "fraction": ({"rope": RopeConfig(fraction=1.5)}, r"rope.fraction=1.5: must lie in \(0, 1\]"),
    "window": ({"window": -1}, r"attention.window=-1: must be 0 or more"),
    "layer out of range": ({"window": 4, "window_layers": (0, 2)}, r"window_layers=\(0, 2\) must be .*num_layers=2"),
    "layer twice": ({"window": 4, "window_layers": (0, 0)}, r"must be different layers"),
    "layers without window": ({"window_layers": (0,)}, r"window_layers=\(0,\) need attention.window"),
    "scale": ({"softmax_scale": float("nan")}, r"softmax_scale=nan: must be 0 or more"),
    "theta": ({"rope_theta": 0.0}, r"rope_theta=0.0: must be a finite number above 0"),
    "norm over nothing": ({"qk_norm_over": "projection"}, r"qk_norm_over='projection' is not read"),
    "factor without scaling": ({"rope": RopeConfig(factor=2.0)}, r"rope.factor=2.0 is not read with .*'none'"),
    "linear's length": ({"rope": RopeConfig(scaling="linear", factor=2.0, original_length=9)}, r"length=9 is not read"),
    "shrinks": ({"rope": RopeConfig(scaling="linear", factor=0.5)}, r"rope.factor=0.5 with .*must be 1 or more"),
    "no length": ({"rope": RopeConfig(**{**YARN_PLAIN, "original_length": 0})}, r"original_length=0 with .*'yarn'"),
    "ramp": ({"rope": RopeConfig(**YARN_PLAIN, beta_slow=40.0)}, r"beta_fast=32.0 with .*above beta_slow=40.0"),
    "one mscale": ({"rope": RopeConfig(**YARN_PLAIN, mscale=0.7)}, r"mscale=0.7 and mscale_all_dim=0.0: .*set both"),
    "two factors": ({"rope": RopeConfig(**YARN_PLAIN, mscale=1.0, attention_factor=1.1)}, r"attention_factor takes"),
    "yarn's theta": ({"rope_theta": 1.0, "rope": RopeConfig(**YARN_PLAIN)}, r"rope_theta=1.0 with .*must be above 1"),
    "llama3's length": ({"rope": RopeConfig(scaling="llama3", factor=8.0)}, r"original_length=0 with .*'llama3'"),
    "llama3's ends": (
        {"rope": RopeConfig(scaling="llama3", factor=8.0, original_length=64, high_freq_factor=0.5)},
        r"high_freq_factor=0.5 with .*must be low_freq_factor=1.0 or more",
    ),
    "longrope's length": ({"rope": dataclasses.replace(LONG, original_length=0)}, r"original_length=0 with .*longrope"),
    "longrope's pairs": ({"head_dim": 8, "rope": LONG}, r"short_factor=.* one number for each of the 4 pairs"),
    "longrope's zero": (
        {"head_dim": 6, "rope": dataclasses.replace(LONG, long_factor=(1.0, 0.0, 1.0))}, r"long_factor.*above 0",
    ),
    "longrope's scale": ({"head_dim": 6, "rope": dataclasses.replace(LONG, long_mscale=0.0)}, r"long_mscale=0.0 with"),
    "longrope's factor": ({"head_dim": 6, "rope": dataclasses.replace(LONG, factor=2.0)}, r"factor=2.0 is not read"),
    "clipped latent": ({**LATENT, "clip_qkv": 8.0}, r"attention.clip_qkv=8.0 is of attention.kind='grouped'"),
    "still latent": ({**LATENT, "no_rope_layers": (0,)}, r"no_rope_layers=\(0,\) is of attention.kind='grouped'"),
    "chunks of latent": ({**LATENT, "window": 4, "window_kind": "chunks"}, r"window_kind='chunks' is of .*'grouped'"),
    "chunks of nothing": ({"window_kind": "chunks"}, r"window_kind='chunks' needs attention.window"),
    "still layer out of range": ({"no_rope_layers": (2,)}, r"no_rope_layers=\(2,\) must be .*num_layers=2"),
    "temperature everywhere": ({"temperature": 0.1}, r"temperature=0.1 acts in layers without rotary positions"),
    "temperature's length": ({"temperature_length": 4}, r"temperature_length=4 is not read with .*temperature=0"),
    "no length of temperature": (
        {"no_rope_layers": (0,), "temperature": 0.1, "temperature_length": 0}, r"temperature_length=0: must be 1",
    ),
    "two norms": ({"qk_norm": True, "qk_unit_norm": True}, r"qk_unit_norm and attention.qk_norm are two norms"),
    "fused cap": ({"score_softcap": 30.0, "implementation": "cudnn"}, r"'cudnn' has no attention.score_softcap"),
    "negative clip": ({"clip_qkv": -1.0}, r"clip_qkv=-1.0: must be 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_work_are_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        check(ModelConfig(attention=AttentionConfig(**settings)))
