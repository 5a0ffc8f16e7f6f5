#!/usr/bin/env python
"""Writes tests/golden/*.zip: tiny random models of each family as transformers writes and computes them.

The tests import them and must find the same logits, without torch or transformers installed. To make them anew, run
this file twice, in an environment with torch and transformers 4.57, then in one with transformers 5 (or the other way
round):

    python scripts/make_golden.py --output=tests/golden              # everything
    python scripts/make_golden.py --output=tests/golden --only=qwen  # cases whose name contains "qwen"

The first run writes a case; the second adds its own config and must find the same weights and, within 1e-5 of the
largest logit, the same logits. A case that is there already from the same version is made anew and must agree likewise:
remove the file to change a case. ``--list`` prints what is there and makes nothing.

A zip file holds

    case.json           family, seed, versions of transformers, difference of their logits, margin and spread of routers
    config.4.json       what transformers 4 writes for it; config.5.json what transformers 5 does
    model.safetensors   the weights in bfloat16 in the layout of published folders (experts as 2-D tensors, gpt-oss 3-D)
    written.safetensors what transformers 5 writes by default; pairs only, and where it is another layout (LongCat)
    fused.safetensors   what transformers 5 writes when asked for its own layout (experts as 3-D tensors); pairs only
    tokenizer.json, tokenizer_config.json, requests.json: of one case, with the answers of lm-eval's hf backend (where
                        lm_eval is installed beside; else they stay away, or as they were)
    golden.npz          tokens [B, S] int32; logits [B, S, V] float32: eager attention, eager experts, float32

Weights come from the tensor's name and a seed, on 61 levels (so that they compress), large enough that routing is far
from uniform. A seed is redrawn until no choice of a router is closer than 1e-4 to a tie: a rounding error must not
change an expert.

Where transformers and the original code, or two versions of it, disagree, ``NOTES`` says what moejax follows.
"""

import argparse
import dataclasses
import importlib.metadata
import io
import json
import os
import re
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np

NOTES = {
    "deepseek_v2: mscale_all_dim": """transformers 4.57 leaves m(mscale_all_dim)^2 out of the softmax scale; DeepSeek's
    own code and transformers 5 have it. We follow them: cases with it are of version 5 only.""",
    "deepseek_v2: norm_topk_prob": """transformers reads the key and never renormalises; DeepSeek's own code does, and
    then leaves routed_scaling_factor out. Published checkpoints say false, so there is no case with true.""",
    "deepseek_v3: groups that are out": """transformers 4.57 sets their scores to 0, version 5 and DeepSeek's inference
    code to -inf; that differs where a kept expert's score with bias is negative. We follow -inf: that case is of
    version 5 only.""",
    "deepseek, longcat: norms of the latents": """All versions and the original code take epsilon 1e-6 there, whatever
    rms_norm_eps is (LongCat's is 1e-5). So do we.""",
    "longcat: router": """router_bias makes an array that no version adds to the logits, and norm_topk_prob is read by
    none.""",
    "longcat: zero experts in transformers 5": """Its fused gate_up_proj has rows for the zero experts too. Nothing uses
    them; it writes them (as gate_proj and up_proj of those experts, without down_proj); and it cannot load a published
    folder, which has none. We read both, and write the published layout.""",
    "phimoe: long contexts": """Beyond original_max_position_embeddings Microsoft's code and transformers 4.57 take the
    long factors; transformers 5.17 takes long_mscale with the short factors (its rotary embedding calls the frequencies
    without a length). We follow the first: that case is of version 4 only. They count the tokens so far, and what is
    cached stays rotated as it was; here the width of the batch or the places of the cache decide, for all of it.""",
    "phimoe: sliding window": """transformers 5 applies it and 4.57 does not everywhere. Published files have it as
    wide as the longest text, where it does nothing; a narrower one is refused.""",
    "phimoe: training": """Its router draws experts at random there, with a gradient estimate of its own. Cases are of
    evaluation.""",
    "dbrx: rope_theta": """transformers 4 and Databricks' code take attn_config.rope_theta, 5.17 takes rope_parameters
    and so 10,000 for a published folder. Where both are there and differ, the importer refuses.""",
    "llama4: attention_bias": """4.57 has no such key and makes no biases: that case is of version 5 only.""",
    "llama4: temperature": """transformers counts positions from the left end of a padded row, we count real tokens.""",
    "qwen2_moe: sliding windows": """4.57 with eager attention gives every layer the window, with other back ends the
    layers from max_window_layers on; version 5 every other one of the layers before it. No published checkpoint uses
    one, and there is no case.""",
    "one expert per token, renormalised": """Its weight is 1 in transformers, and DeepSeek's own code keeps its score. A
    weight of 1 gives the router no gradient: the routers here have none such, and the importer refuses it.""",
}

