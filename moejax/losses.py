"""Auxiliary losses of one MoE layer, as functions of the layer's summed metrics.

Every loss is a function of :class:`~moejax.types.MoEMetrics`, whose fields are sums over tokens. Sums over
micro-batches and devices add up, so a loss taken from them does not depend on how a batch was cut. Counts carry no
gradient; gradients reach the router through ``prob_sum``, ``gate_sum``, ``load_prob_sum`` and ``z_sum``.

The total auxiliary loss is the *sum over MoE layers* of ``coefficient * loss`` (Switch adds one for each layer). Logged
raw values are means over layers, so that they can be held against the value under uniform routing that each docstring
states.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import ConfigError, MoEConfig
from moejax.routing import FAMILIES
from moejax.types import MoEMetrics

LossFn = Callable[[MoEMetrics], Float[Array, ""]]
LOSSES: dict[str, LossFn] = {}
NEEDS_NOISE = {"load"}


def register(name: str) -> Callable[[LossFn], LossFn]:
    """Registers an auxiliary loss under ``name``; ``moe.losses.<name>=<coefficient>`` switches it on."""

    def add(loss: LossFn) -> LossFn:
        if name in LOSSES:
            raise ValueError(f"loss {name!r} is registered twice")
        LOSSES[name] = loss
        return loss

    return add


def pairs_by_id(m: MoEMetrics) -> Float[Array, "... E"]:
    """Pairs of each id that the router chooses among: the experts that compute, then the zero-computation ones."""
    return m.routed if m.zero_routed is None else jnp.concatenate([m.routed, m.zero_routed], axis=-1)


@register("balance")
def balance(m: MoEMetrics) -> Float[Array, ""]:
    """Load-balance loss of GShard and Switch (2101.03961, eq. 4): ``E * sum_i f_i P_i``, over all ids that the router
    chooses among: a zero-computation expert counts like any other, so that an even load computes ``k N / (N + Z)``
    experts for a token.

    ``f_i`` is the fraction of *pairs* routed to expert i (all k choices, before any limit; it sums to 1), ``P_i`` the
    mean probability of expert i over tokens. Unit: none. **1 under uniform routing for every k** (code bases that let
    ``f`` sum to k have k there); E when one expert gets everything. The gradient flows through ``P`` only.
    """
    pairs = pairs_by_id(m)
    num_experts = pairs.shape[-1]
    fraction = jax.lax.stop_gradient(pairs / jnp.maximum(jnp.sum(pairs), 1.0))
    return num_experts * jnp.sum(fraction * m.prob_sum) / jnp.maximum(m.tokens, 1.0)


@register("z")
def z(m: MoEMetrics) -> Float[Array, ""]:
    """Router z-loss of ST-MoE (2202.08906, eq. 5): mean over tokens of ``logsumexp(logits)^2``.

    Unit: nats squared. For logits that are all 0 it is ``(ln E)^2``, not 0.
    """
    return m.z_sum / jnp.maximum(m.tokens, 1.0)


@register("importance")
def importance(m: MoEMetrics) -> Float[Array, ""]:
    """Importance loss (Shazeer 2017, eqs. 6-7): ``CV(sum_t G(t))^2`` of the gate weights that each expert receives.

    Unit: none. 0 under uniform routing, ``E - 1`` when one expert gets everything. (V-MoE takes the dense probabilities
    instead of the sparse gate weights.)
    """
    return _squared_cv(m.gate_sum)


@register("load")
def load(m: MoEMetrics) -> Float[Array, ""]:
    """Load loss (Shazeer 2017, eqs. 8-11): ``CV(load)^2`` of the smooth load, the expected pairs under fresh noise.

    Unit: none. 0 under uniform routing. Defined for routers with noise only: plain counts have no gradient.
    """
    return _squared_cv(m.load_prob_sum)


def _squared_cv(x: Float[Array, "E"]) -> Float[Array, ""]:
    mean = jnp.mean(x)
    return jnp.mean((x - mean) ** 2) / jnp.maximum(mean**2, 1e-10)


def check(config: MoEConfig) -> None:
    """Raises ConfigError for an unknown loss, one that the router cannot feed, or a coefficient that is no weight."""
    for name, coefficient in config.losses:
        if name not in LOSSES:
            raise ConfigError(f"moe.losses.{name}: unknown loss; choose among {', '.join(sorted(LOSSES))}")
        if not 0 <= coefficient < float("inf"):
            raise ConfigError(f"moe.losses.{name}={coefficient}: must be a finite number, 0 or more")
        if coefficient and name in NEEDS_NOISE and not FAMILIES[config.router.name].noisy:
            noisy = ", ".join(n for n, f in sorted(FAMILIES.items()) if f.noisy)
            raise ConfigError(
                f"moe.losses.{name}={coefficient} has no gradient with router.name={config.router.name!r}, which "
                f"draws no noise: set it to 0 or choose one of: {noisy}"
            )


def total(
    metrics: MoEMetrics, coefficients: Mapping[str, float]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum over layers and losses of ``coefficient * loss``, and each raw loss as a mean over layers.

    Args:
      metrics: with a leading axis of MoE layers on every field.
      coefficients: by name; zero coefficients are computed for the log only.
    """
    raw = {name: jax.vmap(LOSSES[name])(metrics) for name in coefficients}
    weighted = sum((coefficients[name] * jnp.sum(value) for name, value in raw.items()), start=jnp.float32(0))
    return weighted, {name: jnp.mean(value) for name, value in raw.items()}
