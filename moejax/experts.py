"""The experts of one layer: their weights (a store) and the grouped FFN that applies them."""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

import kernels_pallas as kernels
from kernels_pallas.grouped_matmul import groups
from moejax.partition import split
from moejax.sharding import ArraySpec, create
from moejax.types import Activation, ExpertWeights, Routing

GATED = kernels.GATED


def activate(name: Activation, up: Array, gate: Array | None) -> Array:
    """``silu(gate) * up``, ``gelu(gate) * up``, ``gelu(up)`` or ``relu(up)``; gelu is the tanh form. swiglu_clamped:
    that of ``kernels_pallas.grouped_matmul``."""
    if gate is not None:
        if name == "swiglu_clamped":
            return kernels.clamped_swiglu(gate, up)
        return (jax.nn.silu(gate) if name == "swiglu" else jax.nn.gelu(gate, approximate=True)) * up
    return jax.nn.gelu(up, approximate=True) if name == "gelu" else jax.nn.relu(up)


def expert_specs(
    num_experts: int, dim: int, expert_dim: int, activation: Activation, bias: bool = False
) -> dict[str, ArraySpec]:
    """Arrays of E routed experts of width F, stacked over the expert axis; with ``bias`` one for each projection."""
    up = ArraySpec((num_experts, dim, expert_dim), ("experts", "embed", "expert_ffn"), fan_in=dim)
    down = ArraySpec((num_experts, expert_dim, dim), ("experts", "expert_ffn", "embed"), fan_in=expert_dim)
    specs = {"up": up, "down": down} | ({"gate": up} if activation in GATED else {})
    if bias:
        hidden = ArraySpec((num_experts, expert_dim), ("experts", "expert_ffn"), init="zeros")
        specs |= {f"{name}_bias": hidden for name in ("up", "gate") if name in specs}
        specs["down_bias"] = ArraySpec((num_experts, dim), ("experts", "embed"), init="zeros")
    return specs


class ExpertStore(Protocol):
    """Seam 7: where the experts' weights live. ``prefetch`` may start a copy; ``get`` returns weights on the device.

    The Routing that ``prefetch`` sees has a leading shard axis on every leaf.
    """

    def prefetch(self, routing: Routing) -> None: ...

    def get(self) -> ExpertWeights: ...


class DeviceStore(nnx.Module):
    """All experts on the device: nothing to prefetch.

    With ``parts`` P the arrays are those of ``num_experts * P`` experts of width ``expert_dim / P``, in the order of
    :func:`moejax.partition.split`: what a seed gives computes the same for every P, and in both orders.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        expert_dim: int,
        activation: Activation,
        key: PRNGKeyArray,
        scale: float,
        bias: bool = False,
        parts: int = 1,
        apart: bool = False,
    ) -> None:
        specs = expert_specs(num_experts, dim, expert_dim, activation, bias)
        keys = jax.random.split(key, len(specs))
        made = {n: create(s, k, scale) for (n, s), k in zip(sorted(specs.items()), keys, strict=True)}
        if parts > 1:
            cut = split(ExpertWeights(**{name: variable[...] for name, variable in made.items()}), parts, apart)
            made = {name: variable.replace(getattr(cut, name)) for name, variable in made.items()}
        self.up, self.down, self.gate = made["up"], made["down"], made.get("gate")
        self.up_bias, self.gate_bias, self.down_bias = (made.get(f"{n}_bias") for n in ("up", "gate", "down"))

    def prefetch(self, routing: Routing) -> None:
        del routing

    def get(self) -> ExpertWeights:
        optional = {name: getattr(self, name) for name in ("gate", "up_bias", "gate_bias", "down_bias")}
        return ExpertWeights(
            up=self.up[...], down=self.down[...], **{n: None if v is None else v[...] for n, v in optional.items()}
        )


def grouped_ffn(
    xs: Float[Array, "P D"],
    group_sizes: Int[Array, "G"],
    weights: ExpertWeights,
    activation: Activation,
    implementation: str = "auto",
    extents: tuple[int, ...] | None = None,
) -> Float[Array, "P D"]:
    """Applies expert ``e``'s FFN to its rows (seam 5). Weights are cast to the type of ``xs``; accumulation is float32.

    With ``extents`` each expert has as many groups of rows, which compute so many of its leading neurons each, and get
    as large a share of its down bias (as in a sub-expert of so many neurons).

    Rows past ``sum(group_sizes)`` come out undefined.
    """
    weights = jax.tree.map(lambda w: w.astype(xs.dtype), weights)
    num_experts, width, dim = weights.down.shape
    by_group, down_bias = None, weights.down_bias
    if extents is not None:
        by_group = jnp.asarray(np.tile(np.asarray(extents, np.int32), num_experts))  # a constant: no kernel makes it
        down_bias = None
    ys = kernels.grouped_ffn(
        xs,
        group_sizes,
        weights.gate,
        weights.up,
        weights.down,
        activation=activation,
        gate_bias=weights.gate_bias,
        up_bias=weights.up_bias,
        down_bias=down_bias,
        extents=by_group,
        implementation=None if implementation == "auto" else implementation,
    )
    if extents is None or weights.down_bias is None:
        return ys
    share = jnp.asarray(extents, xs.dtype) / width
    return groups.add_bias(ys, (weights.down_bias[:, None] * share[:, None]).reshape(-1, dim), group_sizes)


class DenseFFN(nnx.Module):
    """The FFN of a dense layer, and of fused shared experts."""

    def __init__(self, dim: int, ffn_dim: int, activation: Activation, key: PRNGKeyArray, scale: float) -> None:
        up = ArraySpec((dim, ffn_dim), ("embed", "ffn"), fan_in=dim)
        keys = jax.random.split(key, 3)
        self.activation: Activation = activation
        self.up = create(up, keys[0], scale)
        self.down = create(ArraySpec((ffn_dim, dim), ("ffn", "embed"), fan_in=ffn_dim), keys[1], scale)
        self.gate = create(up, keys[2], scale) if activation in GATED else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate = None if self.gate is None else x @ self.gate[...].astype(x.dtype)
        hidden = activate(self.activation, x @ self.up[...].astype(x.dtype), gate)
        return jnp.dot(hidden, self.down[...].astype(x.dtype))
