"""The decoder language model: embeddings, groups of stacked blocks, final norm, logits.

Layers that repeat are stacked along a leading axis and run by ``jax.lax.scan``, so that compile time does not grow with
depth. A placement of MoE layers ("every second", "all but the first") becomes a list of groups: each group is a pattern
of blocks (dense or MoE) and a number of repeats.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.attention import NOWHERE, AttentionInput, BlockCache, LayerCache, attention_input, empty_cache
from moejax.blocks import WIRINGS
from moejax.config import ModelConfig
from moejax.limits import for_layer, of_config, vary_by_layer
from moejax.mtp import Predictions, make_modules, predict
from moejax.norm import make_norm
from moejax.sharding import ArraySpec, create
from moejax.types import LayerReport, Limit, MoEMetrics, NeuronSums, RouteContext, RoutingRecord, TokenClass, pytree


@pytree
class ModelOutput:
    logits: Float[Array, "B S V"]
    """Float32."""
    metrics: MoEMetrics | None
    """Sums over the batch with a leading axis of MoE layers; None for a model without experts."""
    cache: "Cache | None" = None
    routing: RoutingRecord | None = None
    """Each MoE layer's Routing, ``[L_moe, G, ...]``, where ``record`` asked for it."""
    further: Predictions | None = None
    """Of the multi-token-prediction modules, where ``mtp`` asked for it; ``metrics`` are the main model's alone."""
    neurons: NeuronSums | None = None
    """Of each MoE layer, ``[L_moe, E, F]``, where ``neurons`` asked for them."""


@pytree
class Cache:
    """Key/value cache of all layers, and how many tokens each row holds."""

    layers: tuple[tuple[BlockCache, ...], ...]
    """For each group, for each block of its pattern: stacked over the group's repeats."""
    length: Int[Array, "B"]
    """Real tokens appended so far."""

    @property
    def places(self) -> int:
        """How many tokens each row can hold."""
        return max(leaf.shape[2] for leaf in jax.tree.leaves(self.layers))


def layer_groups(config: ModelConfig) -> list[tuple[tuple[bool, ...], int]]:
    """``[(pattern, repeats)]``: which layers are MoE, as repeated patterns that cover ``num_layers``.

    Layers of ``moe.dense_layers`` may stand anywhere: :func:`repeated_patterns` then finds the groups.
    """
    moe = config.moe
    is_moe = [
        i >= moe.first_dense and (i - moe.first_dense) % moe.every == moe.every - 1 for i in range(config.num_layers)
    ]
    if any(is_moe[i] for i in moe.dense_layers):
        return list(repeated_patterns(tuple(flag and i not in moe.dense_layers for i, flag in enumerate(is_moe))))
    groups: list[tuple[tuple[bool, ...], int]] = []
    if moe.first_dense:
        groups.append(((False,), min(moe.first_dense, config.num_layers)))
    rest = is_moe[moe.first_dense :]
    repeats, tail = divmod(len(rest), moe.every)
    if repeats:
        groups.append((tuple(rest[: moe.every]), repeats))
    if tail:
        groups.append((tuple(rest[-tail:]), 1))
    return groups


@functools.cache
def repeated_patterns(flags: tuple[bool, ...]) -> list[tuple[tuple[bool, ...], int]]:
    """``[(pattern, repeats)]`` that spell ``flags`` with the fewest blocks to compile, then the fewest groups."""
    end = len(flags)
    best: list[tuple[int, int, list]] = [(0, 0, [])] * (end + 1)  # from each layer on: blocks, groups, the groups
    for start in reversed(range(end)):
        found = []
        for width in range(1, end - start + 1):
            pattern = flags[start : start + width]
            place, repeats = start, 0
            while flags[place : place + width] == pattern:
                place, repeats = place + width, repeats + 1
                blocks, groups, rest = best[place]
                found.append((blocks + width, groups + 1, [(pattern, repeats), *rest]))
        best[start] = min(found, key=lambda choice: choice[:2])
    return best[0][2]


def moe_layer_ids(config: ModelConfig) -> list[int]:
    """Indices of the MoE layers, in order."""
    flags = [flag for pattern, repeats in layer_groups(config) for flag in pattern * repeats]
    return [i for i, flag in enumerate(flags) if flag]


