"""Extents, several groups for each expert and row weights, on every registered back end, against NumPy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas.grouped_matmul import grouped_ffn, grouped_matmul, groups, specs
from tests.kernels_pallas import oracle
from tests.kernels_pallas.backends import (
    MARKS,
    ON_CPU,
    QUICK,
    TOLERANCE,
    TRACES,
    check_ffn,
    check_matmul,
    compare_ffn,
    ffn_and_gradients,
    ffn_inputs,
    jitted_ffn,
    normal,
    on_ffns,
    on_matmuls,
)

pytestmark = MARKS

ALL = 2**31 - 1
EXTENTS = (ALL, 150, 64, 0)  # of which the third and second are one and three blocks of columns
# What the two groups of one expert may have: the first has the larger extent.
PAIRS = list(itertools.combinations_with_replacement(EXTENTS, 2))
AXES = ["n", pytest.param("k", marks=pytest.mark.slow if ON_CPU else [])]


def halves(shape):
    """The shape with half its experts: with two groups for each there are as many groups as before."""
    return dataclasses.replace(shape, experts=shape.experts // 2)


def pairs_of(experts, first=0):
    """Extents of two groups for each expert, other ones for each `first`."""
    return np.array([PAIRS[(first + e) % len(PAIRS)] for e in range(experts)], np.int32).reshape(-1)


def single(experts):
    return np.array([EXTENTS[e % len(EXTENTS)] for e in range(experts)], np.int32)


class TestMatmul:
    # The gradient of lhs is the product of the other axis and the other `transpose_rhs`, so "n" holds "k" too.
    @pytest.mark.parametrize("transpose_rhs", [False, True])
    @pytest.mark.parametrize("axis", AXES)
    @on_matmuls("blocks", parts=2)
    def test_two_groups_with_extents_and_empty_groups(self, shape, implementation, dtype, axis, transpose_rhs):
        shape = halves(shape)
        options = {"axis": axis, "transpose_rhs": transpose_rhs, "dtype": dtype}
        for pattern in range(16):
            sizes = specs.with_empties(pattern, 4, shape.rows, seed=pattern)
            check_matmul(implementation, shape, sizes, extents=pairs_of(2, first=pattern), **options)

    @pytest.mark.parametrize("axis", AXES)
    @on_matmuls("odd_blocks", parts=2)
    def test_one_group_with_extents_and_odd_sizes(self, shape, implementation, dtype, axis):
        shape = dataclasses.replace(shape, experts=4)
        for sizes in (specs.dirichlet(4, shape.rows - 5), specs.one_hot(4, shape.rows, 1)):
            check_matmul(implementation, shape, sizes, extents=single(4), axis=axis, dtype=dtype)

    @on_matmuls("blocks", parts=2, dtypes=("bfloat16",))
    def test_bfloat16(self, shape, implementation, dtype):
        shape, sizes = halves(shape), specs.dirichlet(4, shape.rows - 9)
        check_matmul(implementation, shape, sizes, extents=pairs_of(2, first=1), axis="k", dtype=dtype)


class TestFfn:
    @on_ffns("blocks", parts=2)
    def test_two_groups_with_extents_and_empty_groups(self, shape, implementation, dtype):
        shape = halves(shape)
        for pattern in range(16):
            sizes = specs.with_empties(pattern, 4, shape.rows, seed=pattern)
            extents = pairs_of(2, first=pattern)
            options = {"bias": True, "dtype": dtype, "row_weights": "float32"}
            check_ffn(implementation, shape, sizes, extents=extents, **options)

    @on_ffns("odd_blocks", parts=2, biased=False)
    def test_one_group_with_extents_and_odd_sizes(self, shape, implementation, dtype):
        shape = dataclasses.replace(shape, experts=4)
        for sizes in (specs.dirichlet(4, shape.rows - 5), specs.one_hot(4, shape.rows, 1)):
            check_ffn(implementation, shape, sizes, "gelu", extents=single(4), dtype=dtype)

    @on_ffns("blocks", parts=2, dtypes=("bfloat16",))
    def test_bfloat16(self, shape, implementation, dtype):
        shape, sizes = halves(shape), specs.dirichlet(4, shape.rows - 9)
        options = {"bias": True, "dtype": dtype, "row_weights": "float32"}
        check_ffn(implementation, shape, sizes, extents=pairs_of(2, first=1), **options)

    @on_ffns("odd", parts=2, biased=False, dtypes=("bfloat16",))
    def test_row_weights_alone_in_the_dtype_of_the_rows(self, shape, implementation, dtype):
        sizes = specs.dirichlet(shape.experts, shape.rows - 3)
        check_ffn(implementation, shape, sizes, dtype=dtype, row_weights=dtype)

    @on_ffns("blocks", parts=2)
    def test_other_extents_do_not_retrace(self, shape, implementation, dtype):
        sizes = specs.with_empties(15, 4, shape.rows, seed=15)
        options = {"bias": True, "dtype": dtype, "row_weights": "float32"}
        check_ffn(implementation, halves(shape), sizes, extents=pairs_of(2, first=0), **options)
        before = len(TRACES)
        check_ffn(implementation, halves(shape), sizes, extents=np.zeros(4, np.int32), **options)
        assert len(TRACES) == before

    @on_ffns("odd_blocks", parts=2, quick=("cpu_tiled", "padded"))
    def test_vmap_and_shard_map_split_extents_and_row_weights(self, shape, implementation, dtype):
        shape, dtype, tolerance = dataclasses.replace(shape, experts=2), jnp.dtype(dtype), TOLERANCE[dtype]
        _, weights, _, _ = ffn_inputs(shape, "swiglu", bias=True, dtype=dtype)
        count = min(2, jax.device_count())
        xs, dy = (normal(seed, (count, shape.rows, shape.d_model), dtype) for seed in (1, 2))
        rows = normal(3, (count, shape.rows))
        sizes = np.stack([specs.dirichlet(4, shape.rows - i, seed=i) for i in range(count)])
        extents = np.stack([pairs_of(2, first=2 * i) for i in range(count)])
        one = ffn_and_gradients(implementation, "swiglu")

        def local(xs, sizes, weights, dy, extents, rows):
            weights = jax.tree.map(lambda w: jax.lax.pcast(w, "expert", to="varying"), weights)
            result = one(*(a[0] for a in (xs, sizes)), weights, *(a[0] for a in (dy, extents, rows)))
            return jax.tree.map(lambda a: a[None], result)

        mesh = jax.make_mesh((count,), ("expert",), axis_types=(AxisType.Auto,))
        split, whole = PartitionSpec("expert"), PartitionSpec()
        in_specs = (split, split, whole, split, split, split)
        sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=True)
        batched = jax.vmap(one, in_axes=(0, 0, None, 0, 0, 0))
        for run in (sharded, batched):
            actual = jax.jit(run, compiler_options=QUICK)(xs, sizes, weights, dy, extents, rows)
            actual = jax.tree.map(np.asarray, actual)
            for i in range(count):
                options = {"extents": extents[i], "row_weights": rows[i]}
                expected = oracle.ffn(xs[i], weights, sizes[i], dy[i], "swiglu", **options)
                compare_ffn(jax.tree.map(lambda a, i=i: a[i], actual), expected, tolerance)


@pytest.mark.parametrize(
    ("extent", "columns", "expected"),
    [(0, 300, 0), (1, 300, 64), (64, 300, 64), (65, 300, 128), (257, 300, 300), (ALL, 300, 300), (7, 40, 40)],
)
def test_extents_are_whole_blocks_of_columns(extent, columns, expected):
    assert groups.round_extents(jnp.array([extent], jnp.int32), columns) == expected
    assert oracle.columns(extent, columns) == expected


def test_two_groups_without_extents_are_one():
    shape, two = specs.SHAPES["odd"], specs.dirichlet(10, 37)
    xs, weights, dy, _ = ffn_inputs(shape, "swiglu", bias=True)
    run = jitted_ffn(None, "swiglu")
    one = run(xs, two.reshape(5, 2).sum(1, dtype=np.int32), weights, dy)
    jax.tree.map(np.testing.assert_array_equal, run(xs, two, weights, dy), one)


def test_no_columns_leave_the_bias_times_the_row_weight():
    up, down, bias = normal(1, (2, 3, 5)), normal(2, (2, 5, 3)), normal(3, (2, 3))
    weights, sizes, nothing = normal(4, (4,)), jnp.array([1, 0, 2, 1]), jnp.zeros(4, jnp.int32)
    options = {"activation": "relu", "down_bias": bias, "extents": nothing, "row_weights": weights}
    ys = grouped_ffn(normal(5, (4, 3)), sizes, None, up, down, **options)
    np.testing.assert_array_equal(ys, weights[:, None] * bias[[0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_sizes": jnp.ones(3, jnp.int32)}, r"group_sizes has shape \(3,\).*each of the 2 .*or a multiple"),
        ({"group_sizes": jnp.ones(0, jnp.int32)}, r"group_sizes has shape \(0,\)"),
        ({"extents": jnp.ones(2, jnp.int32)}, r"extents has shape \(2,\).*each of the 4 groups"),
        ({"extents": jnp.ones(4)}, "extents has shape .* and dtype float32: it must hold one integer"),
        ({"row_weights": jnp.ones((5, 1))}, r"row_weights has shape \(5, 1\).*each of the 5 rows"),
        (
            {"row_weights": jnp.ones(5, jnp.int32)},
            "row_weights has .* dtype int32: it must hold one float32 or bfloat16",
        ),
    ],
)
def test_errors_name_argument_value_and_rule(change, message):
    arguments = {
        "xs": jnp.ones((5, 3), jnp.bfloat16),
        "group_sizes": jnp.array([1, 1, 1, 2], jnp.int32),
        "gate": None,
        "up": jnp.ones((2, 3, 4), jnp.bfloat16),
        "down": jnp.ones((2, 4, 3), jnp.bfloat16),
        "activation": "relu",
    }
    with pytest.raises(ValueError, match=message):
        grouped_ffn(**(arguments | change))


def test_an_unknown_extent_axis_is_an_error():
    with pytest.raises(ValueError, match=r"extent_axis='m' must be one of \('n', 'k'\)"):
        grouped_matmul(jnp.ones((4, 5)), jnp.ones((2, 5, 3)), jnp.array([2, 2]), extent_axis="m")  # ty: ignore
