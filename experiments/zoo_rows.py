"""The rows of the model zoo (``experiments.zoo``): published counts, and for models that cannot run here their parts.

A model that runs is a preset under ``configs/models``; its row holds what was published and nothing of its sizes.
A model that does not is :class:`Parts`, added up from its published sizes, with a word on what is missing here.

Sizes of rows without a config.json are those of Table 2 of the survey (2407.06204), where they are not said to be from
elsewhere; the survey leaves vocabularies out, and where its counts are slips the row says so.
"""

import dataclasses
from collections.abc import Mapping

from moejax.count import ffn_parameters


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a count is further off the published one than its rounding and 1 %.

    A reason is checked against the count, in one of five ways (:func:`holds`); one that states none of them says what
    is known of a difference that is not explained.
    """

    text: str
    without: tuple[str, ...] = ()
    """Parts that the published figure leaves out: without them the count is within."""
    between: str = ""
    """A part with which the count is above the figure, and without which it is below."""
    alone: str = ""
    """A part that is larger than the published figure by itself."""
    truncated: bool = False
    """The last published digit was cut, not rounded."""
    missing: int = 0
    """Parameters that the published figure holds and the count does not: with them it is within."""


LOOKUP = Reason("without the input embedding, a lookup", without=("input embedding",))
TRUNCATED = Reason("truncated, not rounded", truncated=True)
LOOKUP_CUT = Reason(
    "without the input embedding, a lookup, and truncated", without=("input embedding",), truncated=True
)
BETWEEN = Reason(
    "above it with the input embedding, below it without; what the figure holds is not said", between="input embedding"
)
ALONE = Reason("the routed experts alone, of the sizes that the paper gives, are more", alone="routed experts")
NO_EXTRA = Reason("without the dense FFN beside each MoE layer", without=("FFN beside MoE layers",))
DENSE_EQUAL = Reason("the published figure is the dense model of equal FLOPs")


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model's parameters by part, ``(total, used for one token)``, and what its figures need besides."""

    parts: Mapping[str, tuple[float, float]]
    vectors: int
    """Norm scales and biases among them: no matmul."""
    lookup: int
    """Of an input embedding that is no output matrix."""
    one_place: int
    """FLOPs of scores and values of all layers for one place that a token sees. 0: FLOPs are not counted."""
    cache_bytes: int
    """Of one token in bfloat16. 0: not counted."""

    @property
    def total(self) -> int:
        return round(sum(total for total, _ in self.parts.values()))

    @property
    def active(self) -> int:
        return round(sum(active for _, active in self.parts.values()))

    def flops(self, seq_len: int) -> float | None:
        places = (seq_len + 1) / 2
        matmul = 2.0 * (self.active - self.lookup - self.vectors)
        return matmul + self.one_place * places if self.one_place else None


@dataclasses.dataclass(frozen=True)
class Row:
    id: str
    """Name of the preset, or of a row like it."""
    name: str
    total: str
    """As published: ``46.7B``. Empty: not published."""
    active: str
    source: str
    """Of the published counts."""
    off: Mapping[str, Reason] = dataclasses.field(default_factory=dict)
    """Reasons by figure, ``total`` or ``active``."""
    parts: Parts | None = None
    """None: the preset of that name is counted."""
    router: str = ""
    why: str = ""
    """What is missing here to run it."""
    note: str = ""


def plain(
    *, vocab: int, dim: int, layers: int, heads: int, head_dim: int, kv_heads: int = 0, embeddings: int = 2,
    moe_layers: int, experts: float, k: float, expert_dim: int, expert_kind: str = "swiglu",
    dense_layers: int = 0, ffn: int = 0, ffn_kind: str = "swiglu", shared: int = 0, cross: int = 0,
    vectors: int = 0, causal: bool = True, **others: int,
) -> Parts:  # fmt: skip
    """A transformer's parts.

    Args:
      layers: attention layers, in an encoder-decoder of both; ``cross`` decoder layers have a second attention.
      experts: of one MoE layer, or their mean where layers differ; the router is one matrix.
      shared: width of what every token uses beside the experts of an MoE layer, of the experts' kind.
      vectors: norm scales and biases beside one scale of ``dim`` for each attention, each FFN and the end.
      causal: a decoder alone, whose FLOPs and cache are those of one token.
      others: further parts, used by every token.
    """
    groups = kv_heads or heads
    one = ffn_parameters(dim, expert_dim, expert_kind)
    attention = 2.0 * dim * head_dim * (heads + groups) * (layers + cross)
    scales = dim * (2 * layers + cross + 1) + vectors
    table = vocab * dim
    dense = dense_layers * ffn_parameters(dim, ffn, ffn_kind)
    alongside = moe_layers * ffn_parameters(dim, shared, expert_kind)
    router = moe_layers * dim * experts
    always = {
        "input embedding": table,
        "output embedding": table * (embeddings - 1),
        "attention": attention,
        "dense FFN": dense,
        "shared experts": alongside,
        "router": router,
        "norms and biases": scales,
        **{name.replace("_", " "): size for name, size in others.items()},
    }
    parts = {name: (float(size), float(size)) for name, size in always.items() if size}
    parts["routed experts"] = (moe_layers * experts * one, moe_layers * k * one)
    one_place = layers * 4 * heads * head_dim if causal else 0
    return Parts(parts, scales, table * (embeddings - 1), one_place, layers * groups * head_dim * 4 if causal else 0)


