"""The decoder against a plain NumPy model, and what each of its parts promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention import Attention, AttentionInput
from moejax.config import AttentionConfig
from moejax.limits import token_drop
from moejax.model import build, layer_groups, moe_layer_ids
from moejax.norm import RMSNorm
from moejax.rope import rotary
from tests import moe_fakes as fakes
from tests.moe_fakes import DIM, VOCAB, model_config, router_config, small_model

B, S = 2, 12


@fakes.jit
def forward(model, tokens, **more):
    return model(tokens, **more)


@functools.cache
def shared_model():
    """One model for all tests that need no particular config."""
    return small_model(moe={"num_experts": 4})


def logits(tokens, model=None, **more):
    return np.asarray(forward(shared_model() if model is None else model, jnp.asarray(tokens), **more).logits)


# --- the whole model ----------------------------------------------------------------------------------------


def numpy_logits(model, tokens):
    """Top-2 of the softmax renormalised, SwiGLU, tied embeddings, causal grouped-query attention: one loop after the
    other, in float64."""
    config = model.config
    a, table = config.attention, fakes.f64(model.embed[...])
    group = model.groups[0].blocks[0]

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * fakes.f64(scale)

    def rotate(v, position):
        half = a.head_dim // 2
        angle = position * a.rope_theta ** (-np.arange(half) / half)
        first, second = v[:half], v[half:]
        return np.concatenate([first * np.cos(angle) - second * np.sin(angle),
                               second * np.cos(angle) + first * np.sin(angle)])  # fmt: skip

    out = []
    for row in tokens:
        x = table[row] * np.sqrt(config.dim)
        for i in range(config.num_layers):
            w = jax.tree.map(lambda leaf, i=i: fakes.f64(leaf[i]), group)
            z = norm(x, w.attention_norm.scale[...])
            attended = np.zeros_like(x)
            for h in range(a.num_heads):
                g = h * a.num_kv_heads // a.num_heads
                q = [rotate(z[s] @ w.attention.q[...][:, h], s) for s in range(len(row))]
                k = [rotate(z[s] @ w.attention.k[...][:, g], s) for s in range(len(row))]
                v = [z[s] @ w.attention.v[...][:, g] for s in range(len(row))]
                for s in range(len(row)):
                    share = fakes.softmax(np.asarray([q[s] @ k[j] / np.sqrt(a.head_dim) for j in range(s + 1)]))
                    attended[s] += sum(p * v[j] for j, p in enumerate(share)) @ w.attention.o[...][h]
            x = x + attended
            z = norm(x, w.ffn_norm.scale[...])
            p = fakes.softmax(z @ w.moe.router.arrays["kernel"][...])
            for s in range(len(row)):
                best = np.argsort(-p[s])[: config.moe.router.k]
                for e in best:
                    up, gate, down = (getattr(w.moe.store, n)[...][e] for n in ("up", "gate", "down"))
                    x[s] = x[s] + p[s, e] / p[s, best].sum() * fakes.ffn(z[s], up, gate, down, "swiglu")
        out.append(norm(x, model.final_norm.scale[...]) @ table.T)
    return np.asarray(out)


def test_logits_equal_a_plain_numpy_model():
    tokens = fakes.tokens(B, S)
    expected = numpy_logits(shared_model(), tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(tokens), expected, rtol=1e-4, atol=1e-4)


def test_no_token_sees_a_later_one_and_every_token_sees_the_earlier():
    tokens = fakes.tokens(B, S)
    other = tokens.copy()
    other[:, 7] = (other[:, 7] + 1) % VOCAB
    a, b = logits(tokens), logits(other)
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert (np.abs(a[:, 7:] - b[:, 7:]).max(-1) > 1e-4).all()


def test_documents_of_a_row_are_isolated():
    """Each document's logits are those of the document alone; positions restart."""
    tokens = fakes.tokens(1, S)
    segments = np.asarray([[1] * 5 + [2] * 7])
    positions = np.asarray([[*range(5), *range(7)]])
    packed = logits(tokens, segment_ids=segments, positions=positions)
    other = tokens.copy()
    other[:, :5] = fakes.tokens(1, 5, seed=1)
    assert not np.array_equal(tokens, other)
    np.testing.assert_array_equal(packed[:, 5:], logits(other, segment_ids=segments, positions=positions)[:, 5:])
    alone = np.zeros_like(tokens)
    alone[:, :7] = tokens[:, 5:]
    np.testing.assert_allclose(packed[:, 5:], logits(alone)[:, :7], rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_changes_neither_earlier_logits_nor_metrics():
    tokens = fakes.tokens(B, S)
    mask = np.arange(S)[None] < np.asarray([[8], [5]])
    other = np.where(mask, tokens, fakes.tokens(B, S, seed=2))
    a, b = (forward(shared_model(), jnp.asarray(t), mask=mask) for t in (tokens, other))
    np.testing.assert_array_equal(np.asarray(a.logits)[mask], np.asarray(b.logits)[mask])
    fakes.assert_same(a.metrics, b.metrics)
    np.testing.assert_array_equal(a.metrics.tokens, [13, 13])
    np.testing.assert_allclose(np.asarray(a.logits)[mask], logits(tokens)[mask], rtol=1e-4, atol=1e-5)


def test_a_limit_given_to_the_model_acts_in_every_layer():
    """At factor 0 nothing is left of the experts: as if their output matrices were zero."""
    tokens = jnp.asarray(fakes.tokens(B, S))
    out = forward(shared_model(), tokens, limits=(token_drop(0.0),))
    np.testing.assert_array_equal(out.metrics.dropped, [2 * B * S] * 2)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "down" in jax.tree_util.keystr(path) else leaf, shared_model()
    )
    np.testing.assert_array_equal(out.logits, logits(tokens, silent))


