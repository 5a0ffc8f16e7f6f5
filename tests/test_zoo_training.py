"""Two training steps of one preset for each architecture signature, at ``:tiny`` with one MoE layer and few tokens.

The rest of the zoo is held by shapes: ``tests/test_count.py``. Seven run; the others are slow, and of them a step is
traced. DeepSeek-V2 and V2-Lite are DeepSeek-V3 but for the router (``tests/test_routing.py``) and the latent queries
(``tests/test_attention.py``), DeepSeekMoE's shared experts are DeepSeek-V3's beside the dense first layer of
``tests/small.py``, Mixtral and Qwen3 are OLMoE but for the norm of queries and keys, and DBRX and Grok-1 those with a
clip and a soft cap (``tests/test_attention.py``).
"""

import dataclasses

import jax
import numpy as np
import pytest

from moejax import sharding
from moejax.config import ExperimentConfig, MeshConfig
from moejax.model import moe_layer_ids
from moejax.train import Trainer
from tests.small import MODELS, VOCAB, flat, load, quick_compilation, random_batch, start, with_vocab

SIGNATURES = {
    "deepseek_v3": ("deepseek_v3",),
    "deepseek_v2": ("deepseek_v2",),
    "deepseek_v2_lite": ("deepseek_v2_lite",),
    "gpt_oss_20b": ("gpt_oss_20b", "gpt_oss_120b"),
    "longcat_flash": ("longcat_flash",),
    "olmoe_1b_7b": ("olmoe_1b_7b",),
    "qwen15_moe_a27b": ("qwen15_moe_a27b", "qwen2_57b_a14b"),
    "mixtral_8x7b": ("mixtral_8x7b", "mixtral_8x22b"),
    "deepseek_moe_16b": ("deepseek_moe_16b", "deepseek_moe_2b", "deepseek_moe_145b"),
    "qwen3_30b_a3b": ("qwen3_30b_a3b", "qwen3_235b_a22b"),
    "dbrx": ("dbrx",),
    "grok_1": ("grok_1",),
    "phi35_moe": ("phi35_moe",),
    "llama4_scout": ("llama4_scout",),
}
"""The preset that trains, and those of its architecture."""
SLOW = (
    "deepseek_v2", "deepseek_v2_lite", "deepseek_moe_16b", "mixtral_8x7b", "qwen3_30b_a3b", "dbrx", "grok_1",
)  # fmt: skip
DENSE_FIRST = ("deepseek_moe_16b",)
"""Those that keep their dense first layer, which doubles what is compiled."""
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SIGNATURES]


def test_every_preset_has_a_signature_that_trains():
    assert sorted(f"configs.models.{name}" for names in SIGNATURES.values() for name in names) == sorted(MODELS)


def smallest(name: str) -> ExperimentConfig:
    config = load(f"configs.models.{name}", "tiny")
    train = dataclasses.replace(config.train, steps=2, batch_size=4, warmup_steps=0, learning_rate=1e-2)
    model = with_vocab(config.model, VOCAB)
    moe = model.moe if name in DENSE_FIRST else dataclasses.replace(model.moe, first_dense=0)
    layers = 2 if model.attention.window else moe.first_dense + 1  # with a window and without
    return dataclasses.replace(config, model=dataclasses.replace(model, num_layers=layers, moe=moe), train=train)


def trainer_of(config: ExperimentConfig) -> Trainer:
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return Trainer(config, np.ones(VOCAB, np.float32), mesh)


@pytest.mark.parametrize("name", SLOW)
def test_a_step_of_training_is_traced(name: str):
    """It gives the state that it takes, and gradients exist for all of it."""
    trainer = trainer_of(smallest(name))
    state, step = jax.eval_shape(trainer._step, trainer.abstract, random_batch(batch=4, seq=12))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, step.loss)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), (trainer.abstract, jax.ShapeDtypeStruct((), np.float32))
    )


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_training(name: str):
    """Every array moves and stays finite, the loss of the batch falls, and every token has its k pairs."""
    config = smallest(name)
    moe = config.model.moe
    with quick_compilation():
        trainer = trainer_of(config)
        state = start(trainer)
        before, batch, made = flat(state.params), random_batch(batch=4, seq=12), []
        for _ in range(config.train.steps):
            state, step = trainer.step_fn(state, batch)
            made.append(jax.device_get(step))
    first, second = made
    assert np.isfinite(first.grad_norm) and second.loss < first.loss
    layers = len(moe_layer_ids(config.model))
    sums = second.moe
    pairs = sums.computed.sum() + (0 if sums.zero_routed is None else sums.zero_routed.sum())
    assert pairs == layers * moe.router.k * batch["mask"].sum()
    after = flat(state.params)
    assert [path for path in after if not np.isfinite(after[path]).all()] == []
    assert [path for path in after if np.array_equal(after[path], before[path])] == []
