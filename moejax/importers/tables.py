"""Which tensor of a Hugging Face folder is which parameter of ours, for every family, in both directions.

A :class:`Row` says: this parameter (or this part of the layers' stack) is that tensor, with its dimensions factored,
cut and permuted. Import reads along the rows, export writes along the same ones. A parameter may have several rows, one
for each layout that is in use: experts one by one, fused over experts, or packed in four bits.

Letters: D model, V vocabulary, E experts, F expert hidden, H heads, G key/value heads, N head dim, R latent rank.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from moejax.config import ModelConfig

LAYER = "model.layers.{}."
LAYER_OF = re.compile(r"(?:model\.layers|transformer\.blocks)\.(\d+)\.")
EXPERT_OF = re.compile(r"\.experts\.(\d+)\.")
Layout = Literal["", "per_expert", "fused", "mxfp4"]
EXPERT = "{e}"


@dataclasses.dataclass(frozen=True)
class Row:
    target: str
    """Parameter: of the model, or of a block (``attention/q``)."""
    source: str
    """Tensor: its whole name, or for a block what follows :attr:`Table.layer`; ``{e}`` is the expert's number."""
    shape: tuple[int | tuple[int, ...], ...]
    """Of the source. A tuple factors one of its dimensions: ``(H, N)`` is one of H times N."""
    order: tuple[int, ...] | None = None
    """The target's dimensions, each as the place of a factored dimension of the source. None: the same order."""
    take: Mapping[int, slice] = dataclasses.field(default_factory=dict)
    """What is the target's of a factored dimension, by its place; the rest belongs to other rows."""
    layout: Layout = ""
    count: int = 0
    """Experts, where each has a tensor of its own."""

    def names(self, prefix: str) -> list[str]:
        """The tensors of this row in a block whose names begin with ``prefix``."""
        name = prefix + self.source
        if self.layout == "mxfp4":
            return [name + "_blocks", name + "_scales"]
        return [name.replace(EXPERT, str(e)) for e in range(self.count)] if self.count else [name]

    @property
    def factored(self) -> tuple[int, ...]:
        return tuple(n for size in self.shape for n in (size if isinstance(size, tuple) else (size,)))

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the source tensor (for mxfp4: of what it stands for)."""
        return tuple(math.prod(size) if isinstance(size, tuple) else size for size in self.shape)

    @property
    def taken(self) -> tuple[range, ...]:
        """For each factored dimension the places that are the target's."""
        return tuple(range(n)[self.take.get(i, slice(None))] for i, n in enumerate(self.factored))

    @property
    def permutation(self) -> tuple[int, ...]:
        return self.order if self.order is not None else tuple(range(len(self.factored)))

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of the part of the target."""
        return tuple(len(self.taken[i]) for i in self.permutation)


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Tensors that are known and not read."""

    pattern: str
    """Regular expression for the whole name."""
    reason: str
    beside: str = ""
    """Only where this tensor is there too; ``{}`` stands for the pattern's first group."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A family's tensors for one config."""

    model: tuple[Row, ...]
    block: Callable[[bool], tuple[Row, ...]]
    """Rows of a block, by whether it is MoE."""
    ignored: tuple[Ignored, ...]
    layer: str = LAYER
    """How the names of a block's tensors begin, with its number."""
    prediction: tuple[Row, ...] = ()
    """Rows of a multi-token-prediction module, beside those of its block, which are a layer's."""
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What a module repeats of the model: tensor of the module -> parameter of the model."""


def is_float32(target: str) -> bool:
    """Parameters that stay float32 whatever the type of the matrices: norms, all that a router has, sinks."""
    return target.endswith(("/scale", "_norm/bias", "/sinks")) or "router/arrays/" in target


# --- parts that families share --------------------------------------------------------------------------------------

TRANSPOSED = (1, 0)


def outer(c: ModelConfig) -> tuple[Row, ...]:
    """Embedding, last norm, and the matrix of the logits unless it is the embedding."""
    head = [] if c.tie_embeddings else [Row("unembed", "lm_head.weight", (c.vocab_size, c.dim))]
    if c.logit_bias:
        head.append(Row("unembed_bias", "lm_head.bias", (c.vocab_size,)))
    embed = Row("embed", "model.embed_tokens.weight", (c.vocab_size, c.dim))
    return (embed, *norm(c, "final_norm", "model.norm"), *head)


def norm(c: ModelConfig, target: str, source: str) -> tuple[Row, ...]:
    scale = Row(f"{target}/scale", f"{source}.weight", (c.dim,))
    return (scale, Row(f"{target}/bias", f"{source}.bias", (c.dim,))) if c.norm == "layer_bias" else (scale,)


def norms(c: ModelConfig) -> tuple[Row, ...]:
    return (*norm(c, "attention_norm", "input_layernorm"), *norm(c, "ffn_norm", "post_attention_layernorm"))


def grouped_attention(c: ModelConfig) -> tuple[Row, ...]:
    a, p = c.attention, "self_attn."
    heads, groups = (a.num_heads, a.head_dim), (a.num_kv_heads, a.head_dim)
    rows = [
        Row("attention/q", p + "q_proj.weight", (heads, c.dim), (2, 0, 1)),
        Row("attention/k", p + "k_proj.weight", (groups, c.dim), (2, 0, 1)),
        Row("attention/v", p + "v_proj.weight", (groups, c.dim), (2, 0, 1)),
        Row("attention/o", p + "o_proj.weight", (c.dim, heads), (1, 2, 0)),
    ]
    if a.bias:
        rows += [Row(f"attention/{n}_bias", f"{p}{n}_proj.bias", (heads if n == "q" else groups,)) for n in "qkv"]
    if a.output_bias:
        rows.append(Row("attention/o_bias", p + "o_proj.bias", (c.dim,)))
    if a.qk_norm:
        over = {"q": heads, "k": groups} if a.qk_norm_over == "projection" else dict.fromkeys("qk", a.head_dim)
        rows += [Row(f"attention/{n}_norm/scale", f"{p}{n}_norm.weight", (over[n],)) for n in "qk"]
    if a.sinks:
        rows.append(Row("attention/sinks", p + "sinks", (a.num_heads,)))
    return tuple(rows)


def latent_attention(c: ModelConfig, target: str = "attention", p: str = "self_attn.") -> tuple[Row, ...]:
    """Multi-head latent attention as DeepSeek names it. Keys' and values' up-projections lie in one tensor, head by
    head, and so do the latent and the rotary key."""
    a = c.attention
    n, v, r, rank = a.head_dim, a.value_head_dim, a.rope_head_dim, a.latent_rank
    latent, rotary = {0: slice(0, rank)}, {0: slice(rank, rank + r)}
    both, keys, values = (a.num_heads, n + v), {1: slice(0, n)}, {1: slice(n, n + v)}
    query = (a.num_heads, n + r)
    if a.query_rank:
        rows = [
            Row("q_down", p + "q_a_proj.weight", (a.query_rank, c.dim), TRANSPOSED),
            Row("q_down_norm/scale", p + "q_a_layernorm.weight", (a.query_rank,)),
            Row("q", p + "q_b_proj.weight", (query, a.query_rank), (2, 0, 1)),
        ]
    else:
        rows = [Row("q", p + "q_proj.weight", (query, c.dim), (2, 0, 1))]
    rows += [
        Row("kv_down", p + "kv_a_proj_with_mqa.weight", (rank + r, c.dim), TRANSPOSED, latent),
        Row("k_rope", p + "kv_a_proj_with_mqa.weight", (rank + r, c.dim), TRANSPOSED, rotary),
        Row("kv_norm/scale", p + "kv_a_layernorm.weight", (rank,)),
        Row("k_up", p + "kv_b_proj.weight", (both, rank), (2, 0, 1), keys),
        Row("v_up", p + "kv_b_proj.weight", (both, rank), (2, 0, 1), values),
        Row("o", p + "o_proj.weight", (c.dim, (a.num_heads, v)), (1, 2, 0)),
    ]
    if a.bias:
        if a.query_rank:
            rows.append(Row("q_down_bias", p + "q_a_proj.bias", (a.query_rank,)))
        rows.append(Row("kv_down_bias", p + "kv_a_proj_with_mqa.bias", (rank + r,), None, latent))
        rows.append(Row("k_rope_bias", p + "kv_a_proj_with_mqa.bias", (rank + r,), None, rotary))
    if a.output_bias:
        rows.append(Row("o_bias", p + "o_proj.bias", (c.dim,)))
    return tuple(dataclasses.replace(row, target=f"{target}/{row.target}") for row in rows)


def dense(c: ModelConfig, width: int, target: str = "ffn", p: str = "mlp.") -> tuple[Row, ...]:
    return (
        Row(f"{target}/gate", p + "gate_proj.weight", (width, c.dim), TRANSPOSED),
        Row(f"{target}/up", p + "up_proj.weight", (width, c.dim), TRANSPOSED),
        Row(f"{target}/down", p + "down_proj.weight", (c.dim, width), TRANSPOSED),
    )


def shared(c: ModelConfig, p: str) -> tuple[Row, ...]:
    return dense(c, shared_width(c), "moe/shared", p)


def shared_width(c: ModelConfig) -> int:
    return (c.moe.shared_dim or c.moe.shared_experts * c.moe.expert_dim) if c.moe.shared_experts else 0


def experts(
    c: ModelConfig, each: str = "mlp.experts.{e}.", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    fused: str = "mlp.experts.", unused: int = 0,
) -> tuple[Row, ...]:  # fmt: skip
    """Experts as 2-D tensors for each, or as transformers 5 keeps them: gate above up in one 3-D tensor.

    ``unused``: further rows of the fused gate and up, of experts that compute nothing.
    """
    e, f, d = c.moe.num_experts, c.moe.expert_dim, c.dim
    per_expert = [
        Row(f"moe/store/{target}", f"{each}{name}.weight", shape, TRANSPOSED, layout="per_expert", count=e)
        for target, name, shape in zip(("gate", "up", "down"), names, ((f, d), (f, d), (d, f)), strict=True)
    ]
    cut = {0: slice(0, e)} if unused else {}
    pair = (e + unused, 2 * f, d)
    return (
        *per_expert,
        Row("moe/store/gate", fused + "gate_up_proj", pair, (0, 2, 1), {**cut, 1: slice(0, f)}, "fused"),
        Row("moe/store/up", fused + "gate_up_proj", pair, (0, 2, 1), {**cut, 1: slice(f, 2 * f)}, "fused"),
        Row("moe/store/down", fused + "down_proj", (e, d, f), (0, 2, 1), layout="fused"),
    )


def router(c: ModelConfig, source: str) -> Row:
    return Row("moe/router/arrays/kernel", source, (_choices(c), c.dim), TRANSPOSED)


def _choices(c: ModelConfig) -> int:
    return c.moe.num_experts + c.moe.zero_experts


PREDICTION = "multi-token prediction, which is read where model.mtp_layers asks for it"
INV_FREQ = Ignored(r".*rotary_emb\.inv_freq", "frequencies, computed from the config")


def _table(c: ModelConfig, block: Callable[[bool], tuple[Row, ...]], *ignored: Ignored, **more: Any) -> Table:
    return Table(outer(c), block, (INV_FREQ, *ignored), **more)


# --- families -------------------------------------------------------------------------------------------------------


def mixtral(c: ModelConfig) -> Table:
    """And PhiMoE. 2-D: w1 is the gate, w3 up, w2 down, under ``block_sparse_moe``; fused: under ``mlp``."""
    fused = "mlp.router.weight" if c.moe.router.name == "sparsemixer" else "mlp.gate.weight"
    rows = (
        *norms(c),
        *grouped_attention(c),
        router(c, "block_sparse_moe.gate.weight"),
        router(c, fused),
        *experts(c, "block_sparse_moe.experts.{e}.", ("w1", "w3", "w2")),
    )
    return _table(c, lambda is_moe: rows)


def olmoe(c: ModelConfig) -> Table:
    rows = (*norms(c), *grouped_attention(c), router(c, "mlp.gate.weight"), *experts(c))
    return _table(c, lambda is_moe: rows)


def qwen_moe(c: ModelConfig) -> Table:
    """Qwen2-MoE, with a gated shared expert, and Qwen3-MoE, without."""
    both = (*norms(c), *grouped_attention(c))
    sparse = [router(c, "mlp.gate.weight"), *experts(c)]
    if c.moe.shared_experts:
        sparse += shared(c, "mlp.shared_expert.")
        sparse.append(Row("moe/shared_gate", "mlp.shared_expert_gate.weight", (1, c.dim), TRANSPOSED))
    plain = dense(c, c.ffn_dim)
    return _table(c, lambda is_moe: (*both, *(sparse if is_moe else plain)))


def deepseek(c: ModelConfig) -> Table:
    """DeepSeek-V2, and V3, whose router has a selection bias. V3's layers past the last predict further tokens, as its
    README_WEIGHTS.md says; their embedding and head are the model's once more."""
    both = (*norms(c), *latent_attention(c))
    sparse = [router(c, "mlp.gate.weight"), *experts(c)]
    ignored = []
    prediction: dict[str, Any] = {}
    if c.moe.router.name == "sigmoid_bias":
        sparse.append(Row("moe/router/arrays/bias", "mlp.gate.e_score_correction_bias", (c.moe.num_experts,)))
        asked = "".join(rf"(?!{c.num_layers + k}\.)" for k in range(c.mtp_layers))
        past = rf"model\.layers\.{asked}(\d+)\..*"  # of the layers in the model none is left over
        ignored.append(Ignored(past, PREDICTION, "model.layers.{}.eh_proj.weight"))
        prediction = {
            "prediction": (
                Row("embed_norm/scale", "enorm.weight", (c.dim,)),
                Row("hidden_norm/scale", "hnorm.weight", (c.dim,)),
                Row("proj", "eh_proj.weight", (c.dim, 2 * c.dim), TRANSPOSED),
                Row("final_norm/scale", "shared_head.norm.weight", (c.dim,)),
            ),
            "copies": {
                "embed_tokens.weight": "embed",
                "shared_head.head.weight": "embed" if c.tie_embeddings else "unembed",
            },
        }
    if c.moe.shared_experts:
        sparse += shared(c, "mlp.shared_experts.")
    plain = dense(c, c.ffn_dim)
    return _table(c, lambda is_moe: (*both, *(sparse if is_moe else plain)), *ignored, **prediction)


