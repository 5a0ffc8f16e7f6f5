"""The MoE layer: three calls that are separable in time, and the only place that knows the order of the stages.

``begin`` routes, limits, prefetches and starts dispatch; ``compute`` runs the grouped FFN on what has arrived;
``finish`` makes the return trip and the weighted combine. A block that wants communication or offloading hidden behind
other work calls them apart (seam 6); everybody else calls the layer.

Each call runs on every device's own tokens (``dispatch.per_shard``), so between the calls every leaf of an InFlight has
a leading shard axis.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from moejax import dispatch, experts, limits, neurons, partition, routing
from moejax.config import MoEConfig
from moejax.partition import ExpertTransform
from moejax.sharding import ArraySpec, create
from moejax.types import (
    Activation,
    ClassSums,
    ExpertWeights,
    InFlight,
    LayerReport,
    Limit,
    MoEMetrics,
    RouteContext,
    Routing,
    RoutingRecord,
    TokenClass,
)


class Router(nnx.Module):
    """Holds the arrays that a router family declares; routing itself is a pure function (``moejax.routing``)."""

    def __init__(self, config: MoEConfig, dim: int, key: PRNGKeyArray, scale: float) -> None:
        self.config = config.router
        self.family = routing.family(config.router, config.num_experts, zero_experts=config.zero_experts)
        specs = routing.router_arrays(config.router, dim, config.num_experts + config.zero_experts)
        keys = jax.random.split(key, len(specs))
        self.arrays = nnx.Dict({n: create(s, k, scale) for (n, s), k in zip(sorted(specs.items()), keys, strict=True)})

    def weights(self) -> dict[str, Array]:
        return {name: variable[...] for name, variable in self.arrays.items()}


class MoELayer(nnx.Module):
    """Routed experts, and shared experts beside them where the config has some."""

    def __init__(
        self, config: MoEConfig, dim: int, activation: Activation, key: PRNGKeyArray, scale: float = 1.0
    ) -> None:
        keys = jax.random.split(key, 4)
        self.config = config
        self.activation: Activation = activation
        self.router = Router(config, dim, keys[0], scale)
        self.store = experts.DeviceStore(
            config.num_experts, dim, config.expert_dim, activation, keys[1], scale, config.expert_bias, config.parts,
            config.parts_apart,
        )  # fmt: skip
        self.transforms: tuple[ExpertTransform, ...] = ()
        width = shared_width(config)
        gated = config.shared_experts and config.shared_gate == "sigmoid"
        self.shared = experts.DenseFFN(dim, width, activation, keys[2], scale) if width else None
        self.shared_gate = (
            create(ArraySpec((dim, 1), ("embed", "router"), fan_in=dim), keys[3], scale) if gated else None
        )

    def begin(
        self, z: Float[Array, "B S D"], ctx: RouteContext, extra_limits: tuple[Limit, ...] | None = None
    ) -> InFlight:
        """Routes ``z``, applies limits, and dispatches.

        Args:
          z: what the router reads and the experts compute. For the standard wiring the FFN's input.
          ctx: per-token leaves are ``[B, S]`` here; they are flattened inside.
          extra_limits: limits instead of the config's own; None takes the config's.
        """
        chosen = limits.of_config(self.config) if extra_limits is None else extra_limits
        in_force, transforms = chosen, self.transforms
        config, router, fam = self.config, self.router.config, self.router.family
        zero_experts, weigh_input = config.zero_experts, config.weigh == "input"
        dispatcher = dispatch.in_force(config)
        # Limits, draws, and experts that choose see ranks. Without these the tokens need not divide by them.
        virtual = config.virtual_ranks if chosen or ctx.key is not None or not fam.causal else 1
        tokens = dataclasses.replace(ctx, key=None, loads=None, local_experts=None)

        def on_shard(z: Array, tokens: RouteContext, whole: tuple) -> tuple[InFlight, Routing]:
            weights, in_force, transforms, key, loads = whole
            x = z.reshape(-1, z.shape[-1])
            flat = jax.tree.map(lambda leaf: leaf.reshape(-1), tokens)
            flat = dataclasses.replace(flat, key=key, loads=loads, expert_dim=config.expert_dim)

            def on_rank(x: Array, mine: RouteContext) -> tuple[Routing, Routing]:
                with jax.named_scope("route"):
                    made = dataclasses.replace(fam.route(x, weights, mine, router), zero_experts=zero_experts)
                with jax.named_scope("limit"):
                    return made, limits.apply(in_force, made, mine)

            ranks = dispatch.expert_ranks() if dispatcher.split_experts else 1
            made, kept, seen = dispatch.decide(
                on_rank, x, flat, config.num_experts, ranks=ranks, virtual_ranks=virtual, apart=config.parts_apart
            )
            inputs = x if flat.record == "inputs" and virtual == 1 else None
            record = RoutingRecord(made, kept, _key_data(seen.key), inputs) if flat.record else None
            if virtual > 1:
                made, kept = dispatch.merged(made), dispatch.merged(kept)
            for transform in transforms:
                kept = transform.remap(kept)
            how = partition.parting(kept, config.expert_dim, config.parts, config.parts_apart)
            table = partition.prepared(kept, how)
            with jax.named_scope("dispatch"):
                xs, plan = dispatcher.send(x, table, weigh=weigh_input)
            overflow, sent = dispatcher.overflow(plan), dispatcher.sent(table, plan)
            if table is not kept:
                sent, overflow = partition.merged_pairs(kept, table, sent)
            flight = InFlight(
                xs=xs,
                plan=plan,
                weight=jnp.ones_like(table.weight) if weigh_input else table.weight,
                metrics=summarise(made, kept, flat, overflow, sent, how.skipped),
                record=record,
                unchanged=dispatch.unchanged(x, table),
                num_tokens=x.shape[0],
                neurons=flat.neurons,
                split=how.split,
                extents=how.extents,
            )
            return flight, table

        whole = (self.router.weights(), in_force, transforms, ctx.key, ctx.loads)
        flight, kept = dispatch.per_shard(on_shard, (z, tokens), whole)
        self.store.prefetch(kept)
        if virtual > 1 and flight.record is not None:  # a rank of the record is a virtual one
            flight = dataclasses.replace(flight, record=jax.tree.map(dispatch.merge_shards, flight.record))
        return flight

    def compute(self, flight: InFlight) -> InFlight:
        """Runs each expert on its rows."""
        weights = self.store.get()
        for transform in self.transforms:
            weights = transform.weights(weights)
        weights = partition.split(weights, flight.split)
        activation, implementation = self.activation, self.config.implementation
        if self.config.dispatcher == "dense":
            implementation = "ref"
        dispatcher = dispatch.in_force(self.config)

        def on_shard(xs: Any, group_sizes: Any, weights: ExpertWeights) -> Any:
            def ffn(rows: Array, sizes: Array) -> Array:
                return experts.grouped_ffn(rows[0], sizes[0], weights, activation, implementation, flight.extents)

            with jax.named_scope("experts"):
                return jax.tree.map(ffn, xs, group_sizes)

        sizes = dispatcher.group_sizes(flight.plan)
        ys = dispatch.per_shard(on_shard, (flight.xs, sizes), weights, split_experts=dispatcher.split_experts)
        return dataclasses.replace(flight, xs=ys)

    def finish(self, flight: InFlight, shape: tuple[int, ...]) -> tuple[Float[Array, "B S D"], MoEMetrics]:
        """Combines the experts' outputs into ``shape`` and sums the metrics over devices."""
        dispatcher = dispatch.in_force(self.config)

        def on_shard(ys: Any, weight: Array, plan: Any, unchanged: Array | None, whole: None) -> Array:
            del whole
            ys, plan = jax.tree.map(lambda leaf: leaf[0], (ys, plan))
            with jax.named_scope("combine"):
                y = dispatcher.give_back(ys, weight[0], plan, flight.num_tokens)
                y = y if unchanged is None else (y + unchanged[0]).astype(y.dtype)
                return y.reshape(-1, *shape[1:])

        arrived = (flight.xs, flight.weight, flight.plan, flight.unchanged)
        y = dispatch.per_shard(on_shard, arrived, None, stacked=False)
        return y, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), flight.metrics)

    def shared_output(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"] | None:
        """Output of the shared experts, scaled by their gate where there is one; None without shared experts."""
        if self.shared is None:
            return None
        y = self.shared(x)
        if self.shared_gate is not None:
            y = jax.nn.sigmoid(x.astype(jnp.float32) @ self.shared_gate[...]).astype(y.dtype) * y
        return y

    def __call__(
        self, x: Float[Array, "B S D"], ctx: RouteContext, extra_limits: tuple[Limit, ...] | None = None
    ) -> tuple[Float[Array, "B S D"], MoEMetrics]:
        y, report = self.reported(x, ctx, extra_limits)
        return y, report.metrics

    def reported(
        self, x: Float[Array, "B S D"], ctx: RouteContext, extra_limits: tuple[Limit, ...] | None = None
    ) -> tuple[Float[Array, "B S D"], LayerReport]:
        """The layer's output, with its record beside the metrics where ``ctx.record`` asks for one."""
        return self.complete(self.begin(x, ctx, extra_limits), x)

    def complete(self, flight: InFlight, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], LayerReport]:
        """What is left to do after ``begin(x, ...)``, at once: ``compute``, ``finish`` and the shared experts."""
        did = neurons.of_layer(flight, self.store.get(), self.activation, self.config) if flight.neurons else None
        y, metrics = self.finish(self.compute(flight), x.shape)
        shared = self.shared_output(x)
        return (y if shared is None else y + shared), LayerReport(metrics, flight.record, did)


