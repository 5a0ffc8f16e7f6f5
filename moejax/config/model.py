"""The fields that describe a model: attention, router, experts, blocks."""

import dataclasses
from typing import Any, Literal

from moejax.types import Activation


def later(default: Any) -> Any:
    """A field added after results were published: at its default it is no part of :func:`config_hash`."""
    return dataclasses.field(default=default, metadata={"later": True})


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    name: str = "topk_of_softmax"
    """A name in the registry of ``moejax.routing``."""
    k: int = 2
    """Experts per token (for expert choice: average experts per token)."""
    renormalise: bool = True
    """Divide the chosen probabilities by their sum, where the family leaves the choice."""
    scale: float = 1.0
    """Routed scaling factor: multiplies every gate weight."""
    jitter: float = 0.0
    """Half width of the multiplicative input noise during training (Switch: 0.01)."""
    bias_update_rate: float = 0.001
    """Step of the selection bias after each optimizer step (auxiliary-loss-free balancing)."""
    noncausal: Literal["refuse", "allow"] = "refuse"
    """A router whose choice depends on later tokens needs "allow" in a causal decoder."""
    bias: bool = later(False)
    """A learned bias on the router's logits (gpt-oss). The selection bias of a family is another array."""
    groups: int = later(1)
    """Group-limited top-k: experts lie in ``groups`` groups of consecutive ids ..."""
    groups_kept: int = later(1)
    """... and a token chooses among the experts of its best ``groups_kept`` groups only (DeepSeek-V2 and V3)."""
    group_score: Literal["max", "top2_sum"] = later("max")
    """A group's score: its best expert (DeepSeek-V2), or the sum of its two best with their selection bias (V3)."""
    copies: int = later(1)
    """Experts whose ids are consecutive and that are the parts of one original (the complete transformation of
    DualSparse-MoE): the router's columns of one original start equal, and as long as they are, its parts are chosen
    together."""
    mask_margin: float = later(0.01)
    """SparseMixer: a logit further below the largest than twice this share of ``max(|logit|, largest)`` takes no part
    in the softmax (PhiMoE's ``router_jitter_noise``, which also acts in evaluation)."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    num_experts: int = 8
    expert_dim: int = 128
    """Hidden width F of one routed expert."""
    router: RouterConfig = RouterConfig()
    losses: tuple[tuple[str, float], ...] = (("balance", 0.01), ("z", 0.001))
    """Auxiliary losses by name in the registry of ``moejax.losses``, with their coefficients."""
    first_dense: int = 0
    """The first layers that have a dense FFN instead of experts."""
    every: int = 1
    """After those, one MoE layer in every ``every`` layers (the last of each group)."""
    shared_experts: int = 0
    """Experts that every token uses, fused into one FFN of width ``shared_experts * expert_dim``."""
    shared_gate: Literal["none", "sigmoid"] = "none"
    """"sigmoid": a learned gate per token scales the shared experts' output (Qwen)."""
    shared_dim: int = later(0)
    """Width of the shared experts' FFN where it is no multiple of ``expert_dim``. 0: ``shared_experts`` times that."""
    dense_layers: tuple[int, ...] = later(())
    """Further layers with a dense FFN, by index, beside ``first_dense`` and ``every`` (Qwen's ``mlp_only_layers``)."""
    expert_bias: bool = later(False)
    """Biases on the gate, up and down projections of each routed expert (gpt-oss)."""
    weigh: Literal["output", "input"] = later("output")
    """What the gate weight multiplies: an expert's output, or its input (Llama 4)."""
    zero_experts: int = later(0)
    """Zero-computation experts (LongCat): ids from ``num_experts`` on return their input; the router chooses among
    all."""
    parts: int = later(1)
    """Each routed expert is stored and dispatched as this many experts of width ``expert_dim / parts``, whose outputs
    add up to its own (the partial transformation of DualSparse-MoE, 2508.18376): the router knows ``num_experts``, EP
    may have ``num_experts * parts`` ranks."""
    part_order: Literal["expert", "part"] = later("expert")
    """How they are numbered, and so which rank holds which: "expert" puts the parts of an expert together (id
    ``e parts + p``); "part" puts part p of all experts together (id ``p num_experts + e``), so that the parts of an
    expert lie on different ranks, as in expert-tensor parallelism. Weights are stored in this order."""
    capacity_factor: float = 0.0
    """Limit of each expert's load as a multiple of the mean, also during training. 0: dropless."""
    capacity_order: Literal["score", "order", "reverse", "random"] = "score"
    capacity_limits: tuple[str, ...] = later(())
    """Any limits instead, by name with options (``docs/limits.md``), e.g. ("expanded_drop:factor=1.5,priority=topk",):
    applied in turn, also during training."""
    dispatcher: Literal["local", "dense", "ep"] = "local"
    """"ep": expert parallelism over the mesh axis "expert", tokens travel to their experts. "dense" computes every
    expert on every token: the slow reference."""
    ep_exchange: Literal["auto", "padded", "ragged", "chunked"] = later("auto")
    """How they travel (``docs/expert_parallelism.md``); "auto" picks by platform and is named in the run's facts."""
    ep_send: Literal["auto", "pairs", "tokens"] = later("auto")
    """A row for each pair, or each token once to each rank that has experts for it, which sums what they make of it:
    fewer rows, and partial sums of ranks that are rounded to the compute type. "auto": tokens where that spares a fifth
    of the rows or more."""
    ep_buffer_factor: float = later(0.0)
    """Rows reserved for each destination, as a multiple of its even share ``t k / ranks``. 0: the worst case, so that
    nothing is lost; above, what does not fit is counted as ``overflow``."""
    ep_chunks: int = later(2)
    """"chunked": pieces of tokens that are dispatched, computed and combined on their own."""
    virtual_ranks: int = later(1)
    """Ranks that the tokens and experts of each device are split into for router and limits: they decide as under
    expert parallelism of that degree, on one device."""
    implementation: str = "auto"
    """Back end of the grouped matmul (``kernels_pallas.grouped_matmul``); "auto" picks and is named in the run's
    facts."""

    @property
    def stored_experts(self) -> int:
        """Experts as they are stored and dispatched: E P."""
        return self.num_experts * self.parts

    @property
    def stored_dim(self) -> int:
        """Their hidden width, F / P."""
        return self.expert_dim // self.parts

    @property
    def parts_apart(self) -> bool:
        """Whether consecutive ids are parts of different experts, so that several ranks share each expert."""
        return self.parts > 1 and self.part_order == "part"


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding beyond ``attention.rope_theta``."""

    layout: Literal["halves", "interleaved"] = "halves"
    """What rotates together: dimension i with i + n/2 (Llama), or 2i with 2i + 1 (DeepSeek)."""
    fraction: float = 1.0
    """Leading share of the head's dimensions that rotate; the others carry no position."""
    scaling: Literal["none", "linear", "yarn", "llama3", "longrope"] = "none"
    factor: float = 1.0
    """Ratio of the extended context to the original one."""
    original_length: int = 0
    """Context of the pretraining, in tokens (yarn, llama3, longrope)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """YaRN (2309.00071): rotations over the original context above which a dimension keeps its frequency, and below
    which it is interpolated."""
    truncate: bool = True
    """YaRN: round the ends of the ramp between the two to whole dimensions (gpt-oss does not)."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    """YaRN as DeepSeek uses it: ``m(s) = 0.1 s ln(factor) + 1``; cos and sin are multiplied by
    ``m(mscale) / m(mscale_all_dim)``. 0 and 0: by ``m(1)``."""
    attention_factor: float = 0.0
    """Multiplies cos and sin instead of the above. 0: the above."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """llama3: frequencies of wavelengths above original_length / low are divided by ``factor``, those of wavelengths
    below original_length / high are kept."""
    short_factor: tuple[float, ...] = later(())
    long_factor: tuple[float, ...] = later(())
    """longrope: what each pair's frequency is divided by, where there are no more than ``original_length`` places and
    where there are more. Places are those of the batch's width, or of the cache: one choice for all that is cached."""
    short_mscale: float = later(1.0)
    long_mscale: float = later(1.0)
    """longrope: what multiplies cos and sin with either."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    qk_norm: bool = False
    bias: bool = False
    """Biases on the query, key and value projections (Qwen)."""
    rope_theta: float = 10_000.0
    kind: Literal["grouped", "latent"] = later("grouped")
    """"latent": multi-head latent attention (DeepSeek-V2); its cache holds a latent and one rotary key per token."""
    qk_norm_over: Literal["head", "projection"] = later("head")
    """What QK-norm takes its mean over: each head (Qwen3), or all heads of the projection together (OLMoE)."""
    output_bias: bool = later(False)
    sinks: bool = later(False)
    """A learned logit for each head that takes part in the softmax and has no value (gpt-oss)."""
    window: int = later(0)
    """Sliding window: a query sees the last ``window`` tokens, itself included. 0: all."""
    window_layers: tuple[int, ...] = later(())
    """Layers that have the window, by index. Empty: all."""
    window_kind: Literal["sliding", "chunks"] = later("sliding")
    """"chunks": positions are cut into chunks of ``window`` and a query sees its own chunk only, up to itself
    (Llama 4)."""
    no_rope_layers: tuple[int, ...] = later(())
    """Layers without rotary positions, by index (Llama 4)."""
    temperature: float = later(0.0)
    """Layers without rotary positions: the query at position p is multiplied by
    ``1 + temperature * ln(1 + floor((p + 1) / temperature_length))`` (2501.19399, as Llama 4 has it). 0: by 1."""
    temperature_length: int = later(8192)
    qk_unit_norm: bool = later(False)
    """RMS norm without a scale over each query and key head after rotation, in layers that rotate (Llama 4)."""
    clip_qkv: float = later(0.0)
    """Queries, keys and values are clipped to [-clip_qkv, clip_qkv] after bias and QK-norm, before rotation (DBRX,
    OLMoE). 0: not."""
    score_softcap: float = later(0.0)
    """Soft cap of the scaled scores, ``c * tanh(s / c)`` (Grok-1: 30). 0: none."""
    softmax_scale: float = later(0.0)
    """Multiplies the scores. 0: 1 / sqrt(query head's dimensions), for latent attention with YaRN's ``mscale_all_dim``
    times ``m(mscale_all_dim)^2``."""
    query_rank: int = later(0)
    """Latent: width of the compressed query. 0: queries are projected from the input."""
    latent_rank: int = later(0)
    """Latent: width of the compressed keys and values."""
    rope_head_dim: int = later(0)
    """Latent: dimensions of each query, and of the one key of all heads, that carry the position; ``head_dim`` are
    those without."""
    value_head_dim: int = later(0)
    """Latent: dimensions of a value head."""
    scale_latents: bool = later(False)
    """Latent: the normed query latent times sqrt(dim / query_rank), that of keys and values times
    sqrt(dim / latent_rank) (LongCat)."""
    rope: RopeConfig = later(RopeConfig())  # noqa: RUF009 (frozen)
    implementation: Literal["auto", "xla", "cudnn"] = "auto"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 256
    num_layers: int = 2
    dim: int = 128
    ffn_dim: int = 512
    """Hidden width of a dense FFN layer."""
    activation: Activation = "swiglu"
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    mtp_layers: int = later(0)
    """Multi-token-prediction modules (``moejax.mtp``): each predicts one token further than the one before it, with a
    block like the last layer. Of published weights they are read where this asks for them."""
    wiring: Literal["standard", "longcat"] = "standard"
    """Order of the MoE stages among attention and FFN (seam 6). "longcat": two attentions and two dense FFNs in each
    block, whose experts are routed after the first attention and added at the block's end."""
    tie_embeddings: bool = True
    scale_embeddings: bool = True
    """Multiply embeddings by sqrt(dim), so that tied embeddings enter the first block with unit variance."""
    norm_eps: float = 1e-6
    norm: Literal["rms", "layer", "layer_bias"] = later("rms")
    """Norms of the blocks and before the logits: RMS, or layer norms without (DBRX) and with a bias (PhiMoE). Those
    inside attention are RMS."""
    sandwich_norm: bool = later(False)
    """Further norms after attention and after the FFN, before each is added (Grok-1)."""
    logit_scale: float = later(1.0)
    """Multiplies the logits, before their bias and soft cap (Grok-1)."""
    logit_bias: bool = later(False)
    """A learned bias on the logits (PhiMoE)."""
    logit_softcap: float = 0.0
    """Soft cap of the logits, ``c * tanh(z / c)``. 0: none."""
    init_scale: float = 1.0
    """Multiplies the standard deviation 1/sqrt(fan-in) of every matrix at initialisation."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    layer_loop: Literal["scan", "unroll"] = "scan"
    """"unroll" compiles slower and lets a debugger see each layer."""
    remat: Literal["none", "block", "dots"] = "none"
    """Rematerialisation: nothing, whole blocks, or all but matmul outputs."""
