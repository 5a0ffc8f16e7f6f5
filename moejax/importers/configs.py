"""config.json of each family to :class:`ModelConfig`; ``config_json.py`` is the way back.

What each key means was read from the models of transformers 4.57 and 5.17; a setting on which those and the original
code disagree is refused.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moejax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, RouterConfig
from moejax.importers import later_families
from moejax.importers.keys import MOST_EXPERTS, Keys
from moejax.importers.rope import note_length, read_rope
from moejax.model import moe_layer_ids

YARN_OF_GPT_OSS = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def read_config(raw: Mapping[str, Any], path: Path, mtp_layers: int = 0) -> ModelConfig:
    """The model that a config.json describes, with ``compute_dtype`` as the file's dtype and no auxiliary losses.

    Args:
      mtp_layers: multi-token-prediction modules that are wanted.

    Raises:
      ConfigError: an unknown model_type, a key or value that is not supported, or fewer modules than are wanted.
    """
    keys = Keys(raw, path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in READERS:
        raise ConfigError(f"{path}: model_type={family!r} is not supported: families are {', '.join(READERS)}")
    architectures = keys.get("architectures", list, None) or []
    if any(not str(name).endswith("ForCausalLM") for name in architectures):
        raise keys.refuse("architectures", "only language models (...ForCausalLM) are read")
    keys.only("hidden_act", ("silu", "swish"), "another activation in moejax/experts.py")
    made = READERS[family](keys)
    if made.num_layers * made.moe.num_experts > MOST_EXPERTS:
        raise ConfigError(
            f"{path}: {made.moe.num_experts:,} experts in each of {made.num_layers:,} layers are beyond any model that "
            f"can be read, at most {MOST_EXPERTS:,} in all"
        )
    note_length(keys, made.attention.rope)
    if mtp_layers:
        made = dataclasses.replace(made, mtp_layers=_modules(keys, family, made, mtp_layers))
    keys.done(family)
    dtype = str(raw.get("dtype", raw.get("torch_dtype"))).removeprefix("torch.")
    return dataclasses.replace(made, compute_dtype="float32" if dtype == "float32" else "bfloat16")


def published_modules(raw: Mapping[str, Any], path: Path) -> int:
    """How many multi-token-prediction modules that can be read a config.json says there are."""
    if raw.get("model_type") != "deepseek_v3":
        return 0
    return Keys(raw, path).get("num_nextn_predict_layers", int, 0)


def _modules(k: Keys, family: str, made: ModelConfig, wanted: int) -> int:
    published = published_modules(k.raw, k.path)
    if wanted <= published and (len(moe_layer_ids(made)) and moe_layer_ids(made)[-1] == made.num_layers - 1):
        return wanted
    if family == "longcat_flash":
        why = "the one of LongCat-Flash (model.mtp.*) has a dense block, which no module here has"
    elif family != "deepseek_v3":
        why = f"none of model_type={family!r} is known; those of deepseek_v3 are"
    elif wanted > published:
        why = f"num_nextn_predict_layers={published}, so it has {published or 'none'}"
    else:
        why = "its module has experts and its last layer has none, which no module here can"
    raise ConfigError(
        f"{k.path}: model.mtp_layers={wanted} multi-token-prediction modules were asked for, and {why}: set it to "
        f"{min(wanted, published) if wanted > published else 0}"
    )


def _model(k: Keys, *, layers: str = "num_hidden_layers", ffn: str = "intermediate_size", **fields: Any) -> ModelConfig:
    fields = {"activation": "swiglu", **fields}
    return ModelConfig(
        vocab_size=k.get("vocab_size", int),
        num_layers=k.get(layers, int),
        dim=k.get("hidden_size", int),
        ffn_dim=k.get(ffn, int),
        tie_embeddings=k.get("tie_word_embeddings", bool, False),
        scale_embeddings=False,
        norm_eps=k.get("rms_norm_eps", float),
        **fields,
    )


def _grouped(k: Keys, theta: float, *, head_dim: bool, rope: Any = None, **fields: Any) -> AttentionConfig:
    """``head_dim``: whether the family lets it differ from hidden size / heads."""
    heads = k.get("num_attention_heads", int)
    hidden = k.get("hidden_size", int)
    width = k.get("head_dim", int, None)
    if width is None or not head_dim:
        if heads < 1 or hidden % heads:
            raise ConfigError(f"{k.path}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        if width not in (None, hidden // heads):
            raise k.refuse("head_dim", f"this family's is hidden_size / num_attention_heads = {hidden // heads}")
        width = hidden // heads
    base, scaling = read_rope(k, theta, unset=rope)
    groups = k.get("num_key_value_heads", int, heads if k.raw.get("num_key_value_heads", 0) is None else _missing(k))
    return AttentionConfig(
        num_heads=heads, num_kv_heads=groups, head_dim=width, rope_theta=base, rope=scaling, **fields
    )


def _missing(k: Keys) -> int | None:
    """num_key_value_heads must be written, as its default differs from family to family; null means one for each."""
    if "num_key_value_heads" not in k:
        raise ConfigError(f"{k.path} has no num_key_value_heads: the model needs it")
    return None


def _one_weight(k: Keys, renormalised: bool, chosen: int) -> None:
    """Renormalised, the weight of a single expert is 1; our routers keep its probability, so that it has a gradient."""
    if renormalised and chosen == 1:
        raise k.refuse("num_experts_per_tok", "with norm_topk_prob its weight is always 1, which no router here gives")


def _placement(k: Keys) -> dict[str, Any]:
    """Which layers are MoE, as both Qwen families say it."""
    dense = k.get("mlp_only_layers", list, [])
    if any(type(i) is not int for i in dense):
        raise ConfigError(f"{k.path}: mlp_only_layers={dense!r}: expected layer numbers")
    layers = k.get("num_hidden_layers", int)
    every = k.get("decoder_sparse_step", int, 1)
    if every < 1:
        raise k.refuse("decoder_sparse_step", "it must be 1 or more")
    sparse = {i for i in range(layers) if i % every == every - 1}
    return {"every": every, "dense_layers": tuple(sorted(sparse & set(dense)))}


def _windows(k: Keys, kinds: list[Any] | None, window: int | None, layers: int) -> dict[str, Any]:
    """Fields of the attention for ``layer_types`` and the window of those that slide."""
    if kinds is None:
        return {"window": window or 0}
    if len(kinds) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise k.refuse("layer_types", f"expected full_attention or sliding_attention for each of the {layers} layers")
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if sliding and not window:
        raise k.refuse("layer_types", "some layers slide and sliding_window gives no size")
    if not sliding:
        return {}
    return {"window": window, "window_layers": () if len(sliding) == layers else sliding}


# --- readers --------------------------------------------------------------------------------------------------------


def _mixtral(k: Keys) -> ModelConfig:
    window = k.get("sliding_window", int, None)
    if window == 0:
        raise k.refuse("sliding_window", "a window of no token; for no window write null")
    attention = _grouped(k, 1e6, head_dim=True, window=window or 0)
    moe = MoEConfig(
        num_experts=k.get("num_local_experts num_experts", int),
        expert_dim=k.get("intermediate_size", int),
        router=RouterConfig(name="softmax_of_topk", k=k.get("num_experts_per_tok", int)),
        losses=(),
    )
    return _model(k, attention=attention, moe=moe)


def _olmoe(k: Keys) -> ModelConfig:
    k.only("sliding_window", (None,), "windows, which published OLMoE models do not have")
    bias = k.get("attention_bias", bool, False)
    attention = _grouped(
        k, 1e4, head_dim=False, qk_norm=True, qk_norm_over="projection", bias=bias, output_bias=bias,
        clip_qkv=later_families.clip(k),
    )  # fmt: skip
    moe = MoEConfig(
        num_experts=k.get("num_experts num_local_experts", int),
        expert_dim=k.get("intermediate_size", int),
        router=_top_k(k),
        losses=(),
    )
    return _model(k, attention=attention, moe=moe)


def _top_k(k: Keys) -> RouterConfig:
    renormalise, chosen = k.get("norm_topk_prob", bool, False), k.get("num_experts_per_tok", int)
    _one_weight(k, renormalise, chosen)
    return RouterConfig(name="topk_of_softmax", k=chosen, renormalise=renormalise)


def _qwen2_moe(k: Keys) -> ModelConfig:
    layers, sliding = k.get("num_hidden_layers", int), k.get("use_sliding_window", bool, False)
    kinds, window = k.get("layer_types", list, None), k.get("sliding_window", int, None)
    k.get("max_window_layers", int, None)  # with no window, or with layer_types, it says nothing
    if sliding and kinds is None:
        raise k.refuse(
            "use_sliding_window", "which layers slide differs between versions of transformers (max_window_layers): "
            "write layer_types"
        )  # fmt: skip
    attention = _grouped(
        k, 1e4, head_dim=False, bias=k.get("qkv_bias", bool, True),
        **(_windows(k, kinds, window if sliding else None, layers) if kinds else {}),
    )  # fmt: skip
    expert, width = k.get("moe_intermediate_size", int), k.get("shared_expert_intermediate_size", int)
    if width < 1:
        raise k.refuse("shared_expert_intermediate_size", "this family has a shared expert")
    if expert < 1:
        raise k.refuse("moe_intermediate_size", "it must be 1 or more")
    whole = width % expert == 0
    moe = MoEConfig(
        num_experts=k.get("num_experts num_local_experts", int),
        expert_dim=expert,
        router=_top_k(k),
        losses=(),
        shared_experts=width // expert if whole else 1,
        shared_dim=0 if whole else width,
        shared_gate="sigmoid",
        **_placement(k),
    )
    return _model(k, attention=attention, moe=moe)


def _qwen3_moe(k: Keys) -> ModelConfig:
    layers, sliding = k.get("num_hidden_layers", int), k.get("use_sliding_window", bool, False)
    window, bias = k.get("sliding_window", int, None), k.get("attention_bias", bool, False)
    k.get("max_window_layers", int, None)  # no version reads it in this family
    kinds = k.get("layer_types", list, None)
    if sliding and not window:
        raise k.refuse("use_sliding_window", "sliding_window gives no size")
    windows = _windows(k, kinds, window if sliding else None, layers)
    if kinds is not None and sliding and windows != {"window": window, "window_layers": ()}:
        raise k.refuse("layer_types", "in this family every layer slides or none")
    attention = _grouped(k, 1e4, head_dim=True, qk_norm=True, bias=bias, output_bias=bias, **windows)
    moe = MoEConfig(
        num_experts=k.get("num_experts num_local_experts", int),
        expert_dim=k.get("moe_intermediate_size", int),
        router=_top_k(k),
        losses=(),
        **_placement(k),
    )
    return _model(k, attention=attention, moe=moe)


def _latent(k: Keys, theta: float, *, interleaved: bool = True, **fields: Any) -> AttentionConfig:
    heads, rotary = k.get("num_attention_heads", int), k.get("qk_rope_head_dim", int)
    plain = k.get("qk_nope_head_dim", int)
    if (groups := k.get("num_key_value_heads", int, heads)) != heads:
        raise k.refuse("num_key_value_heads", f"latent attention has as many as heads, {heads}, not {groups}")
    if k.get("head_dim", int, rotary) != rotary:
        raise k.refuse("head_dim", f"in this family it is qk_rope_head_dim={rotary}")
    if k.get("qk_head_dim", int, plain + rotary) != plain + rotary:
        raise k.refuse("qk_head_dim", f"it must be qk_nope_head_dim + qk_rope_head_dim = {plain + rotary}")
    base, scaling = read_rope(k, theta, "interleaved" if interleaved else "halves")
    bias = k.get("attention_bias", bool, False)
    return AttentionConfig(
        kind="latent", num_heads=heads, num_kv_heads=heads, head_dim=plain, rope_head_dim=rotary,
        value_head_dim=k.get("v_head_dim", int), query_rank=k.get("q_lora_rank", int, 0) or 0,
        latent_rank=k.get("kv_lora_rank", int), bias=bias, output_bias=bias, rope_theta=base, rope=scaling, **fields,
    )  # fmt: skip


def _deepseek_moe(k: Keys, router: RouterConfig) -> MoEConfig:
    k.only("moe_layer_freq", (1,), "the placement in moejax.model.layer_groups as DeepSeek counts it")
    return MoEConfig(
        num_experts=k.get("n_routed_experts num_experts num_local_experts", int),
        expert_dim=k.get("moe_intermediate_size", int),
        router=router,
        losses=(),
        first_dense=k.get("first_k_dense_replace", int, 0),
        shared_experts=k.get("n_shared_experts", int, 0),
    )


def _deepseek_v2(k: Keys) -> ModelConfig:
    k.only("mlp_bias", (False,), "biases in dense FFNs")
    k.only("scoring_func", ("softmax",), "another router")
    k.only(
        "norm_topk_prob", (False, None),
        "a decision: transformers reads it and never renormalises, DeepSeek's code does and then does not scale",
    )  # fmt: skip
    method = k.get("topk_method", str, "greedy")
    groups, kept = k.get("n_group", int, 1), k.get("topk_group", int, 1)
    limited: dict[str, Any] = {}
    if method == "group_limited_greedy":
        limited = {"groups": groups, "groups_kept": kept, "group_score": "max"}
    elif method != "greedy":
        raise k.refuse("topk_method", "greedy and group_limited_greedy are; another would need a router family")
    router = RouterConfig(
        name="topk_of_softmax", k=k.get("num_experts_per_tok", int), renormalise=False,
        scale=k.get("routed_scaling_factor", float, 1.0), **limited,
    )  # fmt: skip
    return _model(k, attention=_latent(k, 1e4), moe=_deepseek_moe(k, router))


def _deepseek_v3(k: Keys) -> ModelConfig:
    k.only("topk_method", ("noaux_tc",), "another router")
    k.only("scoring_func", ("sigmoid",), "another router")
    renormalise, chosen = k.get("norm_topk_prob", bool, True), k.get("num_experts_per_tok", int)
    _one_weight(k, renormalise, chosen)
    router = RouterConfig(
        name="sigmoid_bias", k=chosen, renormalise=renormalise, scale=k.get("routed_scaling_factor", float),
        groups=k.get("n_group", int), groups_kept=k.get("topk_group", int), group_score="top2_sum",
    )  # fmt: skip
    attention = _latent(k, 1e4, interleaved=k.get("rope_interleave", bool, True))
    return _model(k, attention=attention, moe=_deepseek_moe(k, router))


def _gpt_oss(k: Keys) -> ModelConfig:
    layers = k.get("num_hidden_layers", int)
    default = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    windows = _windows(k, k.get("layer_types", list, default), k.get("sliding_window", int, None), layers)
    k.only("swiglu_limit", (7.0, 7), "another limit of the activation 'swiglu_clamped'")
    bias = k.get("attention_bias", bool, True)
    attention = _grouped(
        k, 150_000.0, head_dim=True, rope=YARN_OF_GPT_OSS, bias=bias, output_bias=bias, sinks=True, **windows
    )
    chosen = k.get("num_experts_per_tok experts_per_token", int)
    moe = MoEConfig(
        num_experts=k.get("num_local_experts num_experts", int),
        expert_dim=k.get("intermediate_size", int),
        router=RouterConfig(name="softmax_of_topk", k=chosen, bias=True),
        losses=(),
        expert_bias=True,
    )
    return _model(k, attention=attention, moe=moe, activation="swiglu_clamped")


def _longcat_flash(k: Keys) -> ModelConfig:
    k.only("attention_method", ("MLA",), "another attention")
    k.only("zero_expert_type", ("identity",), "another kind of zero-computation expert")
    k.only("router_bias", (False,), "a decision: transformers makes this bias and never adds it")
    k.only("norm_topk_prob", (False,), "a decision: no version of the model renormalises")
    for name in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        k.only(name, (True,), "one of the two scales without the other (attention.scale_latents sets both)")
    layers = k.get("num_layers", int)
    if (double := k.get("num_hidden_layers", int, 2 * layers)) not in (layers, 2 * layers):
        raise k.refuse("num_hidden_layers", f"each of num_layers={layers} blocks has two, {2 * layers}, not {double}")
    if not k.get("q_lora_rank", int, 0):
        raise k.refuse("q_lora_rank", "this family compresses queries")
    router = RouterConfig(
        name="softmax_bias", k=k.get("moe_topk num_experts_per_tok", int), renormalise=False,
        scale=k.get("routed_scaling_factor", float),
    )  # fmt: skip
    moe = MoEConfig(
        num_experts=k.get("n_routed_experts num_local_experts num_experts", int),
        expert_dim=k.get("expert_ffn_hidden_size moe_intermediate_size", int),
        router=router,
        losses=(),
        zero_experts=k.get("zero_expert_num", int, 0),
    )
    return _model(
        k, layers="num_layers", ffn="ffn_hidden_size intermediate_size",
        attention=_latent(k, 1e7, scale_latents=True), moe=moe, wiring="longcat",
    )  # fmt: skip


READERS: dict[str, Callable[[Keys], ModelConfig]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "longcat_flash": _longcat_flash,
    "phimoe": later_families.phimoe,
    "dbrx": later_families.dbrx,
    "llama4_text": later_families.llama4_text,
}
