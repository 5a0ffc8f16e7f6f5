"""The oracle: every expert on every row, the rows of its group kept. E times the work, plain autodiff."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.ffn import Activation, Hidden, Weights, accumulator, activate, einsum


def grouped_matmul(
    lhs: Float[Array, "P K"],
    rhs: Float[Array, "E K N"] | Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    transpose_rhs: bool = False,
    preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "P N"]:
    """See `api.grouped_matmul`; tail rows come out as zeros."""
    start, end = groups.bounds(group_sizes, lhs.shape[0])
    row = jnp.arange(lhs.shape[0])

    @jax.checkpoint  # else the scan keeps a masked copy of lhs for every expert
    def add_expert(out: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w, first, after = expert
        mine = ((row >= first) & (row < after))[:, None]
        # Both selects matter: the inner one keeps NaN rows out of the sums, the outer one NaN cotangents.
        y = einsum("pk,nk->pn" if transpose_rhs else "pk,kn->pn", jnp.where(mine, lhs, 0), w)
        return out + jnp.where(mine, y, 0), None

    columns = rhs.shape[1 if transpose_rhs else 2]
    out = groups.zeros((lhs.shape[0], columns), accumulator(lhs.dtype), lhs, rhs, group_sizes)
    out, _ = lax.scan(add_expert, out, (rhs, start, end))
    return out.astype(preferred_element_type or lhs.dtype)


def compose(matmul):
    """The FFN as two or three calls of `matmul`, for a back end without a fused FFN."""

    def grouped_ffn(
        xs: Float[Array, "P D"], group_sizes: Int[Array, "E"], weights: Weights, activation: Activation
    ) -> Float[Array, "P D"]:
        wide = accumulator(xs.dtype)

        def project(x: Array, w: Array, bias: Array | None) -> Array:
            y = matmul(x, w, group_sizes, preferred_element_type=wide)
            return groups.add_bias(y, bias, group_sizes)

        gate = None if weights.gate is None else project(xs, weights.gate, weights.gate_bias)
        hidden = Hidden(gate, project(xs, weights.up, weights.up_bias))
        h = activate(activation, hidden).astype(xs.dtype)
        return project(h, weights.down, weights.down_bias).astype(xs.dtype)

    return grouped_ffn


grouped_ffn = compose(grouped_matmul)
