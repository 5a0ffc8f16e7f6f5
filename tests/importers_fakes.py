"""Hugging Face folders for tests: published config.json files, a NumPy writer of safetensors, and random weights."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from moejax.checkpoint import flatten
from moejax.importers import configs
from moejax.importers.matching import blocks
from moejax.importers.tables import TABLES
from moejax.model import Decoder
from moejax.sharding import RouterState

TYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U8": np.uint8,
    "I64": np.int64,
}
Arrays = dict[str, np.ndarray]

# As published, but for keys that say nothing of the model.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
        "use_cache": True, "vocab_size": 32000,
    },
    "OLMoE-1B-7B-0924": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
    },
    "Qwen1.5-MoE-A2.7B": {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.39.0.dev0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        "decoder_sparse_step": 1, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False, "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "DeepSeek-V2-Lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
        "bos_token_id": 100000, "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
        "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
    },
    "LongCat-Flash-Chat": {
        "architectures": ["LongcatFlashForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_longcat_flash.LongcatFlashConfig"}, "vocab_size": 131072,
        "hidden_size": 6144, "ffn_hidden_size": 12288, "expert_ffn_hidden_size": 2048, "num_layers": 28,
        "num_attention_heads": 64, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "qk_nope_head_dim": 128, "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "routed_scaling_factor": 6.0,
        "n_routed_experts": 512, "rms_norm_eps": 1e-05, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
        "rope_theta": 10000000.0, "max_position_embeddings": 131072, "zero_expert_num": 256,
        "zero_expert_type": "identity", "moe_topk": 12, "model_type": "longcat_flash", "attention_method": "MLA",
        "torch_dtype": "bfloat16",
    },
}  # fmt: skip


def leaves(model: Decoder) -> dict[str, Any]:
    """Every parameter and router state by path."""
    _, *states = nnx.split(model, nnx.Param, RouterState)
    return {name: leaf for state in states for name, leaf in flatten(state).items()}


def arrays(model: Decoder) -> Arrays:
    return {name: np.asarray(leaf) for name, leaf in leaves(model).items()}


def assert_equal(one: Decoder, two: Decoder) -> None:
    """Bit for bit, with equal types."""
    found, expected = arrays(one), arrays(two)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert value.tobytes() == expected[name].tobytes(), name


def published(name: str, **changes: Any) -> dict[str, Any]:
    """A copy of a published config.json; a change to ... removes the key."""
    raw = {**copy.deepcopy(PUBLISHED[name]), **changes}
    return {key: value for key, value in raw.items() if value is not ...}


def of_family(family: str, **changes: Any) -> dict[str, Any]:
    name = next(name for name, raw in PUBLISHED.items() if raw["model_type"] == family)
    return published(name, **changes)


def encode(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file."""
    names = {np.dtype(dtype): name for name, dtype in TYPES.items()}
    header, values, at = {}, [], 0
    for name, array in tensors.items():
        values.append(np.ascontiguousarray(array).tobytes())
        offsets = [at, at + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        at += array.nbytes
    text = json.dumps(header).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *values])


def decode(path: Path) -> Arrays:
    """The tensors of a safetensors file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:end]).items():
        if name != "__metadata__":
            first, last = (end + at for at in entry["data_offsets"])
            found[name] = np.frombuffer(data[first:last], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def write_folder(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, np.ndarray], files: int = 1) -> Path:
    """config.json and the tensors, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    if files == 1:
        (folder / "model.safetensors").write_bytes(encode(tensors))
        return folder
    names, places = list(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::files]}
        (folder / file).write_bytes(encode(part))
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


SMALL: dict[str, dict[str, Any]] = {
    "olmoe": {
        "model_type": "olmoe", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 6, "num_experts": 4, "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    },
    "mixtral": {
        "model_type": "mixtral", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 6, "num_local_experts": 4,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 10, "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 7, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1],
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 10, "moe_intermediate_size": 6, "num_experts": 4,
        "num_experts_per_tok": 2, "decoder_sparse_step": 2, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": True,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 10, "moe_intermediate_size": 6,
        "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "q_lora_rank": None, "kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 7,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": True,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 10, "moe_intermediate_size": 6,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 7,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": True, "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 64, "num_local_experts": 4,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 4,
    },
    "longcat_flash": {
        "model_type": "longcat_flash", "vocab_size": 11, "hidden_size": 8, "num_layers": 2, "num_attention_heads": 2,
        "ffn_hidden_size": 10, "expert_ffn_hidden_size": 6, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
        "q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 7,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "routed_scaling_factor": 6.0,
    },
}  # fmt: skip
"""A small model of each family, with what it has that others do not."""


def small_tensors(raw: Mapping[str, Any], layout: str = "per_expert", dtype: Any = np.float32) -> Arrays:
    """Random weights for a config.json, under the names of a layout, each tensor another."""
    config = configs.read_config(raw, Path("config.json"))
    table = TABLES[raw["model_type"]](config)
    shapes = {row.source: row.stored for row in table.model}
    for layer, _, _, is_moe in blocks(config):
        targets = set()
        for row in table.block(is_moe):
            wanted = row.layout in ("", layout) or (row.layout == "fused" and raw["model_type"] == "gpt_oss")
            if wanted and (row.layout or row.target not in targets):
                targets.add(row.target)
                shapes |= dict.fromkeys(row.names(table.layer.format(layer)), row.stored)
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 1 / math.sqrt(shape[-1]), shape).astype(dtype) for name, shape in shapes.items()}


def small_folder(
    folder: Path, family: str = "olmoe", layout: str = "per_expert", files: int = 1, **changes: Any
) -> Path:
    raw = {**SMALL[family], **changes}
    return write_folder(folder, raw, small_tensors(raw, layout), files)
