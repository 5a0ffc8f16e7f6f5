"""Public functions: checks of the arguments, then the choice of a back end.

Back ends (see each file for what it costs):

| name | what | order |
|---|---|---|
| `mosaic_gpu` | Pallas kernels for Hopper, bfloat16 | first on GPU |
| `mosaic_tpu` | Pallas kernels for TPU, bfloat16 and float32 | first on TPU |
| `cpu_tiled` | loop over experts and tiles of their rows | first on CPU |
| `padded` | C rows of every expert in one batched matmul, repeated until the largest group is done | next |
| `ref` | every expert on every row: the oracle | last |
| `lax` | `jax.lax.ragged_dot` | by name only |
| `tokamax` | `tokamax.ragged_dot`, an optional package | by name only |

Letters: P rows (token-expert pairs) sorted by expert, E experts, G groups, K x N one expert's matrix, D model,
F expert hidden.

A back end runs and refuses with the signatures
`(lhs, rhs, group_sizes, *, transpose_rhs, extents, extent_axis, preferred_element_type)` and
`(xs, group_sizes, weights, activation, *, extents, row_weights)`; `refuse` takes them with defaults, as `explain` may
leave the keywords out. Without extents it always gets one group for each expert.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Backend, Implementation, Operation, default_platform
from kernels_pallas.grouped_matmul import cpu_tiled, groups, lax_ragged, mosaic_tpu, padded, ref, tokamax_backend
from kernels_pallas.grouped_matmul.ffn import ACTIVATIONS, GATED, Activation, Weights
from kernels_pallas.grouped_matmul.groups import EXTENT_AXES, ExtentAxis
from kernels_pallas.grouped_matmul.mosaic_gpu import backend as mosaic_gpu

_ORDER = {
    "cpu": ("cpu_tiled", "ref"),
    "gpu": ("mosaic_gpu", "padded", "ref"),
    "tpu": ("mosaic_tpu", "padded", "ref"),
    "*": ("padded", "ref"),
}


GROUPED_MATMUL = Operation(
    "grouped_matmul",
    {
        "mosaic_gpu": Backend("mosaic_gpu", mosaic_gpu.KERNELS.grouped_matmul, mosaic_gpu.refuse_matmul),
        "cpu_tiled": Backend("cpu_tiled", cpu_tiled.grouped_matmul),
        "padded": Backend("padded", padded.grouped_matmul),
        "ref": Backend("ref", ref.grouped_matmul),
        "mosaic_tpu": Backend("mosaic_tpu", mosaic_tpu.grouped_matmul, mosaic_tpu.refuse),
        "lax": Backend("lax", lax_ragged.grouped_matmul, lax_ragged.refuse),
        "tokamax": Backend("tokamax", tokamax_backend.grouped_matmul, tokamax_backend.refuse),
    },
    _ORDER,
)

GROUPED_FFN = Operation(
    "grouped_ffn",
    {
        "mosaic_gpu": Backend("mosaic_gpu", mosaic_gpu.KERNELS.grouped_ffn, mosaic_gpu.refuse_ffn),
        "cpu_tiled": Backend("cpu_tiled", cpu_tiled.grouped_ffn),
        "padded": Backend("padded", padded.grouped_ffn),
        "ref": Backend("ref", ref.grouped_ffn),
        "mosaic_tpu": Backend("mosaic_tpu", mosaic_tpu.grouped_ffn, mosaic_tpu.refuse),
        "lax": Backend("lax", lax_ragged.grouped_ffn, lax_ragged.refuse),
        "tokamax": Backend("tokamax", tokamax_backend.grouped_ffn, tokamax_backend.refuse),
    },
    _ORDER,
)


@groups.automatic
def grouped_matmul(
    lhs: Float[Array, "P K"],
    rhs: Float[Array, "E K N"] | Float[Array, "E N K"],
    group_sizes: Int[Array, "G"],
    *,
    transpose_rhs: bool = False,
    extents: Int[Array, "G"] | None = None,
    extent_axis: ExtentAxis = "n",
    implementation: Implementation = None,
    preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "P N"]:
    """out[p] = lhs[p] @ rhs[e] for every row p of expert e's groups; group g follows group g - 1, from row 0 on.

    G is a multiple of E, group g is of expert g // (G // E): usually one group for each expert, or two where only
    some of an expert's columns are wanted for some of its rows.

    Differentiable in lhs and rhs (reverse mode, once; `ref` any number of times). Sums are float32. Any group may be
    empty, and P, K and N may be 0. Rows beyond `sum(group_sizes)` are unspecified, in the result and in the gradient
    of lhs, and may be NaN; what stands there in lhs or in the cotangent reaches nothing else.

    Inside `shard_map` an operand may be the same on several shards: its gradient is the sum over them. Outside of it
    mesh axes may be Explicit: the result is split as the rows of lhs are.

    Args:
        lhs: rows sorted by group, of a floating-point type of 16 bits or more.
        rhs: one matrix for each expert, `[E, N, K]` if `transpose_rhs`.
        group_sizes: integers >= 0 of any type with a sum of at most P, on the device; other values never recompile. A
            sum above P, unchecked as it is known on the device only, acts as if groups were cut off at row P.
        transpose_rhs: multiply by the transpose of each matrix.
        extents: how many leading columns take part in each group's rows, rounded up to a multiple of
            `groups.EXTENT_BLOCK` and capped at the size of the axis, as the largest integer of a type may stand for
            all; 0 is allowed, None is all. From one group of an expert to its next they must not increase (unchecked,
            as they are known on the device only).
        extent_axis: which columns. "n": those of the result. Beyond the extent it is unspecified and may be NaN,
            cotangents are ignored, and nothing is added to the gradient of rhs. "k": those of lhs. Beyond the extent
            they are ignored and may be NaN, their gradient is unspecified, and nothing is added to that of rhs.
        implementation: None (the platform's order), a back end's name, or names to try in order.
        preferred_element_type: dtype of the result, floating-point of 16 bits or more; that of lhs by default.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown extent_axis or implementation.
        BackendRefused: no allowed back end can run; a back end chosen by name is never replaced by another.

    It does not sort, gather or drop rows.
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)  # numpy's too
    group_sizes, extents = _integers(group_sizes, extents)
    if lhs.ndim != 2 or rhs.ndim != 3:
        raise ValueError(f"lhs.shape={lhs.shape} must be [P, K] and rhs.shape={rhs.shape} [E, K, N] (or [E, N, K])")
    k, n = rhs.shape[:0:-1] if transpose_rhs else rhs.shape[1:]
    if lhs.shape[1] != k:
        raise ValueError(
            f"lhs.shape={lhs.shape} must be [P, {k}] for rhs.shape={rhs.shape} and "
            f"transpose_rhs={transpose_rhs}: pass the other transpose_rhs or other weights"
        )
    _check_dtype("lhs", lhs, rhs=rhs)
    if preferred_element_type is not None and not _is_wide(preferred_element_type):
        raise ValueError(f"preferred_element_type={jnp.dtype(preferred_element_type).name} must be {WIDE}, or None")
    _check_groups(group_sizes, extents, rhs.shape[0])
    if extent_axis not in EXTENT_AXES:
        raise ValueError(f"extent_axis={extent_axis!r} must be one of {EXTENT_AXES}: the axis that extents limit")
    lhs, rhs, group_sizes, extents = groups.alike((lhs, rhs, group_sizes, extents))
    if 0 in (*lhs.shape, n):  # nothing to multiply: empty, or sums of nothing
        GROUPED_MATMUL.names(implementation, default_platform())  # an unknown one is an error here too
        return groups.zeros((lhs.shape[0], n), preferred_element_type or lhs.dtype, lhs)
    if extents is None:
        group_sizes = groups.per_expert(group_sizes, rhs.shape[0])
    options = {
        "transpose_rhs": transpose_rhs,
        "extents": extents,
        "extent_axis": extent_axis,
        "preferred_element_type": preferred_element_type,
    }
    return GROUPED_MATMUL.select(implementation, lhs, rhs, group_sizes, **options).run(lhs, rhs, group_sizes, **options)