# --- key/value cache ----------------------------------------------------------------------------------------


@functools.cache
def attention_extras():
    """QK-norm, biases, untied embeddings, soft cap, and a pattern of dense and MoE layers with a remainder."""
    return small_model(
        num_layers=6, tie_embeddings=False, logit_softcap=5.0, scale_embeddings=False,
        moe={"first_dense": 1, "every": 2, "router": router_config("sigmoid_bias")},
        attention={"qk_norm": True, "bias": True},
    )  # fmt: skip


def test_prefill_chunks_and_single_tokens_equal_the_full_forward():
    """Rows of unequal length, padded on the right in the first chunk and in a later one."""
    model, tokens = attention_extras(), fakes.tokens(B, S)
    full = logits(tokens, model)
    cache = model.init_cache(B, S)
    done = np.zeros(B, int)
    for width, lengths in ((5, [5, 3]), (5, [2, 5]), (1, [1, 1]), (1, [1, 1]), (1, [1, 1])):
        chunk, mask = np.zeros((B, width), np.int32), np.zeros((B, width), bool)
        for row, n in enumerate(lengths):
            chunk[row, :n], mask[row, :n] = tokens[row, done[row] : done[row] + n], True
        out = forward(model, jnp.asarray(chunk), mask=mask, cache=cache)
        cache = out.cache
        for row, n in enumerate(lengths):
            expected = full[row, done[row] : done[row] + n]
            np.testing.assert_allclose(np.asarray(out.logits)[row, :n], expected, rtol=1e-4, atol=1e-4)
        done += lengths
        np.testing.assert_array_equal(cache.length, done)


def test_a_cache_takes_no_packed_documents():
    model = shared_model()
    with pytest.raises(ValueError, match="one document for each row: leave segment_ids out"):
        ones = jnp.ones((1, 2), jnp.int32)
        jax.eval_shape(lambda: model(ones, segment_ids=ones, cache=model.init_cache(1, 4)))


# --- layers and how they are run ----------------------------------------------------------------------------


