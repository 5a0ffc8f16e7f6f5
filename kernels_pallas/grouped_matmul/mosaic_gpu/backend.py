"""Back end `mosaic_gpu`: Pallas Mosaic GPU kernels for Hopper (compute capability 9.0), bfloat16.

`rows.py` multiplies rows by their expert's matrix, `outer.py` makes the gradient of the matrices, `schedule.py` says
which tile comes when, `tuning.py` how large tiles are. Extents cost what they keep, in whole tiles of columns: tiles
and depth beyond an extent are not visited.

The FFN fuses the activation into the gate and up projections, and both halves of the gradient of its input into one
kernel. Saved for the backward: its input and the pre-activations.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import default_platform
from kernels_pallas.grouped_matmul import ffn, groups
from kernels_pallas.grouped_matmul.ffn import GATED, Activation, Hidden, Weights
from kernels_pallas.grouped_matmul.groups import ExtentAxis
from kernels_pallas.grouped_matmul.mosaic_gpu import activation as activation_kernel
from kernels_pallas.grouped_matmul.mosaic_gpu import outer as outer_kernel
from kernels_pallas.grouped_matmul.mosaic_gpu import rows, tuning
from kernels_pallas.grouped_matmul.vjp import cut_limited, differentiable

FEW_ROWS = 128
"""Mean rows of an expert up to which its groups are computed as one, with the largest of their extents: a tile's."""
WHOLE = outer_kernel.ALIGN
"""Rows come in multiples of this."""
ALIGN = 64  # a multiple of this is what K, N, D and F must be: one swizzle of bfloat16


def whole(rows: Array) -> Array:
    """Rows up to a multiple of `WHOLE`; the added ones are tail rows."""
    added = -rows.shape[0] % WHOLE
    return jnp.pad(rows, ((0, added), (0, 0))) if added else rows


def _sum_like(grad: Array, weight: Array) -> Array:
    """The gradient of a weight that is the same on several shards is the sum over them."""
    axes = jax.typeof(grad).manual_axis_type.varying - jax.typeof(weight).manual_axis_type.varying
    return lax.psum(grad, tuple(sorted(axes))) if axes else grad


def product_of_pairs(
    pairs: Sequence[tuple[Array, Array]],
    group_sizes: Int[Array, "G"],
    extents: Int[Array, "G"] | None = None,
    *,
    transpose_rhs: bool,
    extent_axis: ExtentAxis,
    dtype: jnp.dtype,
    bias: Float[Array, "E N"] | None = None,
    config: rows.Config | None = None,
    interpret: bool = False,
) -> Float[Array, "P N"]:
    """out = sum over pairs of lhs @ rhs[expert] + bias[expert], as `rows.product`, with tuned tiles."""
    pairs, group_sizes, extents, bias = groups.alike((pairs, group_sizes, extents, bias))
    (num_rows, k), experts = pairs[0][0].shape, pairs[0][1].shape[0]
    n = pairs[0][1].shape[1 if transpose_rhs else 2]
    cut = extents is not None and extent_axis == "n"
    config = config or tuning.for_rows(num_rows, experts, k, n, transpose_rhs, cut_columns=cut)
    spans = rows.Spans(group_sizes, extents, extent_axis)
    return rows.product(
        pairs, spans, transpose_rhs=transpose_rhs, dtype=dtype, config=config, interpret=interpret, bias=bias
    )


def product(lhs: Array, rhs: Array, group_sizes: Array, extents: Array | None, **options: Any) -> Array:
    """See `vjp.Product`; the options are those of `product_of_pairs`."""
    return product_of_pairs([(lhs, rhs)], group_sizes, extents, **options)