def shared_width(config: MoEConfig) -> int:
    """Hidden width of the shared experts' FFN; 0 without shared experts."""
    return config.shared_dim or config.shared_experts * config.expert_dim


def _key_data(key: PRNGKeyArray | None) -> Array | None:
    return None if key is None else jax.random.key_data(key)


def summarise(
    made: Routing,
    kept: Routing,
    ctx: RouteContext,
    overflow: Array,
    sent: Routing | None = None,
    skipped_share: float = 0.5,
) -> MoEMetrics:
    """What the router made and what is left of it, as sums over this shard's tokens.

    Args:
      sent: ``kept`` without the pairs that overflowed a buffer; None: none did.
      skipped_share: of an expert, what a pair of level 1 leaves out.
    """
    sent = kept if sent is None else sent
    num_tokens, num_choices = made.probs.shape
    num_experts = num_choices - made.zero_experts
    mask = routing.token_mask(ctx, num_tokens)
    real = mask.astype(jnp.float32)
    pairs = per_expert(made, made.valid.astype(jnp.float32), num_choices)
    # A remap may split a pair into P pieces and renumber experts; loads are reported per expert in force.
    in_force = sent.probs.shape[1] - sent.zero_experts
    computed = per_expert(sent, sent.valid.astype(jnp.float32), in_force)
    shared_width = min(made.valid.shape[1], kept.valid.shape[1])
    lost = made.valid[:, :shared_width] & ~kept.valid[:, :shared_width]
    added = (
        jnp.sum(kept.valid, dtype=jnp.float32)
        - jnp.sum(made.valid, dtype=jnp.float32)
        + jnp.sum(lost, dtype=jnp.float32)
    )
    token = jnp.arange(num_tokens) if kept.token is None else kept.token
    pairs_of_token = jnp.zeros_like(real).at[token].add(jnp.sum(sent.valid, axis=1, dtype=jnp.float32))
    normal = made.probs / jnp.maximum(jnp.sum(made.probs, axis=-1, keepdims=True), 1e-20)
    entropy = -jnp.sum(jax.scipy.special.xlogy(normal, normal), axis=-1)
    z = jax.scipy.special.logsumexp(made.logits, axis=-1) ** 2
    load_prob_sum = pairs if made.load_prob is None else jnp.sum(made.load_prob * real[:, None], axis=0)
    return MoEMetrics(
        tokens=jnp.sum(real),
        routed=pairs[:num_experts],
        computed=computed,
        dropped=jnp.sum(lost, dtype=jnp.float32),
        added=added,
        overflow=overflow.astype(jnp.float32),
        lost_tokens=jnp.sum(jnp.where(pairs_of_token > 0, 0.0, real)),
        prob_sum=jnp.sum(normal * real[:, None], axis=0),
        gate_sum=per_expert(made, jnp.where(made.valid, made.weight, 0.0), num_choices),
        load_prob_sum=load_prob_sum,
        z_sum=jnp.sum(z * real),
        entropy_sum=jnp.sum(jax.lax.stop_gradient(entropy) * real),
        by_class=None if ctx.token_class is None else _by_class(made, lost, real, entropy, ctx.token_class),
        zero_routed=pairs[num_experts:] if made.zero_experts else None,
        exceeded=None if kept.exceeded is None else jnp.sum(kept.exceeded),
        skipped=None if sent.level is None else skipped_share * jnp.sum(sent.valid & (sent.level == 1)),
    )


