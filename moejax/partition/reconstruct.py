"""Neuron reconstruction of DualSparse-MoE (2508.18376, section 3.2): the neurons of each expert in order of importance,
so that its leading columns are the important ones.

A permutation of columns of ``gate`` and ``up`` with the rows of ``down`` leaves every output what it was, up to the
order of a sum. Arrays may have any leading axes (layers, repeats).

Letters: E experts as the router knows them, P parts that each is stored in (``moe.parts``), F expert hidden, D model.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

AXES = {"up": -1, "gate": -1, "up_bias": -1, "gate_bias": -1, "down": -2}
"""The axis of neurons of each array of an expert store; ``down_bias`` has none."""


def order(importance: Float[np.ndarray, "*L E F"]) -> Int[np.ndarray, "*L E F"]:
    """The neuron that shall stand at each place: the most important first, equal ones as they stood."""
    return np.argsort(-np.asarray(importance), axis=-1, kind="stable").astype(np.int32)


def inverse(order: Int[np.ndarray, "*L E F"]) -> Int[np.ndarray, "*L E F"]:
    """The order that undoes ``order``; also each neuron's place in it."""
    return np.argsort(order, axis=-1).astype(np.int32)


def leading(order: Int[np.ndarray, "*L E F"], columns: int) -> Bool[np.ndarray, "*L E F"]:
    """Which neurons, as they stood, have one of the first ``columns`` places."""
    return inverse(order) < columns


def joined(values: np.ndarray, parts: int, apart: bool = False) -> np.ndarray:
    """``[L, E P, n]`` of experts as they are stored as ``[L, E, P n]`` of whole ones. ``apart``: part p of expert e is
    at ``p E + e``, not ``e P + p``."""
    layers, stored, width = values.shape
    if not apart:
        return values.reshape(layers, stored // parts, parts * width)
    cut = values.reshape(layers, parts, stored // parts, width).swapaxes(1, 2)
    return cut.reshape(layers, stored // parts, parts * width)


def in_parts(values: np.ndarray, parts: int, apart: bool = False) -> np.ndarray:
    """``[L, E, F]`` of whole experts as ``[L, E P, F / P]`` of those that are stored: the inverse of
    :func:`joined`."""
    layers, experts, width = values.shape
    made = values.reshape(layers, experts, parts, width // parts)
    made = made.swapaxes(1, 2) if apart else made
    return made.reshape(layers, experts * parts, width // parts)


def permuted(name: str, array: np.ndarray, order: Int[np.ndarray, "*L E F"], apart: bool = False) -> np.ndarray:
    """One array of an expert store with its neurons in ``order``.

    An expert that is stored in P parts, of which part p has neurons ``[p F / P, (p + 1) F / P)``, is sorted as a whole:
    its first parts are then the important ones.

    Args:
      name: ``up``, ``gate``, ``down`` or one of the biases.
      array: ``[*L, E P, ...]``.
      apart: part p of expert e is at ``p E + e``, not ``e P + p``.
    """
    if name not in AXES:
        return array
    *lead, experts, width = order.shape
    stored = array.shape[len(lead)]
    fits = array.shape[: len(lead)] == tuple(lead) and stored * array.shape[AXES[name]] == experts * width
    if not fits or stored % experts:
        raise ValueError(f"{name} of shape {array.shape} does not hold the neurons of an order of shape {order.shape}")
    parts = stored // experts
    # [L, E, P, (D,) F / P] or, for down, [L, E, P, F / P, D]: parts go beside the axis that they share out
    shape = (parts, experts) if apart else (experts, parts)
    cut = np.asarray(array).reshape(-1, *shape, *array.shape[len(lead) + 1 :])
    out = np.empty_like(cut)
    before, after = (cut.swapaxes(1, 2), out.swapaxes(1, 2)) if apart else (cut, out)
    for (layer, expert), places in zip(np.ndindex(*before.shape[:2]), order.reshape(-1, width), strict=True):
        whole = np.concatenate(list(before[layer, expert]), axis=AXES[name]).take(places, axis=AXES[name])
        after[layer, expert] = np.stack(np.split(whole, parts, axis=AXES[name]))
    return out.reshape(array.shape)


def reconstructed(
    arrays: Mapping[str, np.ndarray], orders: Mapping[str, Int[np.ndarray, "*L E F"]], apart: bool = False
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of a checkpoint with the neurons of some expert stores in other orders, and the names of those that
    were permuted.

    Adam's moments are of single weights, so they move with them: training goes on as it would have.

    Args:
      arrays: by path; those of an optimizer end like the parameter that they belong to.
      orders: by the path of the store, e.g. ``groups/0/blocks/0/moe/store``.
      apart: as in :func:`permuted`.
    """
    made, moved = dict(arrays), []
    for path, array in arrays.items():
        stem, _, name = path.rpartition("/")
        store = next((key for key in orders if stem == key or stem.endswith("/" + key)), None)
        if store is not None and name in AXES:
            made[path] = permuted(name, array, orders[store], apart)
            moved.append(path)
    return made, moved


def shares(
    importance: Float[np.ndarray, "*L E F"], order: Int[np.ndarray, "*L E F"] | None, columns: Sequence[int]
) -> Float[np.ndarray, "*L E C"]:
    """How much of an expert's importance its leading columns hold, for each of ``columns``, in ``order`` (None: as they
    stand). Importance below 0 (of the signed metrics) counts as 0. NaN for an expert that has none."""
    positive = np.maximum(np.asarray(importance, np.float64), 0.0)
    placed = positive if order is None else np.take_along_axis(positive, order, axis=-1)
    sums = np.cumsum(placed, axis=-1)
    held, whole = sums[..., np.asarray(columns) - 1], sums[..., -1:]
    return np.divide(held, whole, out=np.full_like(held, np.nan), where=whole > 0)


def agreement(a: Int[np.ndarray, "*L E F"], b: Int[np.ndarray, "*L E F"], columns: int) -> Float[np.ndarray, "*L E"]:
    """Of the neurons that one order puts first, the share that the other puts first too. By chance ``columns / F``."""
    return (leading(a, columns) & leading(b, columns)).sum(axis=-1) / columns
