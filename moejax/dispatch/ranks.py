"""Ranks of expert parallelism as routers and limits see them: real ones, and virtual ones on one device.

Rank r of R has a run of the tokens of its own and hosts experts ``[r E / R, (r + 1) E / R)``; none, where experts are
stored in parts and these are not whole numbers, or the parts of an expert stand apart. It decides by itself: what it
draws is folded with its index among the token shards. Virtual ranks decide as real ones would, and the tokens stay.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import ConfigError
from moejax.dispatch.shards import AXIS, shard_index
from moejax.types import VIRTUAL, RouteContext, Routing

Decide = Callable[[Array, RouteContext], tuple[Routing, Routing]]
"""``(tokens [t, D], their context) -> (what the router made, what limits kept)``, of one rank."""


def decide(
    fn: Decide,
    x: Float[Array, "T D"],
    ctx: RouteContext,
    num_experts: int,
    *,
    ranks: int = 1,
    virtual_ranks: int = 1,
    apart: bool = False,
) -> tuple[Routing, Routing, RouteContext]:
    """What ``fn`` decides on this device, one of ``ranks`` on the axis "expert", and the context that it saw.

    With ``virtual_ranks`` everything has one more leading axis, that of the ranks: see :func:`merged`.

    Args:
      fn: routes and limits the tokens of one rank. Its context has the rank's own random key, and, where there are
        several ranks, ``local_experts``.
      x: tokens of this device.
      ctx: per-token leaves are ``[T]``; ``key`` is one for all devices.
      num_experts: that compute.
      ranks: real ones.
      virtual_ranks: what this device's tokens and the experts are split into instead. Must divide the tokens.
      apart: as in :func:`whole_experts`.

    Raises:
      ConfigError: the tokens in hand do not divide.
    """
    if virtual_ranks == 1:
        rank = jax.lax.axis_index(AXIS) if ranks > 1 else None
        mine = of_rank(ctx, shard_index(), rank, whole_experts(num_experts, ranks, apart), AXIS if ranks > 1 else None)
        return *fn(x, mine), mine
    if x.shape[0] % virtual_ranks:
        raise ConfigError(
            f"moe.virtual_ranks={virtual_ranks} does not divide the {x.shape[0]} tokens of a batch on this device: "
            "choose a divisor, or a batch size whose tokens it divides"
        )
    first = shard_index() * virtual_ranks

    def on_rank(rank: Array, x: Array, tokens: RouteContext) -> tuple[Routing, Routing, RouteContext]:
        mine = dataclasses.replace(tokens, key=ctx.key, loads=ctx.loads)
        mine = of_rank(mine, first + rank, rank, whole_experts(num_experts, virtual_ranks, apart), VIRTUAL)
        return *fn(x, mine), mine

    tokens = dataclasses.replace(ctx, key=None, loads=None)
    split = jax.tree.map(lambda leaf: leaf.reshape(virtual_ranks, -1, *leaf.shape[1:]), (x, tokens))
    return jax.vmap(on_rank, axis_name=VIRTUAL)(jnp.arange(virtual_ranks), *split)


def whole_experts(num_experts: int, ranks: int, apart: bool = False) -> int:
    """Experts that each rank hosts with all their parts; 0 where some lie on several. ``apart``: the parts of an expert
    do not stand together (:attr:`moejax.config.MoEConfig.parts_apart`), so that all do."""
    return 0 if num_experts % ranks or (apart and ranks > 1) else num_experts // ranks


def of_rank(ctx: RouteContext, shard: Array, rank: Array | None, experts: int, axis_name: str | None) -> RouteContext:
    """``ctx`` as rank ``rank`` (None: the only one) sees it, with the key of token shard ``shard``."""
    key = None if ctx.key is None else jax.random.fold_in(ctx.key, shard)
    local = None if rank is None else rank * experts + jnp.arange(experts, dtype=jnp.int32)
    return dataclasses.replace(ctx, key=key, local_experts=local, axis_name=axis_name)


def merged(table: Routing) -> Routing:
    """The tables of virtual ranks ``[ranks, ...]`` as one of all their tokens."""
    if table.token is not None:
        ranks, tokens = table.probs.shape[:2]
        table = dataclasses.replace(table, token=table.token + tokens * jnp.arange(ranks, dtype=jnp.int32)[:, None])
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), table)
