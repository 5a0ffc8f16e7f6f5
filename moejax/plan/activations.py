"""What the forward pass keeps for the backward pass, and what the largest moment of each needs beside it.

Kept arrays follow the code, line by line: ``moejax.blocks``, ``moejax.attention`` (in ``moejax.plan.attention``),
``moejax.moe``, ``moejax.routing``, ``moejax.dispatch``, ``kernels_pallas.grouped_matmul``; ``tests/test_plan.py``
holds their sum to the residuals that JAX itself reports for the traced model. What is linear in what comes before
(rotary positions, residual additions, biases) keeps nothing.

Working arrays are those that are alive together at one moment. How XLA fuses and packs them is its own affair, so they
are counted as the code has them; ``docs/plan.md`` says how far off that is.
"""

import dataclasses
from collections.abc import Iterator

from kernels_pallas.grouped_matmul import padded
from moejax import count
from moejax.config import ModelConfig
from moejax.model import layer_groups
from moejax.plan.attention import attention, backward, forward, norm, outputs, shared_by_layers
from moejax.plan.attention import parameters as attention_parameters
from moejax.plan.sizes import F32, INT, Array, Sizes

PARTS = (
    "embedding", "norms", "attention", "attention scores", "router", "dispatch plan", "rows [P,D]", "hidden [P,F]",
    "expert weights", "dense FFN", "shared experts", "multi-token prediction", "logits and loss",
)  # fmt: skip


FFN_HIDDEN = {"swiglu": 6, "geglu": 7, "gelu": 5, "relu": 2}
"""[T, F] arrays that autodiff keeps of a dense FFN, in the compute type: outputs of the two (one) matmuls, the hidden
layer, and what the derivative of the activation needs, as ``jax.nn`` writes it."""
KEEPS_HIDDEN = ("cpu_tiled", "mosaic_gpu")
"""Back ends that save the pre-activations. ``padded`` saves its inputs only; the others differentiate a composition."""


def dense_ffn(s: Sizes, hidden: int, part: str) -> Iterator[Array]:
    yield Array(part, "input", s.tokens * s.model.dim * s.itemsize)
    yield Array(part, "hidden", FFN_HIDDEN[s.model.activation] * s.tokens * hidden * s.itemsize)
    if s.cast:
        yield Array(part, "weights in the compute type", s.matrices * s.model.dim * hidden * s.itemsize)


ROUTER_TABLES = {"noisy_topk": 6, "sparsemixer": 7}
"""[T, E] float32 arrays that a router family keeps, with the metrics that losses are made of. The others: 3."""


def router(s: Sizes) -> Iterator[Array]:
    moe, t = s.model.moe, s.tokens
    yield Array("router", "input in float32", t * s.model.dim * F32)
    tables = ROUTER_TABLES.get(moe.router.name, 3)
    yield Array("router", "logits and probabilities [T,E]", tables * t * s.choices * F32)
    yield Array("router", "choices, weights and sums", (4 * s.pairs + 7 * t) * F32)


def moe(s: Sizes) -> Iterator[Array]:
    """Of the routed experts, with their router and dispatch, and of the shared ones."""
    m, c, d = s.model.moe, s.itemsize, s.model.dim
    yield from router(s)
    of_rows = 4 if s.expert_parallel else 2  # there also the order of received rows by expert, and the way back
    yield Array("dispatch plan", "rows of pairs, pairs of rows", (s.pairs * m.parts + of_rows * s.rows) * INT)
    if s.token_pieces:
        rows_of_tokens = s.expert_shards * sum(min(of) for of in s.token_pieces)
        places = s.tokens * s.expert_shards + rows_of_tokens * (1 + 2 * s.pairs_of_rank)
        yield Array("dispatch plan", "rows of tokens, received pairs and their weights", places * INT)
    yield Array("rows [P,D]", "inputs and outputs of experts", 2 * s.rows * d * c)
    if m.weigh == "input":
        yield Array("rows [P,D]", "inputs before their weight, and that, in float32", s.rows * (d + 1) * F32)
    weights = s.matrices * s.experts * d * s.expert_dim
    hidden = (s.matrices - 1) * s.rows * s.expert_dim
    if s.back_end in KEEPS_HIDDEN:
        yield Array("hidden [P,F]", "pre-activations", hidden * c)
    elif s.back_end != "padded":
        internals = FFN_HIDDEN[s.model.activation] - s.matrices
        yield Array("hidden [P,F]", "pre-activations and activation", (hidden + s.rows * s.expert_dim) * c)
        yield Array("hidden [P,F]", "inside the activation", internals * s.rows * s.expert_dim * F32)
    which = "this rank's experts" if s.expert_parallel else "all experts"
    if s.cast:
        yield Array("expert weights", f"in the compute type, {which}", weights * c)
    elif s.token_shards > 1:
        # per_shard casts the weights that it takes to varying: each device keeps that copy for the backward pass.
        yield Array("expert weights", f"{'cast to varying' if s.expert_parallel else 'gathered'}, {which}", weights * c)
    if s.shared_dim:
        yield from dense_ffn(s, s.shared_dim, "shared experts")
        if m.shared_gate == "sigmoid":
            yield Array("shared experts", "output and gate", s.tokens * (d * c + 3 * F32))
            if s.cast:
                yield Array("shared experts", "gate's input in float32", s.tokens * d * F32)