def gpt_oss(c: ModelConfig) -> Table:
    """Gate and up alternate along one dimension of the fused tensor, which is transposed only where it is packed."""
    e, f, d, p = c.moe.num_experts, c.moe.expert_dim, c.dim, "mlp.experts."
    gate, up = slice(0, 2 * f, 2), slice(1, 2 * f, 2)
    rows = [
        *norms(c),
        *grouped_attention(c),
        router(c, "mlp.router.weight"),
        Row("moe/router/arrays/logit_bias", "mlp.router.bias", (e,)),
        Row("moe/store/gate_bias", p + "gate_up_proj_bias", (e, 2 * f), None, {1: gate}),
        Row("moe/store/up_bias", p + "gate_up_proj_bias", (e, 2 * f), None, {1: up}),
        Row("moe/store/down_bias", p + "down_proj_bias", (e, d)),
        Row("moe/store/gate", p + "gate_up_proj", (e, d, 2 * f), None, {2: gate}, "fused"),
        Row("moe/store/up", p + "gate_up_proj", (e, d, 2 * f), None, {2: up}, "fused"),
        Row("moe/store/down", p + "down_proj", (e, f, d), None, layout="fused"),
        Row("moe/store/gate", p + "gate_up_proj", (e, 2 * f, d), (0, 2, 1), {1: gate}, "mxfp4"),
        Row("moe/store/up", p + "gate_up_proj", (e, 2 * f, d), (0, 2, 1), {1: up}, "mxfp4"),
        Row("moe/store/down", p + "down_proj", (e, d, f), (0, 2, 1), layout="mxfp4"),
    ]
    return _table(c, lambda is_moe: tuple(rows))


