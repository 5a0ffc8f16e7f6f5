"""Parts and levels of experts as the dispatcher sees them: pairs over the parts of their expert, and pairs whose expert
computes its major neurons only.

Letters: E experts, P parts of each, F expert hidden, D model, R routing rows, K choices per row.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.limits import Parting, halving
from moejax.types import ExpertWeights, Routing


def parting(routing: Routing, expert_dim: int, parts: int = 1, apart: bool = False) -> Parting:
    """What a layer does with ``routing``, whose experts of width ``expert_dim`` are stored in ``parts`` parts.

    Raises:
      ConfigError: as :func:`moejax.limits.halving`.
    """
    how = Parting(parts) if routing.level is None else halving(expert_dim, routing.major, routing.form, parts)
    return dataclasses.replace(how, apart=apart)


def prepared(routing: Routing, how: Parting) -> Routing:
    """``routing`` with the ids that the dispatcher sorts by: those of parts, or of an expert's groups of rows."""
    if how.extents is not None:
        return by_level(routing)
    return spread(routing, how.parts, how.held, how.apart) if how.parts > 1 else routing


def spread(routing: Routing, parts: int, held: int = 0, apart: bool = False) -> Routing:
    """Each pair as P pairs with the same weight, column ``k P + p`` for part p of its expert ``e``, id ``e P + p`` or
    with ``apart`` ``p E + e`` (partial transformation, 2508.18376, section 3.1). With ``held`` a pair of level 1 keeps
    that many leading parts.

    A zero-computation expert has one part; its pair's other columns are not valid. Rows that are pairs stay so: P rows
    of each.
    """
    experts = routing.probs.shape[-1] - routing.zero_experts
    part = jnp.arange(parts, dtype=routing.expert.dtype)
    computes = (routing.expert < experts)[..., None]
    expert = routing.expert[..., None]
    of_part = part * experts + expert if apart else expert * parts + part
    expert = jnp.where(computes, of_part, expert + experts * (parts - 1))
    valid = routing.valid[..., None] & (computes | (part == 0))
    if held and routing.level is not None:
        valid = valid & ((routing.level[..., None] == 0) | (part < held))
    shape = (-1, 1) if routing.token is not None else (routing.expert.shape[0], routing.expert.shape[1] * parts)

    def copied(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf[..., None], expert.shape).reshape(shape)

    return dataclasses.replace(
        routing, expert=expert.reshape(shape), valid=valid.reshape(shape), weight=copied(routing.weight),
        score=copied(routing.score), probs=_repeated(routing.probs, experts, parts, apart), level=None,
        token=None if routing.token is None else jnp.repeat(routing.token, parts), parts_per_expert=parts,
    )  # fmt: skip


def by_level(routing: Routing) -> Routing:
    """Each expert as two groups of rows: id ``2 e`` for pairs of level 0, ``2 e + 1`` for those of level 1."""
    assert routing.level is not None
    experts = routing.probs.shape[-1] - routing.zero_experts
    computes = routing.expert < experts
    expert = jnp.where(computes, 2 * routing.expert + routing.level, routing.expert + experts)
    probs = _repeated(routing.probs, experts, 2)
    return dataclasses.replace(routing, expert=expert, probs=probs, level=None, groups_per_expert=2)


def _repeated(probs: Float[Array, "T E"], experts: int, times: int, apart: bool = False) -> Float[Array, "T E'"]:
    """Columns of experts that compute several times each, next to one another or ``apart``; those of the others
    once."""
    of_experts = probs[:, :experts]
    many = jnp.tile(of_experts, (1, times)) if apart else jnp.repeat(of_experts, times, axis=1)
    return jnp.concatenate([many, probs[:, experts:]], axis=1)


def merged_pairs(routing: Routing, table: Routing, sent: Routing) -> tuple[Routing, Float[Array, ""]]:
    """``routing`` without the pairs of which a part overflowed, where ``table`` is what :func:`prepared` made of it and
    ``sent`` that without what overflowed; and how many they are."""
    arrived = sent.valid | ~table.valid
    whole = jnp.all(arrived.reshape(*routing.valid.shape, -1), axis=-1)  # parts of a pair stand together
    lost = jnp.sum(routing.valid & ~whole, dtype=jnp.float32)
    return dataclasses.replace(routing, valid=routing.valid & whole), lost


def split(weights: ExpertWeights, parts: int, apart: bool = False) -> ExpertWeights:
    """The experts of a layer as P times as many, part ``p`` with neurons ``[p F / P, (p + 1) F / P)``; its id is
    ``e P + p``, or with ``apart`` ``p E + e``.

    Their outputs add up to the expert's; each has 1 / P of the down bias. Weights are copied, but for ``down`` where
    the parts of an expert stay together.
    """
    if parts == 1:
        return weights
    axis = 0 if apart else 1

    def columns(w: Array | None) -> Array | None:
        if w is None:
            return None
        experts, *dim, width = w.shape
        cut = w.reshape(experts, *dim, parts, width // parts)
        return jnp.moveaxis(cut, -2, axis).reshape(experts * parts, *dim, width // parts)

    experts, width, dim = weights.down.shape
    down = weights.down.reshape(experts, parts, width // parts, dim)
    bias = weights.down_bias
    if bias is not None:
        bias = jnp.tile(bias / parts, (parts, 1)) if apart else jnp.repeat(bias / parts, parts, axis=0)
    return ExpertWeights(
        up=columns(weights.up), gate=columns(weights.gate),  # ty: ignore[invalid-argument-type]
        down=jnp.moveaxis(down, 1, axis).reshape(experts * parts, width // parts, dim),
        up_bias=columns(weights.up_bias), gate_bias=columns(weights.gate_bias),
        down_bias=bias,
    )  # fmt: skip
