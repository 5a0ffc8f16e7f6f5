"""The values that travel between the stages of an MoE layer, and the legend of axis letters.

Axis letters of the whole project (lower case is the per-shard size inside ``shard_map``)::

    B batch   S sequence   T tokens      D model        F expert hidden   E experts   V vocabulary
    R routing rows   K choices per row   P pairs   C capacity   L layers   H heads   G key/value heads   N head dim

Everything here is a frozen dataclass registered as a pytree: it can be passed through ``jit``, ``vmap``, ``scan`` and
``shard_map`` and is never mutated. Nothing here computes.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, dataclass_transform

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Activation = Literal["swiglu", "geglu", "gelu", "relu", "swiglu_clamped"]


@dataclass_transform(frozen_default=True)
def pytree(cls: type) -> type:
    """Makes ``cls`` a frozen dataclass and a pytree; a field with metadata ``static=True`` is part of the structure."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    static = [f.name for f in fields if f.metadata.get("static", False)]
    leaves = [f.name for f in fields if f.name not in static]
    jax.tree_util.register_dataclass(cls, data_fields=leaves, meta_fields=static)
    return cls


def static(default=dataclasses.MISSING):
    """A dataclass field that is part of the pytree's structure, so that a new value recompiles."""
    return dataclasses.field(default=default, metadata={"static": True})


@pytree
class Routing:
    """Which expert computes which token with which gate weight: a table of pairs, one row per token or per pair.

    For token choice ``R == T``, row ``r`` is token ``r`` and its ``K`` entries are its candidates (the top-k, or the
    top-k plus the experts of its own rank). For expert choice each row is one pair, ``K == 1``, and ``token`` names it.
    A limit never removes an entry: it clears ``valid``, so that dropped pairs stay countable.
    """

    expert: Int[Array, "R K"]
    """Expert of each pair, in ``[0, E)``: the last ``zero_experts`` ids are those without a computation."""
    weight: Float[Array, "R K"]
    """What combine multiplies the expert's output by (float32)."""
    score: Float[Array, "R K"]
    """What limits rank by. Papers disagree exactly on weight versus score, so both are kept (float32)."""
    valid: Bool[Array, "R K"]
    """False means dropped: never dispatched, never computed, always counted. Padding is born False."""
    probs: Float[Array, "T E"]
    """Router output over all experts after its nonlinearity, for losses, metrics and reroute (float32)."""
    logits: Float[Array, "T E"]
    """Router output before its nonlinearity, without noise: the z-loss needs it (float32)."""
    token: Int[Array, "R"] | None = None
    """Token of each row, or None when row ``r`` is token ``r``."""
    load_prob: Float[Array, "T E"] | None = None
    """Probability that a fresh draw of the noise would select the expert (Shazeer's smooth load); None without
    noise."""
    exceeded: Float[Array, "R"] | None = None
    """Pairs of each row that a limit kept beyond its capacity, because it never drops them; None: no such limit."""
    level: Int[Array, "R K"] | None = None
    """0: all neurons of the pair's expert; 1: its ``major`` leading ones only (2T-Drop). None: all are 0."""
    major: int = static(0)
    """Major neurons; 0: half of them."""
    form: Literal["auto", "extent", "split"] = static("auto")
    """How level 1 is computed (:class:`moejax.limits.ThresholdDrop`)."""
    groups_per_expert: int = static(1)
    """Consecutive ids that are groups of one expert's rows, of which a token uses one at most."""
    parts_per_expert: int = static(1)
    """Ids that are parts of one expert, of which a token uses as many as are valid: a choice of the router is so many
    columns."""
    zero_experts: int = static(0)
    """Zero-computation experts (LongCat): their pairs return the token times the weight. They take no row, no limit
    drops them, and a limit's mean load is that of the other experts."""


@pytree
class SoftRouting:
    """A dense mixture: every slot mixes all tokens and every token mixes all slots (Soft MoE). Einsum dispatch only."""

    dispatch: Float[Array, "T E C"]
    combine: Float[Array, "T E C"]
    probs: Float[Array, "T E"]


@pytree
class TokenClass:
    """A class of each token (words, digits, ...), by which the layers count loads apart. It changes no routing."""

    id: Int[Array, "T"]
    """In ``[0, count)``; padding may hold anything."""
    count: int = static(0)


VIRTUAL = "virtual_rank"
"""Axis over virtual ranks."""


