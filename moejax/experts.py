"""The experts of one layer: their weights (a store) and the grouped FFN that applies them."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

import kernels_pallas as kernels
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
    """All experts on the device: nothing to prefetch."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        expert_dim: int,
        activation: Activation,
        key: PRNGKeyArray,
        scale: float,
        bias: bool = False,
    ) -> None:
        specs = expert_specs(num_experts, dim, expert_dim, activation, bias)
        keys = jax.random.split(key, len(specs))
        made = {n: create(s, k, scale) for (n, s), k in zip(sorted(specs.items()), keys, strict=True)}
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
    group_sizes: Int[Array, "E"],
    weights: ExpertWeights,
    activation: Activation,
    implementation: str = "auto",
) -> Float[Array, "P D"]:
    """Applies expert ``e``'s FFN to its rows (seam 5). Weights are cast to the type of ``xs``; accumulation is float32.

    Rows past ``sum(group_sizes)`` come out undefined.
    """
    weights = jax.tree.map(lambda w: w.astype(xs.dtype), weights)
    return kernels.grouped_ffn(
        xs,
        group_sizes,
        weights.gate,
        weights.up,
        weights.down,
        activation=activation,
        gate_bias=weights.gate_bias,
        up_bias=weights.up_bias,
        down_bias=weights.down_bias,
        implementation=None if implementation == "auto" else implementation,
    )


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
