"""Every registered back end of grouped_matmul and grouped_ffn against float32 references.

Tail rows (beyond the last group) hold NaN in inputs and cotangents, so that anything that reads them fails.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas.grouped_matmul import GROUPED_FFN, GROUPED_MATMUL, grouped_ffn, grouped_matmul, specs
from kernels_pallas.grouped_matmul.ffn import ACTIVATIONS, GATED, Weights

SKEWED = {
    "uniform": specs.uniform,
    "dirichlet": specs.dirichlet,
    "harsh": functools.partial(specs.dirichlet, alpha=0.2, seed=3),
    "first takes all": specs.one_hot,
    "last takes all": lambda experts, rows: specs.one_hot(experts, rows, experts - 1),
    "tail": lambda experts, rows: specs.uniform(experts, rows // 2),
}


# Compiling is most of the time here. The matmuls alone and the benchmark's checks run fully optimised.
QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


# Arrays are numpy's outside of jit: eager slices of many lengths would each be compiled.
def normal(seed, shape, dtype=np.float32, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def poisoned(x, sizes):
    x = x.copy()
    x[int(np.sum(sizes)) :] = np.nan
    return x


def error(actual, expected):
    """Norm of the difference over the norm of what is expected (or of 1 where that is zero)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1.0)


def matmul_oracle(lhs, rhs, sizes, dy, transpose_rhs):
    """numpy, one group after the other: (out, dlhs, drhs) for the valid rows."""
    lhs, rhs, dy = (np.asarray(a, np.float64) for a in (lhs, rhs, dy))
    total, ends = int(np.sum(sizes)), np.cumsum(sizes)
    out, dlhs, drhs = np.zeros((total, dy.shape[1])), np.zeros((total, lhs.shape[1])), np.zeros(rhs.shape)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        w = rhs[e].T if transpose_rhs else rhs[e]
        out[start:end] = lhs[start:end] @ w
        dlhs[start:end] = dy[start:end] @ w.T
        outer = lhs[start:end].T @ dy[start:end]
        drhs[e] = outer.T if transpose_rhs else outer
    return out, dlhs, drhs


def dense_ffn(x, w, activation):
    """One expert's FFN as in a textbook, in float32."""
    gate = None if w.gate is None else x @ w.gate + (0 if w.gate_bias is None else w.gate_bias)
    up = x @ w.up + (0 if w.up_bias is None else w.up_bias)
    h = {
        "swiglu": lambda: gate / (1 + jnp.exp(-gate)) * up,
        "geglu": lambda: jax.nn.gelu(gate) * up,
        "gelu": lambda: jax.nn.gelu(up),
        "relu": lambda: jnp.maximum(up, 0),
    }[activation]()
    return h @ w.down + (0 if w.down_bias is None else w.down_bias)


@functools.partial(jax.jit, static_argnames="activation", compiler_options=QUICK)
def ffn_oracle(xs, weights, sizes, dy, activation):
    """Each expert on its rows, the others zero; autodiff of the textbook form: (ys, dxs, dweights)."""
    xs, weights, dy = jax.tree.map(lambda a: a.astype(jnp.float32), (xs, weights, dy))
    row, ends = jnp.arange(xs.shape[0])[:, None], jnp.cumsum(sizes)

    def apply(xs, weights):
        ys = 0
        for e in range(sizes.shape[0]):
            mine = (row >= ends[e] - sizes[e]) & (row < ends[e])
            y = dense_ffn(jnp.where(mine, xs, 0), jax.tree.map(lambda a, e=e: a[e], weights), activation)
            ys += jnp.where(mine, y, 0)
        return ys

    ys, pull = jax.vjp(apply, xs, weights)
    return ys, *pull(jnp.where(row < ends[-1], dy, 0))


TRACES = []


@functools.cache
def jitted_matmul(implementation, transpose_rhs=False):
    def run(lhs, rhs, sizes, dy):
        TRACES.append(implementation)
        call = functools.partial(grouped_matmul, transpose_rhs=transpose_rhs, implementation=implementation)
        out, pull = jax.vjp(lambda lhs, rhs: call(lhs, rhs, sizes), lhs, rhs)
        return out, *pull(dy)

    return jax.jit(run)


