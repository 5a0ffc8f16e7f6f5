"""Runs a back end of grouped_matmul or grouped_ffn, forward and backward, and holds it against `oracle`.

Whatever the contract lets be NaN is NaN in the inputs, so that anything that reads it fails: tail rows of everything
that has rows, columns beyond an extent of lhs ("k") or of the cotangent ("n").
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas.grouped_matmul import GROUPED_FFN, GROUPED_MATMUL, grouped_ffn, grouped_matmul, specs
from kernels_pallas.grouped_matmul.ffn import GATED, Weights
from tests.kernels_pallas import oracle

ON_CPU = jax.default_backend() == "cpu"
# For a whole module (`pytestmark`): with an accelerator there these are the tests that `-m gpu` or `-m tpu` asks for.
MARKS = [] if ON_CPU else [getattr(pytest.mark, jax.default_backend())]
# Compiling is most of the time here. The matmuls alone and the benchmark's checks run fully optimised.
QUICK = {"xla_backend_optimization_level": 0} if ON_CPU else {}
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}
ALWAYS = ("cpu_tiled", "padded", "ref", "lax")
TRACES = []


# Arrays are numpy's outside of jit: eager slices of many lengths would each be compiled.
def normal(seed, shape, dtype=np.float32, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def poisoned(x, sizes, extents=None):
    """x with NaN in the tail and beyond each group's extent."""
    out = np.full_like(x, np.nan)
    size = x.shape[-1]
    for _, rows, some in oracle.spans(sizes, extents, 1, len(x), size):
        columns = () if extents is None else (some,)
        out[(rows, *columns)] = x[(rows, *columns)]
    return out


def ffn_inputs(shape, activation, *, bias=False, dtype=np.float32):
    """(xs, weights, dy, row weights). For a clamped activation xs are so large that the clamps act."""
    e, d, f, p = shape.experts, shape.d_model, shape.d_expert, shape.rows
    gated = activation in GATED
    weights = Weights(
        gate=normal(1, (e, d, f), dtype, max(d, 1) ** -0.5) if gated else None,
        up=normal(2, (e, d, f), dtype, max(d, 1) ** -0.5),
        down=normal(3, (e, f, d), dtype, max(f, 1) ** -0.5),
        gate_bias=normal(4, (e, f), dtype) if gated and bias else None,
        up_bias=normal(5, (e, f), dtype) if bias else None,
        down_bias=normal(6, (e, d), dtype) if bias else None,
    )
    return (
        normal(7, (p, d), dtype, 5.0 if activation == "swiglu_clamped" else 1.0),
        weights,
        normal(8, (p, d), dtype),
        normal(9, (p,)),
    )


def _running(operation, arguments, dtypes):
    """(back end, dtype) of every back end that takes the arguments, in the first of `dtypes` that it takes."""
    for name, backend in operation.backends.items():
        for dtype in dtypes:
            args, options = arguments(jnp.dtype(dtype))
            if backend.refuse(*args, **options) is None:
                yield name, dtype
                break


def on_backends(operation, *names, dtypes=("float32", "bfloat16"), parts=1, biased=True, only=None, quick=None):
    """Parametrises a test over shapes of `specs` and the back ends that run there, as (shape, implementation, dtype).

    A back end that refuses all shapes named gets "blocks" instead. If it refuses that too, it is left out, not skipped:
    `ALWAYS` are those that may never refuse.

    Args:
        operation: GROUPED_FFN or GROUPED_MATMUL.
        names: of the shapes.
        dtypes: each back end gets the first of them that it takes.
        parts: groups of each expert; from 2 on the back end must take extents and row weights too.
        biased: whether it must take biases.
        only: names of the back ends to test; None is all.
        quick: on a CPU the others are slow; None is all. What they have in common a few show.
    """

    def arguments(shape, dtype):
        e, d, f, p = shape.experts, shape.d_model, shape.d_expert, shape.rows
        sizes = jax.ShapeDtypeStruct((e * parts,), jnp.int32)
        extents = sizes if parts > 1 else None
        if operation is GROUPED_MATMUL:
            args = (jax.ShapeDtypeStruct((p, d), dtype), jax.ShapeDtypeStruct((e, d, f), dtype), sizes)
            options = {"transpose_rhs": False, "extent_axis": "n", "preferred_element_type": None}
            return args, options | {"extents": extents}
        xs, _, weights = shape.abstract(dtype)
        if biased:
            one = jax.ShapeDtypeStruct((e, f), dtype)
            weights = weights._replace(gate_bias=one, up_bias=one, down_bias=jax.ShapeDtypeStruct((e, d), dtype))
        rows = jax.ShapeDtypeStruct((p,), jnp.float32) if parts > 1 else None
        return (xs, sizes, weights, "swiglu"), {"extents": extents, "row_weights": rows}

    found, seen = [], set()
    for name in dict.fromkeys((*names, "blocks")):
        shape, spare = specs.SHAPES[name], name not in names
        for implementation, dtype in _running(operation, functools.partial(arguments, shape), dtypes):
            if (only is None or implementation in only) and not (spare and implementation in seen):
                seen.add(implementation)
                slow = ON_CPU and quick is not None and implementation not in quick
                marks = [pytest.mark.slow] if slow else []
                found.append(
                    pytest.param(shape, implementation, dtype, id=f"{implementation}-{name}-{dtype}", marks=marks)
                )
    return pytest.mark.parametrize(("shape", "implementation", "dtype"), found)


