"""Dispatch and combine: from tokens to rows sorted by expert, and back.

A dispatcher (seam 4) is chosen by ``moe.dispatcher``:

``local``
    Each device computes its own tokens. Pairs are sorted by expert (a single-key sort), tokens gathered into rows, the
    way back is the inverse permutation and an unrolled sum over k: deterministic, no scatter-add. Dropless:
    ``P = R K`` rows.
``dense``
    The slow, obvious reference: every expert computes every token, combine picks the pairs. Plain autodiff.
``ep``
    Expert parallelism: rows travel over the mesh axis "expert" to the device that hosts their expert, and back. With
    one device on that axis it is ``local``.

It ``send``s tokens as rows in order of expert, and ``give``s ``back`` what experts made of them. ``plans`` says where
every pair goes, ``rows`` gathers and sums (``wide``: over many columns of which few are valid), ``exchange`` moves rows
between ranks as ``exchange_plans`` say, ``expert_parallel`` joins them; ``ranks`` is what limits see of all this;
``shards`` is the only place of the project that enters ``jax.shard_map``.

Letters: T tokens, D model, R routing rows, K choices per row, P rows for the experts, E experts.
"""

from typing import Any, Protocol

from jaxtyping import Array, Float

from moejax.config import MoEConfig
from moejax.dispatch.exchange import resolve
from moejax.dispatch.exchange_plans import exchange_plan
from moejax.dispatch.expert_parallel import ExpertParallel, buffer_rows, most_of_rank, pieces, sends_tokens
from moejax.dispatch.one_rank import OneRank
from moejax.dispatch.plans import PLANS, dense_plan, local_plan
from moejax.dispatch.ranks import decide, merged, whole_experts
from moejax.dispatch.rows import combine, dispatch, unchanged, weighted_rows
from moejax.dispatch.shards import emulated, expert_ranks, merge_shards, per_shard, shard_index, token_shards
from moejax.types import DispatchPlan, Routing

__all__ = [
    "DISPATCHERS", "PLANS", "DispatchPlan", "Dispatcher", "ExpertParallel", "OneRank", "buffer_rows", "combine",
    "decide", "dense_plan", "dispatch", "emulated", "exchange_plan", "expert_ranks", "in_force", "local_plan",
    "merge_shards", "merged", "most_of_rank", "per_shard", "pieces", "resolve", "sends_tokens", "shard_index",
    "token_shards", "unchanged", "weighted_rows", "whole_experts",
]  # fmt: skip

DISPATCHERS = (*PLANS, "ep")


class Dispatcher(Protocol):
    """Seam 4. Rows and plans are its own: one array and one plan, or a tuple of each. All calls but ``group_sizes`` are
    made inside :func:`per_shard`."""

    @property
    def split_experts(self) -> bool:
        """Whether a rank computes with the weights of its own experts only."""
        ...

    def send(self, x: Float[Array, "T D"], routing: Routing, *, weigh: bool = False) -> tuple[Any, Any]: ...

    def group_sizes(self, plan: Any, /) -> Any: ...

    def give_back(self, ys: Any, weight: Float[Array, "R K"], plan: Any, num_tokens: int, /) -> Float[Array, "T D"]: ...

    def overflow(self, plan: Any, /) -> Array: ...

    def sent(self, routing: Routing, plan: Any, /) -> Routing: ...


def in_force(config: MoEConfig) -> Dispatcher:
    """The dispatcher of a layer on the mesh in force.

    Raises:
      ConfigError: an exchange that this platform lacks.
    """
    if config.dispatcher != "ep":
        return OneRank(config.dispatcher)
    return ExpertParallel(config) if expert_ranks() > 1 else OneRank("local")
