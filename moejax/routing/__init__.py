"""The router zoo: pure functions ``(x, weights, ctx, config) -> Routing``, in a registry by name.

A family is registered with the arrays that it needs, the settings that it implements, and whether a token's routing
depends on that token alone. Registering it is enough for the registry-wide tests (gradient to the router, masks,
causality, micro-batching) to hold it to account; ``docs/add_a_router.md`` walks through one, and
``docs/routers_of_models.md`` says which family with which settings is the router of which published model.

All families compute logits, softmax and weights in float32, whatever the type of ``x``.
"""

from moejax.routing import families
from moejax.routing.families import (
    expert_choice,
    noisy_topk,
    sigmoid_bias,
    softmax_bias,
    softmax_of_topk,
    sparsemixer,
    switch,
    topk_of_sigmoid,
    topk_of_softmax,
    update_selection_bias,
    update_towards_even_share,
)
from moejax.routing.pieces import computing, count_by_expert, in_best_groups, router_logits, token_mask
from moejax.routing.registry import (
    FAMILIES,
    SETTINGS,
    RouterFamily,
    RouterFn,
    RouterWeights,
    UpdateFn,
    family,
    linear_router,
    register,
    router_arrays,
)

__all__ = [
    "FAMILIES",
    "SETTINGS",
    "RouterFamily",
    "RouterFn",
    "RouterWeights",
    "UpdateFn",
    "computing",
    "count_by_expert",
    "expert_choice",
    "families",
    "family",
    "in_best_groups",
    "linear_router",
    "noisy_topk",
    "register",
    "router_arrays",
    "router_logits",
    "sigmoid_bias",
    "softmax_bias",
    "softmax_of_topk",
    "sparsemixer",
    "switch",
    "token_mask",
    "topk_of_sigmoid",
    "topk_of_softmax",
    "update_selection_bias",
    "update_towards_even_share",
]
