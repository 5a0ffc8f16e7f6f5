"""The whole layer, every back end against a textbook form in float32, and the plans against numpy.

Whatever belongs to no valid pair holds NaN (tokens, gate weights, cotangents), so that anything that reads it fails.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import GROUPED_MATMUL, MOE_FFN, moe_ffn
from kernels_pallas.grouped_matmul.ffn import ACTIVATIONS, GATED, Weights
from kernels_pallas.moe_ffn import composed, make_plan
from tests.kernels_pallas.backends import check_shards

T, K, E, D, F = 21, 3, 5, 13, 10
QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def normal(seed, shape, dtype=np.float32, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def make_params(activation="swiglu", *, bias=True, dtype=np.float32):
    gated = activation in GATED
    return Weights(
        gate=normal(1, (E, D, F), dtype, D**-0.5) if gated else None,
        up=normal(2, (E, D, F), dtype, D**-0.5),
        down=normal(3, (E, F, D), dtype, F**-0.5),
        gate_bias=normal(4, (E, F), dtype) if gated and bias else None,
        up_bias=normal(5, (E, F), dtype) if bias else None,
        down_bias=normal(6, (E, D), dtype) if bias else None,
    )


def abstract(activation="swiglu", dtype=np.float32):
    """Arguments of a back end, for `explain`."""
    pairs = jax.ShapeDtypeStruct((T, K), jnp.int32)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), make_params(activation, dtype=dtype))
    return jax.ShapeDtypeStruct((T, D), dtype), pairs, jax.ShapeDtypeStruct((T, K), jnp.float32), params, activation


# Those that can run here; which ones must is a test of its own.
IMPLEMENTATIONS = [name for name in MOE_FFN.backends if name not in MOE_FFN.explain(*abstract()).refusals]


def random_experts(seed=0, low=0, high=E):
    return np.random.default_rng(seed).integers(low, high, (T, K)).astype(np.int32)


def some_dropped():
    valid = np.random.default_rng(1).random((T, K)) < 0.6
    valid[[0, 7]] = False
    valid[3] = True
    return valid


# name -> (expert, valid)
ROUTINGS = {
    "all valid, experts repeat": (random_experts(), None),
    "distinct experts": (np.argsort(np.random.default_rng(2).random((T, E)), axis=1)[:, :K].astype(np.int32), None),
    "experts without tokens": (np.array([1, 3], np.int32)[random_experts(3) % 2], None),
    "one expert takes all": (np.full((T, K), 2, np.int32), None),
    "some dropped": (random_experts(4), some_dropped()),
    "all dropped": (random_experts(5), np.zeros((T, K), bool)),
    "experts out of range": (random_experts(6, -2, E + 2), some_dropped()),
}


def error(actual, expected):
    """Norm of the difference over the norm of what is expected (or of 1 where that is zero)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1.0)


def assert_close(actual, expected, tolerance):
    errors = jax.tree.map(error, actual, expected)
    # Not their maximum, in which a NaN may get lost.
    assert all(e < tolerance for e in jax.tree.leaves(errors)), errors


def call(x, weight, params, expert, valid, activation, implementation):
    biases = {"gate_bias": params.gate_bias, "up_bias": params.up_bias, "down_bias": params.down_bias}
    options = {"activation": activation, "valid": valid, "implementation": implementation}
    return moe_ffn(x, expert, weight, params.gate, params.up, params.down, **options, **biases)


@functools.cache
def jitted(implementation, activation):
    def run(x, weight, params, expert, valid, dy):
        f = functools.partial(call, expert=expert, valid=valid, activation=activation, implementation=implementation)
        y, pull = jax.vjp(f, x, weight, params)
        return y, *pull(dy)

    return jax.jit(run, compiler_options=QUICK)


