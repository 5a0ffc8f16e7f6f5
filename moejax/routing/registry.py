"""The registry of router families, and the checks of a router's config.

Letters: T tokens, D model, E experts, K choices per row, R routing rows.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from jaxtyping import Array

from moejax.config import ConfigError, RouterConfig
from moejax.sharding import ArraySpec
from moejax.types import RouteContext, Routing

RouterWeights = Mapping[str, Array]
"""Every matrix, bias and state of one router, by the names that its family declares."""

RouterFn = Callable[[Array, RouterWeights, RouteContext, RouterConfig], Routing]

UpdateFn = Callable[[dict[str, Array], Array, RouterConfig, int], dict[str, Array]]
"""``(state, pairs of each id [..., E], config, experts that compute) -> state``."""

SETTINGS = {"bias": False, "groups": 1, "mask_margin": 0.01}
"""Fields of a router's config that not every family implements, with the value that leaves them out."""


@dataclasses.dataclass(frozen=True)
class RouterFamily:
    name: str
    route: RouterFn
    arrays: Callable[[int, int], dict[str, ArraySpec]]
    """``(D, E) ->`` the arrays of one router, all but a bias on its logits (:func:`router_arrays`)."""
    causal: bool
    """True: a token's routing depends on no other token, so that a decoder may use it."""
    noisy: bool
    """True: draws noise during training, so that the load loss is defined."""
    min_k: int
    max_k: int | None
    why_k: str
    update: UpdateFn | None
    """Rule for the state arrays after an optimizer step."""
    settings: frozenset[str]
    """What it implements of :data:`SETTINGS`; the others are refused when set, never ignored."""
    sums_to_one: bool
    """True: with k > 1 its weights sum to 1 by construction, so that ``renormalise=False`` is refused."""
    copied: Literal["divide", "keep", "no"]
    """What becomes of a score where each expert's column stands P times (the complete transformation of DualSparse-MoE,
    :mod:`moejax.partition.complete`). "divide": each copy has 1/P of it (a softmax over all experts); "keep": each has
    the whole (a sigmoid). The k P best must be the copies of the k best, and arrays of kind "state" must be added to
    the scores that choose. "no": something else, so that the transformation is refused."""
    wider: str
    """Family that with k above 1 and ``renormalise=False`` does to any number of choices what this one does to
    ``max_k``; "": none."""


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
    update: UpdateFn | None = None,
    settings: tuple[str, ...] = (),
    sums_to_one: bool = False,
    copied: Literal["divide", "keep", "no"] = "no",
    wider: str = "",
) -> Callable[[RouterFn], RouterFn]:
    """Registers a router family under ``name``; the fields are those of :class:`RouterFamily`."""

    def add(route: RouterFn) -> RouterFn:
        if name in FAMILIES:
            raise ValueError(f"router {name!r} is registered twice")
        made = frozenset(settings)
        if not made <= SETTINGS.keys():
            raise ValueError(f"router {name!r}: settings={sorted(made)} must be among {sorted(SETTINGS)}")
        FAMILIES[name] = RouterFamily(
            name, route, arrays, causal, noisy, min_k, max_k, why_k, update, made, sums_to_one, copied, wider
        )  # fmt: skip
        return route

    return add


def router_arrays(config: RouterConfig, dim: int, num_choices: int) -> dict[str, ArraySpec]:
    """Arrays of one router that chooses among ``num_choices`` experts, zero-computation ones included: those of its
    family and, with ``router.bias``, ``logit_bias``."""
    specs = FAMILIES[config.name].arrays(dim, num_choices)
    return specs | ({"logit_bias": ArraySpec((num_choices,), ("router",), init="zeros")} if config.bias else {})


