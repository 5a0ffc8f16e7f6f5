"""Activations of gate and up inside the Hopper kernels."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.grouped_matmul.ffn import CLAMP, SLOPE

GATED = ("swiglu", "geglu", "swiglu_clamped")
"""What :func:`gated` knows."""


def gated(activation: str, gate: Float[Array, "R F"], up: Float[Array, "R F"]) -> Float[Array, "R F"]:
    """silu(gate) * up, gelu(gate) * up (tanh form), or `ffn.clamped_swiglu`, in operations that the kernel's compiler
    knows.

    The tensor cores rest meanwhile, so no division: 1 / y is rsqrt(y) squared, one instruction and a product.
    """
    if activation == "swiglu":
        inner = gate
    elif activation == "swiglu_clamped":
        gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP) + 1
        inner = SLOPE * gate
    else:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 0.5 (1 + tanh(z / 2)) = 1 / (1 + exp(-z))
    root = lax.rsqrt(1 + jnp.exp(-inner))
    return gate * (root * root) * up
