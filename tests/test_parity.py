"""Imported models are the published ones: logits of transformers, in both of its dialects, for every family and flag.

What was compared with what, and where transformers and the original code disagree: scripts/make_golden.py.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import lm_eval
from moejax import importers
from moejax.checkpoint import flatten
from moejax.config import ModelConfig
from moejax.decode import generate
from moejax.model import Decoder
from moejax.sharding import RouterState
from tests.goldens import FAMILIES, NAMES, TOLERANCE, error, golden, run, through_cache, unpack, with_config

pytestmark = pytest.mark.usefixtures("compiled_once")

BASES = [f"{family}-base" for family in FAMILIES]
FLIPPED = (
    "mixtral-yarn", "qwen2_moe-sparse_step", "qwen3_moe-dense_layer", "deepseek_v2-groups", "deepseek_v3-negative_bias",
    "gpt_oss-layer_types",
)  # fmt: skip
CACHES = ("qwen3_moe-base", "deepseek_v3-base", "gpt_oss-base", "longcat_flash-base")


def quick(names: Sequence[str], chosen: Sequence[str]) -> list[Any]:
    """All but the chosen are slow: each takes 2 s of compilation."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


PAD = 3


def load(name: str, folder: Path, **keywords: Any) -> Decoder:
    return importers.load(unpack(name, folder, **keywords), dtype="float32")


def arrays(model: Decoder) -> dict[str, np.ndarray]:
    """Every parameter and router state by path."""
    _, params, state = nnx.split(model, nnx.Param, RouterState)
    return {name: np.asarray(leaf) for name, leaf in flatten({"params": params, "state": state}).items()}


def test_every_family_has_cases_and_both_dialects() -> None:
    for base in BASES:
        assert set(golden(base).configs) == {"4", "5"}
    for family in FAMILIES:
        assert sum(name.startswith(f"{family}-") for name in NAMES) >= (2 if family in FAMILIES[-3:] else 4)
    # Experts as 2-D and as 3-D tensors; these have one layout in both versions.
    one = ["gpt_oss-base", "dbrx-base", "llama4_text-base"]
    assert [base for base in BASES if "fused" not in golden(base).weights] == one


def padded(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row with padding on the right, on the left, and in the middle: ``[3 B, S + 3]`` tokens and mask."""
    batch, seq = tokens.shape
    rows = np.random.default_rng(7).integers(0, tokens.max(), (3 * batch, seq + PAD)).astype(np.int32)
    mask = np.ones(rows.shape, bool)
    for i, start in enumerate((seq, 0, seq // 2)):
        mask[i * batch : (i + 1) * batch, start : start + PAD] = False
    rows[mask] = np.tile(tokens.ravel(), 3)
    return rows, mask


@pytest.mark.parametrize("name", quick(BASES, [name for name in BASES if name != "dbrx-base"]))
def test_logits_padding_and_batches(name: str, tmp_path: Path) -> None:
    """As transformers' within 1e-4 of the largest, wherever padding stands and whatever other rows hold."""
    case = golden(name)
    model = load(name, tmp_path)
    tokens, mask = padded(case.tokens)
    logits = np.asarray(run(model, tokens, mask).logits)
    for found in logits[mask].reshape(3, *case.logits.shape):
        assert error(found, case.logits) < TOLERANCE
    for row in range(2):  # alone: all others are padding, with other tokens
        alone = mask & (np.arange(len(mask)) == row)[:, None]
        found = np.asarray(run(model, np.where(alone, tokens, tokens[::-1]), alone).logits)[alone]
        assert error(found, case.logits[row]) < TOLERANCE


@pytest.mark.parametrize("name", quick(BASES, CACHES))
def test_cache(name: str, tmp_path: Path) -> None:
    """Chunks of a prompt, then single tokens, through the cache: the logits of the whole sequence."""
    case = golden(name)
    assert error(through_cache(load(name, tmp_path), case.tokens), case.logits) < TOLERANCE


@pytest.mark.parametrize("name", ["longcat_flash-base", "qwen2_moe-sparse_step"])
def test_no_two_arrays_of_a_cache_are_one(name: str, tmp_path: Path) -> None:
    """Decoding donates them: two attentions in a block, and two blocks in a pattern, need their own."""
    leaves = jax.tree.leaves(load(name, tmp_path).init_cache(1, 4))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BASES, "qwen2_moe-sparse_step"])
