"""What a training step sends between devices: each collective with its cause and its bytes.

It follows ``moejax.dispatch``: weights go in whole, so those that are stored split over the expert axis are gathered
for each layer, and the transpose sums their gradients over all token shards; under expert parallelism they stay, rows
travel instead, and the gradients are summed over the data axis. What XLA's partitioner makes of the rest is added.
``tests/test_plan.py`` compares with the collectives of compiled programs.

Bytes are those of the whole array that a collective makes, on one device; a reduction's array is as large as what goes
in. What a device really sends by a ring is ``wire``: of n devices, (n - 1)/n of the array to gather or to exchange it,
twice that to reduce it.
"""

import dataclasses
from typing import Literal

from moejax import count
from moejax.config import ExperimentConfig, MeshConfig
from moejax.dispatch import pieces
from moejax.model import layer_groups
from moejax.plan.activations import parameters
from moejax.plan.sizes import F32, INT, Platform, Sizes, make


@dataclasses.dataclass(frozen=True)
class Collective:
    """All calls of one kind in one optimizer step."""

    kind: Literal["all-reduce", "all-gather", "all-to-all"]
    cause: str
    over: str
    """Mesh axes."""
    devices: int
    bytes: int
    """Of the arrays, summed over the calls of one step, on one device."""

    @property
    def wire(self) -> int:
        """Bytes that each device sends, by a ring."""
        share = (self.devices - 1) / self.devices
        return round(self.bytes * share * (2 if self.kind == "all-reduce" else 1))


def collectives(config: ExperimentConfig, mesh: MeshConfig, platform: Platform) -> list[Collective]:
    """Those of one training step, the large ones first. ``mesh`` has no axis of -1."""
    s = make(config, mesh, platform, train=True)
    found = _token_axes(config, s) + _model_axis(config, s)
    return sorted((c for c in found if c.devices > 1 and c.bytes), key=lambda c: -c.bytes)


def _moe_layers(s: Sizes) -> int:
    return sum(sum(pattern) * repeats for pattern, repeats in layer_groups(s.model))


def _exact_balance(config: ExperimentConfig) -> bool:
    train = config.train
    return train.accumulate > 1 and train.balance_scope == "batch" and any(c for _, c in config.model.moe.losses)


def _token_axes(config: ExperimentConfig, s: Sizes) -> list[Collective]:
    model, micros, n, layers = s.model, config.train.accumulate, s.token_shards, _moe_layers(s)
    over = "data x expert" if s.expert_shards > 1 else "data"
    whole = dataclasses.replace(s, expert_shards=1)
    weights = parameters(model, whole)
    experts = weights.pop("expert weights") * F32
    rest = sum(weights.values()) * F32
    if model.tie_embeddings:
        # Used twice, as a table and as a matrix: its two gradients are summed apart.
        rest += weights["embedding"] * F32
    # Forward, once more where the backward pass makes the layer again, once more for exact balance losses.
    passes = 1 + (model.remat != "none") + (1 if _exact_balance(config) else 0)
    sums = layers * (5 * s.choices + 2) * F32
    if s.expert_parallel:
        experts //= s.expert_shards
        counts = len(pieces(model.moe, s.tokens)) * model.moe.stored_experts * INT
        buffer = s.sent_rows * model.dim * s.itemsize
        what = "tokens" if s.token_pieces else "rows"
        # What comes home has no part in the gradient of a sum without weights, so that it is not made again.
        once = bool(s.token_pieces) or model.moe.weigh == "input"
        trips = 2 * (passes + 1) - (once and model.remat != "none")
        of_experts = [
            Collective("all-to-all", f"{what} to their experts and back", "expert", s.expert_shards,
                       trips * layers * buffer * micros),
            Collective("all-to-all", "counts of rows", "expert", s.expert_shards, passes * layers * counts * micros),
            Collective("all-reduce", "gradients of the experts that a device hosts", "data", n // s.expert_shards,
                       experts * micros),
        ]  # fmt: skip
        if s.token_pieces:
            reserved = s.expert_shards * sum(capacity for _, capacity in s.token_pieces)
            places = len(s.token_pieces) * s.expert_shards + reserved
            of_experts += [
                Collective("all-to-all", "places of pairs", "expert", s.expert_shards,
                           passes * layers * places * INT * micros),
                Collective("all-to-all", "gate weights and their gradients", "expert", s.expert_shards,
                           (passes + 1) * layers * reserved * F32 * micros),
            ]  # fmt: skip
    else:
        of_experts = [
            Collective("all-gather", "experts' weights, whole for each layer", "expert", s.expert_shards,
                       experts * passes * micros),
            Collective("all-reduce", "gradients of the experts, whole for each layer", over, n, experts * micros),
        ]  # fmt: skip
    return [
        *of_experts,
        Collective("all-reduce", "gradients of everything else", over, n, rest * micros),
        Collective("all-reduce", "metrics of MoE layers", over, n,
                   round(sums * (2 if _exact_balance(config) else 1)) * micros),
    ]  # fmt: skip


def _model_axis(config: ExperimentConfig, s: Sizes) -> list[Collective]:
    """Activations: each half of a block sums its output over the axis, and the gradient of its input."""
    model, micros, n = s.model, config.train.accumulate, s.model_shards
    stream, moes = s.tokens * s.model.dim, _moe_layers(s)
    layers, denses = count.attentions(model), count.dense_ffns(model)
    # remat="block" makes the forward pass again; "dots" keeps the outputs of attention and dense matmuls.
    again = 1 if model.remat == "block" else 0
    attention = layers * ((1 + again) * stream + _attention_inputs(s)) * s.itemsize
    dense = denses * (1 + again + s.matrices - 1) * stream * s.itemsize
    shared = moes * (1 + again + s.matrices - 1) * stream * s.itemsize if s.shared_dim else 0
    rows = moes * (1 + (model.remat != "none") + s.matrices - 1) * s.rows * model.dim * F32
    return [
        Collective("all-reduce", "attention: outputs, gradients of inputs", "model", n, attention * micros),
        Collective("all-reduce", "dense and shared FFNs: outputs, gradients of inputs", "model", n,
                   (dense + shared) * micros),
        Collective("all-reduce", "rows of experts: outputs, gradients of inputs", "model", n, rows * micros),
    ]  # fmt: skip


def _attention_inputs(s: Sizes) -> int:
    """Numbers whose gradients each device has a part of, where heads are split: those that all heads read."""
    a = s.model.attention
    if a.kind == "grouped":
        return 3 * s.tokens * s.model.dim  # the input, once for each projection
    # The down-projections are whole on every device: it is the latents that are summed (that of keys and values for
    # both), and the one rotary key.
    return s.tokens * ((a.query_rank or s.model.dim) + 2 * a.latent_rank + a.rope_head_dim)
