"""Plans of an exchange between the ranks of expert parallelism: which row goes where, and what comes.

Two things may travel. *Pairs*: a row for each. *Tokens*: each once to every rank that hosts experts of its, which makes
the rows of its pairs there and sends back one row, the weighted sum over them: with k choices among R ranks at most
min(k, R) rows for a token, not k. Of each pair 8 bytes travel then, its place and its gate weight.

Which pairs are kept, and how experts order their rows, is the same for both: of a destination's pairs the first C in
order of expert, then pair, are sent, the others are overflow.

Letters: T tokens, R routing rows, K choices per row, e experts of one rank, C pairs and S tokens for each destination,
W pairs of a token for one rank at most.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.dispatch.exchange import by_expert, permuted
from moejax.dispatch.plans import local_plan, placed
from moejax.dispatch.shards import AXIS
from moejax.routing import computing
from moejax.types import DispatchPlan, ExchangePlan, Routing, TokenExchangePlan


def home_plan(routing: Routing, num_tokens: int, capacity: int, ranks: int) -> DispatchPlan:
    """Where each of this rank's pairs stands in a send buffer of ``capacity`` places for each of ``ranks`` ranks."""
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
    return DispatchPlan(
        token_of_row=sorted_.token_of_row.at[place].get(mode="fill", fill_value=num_tokens),
        row_of_pair=jnp.where(fits, destination * capacity + offset, ranks * capacity).astype(jnp.int32),
        pair_of_row=sorted_.pair_of_row.at[place].get(mode="fill", fill_value=pairs),
        group_sizes=sent.reshape(-1),
        token=routing.token,
        overflow=jnp.sum(wanted) - jnp.sum(sent),
    )


def exchange_plan(routing: Routing, num_tokens: int, capacity: int, axis: str = AXIS) -> ExchangePlan:
    """Pairs travel: where each stands in the send buffer, and how many rows come from whom."""
    ranks = jax.lax.axis_size(axis)
    home = home_plan(routing, num_tokens, capacity, ranks)
    with jax.named_scope("communicate"):
        received = jax.lax.all_to_all(home.group_sizes.reshape(ranks, -1), axis, 0, 0, tiled=True)
    return ExchangePlan(home=home, received=received)


def token_exchange_plan(
    routing: Routing, num_tokens: int, capacity: int, most: int, axis: str = AXIS
) -> TokenExchangePlan:
    """Tokens travel. One message says which of a source's tokens has which place among this rank's rows.

    Args:
      routing: a row is a token.
      capacity: C.
      most: W. A pair that would be one more is overflow. Where it is e, a token's pairs stand here in the order of
        experts, else in that of k.
    """
    ranks = jax.lax.axis_size(axis)
    rows, experts = min(num_tokens, capacity), (routing.probs.shape[1] - routing.zero_experts) // ranks
    if most == experts:  # room for each of them: cheap, whatever the number of columns
        nth, fits = routing.expert % experts, jnp.bool_(True)
    else:
        nth = nth_of_rank(routing, experts)
        fits = ~computing(routing) | (nth < most)
    home = home_plan(dataclasses.replace(routing, valid=routing.valid & fits), num_tokens, capacity, ranks)
    home = dataclasses.replace(home, overflow=home.overflow + jnp.sum(~fits))
    destination = home.row_of_pair // capacity  # ``ranks`` where a pair does not travel
    goes = jnp.any(destination[:, :, None] == jnp.arange(ranks), axis=1)  # [T, ranks]
    slot = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1
    row = jnp.where(goes, jnp.arange(ranks) * rows + slot, ranks * rows)
    token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    flat = jnp.arange(num_tokens * ranks, dtype=jnp.int32).reshape(row.shape)
    tokens = DispatchPlan(
        token_of_row=placed(row, jnp.broadcast_to(token, row.shape), ranks * rows, num_tokens),
        row_of_pair=row.astype(jnp.int32),
        pair_of_row=placed(row, flat, ranks * rows, row.size),
        group_sizes=jnp.sum(goes, axis=0, dtype=jnp.int32),
        token=None,
        overflow=jnp.int32(0),
    )

    of_pair = jnp.take_along_axis(slot, jnp.minimum(destination, ranks - 1), axis=1) * most + nth
    codes = of_pair.reshape(-1).at[home.pair_of_row].get(mode="fill", fill_value=-1).reshape(ranks, capacity)
    message = [codes, home.group_sizes.reshape(ranks, experts), tokens.group_sizes[:, None]]
    with jax.named_scope("communicate"):
        heard = jax.lax.all_to_all(jnp.concatenate(message, axis=1), axis, 0, 0, tiled=True)
    codes, received, arrived = heard[:, :capacity], heard[:, capacity:-1], heard[:, -1]

    pairs = ranks * rows * most
    here = jnp.where(codes >= 0, jnp.arange(ranks)[:, None] * (rows * most) + codes, pairs).reshape(-1)
    place_of_row, row_of_place = by_expert(received, capacity)
    pair_of_row = here.at[place_of_row].get(mode="fill", fill_value=pairs)
    row_of_pair = placed(here, row_of_place, pairs, ranks * capacity)
    of_experts = DispatchPlan(
        token_of_row=pair_of_row // most,
        row_of_pair=row_of_pair.reshape(ranks * rows, most),
        pair_of_row=pair_of_row,
        group_sizes=jnp.sum(received, axis=0),
        token=None,
        # Two pairs of a token for one expert have one place: no router or limit makes them.
        overflow=jnp.sum(received) - jnp.sum(row_of_pair < ranks * capacity),
    )
    return TokenExchangePlan(ExchangePlan(home, received), tokens, arrived, of_experts, here)


def nth_of_rank(routing: Routing, experts: int) -> Int[Array, "T K"]:
    """For each valid pair, how many earlier ones its token has on the same rank of ``experts`` experts."""
    rank = jnp.where(computing(routing), routing.expert // experts, -1)
    earlier = jnp.tril(jnp.ones((rank.shape[1],) * 2, bool), -1)
    same = (rank[:, :, None] == rank[:, None, :]) & earlier
    return jnp.sum(same, axis=2, dtype=jnp.int32)


def weight_here(weight: Float[Array, "R K"], plan: TokenExchangePlan, axis: str = AXIS) -> Float[Array, "S W"]:
    """Gate weights of the pairs that came, for each token that did; 0 where it has no pair."""
    flat, way_back = weight.astype(jnp.float32).reshape(-1), plan.home.row_of_pair.reshape(-1)
    sent = permuted(flat, plan.home.pair_of_row, way_back)
    with jax.named_scope("communicate"):
        came = jax.lax.all_to_all(sent, axis, 0, 0, tiled=True)
    pairs = plan.rows.row_of_pair
    return placed(plan.pair_of_place, came, pairs.size, 0).reshape(pairs.shape)
