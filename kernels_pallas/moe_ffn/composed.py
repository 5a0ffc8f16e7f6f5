"""The layer as a chain of primitives on rows sorted by expert, with a backward pass that keeps little.

Kept for the backward: x, the gate and up pre-activations, and routing: `2 T D + 4 P F` bytes in bfloat16 and
some integers. Not kept, as Guo et al. 2025 ("SonicMoE", arXiv 2512.14080) propose: the gathered rows (gathered again),
h (the activation is run again), and the output of the down projection, which the gradient of the gate weights
does not need: with dy one token's cotangent, d weight = <dy, h @ down> = <dy @ down^T, h>.

A back end with kernels of its own makes a `Primitives`; `from_matmul` makes one from any grouped matmul.

Letters: T tokens, K choices, P = T K rows, E experts, D model, F expert hidden.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.gather_rows.api import gather_rows
from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.api import GROUPED_MATMUL, grouped_matmul
from kernels_pallas.grouped_matmul.ffn import Activation, Hidden, Weights, accumulator, activate, group_sums
from kernels_pallas.grouped_matmul.mosaic_gpu.backend import Kernels
from kernels_pallas.moe_ffn.plan import Plan, make_plan


def gather(x: Float[Array, "T D"], plan: Plan) -> Float[Array, "P D"]:
    """The token of each row."""
    return x.at[plan.token_of_row].get(mode="promise_in_bounds")


def gather_held(x: Float[Array, "T D"], plan: Plan) -> Float[Array, "P D"]:
    """The token of each row of a group, by the fastest that the platform has."""
    return gather_rows(x, plan.token_of_row, jnp.sum(plan.group_sizes), plan.row_of_pair)


def combine(
    ys: Float[Array, "P D"], row_of_pair: Int[Array, "T K"], weight: Float[Array, "T K"] | None = None
) -> Float[Array, "T D"]:
    """y[t] = sum over k of weight[t, k] ys[row_of_pair[t, k]], in float32 and in the order of k; row P counts as zero.

    Weighing here costs nothing, where a pass over [P, D] of its own would; `weight` None counts as ones.

    No other row is read into the sum, whatever it holds. Unrolled over K: no [T, K, D] temporary.
    """
    wide = accumulator(ys.dtype)

    def term(k: int) -> Array:
        rows = _take(ys, row_of_pair[:, k]).astype(wide)
        if weight is None:
            return rows
        # The row of an invalid pair is zero, but its weight may be NaN.
        share = jnp.where(row_of_pair[:, k] < ys.shape[0], weight[:, k].astype(wide), 0)
        return share[:, None] * rows

    terms = [term(k) for k in range(row_of_pair.shape[1])]
    return sum(terms[1:], terms[0]).astype(ys.dtype)


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


class Primitives(NamedTuple):
    """What the layer is made of. Rows are sorted by group; tail rows are unspecified in every argument and result.

    Array arguments are positional, `group_sizes` last; `activation: Activation` and `save: bool` are static keywords.
    `params` are the experts' `Weights`. Rows and weights are of one dtype, that of x; sums are float32.

    Attributes:
        up: `(xs[P,D], params, group_sizes, *, activation, save) -> (h[P,F], Hidden | None)`:
            h = act(xs @ gate + gate_bias, xs @ up + up_bias), and if `save` the pre-activations (biases included) in
            the dtype of xs, else None.
        down: `(h[P,F], params, group_sizes) -> ys[P,D]`: h @ down + down_bias.
        down_backward: `(dys[P,D], row_weights[P], Hidden, params, group_sizes, *, activation) -> (dgate[P,F] | None,
            dup[P,F], weighted[P,F], dweights[P])`: with h recomputed from Hidden and dh = dys @ down^T, the gradients
            of the pre-activations for the cotangent row_weights * dh of h; weighted = row_weights * h;
            dweights = sum over F of dh * h, float32. The layer adds what down_bias contributes to dweights.
        outer: `(lhs[P,K], grad[P,N], group_sizes) -> [E,K,N]`: lhs^T @ grad of each group, zero if it is empty; tail
            rows (NaN) must not reach it.
        up_input_gradient: `(dgate[P,F] | None, dup[P,F], params, group_sizes) -> dxs[P,D]`:
            dgate @ gate^T + dup @ up^T.
        gather: `(x[T,D], plan) -> [P,D]`.
        combine: `(ys[P,D], row_of_pair[T,K], weight[T,K] | None) -> [T,D]`.
        group_sums: `(rows[P,N], group_sizes) -> [E,N]`; called for gradients of biases only.
    """

    up: Callable[..., tuple[Array, Hidden | None]]
    down: Callable[[Array, Weights, Array], Array]
    down_backward: Callable[..., tuple[Array | None, Array, Array, Array]]
    outer: Callable[[Array, Array, Array], Array]
    up_input_gradient: Callable[[Array | None, Array, Weights, Array], Array]
    gather: Callable[[Array, Plan], Array] = gather
    combine: Callable[[Array, Array, Array | None], Array] = combine
    group_sums: Callable[[Array, Array], Array] = group_sums


def layer(p: Primitives) -> Callable[..., Array]:
    """The whole layer from primitives: same signature as `ref.moe_ffn`. Reverse mode, once."""

    def forward(
        x: Array, weight: Array, params: Weights, plan: Plan, activation: Activation, *, save: bool
    ) -> tuple[Array, Hidden | None]:
        xs = p.gather(x, plan)
        h, hidden = p.up(xs, params, plan.group_sizes, activation=activation, save=save)
        ys = p.down(h, params, plan.group_sizes)
        return p.combine(ys, plan.row_of_pair, weight), hidden

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
    def apply(x: Array, weight: Array, params: Weights, plan: Plan, activation: Activation) -> Array:
        return forward(x, weight, params, plan, activation, save=False)[0]

    def save(x: Array, weight: Array, params: Weights, plan: Plan, activation: Activation):
        y, hidden = forward(x, weight, params, plan, activation, save=True)
        return y, (x, weight, params, plan, hidden)

    def pull(activation: Activation, saved: tuple, dy: Array) -> tuple:
        x, weight, params, plan, hidden = saved
        # Else XLA sees that rows and h are computed twice, and keeps those of the forward pass until here.
        x, hidden, dy = lax.optimization_barrier((x, hidden, dy))
        sizes, row_weights = plan.group_sizes, _row_weights(weight, plan)
        dys = p.gather(dy, plan)
        dgate, dup, weighted, dweights = p.down_backward(dys, row_weights, hidden, params, sizes, activation=activation)
        dx = p.combine(p.up_input_gradient(dgate, dup, params, sizes), plan.row_of_pair, None)

        xs = p.gather(x, plan)
        dparams = Weights(
            gate=None if dgate is None else p.outer(xs, dgate, sizes),
            up=p.outer(xs, dup, sizes),
            down=p.outer(weighted, dys, sizes),
        )

        def bias_gradient(bias: Array | None, rows: Array | None) -> Array | None:
            return None if bias is None or rows is None else p.group_sums(rows, sizes).astype(bias.dtype)

        down_rows = None
        if params.down_bias is not None:
            wide = accumulator(x.dtype)
            down_rows = (dys.astype(wide) * row_weights[:, None].astype(wide)).astype(x.dtype)
            of_row = groups.row_group(groups.bounds(sizes, dys.shape[0])[1], dys.shape[0])
            bias_rows = _take(params.down_bias, of_row).astype(wide)
            dweights = dweights + jnp.sum(dys.astype(wide) * bias_rows, axis=1)
        dparams = dparams._replace(
            gate_bias=bias_gradient(params.gate_bias, dgate),
            up_bias=bias_gradient(params.up_bias, dup),
            down_bias=bias_gradient(params.down_bias, down_rows),
        )
        return dx, _take(dweights, plan.row_of_pair).astype(weight.dtype), dparams, None

    apply.defvjp(save, pull)

    def moe_ffn(
        x: Float[Array, "T D"],
        expert: Int[Array, "T K"],
        weight: Float[Array, "T K"],
        params: Weights,
        activation: Activation,
        valid: Bool[Array, "T K"] | None = None,
    ) -> Float[Array, "T D"]:
        """See `api.moe_ffn`."""
        return apply(x, weight, params, make_plan(expert, valid, params.up.shape[0]), activation)

    return moe_ffn


def _row_weights(weight: Float[Array, "T K"], plan: Plan) -> Float[Array, "P"]:
    return weight.reshape(-1).at[plan.pair_of_row].get(mode="promise_in_bounds")


def from_kernels(kernels: Kernels) -> Primitives:
    """Primitives from fused kernels."""
    return Primitives(
        kernels.up, kernels.down, kernels.down_backward, kernels.outer, kernels.up_input_gradient, gather=gather_held
    )


def whole_tiles(moe_ffn: Callable[..., Array], rows: int) -> Callable[..., Array]:
    """`moe_ffn` for kernels whose rows come in multiples of `rows`: tokens without an expert fill them up."""

    def run(
        x: Float[Array, "T D"],
        expert: Int[Array, "T K"],
        weight: Float[Array, "T K"],
        params: Weights,
        activation: Activation,
        valid: Bool[Array, "T K"] | None = None,
    ) -> Float[Array, "T D"]:
        tokens, choices = expert.shape
        added = ((0, -tokens % (rows // math.gcd(rows, choices))), (0, 0))
        if added[0][1]:
            x, weight = jnp.pad(x, added), jnp.pad(weight, added)
            expert = jnp.pad(expert, added, constant_values=-1)
            valid = None if valid is None else jnp.pad(valid, added)
        return moe_ffn(x, expert, weight, params, activation, valid)[:tokens]

    return run


def from_matmul(implementation: str) -> Primitives:
    """Primitives from one back end of `grouped_matmul`, the rest left to XLA."""
    matmul = functools.partial(grouped_matmul, implementation=implementation)

    def up(
        xs: Float[Array, "P D"], params: Weights, group_sizes: Int[Array, "E"], *, activation: Activation, save: bool
    ) -> tuple[Float[Array, "P F"], Hidden | None]:
        def project(w: Array, bias: Array | None) -> Array:
            y = matmul(xs, w, group_sizes, preferred_element_type=accumulator(xs.dtype))
            return groups.add_bias(y, bias, group_sizes)

        gate = None if params.gate is None else project(params.gate, params.gate_bias)
        hidden = Hidden(gate, project(params.up, params.up_bias))
        h = activate(activation, hidden).astype(xs.dtype)
        return h, jax.tree.map(lambda a: a.astype(xs.dtype), hidden) if save else None

    def down(h: Float[Array, "P F"], params: Weights, group_sizes: Int[Array, "E"]) -> Float[Array, "P D"]:
        ys = matmul(h, params.down, group_sizes, preferred_element_type=accumulator(h.dtype))
        return groups.add_bias(ys, params.down_bias, group_sizes).astype(h.dtype)

    def down_backward(
        dys: Float[Array, "P D"],
        row_weights: Float[Array, "P"],
        hidden: Hidden,
        params: Weights,
        group_sizes: Int[Array, "E"],
        *,
        activation: Activation,
    ) -> tuple[Array | None, Array, Array, Array]:
        wide = accumulator(dys.dtype)
        dh = matmul(dys, params.down, group_sizes, transpose_rhs=True, preferred_element_type=wide)
        share = row_weights[:, None].astype(wide)
        h, pull = jax.vjp(functools.partial(activate, activation), jax.tree.map(lambda a: a.astype(wide), hidden))
        (d,) = pull(share * dh)
        dgate = None if d.gate is None else d.gate.astype(dys.dtype)
        return dgate, d.up.astype(dys.dtype), (share * h).astype(dys.dtype), jnp.sum(dh * h, axis=1)

    @jax.jit  # even where the caller runs op by op, the product that only linearisation asks for is dropped
    def outer(
        lhs: Float[Array, "P K"], grad: Float[Array, "P N"], group_sizes: Int[Array, "E"]
    ) -> Float[Array, "E K N"]:
        shape = (group_sizes.shape[0], lhs.shape[1], grad.shape[1])
        rhs = groups.zeros(shape, lhs.dtype, lhs, grad, group_sizes)
        return jax.vjp(lambda rhs: matmul(lhs, rhs, group_sizes), rhs)[1](grad)[0]

    def up_input_gradient(
        dgate: Float[Array, "P F"] | None, dup: Float[Array, "P F"], params: Weights, group_sizes: Int[Array, "E"]
    ) -> Float[Array, "P D"]:
        def back(grad: Array, w: Array) -> Array:
            return matmul(grad, w, group_sizes, transpose_rhs=True, preferred_element_type=accumulator(grad.dtype))

        dxs = back(dup, params.up)
        if dgate is not None and params.gate is not None:
            dxs = dxs + back(dgate, params.gate)
        return dxs.astype(dup.dtype)

    return Primitives(up, down, down_backward, outer, up_input_gradient)


def refuse_matmul(implementation: str) -> Callable[..., str | None]:
    """`refuse` of the layer from `from_matmul`: the first reason that its grouped matmuls give."""

    def refuse(x: Array, expert: Array, weight: Array, params: Weights, activation: Activation, valid=None):
        del weight, activation, valid
        tokens, choices = expert.shape
        experts, d, f = params.up.shape
        sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
        wide = accumulator(x.dtype)
        for columns, rhs in ((d, params.up), (f, params.down)):
            lhs = jax.ShapeDtypeStruct((tokens * choices, columns), x.dtype)
            grad = jax.ShapeDtypeStruct((tokens * choices, d + f - columns), x.dtype)
            for rows, transpose_rhs, dtype in ((lhs, False, wide), (lhs, False, None), (grad, True, wide)):
                reason = GROUPED_MATMUL.backends[implementation].refuse(
                    rows, rhs, sizes, transpose_rhs=transpose_rhs, preferred_element_type=dtype
                )
                if reason is not None:
                    return reason
        return None

    return refuse