def test_generation_is_that_without_a_cache(name: str, tmp_path: Path) -> None:
    """Prompts of two lengths in one batch; and, one by one, the likeliest token after the whole text."""
    model = load(name, tmp_path)
    prompts, count = [golden(name).tokens[0, :9], golden(name).tokens[1, :6]], 6
    made = np.stack(list(generate(model, prompts, count)), axis=1)
    for prompt, found in zip(prompts, made, strict=True):
        text = np.zeros((1, len(prompts[0]) + count), np.int32)
        text[0, : len(prompt)] = prompt
        for i, token in enumerate(found):
            end = len(prompt) + i
            logits = np.asarray(run(model, text, np.arange(text.shape[1])[None] < end).logits)[0, end - 1]
            assert logits[token] > logits.max() - TOLERANCE * np.abs(logits).max()
            text[0, end] = token


@pytest.mark.parametrize("name", quick([name for name in NAMES if name not in BASES], FLIPPED))
def test_flags(name: str, tmp_path: Path) -> None:
    """Every other case: a router flag, a placement, a rope scaling, biases, tied embeddings, windows."""
    case = golden(name)
    assert error(run(load(name, tmp_path), case.tokens).logits, case.logits) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in NAMES if len(golden(name).configs) == 2])
def test_both_dialects_give_one_model(name: str, tmp_path: Path) -> None:
    """The same config, and from each layout of the weights the same arrays, bit for bit; so the logits are one."""
    old, new = (unpack(name, tmp_path / version, version) for version in "45")
    assert importers.read_config(old) == importers.read_config(new)
    layouts = golden(name).weights[1:]
    reference = arrays(importers.load(old, dtype="float32")) if layouts else {}
    for weights in layouts:
        found = arrays(load(name, tmp_path / weights, version="5", weights=weights))
        assert found.keys() == reference.keys()
        for path, value in found.items():
            np.testing.assert_array_equal(value, reference[path], err_msg=f"{weights}: {path}")


def test_lm_eval_says_what_its_hf_backend_says(tmp_path: Path) -> None:
    """Log-likelihoods, greedy flags and texts of lm-eval 0.4.13 with transformers' model, by our adapter."""
    folder = unpack("qwen3_moe-text", tmp_path)
    wanted = json.loads((folder / "requests.json").read_bytes())
    harness, _ = lm_eval.open_harness(folder, dtype="float32", max_length=wanted["max_length"], batch_size=4)
    pairs = wanted["loglikelihood"]
    assert {greedy for *_, greedy in pairs} == {False, True}
    found = harness.loglikelihood([(context, continuation) for context, continuation, *_ in pairs])
    assert [greedy for _, greedy in found] == [greedy for *_, greedy in pairs]
    np.testing.assert_allclose([value for value, _ in found], [value for *_, value, _ in pairs], rtol=TOLERANCE)
    texts, values = zip(*wanted["loglikelihood_rolling"], strict=True)
    found = harness.loglikelihood_rolling([(text,) for text in texts])
    np.testing.assert_allclose(found, values, rtol=TOLERANCE)
    prompts = wanted["generate_until"]
    assert harness.generate_until([(context, options) for context, options, _ in prompts]) == [t for *_, t in prompts]


