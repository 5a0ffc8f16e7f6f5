"""The device mesh, the logical axes of every array, and how one maps to the other.

Each array is declared once, by an :class:`ArraySpec` with a logical name for each dimension, and stands in the model as
an ``nnx.Param`` that carries those names. :class:`Rules` says which mesh axis a logical axis is split over; changing
the parallelism is changing the rules, not the model.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray

from moejax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "expert", "model")
TOKEN_AXES = ("data", "expert")
"""Tokens are spread over both: attention is data parallel on every device, experts live on the "expert" axis."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One parameter or state array: its shape, a logical name for each dimension, and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"
    fan_in: int = 0
    """For "normal": the standard deviation is ``scale / sqrt(fan_in)``."""
    kind: Literal["param", "state"] = "param"
    """"state" is never touched by the optimizer (a selection bias, a counter)."""

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length: name every dimension")


class RouterState(nnx.Variable):
    """Router state that training updates by a rule of its own and the optimizer never sees."""


def create(spec: ArraySpec, key: PRNGKeyArray, scale: float = 1.0) -> nnx.Variable:
    """A float32 ``nnx.Param`` (or :class:`RouterState`) drawn as ``spec`` says."""
    if spec.init == "normal":
        value = jax.random.truncated_normal(key, -3.0, 3.0, spec.shape, jnp.float32)
        value = value * (scale / math.sqrt(max(spec.fan_in, 1)))
    else:
        value = jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, jnp.float32)
    variable = nnx.Param if spec.kind == "param" else RouterState
    return variable(value, axes=spec.axes)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axis (or None: replicated) of each logical axis of the parameters."""

    experts: str | None = "expert"
    embed: str | None = None
    ffn: str | None = "model"
    expert_ffn: str | None = "model"
    heads: str | None = "model"
    kv_heads: str | None = "model"
    vocab: str | None = None
    head_dim: str | None = None
    latent: str | None = None
    """Low ranks of latent attention."""
    joined: str | None = None
    """Two representations side by side (multi-token prediction)."""
    router: str | None = None
    """The router's expert axis: every rank needs all logits."""
    layers: str | None = None

    def spec(self, axes: Iterable[str], ndim: int | None = None) -> P:
        """``PartitionSpec`` of an array with logical ``axes``; leading dimensions that have no name are stacked layers.

        Raises:
          ValueError: two dimensions of one array would land on one mesh axis, or an axis has no rule.
        """
        names = list(axes)
        if ndim is not None:
            names = ["layers"] * (ndim - len(names)) + names
        known = {f.name for f in dataclasses.fields(self)}
        unknown = [a for a in names if a not in known]
        if unknown:
            raise ValueError(f"logical axes {unknown} have no rule; known: {sorted(known)}")
        mesh_axes = [getattr(self, a) for a in names]
        used = [a for a in mesh_axes if a is not None]
        if len(used) != len(set(used)):
            raise ValueError(f"axes {names} collide on mesh axes {mesh_axes}: change one of the rules")
        return P(*mesh_axes)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with axes ("data", "expert", "model"), all of type Auto.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    fixed = config.expert * config.model
    data = config.data
    if data == -1:
        if count % fixed:
            raise ConfigError(
                f"config.mesh.expert={config.expert} x config.mesh.model={config.model} does not divide the "
                f"{count} devices: choose axes whose product divides {count}, or set config.mesh.data"
            )
        data = count // fixed
    if data * fixed > count:
        raise ConfigError(
            f"config.mesh data={data} x expert={config.expert} x model={config.model} needs {data * fixed} devices, "
            f"{count} are there: lower one axis, or set config.mesh.data=-1"
        )
    chosen = np.asarray(devices[: data * fixed]).reshape(data, config.expert, config.model)
    return Mesh(chosen, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """For a tree of nnx variables (or their abstract shapes): the same tree with a ``NamedSharding`` in each."""
    rules = rules or Rules()
    sizes = dict(mesh.shape)

    def one(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_raw_value()
        axes = variable.get_metadata().get("axes", ("layers",) * value.ndim)
        spec = rules.spec(axes, value.ndim)
        for dim, axis in enumerate(spec):
            if axis is not None and value.shape[dim] % sizes[axis]:
                raise ConfigError(
                    f"logical axis {axes[dim - value.ndim + len(axes)]!r} of size {value.shape[dim]} is not "
                    f"divisible by mesh axis {axis!r}={sizes[axis]}: choose a divisor of {value.shape[dim]}"
                )
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(one, tree, is_leaf=lambda v: isinstance(v, nnx.Variable))


def token_shards(mesh: Mesh | AbstractMesh) -> int:
    """Devices over which a batch is split: the product of the mesh's token axes."""
    return math.prod(mesh.shape[axis] for axis in TOKEN_AXES if axis in mesh.axis_names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of anything with a leading batch axis."""
    return NamedSharding(mesh, P(TOKEN_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(batch: dict[str, Any], mesh: Mesh | None) -> dict[str, Array]:
    """Host arrays to devices, split over the batch axis; without a mesh, to the default device."""
    if mesh is None:
        return {k: jnp.asarray(v) for k, v in batch.items()}
    sharding = batch_sharding(mesh)
    return {k: jax.device_put(v, sharding) for k, v in batch.items()}
