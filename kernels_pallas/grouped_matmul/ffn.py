"""The expert FFN of one group of rows, forward and backward: for a tile `[R, D]` or many `[G, R, D]`.

Back ends differ in how rows reach these functions, not in the maths. The backward is written out, not
differentiated, because autodiff of a bfloat16 dot with a float32 result multiplies float32 by bfloat16,
which is slow on accelerators.

Letters: R rows of one expert, D model, F expert hidden, G experts or blocks (optional leading axis, written
`...`).
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import groups

Activation = Literal["swiglu", "geglu", "gelu", "relu", "swiglu_clamped"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
GATED = ("swiglu", "geglu", "swiglu_clamped")
CLAMP, SLOPE = 7.0, 1.702
"""Of swiglu_clamped, as gpt-oss has them (2508.10925): the bound of both branches, and what the sigmoid's argument is
multiplied by (the sigmoid form of gelu)."""


class Weights(NamedTuple):
    """Weights of one expert, or of all with a leading axis; absent ones are None (no leaf of the pytree)."""

    gate: Float[Array, "... D F"] | None
    up: Float[Array, "... D F"]
    down: Float[Array, "... F D"]
    gate_bias: Float[Array, "... F"] | None = None
    up_bias: Float[Array, "... F"] | None = None
    down_bias: Float[Array, "... D"] | None = None


class Hidden(NamedTuple):
    """Pre-activations, all that the backward needs beside inputs and weights; gate is None if not gated."""

    gate: Float[Array, "... R F"] | None
    up: Float[Array, "... R F"]


class Rows(NamedTuple):
    """What belongs to a row and not to its expert: absent ones are None.

    Attributes:
        extent: leading columns of F that take part, already rounded.
        weight: factor of the row's output.
    """

    extent: Int[Array, "... R 1"] | None = None
    weight: Float[Array, "... R 1"] | None = None


def row_values(
    group_sizes: Int[Array, "G"],
    extents: Int[Array, "G"] | None,
    row_weights: Float[Array, "P"] | None,
    rows: int,
    columns: int,
) -> Rows:
    """`Rows` of all P rows from the arguments of `api.grouped_ffn`; `columns` is F."""
    weight = None if row_weights is None else row_weights[:, None]
    return Rows(groups.row_extents(group_sizes, extents, rows, columns), weight)


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Sums are taken in float32 (float64 for float64 inputs)."""
    return jnp.promote_types(dtype, jnp.float32)


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32, where accelerators take TF32 or bfloat16; the user's own setting goes first."""
    if dtype == jnp.float32 and jax.config.jax_default_matmul_precision is None:
        return jax.lax.Precision.HIGHEST
    return None


def einsum(spec: str, a: Array, b: Array) -> Array:
    """Einsum of two arrays of one dtype, accumulated and returned in `accumulator(dtype)`."""
    return jnp.einsum(spec, a, b, precision=precision(a.dtype), preferred_element_type=accumulator(a.dtype))


def group_sums(rows: Float[Array, "P N"], group_sizes: Int[Array, "E"]) -> Float[Array, "E N"]:
    """Sum of each group's rows, in float32: a matmul with the groups' one-hot rows, so deterministic."""
    start, end = groups.bounds(group_sizes, rows.shape[0])
    row = jnp.arange(rows.shape[0])[:, None]
    mine = (row >= start) & (row < end)
    return einsum("pe,pn->en", mine.astype(rows.dtype), groups.zero_tail(rows, end))


def clamped_swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """``g sigmoid(1.702 g) (u + 1)`` with ``g = min(gate, 7)`` and ``u`` = up within [-7, 7] (gpt-oss, 2508.10925)."""
    gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
    return gate * jax.nn.sigmoid(SLOPE * gate) * (up + 1)


def activate(activation: Activation, hidden: Hidden) -> Float[Array, "... R F"]:
    """swiglu: silu(gate) * up; geglu: gelu(gate) * up; swiglu_clamped: :func:`clamped_swiglu`; gelu, relu: of up alone.
    gelu is the tanh form."""
    if activation == "swiglu_clamped":
        assert hidden.gate is not None  # checked with the arguments
        return clamped_swiglu(hidden.gate, hidden.up)
    act = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}[activation]
    return act(hidden.up) if hidden.gate is None else act(hidden.gate) * hidden.up


def _add_bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias[..., None, :].astype(y.dtype)


def forward(
    activation: Activation, x: Float[Array, "... R D"], w: Weights, rows: Rows
) -> tuple[Float[Array, "... R D"], Hidden]:
    """y = weight (act(x @ gate + b, x @ up + b) @ down + b); y and the pre-activations are in the dtype of x."""
    gate = None if w.gate is None else _add_bias(einsum("...rd,...df->...rf", x, w.gate), w.gate_bias)
    hidden = Hidden(gate, _add_bias(einsum("...rd,...df->...rf", x, w.up), w.up_bias))
    h = groups.cut(activate(activation, hidden), rows.extent).astype(x.dtype)
    y = _add_bias(einsum("...rf,...fd->...rd", h, w.down), w.down_bias)
    if rows.weight is not None:
        y = y * rows.weight.astype(y.dtype)
    return y.astype(x.dtype), jax.tree.map(lambda a: a.astype(x.dtype), hidden)


def backward(
    activation: Activation,
    x: Float[Array, "... R D"],
    hidden: Hidden,
    dy: Float[Array, "... R D"],
    w: Weights,
    rows: Rows,
) -> tuple[Float[Array, "... R D"], Weights, Float[Array, "... R 1"] | None]:
    """Gradients (dx in the dtype of x, those of the weights as float32 sums over the rows R, that of rows.weight).

    A row with dy = 0 and finite x, hidden and weight adds nothing to the gradients of the weights.
    """
    wide = accumulator(x.dtype)
    h, pull = jax.vjp(lambda p: activate(activation, p), jax.tree.map(lambda a: a.astype(wide), hidden))
    h, dh = groups.cut(h, rows.extent), groups.cut(einsum("...rd,...fd->...rf", dy, w.down), rows.extent)
    d_bias = dy  # of one row's down_bias
    d_weight = None
    if rows.weight is not None:
        weight = rows.weight.astype(wide)
        # <dy, h @ down + b> without the output: <dy @ down^T, h> + <dy, b>.
        d_weight = jnp.sum(dh * h, axis=-1, keepdims=True)
        if w.down_bias is not None:
            d_weight = d_weight + einsum("...rd,...d->...r", dy, w.down_bias)[..., None]
            d_bias = dy.astype(wide) * weight
        d_weight = d_weight.astype(rows.weight.dtype)
        h, dh = h * weight, dh * weight
    (d_wide,) = pull(dh)
    d = jax.tree.map(lambda a: a.astype(x.dtype), d_wide)

    dx = einsum("...rf,...df->...rd", d.up, w.up)
    if w.gate is not None:
        dx = dx + einsum("...rf,...df->...rd", d.gate, w.gate)

    def over_rows(a: Array | None, bias: Array | None) -> Array | None:
        return None if a is None or bias is None else jnp.sum(a, axis=-2, dtype=wide)

    dw = Weights(
        gate=None if w.gate is None else einsum("...rd,...rf->...df", x, d.gate),
        up=einsum("...rd,...rf->...df", x, d.up),
        down=einsum("...rf,...rd->...fd", h.astype(x.dtype), dy),
        gate_bias=over_rows(d_wide.gate, w.gate_bias),
        up_bias=over_rows(d_wide.up, w.up_bias),
        down_bias=over_rows(d_bias, w.down_bias),
    )
    return dx.astype(x.dtype), dw, d_weight
