"""config.json of every family to ModelConfig and back: both dialects, strictly."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moejax.config import ConfigError, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from moejax.importers import config_json, configs, keys
from moejax.validate import check_model
from tests.importers_fakes import PUBLISHED, SMALL, of_family, published

FAMILIES = list(dict.fromkeys(raw["model_type"] for raw in PUBLISHED.values()))
"""The others: tests/test_importers_later.py."""
NOT_KEPT = ("rope_scaling", "max_position_embeddings", "sliding_window", "num_nextn_predict_layers")
"""Keys that are written in other words, or that say nothing in the published file."""


def read(raw: dict[str, Any]) -> ModelConfig:
    return configs.read_config(raw, Path("config.json"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_written(name: str) -> None:
    config = read(PUBLISHED[name])
    check_model(config)
    assert config.compute_dtype == "bfloat16" and not config.scale_embeddings and config.moe.losses == ()
    written = config_json.write_config(config, None, None)
    assert written["model_type"] == PUBLISHED[name]["model_type"]
    assert read(written) == config
    for key, value in PUBLISHED[name].items():
        if key in written and key not in NOT_KEPT:
            assert written[key] == value, key


def test_mixtral() -> None:
    config = read(published("Mixtral-8x7B-v0.1", sliding_window=4096))
    assert (config.dim, config.num_layers, config.vocab_size, config.norm_eps) == (4096, 32, 32000, 1e-5)
    attention = config.attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.window) == (32, 8, 128, 4096)
    assert attention.rope_theta == 1e6
    assert (config.moe.num_experts, config.moe.expert_dim) == (8, 14336)
    assert config.moe.router == RouterConfig(name="softmax_of_topk", k=2)


def test_olmoe() -> None:
    config = read(published("OLMoE-1B-7B-0924", norm_topk_prob=True, attention_bias=True))
    assert config.attention.qk_norm and config.attention.qk_norm_over == "projection"
    assert config.attention.bias and config.attention.output_bias
    assert config.moe.router == RouterConfig(name="topk_of_softmax", k=8, renormalise=True)
    assert not read(published("OLMoE-1B-7B-0924")).moe.router.renormalise
    clipped = read(published("OLMoE-1B-7B-0924", clip_qkv=8))
    assert clipped.attention.clip_qkv == 8.0 and config_json.write_config(clipped, "olmoe", None)["clip_qkv"] == 8.0


def test_qwen2_moe() -> None:
    moe = read(published("Qwen1.5-MoE-A2.7B", mlp_only_layers=[3, 2], decoder_sparse_step=2)).moe
    assert (moe.every, moe.dense_layers) == (2, (3,))  # layer 2 is dense anyway
    assert (moe.shared_experts, moe.shared_dim, moe.shared_gate) == (4, 0, "sigmoid")
    assert read(published("Qwen1.5-MoE-A2.7B", shared_expert_intermediate_size=1500)).moe.shared_dim == 1500
    attention = read(published("Qwen1.5-MoE-A2.7B")).attention
    assert attention.bias and not attention.output_bias and attention.window == 0
    assert not read(published("Qwen1.5-MoE-A2.7B", qkv_bias=False)).attention.bias
    sliding = {"use_sliding_window": True, "layer_types": ["full_attention"] * 20 + ["sliding_attention"] * 4}
    attention = read(published("Qwen1.5-MoE-A2.7B", **sliding)).attention
    assert (attention.window, attention.window_layers) == (32768, (20, 21, 22, 23))


def test_qwen3_moe() -> None:
    attention = read(published("Qwen3-30B-A3B")).attention
    assert attention.qk_norm and attention.qk_norm_over == "head" and attention.window == 0
    assert (attention.head_dim, attention.num_kv_heads) == (128, 4)
    slides = read(published("Qwen3-30B-A3B", use_sliding_window=True, sliding_window=64)).attention
    assert (slides.window, slides.window_layers) == (64, ())


def test_deepseek_v2() -> None:
    config = read(published("DeepSeek-V2-Lite"))
    attention = config.attention
    assert (attention.kind, attention.query_rank, attention.latent_rank) == ("latent", 0, 512)
    assert (attention.head_dim, attention.rope_head_dim, attention.value_head_dim) == (128, 64, 128)
    assert attention.rope == RopeConfig(
        layout="interleaved", scaling="yarn", factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707
    )
    assert config.moe.router == RouterConfig(name="topk_of_softmax", k=6, renormalise=False)
    assert (config.moe.first_dense, config.moe.shared_experts, config.ffn_dim) == (1, 2, 10944)
    limited = published("DeepSeek-V2-Lite", topk_method="group_limited_greedy", n_group=8, topk_group=3)
    router = read(limited | {"routed_scaling_factor": 16.0}).moe.router
    assert (router.groups, router.groups_kept, router.group_score, router.scale) == (8, 3, "max", 16.0)


def test_deepseek_v3() -> None:
    config = read(published("DeepSeek-V3"))
    assert config.moe.router == RouterConfig(
        name="sigmoid_bias", k=8, renormalise=True, scale=2.5, groups=8, groups_kept=4, group_score="top2_sum"
    )
    assert (config.attention.query_rank, config.attention.rope.layout) == (1536, "interleaved")
    assert read(published("DeepSeek-V3", rope_interleave=False)).attention.rope.layout == "halves"


def test_gpt_oss() -> None:
    config = read(published("gpt-oss-20b"))
    attention = config.attention
    assert attention.sinks and attention.bias and attention.output_bias and config.moe.expert_bias
    assert (attention.window, attention.window_layers) == (128, tuple(range(0, 24, 2)))
    assert not attention.rope.truncate and attention.rope.factor == 32.0
    assert config.activation == "swiglu_clamped"
    assert config.moe.router == RouterConfig(name="softmax_of_topk", k=4, bias=True)
    bare = published("gpt-oss-20b", rope_scaling=..., layer_types=...)  # both have the family's own default
    assert read(bare) == config


def test_longcat_flash() -> None:
    config = read(published("LongCat-Flash-Chat"))
    assert (config.wiring, config.num_layers, config.ffn_dim) == ("longcat", 28, 12288)
    assert config.attention.scale_latents and (config.moe.num_experts, config.moe.zero_experts) == (512, 256)
    assert config.moe.router == RouterConfig(name="softmax_bias", k=12, renormalise=False, scale=6.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_keys_of_transformers_5(name: str) -> None:
    """rope_parameters instead of rope_theta and rope_scaling, other names for the number of experts, dtype."""
    old = PUBLISHED[name]
    scaling = {("rope_type" if key == "type" else key): value for key, value in (old.get("rope_scaling") or {}).items()}
    new = published(
        name,
        rope_theta=...,
        rope_scaling=...,
        rope_parameters={"rope_type": "default", **scaling, "rope_theta": old["rope_theta"]},
        torch_dtype=...,
        dtype="bfloat16",
    )
    if "num_experts" in new:
        new["num_local_experts"] = new.pop("num_experts")
    assert read(new) == read(old)
    assert read(new | {"rope_theta": old["rope_theta"]}) == read(old)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_without_effect_is_known(family: str) -> None:
    reasons = keys.WITHOUT_EFFECT
    assert all(reasons) and sum(map(len, reasons.values())) == len(keys.HARMLESS)  # none twice, each with a reason
    raw = of_family(family)
    extra = {name: 7 for name in keys.HARMLESS if name not in ("architectures", "model_type", "quantization_config")}
    if raw.get("rope_scaling") is None:
        assert read({**extra, **raw}) == read(raw)
    else:
        assert read({**raw, "temperature": 0.5, "router_jitter_noise": 0.1, "num_mtp_layers": 2}) == read(raw)


REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *((family, {"hidden_act": "gelu"}, ("hidden_act='gelu'", "'silu'")) for family in FAMILIES),
    *((family, {"a_new_setting": 3}, ("a_new_setting=3", family)) for family in FAMILIES),
    *((family, {"vocab_size": ...}, ("no vocab_size",)) for family in FAMILIES),
    *((family, {"rms_norm_eps": "small"}, ("rms_norm_eps='small'", "expected a number")) for family in FAMILIES),
    *((family, {"is_encoder_decoder": True}, ("is_encoder_decoder=True",)) for family in FAMILIES),
    *((family, {"hidden_size": True}, ("hidden_size=True", "whole number")) for family in FAMILIES),
    ("mixtral", {"model_type": "llama"}, ("model_type='llama'", "mixtral", "gpt_oss")),
    ("mixtral", {"model_type": None}, ("model_type=None",)),
    ("mixtral", {"architectures": ["MixtralForSequenceClassification"]}, ("architectures=", "ForCausalLM")),
    ("mixtral", {"num_experts": 9}, ("num_local_experts=8", "num_experts=9", "one setting")),
    ("mixtral", {"num_key_value_heads": ...}, ("no num_key_value_heads",)),
    ("mixtral", {"hidden_size": 4097}, ("hidden_size=4097", "not a multiple")),
    ("olmoe", {"clip_qkv": 0.0}, ("clip_qkv=0.0", "above 0", "null")),
    ("olmoe", {"head_dim": 64}, ("head_dim=64", "128")),
    ("olmoe", {"norm_topk_prob": True, "num_experts_per_tok": 1}, ("num_experts_per_tok=1",)),
    ("qwen2_moe", {"use_sliding_window": True}, ("use_sliding_window=True", "layer_types")),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 24}, ("layer_types=",)),
    ("qwen2_moe", {"layer_types": ["full_attention"] * 3}, ("layer_types=", "24 layers")),
    ("qwen2_moe", {"decoder_sparse_step": 0}, ("decoder_sparse_step=0",)),
    ("qwen2_moe", {"mlp_only_layers": ["1"]}, ("mlp_only_layers=['1']",)),
    ("qwen3_moe", {"use_sliding_window": True}, ("use_sliding_window=True", "sliding_window gives no size")),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, ("topk_method='noaux_tc'", "group_limited_greedy")),
    ("deepseek_v2", {"norm_topk_prob": True}, ("norm_topk_prob=True", "transformers")),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, ("scoring_func='sigmoid'",)),
    ("deepseek_v2", {"mlp_bias": True}, ("mlp_bias=True",)),
    ("deepseek_v2", {"moe_layer_freq": 2}, ("moe_layer_freq=2",)),
    ("deepseek_v2", {"num_key_value_heads": 4}, ("num_key_value_heads=4", "16")),
    ("deepseek_v2", {"head_dim": 128}, ("head_dim=128", "qk_rope_head_dim=64")),
    ("deepseek_v3", {"topk_method": "greedy"}, ("topk_method='greedy'",)),
    ("deepseek_v3", {"scoring_func": "softmax"}, ("scoring_func='softmax'",)),
    ("deepseek_v3", {"qk_head_dim": 100}, ("qk_head_dim=100", "192")),
    ("deepseek_v3", {"num_experts_per_tok": 1}, ("num_experts_per_tok=1",)),
    ("gpt_oss", {"swiglu_limit": 10.0}, ("swiglu_limit=10.0", "7.0")),
    ("gpt_oss", {"experts_per_token": 3}, ("num_experts_per_tok=4", "experts_per_token=3")),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 24}, ("layer_types=",)),
    ("gpt_oss", {"sliding_window": None}, ("layer_types", "sliding_window gives no size")),
    ("gpt_oss", {"rope_scaling": None}, ("rope_scaling=None", '{"rope_type": "default"}')),
    ("longcat_flash", {"router_bias": True}, ("router_bias=True", "never adds it")),
    ("longcat_flash", {"zero_expert_type": "copy"}, ("zero_expert_type='copy'",)),
    ("longcat_flash", {"mla_scale_q_lora": False}, ("mla_scale_q_lora=False", "scale_latents")),
    ("longcat_flash", {"num_hidden_layers": 30}, ("num_hidden_layers=30", "56")),
    ("longcat_flash", {"q_lora_rank": None}, ("q_lora_rank=None",)),
    ("mixtral", {"sliding_window": 0}, ("sliding_window=0", "null")),
    ("deepseek_v3", {"norm_topk_prob": None}, ("norm_topk_prob=None", "false")),
    ("deepseek_v3", {"rope_interleave": None}, ("rope_interleave=None", "false")),
    ("olmoe", {"num_attention_heads": 0}, ("num_attention_heads=0",)),
    ("qwen2_moe", {"moe_intermediate_size": 0}, ("moe_intermediate_size=0",)),
    *(
        (
            family,
            {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_type": "default", "rope_theta": v}},
            (f"rope_parameters.rope_theta={v!r}", "expected a number"),
        )
        for family in FAMILIES
        for v in (None, "500", True)
    ),
]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name(
    family: str, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        read(of_family(family, **changes))
    for word in ("config.json", *words):
        assert word in str(error.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
ROPES: list[tuple[dict[str, Any], RopeConfig]] = [
    ({"rope_type": "default"}, RopeConfig()),
    ({"type": "linear", "factor": 2}, RopeConfig(scaling="linear", factor=2.0)),
    (YARN, RopeConfig(scaling="yarn", factor=4.0, original_length=1024)),
    ({**YARN, "original_max_position_embeddings": None}, RopeConfig(scaling="yarn", factor=4.0, original_length=32768)),
    ({**YARN, "mscale": 1.0}, RopeConfig(scaling="yarn", factor=4.0, original_length=1024)),
    (
        {**YARN, "attention_factor": 1.2, "truncate": False, "beta_fast": 16, "beta_slow": 2},
        RopeConfig(
            scaling="yarn", factor=4.0, original_length=1024, attention_factor=1.2, truncate=False, beta_fast=16.0,
            beta_slow=2.0,
        ),
    ),
    (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        RopeConfig(scaling="llama3", factor=8.0, original_length=8192),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "expected"), ROPES)
def test_rope_scalings(scaling: dict[str, Any], expected: RopeConfig) -> None:
    config = read(of_family("mixtral", rope_scaling=scaling))
    assert config.attention.rope == expected
    assert read(config_json.write_config(config, "mixtral", 32768)) == config
    for_each = {"sliding_attention": {**scaling, "rope_theta": 5e5}, "full_attention": {**scaling, "rope_theta": 5e5}}
    nested = read(of_family("mixtral", rope_theta=..., rope_parameters=for_each)).attention
    assert (nested.rope, nested.rope_theta) == (expected, 5e5)


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type='longrope'"),
        ({"rope_type": "dynamic", "factor": 2.0}, "linear, yarn, llama3"),
        ({"rope_type": "linear"}, "has no factor"),
        ({"rope_type": "linear", "factor": "two"}, "factor='two'"),
        ({**YARN, "factor": float("inf")}, "factor=inf: expected a number"),
        ({**YARN, "original_max_position_embeddings": float("nan")}, "original_max_position_embeddings=nan"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "type='yarn'"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "mscale"),
        ({**YARN, "mscale": 0.7}, "mscale=0.7"),
        ({**YARN, "mscale_all_dim": 1.0}, "mscale_all_dim=1.0"),
        ({**YARN, "finetuned": True}, "finetuned"),
        ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({**YARN, "rope_theta": 7.0}, "disagree"),
        ({"full_attention": YARN, "sliding_attention": {**YARN, "factor": 2.0}}, "positions of their own"),
    ],
)
def test_rope_scalings_that_are_refused(scaling: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match="rope_") as error:
        read(of_family("mixtral", rope_scaling=scaling))
    assert word in str(error.value)


def test_two_dialects_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="keep one of the two"):
        read(of_family("mixtral", rope_scaling=YARN, rope_parameters={**YARN, "factor": 2.0}))


@pytest.mark.parametrize("family", SMALL)
def test_small_models_come_back(family: str) -> None:
    config = read(SMALL[family])
    assert read(config_json.write_config(config, family, None)) == config
    assert config_json.write_config(config, None, None)["model_type"] == family


def changed(config: ModelConfig, path: str, value: Any) -> ModelConfig:
    name, _, rest = path.partition(".")
    if rest:
        value = changed(getattr(config, name), rest, value)  # ty: ignore[invalid-argument-type]
    return dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("family", "path", "value"),
    [
        ("mixtral", "logit_softcap", 30.0),
        ("mixtral", "moe.capacity_factor", 1.0),
        ("mixtral", "attention.rope.fraction", 0.5),
        ("mixtral", "attention.softmax_scale", 0.1),
        ("mixtral", "moe.router.scale", 2.0),
        ("mixtral", "moe.router.name", "noisy_topk"),
        ("mixtral", "moe.shared_experts", 1),
        ("mixtral", "activation", "geglu"),
        ("mixtral", "attention.sinks", True),
        ("olmoe", "attention.output_bias", True),
        ("olmoe", "moe.dense_layers", (0,)),
        ("qwen2_moe", "moe.shared_gate", "none"),
        ("deepseek_v2", "moe.dense_layers", (2,)),
        ("deepseek_v2", "moe.shared_dim", 8),
        ("deepseek_v3", "moe.router.group_score", "max"),
        ("gpt_oss", "moe.expert_bias", False),
        ("longcat_flash", "attention.scale_latents", False),
    ],
)
def test_models_that_no_family_has_are_not_written(family: str, path: str, value: Any) -> None:
    config = changed(read(SMALL[family]), path, value)
    with pytest.raises(ConfigError, match="cannot express this model") as error:
        config_json.write_config(config, family, None)
    assert f"model.{path}=" in str(error.value)
    with pytest.raises(ConfigError, match="no supported family can"):
        config_json.write_config(config, None, None)


def test_fields_that_change_no_logit_do_not_stop_an_export() -> None:
    config = read(SMALL["deepseek_v2"])
    other = dataclasses.replace(
        config,
        remat="block",
        layer_loop="unroll",
        compute_dtype="float32",
        moe=dataclasses.replace(
            config.moe,
            losses=(("balance", 0.1),),
            dispatcher="dense",
            first_dense=0,
            dense_layers=(0,),
            router=dataclasses.replace(config.moe.router, jitter=0.1),
        ),
    )
    assert config_json.write_config(other, None, None) == config_json.write_config(config, None, None)


def test_fields_of_expert_parallelism_change_no_logit_unless_pairs_are_lost() -> None:
    config = read(SMALL["mixtral"])
    plain = config_json.write_config(config, None, None)
    free = {"dispatcher": "ep", "ep_exchange": "chunked", "ep_send": "pairs", "ep_chunks": 3, "virtual_ranks": 2}
    assert config_json.write_config(changed_moe(config, **free), None, None) == plain
    assert config_json.write_config(changed_moe(config, ep_buffer_factor=1.5), None, None) == plain  # no buffers
    assert config_json.differing(changed_moe(config, **free), config) == []
    with pytest.raises(ConfigError, match=r"model\.moe\.ep_buffer_factor=1\.5, 0\.0"):
        config_json.write_config(changed_moe(config, dispatcher="ep", ep_buffer_factor=1.5), None, None)
    for limit in ({"capacity_factor": 1.0}, {"capacity_limits": ("token_drop:factor=1",)}):
        one = changed_moe(config, **limit)
        assert config_json.differing(one, changed_moe(one, virtual_ranks=2)) == [("moe.virtual_ranks", 1, 2)]


def changed_moe(config: ModelConfig, **fields: Any) -> ModelConfig:
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **fields))


def test_what_makes_one_config_another_function() -> None:
    there = read(SMALL["olmoe"])
    here = changed(changed(there, "moe.router.k", 1), "attention.rope_theta", 5e5)
    here = changed(changed(here, "activation", "geglu"), "moe.router.name", "softmax_of_topk")
    for path, value in {"remat": "block", "moe.losses": (("z", 1.0),), "attention.implementation": "xla"}.items():
        here = changed(here, path, value)
    assert sorted(config_json.differing(there, here)) == [
        ("activation", "swiglu", "geglu"),
        ("attention.rope_theta", 10000.0, 5e5),
        ("moe.router.k", 2, 1),
        ("moe.router.name", "topk_of_softmax", "softmax_of_topk"),
    ]
    assert config_json.differing(there, there) == []
    order = changed_moe(there, capacity_factor=1.0), changed_moe(there, capacity_factor=1.0, capacity_order="order")
    assert config_json.differing(*order) == [("moe.capacity_order", "score", "order")]
    # One choice in two words, of which each alone would be another: nothing to tell.
    switch = changed(changed(there, "moe.router.k", 1), "moe.router.name", "switch")
    assert config_json.differing(switch, changed(there, "moe.router.k", 1)) == []


def test_words_for_one_router() -> None:
    """Switch and top-1 without renormalisation are one model; so are softmax of the top k and renormalised top k."""
    base = MoEConfig(num_experts=4, expert_dim=6)

    def canonical(**router: Any) -> RouterConfig:
        moe = dataclasses.replace(base, router=RouterConfig(**router))
        return config_json.canonical(ModelConfig(moe=moe)).moe.router

    assert canonical(name="switch", k=1) == canonical(name="topk_of_softmax", k=1, renormalise=False)
    assert canonical(name="softmax_of_topk", k=2) == canonical(name="topk_of_softmax", k=2)
    assert canonical(name="softmax_of_topk", k=2) != canonical(name="topk_of_softmax", k=2, renormalise=False)
    assert canonical(name="sigmoid_bias", k=2) != canonical(name="sigmoid_bias", k=2, renormalise=False)
