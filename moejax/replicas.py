"""A model whose busiest experts have copies on other devices: the exact alternative to a limit (``--replicate``).

Loads come from a trace; the placement of each layer is :func:`moejax.replication.replicate`'s. For inference: a
training step would part the copies.

Letters: L MoE layers, E experts.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from moejax.config import ConfigError
from moejax.limits import DeviceBudget, ExpandedDrop, MeasuredBudget
from moejax.model import Decoder, moe_layer_ids, moe_layer_numbers
from moejax.moe import MoELayer
from moejax.replication import replicate, stacked, store_copies
from moejax.trace import Trace
from moejax.types import Limit


def recorded_loads(source: Trace) -> Float[np.ndarray, "L E"]:
    """Pairs that the routers of a trace gave to each expert that computes."""
    loads = np.zeros((len(source.layers), source.num_experts))
    for chunk in source:
        for layer, (expert, valid) in enumerate(zip(chunk.made.expert, chunk.made.valid, strict=True)):
            loads[layer] += np.bincount(expert[valid], minlength=source.num_experts)[: source.num_experts]
    return loads


def moe_layers(model: Decoder) -> Iterator[tuple[MoELayer, Int[np.ndarray, "repeats"]]]:
    """Each stack of the model's MoE layers, and their numbers among all of them."""
    for group, numbers in zip(model.groups, moe_layer_numbers(model.config), strict=True):
        assert numbers is not None
        for i, block in enumerate(group.blocks):
            if block.moe is not None:
                yield block.moe, numbers[:, i]


def check_limits(limits: Iterable[Limit]) -> None:
    """Raises ConfigError for a limit that goes by where experts are: it sees them in order of ids, not the copies."""
    for limit in limits:
        by_device = isinstance(limit, DeviceBudget | ExpandedDrop | MeasuredBudget)
        if by_device or getattr(limit, "expanded", False) or getattr(limit, "load_aware", "none") != "none":
            raise ConfigError(
                f"{type(limit).__name__} goes by the experts of each device in order of their ids, and copies lie "
                "elsewhere and take over load: choose a limit of each expert or token, or leave out --replicate"
            )


def with_copies(model: Decoder, loads: Float[np.ndarray, "L E"], mesh: Mesh, extra: int = 1) -> Decoder:
    """The model with ``extra`` copies more of each layer's busiest experts on each device, tokens travelling to them
    (``moe.dispatcher="ep"``). It computes what it did. Arrays are, and stay, spread over ``mesh``; while an array of
    experts is copied, a device may hold all of it once.

    Args:
      loads: recorded pairs of each layer's experts.

    Raises:
      ConfigError: a mesh with one rank of experts, loads of another model, virtual ranks, experts stored in parts, or
        more copies than there is a use for.
    """
    moe, ranks, layers = model.config.moe, mesh.shape["expert"], len(moe_layer_ids(model.config))
    if ranks < 2:
        raise ConfigError("copies of experts even out the devices of expert parallelism, and mesh.expert is 1: set it "
                          "to a divisor of the experts, as in --mesh=data=1,expert=4")  # fmt: skip
    if loads.shape != (layers, moe.num_experts):
        raise ConfigError(
            f"loads of {loads.shape[0]} layers with {loads.shape[1]} experts are not of this model, which has {layers} "
            f"MoE layers with {moe.num_experts}: record a trace of it (experiments.trace)"
        )
    if moe.virtual_ranks > 1:
        raise ConfigError(f"moe.virtual_ranks={moe.virtual_ranks}: copies need real ranks, and limits then see those: "
                          "set it to 1 in the checkpoint's config")  # fmt: skip
    if moe.parts > 1:
        raise ConfigError(f"moe.parts={moe.parts}: experts that are stored in parts cannot be copied; merge them first "
                          "(experiments.partition)")  # fmt: skip
    most = moe.num_experts - moe.num_experts // ranks
    if not 1 <= extra <= most:
        raise ConfigError(
            f"{extra} copies on each device: {ranks} devices with {moe.num_experts} experts have use for 1 to {most}"
        )
    mine = jax.tree.map(lambda leaf: leaf, model)
    config = dataclasses.replace(moe, dispatcher="ep")
    mine.config = dataclasses.replace(model.config, moe=config)
    for layer, numbers in moe_layers(mine):
        layer.config = config
        store_copies(layer, stacked([replicate(loads[i], ranks, extra) for i in numbers]), mesh)
    return mine