@pytree
class RouteContext:
    """All that a router or a limit sees beside its own arguments.

    Run-time settings are arrays, so that changing one never recompiles. Every field has a neutral default.
    """

    key: PRNGKeyArray | None = None
    """Random key of this layer and step; None where nothing may be random."""
    mask: Bool[Array, "T"] | None = None
    """True for real tokens. None: all are real."""
    token_ids: Int[Array, "T"] | None = None
    positions: Int[Array, "T"] | None = None
    request_ids: Int[Array, "T"] | None = None
    """One number for each text that the model sees as one; unique over the batch."""
    modality: Int[Array, "T"] | None = None
    token_class: TokenClass | None = None
    """Only counted: ``MoEMetrics.by_class``. None: loads are not kept apart, and the program has no trace of it."""
    local_experts: Int[Array, "e"] | None = None
    """Expert ids that this rank hosts; None: all of them. Empty where ranks host parts of experts."""
    loads: Float[Array, "E"] | None = None
    """Pairs for each expert, over all ranks where a collective has made them."""
    axis_name: str | None = static(None)
    """Axis over the ranks of expert parallelism, real or :data:`VIRTUAL`; None on one rank. What is summed over it is
    summed by ``moejax.limits.pieces.over_ranks``: over virtual ranks of several devices JAX has no collectives."""
    expert_dim: int = static(0)
    """Hidden width F of a routed expert; 0: not known."""
    train: bool = static(False)
    """Training adds noise and jitter; evaluation does not."""
    record: bool | Literal["inputs"] = static(False)
    """The layer also hands out its Routing (:class:`RoutingRecord`), with "inputs" what it was given too. False leaves
    no trace in the program."""
    neurons: bool = static(False)
    """The layer also hands out what its experts' neurons did (:class:`NeuronSums`). False leaves no trace."""


@pytree
class DispatchPlan:
    """Where every pair goes: rows sorted by expert, and the way back.

    ``P`` (``token_of_row.shape[0]``) is static. Rows past ``sum(group_sizes)`` belong to no pair.
    """

    token_of_row: Int[Array, "P"]
    """Source token of each row; ``T`` (out of bounds) for rows that hold no pair."""
    row_of_pair: Int[Array, "R K"]
    """Row of each pair; ``P`` (out of bounds) for dropped pairs."""
    pair_of_row: Int[Array, "P"]
    """Flat pair (``r * K + k``) of each row; ``R * K`` (out of bounds) for rows that hold no pair."""
    group_sizes: Int[Array, "E"]
    """Rows of each expert that computes. Rows are ordered by expert, then by pair."""
    token: Int[Array, "R"] | None
    """As in :class:`Routing`."""
    overflow: Int[Array, ""]
    """Valid pairs that did not fit into ``P`` rows. Counted, never silent."""


@pytree
class ExchangePlan:
    """Where the pairs of one piece of a rank's tokens go under expert parallelism, and what the rank receives.

    Both buffers have ``P = ranks * C`` rows: C for each rank, of which the leading ones are filled, ordered by expert.
    """

    home: DispatchPlan
    """The plan of the send buffer: its rows are the pairs that travel, ``group_sizes`` counts them for each of the E
    experts, ``overflow`` those that found no row."""
    received: Int[Array, "ranks e"]
    """Rows that came from each rank for each expert of this one."""


@pytree
class TokenExchangePlan:
    """As :class:`ExchangePlan`, where a token travels once to each rank that has experts for it, and becomes the rows
    of its pairs there. The buffers of tokens have ``ranks * S`` rows, S for each rank; those of pairs, ``P = ranks *
    C``, hold where each pair's row is and its gate weight, and no row."""

    pairs: ExchangePlan
    tokens: DispatchPlan
    """Of the send buffer: its rows are tokens, its "experts" ranks, ``row_of_pair`` is ``[T, ranks]``."""
    arrived: Int[Array, "ranks"]
    """Tokens that came from each rank."""
    rows: DispatchPlan
    """From received tokens to the rows of this rank's experts, in order of expert: a token has W pairs here."""
    pair_of_place: Int[Array, "P"]
    """Flat pair of ``rows`` (``token * W + j``) of each place of the received buffer of pairs; out of bounds where it
    holds none."""

    @property
    def home(self) -> DispatchPlan:
        return self.pairs.home

    @property
    def received(self) -> Int[Array, "ranks e"]:
        return self.pairs.received


@pytree
class ExpertWeights:
    """Weights of the experts of one layer. ``gate`` is None for activations without a gate."""

    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    gate: Float[Array, "E D F"] | None = None
    up_bias: Float[Array, "E F"] | None = None
    gate_bias: Float[Array, "E F"] | None = None
    down_bias: Float[Array, "E D"] | None = None


@pytree
class ClassSums:
    """What :class:`MoEMetrics` sums over all tokens, for the tokens of each class apart (``C`` classes here)."""

    tokens: Float[Array, "C"]
    routed: Float[Array, "C E"]
    dropped: Float[Array, "C"]
    entropy_sum: Float[Array, "C"]