def ffn_half(s: Sizes, is_moe: bool) -> list[Array]:
    """Of a block's second norm and its experts or dense FFN, and of the norm after that where there is one."""
    after = list(norm(s, s.model.dim)) if s.model.sandwich_norm else []
    return [*norm(s, s.model.dim), *(moe(s) if is_moe else dense_ffn(s, s.ffn_dim, "dense FFN")), *after]


def block(s: Sizes, is_moe: bool) -> list[Array]:
    """Everything that one block's backward pass reads."""
    first = [*attention(s), *ffn_half(s, is_moe)]
    if s.model.wiring == "longcat":  # a dense FFN beside the experts, then an attention and a dense FFN more
        return [*first, *dense_ffn(s, s.ffn_dim, "dense FFN"), *attention(s), *ffn_half(s, False)]
    return first


def matmul_outputs(s: Sizes, is_moe: bool) -> list[Array]:
    """What ``remat="dots"`` keeps of one block: outputs of matmuls without a batch axis."""
    m, c, t = s.model.moe, s.itemsize, s.tokens
    kept = list(outputs(s))
    if s.model.sandwich_norm and (not is_moe or s.shared_dim):  # a norm reads what the last matmul made
        kept.append(Array("dense FFN" if not is_moe else "shared experts", "output", t * s.model.dim * c))
    if s.model.wiring == "longcat":
        kept += [*outputs(s), Array("dense FFN", "gate and up", 2 * (s.matrices - 1) * t * s.ffn_dim * c),
                 Array("dense FFN", "output of the first", t * s.model.dim * c)]  # fmt: skip
    if not is_moe:
        # The down projection ends the block (but for sandwich norms): nothing after it needs its output.
        return [*kept, Array("dense FFN", "gate and up", (s.matrices - 1) * t * s.ffn_dim * c)]
    router = 2 if m.router.name == "noisy_topk" else 1
    kept.append(Array("router", "logits [T,E]", router * t * s.choices * F32))
    if s.shared_dim:
        kept.append(Array("shared experts", "gate and up", (s.matrices - 1) * t * s.shared_dim * c))
        if m.shared_gate == "sigmoid":
            kept.append(Array("shared experts", "output and gate", t * (s.model.dim * c + F32)))
    return kept


def once(s: Sizes, remat: bool) -> list[Array]:
    """What all layers share."""
    kept = [Array("logits and loss", "targets, masks, byte lengths", 6 * s.tokens * F32)]
    if remat:
        return kept  # made again in each layer's backward pass
    return [*kept, *shared_by_layers(s)]


def head(s: Sizes) -> list[Array]:
    """What final norm, logits and loss keep; gone before the layers' backward pass begins."""
    model, t = s.model, s.tokens
    kept = [*norm(s, s.model.dim), Array("logits and loss", "input", t * model.dim * s.itemsize)]
    kept.append(Array("logits and loss", "exp of the logits [T,V]", t * model.vocab_size * F32))
    if model.logit_softcap:
        kept.append(Array("logits and loss", "soft cap [T,V]", t * model.vocab_size * F32))
    if s.cast:
        kept.append(
            Array("logits and loss", "embeddings in the compute type", model.vocab_size * model.dim * s.itemsize)
        )
    return kept


def prediction(s: Sizes) -> list[Array]:
    """What multi-token prediction keeps: of each module both normed inputs, a block like the last one, and a head."""
    model, one = s.model, s.tokens * s.model.dim * s.itemsize
    if not model.mtp_layers:
        return []
    arrays = [*norm(s, 2 * model.dim), Array("", "both inputs", 2 * one), *block(s, layer_groups(model)[-1][0][-1])]
    arrays += head(s)
    return [Array("multi-token prediction", a.what, a.bytes * model.mtp_layers) for a in arrays]


