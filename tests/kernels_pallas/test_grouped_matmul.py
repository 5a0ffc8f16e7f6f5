"""Every registered back end of grouped_matmul and grouped_ffn against NumPy: one group for each expert.

Extents, several groups for each expert and row weights: `test_extents.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import GROUPED_FFN, GROUPED_MATMUL, grouped_ffn, grouped_matmul, groups, specs
from kernels_pallas.grouped_matmul.ffn import ACTIVATIONS
from tests.kernels_pallas import oracle
from tests.kernels_pallas.backends import (
    ALWAYS,
    MARKS,
    ON_CPU,
    QUICK,
    TOLERANCE,
    TRACES,
    check_ffn,
    check_matmul,
    check_shards,
    check_without_columns,
    ffn_inputs,
    jitted_matmul,
    normal,
    on_ffns,
    on_matmuls,
)

pytestmark = MARKS

SKEWED = {
    "uniform": specs.uniform,
    "dirichlet": specs.dirichlet,
    "harsh": functools.partial(specs.dirichlet, alpha=0.2, seed=3),
    "first takes all": specs.one_hot,
    "last takes all": lambda experts, rows: specs.one_hot(experts, rows, experts - 1),
    "tail": lambda experts, rows: specs.uniform(experts, rows // 2),
}


class TestMatmul:
    @pytest.mark.parametrize("pattern", range(16))
    @on_matmuls("tiny")
    def test_empty_groups(self, shape, implementation, dtype, pattern):
        sizes = specs.with_empties(pattern, shape.experts, shape.rows, seed=pattern)
        check_matmul(implementation, shape, sizes, dtype=dtype)

    @on_matmuls("odd", only=("ref",) if ON_CPU else None)
    def test_all_patterns_of_eight_groups(self, shape, implementation, dtype):
        shape = dataclasses.replace(shape, experts=8)
        for pattern in range(256):
            check_matmul(implementation, shape, specs.with_empties(pattern, 8, shape.rows, seed=pattern), dtype=dtype)

    @pytest.mark.parametrize("skew", SKEWED)
    @on_matmuls("odd", "few_rows")
    def test_skewed_groups_and_odd_sizes(self, shape, implementation, dtype, skew):
        check_matmul(implementation, shape, SKEWED[skew](shape.experts, shape.rows), dtype=dtype)

    @on_matmuls("odd")
    def test_transposed_rhs(self, shape, implementation, dtype):
        for skew in ("dirichlet", "tail"):
            sizes = SKEWED[skew](shape.experts, shape.rows)
            check_matmul(implementation, shape, sizes, transpose_rhs=True, dtype=dtype)

    @on_matmuls("tiny", dtypes=("bfloat16",))
    def test_bfloat16(self, shape, implementation, dtype):
        check_matmul(implementation, shape, specs.dirichlet(shape.experts, shape.rows - 9), dtype=dtype)

    @on_matmuls("tiny", dtypes=("bfloat16",))
    def test_one_row_of_a_large_sum_survives_bfloat16(self, shape, implementation, dtype):
        # 256 + 1 is 256 in bfloat16: sums over K and over rows must be wider.
        del shape
        ones, sizes = np.ones((384, 384), jnp.dtype(dtype)), np.array([384], np.int32)
        ones[257:] = ones[:, 257:] = 0

        @jax.jit
        def run(lhs, rhs):
            call = functools.partial(grouped_matmul, group_sizes=sizes, implementation=implementation)
            out, pull = jax.vjp(lambda rhs: call(lhs, rhs, preferred_element_type=jnp.float32), rhs)
            return out, pull(jnp.ones_like(out))[0]

        out, drhs = run(ones, np.ones_like(ones)[None])
        assert (out.dtype, drhs.dtype) == (jnp.float32, jnp.bfloat16)
        np.testing.assert_array_equal(out[:257], 257)
        # 257 itself has no place in bfloat16: one addend too few or many would be 256 or 260 there, so sum 258.
        ones[257, :257] = 1
        _, drhs = run(ones, np.ones_like(ones)[None])
        np.testing.assert_array_equal(drhs[0, :257].astype(np.float32), 258)

    @on_matmuls("odd")
    def test_other_group_sizes_do_not_retrace(self, shape, implementation, dtype):
        check_matmul(implementation, shape, specs.uniform(shape.experts, shape.rows), dtype=dtype)
        before = len(TRACES)
        check_matmul(implementation, shape, specs.one_hot(shape.experts, shape.rows, 2), dtype=dtype)
        check_matmul(implementation, shape, specs.uniform(shape.experts, 0), dtype=dtype)
        assert len(TRACES) == before

    @on_matmuls("odd")
    def test_sizes_past_the_end_are_cut_off(self, shape, implementation, dtype):
        sizes = specs.uniform(shape.experts, shape.rows)
        sizes[-2:] = shape.rows, 4
        check_matmul(implementation, shape, sizes, dtype=dtype)

    @on_matmuls("blocks", parts=2)
    def test_sizes_whose_sum_no_int32_holds_are_cut_off(self, shape, implementation, dtype):
        shape, most = dataclasses.replace(shape, experts=3), 2**31 - 1
        check_matmul(implementation, shape, np.array([5, most, 9], np.int32), dtype=dtype)
        for sizes in ([5, 2, 7, most, most, 9], [5, most, most, most, most, most]):
            sizes = np.array(sizes, np.int32)
            check_matmul(implementation, shape, sizes, dtype=dtype)
            for axis in ("n", "k"):
                check_matmul(implementation, shape, sizes, dtype=dtype, extents=np.array([most, 64] * 3), axis=axis)

    @on_matmuls("odd")
    def test_no_rows(self, shape, implementation, dtype):
        e, k, n = shape.experts, shape.d_model, shape.d_expert
        nothing = np.zeros((0, k), jnp.dtype(dtype)), np.zeros((0, n), jnp.dtype(dtype))
        rhs, sizes = normal(0, (e, k, n), jnp.dtype(dtype)), np.zeros(e, np.int32)
        out, _, drhs = jitted_matmul(implementation)(nothing[0], rhs, sizes, nothing[1])
        assert out.shape == (0, n)
        np.testing.assert_array_equal(drhs, 0)


class TestFfn:
    @pytest.mark.parametrize("pattern", range(16))
    @on_ffns("tiny")
    def test_empty_groups(self, shape, implementation, dtype, pattern):
        sizes = specs.with_empties(pattern, shape.experts, shape.rows, seed=pattern)
        check_ffn(implementation, shape, sizes, bias=True, dtype=dtype)

    @on_ffns("odd", only=("ref",) if ON_CPU else None)
    def test_all_patterns_of_eight_groups(self, shape, implementation, dtype):
        shape = dataclasses.replace(shape, experts=8)
        for pattern in range(256):
            sizes = specs.with_empties(pattern, 8, shape.rows, seed=pattern)
            check_ffn(implementation, shape, sizes, bias=True, dtype=dtype)

    @pytest.mark.parametrize("skew", SKEWED)
    @on_ffns("odd", "few_rows")
    def test_skewed_groups_and_odd_sizes(self, shape, implementation, dtype, skew):
        check_ffn(implementation, shape, SKEWED[skew](shape.experts, shape.rows), bias=True, dtype=dtype)

    @pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), *((name, True) for name in ACTIVATIONS)])
    # What is between the matmuls is the same for all but `ref`; `lax` compiles fastest.
    @on_ffns("odd", quick=("lax", "ref"))
    def test_activations_and_biases(self, shape, implementation, dtype, activation, bias):
        sizes = specs.dirichlet(shape.experts, shape.rows - 4)
        check_ffn(implementation, shape, sizes, activation, bias=bias, dtype=dtype)

    @on_ffns("tiny", dtypes=("bfloat16",))
    def test_bfloat16(self, shape, implementation, dtype):
        check_ffn(implementation, shape, specs.dirichlet(shape.experts, shape.rows - 9), bias=True, dtype=dtype)

    @on_ffns("odd", biased=False, quick=("lax", "cpu_tiled"))
    def test_inside_scan_over_checkpointed_layers(self, shape, implementation, dtype):
        xs, weights, _, _ = ffn_inputs(shape, "swiglu", dtype=jnp.dtype(dtype))
        layers = [jax.tree.map(lambda w, by=by: w * np.asarray(by, w.dtype), weights) for by in (1, 2, 0.5)]
        sizes = specs.dirichlet(shape.experts, shape.rows)

        @jax.checkpoint
        def layer(x, w):
            ys = grouped_ffn(x, sizes, w.gate, w.up, w.down, activation="swiglu", implementation=implementation)
            return x + ys, None

        def loss(xs, stack):
            return jnp.sum(jax.lax.scan(layer, xs, stack)[0].astype(jnp.float32) ** 2) / 2

        stack = jax.tree.map(lambda *w: np.stack(w), *layers)
        dxs, dw = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)(xs, stack)

        # x + FFN(x) layer by layer, then back: half the sum of squares has the gradient x.
        seen = [xs.astype(np.float64)]
        for w in layers:
            seen.append(seen[-1] + oracle.ffn(seen[-1], w, sizes, seen[-1], "swiglu")["ys"].value)
        dx, tolerance = seen[-1], 4 * TOLERANCE[dtype]  # rounded once more in each layer
        for i in (2, 1, 0):
            expected = oracle.ffn(seen[i], layers[i], sizes, dx, "swiglu")
            for name in ("gate", "up", "down"):
                assert oracle.error(getattr(dw, name)[i], expected[f"d{name}"].value) < tolerance
            dx = dx + expected["dxs"].value
        assert oracle.error(dxs, dx) < tolerance


def test_oracle_by_hand():
    # Group 0 is row 0 (times 2), group 1 empty, group 2 row 1 (times -1); row 2 is tail.
    lhs, rhs = np.array([[1.0], [3.0], [np.nan]]), np.array([[[2.0]], [[5.0]], [[-1.0]]])
    expected = oracle.matmul(lhs, rhs, np.array([1, 0, 1]), np.array([[10.0], [100.0], [np.nan]]))
    np.testing.assert_array_equal(expected["out"].value, [[2], [-3], [0]])
    np.testing.assert_array_equal(expected["dlhs"].value, [[20], [-100], [0]])
    np.testing.assert_array_equal(expected["drhs"].value, [[[10]], [[0]], [[300]]])
    np.testing.assert_array_equal(expected["out"].where, [[True], [True], [False]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_oracle_gradients_are_those_of_finite_differences(activation):
    shape = dataclasses.replace(specs.SHAPES["odd_blocks"], rows=20)
    arguments = ffn_inputs(shape, activation, bias=True, dtype=np.float64)
    xs, weights, dy, rows = arguments
    sizes, extents = np.array([3, 2, 0, 6, 5, 1]), np.array([300, 200, 128, 0, 1, 1])
    seeds = iter(range(20, 40))
    directions = [jax.tree.map(lambda a: normal(next(seeds), a.shape, np.float64), a) for a in (xs, weights, rows)]

    def run(xs, weights, rows):
        return oracle.ffn(xs, weights, sizes, dy, activation, extents=extents, row_weights=rows)

    expected = run(xs, weights, rows)
    total = np.sum(directions[0] * expected["dxs"].value) + np.sum(directions[2] * expected["drow_weights"].value)
    for name, direction in directions[1]._asdict().items():
        if direction is not None:
            total += np.sum(direction * expected[f"d{name}"].value)
    measured = oracle.directional(lambda *args: np.sum(dy * run(*args)["ys"].value), (xs, weights, rows), directions)
    assert abs(measured - total) < 1e-6 * abs(total)


@pytest.mark.parametrize("operation", [GROUPED_MATMUL, GROUPED_FFN], ids=lambda operation: operation.name)
def test_the_back_ends_that_need_no_accelerator_are_all_tested(operation):
    assert set(ALWAYS) <= set(operation.backends)
    on = on_matmuls if operation is GROUPED_MATMUL else on_ffns
    for parts in (1, 2):
        for dtype in ("float32", "bfloat16"):
            found = {case.values[1] for case in on("odd", dtypes=(dtype,), parts=parts).args[1]}
            assert found >= set(ALWAYS)


def test_backends_of_both_operations_have_the_same_names():
    assert list(GROUPED_FFN.backends) == list(GROUPED_MATMUL.backends)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation='tanh' must be one of"),
        ({"gate": None}, "activation='swiglu' needs gate weights"),
        ({"activation": "relu"}, "has no gate: pass gate=None"),
        ({"activation": "relu", "gate": None, "gate_bias": jnp.ones((2, 4))}, "pass gate_bias=None"),
        ({"down": jnp.ones((2, 3, 4))}, r"down.shape=\(2, 3, 4\) must be \(2, 4, 3\)"),
        ({"up_bias": jnp.ones((2, 3))}, r"up_bias.shape=\(2, 3\) must be \(2, 4\)"),
        ({"xs": jnp.ones((5, 7))}, r"up.shape=\(2, 3, 4\) must be \(2, 7, 4\)"),
        ({"xs": jnp.ones((5, 3), jnp.bfloat16)}, r"gate.dtype=float32 must equal xs.dtype=bfloat16"),
        ({"group_sizes": jnp.ones(2)}, "must hold one integer for each"),
        ({"group_sizes": jnp.ones(3, jnp.int32)}, "must hold one integer for each of the 2"),
    ],
)
def test_errors_name_argument_value_and_rule(change, message):
    arguments = {
        "xs": jnp.ones((5, 3)),
        "group_sizes": jnp.array([2, 3], jnp.int32),
        "gate": jnp.ones((2, 3, 4)),
        "up": jnp.ones((2, 3, 4)),
        "down": jnp.ones((2, 4, 3)),
        "activation": "swiglu",
    }
    with pytest.raises(ValueError, match=message):
        grouped_ffn(**(arguments | change))


def test_matmul_names_the_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"lhs.shape=\(4, 3\) must be \[P, 5\].*transpose_rhs=False"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 5, 3)), jnp.array([2, 2], jnp.int32))


def test_the_shapes_of_more_than_2_to_the_31_rows_of_all_groups_do_not_wrap():
    sizes, most = jnp.array([5, 2**31 - 1, 9], jnp.int32), 2**31 - 1
    for rows in (8, 2**30 + 3, most):
        start, end = groups.bounds(sizes, rows)
        np.testing.assert_array_equal(start, [0, 5, rows])
        np.testing.assert_array_equal(end, [5, rows, rows])
    np.testing.assert_array_equal(groups.per_expert(jnp.array([5, 3, most, 9]), 2), [8, most])


@pytest.mark.parametrize("implementation", ALWAYS)
def test_integers_of_any_type_mean_what_those_of_int32_do(implementation):
    call = functools.partial(grouped_matmul, implementation=implementation)
    for dtype in ("uint8", "int16", "uint32", "int64"):
        sizes = np.array([100] * 3, dtype)
        assert call(np.ones((300, 1), np.float32), jnp.ones((3, 1, 1)), sizes).sum() == 300
        assert call(np.ones((300, 1), np.float32), jnp.ones((3, 1, 1)), jnp.asarray(sizes)).sum() == 300
    lhs, rhs = jnp.ones((2, 192)), jnp.ones((1, 192, 1))
    for extent, dtype, columns in (
        (127, "int8", 128), (-5, "int8", 0), (200, "uint8", 192), (2**32 - 1, "uint32", 192), (2**32 + 1, "int64", 192),
        (-(2**32) + 70, "int64", 0), (70, "int64", 128),
    ):  # fmt: skip
        extents = np.array([extent], dtype)
        np.testing.assert_array_equal(call(lhs, rhs, np.array([2]), extents=extents, extent_axis="k"), columns)
        if dtype != "int64":
            made = jax.jit(lambda extents: call(lhs, rhs, jnp.array([2]), extents=extents, extent_axis="k"))(extents)
            np.testing.assert_array_equal(made, columns)
        out = grouped_ffn(
            lhs, np.array([2]), None, jnp.ones((1, 192, 192)), jnp.ones((1, 192, 1)) * jnp.ones((1, 192, 192)),
            activation="relu", extents=extents, implementation=implementation,
        )  # fmt: skip
        np.testing.assert_array_equal(out, 192 * columns)


@pytest.mark.parametrize("implementation", ALWAYS)
@pytest.mark.parametrize("split", ["rows", "weights"])
def test_gradients_of_what_shards_share_are_the_sums_over_them(implementation, split):
    """Inside `shard_map`: data parallel with whole weights, and whole rows with each shard's own weights."""
    sizes = np.array([3, 5, 6, 1], np.int32)
    lhs, rhs = normal(1, (16, 3)), normal(2, (2, 3, 5))
    if split == "weights":
        rhs = normal(2, (4, 3, 5))

    def of_matmul(operands, sizes):
        out = grouped_matmul(*operands, sizes, implementation=implementation)
        return jnp.sum(jnp.where(jnp.arange(len(out))[:, None] < sizes.sum(), out, 0) ** 2)

    check_shards(of_matmul, (lhs, rhs), sizes, (split == "rows", split == "weights"))

    shape = dataclasses.replace(specs.SHAPES["tiny"], rows=16, experts=len(rhs))
    xs, weights, _, row_weights = ffn_inputs(shape, "swiglu", bias=True)

    def of_ffn(operands, sizes):
        xs, w, row_weights = operands
        biases = {"gate_bias": w.gate_bias, "up_bias": w.up_bias, "down_bias": w.down_bias}
        options = {"activation": "swiglu", "row_weights": row_weights, "implementation": implementation}
        out = grouped_ffn(xs, sizes, w.gate, w.up, w.down, **options, **biases)
        return jnp.sum(jnp.where(jnp.arange(len(out))[:, None] < sizes.sum(), out, 0) ** 2)

    which = split == "rows", jax.tree.map(lambda _: split == "weights", weights), split == "rows"
    check_shards(of_ffn, (xs, weights, row_weights), sizes, which)