def outer(
    lhs: Array, grad: Array, group_sizes: Array, extents: Array | None, *, extent_axis: ExtentAxis, **options: Any
) -> Array:
    """See `vjp.Outer`; the options are those of `outer_of_cut`.

    Extents cost a pass of XLA over the operand that they limit, which is read and written once: `outer_of_cut` takes
    zeros there.
    """
    lhs, grad = cut_limited(*groups.alike((lhs, grad, group_sizes, extents)), extent_axis)
    return outer_of_cut(lhs, grad, group_sizes, extents, extent_axis=extent_axis, **options)


def outer_of_cut(
    lhs: Array,
    grad: Array,
    group_sizes: Array,
    extents: Array | None,
    *,
    experts: int,
    extent_axis: ExtentAxis,
    dtype: jnp.dtype,
    config: outer_kernel.Config | None = None,
) -> Array:
    """`outer` of operands that have zeros wherever extents leave something out."""
    lhs, grad, group_sizes, extents = groups.alike((lhs, grad, group_sizes, extents))
    config = config or tuning.for_outer(lhs.shape[0], experts, lhs.shape[1], grad.shape[1])
    spans = rows.Spans(group_sizes, extents, extent_axis)
    return outer_kernel.outer(lhs, grad, spans, experts=experts, dtype=dtype, config=config)


def _both_or_none(params: Weights) -> tuple[Array, Array] | tuple[()]:
    """The biases of gate and up, zeros for one that is missing; neither if both are."""
    found = params.gate_bias, params.up_bias
    if all(bias is None for bias in found):
        return ()
    shape, dtype = (params.up.shape[0], params.up.shape[2]), params.up.dtype
    gate, up = (jnp.zeros(shape, dtype) if bias is None else bias for bias in found)
    return gate, up


