"""What router families share: logits, group-limited choice, masks, counts.

Letters: T tokens, D model, E experts, K choices per row, R routing rows, P pairs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import RouterConfig
from moejax.routing import product
from moejax.routing.registry import RouterWeights
from moejax.types import RouteContext, Routing


def router_logits(
    x: Float[Array, "T D"], weights: RouterWeights, ctx: RouteContext, config: RouterConfig
) -> Float[Array, "T E"]:
    """``x @ kernel``, plus ``logit_bias`` with ``router.bias``, in float32 at full precision; in training with the
    multiplicative input jitter U(1-e, 1+e) of Switch."""
    if ctx.train and config.jitter > 0:
        low, high = 1.0 - config.jitter, 1.0 + config.jitter
        x = x.astype(jnp.float32) * jax.random.uniform(noise_key(ctx, 0), x.shape, jnp.float32, low, high)
    logits = project(x, weights["kernel"], config)
    return logits + weights["logit_bias"].astype(jnp.float32) if config.bias else logits


def project(x: Float[Array, "T D"], kernel: Float[Array, "D E"], config: RouterConfig) -> Float[Array, "T E"]:
    """``x @ kernel`` in float32 at full precision (:func:`moejax.routing.product.matmul`).

    With ``router.copies`` above 1 a column that equals the first of its run gives that one's numbers, bit for bit: a
    matmul may sum two equal columns in two orders, and a difference in the last bit could part the copies of one expert
    at the boundary of the top-k. The gradient is that of each column's own product, so that training can move copies
    apart.
    """
    kernel = kernel.astype(jnp.float32)
    made = product.matmul(x, kernel)
    if config.copies == 1:
        return made
    runs = jax.lax.stop_gradient(kernel).reshape(kernel.shape[0], -1, config.copies)
    return _as_first(made, jnp.all(runs == runs[..., :1], axis=0))


@jax.custom_jvp
def _as_first(values: Float[Array, "T E"], equal: Bool[Array, "E/c c"]) -> Float[Array, "T E"]:
    """Each value, or the first of its run of c where ``equal``; the derivative is that of the identity."""
    runs = values.reshape(values.shape[0], *equal.shape)
    return jnp.where(equal, runs[..., :1], runs).reshape(values.shape)


@_as_first.defjvp
def _as_first_jvp(primals: tuple, tangents: tuple) -> tuple:
    return _as_first(*primals), tangents[0]


def largest(values: Float[Array, "R N"], k: int) -> Int[Array, "R K"]:
    """Where the k largest of each row are. NaN is the largest of all: ``top_k`` puts one with a sign last, so that a
    broken router would look sound."""
    return jax.lax.top_k(jnp.where(jnp.isnan(values), jnp.inf, values), k)[1]


def in_best_groups(scores: Float[Array, "T E"], config: RouterConfig) -> Float[Array, "T E"]:
    """Group-limited top-k: the scores with -inf for experts outside a token's ``groups_kept`` best groups.

    A group's score is that of its best expert (DeepSeek-V2, 2405.04434, section 2.2.2) or the sum of its two best
    (DeepSeek-V3, 2412.19437, section 2.1.2), which with ``router.copies`` are the means of its best and its second run
    of copies. -inf and not 0: a score with a selection bias may lie below 0, and a 0 would then let an expert of a
    group that was left out win.
    """
    if config.groups == 1:
        return scores
    by_group = scores.reshape(scores.shape[0], config.groups, -1)
    best = jax.lax.top_k(by_group, 1 if config.group_score == "max" else 2 * config.copies)[0]
    if config.group_score == "top2_sum" and config.copies > 1:
        runs = best.reshape(*best.shape[:-1], 2, config.copies)
        best = runs[..., 0] + jnp.mean(runs - runs[..., :1], axis=-1)  # the score itself where copies are equal
    _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), config.groups_kept)
    stays = jnp.any(kept[..., None] == jnp.arange(config.groups), axis=1)  # [T, groups]
    return jnp.where(stays[..., None], by_group, -jnp.inf).reshape(scores.shape)


def computing(table: Routing) -> Bool[Array, "R K"]:
    """The valid pairs that need an expert's FFN: all but those of zero-computation experts."""
    return table.valid & (table.expert < table.probs.shape[-1] - table.zero_experts)


def token_mask(ctx: RouteContext, num_tokens: int) -> Bool[Array, "T"]:
    return jnp.ones(num_tokens, bool) if ctx.mask is None else jnp.asarray(ctx.mask)


def noise_key(ctx: RouteContext, stream: int) -> Array:
    """A key of its own for each use of noise in a router."""
    if ctx.key is None:
        raise ValueError("this router draws noise in training: pass RouteContext(key=...)")
    return jax.random.fold_in(ctx.key, stream)


def count_by_expert(expert: Int[Array, "P"], num_experts: int) -> Int[Array, "E"]:
    """Occurrences of each id in ``[0, E)``, as a fused compare-and-sum: no scatter, so deterministic."""
    return jnp.sum(expert[:, None] == jnp.arange(num_experts, dtype=expert.dtype), axis=0, dtype=jnp.int32)