def longcat_flash(c: ModelConfig) -> Table:
    """Each block has two attentions and two dense FFNs, numbered 0 and 1, and experts between."""
    e, zero = c.moe.num_experts, c.moe.zero_experts
    rows = []
    for i, suffix in enumerate(("", "_2")):
        rows += [
            Row(f"attention_norm{suffix}/scale", f"input_layernorm.{i}.weight", (c.dim,)),
            Row(f"ffn_norm{suffix}/scale", f"post_attention_layernorm.{i}.weight", (c.dim,)),
            *latent_attention(c, f"attention{suffix}", f"self_attn.{i}."),
            *dense(c, c.ffn_dim, f"ffn{suffix}", f"mlps.{i}."),
        ]
    rows += [
        router(c, "mlp.router.classifier.weight"),
        Row("moe/router/arrays/bias", "mlp.router.e_score_correction_bias", (e + zero,)),
        *experts(c, unused=zero),
    ]
    past = "|".join(str(number) for number in range(e, e + zero))
    ignored = [Ignored(r"model\.mtp\..*", "multi-token prediction with a block of another kind, which is not computed")]
    if zero:
        name = rf"model\.layers\.\d+\.mlp\.experts\.({past})\.(gate|up|down)_proj\.weight"
        ignored.append(Ignored(name, "weights of zero-computation experts, which return their input"))
    return _table(c, lambda is_moe: tuple(rows), *ignored)