def moe_layer_numbers(config: ModelConfig) -> list[np.ndarray | None]:
    """Each layer's number among the MoE layers (of a dense one the next MoE layer's), for each group of
    :func:`layer_groups`, ``[repeats, blocks]``."""
    before = np.searchsorted(moe_layer_ids(config), np.arange(config.num_layers))
    return [*_by_group(config, before.tolist(), np.int32)]


def requests(segment_ids: Int[Array, "B S"] | None, tokens: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """A number for each text that the model sees as one: a document within a row, all of a row without documents."""
    batch, seq = tokens.shape
    row = jnp.arange(batch, dtype=jnp.int32)[:, None] * (seq + 1)  # documents are counted from 1, at most one a token
    return jnp.broadcast_to(row, tokens.shape) if segment_ids is None else row + segment_ids


def layer_windows(config: ModelConfig) -> list[Int[np.ndarray, "repeats blocks"]] | None:
    """The sliding window of each layer, for each group of :func:`layer_groups`; None where no layer has one.

    A layer without one gets a window that no sequence fills.
    """
    a = config.attention
    if not a.window:
        return None
    layers = [a.window if i in a.window_layers or not a.window_layers else NOWHERE for i in range(config.num_layers)]
    return _by_group(config, layers, np.int32)


def layer_facts(config: ModelConfig) -> list[dict[str, np.ndarray]]:
    """What each layer's attention is told apart from the tokens, for each group of :func:`layer_groups`: fields of
    ``AttentionInput`` by name, ``[repeats, blocks]``. A field that is one for all layers is left out."""
    facts: dict[str, list[np.ndarray]] = {}
    if (windows := layer_windows(config)) is not None:
        facts["window"] = windows
    if without := config.attention.no_rope_layers:
        facts["rotates"] = _by_group(config, [i not in without for i in range(config.num_layers)], np.bool_)
    return [{name: values[i] for name, values in facts.items()} for i in range(len(layer_groups(config)))]


def _by_group(config: ModelConfig, layers: list, dtype: Any) -> list[np.ndarray]:
    """One value for each layer, as each group's ``[repeats, blocks]``."""
    values, first = [], 0
    for pattern, repeats in layer_groups(config):
        end = first + len(pattern) * repeats
        values.append(np.asarray(layers[first:end], dtype).reshape(repeats, len(pattern)))
        first = end
    return values


class BlockGroup(nnx.Module):
    """One pattern of blocks; built under ``vmap`` over keys, it holds its repeats stacked."""

    def __init__(self, config: ModelConfig, pattern: tuple[bool, ...], key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, len(pattern))
        block = WIRINGS[config.wiring]
        self.blocks = nnx.List([block(config, is_moe, k) for is_moe, k in zip(pattern, keys, strict=True)])

    def __call__(
        self,
        x: Array,
        tokens: AttentionInput,
        ctx: RouteContext,
        limits: tuple[Limit, ...] | None,
        caches: tuple[BlockCache, ...] | None,
        facts: dict[str, Array],
        numbers: Int[Array, "blocks"] | None,
    ) -> tuple[Array, tuple[LayerReport, ...], tuple[BlockCache, ...] | None]:
        reports, new_caches = [], []
        for i, block in enumerate(self.blocks):
            key = None if ctx.key is None else jax.random.fold_in(ctx.key, i)
            block_ctx = dataclasses.replace(ctx, key=key)
            seen = dataclasses.replace(tokens, **{name: values[i] for name, values in facts.items()})
            its_limits = limits if numbers is None or limits is None else for_layer(limits, numbers[i])
            x, report, c = block(x, seen, block_ctx, its_limits, None if caches is None else caches[i])
            if report is not None:
                reports.append(report)
            if c is not None:
                new_caches.append(c)
        return x, tuple(reports), tuple(new_caches) if caches is not None else None


class Decoder(nnx.Module):
    """Decoder-only language model with dense and MoE layers in any placement."""

    def __init__(self, config: ModelConfig, key: PRNGKeyArray) -> None:
        self.config = config
        groups = layer_groups(config)
        keys = jax.random.split(key, len(groups) + 2)
        embed = ArraySpec((config.vocab_size, config.dim), ("vocab", "embed"), fan_in=config.dim)
        self.embed = create(embed, keys[0], config.init_scale)
        self.unembed = None if config.tie_embeddings else create(embed, keys[1], config.init_scale)
        self.unembed_bias = (
            create(ArraySpec((config.vocab_size,), ("vocab",), init="zeros"), key) if config.logit_bias else None
        )
        self.final_norm = make_norm(config)
        self.mtp = make_modules(config, groups[-1][0][-1], key)
        self.groups = nnx.List(
            [
                jax.vmap(lambda k, pattern=pattern: BlockGroup(config, pattern, k))(
                    jax.random.split(group_key, repeats)
                )
                for (pattern, repeats), group_key in zip(groups, keys[2:], strict=True)
            ]
        )

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        mask: Bool[Array, "B S"] | None = None,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        limits: tuple[Limit, ...] | None = None,
        token_class: TokenClass | None = None,
        train: bool = False,
        record: bool | Literal["inputs"] = False,
        at: Int[Array, "B"] | None = None,
        prompt: Int[Array, "B"] | None = None,
        mtp: bool = False,
        neurons: bool = False,
    ) -> ModelOutput:
        """Logits of the next token at every place, or at one place of each row.

        Args:
          tokens: token ids.
          positions: rotary positions; default counts from 0 (from ``cache.length`` with a cache).
          segment_ids: documents; attention stays within one. Not with a cache.
          mask: real tokens; padding may stand anywhere. No token sees it, it enters no cache, takes no expert
            capacity and counts in no metric; a token's default position is the number of real tokens before it.
          cache: from :meth:`init_cache`; the new tokens are appended and the updated cache returned.
          key: for routers or limits that draw at random.
          limits: transforms of every layer's Routing instead of the config's own; None takes those.
          token_class: a class of each token, ``[B, S]``: loads are also summed by class (``metrics.by_class``).
          train: switches on router noise and jitter.
          record: also returns each layer's Routing before and after limits (``docs/traces.md``); "inputs": and what the
            layer's router and experts read.
          at: the only place of each row whose logits are wanted (``[B, 1, V]``); those of a long prompt are large.
          prompt: length of each row's prompt, in place of ``mask``: what follows is padding, and the cache begins anew
            with it. Attention is over these tokens alone, by a fused core where there is one.
          mtp: also runs the multi-token-prediction modules on these tokens (``further``). Not with a cache or ``at``.
          neurons: also returns what the neurons of each layer's experts did (``moejax.importance``).
        """
        config = self.config
        batch, seq = tokens.shape
        if cache is not None and segment_ids is not None:
            raise ValueError("a cache holds one document for each row: leave segment_ids out")
        if mtp and (self.mtp is None or cache is not None or at is not None):
            raise ValueError("mtp=True needs model.mtp_layers, and whole sequences: no cache, no at")
        if prompt is not None:
            if cache is None or mask is not None:
                raise ValueError("prompt=lengths says which tokens are real, and fills a cache: no mask, and a cache")
            mask, cache = jnp.arange(seq) < prompt[:, None], dataclasses.replace(cache, length=jnp.zeros_like(prompt))
        start = None if cache is None else cache.length
        places = 0 if cache is None else cache.places
        attention = attention_input(positions, segment_ids, mask, start, tokens.shape, places)
        attention = dataclasses.replace(attention, prompt=prompt is not None)
        ctx = RouteContext(
            key=key, mask=mask, token_ids=tokens, positions=attention.positions,
            request_ids=requests(segment_ids, tokens), token_class=token_class, train=train, record=record,
            neurons=neurons,
        )  # fmt: skip
        x = self._embedded(tokens)
        facts = layer_facts(config)
        numbers: list[np.ndarray | None] = [None] * len(facts)
        if vary_by_layer(in_force := of_config(config.moe) if limits is None else limits):
            limits, numbers = in_force, moe_layer_numbers(config)
        collected, caches = [], []
        for i, group in enumerate(self.groups):
            group_cache = None if cache is None else cache.layers[i]
            group_key = None if key is None else jax.random.fold_in(key, i)
            group_ctx = dataclasses.replace(ctx, key=group_key)
            x, reports, new_cache = self._run_group(
                group, x, attention, group_ctx, limits, group_cache, facts[i], numbers[i]
            )
            collected.append(reports)
            caches.append(new_cache)
        if at is not None:
            x = jnp.take_along_axis(x, at[:, None, None], axis=1)
        x = self.final_norm(x)
        logits = self._logits(x)
        further = None
        if mtp:
            last = None if limits is None else for_layer(limits, -1)
            further = predict(
                self.mtp or (), x, ctx, last, embed=self._embedded, head=self._logits,
                facts={name: jnp.asarray(values[-1, -1]) for name, values in facts[-1].items()},
                remat=functools.partial(_rematerialised, choice=config.remat),
            )  # fmt: skip
        if cache is not None:
            added = jnp.full(batch, seq, jnp.int32) if mask is None else jnp.sum(mask, axis=1, dtype=jnp.int32)
            cache = Cache(layers=tuple(caches), length=cache.length + added)
        report = _stack_layers(collected)
        if report is None:
            return ModelOutput(logits=logits, metrics=None, cache=cache, further=further)
        return ModelOutput(logits, report.metrics, cache, report.record, further, report.neurons)

    def _embedded(self, tokens: Int[Array, "B S"]) -> Array:
        scale = math.sqrt(self.config.dim) if self.config.scale_embeddings else 1.0
        return (self.embed[...][tokens] * scale).astype(self.config.compute_dtype)

    def _logits(self, x: Array) -> Float[Array, "B S V"]:
        table, cap = self.embed if self.unembed is None else self.unembed, self.config.logit_softcap
        if self.config.logit_scale != 1:  # of D numbers, not of V
            x = (x.astype(jnp.float32) * self.config.logit_scale).astype(x.dtype)
        logits = jnp.einsum("bsd,vd->bsv", x, table[...].astype(x.dtype), preferred_element_type=jnp.float32)
        if self.unembed_bias is not None:
            logits = logits + self.unembed_bias[...]
        return cap * jnp.tanh(logits / cap) if cap else logits

    def _run_group(
        self,
        group: BlockGroup,
        x: Array,
        tokens: AttentionInput,
        ctx: RouteContext,
        limits: tuple[Limit, ...] | None,
        caches: tuple[BlockCache, ...] | None,
        facts: dict[str, np.ndarray],
        numbers: np.ndarray | None,
    ) -> tuple[Array, tuple[LayerReport, ...], tuple[BlockCache, ...] | None]:
        repeats = jax.tree.leaves(group)[0].shape[0]

        def body(carry: tuple, layer: tuple) -> tuple[tuple, tuple[LayerReport, ...]]:
            # Caches stay stacked and go from layer to layer, each writes its own places: no layer's part is copied.
            (x, caches), (blocks, i, its_facts, its_numbers) = carry, layer
            key = None if ctx.key is None else jax.random.fold_in(ctx.key, i)
            layer_ctx = dataclasses.replace(ctx, key=key)
            its_tokens = tokens if caches is None else dataclasses.replace(tokens, layer=i)
            x, reports, caches = blocks(x, its_tokens, layer_ctx, limits, caches, its_facts, its_numbers)
            return (x, caches), reports

        run = _rematerialised(body, self.config.remat)
        if self.config.layer_loop == "scan" and repeats > 1:
            (x, caches), reports = jax.lax.scan(run, (x, caches), (group, jnp.arange(repeats), facts, numbers))
            return x, reports, caches
        outs, carry = [], (x, caches)
        for i in range(repeats):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], (group, jnp.arange(repeats), facts, numbers))
            carry, out = run(carry, layer)
            outs.append(out)
        return carry[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs), carry[1]

    def init_cache(self, batch: int, max_len: int, dtype: Any = None) -> Cache:
        """An empty cache for ``max_len`` tokens in each of ``batch`` rows. What is appended beyond them is not kept."""
        config = self.config
        layers = []
        for pattern, repeats in layer_groups(config):

            def empty(repeats: int = repeats) -> LayerCache:  # arrays of its own for each: decoding donates them
                return empty_cache(config.attention, (repeats, batch, max_len), dtype or config.compute_dtype)

            layers.append(tuple((empty(), empty()) if config.wiring == "longcat" else empty() for _ in pattern))
        return Cache(layers=tuple(layers), length=jnp.zeros(batch, jnp.int32))


def _stack_layers(collected: list[tuple[LayerReport, ...]]) -> LayerReport | None:
    """Reports of groups (each block of a pattern stacked over repeats) in layer order: ``[L_moe, ...]``."""
    parts = []
    for group in collected:
        if group:  # [repeats, blocks of the pattern, ...] -> layer order
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *group)
            parts.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacked))
    if not parts:
        return None
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _rematerialised(body: Callable, choice: str) -> Callable:
    if choice == "none":
        return body
    policy = None if choice == "block" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, policy=policy)


def build(config: ModelConfig, seed: int = 0) -> Decoder:
    """A :class:`Decoder` with random weights from ``seed``. The config must have passed ``validate.check``."""
    return Decoder(config, jax.random.key(seed))