class Kernels:
    """Grouped matmul, grouped FFN and the pieces of the whole layer.

    `interpret` is for a run on CPU under Pallas' interpreter of Mosaic GPU kernels.
    """

    def __init__(self, *, interpret: bool = False) -> None:
        self.interpret = interpret
        self.product = functools.partial(product, interpret=interpret)
        self._matmul = differentiable(self.product, outer)
        self._ffn = jax.custom_vjp(self._run, nondiff_argnums=(4,))
        self._ffn.defvjp(self._save, self._pull)

    def grouped_matmul(
        self, lhs: Float[Array, "P K"], rhs: Array, group_sizes: Int[Array, "G"], **options: Any
    ) -> Float[Array, "P N"]:
        """See `api.grouped_matmul`."""
        return self._matmul(whole(lhs), rhs, group_sizes, **options)[: lhs.shape[0]]

    # --- the FFN --------------------------------------------------------------------------------------

    def grouped_ffn(
        self,
        xs: Float[Array, "P D"],
        group_sizes: Int[Array, "G"],
        weights: Weights,
        activation: Activation,
        *,
        extents: Int[Array, "G"] | None = None,
        row_weights: Float[Array, "P"] | None = None,
    ) -> Float[Array, "P D"]:
        """See `api.grouped_ffn`."""
        ys = self._ffn(whole(xs), group_sizes, weights, extents, activation)[: xs.shape[0]]
        if row_weights is None:
            return ys
        return (ys.astype(jnp.float32) * row_weights[:, None].astype(jnp.float32)).astype(ys.dtype)

    def _run(self, xs, group_sizes, weights, extents, activation):
        (rows, experts), of_row = (xs.shape[0], weights.up.shape[0]), None
        if extents is not None and group_sizes.shape[0] > experts and rows <= FEW_ROWS * experts:
            # A step of decoding waits for weights: groups of one expert would read what both have twice.
            of_row = groups.row_extents(group_sizes, extents, rows, weights.up.shape[2])
            group_sizes, extents = groups.joined(group_sizes, extents, experts)
        h, _ = self.up(xs, weights, group_sizes, extents, activation=activation, save=False)
        return self.down(groups.cut(h, of_row), weights, group_sizes, extents)

    def _save(self, xs, group_sizes, weights, extents, activation):
        h, hidden = self.up(xs, weights, group_sizes, extents, activation=activation, save=True)
        return self.down(h, weights, group_sizes, extents), (xs, group_sizes, weights, extents, hidden)

    def _pull(self, activation, saved, dy):
        xs, group_sizes, weights, extents, hidden = saved
        dgate, dup, h, _ = self.down_backward(dy, None, hidden, weights, group_sizes, extents, activation=activation)
        dx = self.up_input_gradient(dgate, dup, weights, group_sizes, extents)
        experts = weights.up.shape[0]
        make = functools.partial(outer_of_cut, experts=experts, dtype=xs.dtype)

        def sums(grad: Array | None, bias: Array | None) -> Array | None:
            if grad is None or bias is None:
                return None
            return ffn.group_sums(grad, groups.per_expert(group_sizes, experts)).astype(bias.dtype)

        grads = Weights(
            gate=None if dgate is None else make(xs, dgate, group_sizes, extents, extent_axis="n"),
            up=make(xs, dup, group_sizes, extents, extent_axis="n"),
            down=make(h, dy, group_sizes, extents, extent_axis="k"),
            gate_bias=sums(dgate, weights.gate_bias),
            up_bias=sums(dup, weights.up_bias),
            down_bias=sums(dy, weights.down_bias),
        )
        return dx, None, jax.tree.map(_sum_like, grads, weights), None

    # --- its pieces -----------------------------------------------------------------------------------

    def up(
        self,
        xs: Float[Array, "P D"],
        params: Weights,
        group_sizes: Int[Array, "G"],
        extents: Int[Array, "G"] | None = None,
        *,
        activation: Activation,
        save: bool,
    ) -> tuple[Float[Array, "P F"], Hidden | None]:
        """h and, if asked, the pre-activations, which are not written otherwise."""
        if params.gate is None:
            options = {"transpose_rhs": False, "extent_axis": "n", "dtype": xs.dtype, "bias": params.up_bias}
            up = self.product(xs, params.up, group_sizes, extents, **options)
            h = ffn.activate(activation, Hidden(None, up.astype(jnp.float32))).astype(xs.dtype)
            return h, Hidden(None, up) if save else None
        biases = _both_or_none(params)
        given = (xs, params.gate, params.up, group_sizes, extents, biases)
        xs, gate, up, group_sizes, extents, biases = groups.alike(given)
        config = tuning.for_gated(xs.shape[0], *params.up.shape)
        h, *hidden = rows.gated_product(
            xs,
            gate,
            up,
            rows.Spans(group_sizes, extents),
            activation=activation,
            save=save,
            config=config,
            interpret=self.interpret,
            biases=biases,
        )
        return h, Hidden(*hidden) if save else None

    def down(
        self,
        h: Float[Array, "P F"],
        params: Weights,
        group_sizes: Int[Array, "G"],
        extents: Int[Array, "G"] | None = None,
    ) -> Float[Array, "P D"]:
        """h @ down + down_bias."""
        options = {"transpose_rhs": False, "extent_axis": "k", "dtype": h.dtype, "bias": params.down_bias}
        return self.product(h, params.down, group_sizes, extents, **options)

    def down_backward(
        self,
        dys: Float[Array, "P D"],
        row_weights: Float[Array, "P"] | None,
        hidden: Hidden,
        params: Weights,
        group_sizes: Int[Array, "G"],
        extents: Int[Array, "G"] | None = None,
        *,
        activation: Activation,
    ) -> tuple[Float[Array, "P F"] | None, Float[Array, "P F"], Float[Array, "P F"], Float[Array, "P"]]:
        """(dgate, dup, row_weights h, gradient of row_weights) from the cotangent of the weighted rows.

        With extents the first three are zero beyond them, for `outer_of_cut`: no pass more, as one makes them anyway.
        """
        dh = self.product(
            dys, params.down, group_sizes, extents, transpose_rhs=True, extent_axis="n", dtype=dys.dtype
        ).astype(jnp.float32)
        wide = jax.tree.map(lambda a: a.astype(jnp.float32), hidden)
        share = 1.0 if row_weights is None else row_weights[:, None].astype(jnp.float32)
        h, pull = jax.vjp(functools.partial(ffn.activate, activation), wide)
        (d,) = pull(share * dh)
        limit = groups.row_extents(group_sizes, extents, *dh.shape)
        made = d.gate, d.up, share * h
        dgate, dup, weighted = jax.tree.map(lambda a: groups.cut(a, limit).astype(dys.dtype), made)
        return dgate, dup, weighted, jnp.sum(groups.cut(dh * h, limit), axis=1)

    def up_input_gradient(
        self,
        dgate: Float[Array, "P F"] | None,
        dup: Float[Array, "P F"],
        params: Weights,
        group_sizes: Int[Array, "G"],
        extents: Int[Array, "G"] | None = None,
    ) -> Float[Array, "P D"]:
        """dgate @ gate^T + dup @ up^T in one kernel."""
        pairs = [(dup, params.up)]
        if dgate is not None and params.gate is not None:
            pairs.append((dgate, params.gate))
        return product_of_pairs(
            pairs,
            group_sizes,
            extents,
            transpose_rhs=True,
            extent_axis="k",
            dtype=dup.dtype,
            interpret=self.interpret,
        )

    def outer(self, lhs: Array, grad: Array, group_sizes: Array) -> Array:
        """[E, K, N] for one group an expert."""
        experts = group_sizes.shape[0]
        return outer(lhs, grad, group_sizes, None, experts=experts, extent_axis="n", dtype=lhs.dtype)


