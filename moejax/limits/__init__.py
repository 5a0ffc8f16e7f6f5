"""Limits: pure transforms ``(Routing, RouteContext) -> Routing`` that decide which pairs survive, or add some.

A limit is a frozen dataclass registered as a pytree: its numbers are arrays, so that sweeping a capacity factor does
not recompile, and it can be passed through ``jit`` like any value. A limit clears ``valid``; it never removes an entry,
and what it adds stands in appended columns. It sees the tokens of one rank. Which limit for what: ``docs/limits.md``.

Letters: T tokens, E experts, R routing rows, K choices per row.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.limits.baselines import EfficientSkip, OpportunisticDrop, score_ratios
from moejax.limits.budget import DeviceBudget, MeasuredBudget
from moejax.limits.drop import ExpertDrop, TokenDrop
from moejax.limits.expand import ExpandedDrop, Reroute
from moejax.limits.pieces import DropOrder, major_columns, mean_load, rank_in_expert
from moejax.limits.registry import (
    BY_LAYER,
    LIMITS,
    check,
    check_ranks,
    describe,
    device_budget,
    expanded_drop,
    expert_drop,
    measured_budget,
    of_config,
    opportunistic_drop,
    parse,
    reroute,
    skip_second,
    threshold_drop,
    token_drop,
)
from moejax.limits.threshold import Parting, ThresholdDrop, halving, normalised
from moejax.routing import computing
from moejax.types import Limit, RouteContext, Routing

__all__ = [
    "LIMITS",
    "DeviceBudget",
    "DropOrder",
    "EfficientSkip",
    "ExpandedDrop",
    "ExpertDrop",
    "MeasuredBudget",
    "OpportunisticDrop",
    "Parting",
    "Reroute",
    "ThresholdDrop",
    "TokenDrop",
    "apply",
    "check",
    "check_ranks",
    "describe",
    "device_budget",
    "expanded_drop",
    "expert_drop",
    "for_layer",
    "halving",
    "major_columns",
    "mean_load",
    "measured_budget",
    "normalised",
    "of_config",
    "opportunistic_drop",
    "parse",
    "rank_in_expert",
    "reroute",
    "score_ratios",
    "skip_second",
    "threshold_drop",
    "token_drop",
    "vary_by_layer",
]


def vary_by_layer(limits: tuple) -> bool:
    """Whether a limit has a number for each MoE layer."""
    return any(jnp.ndim(getattr(limit, name, 0.0)) for limit in limits for name in BY_LAYER)


def for_layer(limits: tuple, number: int | Int[Array, ""]) -> tuple:
    """The limits of one layer, counted among the MoE layers: of numbers for each of them, its own."""

    def its_own(limit: Limit) -> Limit:
        varying = {name: getattr(limit, name) for name in BY_LAYER if jnp.ndim(getattr(limit, name, 0.0))}
        return dataclasses.replace(limit, **{n: v[number] for n, v in varying.items()}) if varying else limit  # ty: ignore

    return tuple(map(its_own, limits))


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
