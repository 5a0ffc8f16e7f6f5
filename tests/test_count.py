"""Parameters and FLOPs by arithmetic, held to the real arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moejax import count
from moejax.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.model import build
from moejax.validate import check_model
from tests.small import MODELS, VARIANTS, load, with_vocab


def real_parameters(config: ModelConfig) -> int:
    """Sizes of the trainable arrays that the model declares; nothing is allocated."""
    params = nnx.state(jax.eval_shape(lambda: build(config)), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("module", "variant"), VARIANTS)
def test_counted_parameters_are_those_of_the_arrays(module: str, variant: str):
    config = load(module, variant).model
    config = with_vocab(config, config.vocab_size or 1088)
    assert count.parameters(config).total == real_parameters(config)


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(first_dense=1, every=2),
        MoEConfig(first_dense=5),
        MoEConfig(every=2, shared_experts=2, shared_gate="sigmoid"),
        MoEConfig(router=RouterConfig(name="noisy_topk")),
        MoEConfig(router=RouterConfig(name="sigmoid_bias")),
        MoEConfig(router=RouterConfig(name="switch", k=1), shared_experts=1),
    ],
    ids=["alternating", "dense", "gated shared", "noisy", "bias is no parameter", "switch"],
)
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_counted_parameters_for_other_placements(moe: MoEConfig, activation: str):
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True, bias=True)
    config = ModelConfig(num_layers=5, dim=16, ffn_dim=24, attention=attention, moe=moe, activation=activation)
    assert count.parameters(config).total == real_parameters(config)
    untied = dataclasses.replace(config, tie_embeddings=False)
    assert count.parameters(untied).total == real_parameters(untied)


def test_groups_by_hand():
    """2 layers, the first dense: V=10 D=8 F_dense=12, 2 query and 1 key/value heads of 4; 4 experts of 6, top-2."""
    moe = MoEConfig(num_experts=4, expert_dim=6, router=RouterConfig(k=2), first_dense=1, shared_experts=1)
    config = ModelConfig(vocab_size=10, dim=8, ffn_dim=12, attention=AttentionConfig(2, 1, 4), moe=moe)
    p = count.parameters(config)
    assert p.embedding == 10 * 8
    assert p.attention == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8)  # q, then k and v, then o
    assert p.dense_ffn == 3 * 8 * 12
    assert p.routed_experts == 4 * 3 * 8 * 6
    assert p.shared_experts == 3 * 8 * 6
    assert p.router == 8 * 4
    assert p.vectors == 5 * 8  # two norms a layer, one at the end
    assert p.total == 80 + 384 + 288 + 576 + 144 + 32 + 40
    assert p.active == p.total - 2 * 3 * 8 * 6
    # Forward of one token at S=7: every active matrix once, the tied embedding as the unembedding. Attention: 2 layers,
    # scores and values, 2 heads of 4, (7 + 1) / 2 places on average.
    assert count.forward_flops_per_token(config, 7) == 2 * (80 + 384 + 288 + 288 + 144 + 32) + 2 * (2 * 2 * 8 * 4)


def test_an_untied_embedding_lookup_is_no_matmul():
    tied = ModelConfig(vocab_size=100, dim=16)
    untied = dataclasses.replace(tied, tie_embeddings=False)
    assert count.parameters(untied).total - count.parameters(tied).total == 100 * 16
    assert count.forward_flops_per_token(untied, 8) == count.forward_flops_per_token(tied, 8)


def test_olmoe_1b_7b():
    """OLMoE (2409.02060): 6.9 B parameters, 1.3 B active per token."""
    p = count.parameters(load("configs.papers.capacity_aware", "paper").model)
    assert p.total == pytest.approx(6.9e9, rel=0.01)
    assert round(p.active / 1e9, 1) == 1.3  # 1.282


# --- settings of published models -------------------------------------------------------------------------------------

GROUPED = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
LATENT = AttentionConfig(
    num_heads=4, num_kv_heads=4, head_dim=8, kind="latent", latent_rank=12, rope_head_dim=4, value_head_dim=6
)
SMALL = ModelConfig(num_layers=4, dim=16, ffn_dim=24, moe=MoEConfig(num_experts=4, expert_dim=6))


def with_attention(**changes: Any) -> ModelConfig:
    a = LATENT if changes.get("kind") == "latent" else GROUPED
    return dataclasses.replace(SMALL, attention=dataclasses.replace(a, **changes))


def with_moe(router: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    changed = RouterConfig(**(router or {}))
    return dataclasses.replace(SMALL, attention=GROUPED, moe=dataclasses.replace(SMALL.moe, router=changed, **changes))


SETTINGS = {
    "qk-norm over the projection": with_attention(qk_norm=True, qk_norm_over="projection"),
    "biases and sinks": with_attention(bias=True, output_bias=True, sinks=True),
    "window": with_attention(window=3, window_layers=(0, 2)),
    "latent": with_attention(kind="latent"),
    "latent, compressed queries": with_attention(kind="latent", query_rank=10),
    "latent, biases": with_attention(kind="latent", query_rank=10, bias=True, output_bias=True),
    "latent, biases, whole queries": with_attention(kind="latent", bias=True, output_bias=True),
    "expert bias": with_moe(expert_bias=True),
    "router bias": with_moe({"name": "softmax_of_topk", "bias": True}),
    "shared width": with_moe(shared_experts=1, shared_dim=10, shared_gate="sigmoid"),
    "dense layers": with_moe(dense_layers=(1, 2)),
    "zero experts": with_moe({"name": "softmax_bias", "renormalise": False}, zero_experts=3),
    "longcat": dataclasses.replace(
        with_attention(kind="latent", query_rank=10, scale_latents=True),
        wiring="longcat",
        moe=MoEConfig(num_experts=4, expert_dim=6, zero_experts=2, router=RouterConfig(name="softmax_bias")),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_counted_parameters_of_published_settings(name: str):
    config = SETTINGS[name]
    check_model(config)
    assert count.parameters(config).total == real_parameters(config)
    without_gate = dataclasses.replace(config, activation="relu")
    assert count.parameters(without_gate).total == real_parameters(without_gate)


@pytest.mark.parametrize("name", SETTINGS)
def test_cache_bytes_are_those_of_the_decoding_cache(name: str):
    config = SETTINGS[name]
    check_cache(config)


@pytest.mark.parametrize("module", MODELS)
def test_cache_bytes_of_presets(module: str):
    check_cache(load(module, "full").model)


def check_cache(config: ModelConfig) -> None:
    """Two tokens more in a bfloat16 cache of three rows."""

    def size(length: int) -> int:
        cache = jax.eval_shape(lambda: build(config).init_cache(3, length, jnp.bfloat16))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))

    assert size(9) - size(7) == 2 * 3 * count.cache_bytes_per_token(config)


def test_latent_attention_by_hand():
    """D=16, 4 heads of 8 without position and 4 with, values of 6, ranks 10 and 12."""
    matrices, vectors = count.attention_parameters(SETTINGS["latent, biases"].attention, 16)
    down = 16 * 10 + 16 * (12 + 4)  # queries; keys and values with the rotary key
    up = 10 * 4 * (8 + 4) + 12 * 4 * (8 + 6)
    assert matrices == down + up + 4 * 6 * 16
    assert vectors == (10 + 12) + (10 + 12 + 4 + 16)  # norm scales; biases
    assert count.cache_bytes_per_token(SETTINGS["latent"]) == 4 * (12 + 4) * 2  # layers, numbers, bytes
    flat = dataclasses.replace(SETTINGS["latent"], num_layers=1)
    at = [count.forward_flops_per_token(flat, s) for s in (7, 9)]
    assert at[1] - at[0] == 2 * 4 * (8 + 4 + 6)  # one place more on average: scores over 12 dimensions, values over 6


def test_active_of_zero_experts_is_the_mean_of_a_uniform_choice():
    """3 of 7 choices are free and k = 2: a token uses 8/7 experts, and the router and the rest whole."""
    p = count.parameters(SETTINGS["zero experts"])
    expert = 3 * 16 * 6
    assert p.router == 4 * 16 * 7
    assert p.total - p.active == round(4 * (4 - 2 * 4 / 7) * expert)


def test_biases_of_idle_experts_are_idle():
    p, plain = count.parameters(SETTINGS["expert bias"]), count.parameters(with_moe())
    bias = 2 * 6 + 16
    assert p.total - plain.total == 4 * 4 * bias and p.active - plain.active == 4 * 2 * bias
    flops = [count.forward_flops_per_token(c, 8) for c in (SETTINGS["expert bias"], with_moe())]
    assert flops[0] == flops[1]  # biases are no matmul


@pytest.mark.parametrize("seq", [1, 3, 4, 9])
def test_places_seen(seq: int):
    for window in (0, 1, 3, 4, 20):
        seen = [min(i + 1, window or seq) for i in range(seq)]
        assert count.places_seen(seq, window) == pytest.approx(sum(seen) / seq)


def test_a_window_takes_flops_of_its_layers_only():
    """At S=9 and a window of 3: (1 + 2 + 3 x 7) / 9 places instead of 5, in two layers of four."""
    whole, windowed = (count.forward_flops_per_token(SETTINGS[n], 9) if n else
                       count.forward_flops_per_token(with_attention(), 9) for n in ("", "window"))  # fmt: skip
    assert whole - windowed == pytest.approx(2 * (5 - 24 / 9) * 4 * 4 * 8)
    every = dataclasses.replace(SETTINGS["window"].attention, window_layers=())
    all_layers = count.forward_flops_per_token(dataclasses.replace(SETTINGS["window"], attention=every), 9)
    assert whole - all_layers == pytest.approx(2 * (whole - windowed))