@functools.partial(jax.jit, static_argnames="activation", compiler_options=QUICK)
def oracle(x, weight, params, expert, kept, dy, activation):
    """A copy of its expert's weights for every pair, in float32: (y, dx, dweight, dparams) by autodiff."""
    x, weight, params, dy = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weight, params, dy))
    token = jnp.any(kept, axis=1, keepdims=True)
    x, weight, dy = jnp.where(token, x, 0), jnp.where(kept, weight, 0), jnp.where(token, dy, 0)
    act = {"swiglu": lambda z: z / (1 + jnp.exp(-z)), "relu": lambda z: jnp.maximum(z, 0)}
    act = act.get(activation, jax.nn.gelu)

    def apply(x, weight, params):
        mine = jax.tree.map(lambda a: a[jnp.where(kept, expert, 0)], params)

        def affine(spec, a, name):
            bias = getattr(mine, f"{name}_bias")
            return jnp.einsum(spec, a, getattr(mine, name)) + (0 if bias is None else bias)

        up = affine("td,tkdf->tkf", x, "up")
        gate = None if mine.gate is None else affine("td,tkdf->tkf", x, "gate")
        if activation == "swiglu_clamped":
            gate, up = jnp.where(gate > 7, 7, gate), jnp.where(jnp.abs(up) > 7, 7 * jnp.sign(up), up)
            h = gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1)
        else:
            h = act(up) if gate is None else act(gate) * up
        return jnp.sum(weight[..., None] * affine("tkf,tkfd->tkd", h, "down") * kept[..., None], axis=1)

    y, pull = jax.vjp(apply, x, weight, params)
    dx, dweight, dparams = pull(dy)
    return y, jnp.where(token, dx, 0), jnp.where(kept, dweight, 0), dparams


def check(implementation, routing, activation="swiglu", *, bias=True, dtype=np.float32, forward=1e-5, backward=1e-5):
    expert, valid = ROUTINGS[routing]
    kept = (expert >= 0) & (expert < E) & (True if valid is None else valid)
    params = make_params(activation, bias=bias, dtype=dtype)
    x, weight, dy = normal(7, (T, D), dtype), normal(8, (T, K)), normal(9, (T, D), dtype)
    for array, held in ((x, kept.any(axis=1)), (weight, kept), (dy, kept.any(axis=1))):
        array[~held] = np.nan
    # One trace for each implementation and activation.
    given = np.ones((T, K), bool) if valid is None else valid
    actual = jitted(implementation, activation)(x, weight, params, expert, given, dy)
    expected = oracle(x, weight, params, expert, kept, dy, activation)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert [a.dtype for a in jax.tree.leaves(actual)] == [a.dtype for a in jax.tree.leaves((x, x, weight, params))]
    assert_close(actual[0], expected[0], forward)
    assert_close(actual[1:], expected[1:], backward)


def test_every_portable_back_end_runs_here_and_is_tested():
    assert {"cpu_tiled", "padded", "ref", "lax"} <= set(IMPLEMENTATIONS)
    assert list(MOE_FFN.backends) == list(GROUPED_MATMUL.backends)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestBackend:
    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_values_and_all_gradients(self, implementation, routing):
        check(implementation, routing)

    @pytest.mark.parametrize("routing", ["some dropped", "one expert takes all"])
    def test_bfloat16(self, implementation, routing):
        # Rounded to 8 bits (2^-9 of the value at most, 0.1 % in the mean): pre-activations, h, rows of experts and the
        # result on the way forward; on the way back also their gradients, weight * h, and what h is recomputed from.
        check(implementation, routing, dtype=jnp.bfloat16, forward=5e-3, backward=1e-2)


