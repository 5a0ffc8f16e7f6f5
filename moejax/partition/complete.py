"""Expert partition of DualSparse-MoE (2508.18376, section 3.1) as numbers: what the two transformations, and the way
back, make of one layer's arrays and of its config. Exact: the layer computes what it computed.

Both cut each expert's F neurons into P consecutive runs; part p of expert e has id ``e P + p``, or, in the partial form
with ``moe.part_order="part"``, ``p E + e``. Gate and up biases are cut with their columns.

*Complete*: the router's column of an expert stands P times, and k P are chosen. What the combine then needs depends on
what a gate weight becomes (:attr:`moejax.routing.RouterFamily.copied`):

- it is divided by P (softmax over all experts, any renormalised weights): the down projection times P, its bias as it
  is. Where the weight multiplies the input (``moe.weigh="input"``) gate and up projections times P instead, and the
  down bias divided by P.
- it is kept (sigmoid without renormalisation): the projections as they are, the down bias divided by P.

A selection bias that competes with scores divided by P is divided too. Zero-computation experts stand P times like the
others, which needs weights that are divided.

*Partial*: the router stays, pairs are spread over parts when they are dispatched (``moe.parts``); weights are kept, so
the down bias is divided by P.

Optimizer moments follow their parameters. A parameter that is multiplied by c has gradients divided by c; a copy of a
parameter gets, in the mean over copies, 1/P of the gradient of the original. The first moment is scaled alike and the
second by the square, so that AdamW's next step is the one that the original would have made, in units of the original
for what is copied or cut, and c times smaller relative to the parameter for what is multiplied by c.

Arrays are those of one layer, or of layers stacked along leading axes, of NumPy or JAX, by their names below ``moe/``
in a checkpoint: ``store/up``, ``router/arrays/kernel``, ... With P a power of two every scaling is exact (but for
numbers that leave the normal range of their type), so that the way back gives the same bits.

Letters: E experts, P parts of each, F expert hidden, D model, C ids that the router chooses among.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import numpy as np

from moejax.config import ConfigError, MoEConfig, RouterConfig
from moejax.routing import FAMILIES, router_arrays

Form = Literal["complete", "partial"]
PartOrder = Literal["expert", "part"]
Moment = Literal[0, 1, 2]
"""0: parameters or state; 1 and 2: the optimizer's first and second moments of parameters."""
Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What becomes of an array whose expert axis is the ``axis``-th from the end."""

    axis: int
    cut: int | None = None
    """The neurons' axis, from the end; None: the array is repeated."""
    factor: float = 1.0
    """Of the numbers."""
    gradient: float = 1.0
    """Of their gradients."""
    run: int = 1
    """Experts that stand together with the same part: E where the parts of an expert stand apart."""

    def scale(self, moment: Moment) -> float:
        return self.gradient**moment if moment else self.factor


def split_moe(moe: MoEConfig, parts: int, form: Form, part_order: PartOrder | None = None) -> MoEConfig:
    """The config of a layer whose experts are split.

    Args:
      part_order: of the partial form; None: the one that the layer has.

    Raises:
      ConfigError: ``parts`` does not divide the width of an expert, the router's family has no complete form, or parts
        that are there have another order.
    """
    width = moe.expert_dim // moe.parts
    if parts < 2 or width % parts:
        held = f"moe.expert_dim={moe.expert_dim}" + (f" / moe.parts={moe.parts} = {width}" if moe.parts > 1 else "")
        choices = [d for d in range(2, width + 1) if width % d == 0]
        raise ConfigError(f"parts={parts}: must be 2 or more and divide {held}: choose one of {choices[:8]}")
    part_order = part_order or moe.part_order
    if form == "partial":
        if moe.parts > 1 and part_order != moe.part_order:
            raise ConfigError(
                f"part_order={part_order!r}: the experts are stored in moe.parts={moe.parts} parts with moe.part_order="
                f"{moe.part_order!r}; merge them first (--form=merge), and split them into {moe.parts * parts} then"
            )
        return dataclasses.replace(moe, parts=moe.parts * parts, part_order=part_order)
    if part_order == "part":
        raise ConfigError(
            f"part_order={part_order!r} is of --form=partial: in the complete form parts are experts of the router, "
            "and those of one expert stand together"
        )
    if moe.parts > 1:
        raise ConfigError(
            f"moe.parts={moe.parts}: the complete form is of whole experts; merge them first (--form=merge), and split "
            "them partially afterwards"
        )
    shared = moe.shared_dim or moe.shared_experts * moe.expert_dim
    return dataclasses.replace(
        moe, num_experts=moe.num_experts * parts, expert_dim=width // parts, zero_experts=moe.zero_experts * parts,
        shared_dim=shared, router=_split_router(moe, parts),
    )  # fmt: skip