def family(config: RouterConfig, num_experts: int, *, zero_experts: int = 0, causal_model: bool = True) -> RouterFamily:
    """The family that ``config`` names, after checking it.

    Raises:
      ConfigError: unknown name, k outside what the family and the number of experts allow, a setting that the family
        does not implement, groups that do not fit, or a non-causal family in a causal decoder without
        ``noncausal="allow"``.
    """
    if config.name not in FAMILIES:
        raise ConfigError(f"router.name={config.name!r}: choose one of {', '.join(sorted(FAMILIES))}")
    fam = FAMILIES[config.name]
    choices = num_experts + zero_experts
    total = f"num_experts={num_experts}" if not zero_experts else f"num_experts + zero_experts={choices}"
    if not 1 <= config.k <= choices:
        raise ConfigError(f"router.k={config.k} must lie in [1, {total}]")
    for name, off in SETTINGS.items():
        if (value := getattr(config, name)) != off and name not in fam.settings:
            able = ", ".join(n for n, f in sorted(FAMILIES.items()) if name in f.settings)
            raise ConfigError(
                f"router.{name}={value!r}: router.name={config.name!r} does not implement it; set it to {off!r} or "
                f"choose one of: {able}"
            )
    if fam.sums_to_one and config.k > 1 and not config.renormalise:
        raise ConfigError(
            f"router.renormalise=False: the gate weights of router.name={config.name!r} sum to 1 by construction; set "
            "it to True, or choose 'topk_of_softmax', which leaves the choice"
        )
    if "mask_margin" in fam.settings and not 0 < config.mask_margin < float("inf"):
        raise ConfigError(
            f"router.mask_margin={config.mask_margin}: must be a finite number above 0; with 0 every gate weight is "
            "the constant 1, so the router gets no gradient"
        )
    _check_groups(config, choices, total)
    _check_copies(config, num_experts, zero_experts)
    if config.k < fam.min_k or (fam.max_k is not None and config.k > fam.max_k):
        raise ConfigError(f"router.k={config.k} does not fit router.name={config.name!r}: {fam.why_k}")
    if causal_model and not fam.causal and config.noncausal != "allow":
        raise ConfigError(
            f"router.name={config.name!r} lets a token's routing depend on later tokens, which leaks the future in a "
            "causal decoder: choose another router, or set router.noncausal='allow' to study it on purpose"
        )
    return fam


def _check_groups(config: RouterConfig, choices: int, total: str) -> None:
    groups, kept = config.groups, config.groups_kept
    if groups < 1 or choices % groups:
        divisors = [d for d in range(1, choices + 1) if choices % d == 0]
        raise ConfigError(f"router.groups={groups} does not divide {total}: choose one of {divisors}")
    if not 1 <= kept <= groups:
        raise ConfigError(f"router.groups_kept={kept} must lie in [1, router.groups={groups}]")
    size = choices // groups
    if config.k > kept * size:
        raise ConfigError(
            f"router.k={config.k} is more than the {kept * size} experts of the groups that router.groups_kept={kept} "
            f"leaves: keep {-(-config.k // size)} groups or more, or lower k"
        )
    if groups > 1 and config.group_score == "top2_sum" and size < 2 * config.copies:
        raise ConfigError(
            f"router.group_score='top2_sum' with router.groups={groups}: a group of one expert has no two best; choose "
            "'max', or fewer groups"
        )


def _check_copies(config: RouterConfig, num_experts: int, zero_experts: int) -> None:
    if config.copies < 1:
        raise ConfigError(f"router.copies={config.copies}: must be 1 or more")
    sizes = {
        "moe.num_experts": num_experts, "moe.zero_experts": zero_experts, "router.k": config.k,
        "the experts of a group": (num_experts + zero_experts) // config.groups,
    }  # fmt: skip
    for name, size in sizes.items():
        if size % config.copies:
            raise ConfigError(
                f"router.copies={config.copies}: experts with ids next to each other are copies of one, chosen "
                f"together, so it must divide {name}={size}; set router.copies=1 for experts that are chosen one by one"
            )