FLIPS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral-base", {"norm_eps": 1e-6}),
    ("mixtral-base", {"scale_embeddings": True}),
    ("mixtral-base", {"tie_embeddings": True}),
    ("mixtral-base", {"attention.rope_theta": 10_000.0}),
    ("mixtral-base", {"attention.rope.layout": "interleaved"}),
    ("mixtral-base", {"attention.softmax_scale": 1.0}),
    ("mixtral-base", {"moe.router.k": 3}),
    ("mixtral-window", {"attention.window": 0}),
    ("mixtral-window", {"attention.window": 6}),
    ("mixtral-window", {"attention.window_layers": (1,)}),
    ("mixtral-linear", {"attention.rope.scaling": "none"}),
    ("mixtral-linear", {"attention.rope.factor": 2.0}),
    ("mixtral-llama3", {"attention.rope.scaling": "none"}),
    ("mixtral-llama3", {"attention.rope.low_freq_factor": 2.0}),
    ("mixtral-llama3", {"attention.rope.high_freq_factor": 8.0}),
    ("mixtral-llama3", {"attention.rope.original_length": 64}),
    ("mixtral-yarn", {"attention.rope.scaling": "none"}),
    ("mixtral-yarn", {"attention.rope.attention_factor": 0.0}),
    ("mixtral-yarn", {"attention.rope.beta_fast": 32.0}),
    ("mixtral-yarn", {"attention.rope.beta_slow": 1.0}),
    ("mixtral-yarn", {"attention.rope.truncate": False}),
    ("olmoe-base", {"moe.router.renormalise": True}),
    ("olmoe-base", {"attention.qk_norm": False}),
    ("olmoe-renormalised", {"moe.router.renormalise": False}),
    ("olmoe-bias", {"attention.bias": False}),
    ("olmoe-bias", {"attention.output_bias": False}),
    ("qwen2_moe-base", {"moe.shared_gate": "none"}),
    ("qwen2_moe-base", {"moe.router.renormalise": True}),
    ("qwen2_moe-base", {"attention.bias": False}),
    ("qwen3_moe-base", {"moe.router.renormalise": False}),
    ("qwen3_moe-base", {"attention.qk_norm": False}),
    ("deepseek_v2-base", {"attention.rope.layout": "halves"}),
    ("deepseek_v2-query_rank", {"moe.router.scale": 1.0}),
    ("deepseek_v2-query_rank", {"attention.scale_latents": True}),
    ("deepseek_v2-groups", {"moe.router.groups": 1, "moe.router.groups_kept": 1}),
    ("deepseek_v2-groups", {"moe.router.groups_kept": 1}),
    ("deepseek_v2-groups", {"moe.router.group_score": "top2_sum"}),
    ("deepseek_v2-mscale", {"attention.rope.mscale": 0.0, "attention.rope.mscale_all_dim": 0.0}),
    ("deepseek_v2-mscale", {"attention.rope.mscale": 1.0}),
    ("deepseek_v3-base", {"moe.router.name": "softmax_bias"}),
    ("deepseek_v3-base", {"moe.router.renormalise": False}),
    ("deepseek_v3-base", {"moe.router.scale": 1.0}),
    ("deepseek_v3-base", {"moe.router.groups": 1, "moe.router.groups_kept": 1}),
    ("deepseek_v3-base", {"moe.router.group_score": "max"}),
    ("deepseek_v3-bias", {"attention.bias": False}),
    ("deepseek_v3-bias", {"attention.output_bias": False}),
    ("deepseek_v3-bias", {"attention.rope.layout": "interleaved"}),
    ("gpt_oss-base", {"attention.sinks": False}),
    ("gpt_oss-base", {"attention.window_layers": ()}),
    ("gpt_oss-base", {"attention.rope.truncate": True}),
    ("gpt_oss-base", {"activation": "swiglu"}),
    ("gpt_oss-base", {"moe.expert_bias": False}),
    ("gpt_oss-base", {"moe.router.bias": False}),
    ("gpt_oss-base", {"moe.router.name": "topk_of_softmax", "moe.router.renormalise": False}),
    ("longcat_flash-base", {"attention.scale_latents": False}),
    ("longcat_flash-base", {"moe.router.scale": 1.0}),
    ("longcat_flash-base", {"moe.router.renormalise": True}),
    ("longcat_flash-base", {"moe.router.name": "sigmoid_bias"}),
    ("longcat_flash-base", {"attention.rope.layout": "halves"}),
    ("phimoe-base", {"norm": "layer"}),
    ("phimoe-base", {"logit_bias": False}),
    ("phimoe-base", {"attention.output_bias": False}),
    ("phimoe-base", {"moe.router.mask_margin": 0.02}),
    ("phimoe-base", {"moe.router.name": "softmax_of_topk", "moe.router.mask_margin": 0.01}),
    ("phimoe-base", {"attention.rope.short_mscale": 1.0}),
    ("phimoe-base", {"attention.rope.short_factor": (1.0, 1.0, 1.0)}),
    ("phimoe-base", {"attention.rope.original_length": 16}),
    ("phimoe-long", {"attention.rope.long_mscale": 1.0}),
    ("phimoe-long", {"attention.rope.long_factor": (1.0, 1.5, 2.0)}),
    ("dbrx-base", {"norm": "rms"}),
    ("dbrx-base", {"norm_eps": 1e-2}),
    ("dbrx-base", {"attention.clip_qkv": 0.0}),
    ("olmoe-clipped", {"attention.clip_qkv": 0.0}),
    ("dbrx-base", {"moe.router.renormalise": False}),
    ("dbrx-plain_weights", {"moe.router.renormalise": True}),
    ("llama4_text-base", {"moe.weigh": "output"}),
    ("llama4_text-base", {"moe.router.name": "topk_of_softmax"}),
    ("llama4_text-base", {"attention.qk_unit_norm": False}),
    ("llama4_text-base", {"attention.window_kind": "sliding"}),
    ("llama4_text-base", {"attention.window": 5}),
    ("llama4_text-base", {"attention.window_layers": ()}),
    ("llama4_text-base", {"attention.no_rope_layers": (2,)}),
    ("llama4_text-base", {"attention.temperature": 0.0}),
    ("llama4_text-base", {"attention.temperature_length": 8}),
    ("llama4_text-base", {"attention.rope.layout": "halves"}),
    ("llama4_text-base", {"attention.rope.scaling": "none"}),
    ("llama4_text-interleaved", {"attention.bias": False}),
]


