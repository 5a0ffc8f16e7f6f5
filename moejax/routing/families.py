"""The families themselves: each a pure function and, where it has a state, the rule that moves it.

All compute logits, softmax and weights in float32, whatever the type of ``x``.

Letters: T tokens, D model, E experts, K choices per row, R routing rows, C capacity.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import RouterConfig
from moejax.routing.pieces import in_best_groups, largest, noise_key, project, router_logits, token_mask
from moejax.routing.registry import RouterWeights, linear_router, register
from moejax.sharding import ArraySpec
from moejax.types import RouteContext, Routing


def _table(
    expert: Array,
    weight: Array,
    probs: Array,
    logits: Array,
    ctx: RouteContext,
    config: RouterConfig,
    load_prob: Array | None = None,
) -> Routing:
    """Token-choice Routing: scores are the probabilities of the chosen experts, padding is born invalid."""
    mask = token_mask(ctx, expert.shape[0])
    return Routing(
        expert=expert.astype(jnp.int32),
        weight=weight * config.scale,
        score=jnp.take_along_axis(probs, expert, axis=1),
        valid=jnp.broadcast_to(mask[:, None], expert.shape),
        probs=probs,
        logits=logits,
        load_prob=load_prob,
    )


@register("topk_of_softmax", settings=("bias", "groups"), copied="divide")
def topk_of_softmax(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Top-k of the softmax over all experts (GShard, OLMoE, Qwen, DeepSeek-V2; survey section 2).

    ``p = softmax(x W); e = topk(p); weight = p_e`` or, with ``renormalise``, ``p_e / sum(p_e)``. Without it the weights
    sum to less than 1 and the router has a gradient for every k, also k = 1. With groups: :func:`in_best_groups`.
    """
    logits = router_logits(x, w, ctx, config)
    probs = jax.nn.softmax(logits)
    weight, expert = jax.lax.top_k(in_best_groups(probs, config), config.k)
    if config.renormalise and config.k > 1:  # for k = 1 it would be the constant 1: no gradient
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return _table(expert, weight, probs, logits, ctx, config)