def dbrx(c: ModelConfig) -> Table:
    """Queries, keys and values in one tensor; experts one below the other, and all but ``w2`` transposed."""
    a, p = c.attention, "norm_attn_norm."
    h, g = a.num_heads, a.num_kv_heads
    joint, expert = ((h + 2 * g, a.head_dim), c.dim), ((c.moe.num_experts, c.moe.expert_dim), c.dim)
    takes = {"q": slice(0, h), "k": slice(h, h + g), "v": slice(h + g, None)}
    rows = (
        *norm(c, "attention_norm", p + "norm_1"),
        *norm(c, "ffn_norm", p + "norm_2"),
        *(Row(f"attention/{n}", p + "attn.Wqkv.weight", joint, (2, 0, 1), {0: take}) for n, take in takes.items()),
        Row("attention/o", p + "attn.out_proj.weight", (c.dim, (h, a.head_dim)), (1, 2, 0)),
        router(c, "ffn.router.layer.weight"),
        Row("moe/store/gate", "ffn.experts.mlp.w1", expert, (0, 2, 1)),
        Row("moe/store/up", "ffn.experts.mlp.v1", expert, (0, 2, 1)),
        Row("moe/store/down", "ffn.experts.mlp.w2", expert),
    )
    both = (
        Row("embed", "transformer.wte.weight", (c.vocab_size, c.dim)),
        *norm(c, "final_norm", "transformer.norm_f"),
        Row("unembed", "lm_head.weight", (c.vocab_size, c.dim)),
    )
    return Table(both, lambda is_moe: rows, (INV_FREQ,), layer="transformer.blocks.{}.")


def llama4_text(c: ModelConfig) -> Table:
    """Experts' matrices multiply from the left: nothing is transposed."""
    e, f, d, p = c.moe.num_experts, c.moe.expert_dim, c.dim, "feed_forward."
    both = (*norms(c), *grouped_attention(c))
    sparse = (
        router(c, p + "router.weight"),
        Row("moe/store/gate", p + "experts.gate_up_proj", (e, d, 2 * f), None, {2: slice(0, f)}),
        Row("moe/store/up", p + "experts.gate_up_proj", (e, d, 2 * f), None, {2: slice(f, 2 * f)}),
        Row("moe/store/down", p + "experts.down_proj", (e, f, d)),
        *shared(c, p + "shared_expert."),
    )
    plain = dense(c, c.ffn_dim, p=p)
    return _table(c, lambda is_moe: (*both, *(sparse if is_moe else plain)))


TABLES: dict[str, Callable[[ModelConfig], Table]] = {
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen_moe,
    "qwen3_moe": qwen_moe,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "gpt_oss": gpt_oss,
    "longcat_flash": longcat_flash,
    "phimoe": mixtral,
    "dbrx": dbrx,
    "llama4_text": llama4_text,
}