def kept_by_layers(s: Sizes) -> list[Array]:
    """What all layers together keep, under the config's ``remat``."""
    total: list[Array] = []
    for pattern, repeats in layer_groups(s.model):
        one: list[Array] = []
        if s.model.remat != "none":
            one.append(Array("norms", "input of each layer", s.tokens * s.model.dim * s.itemsize))
        for is_moe in pattern:
            if s.model.remat == "none":
                one += block(s, is_moe)
            elif s.model.remat == "dots":
                one += matmul_outputs(s, is_moe)
        if s.model.remat == "dots" and len(pattern) > 1 and not s.model.sandwich_norm:
            # Between blocks of one pattern nothing is cut, but a dense block's last matmul is no longer the last.
            inner = [is_moe for is_moe in pattern[:-1] if not is_moe]
            one += [Array("dense FFN", "output", s.tokens * s.model.dim * s.itemsize) for _ in inner]
        total += [dataclasses.replace(a, bytes=a.bytes * repeats) for a in one]
    return total


# --- moments ----------------------------------------------------------------------------------------------------------


def recomputed(s: Sizes, *, at_attention: bool) -> list[Array]:
    """Under ``remat``: what the largest pattern of blocks keeps, made again before its backward pass.

    ``at_attention``: what is left of it when the gradient has passed the FFN.
    """
    if s.model.remat == "none":
        return []

    def made(pattern: tuple[bool, ...]) -> list[Array]:
        arrays = [a for is_moe in pattern for a in block(s, is_moe)]
        if s.model.remat == "dots":
            arrays += [dataclasses.replace(a, bytes=-a.bytes) for flag in pattern for a in matmul_outputs(s, flag)]
        return arrays

    patterns = [pattern for pattern, _ in layer_groups(s.model)]
    largest = max(patterns, key=lambda pattern: sum(a.bytes for a in made(pattern)))
    arrays = made(largest)
    if at_attention:
        rest = block(s, largest[0])[len(list(attention(s))) :]
        return arrays + [dataclasses.replace(a, bytes=-a.bytes) for a in rest]
    if s.core == "xla":  # from which the softmax is made again, in its backward pass once more
        arrays.append(Array("attention scores", "masked scores [B,H,S,S]", s.scores * F32))
    return arrays


def backward_of_ffn(s: Sizes, is_moe: bool) -> list[Array]:
    """Beside what is kept, when the gradient is at a block's FFN."""
    m, c, d, t = s.model.moe, s.itemsize, s.model.dim, s.tokens
    stream = Array("norms", "gradients of the residual stream and the norm", 4 * t * d * F32)
    if not is_moe:
        width = s.matrices * t * s.ffn_dim * c
        return [stream, Array("dense FFN", "gradients of hidden", width)]
    found = [stream, Array("rows [P,D]", "gradients of inputs and outputs", 2 * s.rows * d * c)]
    if s.expert_parallel:
        found.append(Array("rows [P,D]", "buffers of the exchange", s.sent_rows * d * c))
    if s.model.remat == "none" and s.model.layer_loop == "scan":
        # The loop over experts wants whole arrays: the layer's slices of what is stacked over layers are copied out.
        found.append(Array("rows [P,D]", "this layer's inputs", s.rows * d * c))
        if s.back_end in KEEPS_HIDDEN:
            found.append(
                Array("hidden [P,F]", "this layer's pre-activations", (s.matrices - 1) * s.rows * s.expert_dim * c)
            )
    if m.router.name == "expert_choice":
        # Plain autodiff of its combine, a sum by token: the gradient of each pair, times its weight, times its output.
        found.append(Array("rows [P,D]", "gradients of pairs", 3 * s.rows * d * F32))
    if s.back_end == "padded":
        found += _padded(s, d_outputs=2, hiddens=2 * s.matrices)
    elif s.back_end != "cpu_tiled":  # which holds tiles of them only
        found.append(Array("hidden [P,F]", "gradients of hidden", s.matrices * s.rows * s.expert_dim * c))
    weights = s.matrices * m.stored_experts * d * s.expert_dim * F32
    return [*found, Array("expert weights", "this layer's gradients, all experts", weights)]


def _padded(s: Sizes, d_outputs: int, hiddens: int) -> list[Array]:
    """Of the back end ``padded``: blocks of C rows for every expert, inputs and outputs, and hidden ones in float32."""
    blocks = s.model.moe.stored_experts * padded.capacity(s.rows, s.model.moe.stored_experts)
    return [
        Array("rows [P,D]", "blocks of rows", (1 + d_outputs) * blocks * s.model.dim * s.itemsize),
        Array("hidden [P,F]", "blocks of hidden", hiddens * blocks * s.expert_dim * F32),
    ]


