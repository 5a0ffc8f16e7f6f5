"""Public functions: checks of the arguments, then the choice of a back end.

Back ends (see each file for what it costs):

| name | what | order |
|---|---|---|
| `cpu_tiled` | loop over experts and tiles of their rows | first on CPU |
| `padded` | C rows of every expert in one batched matmul, repeated until the largest group is done | next |
| `ref` | every expert on every row: the oracle | last |
| `lax` | `jax.lax.ragged_dot` | by name only |

Letters: P rows (token-expert pairs) sorted by expert, E experts, K x N one expert's matrix, D model,
F expert hidden.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Backend, Implementation, Operation
from kernels_pallas.grouped_matmul import cpu_tiled, lax_ragged, padded, ref
from kernels_pallas.grouped_matmul.ffn import ACTIVATIONS, GATED, Activation, Weights

_ORDER = {"cpu": ("cpu_tiled", "ref"), "*": ("padded", "ref")}


GROUPED_MATMUL = Operation(
    "grouped_matmul",
    {
        "cpu_tiled": Backend("cpu_tiled", cpu_tiled.grouped_matmul),
        "padded": Backend("padded", padded.grouped_matmul),
        "ref": Backend("ref", ref.grouped_matmul),
        "lax": Backend("lax", lax_ragged.grouped_matmul, lax_ragged.refuse),
    },
    _ORDER,
)

GROUPED_FFN = Operation(
    "grouped_ffn",
    {
        "cpu_tiled": Backend("cpu_tiled", cpu_tiled.grouped_ffn),
        "padded": Backend("padded", padded.grouped_ffn),
        "ref": Backend("ref", ref.grouped_ffn),
        "lax": Backend("lax", lax_ragged.grouped_ffn, lax_ragged.refuse),
    },
    _ORDER,
)


def grouped_matmul(
    lhs: Float[Array, "P K"],
    rhs: Float[Array, "E K N"] | Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    transpose_rhs: bool = False,
    implementation: Implementation = None,
    preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "P N"]:
    """out[p] = lhs[p] @ rhs[e] for every row p of group e; group e follows group e - 1, from row 0 on.

    Differentiable in lhs and rhs (reverse mode, once; `ref` any number of times). Sums are float32. Any
    group may be empty. Rows beyond `sum(group_sizes)` are unspecified, in the result and in the gradient of
    lhs, and may be NaN; what stands there in lhs or in the cotangent reaches nothing else.

    Args:
        lhs: rows sorted by group.
        rhs: one matrix for each group, `[E, N, K]` if `transpose_rhs`.
        group_sizes: integers >= 0 with a sum of at most P, on the device; other values never recompile. A sum
            above P, unchecked as it is known on the device only, acts as if groups were cut off at row P.
        transpose_rhs: multiply by the transpose of each matrix.
        implementation: None (the platform's order), a back end's name, or names to try in order.
        preferred_element_type: dtype of the result; that of lhs by default.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation.
        BackendRefused: no allowed back end can run; a back end chosen by name is never replaced by another.

    It does not sort, gather or drop rows.
    """
    if lhs.ndim != 2 or rhs.ndim != 3:
        raise ValueError(f"lhs.shape={lhs.shape} must be [P, K] and rhs.shape={rhs.shape} [E, K, N] (or [E, N, K])")
    k, n = rhs.shape[:0:-1] if transpose_rhs else rhs.shape[1:]
    if lhs.shape[1] != k:
        raise ValueError(
            f"lhs.shape={lhs.shape} must be [P, {k}] for rhs.shape={rhs.shape} and "
            f"transpose_rhs={transpose_rhs}: pass the other transpose_rhs or other weights"
        )
    _check_dtype("lhs", lhs, rhs=rhs)
    _check_group_sizes(group_sizes, rhs.shape[0])
    if lhs.shape[0] == 0:
        return jnp.zeros((0, n), preferred_element_type or lhs.dtype)
    options = {"transpose_rhs": transpose_rhs, "preferred_element_type": preferred_element_type}
    return GROUPED_MATMUL.select(implementation, lhs, rhs, group_sizes, **options).run(lhs, rhs, group_sizes, **options)


def grouped_ffn(
    xs: Float[Array, "P D"],
    group_sizes: Int[Array, "E"],
    gate: Float[Array, "E D F"] | None,
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: Activation,
    gate_bias: Float[Array, "E F"] | None = None,
    up_bias: Float[Array, "E F"] | None = None,
    down_bias: Float[Array, "E D"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "P D"]:
    """The FFN of each row's expert, in one call: ys[p] = h @ down[e] + down_bias[e], with for x = xs[p]

    - `swiglu`: h = silu(x @ gate[e] + gate_bias[e]) * (x @ up[e] + up_bias[e]),
    - `geglu`: the same with gelu in the place of silu (Shazeer 2020, "GLU variants improve transformer"),
    - `gelu`, `relu`: h = act(x @ up[e] + up_bias[e]), gate None.

    gelu is the tanh approximation, the default of `jax.nn.gelu`. Differentiable in xs, weights and biases
    (reverse mode, once). Sums and activations are float32; h and what the backward keeps are in the dtype
    of xs. Tail rows, empty groups, `group_sizes` and `implementation` as in `grouped_matmul`.

    Raises:
        ValueError: shapes or dtypes that do not fit, gate missing or superfluous, an unknown activation or
            implementation.
        BackendRefused: no allowed back end can run.
    """
    weights = Weights(gate, up, down, gate_bias, up_bias, down_bias)
    _check_ffn(xs, group_sizes, weights, activation)
    if xs.shape[0] == 0:
        return jnp.zeros(xs.shape, xs.dtype)
    return GROUPED_FFN.select(implementation, xs, group_sizes, weights, activation).run(
        xs, group_sizes, weights, activation
    )


def _check_ffn(xs: Array, group_sizes: Array, w: Weights, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {ACTIVATIONS}")
    if (w.gate is not None) != (activation in GATED):
        rule = "needs gate weights" if activation in GATED else "has no gate: pass gate=None"
        raise ValueError(f"activation={activation!r} {rule}; gate is {'None' if w.gate is None else 'given'}")
    if w.gate is None and w.gate_bias is not None:
        raise ValueError(f"gate_bias given, but activation={activation!r} has no gate: pass gate_bias=None")
    if xs.ndim != 2 or w.up.ndim != 3:
        raise ValueError(f"xs.shape={xs.shape} must be [P, D] and up.shape={w.up.shape} [E, D, F]")
    e, d, f = w.up.shape
    expected = {
        "gate": (e, d, f),
        "up": (e, xs.shape[1], f),
        "down": (e, f, d),
        "gate_bias": (e, f),
        "up_bias": (e, f),
        "down_bias": (e, d),
    }
    given = {name: value for name, value in w._asdict().items() if value is not None}
    for name, value in given.items():
        if value.shape != expected[name]:
            raise ValueError(
                f"{name}.shape={value.shape} must be {expected[name]} with xs.shape={xs.shape}, up.shape={w.up.shape}"
            )
    _check_dtype("xs", xs, **given)
    _check_group_sizes(group_sizes, e)


def _check_dtype(name: str, rows: Array, **others: Array) -> None:
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"{name}.dtype={rows.dtype} must be a floating-point type")
    for other, value in others.items():
        if value.dtype != rows.dtype:
            raise ValueError(f"{other}.dtype={value.dtype} must equal {name}.dtype={rows.dtype}: cast one of them")


def _check_group_sizes(group_sizes: Array, experts: int) -> None:
    if experts == 0 or group_sizes.shape != (experts,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes has shape {group_sizes.shape} and dtype {group_sizes.dtype}: it must hold one "
            f"integer for each of the {experts} (at least one) experts"
        )