@functools.cache
def jitted_ffn(implementation, activation):
    return jax.jit(ffn_and_gradients(implementation, activation), compiler_options=QUICK)


def ffn_and_gradients(implementation, activation):
    def run(xs, sizes, weights, dy):
        def call(xs, w):
            biases = {"gate_bias": w.gate_bias, "up_bias": w.up_bias, "down_bias": w.down_bias}
            return grouped_ffn(
                xs,
                sizes,
                w.gate,
                w.up,
                w.down,
                activation=activation,
                implementation=implementation,
                **biases,
            )

        ys, pull = jax.vjp(call, xs, weights)
        return ys, *pull(dy)

    return run


def ffn_inputs(shape, activation, *, bias=False, dtype=np.float32):
    e, d, f, p = shape.experts, shape.d_model, shape.d_expert, shape.rows
    gated = activation in GATED
    weights = Weights(
        gate=normal(1, (e, d, f), dtype, d**-0.5) if gated else None,
        up=normal(2, (e, d, f), dtype, d**-0.5),
        down=normal(3, (e, f, d), dtype, f**-0.5),
        gate_bias=normal(4, (e, f), dtype) if gated and bias else None,
        up_bias=normal(5, (e, f), dtype) if bias else None,
        down_bias=normal(6, (e, d), dtype) if bias else None,
    )
    return normal(7, (p, d), dtype), weights, normal(8, (p, d), dtype)


def check_matmul(implementation, shape, sizes, *, transpose_rhs=False, dtype=np.float32, tolerance=1e-5):
    e, k, n = shape.experts, shape.d_model, shape.d_expert
    lhs = poisoned(normal(1, (shape.rows, k), dtype), sizes)
    rhs = normal(2, (e, n, k) if transpose_rhs else (e, k, n), dtype)
    dy = poisoned(normal(3, (shape.rows, n), dtype), sizes)
    actual = jitted_matmul(implementation, transpose_rhs)(lhs, rhs, jnp.asarray(sizes), dy)
    assert [a.dtype for a in actual] == [dtype] * 3
    for a, b in zip(actual, matmul_oracle(lhs, rhs, sizes, dy, transpose_rhs), strict=True):
        assert error(np.asarray(a)[: len(b)], b) < tolerance


def check_ffn(implementation, shape, sizes, activation="swiglu", *, bias=False, dtype=np.float32, tolerance=1e-5):
    xs, weights, dy = ffn_inputs(shape, activation, bias=bias, dtype=dtype)
    xs, dy = poisoned(xs, sizes), poisoned(dy, sizes)
    ys, dxs, dw = jitted_ffn(implementation, activation)(xs, jnp.asarray(sizes), weights, dy)
    total = int(np.sum(sizes))
    y, dx, expected = ffn_oracle(xs, weights, sizes, dy, activation)
    assert jax.tree.structure(dw) == jax.tree.structure(expected)
    pairs = [(ys, y), (dxs, dx)]
    pairs = [tuple(np.asarray(a)[:total] for a in pair) for pair in pairs]
    for a, b in pairs + list(zip(jax.tree.leaves(dw), jax.tree.leaves(expected), strict=True)):
        assert a.dtype == dtype
        assert error(a, b) < tolerance


def scan_inputs():
    shape = specs.SHAPES["odd"]
    xs, weights, _ = ffn_inputs(shape, "relu")
    stack = jax.tree.map(lambda w: np.stack([w, w * 2, w * 3]), weights)
    return xs, stack, specs.dirichlet(shape.experts, shape.rows)


def scanned_layers(remat, implementation, xs, stack, sizes):
    def layer(x, w):
        ys = grouped_ffn(x, sizes, None, w.up, w.down, activation="relu", implementation=implementation)
        return x + ys, None

    return jnp.sum(jax.lax.scan(remat(layer), xs, stack)[0] ** 2)