# The chain of primitives is the same for all but `ref`; `lax` compiles fastest. `ref` has its activations from
# grouped_ffn, where test_grouped_matmul.py holds each: most are slow here.
@pytest.mark.parametrize(
    ("implementation", "activation", "bias"),
    [
        ("lax", "swiglu", False),
        *(("lax", name, True) for name in ACTIVATIONS if name != "swiglu"),
        ("ref", "swiglu_clamped", True),
        pytest.param("ref", "swiglu", False, marks=pytest.mark.slow),
        *(
            pytest.param("ref", name, True, marks=pytest.mark.slow)
            for name in ACTIVATIONS
            if name not in ("swiglu", "swiglu_clamped")
        ),
    ],
)
def test_activations_with_and_without_biases(implementation, activation, bias):
    check(implementation, "some dropped", activation, bias=bias)


def test_oracle_by_hand():
    # Two experts of one number each, relu: expert 0 doubles, expert 1 gives -3 times its input (0 if that is negative).
    up, down = jnp.array([[[1.0]], [[3.0]]]), jnp.array([[[2.0]], [[-1.0]]])
    x, expert = jnp.array([[1.0], [2.0], [-1.0]]), jnp.array([[0, 1], [1, 1], [0, 1]])
    weight = jnp.array([[0.5, 1.0], [1.0, 2.0], [1.0, 1.0]])
    valid = jnp.array([[True, True], [True, False], [True, True]])
    y = moe_ffn(x, expert, weight, None, up, down, activation="relu", valid=valid, implementation="ref")
    np.testing.assert_allclose(y, [[0.5 * 2 - 3], [-6], [0]])


def test_no_valid_argument_and_a_gate_weight_of_another_type():
    expert, _ = ROUTINGS["all valid, experts repeat"]
    x, weight = normal(7, (T, D)), normal(8, (T, K), np.float16)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(weight, valid):
        f = functools.partial(call, x, params=make_params(), expert=expert, activation="swiglu", implementation=None)
        y, pull = jax.vjp(lambda weight: f(weight, valid=valid), weight)
        return y, pull(y)[0]

    without, given = run(weight, None), run(weight, np.ones((T, K), bool))
    assert [a.dtype for a in without] == [np.float32, np.float16]
    jax.tree.map(np.testing.assert_array_equal, without, given)


@pytest.mark.parametrize(("tokens", "choices"), [(0, 2), (4, 0)])
def test_no_pairs(tokens, choices):
    x = jnp.ones((tokens, D))
    pairs = jnp.zeros((tokens, choices))
    y = call(x, pairs, make_params(), pairs.astype(jnp.int32), None, "swiglu", None)
    np.testing.assert_array_equal(y, jnp.zeros((tokens, D)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("d", "f"), [(D, 0), (0, F)])
def test_without_columns_the_biases_are_left(implementation, d, f):
    x, (expert, valid), weight = normal(1, (T, d)), ROUTINGS["some dropped"], normal(2, (T, K))
    params = Weights(None, jnp.ones((E, d, f)), jnp.ones((E, f, d)), None, jnp.ones((E, f)), normal(3, (E, d)))

    def run(x, weight, params):
        return call(x, weight, params, expert, valid, "relu", implementation)

    y, pull = jax.vjp(run, x, weight, params)
    dx, dweight, dparams = pull(jnp.ones_like(y))
    share = np.where(valid, weight, 0)[:, :, None] * (np.arange(E) == expert[:, :, None])  # of each expert
    np.testing.assert_allclose(y, share.sum(1) @ params.down_bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dx, np.zeros_like(x))
    np.testing.assert_allclose(dweight, np.where(valid, params.down_bias.sum(1)[expert], 0), rtol=1e-5, atol=1e-5)
    bias = np.broadcast_to(share.sum((0, 1))[:, None], (E, d))
    np.testing.assert_allclose(dparams.down_bias, bias, rtol=1e-5, atol=1e-5)
    assert not np.any(dparams.up_bias) and dparams.up.shape == (E, d, f) and dparams.down.shape == (E, f, d)


# --- what is kept for the backward pass -----------------------------------------------------------


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "ref"])
def test_kept_for_the_backward_pass(implementation):
    """Beside the arguments themselves: the gate and up pre-activations [P, F] and integers, nothing of [P, D]."""
    expert, valid = ROUTINGS["some dropped"]
    params = make_params(dtype=jnp.bfloat16)
    x, weight = normal(7, (T, D), jnp.bfloat16), normal(8, (T, K))

    def kept(x, weight, params):
        f = functools.partial(call, expert=expert, valid=valid, activation="swiglu", implementation=implementation)
        return jax.tree.leaves(jax.vjp(f, x, weight, params)[1])

    leaves = [(a.shape, a.dtype.name) for a in jax.eval_shape(kept, x, weight, params)]
    for given in (x, weight, *params):
        leaves.remove((given.shape, given.dtype.name))
    floats = [leaf for leaf in leaves if "int" not in leaf[1]]
    assert floats == [((T * K, F), "bfloat16")] * 2
    integers = [leaf for leaf in leaves if "int" in leaf[1]]
    assert sorted(integers) == sorted([((T, K), "int32"), ((T * K,), "int32"), ((E,), "int32")])


