"""config.json of DBRX, PhiMoE and Llama 4 (text) to :class:`ModelConfig` and back, as ``configs.py`` and
``config_json.py`` do for the other families."""

from typing import Any

from moejax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, RouterConfig
from moejax.importers.keys import Keys
from moejax.importers.rope import read_rope
from moejax.model import moe_layer_ids

TORCH_LAYER_NORM_EPS = 1e-5
"""Of DBRX's norms, which set none."""


def _whole(k: Keys, hidden: str, heads: str) -> tuple[int, int, int]:
    """Hidden size, heads, and the dimensions of a head, which these families derive from them."""
    size, number = k.get(hidden, int), k.get(heads, int)
    if number < 1 or size % number:
        raise ConfigError(f"{k.path}: {hidden}={size} is not a multiple of {heads}={number}")
    return size, number, size // number


def clip(k: Keys) -> float:
    """``clip_qkv``; 0 where there is none."""
    bound = k.get("clip_qkv", float, None)
    if bound is not None and not bound > 0:
        raise k.refuse("clip_qkv", "it must be above 0; for no clipping write null")
    return bound or 0.0


def dbrx(k: Keys) -> ModelConfig:
    """The two nested groups hold what other families write beside each other; what they hold is read as strictly."""
    parts = {}
    for name in ("attn_config", "ffn_config"):
        parts[name] = Keys(k.get(name, dict), k.path / name)
    a, f = parts["attn_config"], parts["ffn_config"]
    k.only("tie_word_embeddings", (False,), "tied embeddings, which DBRX refuses")
    dim, heads, width = _whole(k, "d_model", "n_heads")
    theta = a.get("rope_theta", float, 1e4)
    if "rope_theta" in k and k.get("rope_theta", float) != theta:
        raise k.refuse("rope_theta", f"attn_config says {theta}")
    base, rope = read_rope(k, theta)
    if base != theta:
        raise k.refuse("rope_parameters", f"attn_config says rope_theta={theta}, and transformers 5 takes this one")
    if f.get("hidden_size", int, dim) != dim:
        raise f.refuse("hidden_size", f"the model's is d_model={dim}")
    activation = f.get("ffn_act_fn", dict, None) or {"name": "silu"}
    if activation != {"name": "silu"}:
        raise f.refuse("ffn_act_fn", "only silu is; another would need an activation in moejax/experts.py")
    power, chosen = f.get("moe_normalize_expert_weights", float, None), f.get("moe_top_k", int)
    if "moe_normalize_expert_weights" not in f:
        power = 1.0  # null is none, and without the key it is 1
    if power not in (None, 1.0) or (power and chosen == 1):
        raise f.refuse("moe_normalize_expert_weights", "1 (the weights' sum) or null, and null for one expert")
    f.only("uniform_expert_assignment", (False,), "experts that are chosen in turn, for speed tests")
    groups = a.get("kv_n_heads", int)
    if k.get("num_key_value_heads", int, groups) != groups:
        raise k.refuse("num_key_value_heads", f"attn_config says kv_n_heads={groups}")
    bound = clip(a)
    if not bound:
        raise a.refuse("clip_qkv", "transformers 5 fails without a bound; for no clipping write one beyond reach")
    attention = AttentionConfig(
        num_heads=heads, num_kv_heads=groups, head_dim=width, rope_theta=theta, rope=rope, clip_qkv=bound
    )
    moe = MoEConfig(
        num_experts=f.get("moe_num_experts", int),
        expert_dim=f.get("ffn_hidden_size", int),
        router=RouterConfig(name="topk_of_softmax", k=chosen, renormalise=power == 1.0),
        losses=(),
    )
    for keys, names in ((k, ("emb_pdrop", "resid_pdrop")), (a, ("attn_pdrop",)),
                        (f, ("moe_jitter_eps", "moe_loss_weight"))):  # fmt: skip
        for name in names:
            keys.get(name, float, 0.0)  # of training
    for group in parts.values():
        group.done("dbrx")
    return ModelConfig(
        vocab_size=k.get("vocab_size", int), num_layers=k.get("n_layers", int), dim=dim, ffn_dim=moe.expert_dim,
        tie_embeddings=False, scale_embeddings=False, norm="layer", norm_eps=TORCH_LAYER_NORM_EPS,
        attention=attention, moe=moe,
    )  # fmt: skip