TEXT = "In the beginning was the word, and the word was split in two: a gate that opens, and a hand that is up."
LEVELS = 30
MARGIN = 1e-4
AGREE = 1e-5
"""Two versions' logits may differ by this share of the largest."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 1.0, "beta_slow": 0.25}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 7.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 16,
}
DBRX_FFN = {
    "ffn_hidden_size": 22,
    "moe_num_experts": 7,
    "moe_top_k": 3,
    "moe_normalize_expert_weights": 1.0,
    "ffn_act_fn": {"name": "silu"},
}
MSCALE = {**YARN, "mscale": 1.3, "mscale_all_dim": 0.6}


@dataclasses.dataclass(frozen=True)
class Case:
    family: str
    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: tuple[int, ...] = (4, 5)
    """Major versions of transformers that compute what we follow."""
    fused: bool = False
    """Also in the layout of transformers 5."""
    bias: tuple[float, float] = (0.1, 0.6)
    """Range of the selection bias."""
    text: bool = False
    """With a tokenizer, and the answers of lm-eval's ``hf`` backend to some requests."""


COMMON = {"vocab_size": 67, "max_position_embeddings": 128, "rms_norm_eps": 0.05, "use_cache": False}
GROUPED = {
    "hidden_size": 33,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "num_hidden_layers": 2,
}
LATENT = {
    "hidden_size": 33,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 13,
    "qk_nope_head_dim": 9,
    "qk_rope_head_dim": 6,
    "v_head_dim": 11,
    "rope_theta": 500.0,
}
DEEPSEEK = {
    **LATENT,
    "num_hidden_layers": 2,
    "intermediate_size": 35,
    "moe_intermediate_size": 14,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
BASES: dict[str, dict[str, Any]] = {
    "mixtral": {
        **GROUPED,
        "intermediate_size": 22,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_theta": 500.0,
    },
    "olmoe": {
        "hidden_size": 36,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "num_hidden_layers": 2,
        "intermediate_size": 14,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "rope_theta": 500.0,
    },
    "qwen2_moe": {
        "hidden_size": 36,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 35,
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 17,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "rope_theta": 500.0,
    },
    "qwen3_moe": {
        **GROUPED,
        "intermediate_size": 35,
        "moe_intermediate_size": 14,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "rope_theta": 500.0,
    },
    # Even numbers: transformers views what follows them as complex numbers.
    "deepseek_v2": {**DEEPSEEK, "qk_nope_head_dim": 10, "kv_lora_rank": 14},
    "deepseek_v3": {
        **DEEPSEEK,
        "q_lora_rank": 15,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {
        **GROUPED,
        "intermediate_size": 22,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "rope_theta": 500.0,
        "rope_scaling": {**YARN, "truncate": False},
        "attention_bias": True,
    },
    "phimoe": {
        "hidden_size": 36,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 22,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.2,  # large, so that many choices have a rival
        "rope_theta": 500.0,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "dbrx": {
        "vocab_size": 67,
        "d_model": 30,
        "n_heads": 5,
        "n_layers": 2,
        "max_seq_len": 128,
        "use_cache": False,
        "attn_config": {"clip_qkv": 1.5, "kv_n_heads": 5, "rope_theta": 500.0},
        "ffn_config": DBRX_FFN,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "llama4_text": {
        **GROUPED,
        "num_hidden_layers": 3,
        "intermediate_size": 22,
        "intermediate_size_mlp": 26,
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 6,
        "floor_scale": 4,
        "attn_scale": 0.7,
        "rope_theta": 500.0,
        "rope_scaling": {**LLAMA3, "high_freq_factor": 1.0},
    },
    "longcat_flash": {
        **LATENT,
        "head_dim": 6,
        "q_lora_rank": 15,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "ffn_hidden_size": 26,
        "expert_ffn_hidden_size": 14,
        "n_routed_experts": 5,
        "zero_expert_num": 3,
        "moe_topk": 3,
        "routed_scaling_factor": 1.7,
    },
}
SPARSE = {"num_hidden_layers": 3}
CASES = (
    Case("mixtral", "base", fused=True),
    Case("mixtral", "tied", {"tie_word_embeddings": True}),
    Case("mixtral", "window", {"sliding_window": 5}),
    Case("mixtral", "linear", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    Case("mixtral", "llama3", {"rope_scaling": LLAMA3}),
    Case("mixtral", "yarn", {"rope_scaling": {**YARN, "attention_factor": 1.3}}),
    Case("olmoe", "base", fused=True),
    Case("olmoe", "renormalised", {"norm_topk_prob": True}),
    Case("olmoe", "grouped_query", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    Case("olmoe", "clipped", {"clip_qkv": 0.7, "num_key_value_heads": 2}),
    Case("olmoe", "bias", {"attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    Case("qwen2_moe", "base", fused=True),
    Case("qwen2_moe", "renormalised", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    Case("qwen2_moe", "dense_layer", {**SPARSE, "mlp_only_layers": [1]}),
    Case("qwen2_moe", "sparse_step", {**SPARSE, "decoder_sparse_step": 2}),
    Case("qwen2_moe", "no_bias", {"qkv_bias": False, "rope_scaling": {**YARN, "type": "yarn"}}),
    Case("qwen3_moe", "base", {"norm_topk_prob": True}, fused=True),
    Case("qwen3_moe", "plain_weights", {"norm_topk_prob": False, "tie_word_embeddings": True}),
    Case("qwen3_moe", "dense_layer", {**SPARSE, "mlp_only_layers": [1], "norm_topk_prob": True}),
    Case("qwen3_moe", "sparse_step", {**SPARSE, "decoder_sparse_step": 2, "norm_topk_prob": True}),
    Case("qwen3_moe", "bias", {"attention_bias": True, "rope_scaling": YARN}),
    Case("qwen3_moe", "window", {"use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": True}),
    Case("qwen3_moe", "text", {"vocab_size": 307, "norm_topk_prob": True, "num_hidden_layers": 1}, text=True),
    Case("deepseek_v2", "base", fused=True),
    Case("deepseek_v2", "query_rank", {"q_lora_rank": 15, "routed_scaling_factor": 2.5, "tie_word_embeddings": True}),
    Case(
        "deepseek_v2",
        "groups",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "n_routed_experts": 9,
            "num_experts_per_tok": 3,  # more than groups: else its best experts are always within the best groups
            "routed_scaling_factor": 2.5,
        },
    ),
    Case("deepseek_v2", "bias", {"attention_bias": True, "q_lora_rank": 15, "n_shared_experts": 2}),
    Case("deepseek_v2", "all_sparse", {"first_k_dense_replace": 0, "rope_scaling": YARN}),
    Case("deepseek_v2", "mscale", {"rope_scaling": MSCALE, "first_k_dense_replace": 0}, versions=(5,)),
    Case("deepseek_v3", "base", fused=True),
    Case("deepseek_v3", "no_groups", {"n_group": 1, "topk_group": 1, "tie_word_embeddings": True}),
    Case("deepseek_v3", "plain_weights", {"norm_topk_prob": False, "n_shared_experts": 2}),
    Case("deepseek_v3", "no_query_rank", {"q_lora_rank": None, "first_k_dense_replace": 0}),
    Case("deepseek_v3", "bias", {"attention_bias": True, "rope_interleave": False}),
    Case("deepseek_v3", "mscale", {"rope_scaling": MSCALE}),
    Case("deepseek_v3", "negative_bias", versions=(5,), bias=(-1.4, -0.6)),
    Case("gpt_oss", "base"),
    Case("gpt_oss", "tied", {"tie_word_embeddings": True, "num_experts_per_tok": 3}),
    Case("gpt_oss", "truncated_ramp", {"rope_scaling": YARN}),
    Case("gpt_oss", "layer_types", {**SPARSE, "layer_types": ["full_attention", *["sliding_attention"] * 2]}),
    Case("gpt_oss", "no_bias", {"attention_bias": False, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    Case("phimoe", "base", {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32}}, fused=True),
    Case("phimoe", "long", {"rope_scaling": LONGROPE, "lm_head_bias": False}, versions=(4,)),
    Case("phimoe", "plain", {"attention_bias": False, "tie_word_embeddings": True, "router_jitter_noise": 0.05}),
    Case("dbrx", "base"),
    Case(
        "dbrx",
        "plain_weights",
        {
            "attn_config": {"clip_qkv": 0.7, "kv_n_heads": 1, "rope_theta": 500.0},
            "ffn_config": {**DBRX_FFN, "moe_normalize_expert_weights": None},
        },
    ),
    Case("llama4_text", "base"),
    Case(
        "llama4_text",
        "interleaved",
        {
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 2,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
            "rope_scaling": None,
            "tie_word_embeddings": True,
        },
        versions=(5,),
    ),
    Case("longcat_flash", "base", bias=(-0.2, 0.2), fused=True),
    Case("longcat_flash", "no_zero_experts", {"zero_expert_num": 0}, bias=(-0.2, 0.2)),
    Case("longcat_flash", "tied", {"tie_word_embeddings": True, "routed_scaling_factor": 1.0}, bias=(-0.2, 0.2)),
    Case("longcat_flash", "bias", {"attention_bias": True, "rope_scaling": MSCALE}, bias=(-0.2, 0.2)),
)


def settings(case: Case) -> dict[str, Any]:
    """Keyword arguments of the family's config class (transformers 5 reads those of version 4)."""
    common = {} if case.family == "dbrx" else COMMON  # which has names of its own for all of them
    made = {**common, **BASES[case.family], **case.changes}
    ids = {"bos_token_id": None, "eos_token_id": 0} if case.text else {"bos_token_id": 1, "eos_token_id": 2}
    return {**json.loads(json.dumps(made)), **ids, "pad_token_id": None}


def value(case: Case, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The weights of one tensor: numbers that bfloat16 holds exactly, from the seed and the tensor's name."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    steps = rng.integers(-LEVELS, LEVELS + 1, shape)
    if name.endswith("e_score_correction_bias"):
        low, high = case.bias
        return np.round(rng.uniform(low, high, shape) * 128) / 128
    if name.endswith("sinks"):
        return steps / 16
    if name.endswith("bias"):
        return steps / 64
    if re.search(r"norm(_\w)?\.weight$", name) or "layernorm" in name:
        return 1 + steps / 64
    if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")):
        return steps / 64 if "head" in name else steps / 16
    # gpt-oss and Llama 4 multiply from the left: [in, out]. All others are [out, in].
    fan_in = shape[-2] if case.family in ("gpt_oss", "llama4_text") and ".experts." in name else shape[-1]
    gain = 1.5
    routers = ("gate.weight", "router.weight", "classifier.weight", "router.layer.weight")
    if name.endswith(routers) and "shared" not in name:
        gain = 1.2
    if case.family == "gpt_oss" and name.endswith("experts.gate_up_proj"):
        gain = 4.0  # so that the clamps at 7 are reached
    # A power of two keeps every value exact in bfloat16.
    scale = 2.0 ** np.round(np.log2(gain * np.sqrt(3 / fan_in) / LEVELS))
    return steps * scale


def fill(case: Case, tensors: dict[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    import torch

    made = {}
    for name in sorted(tensors):
        array = value(case, name, tensors[name], seed).astype(np.float32)
        made[name] = torch.from_numpy(array).to(torch.bfloat16)
        assert np.array_equal(made[name].float().numpy(), array), f"{name} is not exact in bfloat16"
    return made


def margin(case: Case, config: Any, router: Any, hidden: Any) -> tuple[float, float]:
    """The smallest gap between a chosen and the best refused (expert or group), and the spread of the logits."""
    import torch

    hidden = hidden.reshape(-1, hidden.shape[-1])
    weight = getattr(router, "classifier", getattr(router, "layer", router)).weight
    logits = hidden @ weight.T + (router.bias if case.family == "gpt_oss" else 0)
    k = config.ffn_config.moe_top_k if case.family == "dbrx" else getattr(config, "moe_topk", None)
    k = k or config.num_experts_per_tok
    scores = logits.sigmoid() if case.family == "deepseek_v3" else logits.softmax(-1)
    if case.family in ("gpt_oss", "llama4_text", "phimoe"):
        scores = logits

    def gap(values: Any, kept: int) -> float:
        if kept >= values.shape[-1]:
            return float("inf")
        ranked = values.sort(-1, descending=True).values
        return (ranked[:, kept - 1] - ranked[:, kept]).min().item()

    choice = scores + getattr(router, "e_score_correction_bias", 0)
    gaps = [gap(choice, 1), *rivals(choice, config.router_jitter_noise)] if case.family == "phimoe" else []
    groups = getattr(config, "n_group", None) or 1
    if groups > 1:
        parts = choice.reshape(len(choice), groups, -1)
        v3 = case.family == "deepseek_v3"
        group_scores = parts.topk(2, -1).values.sum(-1) if v3 else parts.max(-1).values
        gaps.append(gap(group_scores, config.topk_group))
        kept = torch.zeros_like(group_scores).scatter(1, group_scores.topk(config.topk_group, -1).indices, 1).bool()
        choice = parts.masked_fill(~kept[..., None], float("-inf")).reshape(choice.shape)
    return min([*gaps, gap(choice, k)]), logits.std(-1).mean().item()


def rivals(logits: Any, margin: float) -> list[float]:
    """How near a logit comes to the line that parts the rivals of SparseMixer's choices from the others."""
    import torch

    found, rest = [], logits
    for _ in range(2):
        best, expert = rest.max(-1, keepdim=True)
        share = (best - logits) / torch.maximum(logits.abs(), best)
        found.append((share - 2 * margin).abs().min().item())
        rest = rest.scatter(1, expert, float("-inf"))
    return found


def run(case: Case, model: Any, tokens: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Logits; the smallest margin of all routers; the mean spread of their logits."""
    import torch

    seen: list[tuple[float, float]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs: seen.append(margin(case, model.config, module, inputs[0]))
        )
        for name, module in model.named_modules()
        if name.endswith((".mlp.gate", ".block_sparse_moe.gate", ".mlp.router", ".feed_forward.router", ".ffn.router"))
    ]
    assert hooks
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()
    for hook in hooks:
        hook.remove()
    return logits, min(gap for gap, _ in seen), float(np.mean([spread for _, spread in seen]))


def spare(name: str, config: Any) -> bool:
    """Whether it is one of the tensors of LongCat's zero experts that only transformers 5 has."""
    expert = re.search(r"\.experts\.(\d+)\.", name)
    return bool(expert) and getattr(config, "zero_expert_num", 0) and int(expert[1]) >= config.n_routed_experts


def load(folder: Path, dtype: str = "float32") -> Any:
    """The model in a folder, with eager attention and experts; every tensor must have found its place."""
    import torch
    import transformers

    keywords = {"attn_implementation": "eager", "dtype": getattr(torch, dtype), "output_loading_info": True}
    if int(transformers.__version__.split(".")[0]) >= 5:
        keywords["experts_implementation"] = "eager"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **keywords)
    wrong = {name: found for name, found in info.items() if found}
    assert not wrong, f"{folder}: {wrong}"
    return model.eval()


@dataclasses.dataclass
class Drawn:
    """A random model of a case without near ties; ``folder`` holds it as this version of transformers writes it."""

    folder: Path
    model: Any
    tokens: np.ndarray
    logits: np.ndarray
    facts: dict[str, Any]


def draw(case: Case, folder: Path, first_seed: int = 0) -> Drawn:
    """Tries seeds from ``first_seed`` on, which also is that of the tokens."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    config = transformers.AutoConfig.for_model(case.family, **settings(case))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.bfloat16)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
    tokens = np.random.default_rng(first_seed).integers(0, config.vocab_size, (2, 19)).astype(np.int32)
    for seed in range(first_seed, first_seed + 100):
        save_file(fill(case, shapes, seed), path, metadata={"format": "pt"})
        model = load(folder)
        logits, gap, spread = run(case, model, tokens)
        if gap >= MARGIN:
            break
    else:
        raise SystemExit(f"{case.family} {case.name}: no seed without a near tie")
    assert spread > 0.5, f"{case.family} {case.name}: the router's logits spread by {spread} only"
    facts = {"family": case.family, "seed": seed, "margin": gap, "spread": spread}
    return Drawn(folder, model, tokens, logits, facts)


def make(case: Case, version: int) -> dict[str, bytes]:
    """The members of a case's zip file, as this version of transformers makes them."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        made = draw(case, folder)
        facts = {**made.facts, "versions": {str(version): transformers.__version__}}
        members = {f"config.{version}.json": (folder / "config.json").read_bytes()}
        path = folder / "model.safetensors"
        if case.fused and version >= 5:
            fused = Path(scratch) / "fused"
            made.model.to(torch.bfloat16).save_pretrained(fused, save_original_format=False)
            made.model.float()
            members["fused.safetensors"] = (fused / "model.safetensors").read_bytes()
            again, _, _ = run(case, load(fused), made.tokens)
            assert np.array_equal(again, made.logits), f"{case.family} {case.name}: the fused layout gives other logits"
        if case.text:
            members |= texts(made, Path(scratch) / "text")
            if "requests.json" in members:
                facts["versions"]["lm_eval"] = importlib.metadata.version("lm_eval")
        tensors = load_file(path)
        published = {name: tensor for name, tensor in tensors.items() if not spare(name, made.model.config)}
        if len(published) < len(tensors):
            if case.fused:
                members["written.safetensors"] = path.read_bytes()
            save_file(published, path, metadata={"format": "pt"})
        arrays = Path(scratch) / "golden.npz"
        np.savez_compressed(arrays, tokens=made.tokens, logits=made.logits)
        members["golden.npz"] = arrays.read_bytes()
        members["model.safetensors"] = path.read_bytes()
        members["case.json"] = json.dumps(facts, indent=1).encode()
        return members


def texts(made: Drawn, folder: Path) -> dict[str, bytes]:
    """A byte-level BPE tokenizer, and what lm-eval's ``hf`` backend says of some requests (where it is installed)."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=made.model.config.vocab_size - 9,  # as published models, it knows fewer ids than the model
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    members = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        print(f"no requests: {error}")
        return members
    length = 24
    judge = HFLM(pretrained=made.model, tokenizer=fast, batch_size=2, max_length=length, device="cpu", backend="causal")

    def ask(kind: str, arguments: list[tuple]) -> list[Any]:
        instances = [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]
        return getattr(judge, kind)(instances, disable_tqdm=True)

    words = TEXT.split()
    pairs = [(" ".join(words[:n]), " " + words[n]) for n in (1, 2, 5, 9)]
    pairs += [("", words[0]), ("a \n", "b"), (" ".join(words), " and no more than that"), ("é", "€ ü")]
    for n in range(1, len(words)):  # continuations that are the likeliest
        context = " ".join(words[:n])
        with torch.no_grad():
            ids = torch.tensor([fast.encode(context)[-length:]])
            logits = made.model(ids, use_cache=False).logits[0, -1, : len(fast)]
        guess = fast.decode([int(logits.argmax())])
        same = fast.encode(context + guess) == [*fast.encode(context), int(logits.argmax())]
        if same and guess.strip() == guess and guess != fast.eos_token:  # which in a text is a text, for us
            pairs.append((context, guess))
    rolling = [(TEXT,), (words[0],)]
    prompts = [(context, {"until": ["zz"], "max_gen_toks": 6}) for context, _ in pairs[:3]]
    answers = {
        "max_length": length,
        "loglikelihood": [[*pair, *found] for pair, found in zip(pairs, ask("loglikelihood", pairs), strict=True)],
        "loglikelihood_rolling": [
            [text, found] for (text,), found in zip(rolling, ask("loglikelihood_rolling", rolling), strict=True)
        ],
        "generate_until": [
            [*prompt, found] for prompt, found in zip(prompts, ask("generate_until", prompts), strict=True)
        ],
    }
    return {**members, "requests.json": json.dumps(answers, indent=1, ensure_ascii=False).encode()}


def arrays(members: dict[str, bytes]) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(members["golden.npz"])) as found:
        return dict(found)


def merge(old: dict[str, bytes], new: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Both runs' members; the first run's logits stay, and the second's must agree."""
    if old["model.safetensors"] != new["model.safetensors"]:
        raise SystemExit(f"{name}: other weights than those that lie there; remove the file to change a case")
    before, after = arrays(old), arrays(new)
    off = float(np.abs(before["logits"] - after["logits"]).max() / np.abs(before["logits"]).max())
    if off > AGREE or not np.array_equal(before["tokens"], after["tokens"]):
        raise SystemExit(f"{name}: logits differ by {off:.1e} of the largest")
    facts, more = json.loads(old["case.json"]), json.loads(new["case.json"])
    facts["versions"] |= more["versions"]
    facts["difference"] = max(off, facts.get("difference", 0.0))
    return {**new, **old, "case.json": json.dumps(facts, indent=1).encode()}


def read(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def write(path: Path, members: dict[str, bytes]) -> None:
    """Atomically, and the same bytes from the same members."""
    part = path.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_LZMA) as file:
        for name in sorted(members):
            file.writestr(zipfile.ZipInfo(name), members[name], zipfile.ZIP_LZMA)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the zip files")
    parser.add_argument("--only", default="", help="cases whose family-name contains this")
    parser.add_argument("--list", action="store_true", help="list the cases that lie there, and make nothing")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in f"{case.family}-{case.name}"]
    if not cases:
        sys.exit(f"--only={args.only}: no case has that in its name; --list shows those that lie there")
    if args.list:
        for path in sorted(args.output.glob("*.zip")):
            print(
                f"{path.name:40} {path.stat().st_size / 1e3:6.1f} kB  {json.dumps(json.loads(read(path)['case.json']))}"
            )
        return
    import torch
    import transformers

    torch.set_num_threads(1)
    version = int(transformers.__version__.split(".")[0])
    args.output.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if version not in case.versions:
            continue
        name = f"{case.family}-{case.name}"
        path = args.output / f"{name}.zip"
        members = make(case, version)
        if path.exists():
            members = merge(read(path), members, name)
        write(path, members)
        facts = json.loads(members["case.json"])
        print(f"{name:34} {path.stat().st_size / 1e3:6.1f} kB  {facts}", flush=True)


if __name__ == "__main__":
    main()
