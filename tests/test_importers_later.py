"""DBRX, PhiMoE and Llama 4: their folders out and in again, their config.json, and what of it is refused.

Their logits: tests/test_parity.py.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.models import dbrx, phi35_moe
from moejax import importers
from moejax.config import ConfigError, ModelConfig
from moejax.importers import config_json, configs
from tests import importers_fakes
from tests.goldens import NAMES, golden, unpack
from tests.importers_fakes import assert_equal, decode
from tests.small import load

LATER = ("phimoe", "dbrx", "llama4_text")
CASES = [
    name if name.endswith("-base") else pytest.param(name, marks=pytest.mark.slow)
    for name in NAMES
    if name.startswith(LATER)
]
# As published, but for keys that say nothing of the model.
DBRX = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "d_model": 6144, "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0.01, "moe_loss_weight": 0.05,
        "moe_num_experts": 16, "moe_top_k": 4,
    },
    "initializer_range": 0.02, "max_seq_len": 32768, "model_type": "dbrx", "n_heads": 48, "n_layers": 40,
    "output_router_logits": False, "resid_pdrop": 0.0, "router_aux_loss_coef": 0.05, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 100352,
}  # fmt: skip
PHI = {
    "architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_dropout": 0.0, "hidden_size": 4096, "input_jitter_noise": 0.01, "intermediate_size": 6400,
    "lm_head_bias": True, "max_position_embeddings": 131072, "model_type": "phimoe", "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16,
    "original_max_position_embeddings": 4096, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": list(phi35_moe.LONG), "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096,
        "short_factor": list(phi35_moe.SHORT), "short_mscale": 1.243163121016122, "type": "longrope",
    },
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
SCOUT = {
    "architectures": ["Llama4ForCausalLM"], "attention_bias": False, "attention_chunk_size": 8192,
    "attention_dropout": 0.0, "attn_scale": 0.1, "attn_temperature_tuning": True, "floor_scale": 8192,
    "for_llm_compressor": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760, "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40,
    "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16,
    "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True, "vocab_size": 202048,
}  # fmt: skip
PUBLISHED = {"dbrx": DBRX, "phi35_moe": PHI, "llama4_scout": SCOUT}


def read(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return configs.read_config({**raw, **changes}, Path("config.json"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_is_the_preset(name: str) -> None:
    preset, there = load(f"configs.models.{name}", "full").model, read(PUBLISHED[name])
    assert config_json.canonical(there) == config_json.canonical(preset)
    raw = config_json.write_config(there, None, None)
    assert raw["model_type"] == PUBLISHED[name]["model_type"]
    assert read(raw) == dataclasses.replace(there, compute_dtype="bfloat16")


@pytest.mark.parametrize("name", CASES)
def test_import_after_export_is_equal(name: str, tmp_path: Path) -> None:
    """And every tensor goes out under the name, and with the bits, that it came in with."""
    source = unpack(name, tmp_path / "source")
    model = importers.load(source, dtype="float32")
    assert importers.write(model, model.config, tmp_path / "out", source=source) == golden(name).facts["family"]
    again = importers.load(tmp_path / "out", dtype="float32")
    assert_equal(again, model)
    assert again.config == model.config
    given, written = decode(source / "model.safetensors"), decode(tmp_path / "out" / "model.safetensors")
    assert given.keys() == written.keys()
    for tensor, value in given.items():
        np.testing.assert_array_equal(written[tensor], value.astype(np.float32), err_msg=tensor)
    raws = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")]
    there, out = (raw.get("max_position_embeddings", raw.get("max_seq_len")) for raw in raws)
    assert out == there == 128


def test_every_family_has_a_published_config() -> None:
    older = {raw["model_type"] for raw in importers_fakes.PUBLISHED.values()}
    assert older.isdisjoint(LATER) and older.union(LATER) == configs.READERS.keys() == config_json.ARCHITECTURES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_counts(name: str) -> None:
    raw = PUBLISHED[name]
    for changes, message in (
        ({"a_new_setting": 3}, f"known for {raw['model_type']}: a_new_setting=3"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' .*'silu'"),
        ({"vocab_size": "many"}, "vocab_size='many': expected a whole number"),
        ({"architectures": ["Llama4ForConditionalGeneration"]}, "only language models"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(raw, **changes)
    with pytest.raises(ConfigError, match="has no vocab_size: the model needs it"):
        read({key: value for key, value in raw.items() if key != "vocab_size"})


def nested(group: str, **changes: Any) -> dict[str, Any]:
    return {group: {**DBRX[group], **changes}}


REFUSED = {
    "two experts": (PHI, {"num_experts_per_tok": 3}, "num_experts_per_tok=3 .*SparseMixer-v2 chooses two"),
    "no margin": (PHI, {"router_jitter_noise": 0.0}, "router_jitter_noise=0.0 .*must be above 0"),
    "a window": (PHI, {"sliding_window": 2048}, "sliding_window=2048 .*4 and 5 differ"),
    "two lengths": (PHI, {"original_max_position_embeddings": 8192}, "original_max_position_embeddings=8192"),
    "no scale": (PHI, {"rope_scaling": {**PHI["rope_scaling"], "long_mscale": None}}, "has no long_mscale"),
    "no factors": (PHI, {"rope_scaling": {**PHI["rope_scaling"], "long_factor": 2.0}}, "long_factor=2.0 .*a list"),
    "another scaling": (PHI, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*longrope alone"),
    "another key": (PHI, {"qk_norm": True}, "keys are not known for phimoe: qk_norm=True"),
    "tied": (DBRX, {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "two thetas": (DBRX, {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta=500000.0, and transformers 5 takes"),
    "no bound": (DBRX, nested("attn_config", clip_qkv=None), "attn_config: clip_qkv=None .*transformers 5 fails"),
    "a bound of 0": (DBRX, nested("attn_config", clip_qkv=0), "attn_config: clip_qkv=0 .*must be above 0"),
    "two groups": (DBRX, {"num_key_value_heads": 4}, "num_key_value_heads=4 .*kv_n_heads=8"),
    "norm of weights": (DBRX, nested("ffn_config", moe_normalize_expert_weights=2.0), "moe_normalize_expert_weights=2"),
    "activation": (DBRX, nested("ffn_config", ffn_act_fn={"name": "gelu"}), "ffn_act_fn=.*only silu"),
    "turns": (DBRX, nested("ffn_config", uniform_expert_assignment=True), "uniform_expert_assignment=True"),
    "a nested key": (DBRX, nested("attn_config", attn_type="flash"), r"attn_config: 1 keys are not known .*attn_type"),
    "odd heads": (DBRX, {"n_heads": 7}, "d_model=6144 is not a multiple of n_heads=7"),
    "compressor": (SCOUT, {"for_llm_compressor": True}, "for_llm_compressor=True"),
    "no chunk": (SCOUT, {"attention_chunk_size": None}, "attention_chunk_size=None .*in chunks"),
    "kinds": (SCOUT, {"layer_types": ["sliding_attention"] * 48}, "layer_types=.*chunked_attention"),
    "rope of few": (SCOUT, {"no_rope_layers": [1, 0]}, "no_rope_layers=.*each of the 48 layers"),
    "with images": (SCOUT, {"model_type": "llama4"}, "model_type='llama4' is not supported: .*llama4_text"),
    "longrope of others": (SCOUT, {"rope_scaling": PHI["rope_scaling"]}, "type='longrope' is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(name: str) -> None:
    raw, changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        read(raw, **changes)


def test_keys_that_say_a_model() -> None:
    assert read(DBRX, **nested("ffn_config", moe_normalize_expert_weights=None)).moe.router.renormalise is False
    assert read(DBRX).attention.clip_qkv == dbrx.MODEL["attention.clip_qkv"]
    plain = read(SCOUT, attn_temperature_tuning=False, use_qk_norm=False, no_rope_layer_interval=1)
    assert plain.attention.temperature == 0 and not plain.attention.qk_unit_norm
    assert plain.attention.no_rope_layers == tuple(range(48)) and plain.attention.window == 0
    # transformers 4 makes masks of both kinds, whatever the layers
    assert config_json.write_config(plain, "llama4_text", None)["attention_chunk_size"] == 8192
    mixed = read(SCOUT, interleave_moe_layer_step=2)
    assert mixed.moe.every == 2 and mixed.ffn_dim == 16384
    assert read(SCOUT, moe_layers=[0, 5]).moe.dense_layers == tuple(i for i in range(48) if i not in (0, 5))


def test_what_a_family_cannot_say_is_not_exported() -> None:
    """Grok-1 has no family: capped scores and sandwich norms are in none."""
    grok = load("configs.models.grok_1", "full").model
    with pytest.raises(ConfigError, match=r"no supported family can .*another one"):
        config_json.write_config(dataclasses.replace(grok, scale_embeddings=False), None, None)