def write_dbrx(c: ModelConfig, context: int) -> dict[str, Any]:
    """The whole file: its keys are others than those of all other families."""
    a, r = c.attention, c.moe.router
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "vocab_size": c.vocab_size,
        "d_model": c.dim,
        "n_heads": a.num_heads,
        "n_layers": c.num_layers,
        "max_seq_len": context,
        "tie_word_embeddings": c.tie_embeddings,
        "use_cache": True,
        "attn_config": {
            "attn_pdrop": 0.0,
            "clip_qkv": a.clip_qkv or None,
            "kv_n_heads": a.num_kv_heads,
            "rope_theta": a.rope_theta,
        },
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": c.moe.expert_dim,
            "moe_num_experts": c.moe.num_experts,
            "moe_top_k": r.k,
            "moe_normalize_expert_weights": 1.0 if r.k > 1 and r.renormalise else None,
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_theta},  # which transformers 5 reads
    }


def phimoe(k: Keys) -> ModelConfig:
    """Phi-3.5-MoE. Its ``router_jitter_noise`` acts in evaluation too: which experts are near enough to the best."""
    dim, heads, width = _whole(k, "hidden_size", "num_attention_heads")
    if k.get("head_dim", int, width) != width:
        raise k.refuse("head_dim", f"this family's is hidden_size / num_attention_heads = {width}")
    k.only("num_experts_per_tok", (2,), "another router: SparseMixer-v2 chooses two")
    margin = k.get("router_jitter_noise", float, 0.01)
    if margin <= 0:
        raise k.refuse("router_jitter_noise", "it must be above 0: it says which experts are near enough to the best")
    k.get("input_jitter_noise", float, 0.0)  # of training
    window, length = k.get("sliding_window", int, None), k.get("max_position_embeddings", int, None)
    if window == 0:
        raise k.refuse("sliding_window", "a window of no token; for no window write null")
    if window is not None and length is not None and window >= length:
        window = None  # as it is published: wider than any text
    if window is not None:
        raise k.refuse("sliding_window", "transformers 4 and 5 differ where it is below max_position_embeddings")
    base, rope = read_rope(k, 1e6, longrope=True)
    if rope.scaling not in ("none", "longrope"):
        name = "rope_parameters" if k.raw.get("rope_parameters") else "rope_scaling"
        raise k.refuse(name, "of this family transformers takes longrope alone, with short_mscale and long_mscale")
    bias = k.get("attention_bias", bool, False)
    length = k.get("original_max_position_embeddings", int, rope.original_length)
    if rope.scaling == "longrope" and length != rope.original_length:
        raise k.refuse("original_max_position_embeddings", f"the scaling says {rope.original_length}")
    attention = AttentionConfig(
        num_heads=heads, num_kv_heads=k.get("num_key_value_heads", int), head_dim=width, rope_theta=base, rope=rope,
        bias=bias, output_bias=bias,
    )  # fmt: skip
    moe = MoEConfig(
        num_experts=k.get("num_local_experts num_experts", int),
        expert_dim=k.get("intermediate_size", int),
        router=RouterConfig(name="sparsemixer", k=2, mask_margin=margin),
        losses=(),
    )
    return ModelConfig(
        vocab_size=k.get("vocab_size", int), num_layers=k.get("num_hidden_layers", int), dim=dim,
        ffn_dim=moe.expert_dim, tie_embeddings=k.get("tie_word_embeddings", bool, False), scale_embeddings=False,
        norm="layer_bias", norm_eps=k.get("rms_norm_eps", float), logit_bias=k.get("lm_head_bias", bool, False),
        attention=attention, moe=moe,
    )  # fmt: skip


def write_phimoe(c: ModelConfig) -> dict[str, Any]:
    return {
        "num_local_experts": c.moe.num_experts,
        "intermediate_size": c.moe.expert_dim,
        "num_experts_per_tok": c.moe.router.k,
        "router_jitter_noise": c.moe.router.mask_margin,
        "input_jitter_noise": 0.0,
        "attention_bias": c.attention.bias,
        "lm_head_bias": c.logit_bias,
        "sliding_window": None,
    }


