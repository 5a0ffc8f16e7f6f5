"""Replication of hot experts: the exact alternative to dropping their tokens.

Some ranks get copies of the experts that draw the most pairs, each pair is computed by one copy, and nothing is lost.
The idea is that of DeepSeek-V3's redundant experts (2412.19437, section 3.4), made from recorded loads: copies go to
the experts with the largest load for each copy, then the copies, the heaviest first, to the rank with the least load
that has room. A layer takes a placement as its transform: ``layer.transforms = nnx.data((placement,))``. It then
gathers the copies' weights in each call; :func:`store_copies` stores them, each in its slot.

Letters: E experts, R ranks, N = R * s slots (s on each rank), T tokens, K choices per row, L layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from moejax.config import ConfigError
from moejax.sharding import Rules
from moejax.types import ExpertWeights, Routing, pytree, static


@pytree
class Replicated:
    """An ExpertTransform: N slots instead of E experts, each with the weights of one. Trained through it, an expert's
    gradient is the sum over its copies."""

    expert_of_slot: Int[Array, "N"]
    """Slots of rank r: ``[r s, (r + 1) s)``."""
    slots_of_expert: Int[Array, "E most"]
    """Slots that hold each expert, in order; those past the number of its copies repeat the first."""
    copies: Int[Array, "E"]
    stored: bool = static(False)
    """The layer's arrays are those of the slots already."""

    def weights(self, weights: ExpertWeights) -> ExpertWeights:
        if self.stored:
            return weights
        return jax.tree.map(lambda leaf: leaf[self.expert_of_slot], weights)

    def remap(self, routing: Routing) -> Routing:
        """Each pair to the copy ``token mod copies`` of its expert. Zero-computation experts stay behind all slots."""
        experts, slots = self.copies.shape[0], self.expert_of_slot.shape[0]
        token = jnp.arange(routing.expert.shape[0]) if routing.token is None else routing.token
        held = routing.expert < experts
        expert = jnp.where(held, routing.expert, 0)
        slot = self.slots_of_expert[expert, token[:, None] % self.copies[expert]]

        def in_slots(table: Float[Array, "T E"]) -> Float[Array, "T N"]:
            """Of what there is for each expert; copies share it."""
            return jnp.concatenate(
                [table[:, self.expert_of_slot] / self.copies[self.expert_of_slot], table[:, experts:]], 1
            )

        return dataclasses.replace(
            routing,
            expert=jnp.where(held, slot, routing.expert - experts + slots).astype(routing.expert.dtype),
            probs=in_slots(routing.probs),
            load_prob=None if routing.load_prob is None else in_slots(routing.load_prob),
        )


def replicate(loads: Float[np.ndarray, "E"], ranks: int, extra: int) -> Replicated:
    """The placement for ``loads`` (pairs of each expert, recorded) with ``extra`` slots beyond E / R on each rank.

    Raises:
      ConfigError: experts that do not divide over ranks, more slots than there may be, or loads that are no counts.
    """
    loads = np.asarray(loads, np.float64)
    experts = len(loads)
    if ranks < 1 or experts % ranks:
        raise ConfigError(f"ranks={ranks} does not divide the {experts} experts: choose a divisor")
    if not 0 <= extra <= experts - experts // ranks:
        raise ConfigError(
            f"extra={extra}: a rank of {ranks} holds {experts // ranks} of {experts} experts, and has use for 0 to "
            f"{experts - experts // ranks} copies more"
        )
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise ConfigError("loads must be finite and not negative: pairs of each expert")
    of_rank = experts // ranks + extra
    copies = np.ones(experts, np.int64)
    for _ in range(ranks * extra):
        share = np.where(copies < ranks, loads / copies, -1.0)  # a second copy on one rank would help nobody
        copies[np.argmax(share)] += 1
    heaviest = np.argsort(-loads / copies, kind="stable")
    held: list[list[int]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    for expert in (e for e in heaviest for _ in range(copies[e])):
        room = [r for r in range(ranks) if len(held[r]) < of_rank]
        best = min(room, key=lambda r: (expert in held[r], load[r], r))
        held[best].append(int(expert))
        load[best] += loads[expert] / copies[expert]
    expert_of_slot = np.concatenate([sorted(mine) for mine in held])
    places = [np.flatnonzero(expert_of_slot == e) for e in range(experts)]
    table = np.stack([np.concatenate([p, np.full(copies.max() - len(p), p[0])]) for p in places])
    expert_of_slot, table, copies = (jnp.asarray(a, jnp.int32) for a in (expert_of_slot, table, copies))
    return Replicated(expert_of_slot, table, copies)


def stacked(placements: Sequence[Replicated]) -> Replicated:
    """The placements of L layers as one, with a leading axis of layers, for blocks that stand stacked in a model."""
    most = max(p.slots_of_expert.shape[1] for p in placements)

    def wide(p: Replicated) -> Replicated:
        table = p.slots_of_expert
        rest = jnp.repeat(table[:, :1], most - table.shape[1], axis=1)
        return dataclasses.replace(p, slots_of_expert=jnp.concatenate([table, rest], axis=1))

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(wide, placements))


def store_copies(layer: Any, placement: Replicated, mesh: Mesh | None = None) -> None:
    """Gives each slot of an MoE layer, or of L of them that stand stacked (with a placement from :func:`stacked`), an
    array of its own for its expert's weights, and the layer ``placement`` as its transform. In place: the arrays of the
    E experts are no longer in it. What it computes stays, bit for bit; a training step would part the copies.

    Args:
      mesh: where the new arrays go, slots split over its axis "expert"; None: where the old ones are.
    """
    slots = placement.expert_of_slot

    def taken(value: Array) -> Array:
        return value[slots] if slots.ndim == 1 else jax.vmap(lambda array, ids: array[ids])(value, slots)

    def of_slots(variable: nnx.Variable) -> nnx.Variable:
        value, where = variable[...], None
        if mesh is not None:
            where = NamedSharding(mesh, Rules().spec(variable.get_metadata()["axes"], value.ndim))
        return variable.replace(jax.jit(taken, out_shardings=where)(value))

    graph, state = nnx.split(layer.store)
    held = jax.tree.map(of_slots, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    layer.store = nnx.merge(graph, held)
    layer.transforms = nnx.data((dataclasses.replace(placement, stored=True),))


def rank_loads(loads: Float[np.ndarray, "E"], ranks: int, placement: Replicated | None = None) -> np.ndarray:
    """Pairs of each rank, where the copies of an expert share its load; without ``placement`` E / R experts a rank."""
    loads = np.asarray(loads, np.float64)
    if placement is not None:
        slot = np.asarray(placement.expert_of_slot)
        loads = loads[slot] / np.asarray(placement.copies)[slot]
    return loads.reshape(ranks, -1).sum(axis=1)


def max_over_mean(loads: np.ndarray) -> float:
    """How long the busiest rank takes, as a multiple of an even share. 1 for loads of 0."""
    return float(loads.max() / loads.mean()) if loads.any() else 1.0
