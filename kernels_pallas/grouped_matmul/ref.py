"""The oracle: every expert on every row, the rows of its group kept. E times the work, plain autodiff."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.ffn import Activation, Hidden, Weights, accumulator, activate, einsum
from kernels_pallas.grouped_matmul.groups import ExtentAxis


def grouped_matmul(
    lhs: Float[Array, "P K"],
    rhs: Float[Array, "E K N"] | Float[Array, "E N K"],
    group_sizes: Int[Array, "G"],
    *,
    transpose_rhs: bool = False,
    extents: Int[Array, "G"] | None = None,
    extent_axis: ExtentAxis = "n",
    preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "P N"]:
    """See `api.grouped_matmul`; tail rows and columns beyond an extent come out as zeros."""
    columns = rhs.shape[1 if transpose_rhs else 2]
    limit = groups.row_extents(group_sizes, extents, lhs.shape[0], lhs.shape[1] if extent_axis == "k" else columns)
    if extent_axis == "k":
        lhs = groups.cut(lhs, limit)
    start, end = groups.bounds(groups.per_expert(group_sizes, rhs.shape[0]), lhs.shape[0])
    row = jnp.arange(lhs.shape[0])

    @jax.checkpoint  # else the scan keeps a masked copy of lhs for every expert
    def add_expert(out: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w, first, after = expert
        mine = ((row >= first) & (row < after))[:, None]
        # Both selects matter: the inner one keeps NaN rows out of the sums, the outer one NaN cotangents.
        y = einsum("pk,nk->pn" if transpose_rhs else "pk,kn->pn", jnp.where(mine, lhs, 0), w)
        return out + jnp.where(mine, y, 0), None

    out = groups.zeros((lhs.shape[0], columns), accumulator(lhs.dtype), lhs, rhs, group_sizes, extents)
    out, _ = lax.scan(add_expert, out, (rhs, start, end))
    if extent_axis == "n":
        out = groups.cut(out, limit)  # for the gradients: what comes back in these columns is ignored
    return out.astype(preferred_element_type or lhs.dtype)


def compose(matmul):
    """The FFN as two or three calls of `matmul`, for a back end without a fused FFN."""

    def grouped_ffn(
        xs: Float[Array, "P D"],
        group_sizes: Int[Array, "G"],
        weights: Weights,
        activation: Activation,
        *,
        extents: Int[Array, "G"] | None = None,
        row_weights: Float[Array, "P"] | None = None,
    ) -> Float[Array, "P D"]:
        """See `api.grouped_ffn`."""
        wide = accumulator(xs.dtype)
        experts, _, columns = weights.up.shape
        limit = groups.row_extents(group_sizes, extents, xs.shape[0], columns)
        sizes = groups.per_expert(group_sizes, experts)

        def project(x: Array, w: Array, bias: Array | None) -> Array:
            if w.size:
                y = matmul(x, w, sizes, preferred_element_type=wide)
            else:  # F = 0, which kernels need not know
                y = groups.zeros((x.shape[0], w.shape[2]), wide, x)
            return groups.add_bias(y, bias, sizes)

        gate = None if weights.gate is None else project(xs, weights.gate, weights.gate_bias)
        hidden = Hidden(gate, project(xs, weights.up, weights.up_bias))
        h = groups.cut(activate(activation, hidden), limit).astype(xs.dtype)
        ys = project(h, weights.down, weights.down_bias)
        if row_weights is not None:
            ys = ys * row_weights[:, None].astype(wide)
        return ys.astype(xs.dtype)

    return grouped_ffn


grouped_ffn = compose(grouped_matmul)
