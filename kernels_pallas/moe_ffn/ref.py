"""The oracle: every expert on every token, the tokens routed to it kept. E / K times the work, plain autodiff."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.ffn import Activation, Hidden, Weights, accumulator, activate, einsum


def moe_ffn(
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    weight: Float[Array, "T K"],
    params: Weights,
    activation: Activation,
    valid: Bool[Array, "T K"] | None = None,
) -> Float[Array, "T D"]:
    """See `api.moe_ffn`; computed in float32 throughout, the result rounded once."""
    wide = accumulator(x.dtype)
    taken = expert if valid is None else jnp.where(valid, expert, -1)

    @jax.checkpoint  # else the scan keeps x and the hidden activations of every expert
    def add_expert(y: Array, args: tuple[Array, Weights]) -> tuple[Array, None]:
        e, w = args
        mine = taken == e
        routed = jnp.any(mine, axis=1, keepdims=True)
        share = jnp.sum(jnp.where(mine, weight.astype(wide), 0), axis=1, keepdims=True)
        w = jax.tree.map(lambda a: a.astype(wide), w)
        # Both selects matter: the inner one keeps NaN tokens out, the outer one NaN cotangents.
        inputs = jnp.where(routed, x.astype(wide), 0)
        gate = None if w.gate is None else _affine(inputs, w.gate, w.gate_bias)
        h = activate(activation, Hidden(gate, _affine(inputs, w.up, w.up_bias)))
        return y + jnp.where(routed, share * _affine(h, w.down, w.down_bias), 0), None

    y = groups.zeros(x.shape, wide, x, weight, expert, valid, *params)
    y, _ = lax.scan(add_expert, y, (jnp.arange(params.up.shape[0]), params))
    return y.astype(x.dtype)


def _affine(x: Array, w: Array, bias: Array | None) -> Array:
    y = einsum("tk,kn->tn", x, w)
    return y if bias is None else y + bias