def test_rows_are_gathered_again_within_one_program():
    """Forward and backward in one jit: the compiler must not merge the two gathers of x, and so keep [P, D]."""
    expert, _ = ROUTINGS["distinct experts"]

    def step(x, weight, params):
        f = functools.partial(call, expert=expert, valid=None, activation="swiglu", implementation="lax")
        y, pull = jax.vjp(f, x, weight, params)
        return pull(jnp.tanh(y))

    program = jax.jit(step, compiler_options=QUICK).lower(normal(7, (T, D)), normal(8, (T, K)), make_params(bias=False))
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* gather\(", program.compile().as_text())
    of_rows = [shape for shape in shapes if np.prod([int(n) for n in shape.split(",")]) == T * K * D]
    assert len(of_rows) == 3, shapes  # x, dy, x again


def test_inference_saves_no_pre_activations():
    made = composed.from_matmul("cpu_tiled")
    saves = []

    def up(*args, save, **kwargs):
        saves.append(save)
        return made.up(*args, save=save, **kwargs)

    run = composed.layer(made._replace(up=up))
    expert, _ = ROUTINGS["distinct experts"]
    args = jax.tree.map(jnp.asarray, (normal(7, (T, D)), expert, normal(8, (T, K)), make_params()))
    jax.eval_shape(lambda *a: run(*a, "swiglu"), *args)
    assert saves == [False]
    jax.eval_shape(lambda x, *a: jax.vjp(lambda x: run(x, *a, "swiglu"), x)[0], *args)
    assert saves == [False, True]


def test_kernels_rows_are_found_by_index_or_by_place(monkeypatch):
    """A kernel may read each token once and write it to its places, and leaves the tail as it is."""
    expert, valid = ROUTINGS["some dropped"]
    x, plan = jnp.asarray(normal(7, (T, D))), make_plan(jnp.asarray(expert), jnp.asarray(valid), E)
    held = int(jnp.sum(plan.group_sizes))
    assert 0 < held < T * K

    def by_places(x, index, count, places):
        assert int(count) == held
        rows = jnp.full((index.shape[0], x.shape[1]), jnp.nan, x.dtype)
        return rows.at[places].set(x[:, None], mode="drop", unique_indices=True)

    by_index = composed.gather_held(x, plan)
    monkeypatch.setattr(composed, "gather_rows", by_places)
    for rows in (by_index, composed.gather_held(x, plan)):
        np.testing.assert_array_equal(rows[:held], x[np.asarray(plan.token_of_row)[:held]])


def test_primitives_may_leave_nan_in_the_tail():
    """A back end specifies valid rows only: whatever it leaves in the tail must reach nothing."""
    made = composed.from_matmul("lax")

    def poisoned(primitive):
        def run(*args, **kwargs):
            sizes = getattr(args[-1], "group_sizes", args[-1])

            def poison(a):
                tail = jnp.arange(a.shape[0]) >= jnp.sum(sizes)
                return jnp.where(tail.reshape(-1, *[1] * (a.ndim - 1)), jnp.nan, a)

            return jax.tree.map(poison, primitive(*args, **kwargs))

        return run

    names = ("gather", "up", "down", "down_backward", "up_input_gradient")
    run = composed.layer(made._replace(**{name: poisoned(getattr(made, name)) for name in names}))
    expert, valid = ROUTINGS["some dropped"]
    x, weight, params, dy = normal(7, (T, D)), normal(8, (T, K)), make_params(), normal(9, (T, D))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(x, weight, params, dy):
        y, pull = jax.vjp(lambda *a: run(a[0], expert, a[1], a[2], "swiglu", valid), x, weight, params)
        return y, *pull(dy)

    expected = oracle(x, weight, params, expert, valid, dy, "swiglu")
    assert_close(gradients(x, weight, params, dy), expected, 1e-5)


# --- plans ----------------------------------------------------------------------------------------


def plan_by_numpy(expert, valid, experts):
    kept = (expert >= 0) & (expert < experts) & (True if valid is None else valid)
    group = np.where(kept, expert, experts).reshape(-1)
    order = np.argsort(group, kind="stable")
    row = np.argsort(order, kind="stable").reshape(expert.shape)
    return order, np.where(kept, row, expert.size), np.bincount(group, minlength=experts + 1)[:experts]


@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "valid_share"),
    [
        (1, 1, 1, None),
        (7, 2, 3, 0.5),
        (50, 1, 4, 0.0),
        (100, 2, 300, 0.9),  # more experts than 8 bits hold, most of them without pairs
        (2800, 3, 256, None),  # with dropped pairs one more than 8 bits hold
        (90, 2, 255, 0.8),
        (1024, 8, 16, 0.7),
    ],
)
def test_plan_equals_numpy(tokens, choices, experts, valid_share):
    rng = np.random.default_rng(tokens)
    # Skewed, with empty experts and some out of range.
    expert = np.floor(experts * rng.random((tokens, choices)) ** 3 * 1.02 - 0.01).astype(np.int32)
    valid = None if valid_share is None else rng.random((tokens, choices)) < valid_share
    plan = jax.jit(functools.partial(make_plan, experts=experts))(expert, valid)
    order, row, sizes = plan_by_numpy(expert, valid, experts)
    np.testing.assert_array_equal(plan.pair_of_row, order)
    np.testing.assert_array_equal(plan.token_of_row, order // choices)
    np.testing.assert_array_equal(plan.row_of_pair, row)
    np.testing.assert_array_equal(plan.group_sizes, sizes)
    assert {a.dtype for a in jax.tree.leaves(plan)} == {np.dtype(np.int32)}


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
def test_experts_of_any_integer_type(implementation, dtype):
    """Also of one in which the number of experts has no place, or -1, which stands for none, has not."""
    experts, x, weight = 300, normal(1, (4, 3)), np.ones((4, 1), np.float32)
    up, down = normal(2, (experts, 3, 3)), normal(3, (experts, 3, 3))
    expert = np.array([[3], [100], [7], [jnp.iinfo(dtype).max]], dtype)
    last_dropped = np.array([[True], [True], [True], [False]])
    for valid in (None, last_dropped):
        run = functools.partial(moe_ffn, activation="relu", valid=valid, implementation=implementation)
        meant = np.where(expert < experts, expert.astype(np.int64), -1).astype(np.int32)
        expected = run(x, meant, weight, None, up, down)
        np.testing.assert_array_equal(run(x, expert, weight, None, up, down), expected)
        assert np.all(np.any(expected[:3], axis=1))
    if dtype == "int64":
        beyond = np.array([[2**32 + 3], [3 - 2**32], [2**31], [-1]])  # none of them is an expert
        assert not np.any(run(x, beyond, weight, None, up, down))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("split", ["tokens", "experts"])
def test_gradients_of_what_shards_share_are_the_sums_over_them(implementation, split):
    """Inside `shard_map`: data parallel with whole weights, and all tokens with each shard's own experts."""
    params = jax.tree.map(lambda a: a[:4], make_params())
    x, weight = normal(7, (16, D)), normal(8, (16, K))
    expert = np.random.default_rng(0).integers(0, 2, (16 if split == "tokens" else 32, K)).astype(np.int32)

    def loss(operands, expert):
        x, weight, p = operands
        biases = {"gate_bias": p.gate_bias, "up_bias": p.up_bias, "down_bias": p.down_bias}
        options = {"activation": "swiglu", "implementation": implementation}
        return jnp.sum(moe_ffn(x, expert, weight, p.gate, p.up, p.down, **biases, **options) ** 2)

    tokens = split == "tokens"
    check_shards(loss, (x, weight, params), expert, (tokens, tokens, jax.tree.map(lambda _: not tokens, params)))


def test_an_unknown_back_end_is_an_error_without_tokens_too():
    p = make_params("relu", bias=False)
    with pytest.raises(ValueError, match="implementation='quick' must name"):
        nothing = np.zeros((0, D), np.float32), np.zeros((0, K), np.int32), np.zeros((0, K), np.float32)
        moe_ffn(*nothing, None, p.up, p.down, activation="relu", implementation="quick")


def test_explanation_needs_shapes_only():
    told = MOE_FFN.explain(*abstract(dtype=jnp.bfloat16))
    assert told.chosen == ("cpu_tiled" if told.platform == "cpu" else told.chosen)
    assert "ref" not in told.refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation='tanh' must be one of"),
        ({"gate": None}, "activation='swiglu' needs gate weights"),
        ({"activation": "relu"}, "has no gate: pass gate=None"),
        ({"activation": "relu", "gate": None, "gate_bias": jnp.ones((2, 4))}, "pass gate_bias=None"),
        ({"up": jnp.ones((3, 4))}, r"up.shape=\(3, 4\) must be \[E, D, F\]"),
        ({"down": jnp.ones((2, 3, 4))}, r"down.shape=\(2, 3, 4\) must be \(2, 4, 3\)"),
        ({"up_bias": jnp.ones((2, 3))}, r"up_bias.shape=\(2, 3\) must be \(2, 4\)"),
        ({"x": jnp.ones((5, 7))}, r"gate.shape=\(2, 3, 4\) must be \(2, 7, 4\) with x.shape=\(5, 7\)"),
        ({"x": jnp.ones((5, 3), jnp.bfloat16)}, "gate.dtype=float32 must equal x.dtype=bfloat16"),
        ({"x": jnp.ones((5, 3), jnp.int32)}, "x has shape .* and dtype int32: it must be floating-point"),
        ({"expert": jnp.ones((5, 2))}, "expert has shape .* and dtype float32: it must hold integers"),
        ({"expert": jnp.ones((4, 2), jnp.int32)}, r"expert has shape \(4, 2\).*\[5, K\]"),
        ({"weight": jnp.ones((5, 3))}, r"weight has shape \(5, 3\).*expert.shape=\(5, 2\)"),
        ({"valid": jnp.ones((5, 2))}, "valid has shape .* and dtype float32: it must hold one bool"),
        ({"implementation": "quick"}, "implementation='quick' must name one or more of"),
    ],
)
def test_errors_name_argument_value_and_rule(change, message):
    arguments = {
        "x": jnp.ones((5, 3)),
        "expert": jnp.zeros((5, 2), jnp.int32),
        "weight": jnp.ones((5, 2)),
        "gate": jnp.ones((2, 3, 4)),
        "up": jnp.ones((2, 3, 4)),
        "down": jnp.ones((2, 4, 3)),
        "activation": "swiglu",
    }
    with pytest.raises(ValueError, match=message):
        moe_ffn(**(arguments | change))