@pytest.mark.parametrize("implementation", ALWAYS)
def test_arrays_without_columns(implementation):
    check_without_columns(implementation)


def test_an_unknown_back_end_is_an_error_without_rows_too():
    sizes, matrix = jnp.zeros(2, jnp.int32), jnp.ones((2, 3, 3))
    with pytest.raises(ValueError, match="implementation='quick' must name"):
        grouped_matmul(jnp.ones((0, 3)), matrix, sizes, implementation="quick")
    with pytest.raises(ValueError, match="implementation='quick' must name"):
        grouped_ffn(jnp.ones((0, 3)), sizes, None, matrix, matrix, activation="relu", implementation="quick")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn])
def test_types_that_no_sum_fits_in_are_errors(dtype):
    ones = jnp.ones((4, 3)), jnp.ones((2, 3, 3)), jnp.array([2, 2])
    with pytest.raises(ValueError, match=r"preferred_element_type=(int32|float8_e4m3fn) must be a floating-point type"):
        grouped_matmul(*ones, preferred_element_type=dtype)
    with pytest.raises(ValueError, match=r"lhs.dtype=(int32|float8_e4m3fn) must be a floating-point type of 16 bits"):
        grouped_matmul(ones[0].astype(dtype), ones[1].astype(dtype), ones[2])
