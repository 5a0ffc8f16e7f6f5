"""ModelConfig to the config.json of a family that can express it.

Each family writes its keys and the result is read back: a model that does not come through is refused, with the fields
that differ. So whatever is written here means to transformers what it means to us.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moejax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, RopeConfig, RouterConfig, to_dict
from moejax.importers import later_families
from moejax.importers.configs import read_config
from moejax.importers.rope import write_rope
from moejax.importers.tables import shared_width
from moejax.model import moe_layer_ids
from moejax.routing import FAMILIES

ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "longcat_flash": "LongcatFlashForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "dbrx": "DbrxForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
}
"""Families in the order in which they are tried."""


def write_config(config: ModelConfig, family: str | None, context: int | None) -> dict[str, Any]:
    """config.json of ``family``, or of the first that can express the model, without its ``dtype``.

    Args:
      context: longest context (``max_position_embeddings``); None: what the rope scaling reaches, or 4,096.

    Raises:
      ConfigError: no family, or not that one, computes what this model computes.
    """
    if family is not None and family not in ARCHITECTURES:
        raise ConfigError(f"family={family!r} is not supported: choose one of {', '.join(ARCHITECTURES)}")
    refusals: dict[str, list[str]] = {}
    for name in [family] if family else ARCHITECTURES:
        raw = _written(config, name, context)
        refusals[name] = _differences(config, raw)
        if not refusals[name]:
            return raw
    closest = min(refusals, key=lambda name: len(refusals[name]))
    who = f"{family} cannot" if family else f"no supported family can (the closest is {closest})"
    raise ConfigError(
        f"{who} express this model; there it would be another one: {'; '.join(refusals[closest][:6])} (here, there). "
        "Export writes what other programs compute the same way, or nothing: change those fields, or keep the model in "
        "our format"
    )


def _differences(config: ModelConfig, raw: dict[str, Any]) -> list[str]:
    try:
        there = read_config(json.loads(json.dumps(raw)), Path("config.json"), raw.get("num_nextn_predict_layers", 0))
    except ConfigError as error:
        return [str(error)]
    return _unequal(to_dict(canonical(config)), to_dict(canonical(there)), "model")


def _unequal(one: Any, two: Any, path: str) -> list[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        return [line for name in one for line in _unequal(one[name], two[name], f"{path}.{name}")]
    return [] if one == two else [f"{path}={one!r}, {two!r}"]


def canonical(config: ModelConfig) -> ModelConfig:
    """The same model with every field that changes no logit at one value, and one way of saying each thing.

    What loses pairs stays, with what it depends on: a capacity, buffers of expert parallelism.
    """
    plain = ModelConfig()
    return dataclasses.replace(
        config,
        attention=_canonical_attention(config.attention, config.num_layers),
        moe=_canonical_moe(config),
        ffn_dim=config.ffn_dim if has_dense(config) else 0,
        **{n: getattr(plain, n) for n in ("init_scale", "compute_dtype", "layer_loop", "remat")},
    )


def differing(there: ModelConfig, here: ModelConfig) -> list[tuple[str, Any, Any]]:
    """``(name, value there, value here)`` of each field that makes one config another function than the other."""
    if canonical(there) == canonical(here):
        return []
    fields = list(_fields(there, here))
    # A field counts if it alone makes another model of either; where only several together do, all of them.
    alone = [
        (path, one, two)
        for path, one, two in fields
        if canonical(_with(here, path, one)) != canonical(here)
        or canonical(_with(there, path, two)) != canonical(there)
    ]
    return [(".".join(path), one, two) for path, one, two in alone or fields]


def _fields(there: Any, here: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """``(path, value there, value here)`` of the fields that differ."""
    for field in dataclasses.fields(here):
        one, two, at = getattr(there, field.name), getattr(here, field.name), (*path, field.name)
        if dataclasses.is_dataclass(two):
            yield from _fields(one, two, at)
        elif one != two:
            yield at, one, two


def _with(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """``config`` with ``value`` at ``path``."""
    name, *rest = path
    return dataclasses.replace(config, **{name: _with(getattr(config, name), tuple(rest), value) if rest else value})


def has_dense(config: ModelConfig) -> bool:
    return config.wiring == "longcat" or len(moe_layer_ids(config)) < config.num_layers


def _canonical_attention(a: AttentionConfig, layers: int) -> AttentionConfig:
    everywhere = set(a.window_layers) >= set(range(layers))
    changes: dict[str, Any] = {"implementation": "auto", "rope": _canonical_rope(a.rope)}
    if not a.window or everywhere:
        changes["window_layers"] = ()
    if not a.window:
        changes["window_kind"] = "sliding"
    if not a.qk_norm:
        changes["qk_norm_over"] = "head"
    if a.kind == "latent":
        changes["num_kv_heads"] = a.num_heads
    else:
        changes |= {"query_rank": 0, "latent_rank": 0, "rope_head_dim": 0, "value_head_dim": 0, "scale_latents": False}
    return dataclasses.replace(a, **changes)


def _canonical_rope(r: RopeConfig) -> RopeConfig:
    used = {
        "none": (),
        "linear": ("factor",),
        "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "factor", "original_length", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
            "attention_factor",
        ),
        "longrope": ("original_length", "short_factor", "long_factor", "short_mscale", "long_mscale"),
    }[r.scaling]  # fmt: skip
    kept = ("layout", "fraction", "scaling", *used)
    return RopeConfig(**{name: getattr(r, name) for name in kept})


def _canonical_moe(config: ModelConfig) -> MoEConfig:
    plain, moe = MoEConfig(), config.moe
    width, sparse = shared_width(config), set(moe_layer_ids(config))
    free = ["dispatcher", "implementation", "ep_exchange", "ep_send", "ep_chunks"]
    if not moe.capacity_factor:
        free.append("capacity_order")
    if (
        not moe.capacity_factor
        and not moe.capacity_limits
        and moe.router.name in FAMILIES
        and FAMILIES[moe.router.name].causal
    ):
        free.append("virtual_ranks")  # each token for itself: no matter beside which others
    if moe.dispatcher != "ep":
        free.append("ep_buffer_factor")
    return dataclasses.replace(
        moe,
        router=_canonical_router(moe.router),
        losses=(),
        first_dense=0,
        every=1,
        dense_layers=tuple(i for i in range(config.num_layers) if i not in sparse),
        shared_experts=min(width, 1),
        shared_dim=width,
        shared_gate=moe.shared_gate if width else "none",
        **{n: getattr(plain, n) for n in free},
    )


def _canonical_router(r: RouterConfig) -> RouterConfig:
    plain = RouterConfig()
    changes: dict[str, Any] = {n: getattr(plain, n) for n in ("jitter", "bias_update_rate", "noncausal")}
    if r.groups == 1:
        changes |= {"groups_kept": 1, "group_score": "max"}
    if r.groups == 1 or r.group_score == "max":
        changes["copies"] = 1  # experts like others
    if r.name in ("sparsemixer", "switch"):  # which have no such choice
        changes["renormalise"] = False
    if r.name == "switch":
        changes |= {"name": "topk_of_softmax", "renormalise": False}
    elif r.name == "topk_of_softmax" and r.renormalise and r.k > 1 and r.groups == 1:
        changes |= {"name": "softmax_of_topk", "renormalise": True}  # equal in exact arithmetic
    elif r.name == "softmax_of_topk":
        changes["renormalise"] = True
    elif r.k == 1:
        changes["renormalise"] = False  # no family does with one expert
    return dataclasses.replace(r, **changes)


# --- families -------------------------------------------------------------------------------------------------------


def _written(c: ModelConfig, family: str, context: int | None) -> dict[str, Any]:
    a, rope = c.attention, c.attention.rope
    if family == "dbrx":
        return later_families.write_dbrx(c, context or 4096)
    reach = round(rope.factor * rope.original_length) if rope.scaling in ("yarn", "llama3") else 0
    raw = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "hidden_act": "silu",
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_heads if a.kind == "latent" else a.num_kv_heads,
        "max_position_embeddings": context or reach or 4096,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        **write_rope(a.rope_theta, rope),
    }
    return raw | WRITERS[family](c)


def _experts(c: ModelConfig, number: str, width: str) -> dict[str, Any]:
    return {number: c.moe.num_experts, width: c.moe.expert_dim, "num_experts_per_tok": c.moe.router.k}


def _mixtral(c: ModelConfig) -> dict[str, Any]:
    window = c.attention.window or None
    return {
        **_experts(c, "num_local_experts", "intermediate_size"),
        "head_dim": c.attention.head_dim,
        "sliding_window": window,
    }


def _olmoe(c: ModelConfig) -> dict[str, Any]:
    return {
        **_experts(c, "num_experts", "intermediate_size"),
        "attention_bias": c.attention.bias,
        "clip_qkv": c.attention.clip_qkv or None,
        "norm_topk_prob": _renormalises(c),
    }


def _renormalises(c: ModelConfig) -> bool:
    return c.moe.router.k > 1 and (c.moe.router.renormalise or c.moe.router.name == "softmax_of_topk")


def _qwen(c: ModelConfig) -> dict[str, Any]:
    every = 1 if c.moe.first_dense else c.moe.every  # the same words where there are some: the same stacks when read
    sparse = set(moe_layer_ids(c))
    return {
        **_experts(c, "num_experts", "moe_intermediate_size"),
        "intermediate_size": c.ffn_dim,
        "norm_topk_prob": _renormalises(c),
        "decoder_sparse_step": every,
        "mlp_only_layers": [i for i in range(every - 1, c.num_layers, every) if i not in sparse],
        "use_sliding_window": bool(c.attention.window),
        "sliding_window": c.attention.window or None,
    }


def _qwen3_moe(c: ModelConfig) -> dict[str, Any]:
    return {**_qwen(c), "head_dim": c.attention.head_dim, "attention_bias": c.attention.bias}


def _qwen2_moe(c: ModelConfig) -> dict[str, Any]:
    return {
        **_qwen(c),
        "qkv_bias": c.attention.bias,
        "shared_expert_intermediate_size": shared_width(c),
        **({"layer_types": _layer_types(c)} if c.attention.window else {}),
    }


def _layer_types(c: ModelConfig) -> list[str]:
    a = c.attention
    slides = [bool(a.window) and (not a.window_layers or i in a.window_layers) for i in range(c.num_layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _latent(c: ModelConfig) -> dict[str, Any]:
    a = c.attention
    return {
        "q_lora_rank": a.query_rank or None,
        "kv_lora_rank": a.latent_rank,
        "qk_nope_head_dim": a.head_dim,
        "qk_rope_head_dim": a.rope_head_dim,
        "v_head_dim": a.value_head_dim,
        "attention_bias": a.bias,
        "routed_scaling_factor": c.moe.router.scale,
    }


def _deepseek(c: ModelConfig) -> dict[str, Any]:
    sparse = moe_layer_ids(c)
    return {
        **_latent(c),
        **_experts(c, "n_routed_experts", "moe_intermediate_size"),
        "intermediate_size": c.ffn_dim,
        "n_shared_experts": shared_width(c) // c.moe.expert_dim,
        "first_k_dense_replace": min(sparse, default=c.num_layers),
        "n_group": c.moe.router.groups,
        "topk_group": c.moe.router.groups_kept,
    }


def _deepseek_v2(c: ModelConfig) -> dict[str, Any]:
    limited = c.moe.router.groups > 1
    return {
        **_deepseek(c),
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "norm_topk_prob": False,
        "mlp_bias": False,
    }


def _deepseek_v3(c: ModelConfig) -> dict[str, Any]:
    return {
        **_deepseek(c),
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": c.moe.router.renormalise and c.moe.router.k > 1,
        "rope_interleave": c.attention.rope.layout == "interleaved",
        "num_nextn_predict_layers": c.mtp_layers,
    }


def _gpt_oss(c: ModelConfig) -> dict[str, Any]:
    a = c.attention
    scaling = write_rope(a.rope_theta, a.rope)["rope_scaling"] or {"rope_type": "default"}  # null means its own
    return {
        **_experts(c, "num_local_experts", "intermediate_size"),
        "head_dim": a.head_dim,
        "attention_bias": a.bias,
        "sliding_window": a.window or None,
        "layer_types": _layer_types(c),
        "rope_scaling": scaling,
    }


def _longcat_flash(c: ModelConfig) -> dict[str, Any]:
    return {
        **_latent(c),
        "num_layers": c.num_layers,
        "num_hidden_layers": 2 * c.num_layers,
        "head_dim": c.attention.rope_head_dim,
        "ffn_hidden_size": c.ffn_dim,
        "n_routed_experts": c.moe.num_experts,
        "expert_ffn_hidden_size": c.moe.expert_dim,
        "moe_topk": c.moe.router.k,
        "zero_expert_num": c.moe.zero_experts,
        "zero_expert_type": "identity",
        "router_bias": False,
    }


WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "longcat_flash": _longcat_flash,
    **later_families.WRITERS,
}