@functools.cache
def scan_oracle():
    def loss(xs, stack, sizes):
        for i in range(3):
            weights = jax.tree.map(lambda w, i=i: w[i], stack)
            xs += ffn_oracle.__wrapped__(xs, weights, sizes, xs, "relu")[0]
        return jnp.sum(xs**2)

    return jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)(*scan_inputs())


@pytest.mark.parametrize("implementation", list(GROUPED_MATMUL.backends))
class TestBackend:
    @pytest.mark.parametrize("pattern", range(16))
    def test_matmul_with_empty_groups(self, implementation, pattern):
        shape = specs.SHAPES["tiny"]
        check_matmul(implementation, shape, specs.with_empties(pattern, shape.experts, shape.rows, seed=pattern))

    @pytest.mark.parametrize("pattern", range(16))
    def test_ffn_with_empty_groups(self, implementation, pattern):
        shape = specs.SHAPES["tiny"]
        check_ffn(
            implementation,
            shape,
            specs.with_empties(pattern, shape.experts, shape.rows, seed=pattern),
            bias=True,
        )

    @pytest.mark.parametrize("skew", SKEWED)
    @pytest.mark.parametrize("name", ["tiny", "odd", "few_rows"])
    def test_skewed_groups_and_odd_sizes(self, implementation, name, skew):
        shape = specs.SHAPES[name]
        sizes = SKEWED[skew](shape.experts, shape.rows)
        check_matmul(implementation, shape, sizes)
        check_ffn(implementation, shape, sizes, bias=True)

    @pytest.mark.parametrize("skew", ["dirichlet", "tail"])
    def test_transposed_rhs(self, implementation, skew):
        shape = specs.SHAPES["odd"]
        check_matmul(implementation, shape, SKEWED[skew](shape.experts, shape.rows), transpose_rhs=True)

    @pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), *((name, True) for name in ACTIVATIONS)])
    def test_activations_and_biases(self, implementation, activation, bias):
        shape = specs.SHAPES["odd"]
        check_ffn(implementation, shape, specs.dirichlet(shape.experts, shape.rows - 4), activation, bias=bias)

    def test_bfloat16_sums_in_float32(self, implementation):
        shape = specs.SHAPES["tiny"]
        sizes = specs.dirichlet(shape.experts, shape.rows - 9)
        check_matmul(implementation, shape, sizes, dtype=jnp.bfloat16, tolerance=5e-3)
        check_ffn(implementation, shape, sizes, bias=True, dtype=jnp.bfloat16, tolerance=5e-3)

    def test_one_row_of_a_large_sum_survives_bfloat16(self, implementation):
        # 256 + 1 is 256 in bfloat16: sums over K and over rows must be wider.
        ones, sizes = np.ones((300, 300), jnp.bfloat16), np.array([300], np.int32)

        @jax.jit
        def run(lhs, rhs):
            call = functools.partial(grouped_matmul, group_sizes=sizes, implementation=implementation)
            out, pull = jax.vjp(lambda rhs: call(lhs, rhs, preferred_element_type=jnp.float32), rhs)
            return out, pull(jnp.ones_like(out))[0]

        out, drhs = run(ones, ones[None])
        assert (out.dtype, drhs.dtype) == (jnp.float32, jnp.bfloat16)
        np.testing.assert_array_equal(out, 300)
        np.testing.assert_array_equal(drhs.astype(np.float32), 300)

    def test_other_group_sizes_do_not_retrace(self, implementation):
        shape = specs.SHAPES["odd"]
        check_matmul(implementation, shape, specs.uniform(shape.experts, shape.rows))
        before = len(TRACES)
        check_matmul(implementation, shape, specs.one_hot(shape.experts, shape.rows, 2))
        check_matmul(implementation, shape, specs.uniform(shape.experts, 0))
        assert len(TRACES) == before

    def test_one_device_per_shard_under_shard_map(self, implementation):
        mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
        shape = specs.Shape("shard", 3, 4, 6, 10, "test")
        _, weights, _ = ffn_inputs(shape, "swiglu", bias=True)
        xs, dy = normal(1, (80, 4)), normal(2, (80, 4))
        sizes = np.stack([specs.dirichlet(3, 10 - i, seed=i) for i in range(8)])
        run = ffn_and_gradients(implementation, "swiglu")

        def local(xs, sizes, weights, dy):
            weights = jax.tree.map(lambda w: jax.lax.pcast(w, "expert", to="varying"), weights)
            ys, dxs, dw = run(xs, sizes[0], weights, dy)
            return ys, dxs, jax.tree.map(lambda d: jax.lax.psum(d, "expert"), dw)

        split, whole = PartitionSpec("expert"), PartitionSpec()
        sharded = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(split, split, whole, split),
            out_specs=(split, split, whole),
            check_vma=True,
        )
        ys, dxs, dw = jax.jit(sharded, compiler_options=QUICK)(xs, jnp.asarray(sizes), weights, dy)
        total = jax.tree.map(np.zeros_like, weights)
        for i in range(8):
            rows, valid = slice(10 * i, 10 * i + 10), sizes[i].sum()
            y, dx, d = ffn_oracle(xs[rows], weights, sizes[i], dy[rows], "swiglu")
            total = jax.tree.map(np.add, total, d)
            assert error(np.asarray(ys)[rows][:valid], y[:valid]) < 1e-5
            assert error(np.asarray(dxs)[rows][:valid], dx[:valid]) < 1e-5
        for a, b in zip(jax.tree.leaves(dw), jax.tree.leaves(total), strict=True):
            assert error(a, b) < 1e-5

    def test_inside_scan_over_checkpointed_layers(self, implementation):
        args = scan_inputs()
        scanned = jax.grad(functools.partial(scanned_layers, jax.checkpoint, implementation), argnums=(0, 1))
        actual = jax.jit(scanned, compiler_options=QUICK)(*args)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(scan_oracle()), strict=True):
            assert error(a, b) < 1e-5

    def test_vmap_equals_one_by_one(self, implementation):
        shape = specs.SHAPES["odd"]
        xs, weights, dy = ffn_inputs(shape, "geglu")
        xs, dy, run = np.stack([xs, xs + 1]), np.stack([dy, dy * 2]), jitted_ffn(implementation, "geglu")
        sizes = np.stack([specs.dirichlet(5, 37, seed=s) for s in (1, 2)])
        batched = jax.vmap(ffn_and_gradients(implementation, "geglu"), in_axes=(0, 0, None, 0), axis_name="expert")
        batched = jax.jit(batched, compiler_options=QUICK)(xs, sizes, weights, dy)
        for i in range(2):
            for a, b in zip(
                jax.tree.leaves(batched), jax.tree.leaves(run(xs[i], sizes[i], weights, dy[i])), strict=True
            ):
                assert error(a[i], b) < 1e-6

    def test_no_rows(self, implementation):
        w = normal(0, (2, 3, 4))
        sizes = jnp.zeros(2, jnp.int32)
        out, pull = jax.vjp(lambda w: grouped_matmul(jnp.zeros((0, 3)), w, sizes, implementation=implementation), w)
        assert out.shape == (0, 4)
        np.testing.assert_array_equal(pull(out)[0], 0)

    def test_sizes_past_the_end_are_cut_off(self, implementation):
        lhs, rhs, dy = normal(0, (37, 13)), normal(1, (5, 13, 7)), normal(2, (37, 7))
        too_many, fitting = np.array([10, 10, 10, 90, 4], np.int32), np.array([10, 10, 10, 7, 0], np.int32)
        actual = jitted_matmul(implementation)(lhs, rhs, too_many, dy)
        for a, b in zip(actual, matmul_oracle(lhs, rhs, fitting, dy, False), strict=True):
            assert error(a, b) < 1e-5


def test_oracle_by_hand():
    # Group 0 is row 0 (times 2), group 1 empty, group 2 row 1 (times -1); row 2 is tail.
    lhs, rhs = jnp.array([[1.0], [3.0], [jnp.nan]]), jnp.array([[[2.0]], [[5.0]], [[-1.0]]])
    out = grouped_matmul(lhs, rhs, jnp.array([1, 0, 1], jnp.int32), implementation="ref")
    np.testing.assert_array_equal(out[:2], [[2.0], [-3.0]])


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