def backward_of_head(s: Sizes) -> list[Array]:
    """Beside what is kept, when the gradient is at the logits."""
    return [
        Array("logits and loss", "gradient of the logits [T,V]", s.tokens * s.model.vocab_size * F32),
        Array("norms", "gradient of the final norm", 2 * s.tokens * s.model.dim * F32),
    ]


def backward_of_block(s: Sizes, is_moe: bool) -> list[Array]:
    """The larger of its two moments."""
    return max(backward_of_ffn(s, is_moe), backward(s), key=lambda arrays: sum(a.bytes for a in arrays))


def forward_of_block(s: Sizes, is_moe: bool) -> list[list[Array]]:
    """The moments of a block without a backward pass: attention, then its FFN."""
    c, d, t = s.itemsize, s.model.dim, s.tokens
    stream = Array("norms", "residual stream and normalised input", 2 * t * d * c)
    first = forward(s)
    if not is_moe:
        return [first, [stream, Array("dense FFN", "hidden", s.matrices * t * s.ffn_dim * c)]]
    weights = s.matrices * s.experts * d * s.expert_dim
    layer = [Array("expert weights", "this layer's", weights * c)] if _copied(s) else []
    hidden = Array("hidden [P,F]", "pre-activations", (s.matrices - 1) * s.rows * s.expert_dim * c)
    ys = Array("rows [P,D]", "outputs of experts", s.rows * d * c)
    xs = Array("rows [P,D]", "inputs of experts", s.rows * d * c)
    sent = [Array("rows [P,D]", "buffers of the exchange", 2 * s.sent_rows * d * c)] if s.expert_parallel else []
    ffn = [stream, *layer, xs, ys, hidden, *sent, *_plan(s)]
    if s.back_end == "padded":
        ffn = [stream, *layer, xs, ys, *sent, *_plan(s), *_padded(s, d_outputs=0, hiddens=s.matrices - 1)]
    if s.back_end == "cpu_tiled":
        # It writes into arrays of zeros, pre-activations too, and XLA makes constants before anything else.
        first += [*(layer if s.token_shards == 1 else []), ys, hidden]
    return [first, ffn]


def _copied(s: Sizes) -> bool:
    """Whether a layer's weights are an array of their own: cast, gathered, or cut out of the stack."""
    return s.cast or s.token_shards > 1 or any(repeats > 1 for _, repeats in layer_groups(s.model))


def _plan(s: Sizes) -> list[Array]:
    tables = 3 * s.tokens * s.choices * F32
    return [Array("router", "logits and probabilities [T,E]", tables),
            Array("dispatch plan", "rows of pairs, pairs of rows", 3 * s.rows * INT)]  # fmt: skip


def parameters(model: ModelConfig, s: Sizes) -> dict[str, int]:
    """Trainable numbers on one device by part; on one device their sum is that of ``moejax.count.parameters``."""
    m, d = model.moe, model.dim
    moes = sum(sum(pattern) * repeats for pattern, repeats in layer_groups(model))
    attentions = count.attentions(model)
    biases = (s.matrices - 1) * s.expert_dim + d if m.expert_bias else 0
    gate = d if m.shared_experts and m.shared_gate == "sigmoid" else 0
    return {
        "embedding": model.vocab_size * (d * (1 if model.tie_embeddings else 2) + (1 if model.logit_bias else 0)),
        "norms": count.block_norms(model) + count.norm_parameters(model),
        "attention": attentions * attention_parameters(s),
        "router": moes * sum(count.router_parameters(model)) if moes else 0,
        "expert weights": moes * -(-m.stored_experts // s.expert_shards) * (s.matrices * d * s.expert_dim + biases),
        "dense FFN": count.dense_ffns(model) * s.matrices * d * s.ffn_dim,
        "shared experts": moes * (s.matrices * d * s.shared_dim + gate),
        "multi-token prediction": _prediction_parameters(s),
    }


def _prediction_parameters(s: Sizes) -> int:
    """Whole on each device, but for the experts."""
    model, moe = s.model, s.model.moe
    if not model.mtp_layers or not layer_groups(model)[-1][0][-1]:
        return count.prediction_parameters(model)
    one = (count.ffn_parameters(model.dim, moe.expert_dim, model.activation) + count.expert_biases(model)) // moe.parts
    elsewhere = moe.stored_experts - -(-moe.stored_experts // s.expert_shards)
    return count.prediction_parameters(model) - model.mtp_layers * elsewhere * one
