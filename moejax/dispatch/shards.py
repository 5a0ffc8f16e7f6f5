"""Shards: running a function on each device's own tokens. The only file of the project that enters ``jax.shard_map``.

Inside, the mesh axis "expert" is there for collectives. :data:`emulated` makes the same of ranks on one device: the
function runs under ``jax.vmap`` with an axis of that name.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from moejax import sharding
from moejax.sharding import TOKEN_AXES

AXIS = "expert"
"""The mesh axis of expert parallelism."""

emulated = jax.make_user_context(1)
"""``with dispatch.emulated(R):`` without a mesh, :func:`per_shard` spreads tokens and experts over R ranks of one
device. Part of the key of compiled programs, as a mesh is."""


def token_shards() -> int:
    """Devices over which tokens are spread in the mesh in force (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return emulated.value if mesh.empty else sharding.token_shards(mesh)


def expert_ranks() -> int:
    """Devices of the mesh axis "expert" in force (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return emulated.value if mesh.empty else mesh.shape.get(AXIS, 1)


def per_shard(
    fn: Callable[..., Any], sharded: tuple, whole: Any, *, split_experts: bool = False, stacked: bool = True
) -> Any:
    """``fn(*sharded, whole)`` on each device's own tokens; every output leaf gains a leading shard axis.

    ``sharded`` arguments have a leading axis that is split over ("data", "expert"); ``whole`` (weights, limits, keys)
    is whole on each device, or with ``split_experts`` each leaf's leading axis, that of experts, is split over
    "expert". It is cast to varying, so that custom_vjp sees one type and the transpose sums its gradients over devices.
    On one device it is a plain call.

    Outputs are what the device made, with a new leading axis of one entry per device; with ``stacked=False`` joined
    along their own leading axis, that of the batch.
    """
    made = fn if not stacked else lambda *args: jax.tree.map(lambda leaf: leaf[None], fn(*args))
    mesh = jax.sharding.get_abstract_mesh()
    if token_shards() == 1:
        return made(*sharded, whole)
    if mesh.empty:
        return _on_emulated_ranks(made, sharded, whole, split_experts)
    spec, of_whole = PartitionSpec(TOKEN_AXES), PartitionSpec(AXIS) if split_experts else PartitionSpec()
    if AxisType.Explicit in mesh.axis_types:  # where a type says how an array is split, nothing is gathered unasked
        whole = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, of_whole), whole)

    def on_shard(*args: Any) -> Any:
        *split, rest = args
        over = tuple(axis for axis in TOKEN_AXES if not (split_experts and axis == AXIS))
        rest = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, over, to="varying"), rest)
        return made(*split, rest)

    return jax.shard_map(
        on_shard,
        in_specs=(*([spec] * len(sharded)), of_whole),
        out_specs=spec,
        axis_names=set(TOKEN_AXES),
        check_vma=True,
    )(*sharded, whole)


def _on_emulated_ranks(fn: Callable[..., Any], sharded: tuple, whole: Any, split_experts: bool) -> Any:
    ranks = emulated.value

    def split(leaf: Array) -> Array:
        if leaf.shape[0] % ranks:
            raise ValueError(f"an axis of {leaf.shape[0]} does not divide over {ranks} emulated ranks")
        return leaf.reshape(ranks, -1, *leaf.shape[1:])

    arguments = (*jax.tree.map(split, sharded), jax.tree.map(split, whole) if split_experts else whole)
    axes = (*([0] * len(sharded)), 0 if split_experts else None)
    return jax.tree.map(merge_shards, jax.vmap(fn, in_axes=axes, axis_name=AXIS)(*arguments))


def shard_index() -> Array:
    """Index of this device among the token shards; 0 outside :func:`per_shard` or on one device."""
    if token_shards() == 1:
        return jnp.int32(0)
    return jax.lax.axis_index(AXIS if jax.sharding.get_abstract_mesh().empty else TOKEN_AXES)


def merge_shards(stacked: Array) -> Array:
    """``[shards, b, ...]`` back to ``[B, ...]``."""
    return stacked.reshape(-1, *stacked.shape[2:])
