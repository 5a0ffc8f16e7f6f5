"""Expert parallelism: tokens travel to the devices that host their experts, and the results back.

The ranks of the mesh axis "expert" host ``e = E / ranks`` consecutive experts each; where experts are stored in parts
(``moe.parts``), each part counts as one. A rank sorts its pairs by expert,
so by destination too, and fills C rows for each destination; the counts are exchanged first, then the rows
(``moejax.dispatch.exchange``); what was received is ordered by expert for the grouped FFN. The way back is the same in
reverse, and the weighted sum is made at home, in the order of k: the same sum as on one device.

Letters: T tokens, D model, R routing rows, K choices per row, E experts, e experts of one rank, C rows for each
destination, P = ranks * C.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import MoEConfig
from moejax.dispatch import rows
from moejax.dispatch.exchange import TRANSPORTS, by_expert, permuted, resolve
from moejax.dispatch.plans import local_plan
from moejax.dispatch.shards import AXIS
from moejax.types import DispatchPlan, ExchangePlan, Routing

ROUNDED = 8
"""Rows for each destination are rounded up to a multiple of this."""


def buffer_rows(
    config: MoEConfig, table: tuple[int, ...], tokens: int, ranks: int, experts: int | None = None, parts: int = 1
) -> int:
    """C: rows for each destination, of a piece of ``tokens`` tokens whose Routing is ``[R, K]``. ``experts``: those in
    force, parts counted one by one, where they are more or fewer than the config's. ``parts``: pairs that the table has
    for each of the router's.

    Worst case: every token sends as many pairs to one rank as it has choices, or as the rank has experts. That takes a
    token's valid pairs to be of different experts, which every router and limit here keeps; a table that does not may
    overflow, which is counted. Where the parts of an expert stand apart, a rank has n = E P / ranks ids, which are
    ``n // E`` parts of every expert and one more of ``n % E`` experts. With ``ep_buffer_factor`` f:
    ``ceil(f * t k parts / ranks)``, k of the router, rounded up to a multiple of 8, at most the worst case.
    """
    held = -(-(experts or config.num_experts) // ranks)
    most, choices = min(table[1], held), table[1] // parts
    if config.parts_apart and choices:  # none where rows are pairs
        of_all, some = divmod(held, config.num_experts)
        most = choices * of_all + min(choices, some)
    worst = table[0] * most
    if not config.ep_buffer_factor:
        return worst
    wanted = math.ceil(round(config.ep_buffer_factor * tokens * config.router.k * parts / ranks, 6))
    return min(worst, -(-wanted // ROUNDED) * ROUNDED)


def pieces(config: MoEConfig, tokens: int) -> list[slice]:
    """The runs of consecutive tokens that are exchanged on their own: one, or with "chunked" ``ep_chunks``."""
    count = min(config.ep_chunks, tokens) if config.ep_exchange == "chunked" else 1
    ends = [tokens * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def exchange_plan(routing: Routing, num_tokens: int, capacity: int, axis: str = AXIS) -> ExchangePlan:
    """Of this rank's pairs: where each stands in the send buffer, and how many rows come from whom.

    Of a destination's pairs the first ``capacity`` in order of expert, then pair, are sent; the others are overflow.
    """
    ranks = jax.lax.axis_size(axis)
    sorted_ = local_plan(routing, num_tokens)
    experts, pairs = sorted_.group_sizes.shape[0] // ranks, sorted_.token_of_row.shape[0]
    wanted = sorted_.group_sizes.reshape(ranks, experts)
    ends = jnp.minimum(jnp.cumsum(wanted, axis=1), capacity)
    sent = jnp.diff(ends, axis=1, prepend=0)
    of_rank = jnp.sum(wanted, axis=1)
    start = jnp.cumsum(of_rank) - of_rank

    offset = jnp.arange(capacity, dtype=jnp.int32)
    place = jnp.where(offset < ends[:, -1:], start[:, None] + offset, pairs).reshape(-1)
    destination = jnp.minimum(routing.expert // experts, ranks - 1)
    offset = sorted_.row_of_pair - start[destination]
    fits = (sorted_.row_of_pair < pairs) & (offset < capacity)
    home = DispatchPlan(
        token_of_row=sorted_.token_of_row.at[place].get(mode="fill", fill_value=num_tokens),
        row_of_pair=jnp.where(fits, destination * capacity + offset, ranks * capacity).astype(jnp.int32),
        pair_of_row=sorted_.pair_of_row.at[place].get(mode="fill", fill_value=pairs),
        group_sizes=sent.reshape(-1),
        token=routing.token,
        overflow=jnp.sum(wanted) - jnp.sum(sent),
    )
    with jax.named_scope("communicate"):
        received = jax.lax.all_to_all(sent, axis, 0, 0, tiled=True)
    return ExchangePlan(home=home, received=received)


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """The dispatcher "ep" on a mesh with an expert axis. ``send`` gives one array of rows and one plan for each piece
    of tokens; what follows depends on its own piece only, so that pieces may overlap."""

    config: MoEConfig
    split_experts: bool = True
    """Each rank computes with the weights of its own experts only."""

    @property
    def transport(self) -> str:
        """ "padded" or "ragged"."""
        exchange = self.config.ep_exchange
        return resolve("auto" if exchange == "chunked" else exchange)

    def send(
        self, x: Float[Array, "T D"], routing: Routing, *, weigh: bool = False
    ) -> tuple[tuple[Array, ...], tuple[ExchangePlan, ...]]:
        """Rows that this rank's experts compute, in order of expert, and the plans. ``weigh``: rows times their gate
        weight, before they travel."""
        move, sent, plans = TRANSPORTS[self.transport], [], []
        for part in pieces(self.config, x.shape[0]):
            table = routing_of(routing, part)
            tokens = part.stop - part.start
            experts = (table.probs.shape[1] - table.zero_experts) // table.groups_per_expert
            ranks, parts = jax.lax.axis_size(AXIS), table.parts_per_expert
            capacity = buffer_rows(self.config, table.expert.shape, tokens, ranks, experts, parts)
            plan = exchange_plan(table, tokens, capacity)
            buffer = rows.dispatch(x[part], plan.home)
            if weigh:
                buffer = rows.weighted_rows(buffer, table, plan.home)
            with jax.named_scope("communicate"):
                buffer = move(buffer, *_rows_by_rank(plan), AXIS)
            sent.append(permuted(buffer, *by_expert(plan.received, capacity)))
            plans.append(plan)
        return tuple(sent), tuple(plans)

    def group_sizes(self, plans: tuple[ExchangePlan, ...]) -> tuple[Array, ...]:
        """Rows of each of this rank's experts, for each piece."""
        return tuple(jnp.sum(plan.received, axis=-2) for plan in plans)

    def give_back(
        self, ys: tuple[Array, ...], weight: Float[Array, "R K"], plans: tuple[ExchangePlan, ...], num_tokens: int
    ) -> Float[Array, "T D"]:
        """What experts made of the rows that were sent, summed by token. Rows past the groups may hold anything."""
        move, made = TRANSPORTS[self.transport], []
        for part, rows_, plan in zip(pieces(self.config, num_tokens), ys, plans, strict=True):
            capacity = rows_.shape[0] // plan.received.shape[0]
            place_of_row, row_of_place = by_expert(plan.received, capacity)
            buffer = permuted(rows_, row_of_place, place_of_row)
            with jax.named_scope("communicate"):
                buffer = move(buffer, *reversed(_rows_by_rank(plan)), AXIS)
            of_piece = weight if len(plans) == 1 else weight[part]
            made.append(rows.combine(buffer, of_piece, plan.home, part.stop - part.start))
        return made[0] if len(made) == 1 else jnp.concatenate(made)

    def overflow(self, plans: tuple[ExchangePlan, ...]) -> Array:
        """Valid pairs of this rank that did not fit into the buffers."""
        return jnp.sum(jnp.stack([plan.home.overflow for plan in plans]))

    def sent(self, routing: Routing, plans: tuple[ExchangePlan, ...]) -> Routing:
        """``routing`` without the pairs that did not fit."""
        lost = [plan.home.row_of_pair >= plan.home.token_of_row.shape[0] for plan in plans]
        table = jnp.concatenate(lost)
        experts = routing.probs.shape[-1] - routing.zero_experts
        return dataclasses.replace(routing, valid=routing.valid & ~(table & (routing.expert < experts)))


def _rows_by_rank(plan: ExchangePlan) -> tuple[Array, Array]:
    """``(rows sent to each rank, rows received of each)``."""
    sent = plan.home.group_sizes.reshape(plan.received.shape)
    return jnp.sum(sent, axis=1), jnp.sum(plan.received, axis=1)


def routing_of(routing: Routing, part: slice) -> Routing:
    """The rows of ``routing`` for a run of its tokens."""
    if part.start == 0 and part.stop == routing.probs.shape[0]:
        return routing
    if routing.token is not None:
        raise ValueError("a table whose rows are pairs cannot be cut by tokens: choose an exchange that is not chunked")
    return jax.tree.map(lambda leaf: leaf[part], routing)
