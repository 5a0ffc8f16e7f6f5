"""The router zoo: pure functions ``(x, weights, ctx, config) -> Routing``, in a registry by name.

A family is registered with the arrays that it needs and whether a token's routing depends on that token alone.
Registering it is enough for the registry-wide tests (gradient to the router, masks, causality, micro-batching) to hold
it to account; ``docs/add_a_router.md`` walks through one.

All families compute logits, softmax and weights in float32, whatever the type of ``x``.

Letters: T tokens, D model, E experts, K choices per row, R routing rows, C capacity.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ConfigError, RouterConfig
from moejax.sharding import ArraySpec
from moejax.types import RouteContext, Routing

RouterWeights = Mapping[str, Array]
"""Every matrix, bias and state of one router, by the names that its family declares."""

RouterFn = Callable[[Array, RouterWeights, RouteContext, RouterConfig], Routing]


@dataclasses.dataclass(frozen=True)
class RouterFamily:
    name: str
    route: RouterFn
    arrays: Callable[[int, int], dict[str, ArraySpec]]
    """``(D, E) ->`` the arrays of one router."""
    causal: bool
    """True: a token's routing depends on no other token, so that a decoder may use it."""
    noisy: bool
    """True: draws noise during training, so that the load loss is defined."""
    min_k: int
    max_k: int | None
    why_k: str
    update: Callable[[dict[str, Array], Array, RouterConfig], dict[str, Array]] | None
    """Rule for the state arrays after an optimizer step: ``(state, routed[E], config) -> state``."""


FAMILIES: dict[str, RouterFamily] = {}


def linear_router(dim: int, experts: int) -> dict[str, ArraySpec]:
    """The one matrix that most families need."""
    return {"kernel": ArraySpec((dim, experts), ("embed", "router"), fan_in=dim)}


def register(
    name: str,
    *,
    arrays: Callable[[int, int], dict[str, ArraySpec]] = linear_router,
    causal: bool = True,
    noisy: bool = False,
    min_k: int = 1,
    max_k: int | None = None,
    why_k: str = "",
    update: Callable[[dict[str, Array], Array, RouterConfig], dict[str, Array]] | None = None,
) -> Callable[[RouterFn], RouterFn]:
    """Registers a router family under ``name``; the fields are those of :class:`RouterFamily`."""

    def add(route: RouterFn) -> RouterFn:
        if name in FAMILIES:
            raise ValueError(f"router {name!r} is registered twice")
        FAMILIES[name] = RouterFamily(name, route, arrays, causal, noisy, min_k, max_k, why_k, update)
        return route

    return add


def family(config: RouterConfig, num_experts: int, *, causal_model: bool = True) -> RouterFamily:
    """The family that ``config`` names, after checking it.

    Raises:
      ConfigError: unknown name, k outside what the family and ``num_experts`` allow, or a non-causal family in a causal
        decoder without ``noncausal="allow"``.
    """
    if config.name not in FAMILIES:
        raise ConfigError(f"router.name={config.name!r}: choose one of {', '.join(sorted(FAMILIES))}")
    fam = FAMILIES[config.name]
    if not 1 <= config.k <= num_experts:
        raise ConfigError(f"router.k={config.k} must lie in [1, num_experts={num_experts}]")
    if config.k < fam.min_k or (fam.max_k is not None and config.k > fam.max_k):
        raise ConfigError(f"router.k={config.k} does not fit router.name={config.name!r}: {fam.why_k}")
    if causal_model and not fam.causal and config.noncausal != "allow":
        raise ConfigError(
            f"router.name={config.name!r} lets a token's routing depend on later tokens, which leaks the future in a "
            "causal decoder: choose another router, or set router.noncausal='allow' to study it on purpose"
        )
    return fam


# --- pieces that families share -------------------------------------------------------------------


