"""Limits: pure transforms ``(Routing, RouteContext) -> Routing`` that decide which pairs survive, or add some.

A limit is a frozen dataclass registered as a pytree: its numbers are arrays, so that sweeping a capacity factor does
not recompile, and it can be passed through ``jit`` like any value. A limit clears ``valid``; it never removes an entry,
and what it adds stands in appended columns. It sees the tokens of one rank. Which limit for what: ``docs/limits.md``.

Letters: T tokens, E experts, R routing rows, K choices per row.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.limits.budget import DeviceBudget, MeasuredBudget
from moejax.limits.drop import ExpertDrop, TokenDrop
from moejax.limits.expand import ExpandedDrop, Reroute
from moejax.limits.pieces import DropOrder, mean_load, rank_in_expert
from moejax.limits.registry import (
    LIMITS,
    check,
    describe,
    device_budget,
    expanded_drop,
    expert_drop,
    measured_budget,
    of_config,
    parse,
    reroute,
    token_drop,
)
from moejax.routing import computing
from moejax.types import RouteContext, Routing

__all__ = [
    "LIMITS",
    "DeviceBudget",
    "DropOrder",
    "ExpandedDrop",
    "ExpertDrop",
    "MeasuredBudget",
    "Reroute",
    "TokenDrop",
    "apply",
    "check",
    "describe",
    "device_budget",
    "expanded_drop",
    "expert_drop",
    "for_layer",
    "mean_load",
    "measured_budget",
    "of_config",
    "parse",
    "rank_in_expert",
    "reroute",
    "token_drop",
    "vary_by_layer",
]


def vary_by_layer(limits: tuple) -> bool:
    """Whether a limit has a factor for each MoE layer."""
    return any(jnp.ndim(getattr(limit, "factor", 0.0)) for limit in limits)


def for_layer(limits: tuple, number: int | Int[Array, ""]) -> tuple:
    """The limits of one layer, counted among the MoE layers: of factors for each of them, its own."""
    return tuple(
        dataclasses.replace(limit, factor=limit.factor[number]) if vary_by_layer((limit,)) else limit
        for limit in limits
    )


def apply(limits: tuple, routing: Routing, ctx: RouteContext) -> Routing:
    """Applies limits from first to last. Pairs of zero-computation experts cost nothing: none of them is dropped."""
    free = routing.valid & ~computing(routing)
    for limit in limits:
        routing = limit(routing, ctx)
    if not limits or not routing.zero_experts:
        return routing
    appended = routing.valid.shape[1] - free.shape[1]
    # Padded, not set into a slice: XLA's CPU compiler crashes on the latter under shard_map (JAX 0.11.2).
    return dataclasses.replace(routing, valid=routing.valid | jnp.pad(free, ((0, 0), (0, appended))))
