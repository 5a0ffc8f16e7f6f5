"""Parameters and FLOPs by arithmetic, held to the real arrays."""

import dataclasses

import jax
import pytest
from flax import nnx

from moejax import count
from moejax.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.model import build
from tests.small import VARIANTS, load, with_vocab


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