def merge_moe(moe: MoEConfig, parts: int = 0) -> tuple[MoEConfig, int, Form]:
    """The config of a layer with P parts of each expert joined, P, and the form that is undone: ``moe.parts`` where
    that is above 1, else ``router.copies``.

    Args:
      parts: how many are joined; 0: all of that form.

    Raises:
      ConfigError: nothing was split, or not into a multiple of ``parts``.
    """
    form: Form = "partial" if moe.parts > 1 else "complete"
    there, field = (moe.parts, "moe.parts") if form == "partial" else (moe.router.copies, "router.copies")
    if there == 1:
        raise ConfigError(
            "moe.parts=1 and router.copies=1: no expert of this model is split, so there is nothing to merge"
        )
    parts = parts or there
    if parts < 2 or there % parts:
        raise ConfigError(f"parts={parts}: must be 2 or more and divide {field}={there}; 0 merges all")
    if form == "partial":
        left = moe.parts // parts
        order = moe.part_order if left > 1 else "expert"
        return dataclasses.replace(moe, parts=left, part_order=order), parts, form
    router = dataclasses.replace(moe.router, k=moe.router.k // parts, copies=moe.router.copies // parts)
    width = moe.expert_dim * parts
    shared = 0 if moe.shared_dim == moe.shared_experts * width else moe.shared_dim
    merged = dataclasses.replace(
        moe, num_experts=moe.num_experts // parts, expert_dim=width, zero_experts=moe.zero_experts // parts,
        shared_dim=shared, router=router,
    )  # fmt: skip
    return merged, parts, form


def split_arrays(
    arrays: Arrays, moe: MoEConfig, parts: int, form: Form, moment: Moment = 0, part_order: PartOrder | None = None
) -> dict[str, Any]:
    """The arrays of a layer with config ``moe`` as those of :func:`split_moe` of it.

    Raises:
      ConfigError: as :func:`split_moe`.
    """
    rules = _rules(moe, parts, form, split_moe(moe, parts, form, part_order).parts_apart)
    return {name: _split(array, rules.get(name), parts, moment) for name, array in arrays.items()}


def merge_arrays(arrays: Arrays, moe: MoEConfig, parts: int = 0, moment: Moment = 0) -> dict[str, Any]:
    """The arrays of a layer with config ``moe`` as those of :func:`merge_moe` of it: the inverse of
    :func:`split_arrays`.

    Raises:
      ConfigError: copies of the router's columns (or of a down bias) differ: no unsplit layer computes the same.
    """
    merged, parts, form = merge_moe(moe, parts)
    rules = _rules(merged, parts, form, moe.parts_apart)
    return {name: _merge(name, array, rules.get(name), parts, moment) for name, array in arrays.items()}


def prune(arrays: Arrays, moe: MoEConfig, kept: Any) -> tuple[dict[str, Any], MoEConfig]:
    """A layer with only the experts ``kept`` ``[r]`` (ids, in the order that they shall have), and its config.

    Zero-computation experts stay. The router chooses among what is left, with the same k where there are so many.

    Raises:
      ConfigError: an id that is none, or twice; split experts; groups of experts.
    """
    ids = np.asarray(kept)
    if ids.ndim != 1 or not len(ids) or len(set(ids.tolist())) < len(ids) or not set(ids.tolist()) <= set(
        range(moe.num_experts)
    ):  # fmt: skip
        raise ConfigError(
            f"kept={ids.tolist()}: must name experts once each, in [0, moe.num_experts={moe.num_experts})"
        )
    if moe.parts > 1 or moe.router.copies > 1 or moe.router.groups > 1:
        raise ConfigError(
            f"moe.parts={moe.parts}, router.copies={moe.router.copies}, router.groups={moe.router.groups}: experts are "
            "pruned from layers where each stands alone; merge parts first, and prune no grouped router"
        )
    free = np.arange(moe.num_experts, moe.num_experts + moe.zero_experts)
    rules = _rules(moe, 1, "complete")

    def one(name: str, array: Any) -> Any:
        rule = rules.get(name)
        if rule is None:
            return array
        chosen = np.concatenate([ids, free]) if name.startswith("router/") else ids
        return array.take(chosen.astype(np.int32), axis=array.ndim - rule.axis)

    router = dataclasses.replace(moe.router, k=min(moe.router.k, len(ids) + moe.zero_experts))
    pruned = dataclasses.replace(moe, num_experts=len(ids), router=router)
    return {name: one(name, array) for name, array in arrays.items()}, pruned


def divides(router: RouterConfig) -> bool:
    """Whether P copies of an expert have 1/P of its gate weight each; False: each has the whole.

    Raises:
      ConfigError: neither, in the family of this router.
    """
    family = FAMILIES[router.name]
    if family.copied == "no":
        _refuse(router, "what it does with P equal columns is not P times the same")
    if router.k == 1 and family.sums_to_one:
        _refuse(router, "with k=1 its weight is a softmax over all experts, with more it is one over the chosen ones")
    renormalised = router.k > 1 and (router.renormalise or family.sums_to_one)
    return renormalised or family.copied == "divide"


# --------------------------------------------------------------------------------------------------------------------


def _refuse(router: RouterConfig, why: str) -> NoReturn:
    raise ConfigError(
        f"router.name={router.name!r} with router.k={router.k} has no complete form ({why}): use --form=partial, which "
        "leaves the router as it is"
    )


def _split_router(moe: MoEConfig, parts: int) -> RouterConfig:
    router = moe.router
    family, shrinks = FAMILIES[router.name], divides(router)
    if moe.zero_experts and not shrinks:
        _refuse(router, f"the weights of moe.zero_experts={moe.zero_experts} would be kept by each of their copies")
    changes: dict[str, Any] = {"k": router.k * parts, "copies": router.copies * parts}
    if router.k == 1:
        changes["renormalise"] = False  # one expert's weight never is; the weights of its parts would be
    if family.max_k is not None and router.k * parts > family.max_k:
        if not family.wider:
            _refuse(router, family.why_k)
        changes["name"] = family.wider
    return dataclasses.replace(router, **changes)


def _rules(moe: MoEConfig, parts: int, form: Form, apart: bool = False) -> dict[str, _Rule]:
    """What becomes of each array when the layer of ``moe`` is split; arrays that are not named stay. ``apart``: the
    parts of an expert come to stand E ids apart, as those that it has do."""
    whole, part = float(parts), 1.0 / parts
    complete = form == "complete"
    shrinks = complete and parts > 1 and divides(moe.router)
    weighs_input = moe.weigh == "input"
    columns, rows = _Rule(3, 1), _Rule(3, 2)
    bias = _Rule(2, factor=1.0, gradient=part) if shrinks and not weighs_input else _Rule(2, factor=part)
    if shrinks and weighs_input:
        columns = _Rule(3, 1, whole, part)
    elif shrinks:
        rows = _Rule(3, 2, whole, part)
    rules = {"store/up": columns, "store/gate": columns, "store/down": rows, "store/down_bias": bias}
    rules |= {f"store/{name}_bias": _Rule(2, 1) for name in ("up", "gate")}
    if not complete:
        run = moe.num_experts if apart else 1
        return {name: dataclasses.replace(rule, run=run) for name, rule in rules.items()}
    divided = FAMILIES[moe.router.name].copied == "divide"
    for name, spec in router_arrays(moe.router, 1, moe.num_experts + moe.zero_experts).items():
        axis = len(spec.axes) - spec.axes.index("router")
        of_state = part if divided and spec.kind == "state" else 1.0
        rules[f"router/arrays/{name}"] = _Rule(axis, factor=of_state, gradient=part)
    return rules


def _split(array: Any, rule: _Rule | None, parts: int, moment: Moment) -> Any:
    if rule is None:
        return array
    expert, stored = array.ndim - rule.axis, list(array.shape)
    stored[expert] *= parts
    runs = array.reshape(*array.shape[:expert], -1, rule.run, *array.shape[expert + 1 :])
    if rule.cut is None:
        array = runs.repeat(parts, axis=expert)
    else:
        neuron = runs.ndim - rule.cut
        width = stored[array.ndim - rule.cut] = runs.shape[neuron] // parts
        cut = runs.reshape(*runs.shape[:neuron], parts, width, *runs.shape[neuron + 1 :])
        array = _moved(cut, neuron, expert + 1)
    return _scaled(array.reshape(stored), rule.scale(moment))


def _merge(name: str, array: Any, rule: _Rule | None, parts: int, moment: Moment) -> Any:
    if rule is None:
        return array
    expert, whole = array.ndim - rule.axis, list(array.shape)
    whole[expert] //= parts
    runs = array.reshape(*array.shape[:expert], -1, parts, rule.run, *array.shape[expert + 1 :])
    if rule.cut is None:
        first = runs.take(0, axis=expert + 1)
        different = np.asarray(runs != first[(slice(None),) * (expert + 1) + (None,)])
        if different.any():
            moved = np.moveaxis(different, (expert, expert + 2), (0, 1)).reshape(whole[expert], -1).any(axis=1)
            raise ConfigError(
                f"{name}: the {parts} copies of {int(moved.sum())} of {len(moved)} experts are no longer equal "
                "(training moves them apart), so no unsplit layer computes the same: keep the split model, or merge "
                "the checkpoint from before"
            )
        array = first
    else:
        whole[array.ndim - rule.cut] *= parts
        array = _moved(runs, expert + 1, runs.ndim - rule.cut - 1)
    return _scaled(array.reshape(whole), 1.0 / rule.scale(moment))


def _moved(array: Any, source: int, target: int) -> Any:
    axes = [axis for axis in range(array.ndim) if axis != source]
    axes.insert(target, source)
    return array.transpose(axes)


def _scaled(array: Any, factor: float) -> Any:
    return array if factor == 1.0 else (array * factor).astype(array.dtype)