@pytree
class MoEMetrics:
    """What one MoE layer did, as sums over tokens, so that adding them over shards and micro-batches is exact.

    Ratios (utilisation, entropy, losses) are made from the sums once a step, in ``losses.py`` and ``metrics.py``.
    """

    tokens: Float[Array, ""]
    """Real tokens."""
    routed: Float[Array, "E"]
    """Pairs that the router made for each expert that computes, before limits."""
    computed: Float[Array, "E"]
    """Pairs that were dispatched for each expert, after limits."""
    dropped: Float[Array, ""]
    """Router pairs that a limit removed."""
    added: Float[Array, ""]
    """Pairs that a limit added to the router's (reroute, expansion), those that then overflowed among them:
    ``routed - dropped + added - overflow = computed``."""
    overflow: Float[Array, ""]
    """Pairs lost because a static buffer was too small. Zero in every published row."""
    lost_tokens: Float[Array, ""]
    """Real tokens with no pair left: they pass through the residual and the shared experts only."""
    prob_sum: Float[Array, "E'"]
    """Sum over tokens of the router's probability of each expert. ``E'`` counts zero-computation experts too."""
    gate_sum: Float[Array, "E'"]
    """Sum over tokens of the gate weight given to each expert (Shazeer's importance)."""
    load_prob_sum: Float[Array, "E'"]
    """Sum over tokens of the smooth load; for routers without noise the pairs that the router made."""
    z_sum: Float[Array, ""]
    """Sum over tokens of ``logsumexp(logits)^2``."""
    entropy_sum: Float[Array, ""]
    """Sum over tokens of the entropy of the router's normalised probabilities, in nats."""
    exceeded: Float[Array, ""] | None = None
    """Pairs that a limit kept beyond its capacity (``keep_top1``); None where no limit may."""
    skipped: Float[Array, ""] | None = None
    """Work of dispatched pairs that is not done, as their experts compute the major neurons only, in whole pairs:
    ``(dropped + skipped) / routed`` is the drop rate of 2T-Drop. None where no limit halves."""
    by_class: ClassSums | None = None
    """Some of these sums by token class, where the context names classes. They add up to the fields above."""
    zero_routed: Float[Array, "Z"] | None = None
    """Pairs of each zero-computation expert; None where the layer has none. They are in no other count of pairs."""


@pytree
class RoutingRecord:
    """What one MoE layer decided, for a trace. Each leaf has a leading axis of token shards ``G``; tokens are the
    shard's own (``t``), as limits saw them."""

    made: Routing
    """The router's pairs, before limits."""
    kept: Routing
    """The pairs after limits, before a transform remaps them."""
    key: Array | None
    """Data of the key that router and limits drew from, uint32 ``[G, n]``; None where nothing could be random."""
    inputs: Float[Array, "G t D"] | None = None
    """What router and experts read, where ``record="inputs"`` asks for it; not on virtual ranks."""


@pytree
class NeuronSums:
    """What the neurons of a layer's experts did, as sums over the pairs of each expert (``moejax.neurons``)."""

    gate: Float[Array, "E F"]
    gate_abs: Float[Array, "E F"]
    gate_up: Float[Array, "E F"]
    gate_up_abs: Float[Array, "E F"]
    output: Float[Array, "E F"]
    pairs: Float[Array, "E"]


@pytree
class LayerReport:
    """What a block says about its MoE layer beside its output."""

    metrics: MoEMetrics
    record: RoutingRecord | None = None
    """Where ``RouteContext.record`` asks for it."""
    neurons: NeuronSums | None = None
    """Where ``RouteContext.neurons`` asks for them."""


@pytree
class InFlight:
    """An MoE layer between ``begin`` and ``finish``: what has been routed and where its rows are."""

    xs: Float[Array, "P D"] | tuple[Float[Array, "P D"], ...]
    """Rows on their way to the experts, or the experts' outputs after ``compute``. Under expert parallelism one array,
    and one plan, for each piece of tokens that travels on its own."""
    plan: DispatchPlan | tuple[ExchangePlan | TokenExchangePlan, ...]
    weight: Float[Array, "R K"]
    metrics: MoEMetrics
    record: RoutingRecord | None = None
    unchanged: Float[Array, "T D"] | None = None
    """What the zero-computation experts return, already weighted (float32); None where the layer has none."""
    num_tokens: int = static(0)
    split: int = static(1)
    """Parts that the store's experts are split into while they compute (2T-Drop by sub-experts)."""
    neurons: bool = static(False)
    """As in :class:`RouteContext`."""
    extents: tuple[int, ...] | None = static(None)
    """Leading columns of F that each of an expert's groups of rows computes; None: one group, all."""


Limit = Callable[[Routing, RouteContext], Routing]