@groups.automatic
def grouped_ffn(
    xs: Float[Array, "P D"],
    group_sizes: Int[Array, "G"],
    gate: Float[Array, "E D F"] | None,
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: Activation,
    gate_bias: Float[Array, "E F"] | None = None,
    up_bias: Float[Array, "E F"] | None = None,
    down_bias: Float[Array, "E D"] | None = None,
    extents: Int[Array, "G"] | None = None,
    row_weights: Float[Array, "P"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "P D"]:
    """The FFN of each row's expert: ys[p] = row_weights[p] * (h @ down[e] + down_bias[e]), with for x = xs[p]

    - `swiglu`: h = silu(x @ gate[e] + gate_bias[e]) * (x @ up[e] + up_bias[e]),
    - `geglu`: the same with gelu in the place of silu (Shazeer 2020, "GLU variants improve transformer"),
    - `swiglu_clamped`: h = g * sigmoid(1.702 g) * (u + 1), with g the gate's pre-activation cut off above 7 and u
      that of up kept within [-7, 7] (gpt-oss, 2508.10925),
    - `gelu`, `relu`: h = act(x @ up[e] + up_bias[e]), gate None.

    gelu is the tanh approximation, the default of `jax.nn.gelu`. Differentiable in xs, weights, biases and
    row_weights (reverse mode, once). Sums and activations are float32; h and what the backward keeps are in the
    dtype of xs. Groups, tail rows and `implementation` as in `grouped_matmul`.

    Args:
        extents: how many leading columns of F take part in each group's rows: the others act as h = 0, and get
            nothing added to the gradients of their weights and biases. Rounding and order as in `grouped_matmul`;
            with 0, ys = row_weights * down_bias. None is all.
        row_weights: float32 or the dtype of xs; None is 1. Its gradient in the tail is unspecified.

    Raises:
        ValueError: shapes or dtypes that do not fit, gate missing or superfluous, an unknown activation or
            implementation.
        BackendRefused: no allowed back end can run.
    """
    given = xs, Weights(gate, up, down, gate_bias, up_bias, down_bias), row_weights
    xs, weights, row_weights = jax.tree.map(jnp.asarray, given)  # numpy's too
    group_sizes, extents = _integers(group_sizes, extents)
    _check_ffn(xs, group_sizes, weights, activation, extents, row_weights)
    varying = groups.alike((xs, weights, row_weights, group_sizes, extents))
    xs, weights, row_weights, group_sizes, extents = varying
    if 0 in xs.shape:
        GROUPED_FFN.names(implementation, default_platform())  # an unknown one is an error here too
        return jnp.zeros_like(xs)
    if extents is None:
        group_sizes = groups.per_expert(group_sizes, weights.up.shape[0])
    args, options = (xs, group_sizes, weights, activation), {"extents": extents, "row_weights": row_weights}
    return GROUPED_FFN.select(implementation, *args, **options).run(*args, **options)


def _integers(group_sizes: Array, extents: Array | None) -> tuple[Array, Array | None]:
    return groups.to_int32(group_sizes), None if extents is None else groups.to_int32(extents)


def _check_ffn(
    xs: Array, group_sizes: Array, w: Weights, activation: str, extents: Array | None, row_weights: Array | None
) -> None:
    check_gate(w, activation)
    if xs.ndim != 2 or w.up.ndim != 3:
        raise ValueError(f"xs.shape={xs.shape} must be [P, D] and up.shape={w.up.shape} [E, D, F]")
    check_weights("xs", xs, w, w.up.shape[1])
    _check_groups(group_sizes, extents, w.up.shape[0])
    if row_weights is not None and (
        row_weights.shape != xs.shape[:1] or row_weights.dtype not in (jnp.float32, xs.dtype)
    ):
        raise ValueError(
            f"row_weights has shape {row_weights.shape} and dtype {row_weights.dtype}: it must hold one float32 or "
            f"{xs.dtype} for each of the {xs.shape[0]} rows of xs"
        )


def check_gate(w: Weights, activation: str) -> None:
    """Raises ValueError for an unknown activation, or a gate (or its bias) missing or superfluous."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {ACTIVATIONS}")
    if (w.gate is not None) != (activation in GATED):
        rule = "needs gate weights" if activation in GATED else "has no gate: pass gate=None"
        raise ValueError(f"activation={activation!r} {rule}; gate is {'None' if w.gate is None else 'given'}")
    if w.gate is None and w.gate_bias is not None:
        raise ValueError(f"gate_bias given, but activation={activation!r} has no gate: pass gate_bias=None")


def check_weights(name: str, rows: Array, w: Weights, d: int) -> None:
    """Raises ValueError for weights that do not fit `rows`, called `name` in messages, or the model's width d."""
    e, _, f = w.up.shape
    expected = {
        "gate": (e, d, f),
        "up": (e, rows.shape[1], f),
        "down": (e, f, d),
        "gate_bias": (e, f),
        "up_bias": (e, f),
        "down_bias": (e, d),
    }
    given = {key: value for key, value in w._asdict().items() if value is not None}
    for key, value in given.items():
        if value.shape != expected[key]:
            raise ValueError(
                f"{key}.shape={value.shape} must be {expected[key]} with {name}.shape={rows.shape}, "
                f"up.shape={w.up.shape}"
            )
    _check_dtype(name, rows, **given)


WIDE = "a floating-point type of 16 bits or more"


def _is_wide(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def _check_dtype(name: str, rows: Array, **others: Array) -> None:
    if not _is_wide(rows.dtype):
        raise ValueError(f"{name}.dtype={rows.dtype} must be {WIDE}: cast it")
    for other, value in others.items():
        if value.dtype != rows.dtype:
            raise ValueError(f"{other}.dtype={value.dtype} must equal {name}.dtype={rows.dtype}: cast one of them")


def _check_groups(group_sizes: Array, extents: Array | None, experts: int) -> None:
    shape = group_sizes.shape
    fits = experts > 0 and len(shape) == 1 and shape[0] > 0 and shape[0] % experts == 0
    if not fits or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes has shape {shape} and dtype {group_sizes.dtype}: it must hold one integer for each of "
            f"the {experts} (at least one) experts, or a multiple of that if an expert has several groups"
        )
    if extents is not None and (extents.shape != shape or not jnp.issubdtype(extents.dtype, jnp.integer)):
        raise ValueError(
            f"extents has shape {extents.shape} and dtype {extents.dtype}: it must hold one integer for each of "
            f"the {shape[0]} groups in group_sizes, or be None for all columns"
        )