def router_logits(
    x: Float[Array, "T D"], weights: RouterWeights, ctx: RouteContext, config: RouterConfig
) -> Float[Array, "T E"]:
    """``x @ kernel`` in float32 at full precision, with Switch's multiplicative input jitter U(1-e, 1+e) in
    training."""
    x = x.astype(jnp.float32)
    if ctx.train and config.jitter > 0:
        low, high = 1.0 - config.jitter, 1.0 + config.jitter
        x = x * jax.random.uniform(_key(ctx, 0), x.shape, jnp.float32, low, high)
    return jnp.dot(x, weights["kernel"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def token_mask(ctx: RouteContext, num_tokens: int) -> Bool[Array, "T"]:
    return jnp.ones(num_tokens, bool) if ctx.mask is None else jnp.asarray(ctx.mask)


def _key(ctx: RouteContext, stream: int) -> Array:
    if ctx.key is None:
        raise ValueError("this router draws noise in training: pass RouteContext(key=...)")
    return jax.random.fold_in(ctx.key, stream)


def _table(
    expert: Array,
    weight: Array,
    probs: Array,
    logits: Array,
    ctx: RouteContext,
    config: RouterConfig,
    **more: Array,
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
        **more,
    )


def count_by_expert(expert: Int[Array, "P"], num_experts: int) -> Int[Array, "E"]:
    """Occurrences of each id in ``[0, E)``, as a fused compare-and-sum: no scatter, so deterministic."""
    return jnp.sum(expert[:, None] == jnp.arange(num_experts, dtype=expert.dtype), axis=0, dtype=jnp.int32)


# --- families -------------------------------------------------------------------------------------


@register("topk_of_softmax")
def topk_of_softmax(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Top-k of the softmax over all experts (GShard, OLMoE, Qwen, DeepSeek-V2; survey section 2).

    ``p = softmax(x W); e = topk(p); weight = p_e`` or, with ``renormalise``, ``p_e / sum(p_e)``. Without it the weights
    sum to less than 1 and the router has a gradient for every k, also k = 1.
    """
    logits = router_logits(x, w, ctx, config)
    probs = jax.nn.softmax(logits)
    weight, expert = jax.lax.top_k(probs, config.k)
    if config.renormalise and config.k > 1:  # for k = 1 it would be the constant 1: no gradient
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return _table(expert, weight, probs, logits, ctx, config)


@register(
    "softmax_of_topk",
    min_k=2,
    why_k="with k=1 its gate weight is the constant 1, so the router gets no gradient; "
    "use 'topk_of_softmax' or 'switch'",
)
def softmax_of_topk(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Softmax over the top-k logits (Shazeer 2017 without noise, Mixtral; survey section 2). Weights sum to 1.

    Equal to ``topk_of_softmax`` with renormalisation in exact arithmetic; kept because checkpoints name it.
    """
    logits = router_logits(x, w, ctx, config)
    top, expert = jax.lax.top_k(logits, config.k)
    return _table(expert, jax.nn.softmax(top), jax.nn.softmax(logits), logits, ctx, config)


@register("switch", max_k=1, why_k="Switch is top-1: set router.k=1")
def switch(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Switch Transformer top-1 (2101.03961, eq. 2): ``y = p_i f_i(x)``, never renormalised; jitter in training."""
    logits = router_logits(x, w, ctx, config)
    probs = jax.nn.softmax(logits)
    weight, expert = jax.lax.top_k(probs, 1)
    return _table(expert, weight, probs, logits, ctx, config)


def _noisy_arrays(dim: int, experts: int) -> dict[str, ArraySpec]:
    return linear_router(dim, experts) | {"noise": ArraySpec((dim, experts), ("embed", "router"), init="zeros")}


@register("noisy_topk", arrays=_noisy_arrays, noisy=True)
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
        noise = jnp.dot(x.astype(jnp.float32), w["noise"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        sigma = jax.nn.softplus(noise) + 1e-2  # his code adds it: the ratio below stays finite
        noisy = logits + jax.random.normal(_key(ctx, 1), logits.shape) * sigma
        if config.k < num_experts:
            top = jax.lax.top_k(noisy, config.k + 1)[0]
            chosen = noisy > top[:, config.k, None]
            threshold = jnp.where(chosen, top[:, config.k, None], top[:, config.k - 1, None])
            load_prob = jax.scipy.stats.norm.cdf((logits - threshold) / sigma)
        else:
            load_prob = jnp.ones_like(logits)
    top, expert = jax.lax.top_k(noisy, config.k)
    probs = jax.nn.softmax(noisy)
    weight = jax.nn.softmax(top) if config.k > 1 else jnp.take_along_axis(probs, expert, axis=1)
    return _table(expert, weight, probs, logits, ctx, config, **({} if load_prob is None else {"load_prob": load_prob}))


def _sigmoid_arrays(dim: int, experts: int) -> dict[str, ArraySpec]:
    return linear_router(dim, experts) | {"bias": ArraySpec((experts,), ("router",), init="zeros", kind="state")}


def update_selection_bias(state: dict[str, Array], routed: Float[Array, "E"], config: RouterConfig) -> dict[str, Array]:
    """Auxiliary-loss-free balancing (2408.15664): ``b_i += u * sign(mean(c) - c_i)`` with the step's global counts
    ``c``."""
    step = config.bias_update_rate * jnp.sign(jnp.mean(routed, axis=-1, keepdims=True) - routed)
    return {"bias": state["bias"] + step}


@register("sigmoid_bias", arrays=_sigmoid_arrays, update=update_selection_bias)
def sigmoid_bias(x: Float[Array, "T D"], w: RouterWeights, ctx: RouteContext, config: RouterConfig) -> Routing:
    """Sigmoid scores with a selection bias (DeepSeek-V3): choose the top-k of ``s + b``; the weights never see ``b``.

    ``s = sigmoid(x W); weight = s_e`` or, with ``renormalise``, ``s_e / sum(s_e)``. ``b`` has no gradient; it moves by
    :func:`update_selection_bias` after each optimizer step. With k = 1 the weight is never renormalised.
    """
    logits = router_logits(x, w, ctx, config)
    scores = jax.nn.sigmoid(logits)
    _, expert = jax.lax.top_k(jax.lax.stop_gradient(scores) + w["bias"], config.k)
    weight = jnp.take_along_axis(scores, expert, axis=1)
    if config.renormalise and config.k > 1:
        # The floor only acts where all chosen scores underflow; without it such a row would be 0 / 0.
        weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-20)
    return _table(expert, weight, scores, logits, ctx, config)


@register("expert_choice", causal=False)
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
    _, token = jax.lax.top_k(masked.T, capacity)  # [E, C]
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