@pytest.mark.parametrize("layers", range(1, 9))
@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("first_dense", [0, 1, 3, 8])
def test_layer_groups_cover_every_placement(layers, every, first_dense):
    config = model_config(num_layers=layers, moe={"every": every, "first_dense": first_dense})
    flat = [flag for pattern, repeats in layer_groups(config) for _ in range(repeats) for flag in pattern]
    expected = [i >= first_dense and (i - first_dense + 1) % every == 0 for i in range(layers)]
    assert flat == expected
    assert moe_layer_ids(config) == [i for i, flag in enumerate(expected) if flag]
    assert len(layer_groups(config)) <= 3


def test_metrics_stand_in_the_order_of_layers():
    """MoE layers 2, 4 of six: each sends everything to an expert of its own, by its selection bias."""
    model = attention_extras()
    assert moe_layer_ids(model.config) == [2, 4]
    stacked = jax.tree.map(lambda leaf: leaf, model)
    bias = stacked.groups[1].blocks[1].moe.router.arrays["bias"]
    assert bias.shape == (2, 4)
    bias[...] = jnp.asarray([[9.0, 5.0, 0, 0], [0, 0, 9.0, 5.0]])
    out = forward(stacked, jnp.asarray(fakes.tokens(B, S)))
    np.testing.assert_array_equal(out.metrics.routed, np.asarray([[1, 1, 0, 0], [0, 0, 1, 1]]) * B * S)


@pytest.mark.parametrize(
    "others",
    [
        [("unroll", "block"), ("unroll", "dots")],
        pytest.param([("scan", "block"), ("unroll", "none")], marks=pytest.mark.slow),
    ],
)
def test_scan_equals_unroll_and_remat_changes_nothing(others):
    """Values and gradients, with a random limit in force: every layer draws the same numbers either way."""
    tokens, key = jnp.asarray(fakes.tokens(B, S)), jax.random.key(0)
    results = {}
    for loop, remat in (("scan", "none"), *others):
        model = small_model(layer_loop=loop, remat=remat, moe={"capacity_factor": 0.75, "capacity_order": "random"})

        @fakes.jit
        def run(model):
            def loss(model):
                out = model(tokens, key=key)
                return jnp.sum(jax.nn.log_softmax(out.logits)[..., 3]), (out.logits, out.metrics)

            return jax.grad(loss, has_aux=True)(model)

        results[loop, remat] = run(model)
    plain = results.pop(("scan", "none"))
    assert (np.asarray(plain[1][1].dropped) > 0).all()
    assert float(plain[1][1].dropped[0]) != float(plain[1][1].dropped[1])
    for got in results.values():
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_model_without_experts():
    model = small_model(num_layers=3, moe={"first_dense": 3}, activation="geglu")
    out = forward(model, jnp.asarray(fakes.tokens(B, S)))
    assert out.metrics is None and np.isfinite(out.logits).all() and np.abs(out.logits).max() > 0.1