def flipped(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    for path, value in changes.items():
        *outer, name = path.split(".")
        parts: list[Any] = [config]
        for part in outer:
            parts.append(getattr(parts[-1], part))
        assert getattr(parts[-1], name) != value, f"{path} is {value!r} in the case already"
        changed = dataclasses.replace(parts[-1], **{name: value})
        for part, parent in zip(reversed(outer), reversed(parts[:-1]), strict=True):
            changed = dataclasses.replace(parent, **{part: changed})
        config = changed
    return config


QUICK = (
    "moe.router.renormalise", "moe.router.scale", "moe.router.group_score", "moe.shared_gate", "attention.sinks",
    "attention.scale_latents", "attention.rope.mscale",
)  # fmt: skip
"""Flags that ports have lost; one case of each is quick, the rest are slow, at 2 s of compilation each."""


def _flips() -> list[Any]:
    left = list(QUICK)
    made = []
    for name, changes in FLIPS:
        first = [flag for flag in changes if flag in left]
        left = [flag for flag in left if flag not in first]
        marks = [] if first else [pytest.mark.slow]
        shown = ", ".join(f"{flag}={value}" for flag, value in changes.items())
        made.append(pytest.param(name, changes, marks=marks, id=f"{name}: {shown}"))
    return made


@pytest.mark.parametrize(("name", "changes"), _flips())
def test_a_flag_lost_in_the_import_would_show(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Each flag that the importer reads moves the logits by more than 100 times the tolerance."""
    case = golden(name)
    model = load(name, tmp_path)
    other = with_config(model, flipped(model.config, changes))
    assert error(run(other, case.tokens).logits, case.logits) > 100 * TOLERANCE
