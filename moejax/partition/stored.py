"""The arrays of a whole checkpoint with their experts split or merged (:mod:`moejax.partition.complete`): every MoE
layer, multi-token-prediction modules among them, and the optimizer's moments with their parameters.

Reading a checkpoint and writing the one made of it is ``moejax.derived``, for every command that makes one of another.
"""

import re
from typing import Any

from moejax.config import MoEConfig
from moejax.partition.complete import Form, Moment, PartOrder, merge_arrays, split_arrays

_LAYER = re.compile(r"(.*/moe/)((?:store|router/arrays)/\w+)")
_MOMENTS: dict[str, Moment] = {"mu": 1, "nu": 2}
"""Fields of optax's ``ScaleByAdamState`` that mirror the parameters."""


def split_checkpoint(
    arrays: dict[str, Any], moe: MoEConfig, parts: int, form: Form, part_order: PartOrder | None = None
) -> dict[str, Any]:
    """The arrays of a checkpoint, by path, with all experts split; ``moe`` is the config that they have.

    Arrays are taken out of ``arrays`` one by one, so that memory holds each once.

    Raises:
      ConfigError: as :func:`moejax.partition.complete.split_moe`.
    """
    return {
        name: split_arrays({of_layer: array}, moe, parts, form, moment, part_order)[of_layer] if of_layer else array
        for name, of_layer, moment, array in _taken(arrays)
    }


def merge_checkpoint(arrays: dict[str, Any], moe: MoEConfig, parts: int = 0) -> dict[str, Any]:
    """The inverse of :func:`split_checkpoint`; ``moe`` is the config that the arrays have.

    Raises:
      ConfigError: as :func:`moejax.partition.complete.merge_arrays`; ``arrays`` is then of no more use.
    """
    return {
        name: merge_arrays({of_layer: array}, moe, parts, moment)[of_layer] if of_layer else array
        for name, of_layer, moment, array in _taken(arrays)
    }


def layer_array(path: str) -> tuple[str, Moment]:
    """``("store/up", 1)`` for ``opt_state/1/0/mu/groups/0/blocks/0/moe/store/up``; ``("", 0)`` for an array that is
    none of an MoE layer's router and routed experts.

    Raises:
      ValueError: an array of the optimizer that mirrors such a one and is neither moment of Adam.
    """
    found = _LAYER.fullmatch(path)
    if not found:
        return "", 0
    if not path.startswith("opt_state/"):
        return found[2], 0
    moments = [_MOMENTS[word] for word in found[1].split("/") if word in _MOMENTS]
    if not moments:
        raise ValueError(f"{path}: it is not known how this array follows its parameter")
    return found[2], moments[0]


def _taken(arrays: dict[str, Any]) -> Any:
    for name in list(arrays):
        of_layer, moment = layer_array(name)
        yield name, of_layer, moment, arrays.pop(name)