on_matmuls = functools.partial(on_backends, GROUPED_MATMUL)
on_ffns = functools.partial(on_backends, GROUPED_FFN)


@functools.cache
def jitted_matmul(implementation, transpose_rhs=False, axis="n"):
    def run(lhs, rhs, sizes, dy, extents=None):
        TRACES.append(implementation)
        options = {"transpose_rhs": transpose_rhs, "extents": extents, "extent_axis": axis}
        call = functools.partial(grouped_matmul, implementation=implementation, **options)
        out, pull = jax.vjp(lambda lhs, rhs: call(lhs, rhs, sizes), lhs, rhs)
        return out, *pull(dy)

    return jax.jit(run)


def ffn_and_gradients(implementation, activation):
    """(xs, sizes, weights, dy, extents, row_weights) -> (ys, (dxs, dweights, drow_weights))"""

    def run(xs, sizes, weights, dy, extents=None, row_weights=None):
        TRACES.append(implementation)

        def call(xs, w, row_weights):
            return grouped_ffn(
                xs,
                sizes,
                w.gate,
                w.up,
                w.down,
                activation=activation,
                gate_bias=w.gate_bias,
                up_bias=w.up_bias,
                down_bias=w.down_bias,
                extents=extents,
                row_weights=row_weights,
                implementation=implementation,
            )

        ys, pull = jax.vjp(call, xs, weights, row_weights)
        return ys, pull(dy)

    return run


@functools.cache
def jitted_ffn(implementation, activation):
    return jax.jit(ffn_and_gradients(implementation, activation), compiler_options=QUICK)


def check_matmul(implementation, shape, sizes, *, dtype="float32", transpose_rhs=False, extents=None, axis="n"):
    e, k, n = shape.experts, shape.d_model, shape.d_expert
    if axis == "k":
        k, n = n, k
    dtype, tolerance = jnp.dtype(dtype), TOLERANCE[dtype]
    # The operand whose columns have extents is the left one, or the cotangent of the result.
    lhs = poisoned(normal(1, (shape.rows, k), dtype), sizes, extents if axis == "k" else None)
    rhs = normal(2, (e, n, k) if transpose_rhs else (e, k, n), dtype)
    dy = poisoned(normal(3, (shape.rows, n), dtype), sizes, extents if axis == "n" else None)
    actual = jitted_matmul(implementation, transpose_rhs, axis)(lhs, rhs, sizes, dy, extents)
    assert [a.dtype for a in actual] == [dtype] * 3
    expected = oracle.matmul(lhs, rhs, sizes, dy, transpose_rhs=transpose_rhs, extents=extents, axis=axis)
    for a, name in zip(actual, ("out", "dlhs", "drhs"), strict=True):
        oracle.check(name, a, expected[name], tolerance)


def compare_ffn(actual, expected, tolerance, of_gradients=None):
    """What `ffn_and_gradients` gives against `oracle.ffn`; `of_gradients`: their tolerance, if another."""
    ys, (dxs, dw, drow_weights) = actual
    found = {"ys": ys, "dxs": dxs, "drow_weights": drow_weights, **{f"d{n}": a for n, a in dw._asdict().items()}}
    found = {name: a for name, a in found.items() if a is not None}
    assert found.keys() == expected.keys()
    for name, a in found.items():
        oracle.check(name, a, expected[name], tolerance if name == "ys" else of_gradients or tolerance)