@register(
    "softmax_of_topk",
    min_k=2,
    why_k="with k=1 its gate weight is the constant 1, so the router gets no gradient; "
    "use 'topk_of_softmax' or 'switch'",
    settings=("bias",),
    sums_to_one=True,
    copied="divide",
)
def softmax_of_topk(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Softmax over the top-k logits (Shazeer 2017 without noise, Mixtral, gpt-oss; survey section 2). Weights sum to 1.

    Equal to ``topk_of_softmax`` with renormalisation in exact arithmetic; kept because checkpoints name it.
    """
    logits = router_logits(x, w, ctx, config)
    expert = largest(logits, config.k)
    top = jnp.take_along_axis(logits, expert, axis=1)
    return _table(expert, jax.nn.softmax(top), jax.nn.softmax(logits), logits, ctx, config)


@register(
    "switch",
    max_k=1,
    why_k="Switch is top-1: set router.k=1",
    settings=("bias",),
    copied="divide",
    wider="topk_of_softmax",
)
def switch(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Switch Transformer top-1 (2101.03961, eq. 2): ``y = p_i f_i(x)``, never renormalised; jitter in training."""
    logits = router_logits(x, w, ctx, config)
    probs = jax.nn.softmax(logits)
    weight, expert = jax.lax.top_k(probs, 1)
    return _table(expert, weight, probs, logits, ctx, config)


def _noisy_arrays(dim: int, experts: int) -> dict[str, ArraySpec]:
    return linear_router(dim, experts) | {"noise": ArraySpec((dim, experts), ("embed", "router"), init="zeros")}


@register("noisy_topk", arrays=_noisy_arrays, noisy=True, settings=("bias",), sums_to_one=True, copied="divide")
def noisy_topk(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Noisy top-k (Shazeer 2017, eqs. 3-5): ``H = x W + N(0,1) softplus(x W_noise)``; weights are softmax over the
    top-k.

    Noise is drawn in training only. For k = 1 the weight is the softmax over all experts instead of the constant 1, so
    that the router keeps a gradient. ``load_prob`` (his eqs. 8-9) is the chance that a fresh draw of expert i's noise
    alone would put it among the top-k: ``Phi((z_i - kth_excluding(H, k, i)) / sigma_i)``.
    """
    logits = router_logits(x, w, ctx, config)
    noisy, load_prob = logits, None
    num_experts = logits.shape[-1]
    if ctx.train:
        sigma = jax.nn.softplus(project(x, w["noise"], config)) + 1e-2  # his code adds it: the ratio below stays finite
        draw = jax.random.normal(noise_key(ctx, 1), (logits.shape[0], num_experts // config.copies))
        if config.copies > 1:  # one draw for all copies of an expert
            draw = jnp.repeat(draw, config.copies, axis=1)
        noisy = logits + draw * sigma
        if config.k < num_experts:
            top = jax.lax.top_k(noisy, config.k + 1)[0]
            chosen = noisy > top[:, config.k, None]
            threshold = jnp.where(chosen, top[:, config.k, None], top[:, config.k - 1, None])
            load_prob = jax.scipy.stats.norm.cdf((logits - threshold) / sigma)
        else:
            load_prob = jnp.ones_like(logits)
    expert = largest(noisy, config.k)
    top = jnp.take_along_axis(noisy, expert, axis=1)
    probs = jax.nn.softmax(noisy)
    weight = jax.nn.softmax(top) if config.k > 1 else jnp.take_along_axis(probs, expert, axis=1)
    return _table(expert, weight, probs, logits, ctx, config, load_prob)


def _arrays_with_selection_bias(dim: int, experts: int) -> dict[str, ArraySpec]:
    return linear_router(dim, experts) | {"bias": ArraySpec((experts,), ("router",), init="zeros", kind="state")}


def update_selection_bias(
    state: dict[str, Array], routed: Float[Array, "E"], config: RouterConfig, num_experts: int
) -> dict[str, Array]:
    """Auxiliary-loss-free balancing (2408.15664): ``b_i += u * sign(mean(c) - c_i)`` with the step's global counts
    ``c``. Ids from ``num_experts`` on keep their bias, as in :func:`update_towards_even_share`."""
    step = config.bias_update_rate * jnp.sign(jnp.mean(routed, axis=-1, keepdims=True) - routed)
    return {"bias": state["bias"] + jnp.where(jnp.arange(routed.shape[-1]) < num_experts, step, 0.0)}


def update_towards_even_share(
    state: dict[str, Array], routed: Float[Array, "E"], config: RouterConfig, num_experts: int
) -> dict[str, Array]:
    """LongCat-Flash's rule (2509.01322, section 2.1.1): ``b_i += u (K_e / (K N) - c_i / sum(c))`` for the N experts
    that compute, with the step's global counts ``c``.

    Zero-computation experts keep theirs: when all others have their share, so have these together. ``K_e``, the
    experts of a token that should compute on average, is the even share ``K N / (N + Z)``; LongCat-Flash's own
    8 of 12 with N = 512 and Z = 256 is that.
    """
    share = routed / jnp.maximum(jnp.sum(routed, axis=-1, keepdims=True), 1.0)
    step = config.bias_update_rate * (1.0 / routed.shape[-1] - share)
    return {"bias": state["bias"] + jnp.where(jnp.arange(routed.shape[-1]) < num_experts, step, 0.0)}


@register(
    "sigmoid_bias",
    arrays=_arrays_with_selection_bias,
    update=update_selection_bias,
    settings=("bias", "groups"),
    copied="keep",
)
def sigmoid_bias(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Sigmoid scores with a selection bias (DeepSeek-V3): choose the top-k of ``s + b``; the weights never see ``b``.

    ``s = sigmoid(x W); weight = s_e`` or, with ``renormalise``, ``s_e / sum(s_e)``. ``b`` has no gradient; it moves by
    :func:`update_selection_bias` after each optimizer step. With k = 1 the weight is never renormalised. With groups:
    :func:`in_best_groups` of ``s + b``.
    """
    logits = router_logits(x, w, ctx, config)
    return _biased_choice(jax.nn.sigmoid(logits), w["bias"], logits, ctx, config)


@register(
    "softmax_bias",
    arrays=_arrays_with_selection_bias,
    update=update_towards_even_share,
    settings=("bias", "groups"),
    copied="divide",
)
def softmax_bias(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Softmax scores with a selection bias (LongCat-Flash, 2509.01322): as :func:`sigmoid_bias`, with
    ``s = softmax(x W)``. LongCat-Flash does not renormalise. ``b`` moves by :func:`update_towards_even_share`."""
    logits = router_logits(x, w, ctx, config)
    return _biased_choice(jax.nn.softmax(logits), w["bias"], logits, ctx, config)


def _biased_choice(scores: Array, bias: Array, logits: Array, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Chooses the top-k of ``scores + bias`` with weights from the scores alone."""
    selection = in_best_groups(jax.lax.stop_gradient(scores) + bias, config)
    expert = largest(jnp.where(jnp.isnan(scores), jnp.nan, selection), config.k)
    weight = jnp.take_along_axis(scores, expert, axis=1)
    if config.renormalise and config.k > 1:
        # The floor only acts where all chosen scores underflow; without it such a row would be 0 / 0.
        weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-20)
    return _table(expert, weight, scores, logits, ctx, config)


@register("topk_of_sigmoid", settings=("bias",), copied="keep")
def topk_of_sigmoid(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Sigmoid of the top-k logits (Llama 4, whose k is 1): ``s = sigmoid(x W); e = topk(x W); weight = s_e`` or, with
    ``renormalise`` and k > 1, ``s_e / sum(s_e)``. :func:`sigmoid_bias` without its state."""
    logits = router_logits(x, w, ctx, config)
    scores = jax.nn.sigmoid(logits)
    expert = largest(logits, config.k)  # large scores are equal in float32, their logits are not
    weight = jnp.take_along_axis(scores, expert, axis=1)
    if config.renormalise and config.k > 1:
        weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-20)
    return _table(expert, weight, scores, logits, ctx, config)


@register(
    "sparsemixer",
    min_k=2,
    max_k=2,
    why_k="SparseMixer-v2 chooses one expert and then another: set router.k=2",
    settings=("bias", "mask_margin"),
)
def sparsemixer(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """The top-2 choice of SparseMixer-v2 (2409.12136; PhiMoE), as it is made in evaluation::

        e_1 = argmax(z);  weight_1 = softmax over {j: z_1 - z_j <= 2 m max(|z_j|, z_1)} of z, at e_1
        e_2 = argmax(z without e_1);  weight_2 likewise, without e_1 and with z_2 in the place of z_1

    with ``m = mask_margin``: each weight compares its expert with those nearly as good, so the two sum to at most 2,
    and both are 1 for most tokens of a decided router.

    Training is *not* that of the paper, which draws the experts at random among the nearly as good and estimates the
    gradient of that draw (a mid-point rule, Heun's third-order method). Here it is the plain gradient of the weights,
    with the choice of evaluation: a token whose choices have no rival gives the router none.
    """
    logits = router_logits(x, w, ctx, config)
    choices, weights, rest = [], [], logits
    for _ in range(2):
        expert = jnp.argmax(rest, axis=-1, keepdims=True)
        best = jnp.take_along_axis(rest, expert, axis=1)
        near = best - logits <= 2 * config.mask_margin * jnp.maximum(jnp.abs(logits), best)
        share = jax.nn.softmax(jnp.where(near, rest, -jnp.inf))
        choices.append(expert)
        weights.append(jnp.take_along_axis(share, expert, axis=1))
        rest = jnp.where(jnp.arange(logits.shape[-1]) == expert, -jnp.inf, rest)
    expert, weight = (jnp.concatenate(parts, axis=1) for parts in (choices, weights))
    return _table(expert, weight, jax.nn.softmax(logits), logits, ctx, config)


@register("expert_choice", causal=False, settings=("bias",), copied="divide")
def expert_choice(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Expert choice (2202.09368): each expert takes its ``C = ceil(n k / E)`` best tokens, ``n`` the real tokens.

    ``p = softmax(x W)`` over experts; the weight is ``p``. A token may get no expert or many. Rows are pairs: ``R = E
    C``, ``K = 1``, with ``C`` for a batch without padding; slots past ``ceil(n k / E)`` are invalid. Not causal.
    """
    logits = router_logits(x, w, ctx, config)
    probs = jax.nn.softmax(logits)
    num_tokens, num_experts = probs.shape
    mask = token_mask(ctx, num_tokens)
    capacity = min(num_tokens, math.ceil(num_tokens * config.k / num_experts))
    masked = jnp.where(mask[:, None], jax.lax.stop_gradient(probs), -1.0)
    token = largest(masked.T, capacity)  # [E, C]
    real = -(-jnp.sum(mask) * config.k // num_experts)  # ceil in integers: XLA's float division can land above
    valid = mask[token] & (jnp.arange(capacity) < real)
    expert = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32)[:, None], token.shape)
    weight = probs[token, expert]
    return Routing(
        expert=expert.reshape(-1, 1),
        weight=weight.reshape(-1, 1) * config.scale,
        score=weight.reshape(-1, 1),
        valid=valid.reshape(-1, 1),
        probs=probs,
        logits=logits,
        token=token.reshape(-1).astype(jnp.int32),
    )
