"""Limits by name: as text in configs and flags (``token_drop:factor=1.5,order=random``), and as JSON in traces."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast, get_args, get_origin

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax.config import ConfigError, MoEConfig
from moejax.limits.baselines import EfficientSkip, OpportunisticDrop
from moejax.limits.budget import DeviceBudget, MeasuredBudget
from moejax.limits.drop import ExpertDrop, Loads, TokenDrop
from moejax.limits.expand import AddedWeight, ExpandedDrop, Priority, Reroute
from moejax.limits.pieces import DropOrder, Rounding, Scope
from moejax.limits.threshold import Form, LoadAware, ThresholdDrop, halving
from moejax.types import Limit

Factor = float | tuple[float, ...]
"""One capacity factor, or one for each MoE layer."""

BY_LAYER = ("factor", "threshold", "beta")
"""Fields of limits that are one number, or one for each MoE layer."""

# --- from plain values ----------------------------------------------------------------------------


def token_drop(
    factor: Factor,
    order: DropOrder | str = "score",
    *,
    rounding: Rounding = "floor",
    scope: Scope = "rank",
    keep_top1: bool = False,
    renormalise: bool = False,
    drop_first: int | None = None,
) -> TokenDrop:
    """A :class:`TokenDrop` from plain values.

    Raises:
      ConfigError: an unknown order, a negative factor, or a draw at random within requests.
    """
    if order not in get_args(DropOrder):
        raise ConfigError(f"order={order!r}: choose one of {', '.join(get_args(DropOrder))}")
    if order == "random" and scope == "request":
        raise ConfigError(
            "order='random' with scope='request': a draw depends on the token's place in the batch, so nothing would "
            "be batch-invariant; choose another order, or scope='fair'"
        )
    return TokenDrop(
        factor=_factor(factor), order=cast(DropOrder, order), rounding=rounding, scope=scope, keep_top1=keep_top1,
        renormalise=renormalise, drop_first=None if drop_first is None else jnp.int32(drop_first),
    )  # fmt: skip


def expanded_drop(
    factor: Factor,
    *,
    priority: Priority = "score",
    floor: float = 0.0,
    added_weight: AddedWeight = "score",
    rounding: Rounding = "floor",
    scope: Scope = "rank",
    keep_top1: bool = False,
    renormalise: bool = False,
) -> ExpandedDrop:
    """An :class:`ExpandedDrop` from plain values; raises ConfigError for a negative factor or a floor that is NaN."""
    if math.isnan(floor):
        raise ConfigError("floor=nan: give the score that an added pair must exceed, or 0")
    return ExpandedDrop(
        factor=_factor(factor), floor=jnp.float32(floor), priority=priority, added_weight=added_weight,
        rounding=rounding, scope=scope, keep_top1=keep_top1, renormalise=renormalise,
    )  # fmt: skip


def reroute(
    factor: Factor,
    *,
    rounds: int = 2,
    added_weight: AddedWeight = "score",
    rounding: Rounding = "floor",
    renormalise: bool = False,
) -> Reroute:
    """A :class:`Reroute` from plain values; raises ConfigError for a negative factor or fewer than one round."""
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}: 1 or more; 1 is Token Drop by score")
    return Reroute(_factor(factor), rounds, added_weight, rounding, renormalise)


def expert_drop(*, experts: int = 0, share: float = 0.0, loads: Loads = "rank") -> ExpertDrop:
    """An :class:`ExpertDrop` of so many experts, or of a share of them.

    Raises:
      ConfigError: both or neither, or a value out of range.
    """
    if (experts > 0) == (share > 0) or experts < 0 or not 0 <= share <= 1:
        raise ConfigError(f"experts={experts}, share={share}: give a number of experts to skip, or a share in (0, 1]")
    return ExpertDrop(jnp.float32(experts or share), "experts" if experts else "share", loads)


def device_budget(
    factor: Factor,
    *,
    ranks: int = 0,
    rounding: Rounding = "floor",
    scope: Scope = "rank",
    keep_top1: bool = False,
    renormalise: bool = False,
    expanded: bool = False,
    added_weight: AddedWeight = "score",
) -> DeviceBudget:
    """A :class:`DeviceBudget` from plain values; raises ConfigError for a negative factor or number of ranks."""
    return DeviceBudget(
        _factor(factor), _ranks(ranks), rounding, scope, keep_top1, renormalise, expanded, added_weight
    )  # fmt: skip


def measured_budget(
    *, ranks: int = 0, seconds_per_row: tuple[float, ...] = (), renormalise: bool = False, loads: Loads = "rank"
) -> MeasuredBudget:
    """A :class:`MeasuredBudget` from plain values.

    Raises:
      ConfigError: a time that is not above 0, or times for another number of devices.
    """
    if any(not 0 < t < math.inf for t in seconds_per_row) or (seconds_per_row and len(seconds_per_row) != ranks):
        raise ConfigError(
            f"seconds_per_row={seconds_per_row}, ranks={ranks}: give one time above 0 for each of the ranks, or none"
        )
    times = jnp.asarray(seconds_per_row, jnp.float32) if seconds_per_row else None
    return MeasuredBudget(times, _ranks(ranks), renormalise, loads)


def threshold_drop(
    threshold: Factor,
    *,
    gap: float | None = None,
    major: int = 0,
    form: Form = "auto",
    load_aware: LoadAware = "none",
    ranks: int = 0,
) -> ThresholdDrop:
    """A :class:`ThresholdDrop` from plain values.

    Raises:
      ConfigError: a threshold or gap outside [0, 1), major neurons below 0 or without a gap, ranks without load_aware.
    """
    for value in threshold if isinstance(threshold, tuple) else (threshold,):
        if not 0 <= value < 1:
            raise ConfigError(f"threshold={value}: a share of a token's scores, at least 0 and below 1")
    if gap is not None and not 0 <= gap < 1:
        raise ConfigError(f"gap={gap}: half the distance of the two thresholds, at least 0 and below 1")
    if major < 0 or (gap is None and (major or form != "auto")):
        raise ConfigError(f"major={major}, form={form!r}: of 2T-Drop; give a gap with them, and a number of neurons")
    if ranks and load_aware == "none":
        raise ConfigError(f"ranks={ranks}: devices of load_aware='paper' or 'water'; choose one, or leave ranks out")
    return ThresholdDrop(
        jnp.asarray(threshold, jnp.float32), None if gap is None else jnp.float32(gap), major, form, load_aware,
        _ranks(ranks),
    )  # fmt: skip


def skip_second(beta: Factor, *, renormalise: bool = True) -> EfficientSkip:
    """An :class:`EfficientSkip` from plain values; raises ConfigError for a beta outside [0, 1]."""
    for value in beta if isinstance(beta, tuple) else (beta,):
        if not 0 <= value <= 1:
            raise ConfigError(f"beta={value}: a share of the token's best score, from 0 (skips none) to 1")
    return EfficientSkip(jnp.asarray(beta, jnp.float32), renormalise)


def opportunistic_drop(*, keep: int, renormalise: bool = False) -> OpportunisticDrop:
    """An :class:`OpportunisticDrop` from plain values; raises ConfigError for less than one pair."""
    if keep < 1:
        raise ConfigError(f"keep={keep}: pairs of each token that always stay, 1 or more")
    return OpportunisticDrop(jnp.int32(keep), renormalise)


def _factor(factor: Factor) -> Float[Array, "..."]:
    values = factor if isinstance(factor, tuple) else (factor,)
    for value in values:
        if not value >= 0:
            raise ConfigError(f"factor={value}: a capacity factor is a multiple of the mean load, 0 or more")
    return jnp.asarray(factor, jnp.float32)


def _ranks(ranks: int) -> int:
    if ranks < 0:
        raise ConfigError(f"ranks={ranks}: a number of devices, or 0 for those of expert parallelism")
    return ranks


LIMITS: dict[str, Callable[..., Limit]] = {
    "token_drop": token_drop, "expanded_drop": expanded_drop, "reroute": reroute, "expert_drop": expert_drop,
    "device_budget": device_budget, "measured_budget": measured_budget,
    "threshold_drop": threshold_drop, "skip_second": skip_second, "opportunistic_drop": opportunistic_drop,
}  # fmt: skip
"""Every limit by the name that configs and flags give it."""

# --- from text ------------------------------------------------------------------------------------

EXAMPLES = {"threshold": 0.08, "beta": 0.4, "keep": 2}
"""Values that an error message suggests, where 1.5 will not do."""


def parse(text: str) -> Limit:
    """The limit that ``text`` says: its name and, after a colon, options as ``name=value`` with commas between them.

    Several values of one option are parted by ``/`` (``factor=1/1.5/2``: one for each MoE layer).

    Raises:
      ConfigError: an unknown name or option, or a value that it cannot take.
    """
    name, _, rest = text.strip().partition(":")
    if name not in LIMITS:
        close = difflib.get_close_matches(name, LIMITS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(LIMITS)}"
        raise ConfigError(f"limit {text!r}: there is no limit {name!r}; {hint}")
    options = inspect.signature(LIMITS[name]).parameters
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in options or not equals or key in given:
            raise ConfigError(
                f"limit {text!r}: {part!r} is no option of {name}, or stands twice; write {name}:option=value with "
                f"{', '.join(options)}"
            )
        given[key] = _value(options[key].annotation, value, f"limit {text!r}: {part}")
    missing = [key for key, p in options.items() if p.default is inspect.Parameter.empty and key not in given]
    if missing:
        example = f"{name}:{missing[0]}={EXAMPLES.get(missing[0], 1.5)}"
        raise ConfigError(f"limit {text!r}: {name} needs {', '.join(missing)}, e.g. {example}")
    try:
        return LIMITS[name](**given)
    except ConfigError as error:
        raise ConfigError(f"limit {text!r}: {error}") from None


def _value(kind: Any, text: str, where: str) -> Any:
    kinds = get_args(kind) if get_origin(kind) not in (Literal, tuple) and get_args(kind) else (kind,)
    for each in kinds:  # of a union the first that fits
        if get_origin(each) is Literal:
            if text in get_args(each):
                return text
            continue
        if get_origin(each) is tuple:
            parts = [_number(part, float) for part in text.split("/")]
            if None not in parts:
                return tuple(parts)
        elif each is bool and text in ("true", "True", "1", "false", "False", "0"):
            return text in ("true", "True", "1")
        elif each in (int, float) and (value := _number(text, each)) is not None:
            return value
    choices = [c for each in kinds if get_origin(each) is Literal for c in get_args(each)]
    wanted = ", ".join(choices) or {bool: "true or false", int: "a whole number"}.get(kinds[0], "a number")
    raise ConfigError(f"{where}: must be {'one of ' if choices else ''}{wanted}")


def _number(text: str, kind: type) -> Any:
    if "_" in text:  # Python reads 1_5 as 15
        return None
    try:
        return kind(text)
    except ValueError:
        return None


# --- of a config ----------------------------------------------------------------------------------


def of_config(config: MoEConfig) -> tuple[Limit, ...]:
    """The limits that ``moe.capacity_factor`` or ``moe.capacity_limits`` put in force; none where it is dropless.

    Raises:
      ConfigError: both, or a text that says no limit.
    """
    if config.capacity_factor <= 0:
        return tuple(parse(text) for text in config.capacity_limits)
    if config.capacity_limits:
        raise ConfigError(
            f"moe.capacity_factor={config.capacity_factor} and moe.capacity_limits={config.capacity_limits}: one says "
            "Token Drop, the other any limits; set the factor to 0, or leave the limits out"
        )
    return (token_drop(config.capacity_factor, config.capacity_order),)


def check(limits: Iterable[Limit], config: MoEConfig, num_layers: int, *, causal: bool) -> None:
    """Whether limits fit a model with ``num_layers`` MoE layers; ``causal``: its router's rows are tokens.

    Raises:
      ConfigError: with the limit, the value, the rule and the way out.
    """
    majors: set[int] = set()  # of 2T-Drop
    limits = tuple(limits)
    halves = any(isinstance(limit, ThresholdDrop) and limit.gap is not None for limit in limits)
    for limit in limits:
        name = type(limit).__name__
        if (isinstance(limit, ExpandedDrop | Reroute) or getattr(limit, "expanded", False)) and not causal:
            raise ConfigError(
                f"{name} adds experts to tokens, and the rows of router.name={config.router.name!r} are pairs: choose "
                "another router, or a limit that only drops"
            )
        if isinstance(limit, EfficientSkip | OpportunisticDrop) and not causal:
            raise ConfigError(
                f"{name} compares the pairs of a token, and the rows of router.name={config.router.name!r} are pairs: "
                "choose another router, or another limit"
            )
        for field in BY_LAYER:
            values = getattr(limit, field, None)
            if values is not None and jnp.ndim(values) and values.shape[0] != num_layers:
                raise ConfigError(
                    f"{name}: {values.shape[0]} {field}s for {num_layers} MoE layers; give one for each, or one"
                )
        if isinstance(limit, ThresholdDrop) and limit.gap is not None:
            halving(config.expert_dim, limit.major, limit.form, config.parts)
            majors.add(limit.major)
            if len(majors) > 1:
                raise ConfigError(
                    f"{name}: limits with major={sorted(majors)}: a layer halves experts in one way only; give all the "
                    "same"
                )
        if isinstance(limit, ThresholdDrop) and config.parts_apart:
            if limit.form != "auto":
                raise ConfigError(
                    f"{name}: form={limit.form!r} halves whole experts, and with moe.part_order='part' a halved pair "
                    "leaves out parts, which lie on other ranks: leave form at 'auto', or choose moe.parts=1"
                )
        by_load = "load_aware" if getattr(limit, "load_aware", "none") != "none" else "measured_budget"
        if halves and config.parts_apart and (by_load == "load_aware" or isinstance(limit, MeasuredBudget)):
            raise ConfigError(
                f"{name}: {by_load} where pairs are halved (gap), with moe.part_order='part': the ranks that share an "
                f"expert would have unequal loads; choose moe.part_order='expert', or leave out gap or {by_load}"
            )
        if getattr(limit, "drop_first", None) is not None:
            raise ConfigError(f"{name}: drop_first needs a modality of each token, which language models do not have")
        ranks = getattr(limit, "ranks", 0)
        if ranks and config.num_experts % ranks:
            divisors = [d for d in range(1, config.num_experts + 1) if config.num_experts % d == 0]
            raise ConfigError(
                f"{name}: ranks={ranks} does not divide moe.num_experts={config.num_experts}: choose one of {divisors}"
            )
        whole = config.num_experts if isinstance(limit, ExpertDrop) and limit.unit == "experts" else 1
        if isinstance(limit, ExpertDrop) and float(limit.amount) >= whole:
            raise ConfigError(
                f"{name}: {limit.unit}={float(limit.amount):g} of moe.num_experts={config.num_experts} leaves none"
            )


def check_ranks(limits: Iterable[Limit], config: MoEConfig, ranks: int) -> None:
    """Whether limits fit ``ranks`` ranks of expert parallelism, real or virtual.

    Raises:
      ConfigError: a limit that asks which experts a rank hosts, where some lie in parts on several ranks.
    """
    if config.num_experts % ranks == 0 and not (config.parts_apart and ranks > 1):
        return
    divisors = [d for d in range(1, config.num_experts + 1) if config.num_experts % d == 0]
    apart, devices = "", max(d for d in divisors if d <= ranks)
    if config.parts_apart:
        apart, of_rank = "moe.part_order='expert' and ", max(1, config.stored_experts // ranks)
        devices = 1 if config.num_experts % of_rank else config.num_experts // of_rank
    where = (
        f"{ranks} ranks host parts of the moe.num_experts={config.num_experts} experts (moe.parts={config.parts}), not "
        "whole ones"
    )
    for limit in limits:
        name = type(limit).__name__
        if isinstance(limit, ExpandedDrop) or getattr(limit, "expanded", False):
            raise ConfigError(
                f"moe.capacity_limits: {name} adds the experts of a token's own rank, and {where}: choose {apart}"
                f"ranks of {divisors}, or a limit that only drops"
            )
        if getattr(limit, "ranks", 1) == 0 and getattr(limit, "load_aware", "") != "none":
            raise ConfigError(
                f"moe.capacity_limits: {name} follows the loads of devices, and {where}: say ranks={devices} in its "
                "text, so that devices that share an expert count as one"
            )


def describe(limits: Iterable[Limit]) -> list[dict[str, Any]]:
    """Each limit as JSON values: the name of its class, and its fields; later options only where they are used."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, str | bool | int):
            return value
        array = np.asarray(value)  # a float32 0.3 is written so, and reads back as the same float32
        return float(str(array)) if array.ndim == 0 and array.dtype.kind == "f" else array.tolist()

    def used(limit: Any, field: dataclasses.Field) -> bool:
        return not (field.metadata.get("later") and getattr(limit, field.name) is field.default)

    return [
        {"name": type(limit).__name__}
        | {f.name: plain(getattr(limit, f.name)) for f in dataclasses.fields(cast(Any, limit)) if used(limit, f)}
        for limit in limits
    ]