def check_ffn(
    implementation,
    shape,
    sizes,
    activation="swiglu",
    *,
    bias=False,
    dtype="float32",
    extents=None,
    row_weights=None,
):
    """`row_weights`: their dtype, or None for none."""
    dtype, tolerance = jnp.dtype(dtype), TOLERANCE[dtype]
    xs, weights, dy, rows = ffn_inputs(shape, activation, bias=bias, dtype=dtype)
    xs, dy = poisoned(xs, sizes), poisoned(dy, sizes)
    rows = None if row_weights is None else poisoned(rows.astype(row_weights), sizes)
    actual = jitted_ffn(implementation, activation)(xs, sizes, weights, dy, extents, rows)
    ys, (dxs, dw, drow_weights) = actual
    assert all(a.dtype == dtype for a in jax.tree.leaves((ys, dxs, dw)))
    assert drow_weights is None or drow_weights.dtype == rows.dtype
    expected = oracle.ffn(xs, weights, sizes, dy, activation, extents=extents, row_weights=rows)
    # Which pre-activations are beyond the clamp's bounds is said of those that are kept, and bfloat16 moves 1 in 1000
    # of them over a bound, where the gradient jumps: 3 % of its norm.
    jumps = activation == "swiglu_clamped" and dtype == jnp.bfloat16
    compare_ffn(actual, expected, tolerance, 5e-2 if jumps else None)


def check_without_columns(implementation):
    """K = 0 or N = 0, D = 0 or F = 0: sums of nothing are zero, and biases are still added."""
    sizes, extents, valid = np.array([1, 2], np.int32), np.array([3, 2]), np.array([1, 1, 1, 0])[:, None]
    for k, n, transpose_rhs, axis in ((3, 0, False, None), (0, 5, True, None), (0, 5, False, "k"), (0, 0, True, "n")):
        options = {
            "transpose_rhs": transpose_rhs,
            "implementation": implementation,
            "preferred_element_type": "float32",
        }
        options |= {"extents": extents, "extent_axis": axis} if axis else {}
        shape = (2, n, k) if transpose_rhs else (2, k, n)
        lhs, rhs = jnp.ones((4, k), jnp.bfloat16), jnp.ones(shape, jnp.bfloat16)
        out, pull = jax.vjp(lambda lhs, rhs, options=options: grouped_matmul(lhs, rhs, sizes, **options), lhs, rhs)
        dlhs, drhs = pull(jnp.ones_like(out))
        assert (out.shape, out.dtype) == ((4, n), jnp.float32)
        assert [(a.shape, a.dtype) for a in (dlhs, drhs)] == [(a.shape, a.dtype) for a in (lhs, rhs)]
        assert not any(np.any(a) for a in (out * valid, dlhs * valid, drhs))

    for d, f, activation in ((3, 0, "swiglu"), (3, 0, "relu"), (0, 5, "swiglu"), (0, 0, "relu")):
        shape = dataclasses.replace(specs.SHAPES["tiny"], d_model=d, d_expert=f, rows=4, experts=2)
        arguments = ffn_inputs(shape, activation, bias=True)
        xs, weights, dy, rows = (poisoned(a, sizes) if isinstance(a, np.ndarray) else a for a in arguments)
        actual = jitted_ffn(implementation, activation)(xs, sizes, weights, dy, None, rows)
        compare_ffn(actual, oracle.ffn(xs, weights, sizes, dy, activation, row_weights=rows), 1e-6)


def check_shards(loss, operands, rest, split):
    """Holds gradients inside `shard_map`, of a loss that is summed over shards, against those without it.

    Args:
        loss: (operands, rest) of one shard -> scalar.
        operands: what is differentiated.
        rest: the others, each shard's own.
        split: like the operands, whether each shard has a part of an array, or all shards the whole.
    """
    count = min(2, jax.device_count())
    mesh = jax.make_mesh((count,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    spec = jax.tree.map(lambda mine: PartitionSpec("i") if mine else PartitionSpec(), split)

    def local(operands, rest):
        return jax.grad(lambda operands: jax.lax.psum(loss(operands, rest), "i"))(operands)

    def whole(operands):
        def part(a, mine, i):
            size = len(a) // count
            return a[i * size : (i + 1) * size] if mine else a

        def of(i):
            mine = jax.tree.map(lambda a, mine: part(a, mine, i), operands, split)
            return loss(mine, jax.tree.map(lambda a: part(a, True, i), rest))

        return sum(of(i) for i in range(count))

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec("i")), out_specs=spec)
    actual = jax.jit(sharded, compiler_options=QUICK)(operands, rest)
    expected = jax.jit(jax.grad(whole), compiler_options=QUICK)(operands)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(b) > 0
        assert oracle.error(a, b) < 1e-5