def llama4_text(k: Keys) -> ModelConfig:
    """Llama 4's language model by itself (``Llama4ForCausalLM``)."""
    layers, heads = k.get("num_hidden_layers", int), k.get("num_attention_heads", int)
    width = k.get("head_dim", int, None) or _whole(k, "hidden_size", "num_attention_heads")[2]
    k.only("for_llm_compressor", (False,), "experts as lists of modules")
    still = _still_layers(k, layers)
    chunks = _chunks(k, layers, still)
    tuned = k.get("attn_temperature_tuning", bool, True)
    scale, floor = k.get("attn_scale", float, 0.1), k.get("floor_scale", int, 8192)
    temperature = {"temperature": scale, "temperature_length": floor} if tuned and still and scale else {}
    base, rope = read_rope(k, 5e5, "interleaved")
    bias = k.get("attention_bias", bool, False)
    attention = AttentionConfig(
        num_heads=heads, num_kv_heads=k.get("num_key_value_heads", int), head_dim=width, rope_theta=base, rope=rope,
        bias=bias, output_bias=bias, qk_unit_norm=k.get("use_qk_norm", bool, True), no_rope_layers=still, **chunks,
        **temperature,
    )  # fmt: skip
    step = k.get("interleave_moe_layer_step", int, 1)
    if step < 1:
        raise k.refuse("interleave_moe_layer_step", "it must be 1 or more")
    regular = list(range(step - 1, layers, step))
    sparse = k.get("moe_layers", list, None)
    sparse = regular if sparse is None else sparse
    dense = () if sparse == regular else tuple(i for i in range(layers) if i not in sparse)
    moe = MoEConfig(
        num_experts=k.get("num_local_experts", int),
        expert_dim=k.get("intermediate_size", int),
        router=RouterConfig(name="topk_of_sigmoid", k=k.get("num_experts_per_tok", int), renormalise=False),
        losses=(),
        weigh="input",
        shared_experts=1,
        every=step if sparse == regular else 1,
        dense_layers=dense,
    )
    return ModelConfig(
        vocab_size=k.get("vocab_size", int), num_layers=layers, dim=k.get("hidden_size", int),
        ffn_dim=k.get("intermediate_size_mlp", int), tie_embeddings=k.get("tie_word_embeddings", bool, False),
        scale_embeddings=False, norm_eps=k.get("rms_norm_eps", float), attention=attention, moe=moe,
    )  # fmt: skip


def _still_layers(k: Keys, layers: int) -> tuple[int, ...]:
    """Layers without rotary positions: ``no_rope_layers`` has a 1 for those that have them."""
    every, listed = k.get("no_rope_layer_interval", int, 4), k.get("no_rope_layers", list, None)
    if not listed:
        if every < 1:
            raise k.refuse("no_rope_layer_interval", "it must be 1 or more")
        return tuple(i for i in range(layers) if (i + 1) % every == 0)
    if len(listed) < layers or any(flag not in (0, 1) for flag in listed):
        raise k.refuse("no_rope_layers", f"expected 0 or 1 for each of the {layers} layers")
    return tuple(i for i in range(layers) if not listed[i])


def _chunks(k: Keys, layers: int, still: tuple[int, ...]) -> dict[str, Any]:
    size, kinds = k.get("attention_chunk_size", int, 8192), k.get("layer_types", list, None)
    if k.raw.get("attention_chunk_size", 0) is None:
        size = None
    if kinds is None:
        kinds = ["full_attention" if i in still else "chunked_attention" for i in range(layers)]
    if len(kinds) != layers or any(kind not in ("full_attention", "chunked_attention") for kind in kinds):
        raise k.refuse("layer_types", f"expected full_attention or chunked_attention for each of the {layers} layers")
    chunked = tuple(i for i, kind in enumerate(kinds) if kind == "chunked_attention")
    if not chunked:
        return {}
    if not size or size < 1:
        raise k.refuse("attention_chunk_size", "some layers attend in chunks, so it must be 1 or more")
    return {"window": size, "window_kind": "chunks", "window_layers": () if len(chunked) == layers else chunked}


def write_llama4_text(c: ModelConfig) -> dict[str, Any]:
    a = c.attention
    chunked = [bool(a.window) and (not a.window_layers or i in a.window_layers) for i in range(c.num_layers)]
    return {
        "num_local_experts": c.moe.num_experts,
        "intermediate_size": c.moe.expert_dim,
        "intermediate_size_mlp": c.ffn_dim or c.moe.expert_dim,
        "num_experts_per_tok": c.moe.router.k,
        "head_dim": a.head_dim,
        "attention_bias": a.bias,
        "use_qk_norm": a.qk_unit_norm,
        "no_rope_layers": [int(i not in a.no_rope_layers) for i in range(c.num_layers)],
        "attention_chunk_size": a.window or 8192,  # transformers 4 wants a size where no layer has chunks too
        "layer_types": ["chunked_attention" if flag else "full_attention" for flag in chunked],
        "attn_temperature_tuning": bool(a.temperature),
        "attn_scale": a.temperature,
        "floor_scale": a.temperature_length,
        "interleave_moe_layer_step": 1 if c.moe.first_dense or c.moe.dense_layers else c.moe.every,
        "moe_layers": moe_layer_ids(c),
    }


WRITERS = {"phimoe": write_phimoe, "llama4_text": write_llama4_text}