def _hopper() -> str | None:
    platform = default_platform()
    if platform != "gpu":
        return f"needs a Hopper GPU, the platform is {platform}"
    try:
        capability = getattr(jax.devices("gpu")[0], "compute_capability", None)
    except RuntimeError:  # the platform is asked about, not here
        return "needs a Hopper GPU: no GPU is visible"
    return None if capability == "9.0" else f"needs compute capability 9.0 (Hopper), the device has {capability}"


def refuse_shapes(dtype: jnp.dtype, axes: dict[str, int], result: jnp.dtype | None = None) -> str | None:
    """Why these shapes cannot run, on any device."""
    if dtype != jnp.bfloat16:
        return f"multiplies bfloat16 only, not {jnp.dtype(dtype).name}"
    if result is not None and jnp.dtype(result) not in (jnp.bfloat16, jnp.float32):
        return f"writes bfloat16 or float32, not {jnp.dtype(result).name}"
    for name, size in axes.items():
        if size % ALIGN or size == 0:
            return f"{name}={size} must be a multiple of {ALIGN} (a shared-memory swizzle)"
    return None


def refuse_matmul(
    lhs, rhs, group_sizes, *, transpose_rhs=False, extents=None, extent_axis="n", preferred_element_type=None
) -> str | None:
    """See `dispatch.Backend`."""
    del group_sizes, extents, extent_axis
    n = rhs.shape[1 if transpose_rhs else 2]
    axes = {"K": lhs.shape[1], "N": n}
    return _hopper() or refuse_shapes(lhs.dtype, axes, preferred_element_type)


def refuse_ffn(xs, group_sizes, weights: Weights, activation, *, extents=None, row_weights=None) -> str | None:
    """See `dispatch.Backend`."""
    del group_sizes, extents, row_weights
    return _hopper() or refuse_weights(xs, weights, activation)


def refuse_weights(xs, weights: Weights, activation: Activation) -> str | None:
    """Why an FFN of these weights cannot run, on any device."""
    if activation in GATED and activation not in activation_kernel.GATED:
        return f"its kernel applies {' or '.join(activation_kernel.GATED)} to gate and up, not {activation}"
    if (weights.gate is not None) != (activation in GATED):
        return "a gate without a gated activation"
    axes = {"D": weights.up.shape[1], "F": weights.up.shape[2]}
    return refuse_shapes(xs.dtype, axes)


KERNELS = Kernels()
