"""Rules that threshold dropping is compared with: Efficient Expert Skipping, and opportunistic activation for decoding.

Letters: E experts, R = T tokens (rows), K choices per row, L MoE layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.limits.pieces import num_experts, of_layer, option, share_lost_weight
from moejax.routing import computing
from moejax.types import RouteContext, Routing, pytree


@pytree
class EfficientSkip:
    """Efficient Expert Skipping (2402.14800, section 3.3): a token's second expert is skipped iff ``s2 < beta s1``, and
    the first takes over its weight.

    The rule was stated for two experts per token. For more it says here: each pair but the best is skipped iff its
    score is below ``beta`` times the best one's. So 0 skips none, and 1 leaves the best pair (and what ties with it).
    ``beta`` is calibrated as the median of ``s2 / s1`` over calibration text, layer by layer (:func:`score_ratios`):
    then half of the second experts are skipped there.
    """

    beta: Float[Array, "..."]
    """In [0, 1]: one, or ``[L]`` (one for each MoE layer). A run-time value."""
    renormalise: bool = option(True)
    """What is left to a token takes over the weight of what was skipped (the published rule)."""

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        del ctx
        require_rows_of_tokens(routing)
        score = jax.lax.stop_gradient(routing.score)
        skipped = score < of_layer(self.beta) * best_score(routing)[:, None]  # NaN is not: it must not be hidden
        stays = ~skipped | ~computing(routing)
        kept = dataclasses.replace(routing, valid=routing.valid & stays)
        return share_lost_weight(routing, kept) if self.renormalise else kept


def score_ratios(routing: Routing) -> tuple[Float[Array, "R K"], Bool[Array, "R K"]]:
    """What :class:`EfficientSkip` compares ``beta`` with: the score of each pair over its token's best, and which pairs
    it may skip (all that an expert must compute, but for one best of each token)."""
    best = best_score(routing)[:, None]
    score = jnp.where(routing.valid, routing.score, -jnp.inf)
    first = jnp.arange(score.shape[1]) == jnp.argmax(score, axis=1)[:, None]
    return routing.score / jnp.where(best > 0, best, 1.0), computing(routing) & ~first


@pytree
class OpportunisticDrop:
    """Opportunistic expert activation (OEA, 2511.02237), for decoding: each token's ``keep`` best pairs stay, and any
    other pair stays only if its expert is among the ``keep`` best of some token of the batch.

    A decoding step waits for memory: it costs what the experts that are touched at all weigh, however few tokens each
    has. Dropping a pair saves time only if nobody else needs its expert, and keeping one is free if somebody does. The
    experts touched are exactly those of the ``keep`` best pairs. What a token loses depends on its batch.

    A token never gets more than the router chose (the paper may add experts beyond them). Under expert parallelism each
    rank looks at its own tokens.
    """

    keep: Int[Array, ""]
    """Pairs of each token that always stay, 1 or more. A run-time value; from k on nothing is dropped."""
    renormalise: bool = option(False)
    """What is left to a token takes over the weight of what was dropped."""

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        del ctx
        require_rows_of_tokens(routing)
        costs = computing(routing)
        surely = costs & (rank_in_token(routing, costs) < self.keep)
        ids = jnp.arange(num_experts(routing), dtype=routing.expert.dtype)
        hit = routing.expert[..., None] == ids  # [R, K, E]
        touched = jnp.any(hit & surely[..., None], axis=(0, 1))
        stays = jnp.any(hit & touched, axis=-1) | ~costs
        kept = dataclasses.replace(routing, valid=routing.valid & stays)
        return share_lost_weight(routing, kept) if self.renormalise else kept


def best_score(routing: Routing) -> Float[Array, "R"]:
    """The highest score among each row's valid pairs; 0 without any."""
    score = jax.lax.stop_gradient(routing.score)
    return jnp.max(score, axis=1, initial=0.0, where=routing.valid)


def rank_in_token(routing: Routing, among: Bool[Array, "R K"]) -> Int[Array, "R K"]:
    """How many pairs of the row's ``among`` come before each: those with a higher score, and equal ones that stand
    earlier."""
    score = jax.lax.stop_gradient(routing.score)
    place = jnp.arange(score.shape[1])
    mine, other = score[:, :, None], score[:, None, :]
    before = (other > mine) | ((other == mine) & (place < place[:, None]))
    return jnp.sum(before & among[:, None, :], axis=-1, dtype=jnp.int32)


def require_rows_of_tokens(routing: Routing) -> None:
    if routing.token is not None:
        raise ValueError("this limit compares the pairs of a token: the rows of expert choice are pairs, not tokens")