def _by_class(made: Routing, lost: Array, real: Array, entropy: Array, classes: TokenClass) -> ClassSums:
    """Sums of each class's tokens. A product with 0s and 1s at full precision: counts stay whole numbers."""
    one_hot = (classes.id[:, None] == jnp.arange(classes.count)) * real[:, None]  # [T, C]; padding is in no class
    of_row = one_hot if made.token is None else one_hot[made.token]  # [R, C]
    num_experts = made.probs.shape[1] - made.zero_experts
    hit = made.expert[..., None] == jnp.arange(num_experts, dtype=made.expert.dtype)
    pairs = jnp.sum(hit & made.valid[..., None], axis=1, dtype=jnp.float32)  # [R, E]
    return ClassSums(
        tokens=jnp.sum(one_hot, axis=0),
        routed=jnp.matmul(of_row.T, pairs, precision=jax.lax.Precision.HIGHEST),
        dropped=jnp.sum(jnp.where(lost, 1.0, 0.0)[..., None] * of_row[:, None], axis=(0, 1)),
        entropy_sum=jnp.sum(jnp.where(one_hot > 0, jax.lax.stop_gradient(entropy)[:, None], 0.0), axis=0),
    )


def per_expert(table: Routing, value: Float[Array, "R K"], num_experts: int) -> Float[Array, "E"]:
    """Sum of ``value`` over the pairs of each expert, as a fused compare-and-sum (no scatter, deterministic)."""
    hit = table.expert[..., None] == jnp.arange(num_experts, dtype=table.expert.dtype)
    return jnp.sum(jnp.where(hit, value[..., None], 0.0), axis=(0, 1))
