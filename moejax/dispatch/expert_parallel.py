"""Expert parallelism: tokens travel to the devices that host their experts, and the results back.

The ranks of the mesh axis "expert" host ``e = E / ranks`` consecutive experts each; where experts are stored in parts
(``moe.parts``), each part counts as one. A rank sorts its pairs by expert, so by destination too, and has C places for
those of each destination; counts are exchanged first, then rows (``moejax.dispatch.exchange``), and what was received
is ordered by expert for the grouped FFN. ``moe.ep_send`` says what travels (``moejax.dispatch.exchange_plans``):

pairs
    A row for each pair. The way back is the same in reverse, and the weighted sum is made at home, in the order of k:
    the same sum as on one device.
tokens
    A row for each token and rank. A rank makes the weighted sum over its own experts, in float32 and in a fixed order,
    and sends it back in the type of the rows; at home the sums of the ranks are added up, in their order.

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
from moejax.dispatch.exchange_plans import exchange_plan, token_exchange_plan, weight_here
from moejax.dispatch.shards import AXIS
from moejax.types import ExchangePlan, Routing, TokenExchangePlan

Plan = ExchangePlan | TokenExchangePlan

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
    most = most_of_rank(config, table[1], ranks, experts, parts)
    worst = table[0] * most
    if not config.ep_buffer_factor:
        return worst
    wanted = math.ceil(round(config.ep_buffer_factor * tokens * config.router.k * parts / ranks, 6))
    return min(worst, -(-wanted // ROUNDED) * ROUNDED)


def most_of_rank(config: MoEConfig, columns: int, ranks: int, experts: int | None = None, parts: int = 1) -> int:
    """Pairs of one row of a Routing with ``columns`` columns that go to one rank at most; the rest as in
    :func:`buffer_rows`."""
    held = -(-(experts or config.num_experts) // ranks)
    most, choices = min(columns, held), columns // parts
    if config.parts_apart and choices:  # none where rows are pairs
        of_all, some = divmod(held, config.num_experts)
        most = choices * of_all + min(choices, some)
    return most


def sends_tokens(config: MoEConfig, tokens: int, capacity: int, by_token: bool = True) -> bool:
    """Whether tokens travel, and not pairs, of a piece of ``tokens`` tokens with ``capacity`` pairs for each
    destination. ``by_token``: a row of its table is a token, as it is where tokens choose."""
    pays = 5 * tokens <= 4 * capacity  # a second message and a second sum cost about what a fifth of the rows does
    return by_token and (config.ep_send == "tokens" or (config.ep_send == "auto" and pays))


def pieces(config: MoEConfig, tokens: int) -> list[slice]:
    """The runs of consecutive tokens that are exchanged on their own: one, or with "chunked" ``ep_chunks``."""
    count = min(config.ep_chunks, tokens) if config.ep_exchange == "chunked" else 1
    ends = [tokens * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


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
    ) -> tuple[tuple[Array, ...], tuple[Plan, ...]]:
        """Rows that this rank's experts compute, in order of expert, and the plans. ``weigh``: rows times their gate
        weight, before experts compute them."""
        sent, plans = [], []
        for part in pieces(self.config, x.shape[0]):
            table = routing_of(routing, part)
            plan = self.plan(table, part.stop - part.start)
            sent.append(self.outward(x[part], table, plan, weigh))
            plans.append(plan)
        return tuple(sent), tuple(plans)

    def plan(self, table: Routing, tokens: int) -> Plan:
        """Of one piece."""
        experts = (table.probs.shape[1] - table.zero_experts) // table.groups_per_expert
        ranks, parts = jax.lax.axis_size(AXIS), table.parts_per_expert
        capacity = buffer_rows(self.config, table.expert.shape, tokens, ranks, experts, parts)
        if not sends_tokens(self.config, tokens, capacity, table.token is None):
            return exchange_plan(table, tokens, capacity)
        return token_exchange_plan(
            table, tokens, capacity, most_of_rank(self.config, table.expert.shape[1], ranks, experts, parts)
        )

    def outward(self, x: Float[Array, "t D"], table: Routing, plan: Plan, weigh: bool = False) -> Float[Array, "P D"]:
        """The rows of this rank's experts, from the tokens of one piece of every rank."""
        move = TRANSPORTS[self.transport]
        if isinstance(plan, TokenExchangePlan):
            buffer = rows.dispatch(x, plan.tokens)
            with jax.named_scope("communicate"):
                buffer = move(buffer, *rows_by_rank(plan), AXIS)
            arrived = rows.dispatch(buffer, plan.rows, to_experts=True)
            return rows.weighted_rows(arrived, weight_here(table.weight, plan), plan.rows) if weigh else arrived
        buffer = rows.dispatch(x, plan.home)
        if weigh:
            buffer = rows.weighted_rows(buffer, table.weight, plan.home)
        with jax.named_scope("communicate"):
            buffer = move(buffer, *rows_by_rank(plan), AXIS)
        capacity = plan.home.token_of_row.shape[0] // plan.received.shape[0]
        return permuted(buffer, *by_expert(plan.received, capacity), jnp.sum(plan.received))

    def group_sizes(self, plans: tuple[Plan, ...]) -> tuple[Array, ...]:
        """Rows of each of this rank's experts, for each piece."""
        return tuple(jnp.sum(plan.received, axis=-2) for plan in plans)

    def give_back(
        self, ys: tuple[Array, ...], weight: Float[Array, "R K"], plans: tuple[Plan, ...], num_tokens: int
    ) -> Float[Array, "T D"]:
        """What experts made of the rows that were sent, summed by token. Rows past the groups may hold anything."""
        made = []
        for part, rows_, plan in zip(pieces(self.config, num_tokens), ys, plans, strict=True):
            of_piece = weight if len(plans) == 1 else weight[part]
            made.append(self.homeward(rows_, of_piece, plan, part.stop - part.start))
        return made[0] if len(made) == 1 else jnp.concatenate(made)

    def homeward(
        self, ys: Float[Array, "P D"], weight: Float[Array, "t K"], plan: Plan, tokens: int
    ) -> Float[Array, "t D"]:
        """The way back of one piece. ``weight`` is of ones where ``config.weigh`` is "input"."""
        move = TRANSPORTS[self.transport]
        if isinstance(plan, TokenExchangePlan):
            if self.config.weigh == "input":  # weights are all 1
                sums = rows.summed(ys, plan.rows)
            else:
                sums = rows.combine(ys, weight_here(weight, plan), plan.rows, plan.rows.row_of_pair.shape[0])
            with jax.named_scope("communicate"):
                buffer = move(sums, *reversed(rows_by_rank(plan)), AXIS)
            return rows.summed(buffer, plan.tokens)
        capacity = ys.shape[0] // plan.received.shape[0]
        place_of_row, row_of_place = by_expert(plan.received, capacity)
        buffer = permuted(ys, row_of_place, place_of_row)
        with jax.named_scope("communicate"):
            buffer = move(buffer, *reversed(rows_by_rank(plan)), AXIS)
        return rows.combine(buffer, weight, plan.home, tokens)

    def overflow(self, plans: tuple[Plan, ...]) -> Array:
        """Valid pairs of this rank that did not fit into the buffers."""
        lost = [plan.home.overflow for plan in plans]
        lost += [plan.rows.overflow for plan in plans if isinstance(plan, TokenExchangePlan)]
        return jnp.sum(jnp.stack(lost))

    def sent(self, routing: Routing, plans: tuple[Plan, ...]) -> Routing:
        """``routing`` without the pairs that did not fit."""
        lost = [plan.home.row_of_pair >= plan.home.token_of_row.shape[0] for plan in plans]
        table = jnp.concatenate(lost)
        experts = routing.probs.shape[-1] - routing.zero_experts
        return dataclasses.replace(routing, valid=routing.valid & ~(table & (routing.expert < experts)))


def rows_by_rank(plan: Plan) -> tuple[Array, Array]:
    """``(rows sent to each rank, rows received of each)``."""
    if isinstance(plan, TokenExchangePlan):
        return plan.tokens.group_sizes, plan.arrived
    sent = plan.home.group_sizes.reshape(plan.received.shape)
    return jnp.sum(sent, axis=1), jnp.sum(plan.received, axis=1)


def routing_of(routing: Routing, part: slice) -> Routing:
    """The rows of ``routing`` for a run of its tokens."""
    if part.start == 0 and part.stop == routing.probs.shape[0]:
        return routing
    if routing.token is not None:
        raise ValueError("a table whose rows are pairs cannot be cut by tokens: choose an exchange that is not chunked")
    return jax.tree.map(lambda leaf: leaf[part], routing)