def gshard(layers: int, experts: int) -> Parts:
    half = layers // 2
    return plain(vocab=64_000, dim=1024, layers=layers, heads=16, head_dim=128, embeddings=1, moe_layers=half,
                 experts=experts, k=2, expert_dim=8192, expert_kind="relu", dense_layers=half, ffn=8192,
                 ffn_kind="relu", cross=half, causal=False)  # fmt: skip


def t5(dim: int, ffn: int, layers: int, heads: int, head_dim: int, experts: int, k: int, every: int, *,
       kind: str = "geglu", extra: bool = False) -> Parts:  # fmt: skip
    """An encoder and a decoder of ``layers`` each; ``extra``: a dense FFN beside each MoE layer too (ST-MoE)."""
    moe = 2 * (layers // every)
    beside = {"FFN_beside_MoE_layers": moe * ffn_parameters(dim, ffn, kind)} if extra else {}
    return plain(vocab=32_128, dim=dim, layers=2 * layers, heads=heads, head_dim=head_dim, embeddings=1,
                 moe_layers=moe, experts=experts, k=k, expert_dim=ffn, expert_kind=kind, dense_layers=2 * layers - moe,
                 ffn=ffn, ffn_kind=kind, cross=layers, causal=False, **beside)  # fmt: skip


def glam(dim: int, ffn: int, layers: int, heads: int, head_dim: int) -> Parts:
    """Dense layers are gated, experts are not (2112.06905, section 4)."""
    return plain(vocab=256_000, dim=dim, layers=layers, heads=heads, head_dim=head_dim, embeddings=1,
                 moe_layers=layers // 2, experts=64, k=2, expert_dim=ffn, expert_kind="gelu", dense_layers=layers // 2,
                 ffn=ffn, ffn_kind="geglu")  # fmt: skip


def deepspeed(dim: int, head_dim: int, experts: float, *, residual: bool = False) -> Parts:
    """24 layers like GPT-3's: biases on every matrix, layer norms, learned positions."""
    hidden = 4 * dim
    biases = 24 * (4 * dim + 2 * dim) + 12 * (hidden + dim) + dim  # attention and norms, dense FFNs, last norm
    one = hidden + dim
    made = plain(vocab=50_257, dim=dim, layers=24, heads=16, head_dim=head_dim, embeddings=1, moe_layers=12,
                 experts=experts, k=1, expert_dim=hidden, expert_kind="gelu", dense_layers=12, ffn=hidden,
                 ffn_kind="gelu", shared=hidden if residual else 0, vectors=biases, positions=2048 * dim)  # fmt: skip
    total, active = made.parts["routed experts"]
    biased = {**made.parts, "routed experts": (total + 12 * experts * one, active + 12 * one)}
    return dataclasses.replace(made, parts=biased, vectors=made.vectors + 12 * one)


def llama_moe(experts: int, k: int) -> Parts:
    """LLaMA-2-7B, its FFN cut into experts."""
    return plain(vocab=32_000, dim=4096, layers=32, heads=32, head_dim=128, moe_layers=32, experts=experts, k=k,
                 expert_dim=11_008 // experts, gate_network=32 * experts * experts)  # fmt: skip


def openmoe(dim: int, ffn: int, layers: int, heads: int, head_dim: int, experts: int, every: int) -> Parts:
    moe = layers // every
    return plain(vocab=256_384, dim=dim, layers=layers, heads=heads, head_dim=head_dim, embeddings=1, moe_layers=moe,
                 experts=experts, k=2, expert_dim=ffn, shared=ffn, dense_layers=layers - moe, ffn=ffn)  # fmt: skip


def jamba() -> Parts:
    """28 Mamba layers (state 16, convolution 4, inner width 8192, step rank 256) and 4 of attention."""
    inner, rank, state = 8192, 256, 16
    mamba = 4096 * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * 4096
    small = inner * (4 + 1) + inner + inner * state + inner + rank + 2 * state
    made = plain(vocab=65_536, dim=4096, layers=4, heads=32, kv_heads=8, head_dim=128, moe_layers=16, experts=16, k=2,
                 expert_dim=14_336, dense_layers=16, ffn=14_336, vectors=28 * (small + 2 * 4096),
                 Mamba=28 * mamba)  # fmt: skip
    return dataclasses.replace(made, one_place=0)  # the scan's operations are not counted


def scout_vision() -> int:
    """Parameters of Llama-4-Scout's vision encoder (config.json's ``vision_config``), which no text token uses."""
    layer = 4 * (1408 * 1408 + 1408) + 2 * 1408 * 5632 + 5632 + 1408 + 4 * 1408
    return 34 * layer + 3 * 14 * 14 * 1408 + (576 + 1) * 1408 + 5632 * 4096 + 4096 * 4096 + 4096 * 5120


VISION = Reason("the language model alone; the vision encoder (0.9 B) is not built here", missing=scout_vision())
GSHARD = "top-2 of softmax, the second drawn at random; capacity; balance loss"
SWITCH = "top-1 of softmax, as is; capacity 1.25; balance loss; jitter"
STMOE = "top-2 of softmax, renormalised; capacity; balance and z losses"
GLAM = "top-2 of softmax, the second drawn at random; capacity 2; balance loss"
PR = "top-1 of softmax, as is; capacity; balance loss"
LLAMA_MOE = "noisy top-k behind a two-layer gate, scaled by E/k"
OPENMOE = "top-2 of softmax, as is; capacity; balance and z losses"

T5 = "encoder-decoder: counted only"
GLAM_WHY = "a relative position bias in each layer, and experts that are not gated beside dense layers that are"
GPT = "layer norms, biases on dense matrices, learned positions"
OPEN_WHY = "a further FFN with a norm of its own after each MoE layer"
ROWS: tuple[Row, ...] = (
    Row("mixtral_8x7b", "Mixtral-8x7B", "46.7B", "12.9B", "2401.04088 and model card"),
    Row("mixtral_8x22b", "Mixtral-8x22B", "141B", "39B", "model card"),
    Row("olmoe_1b_7b", "OLMoE-1B-7B", "6.9B", "1.3B", "2409.02060"),
    Row("deepseek_moe_2b", "DeepSeekMoE-2B", "2.0B", "0.3B", "2401.06066, table 1",
        note="The survey's 0.24 / 1.89 B are the paper's expert parameters only (its table 2). The width of an expert "
        "is derived, the vocabulary a guess."),
    Row("deepseek_moe_16b", "DeepSeekMoE-16B", "16.4B", "2.8B", "2401.06066"),
    Row("deepseek_moe_145b", "DeepSeekMoE-145B", "144.6B", "22.2B", "2401.06066",
        note="The width of an expert is derived from the total."),
    Row("deepseek_v2_lite", "DeepSeek-V2-Lite", "15.7B", "2.4B", "2405.04434", {"active": LOOKUP_CUT}),
    Row("deepseek_v2", "DeepSeek-V2", "236B", "21B", "2405.04434"),
    Row("deepseek_v3", "DeepSeek-V3", "671B", "37B", "2412.19437", {"active": LOOKUP},
        note="The multi-token-prediction module (11.5 B of its own) is not counted, as in the published figures."),
    Row("qwen15_moe_a27b", "Qwen1.5-MoE-A2.7B", "14.3B", "2.7B", "model card",
        note="The survey's 8 of 64 experts are 4 of 60 routed and 4 shared."),
    Row("qwen2_57b_a14b", "Qwen2-57B-A14B", "57.4B", "14B", "2407.10671 and model card"),
    Row("qwen3_30b_a3b", "Qwen3-30B-A3B", "30.5B", "3.3B", "model card", {"active": TRUNCATED}),
    Row("qwen3_235b_a22b", "Qwen3-235B-A22B", "235B", "22B", "model card"),
    Row("gpt_oss_20b", "gpt-oss-20b", "20.9B", "3.6B", "2508.10925", {"active": LOOKUP}),
    Row("gpt_oss_120b", "gpt-oss-120b", "116.8B", "5.1B", "2508.10925", {"active": LOOKUP}),
    Row("longcat_flash", "LongCat-Flash", "560B", "27B", "2509.01322", {"active": LOOKUP},
        note="Active is the mean: 8 of a token's 12 choices compute under a uniform choice, which training aims at "
        "(published range 18.6 to 31.3 B)."),
    Row("dbrx", "DBRX", "132B", "36B", "model card"),
    Row("grok_1", "Grok-1", "314B", "86B", "xAI's release; active: survey, table 3",
        {"active": Reason("xAI says 25 % of the weights; two experts and the rest are 26.5 %, and 86 B is 27.4 %")}),
    Row("phi35_moe", "Phi-3.5-MoE", "41.9B", "6.6B", "model card",
        note="Training takes the plain gradient of the gate weights, not the paper's estimate of a random choice."),
    Row("llama4_scout", "Llama-4-Scout", "109B", "17B", "model card", {"total": VISION},
        note="The vision encoder's sizes were checked against the defaults of its config class only."),
    Row("glam_01b_64e", "GLaM 0.1B/64E", "1.9B", "145M", "2112.06905, table 4",
        {"total": Reason("without embeddings", without=("input embedding",)), "active": BETWEEN},
        router=GLAM, why=GLAM_WHY, parts=glam(768, 3072, 12, 12, 64)),
    Row("glam_17b_64e", "GLaM 1.7B/64E", "27B", "1.879B", "2112.06905, table 4", {"active": BETWEEN},
        router=GLAM, why=GLAM_WHY, parts=glam(2048, 8192, 24, 16, 128),
        note="The survey's 1.7 B is the dense model that it starts from."),
    Row("glam_8b_64e", "GLaM 8B/64E", "143B", "9.8B", "2112.06905, table 4", {"active": BETWEEN},
        router=GLAM, why=GLAM_WHY, parts=glam(4096, 16_384, 32, 32, 128),
        note="The survey's 8 B is the dense model that it starts from."),
    Row("glam_64b_64e", "GLaM 64B/64E", "1.2T", "96.6B", "2112.06905, table 4",
        router=GLAM, why=GLAM_WHY, parts=glam(8192, 32_768, 64, 128, 128),
        note="The survey's 64 B is the dense model that it starts from."),
    Row("deepspeed_moe_13b", "DeepSpeed-MoE 350M+128", "13B", "", "2201.05596", router=PR, why=GPT,
        parts=deepspeed(1024, 64, 128), note="The survey's 350 M is the dense model; one expert is chosen, not two."),
    Row("deepspeed_moe_52b", "DeepSpeed-MoE 1.3B+128", "52B", "", "2201.05596", router=PR, why=GPT,
        parts=deepspeed(2048, 128, 128), note="As above."),
    Row("deepspeed_pr_moe_4b", "PR-MoE 350M+32/64", "4B", "", "2201.05596", router=PR, why=f"{GPT}; more experts in "
        "the last two MoE layers", parts=deepspeed(1024, 64, (10 * 32 + 2 * 64) / 12, residual=True)),
    Row("deepspeed_pr_moe_31b", "PR-MoE 1.3B+64/128", "31B", "", "2201.05596", router=PR, why=f"{GPT}; more experts "
        "in the last two MoE layers", parts=deepspeed(2048, 128, (10 * 64 + 2 * 128) / 12, residual=True)),
    Row("llama_moe_2_16", "LLaMA-MoE 2/16", "6.7B", "3.0B", "2406.16554", router=LLAMA_MOE,
        why="a gate of two layers", parts=llama_moe(16, 2)),
    Row("llama_moe_4_16", "LLaMA-MoE 4/16", "6.7B", "3.5B", "2406.16554", router=LLAMA_MOE,
        why="a gate of two layers", parts=llama_moe(16, 4)),
    Row("llama_moe_2_8", "LLaMA-MoE 2/8", "6.7B", "3.5B", "2406.16554", router=LLAMA_MOE,
        why="a gate of two layers", parts=llama_moe(8, 2)),
    Row("openmoe_base", "OpenMoE-Base", "650M", "339M", "2402.01739", {"active": BETWEEN}, router=OPENMOE,
        why=OPEN_WHY, parts=openmoe(768, 3072, 12, 12, 64, 16, 4)),
    Row("openmoe_8b", "OpenMoE-8B/32E", "8.7B", "2.6B", "2402.01739", {"active": BETWEEN}, router=OPENMOE,
        why=OPEN_WHY, parts=openmoe(2048, 8192, 24, 24, 128, 32, 6)),
    Row("openmoe_34b", "OpenMoE-34B/32E", "34B", "6.8B", "2402.01739",
        {"total": TRUNCATED, "active": BETWEEN}, router=OPENMOE, why=OPEN_WHY,
        parts=openmoe(3072, 12_288, 32, 24, 128, 32, 4)),
    Row("skywork_moe", "Skywork-MoE", "146B", "22B", "2406.06563", {"active": TRUNCATED},
        router="top-2 of softmax of normalised logits", why="normalisation of the router's logits",
        parts=plain(vocab=65_536, dim=4608, layers=52, heads=36, head_dim=128, moe_layers=52, experts=16, k=2,
                    expert_dim=12_288)),
    Row("yuan_20_m32", "Yuan 2.0-M32", "40B", "3.7B", "2405.17976", router="top-2 by attention among the experts",
        why="an attention router, and convolutions before queries and keys",
        parts=plain(vocab=135_040, dim=2048, layers=24, heads=16, head_dim=256, embeddings=1, moe_layers=24, experts=32,
              k=2, expert_dim=8192, attention_router=24 * 2 * 2048 * 32, convolutions=24 * 2 * 2 * 2048 * 1024),
        note="One embedding table is counted; whether input and output share it was not verified."),
    Row("jamba", "Jamba", "52B", "12B", "2403.19887", router="top-2 of softmax, as is",
        why="Mamba layers: counted only", parts=jamba()),
    Row("gshard_600b", "GShard 2048E, 36 layers", "600B", "", "2006.16668", {"total": ALONE}, router=GSHARD,
        why=T5, parts=gshard(36, 2048)),
    Row("gshard_200b", "GShard 2048E, 12 layers", "200B", "", "2006.16668", {"total": ALONE}, router=GSHARD,
        why=T5, parts=gshard(12, 2048)),
    Row("gshard_150b", "GShard 512E, 36 layers", "150B", "", "2006.16668", {"total": ALONE}, router=GSHARD,
        why=T5, parts=gshard(36, 512)),
    Row("gshard_37b", "GShard 128E, 36 layers", "37B", "", "2006.16668", {"total": ALONE}, router=GSHARD,
        why=T5, parts=gshard(36, 128)),
    Row("switch_base", "Switch-Base", "7B", "", "2101.03961, table 9", router=SWITCH, why=T5,
        parts=t5(768, 2048, 12, 12, 64, 128, 1, 2)),
    Row("switch_large", "Switch-Large", "26B", "", "2101.03961, table 9",
        {"total": ALONE}, router=SWITCH, why=T5, parts=t5(1024, 2816, 24, 16, 64, 128, 1, 2)),
    Row("switch_xxl", "Switch-XXL", "395B", "", "2101.03961, table 9",
        {"total": Reason("the table's sizes do not give it: 64 experts in every second layer are 193 B, in every "
                         "layer 387 B")},
        router=SWITCH, why=T5, parts=t5(4096, 10_240, 24, 64, 64, 64, 1, 2)),
    Row("switch_c", "Switch-C", "1571B", "", "2101.03961, table 9", router=SWITCH, why=T5,
        parts=t5(2080, 6144, 15, 32, 64, 2048, 1, 1, kind="relu")),
    Row("st_moe_l", "ST-MoE-L", "4.1B", "0.8B", "2202.08906, table 10",
        {"total": NO_EXTRA, "active": DENSE_EQUAL}, router=STMOE, why=T5,
        parts=t5(1024, 2816, 27, 16, 64, 32, 2, 4, extra=True)),
    Row("st_moe_32b", "ST-MoE-32B", "269B", "32B", "2202.08906, table 10",
        {"total": NO_EXTRA, "active": DENSE_EQUAL}, router=STMOE, why=T5,
        parts=t5(5120, 20_480, 27, 64, 128, 64, 2, 4, extra=True)),
)  # fmt: skip