def test_build_gives_float32_parameters_of_unit_gain_and_each_layer_its_own():
    config = model_config(dim=32, compute_dtype="bfloat16", init_scale=0.5)
    abstract = jax.eval_shape(lambda: build(config, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}

    @fakes.jit
    def made(seed):  # the arrays that are not returned are not computed
        model = build(config, seed)
        store = model.groups[0].blocks[0].moe.store
        return store.up[...], store.down[...], model.final_norm.scale[...]

    up, down, scale = made(1)
    for weight, fan_in in ((up, 32), (down, fakes.EXPERT_DIM)):
        assert float(weight.std()) * fan_in**0.5 == pytest.approx(0.5, abs=0.05)  # 2048 draws, cut at 3 sd
    assert np.abs(up[0] - up[1]).max() > 0.1 and np.abs(made(2)[0] - up).max() > 0.1
    np.testing.assert_array_equal(scale, 1)


def test_bfloat16_compute_stays_close_to_float32():
    tokens, narrow = fakes.tokens(B, S), small_model(compute_dtype="bfloat16")
    got, expected = logits(tokens, narrow), logits(tokens)
    assert got.dtype == np.float32
    # 8 bits through two layers; where two experts are nearly tied another one may be chosen
    error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert 0 < np.median(error) < 0.02


# --- parts --------------------------------------------------------------------------------------------------


def attention_input(batch, seq, segment_ids=None):
    place = jnp.broadcast_to(jnp.arange(seq), (batch, seq))
    return AttentionInput(positions=place, index=place, segment_ids=segment_ids)


def attention(**changes):
    config = AttentionConfig(**({"num_heads": 4, "num_kv_heads": 4, "head_dim": 4} | changes))
    return fakes.filled(lambda: Attention(config, DIM, 1e-6, jax.random.key(0), 1.0))


def attend(module, x):
    return fakes.jit(lambda m, x: m(x, attention_input(*x.shape[:2]))[0])(module, jnp.asarray(x, jnp.float32))


def test_rmsnorm_by_hand_in_float32():
    norm = fakes.filled(lambda: RMSNorm(4, 1e-6))
    x = np.asarray([[1.0, -2.0, 3.0, 4.0], [0, 0, 0, 0]])
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * fakes.f64(norm.scale[...])
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-6)
    large = norm(jnp.full((1, 4), 200.0, jnp.bfloat16))  # 200^2 keeps 8 bits only in bfloat16
    assert large.dtype == jnp.bfloat16
    np.testing.assert_array_equal(large[0], norm.scale[...].astype(jnp.bfloat16))


def test_rotary_products_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))
    at = lambda x, p: rotary(x, jnp.asarray([[p]]), 100.0)  # noqa: E731
    product = lambda i, j: np.asarray(jnp.sum(at(q, i) * at(k, j), -1))[0, 0]  # noqa: E731
    np.testing.assert_allclose(product(5, 2), product(13, 10), rtol=1e-4)
    assert np.abs(product(5, 2) - product(5, 3)).max() > 1e-2
    np.testing.assert_array_equal(at(q, 0), q)
    angle = 3 * 100.0 ** (-np.arange(4) / 4)
    one = np.concatenate([np.cos(angle), np.sin(angle)])
    half = jnp.asarray(np.r_[np.ones(4), np.zeros(4)], jnp.float32).reshape(1, 1, 1, 8)
    np.testing.assert_allclose(at(half, 3)[0, 0, 0], one, rtol=1e-5, atol=1e-6)


def test_grouped_queries_equal_repeated_key_and_value_heads():
    x = np.random.default_rng(0).normal(size=(B, S, DIM))
    grouped, full = attention(num_kv_heads=2), attention()
    for name in ("q", "o"):
        getattr(full, name)[...] = getattr(grouped, name)[...]
    for name in ("k", "v"):
        getattr(full, name)[...] = jnp.repeat(getattr(grouped, name)[...], 2, axis=1)
    np.testing.assert_allclose(attend(grouped, x), attend(full, x), rtol=1e-5, atol=1e-6)


def test_qk_norm_takes_the_length_of_queries_away_and_biases_add():
    x = np.random.default_rng(0).normal(size=(1, 5, DIM))
    module = attention(qk_norm=True)
    y = attend(module, x)
    module.q[...] = 100 * module.q[...]
    np.testing.assert_allclose(attend(module, x), y, rtol=1e-3, atol=1e-4)  # eps = 1e-6 is all that is left
    # a bias does what a constant input feature with that weight would
    biased, plain = attention(bias=True), attention()
    constant = np.concatenate([x[..., :-1], np.ones((1, 5, 1))], -1)
    for name in ("q", "k", "v", "o"):
        getattr(plain, name)[...] = getattr(biased, name)[...]
    for name in ("q", "k", "v"):
        getattr(plain, name)[...] = getattr(plain, name)[...].at[-1].add(getattr(biased, name + "_bias")[...])
    assert np.abs(attend(biased, constant) - attend(attention(), constant)).max() > 1e-3
    np.testing.assert_allclose(attend(biased, constant), attend(plain, constant), rtol=1e-4, atol=1e-5)
