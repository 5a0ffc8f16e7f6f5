"""The TPU kernels without a TPU: values and gradients in the interpreter, and what they become for the TPU compiler.

The tests of all back ends run them on a TPU. Here tiles are small, so that a few rows and columns make many of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import BackendRefused
from kernels_pallas.grouped_matmul import GROUPED_FFN, GROUPED_MATMUL, grouped_matmul, mosaic_tpu, specs
from tests.kernels_pallas import oracle
from tests.kernels_pallas.backends import (
    TOLERANCE,
    check_ffn,
    check_matmul,
    check_without_columns,
    jitted_ffn,
    jitted_matmul,
    normal,
    poisoned,
)

NAME = "mosaic_tpu"
ALL = 2**31 - 1
# Shapes to lower, the other ones slowly: odd sizes, few rows, and a width of experts that is no power of two.
QUICK = ("odd", "few_rows", "deepseek_v2_lite", "mixtral")
# 2 x 2 tiles of 128 columns, the last ones of 32 and 12; 3 tiles of 16 rows, the last of 6.
SHAPE = specs.Shape("tiles", 4, 160, 140, 38, "test")
# Two groups for each expert, three tiles for extents to cut.
WIDE = specs.Shape("wide", 2, 40, 300, 38, "test")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "LARGEST", 128)
    monkeypatch.setattr(mosaic_tpu, "SMALLEST_ROWS", 16)


@pytest.fixture
def interpret(small_tiles):
    # What other tests traced has other tiles, and is not interpreted.
    jitted_matmul.cache_clear()
    jitted_ffn.cache_clear()
    with mosaic_tpu.interpreted():
        yield
    jitted_matmul.cache_clear()
    jitted_ffn.cache_clear()


@pytest.mark.usefixtures("interpret")
class TestValues:
    # In all of these the gradient of lhs is the product of the other `transpose_rhs` and the other axis of extents.
    # TestVisits has all patterns of eight groups.
    @pytest.mark.parametrize("patterns", [(0, 5, 9, 15), pytest.param(range(16), marks=pytest.mark.slow)])
    def test_empty_groups(self, patterns):
        for pattern in patterns:
            check_matmul(NAME, SHAPE, specs.with_empties(pattern, 4, SHAPE.rows, seed=pattern))

    @pytest.mark.slow
    def test_other_group_sizes_transposed_in_bfloat16(self):
        for sizes in (
            np.array([16, 0, 16, 6], np.int32),  # groups end where tiles do; no tail
            np.array([1, 1, 1, 1], np.int32),
            specs.one_hot(4, SHAPE.rows, 3),
            np.array([20, 0, 60, 60], np.int32),  # cut off at the last row
        ):
            check_matmul(NAME, SHAPE, sizes, dtype="bfloat16", transpose_rhs=True)

    @pytest.mark.parametrize(
        ("axis", "transpose_rhs"),
        [*(pytest.param(*of, marks=pytest.mark.slow) for of in (("k", False), ("n", False))), ("n", True)],
    )
    def test_extents_of_two_groups_for_each_expert(self, axis, transpose_rhs):
        for i, extents in enumerate(((ALL, 64, 129, 0), (0, 0, 192, 1), (ALL, ALL, 128, 64))):
            sizes = specs.with_empties((15, 15, 11)[i], 4, WIDE.rows, seed=i)
            extents = np.array(extents, np.int32)
            check_matmul(NAME, WIDE, sizes, extents=extents, axis=axis, transpose_rhs=transpose_rhs)

    def test_ffn(self):
        sizes, extents = np.array([12, 5, 0, 17], np.int32), np.array([ALL, 64, 192, 0], np.int32)
        check_ffn(NAME, WIDE, sizes, "gelu", bias=True, extents=extents, row_weights="float32")

    def test_arrays_without_columns(self):
        check_without_columns(NAME)

    def test_vmap_over_weights_and_group_sizes(self):
        sizes = np.stack([specs.dirichlet(4, 30), specs.one_hot(4, 21, 2)])
        lhs = np.stack([poisoned(normal(i, (SHAPE.rows, SHAPE.d_model)), sizes[i]) for i in range(2)])
        rhs = normal(2, (2, 4, SHAPE.d_model, SHAPE.d_expert))
        out = jax.jit(jax.vmap(functools.partial(grouped_matmul, implementation=NAME)))(lhs, rhs, sizes)
        for i in range(2):
            expected = oracle.matmul(lhs[i], rhs[i], sizes[i], np.zeros(out.shape[1:]))["out"]
            oracle.check("out", out[i], expected, TOLERANCE["float32"])

    def test_a_gradient_traced_outside_of_the_context_is_interpreted_too(self):
        lhs, rhs, sizes = normal(0, (6, 8)), normal(1, (2, 8, 4)), np.array([2, 4], np.int32)
        _, pull = jax.vjp(lambda rhs: grouped_matmul(lhs, rhs, sizes, implementation=NAME), rhs)
        token = mosaic_tpu._interpret.set(False)
        try:
            (drhs,) = pull(jnp.ones((6, 4)))
        finally:
            mosaic_tpu._interpret.reset(token)
        expected = oracle.matmul(lhs, rhs, sizes, np.ones((6, 4)))["drhs"]
        oracle.check("drhs", drhs, expected, TOLERANCE["float32"])


class TestVisits:
    @pytest.mark.parametrize("every_expert", [False, True])
    def test_they_cover_each_row_once_and_no_tile_without_rows(self, every_expert):
        plan_of = jax.jit(
            functools.partial(
                mosaic_tpu.visits, extents=None, extent_axis="n", rows=70, k=8, n=8, tile=16, experts=4,
                every_expert=every_expert,
            )
        )  # fmt: skip
        for pattern in range(256):
            sizes = specs.with_empties(pattern, 8, 70, seed=pattern)
            plan, count = jax.device_get(plan_of(sizes))
            owner = np.repeat(np.arange(8), sizes)
            covered, seen = np.full(owner.size, -1), set()
            for v in range(count):
                group, tile = plan.group[v], plan.tile[v]
                rows = np.arange(max(tile * 16, plan.start[group]), min(tile * 16 + 16, plan.end[group]))
                assert rows.size or every_expert or not sizes.any()
                assert (covered[rows] == -1).all()
                covered[rows] = group
                expert = group // 2
                assert plan.first[v] == (expert not in seen)
                seen.add(expert)
                assert plan.last[v] == (v == count - 1 or plan.group[v + 1] // 2 != expert)
                # The result's tile must stay in place between its visits.
                assert v == 0 or every_expert or tile >= plan.tile[v - 1]
            np.testing.assert_array_equal(covered, owner)
            assert seen == set(range(4)) or not every_expert

    def test_tiles(self):
        assert [mosaic_tpu.tile_size(size) for size in (24, 512, 768, 1024, 4096)] == [24, 512, 384, 512, 512]
        assert [mosaic_tpu.row_tile(*of) for of in ((16384, 8), (65536, 128), (512, 64), (37, 5))] == [512, 256, 64, 37]


def tpu(kind):
    """The context in which functions are lowered for a TPU that is not there."""
    device = jax.sharding.AbstractDevice(device_kind=kind, platform="tpu", num_cores=1)
    return functools.partial(jax.sharding.AbstractMesh, abstract_device=device)


def lowered(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


def value_and_gradients(lhs, rhs, sizes, dy, extents=None, **options):
    out, pull = jax.vjp(
        lambda lhs, rhs: mosaic_tpu.grouped_matmul(lhs, rhs, sizes, extents=extents, **options), lhs, rhs
    )
    return out, *pull(dy)


class TestLowering:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            *((name, "TPU v5 lite") for name in QUICK),
            ("deepseek_v2_lite", "TPU v6 lite"),
            *(pytest.param(n, "TPU v5 lite", marks=pytest.mark.slow) for n in specs.SHAPES if n not in QUICK),
            pytest.param("odd", "TPU v6 lite", marks=pytest.mark.slow),
        ],
    )
    def test_forward_and_both_gradients(self, name, kind):
        shape = specs.SHAPES[name]
        e, k, n, p = shape.experts, shape.d_model, shape.d_expert, shape.rows
        dtype = jnp.bfloat16 if shape.kind == "gpu" else jnp.float32
        sizes = jax.ShapeDtypeStruct((e,), jnp.int32)
        lhs, dy = jax.ShapeDtypeStruct((p, k), dtype), jax.ShapeDtypeStruct((p, n), dtype)
        with jax.sharding.use_abstract_mesh(tpu(kind)((), ())):
            for transpose_rhs in (False, True):
                rhs = jax.ShapeDtypeStruct((e, n, k) if transpose_rhs else (e, k, n), dtype)
                function = functools.partial(value_and_gradients, transpose_rhs=transpose_rhs)
                assert lowered(function, lhs, rhs, sizes, dy).count("tpu_custom_call") == 3

    @pytest.mark.parametrize("axis", ["n", "k"])
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    def test_extents(self, axis, dtype):
        sizes = jax.ShapeDtypeStruct((16,), jnp.int32)
        lhs, dy = jax.ShapeDtypeStruct((4096, 2880), dtype), jax.ShapeDtypeStruct((4096, 1408), dtype)
        rhs = jax.ShapeDtypeStruct((8, 2880, 1408), dtype)
        with jax.sharding.use_abstract_mesh(tpu("TPU v5 lite")((), ())):
            function = functools.partial(value_and_gradients, extent_axis=axis)
            assert lowered(function, lhs, rhs, sizes, dy, sizes).count("tpu_custom_call") == 3

    def test_inside_shard_map_with_shared_weights(self):
        mesh = tpu("TPU v5 lite")((2,), ("d",), axis_types=(AxisType.Auto,))
        over, whole = PartitionSpec("d"), PartitionSpec()

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(over, whole, over, over), out_specs=(over, over, whole))
        def run(lhs, rhs, sizes, dy):
            rhs = jax.lax.pcast(rhs, "d", to="varying")
            out, dlhs, drhs = value_and_gradients(lhs, rhs, sizes[0], dy)
            return out, dlhs, jax.lax.psum(drhs, "d")

        lhs, dy = jax.ShapeDtypeStruct((200, 300), jnp.bfloat16), jax.ShapeDtypeStruct((200, 260), jnp.bfloat16)
        rhs, sizes = jax.ShapeDtypeStruct((4, 300, 260), jnp.bfloat16), jax.ShapeDtypeStruct((2, 4), jnp.int32)
        with jax.sharding.use_abstract_mesh(mesh):
            assert lowered(run, lhs, rhs, sizes, dy).count("tpu_custom_call") == 3


class TestRefusals:
    ARGUMENTS = (jnp.ones((4, 8)), jnp.ones((2, 8, 4)), jnp.array([2, 2]))

    @pytest.mark.skipif(jax.default_backend() == "tpu", reason="there it runs")
    def test_off_tpu(self):
        with pytest.raises(BackendRefused, match="mosaic_tpu: needs a TPU and the platform is"):
            grouped_matmul(*self.ARGUMENTS, implementation=NAME)
        shape = specs.SHAPES["tiny"]
        refusals = GROUPED_FFN.explain(*shape.abstract(jnp.float32), "swiglu").refusals
        assert "needs a TPU" in refusals[NAME]

    def test_dtypes(self):
        lhs, rhs, sizes = self.ARGUMENTS
        with mosaic_tpu.interpreted():
            with pytest.raises(BackendRefused, match="dtype float16 is not one of bfloat16, float32"):
                grouped_matmul(lhs.astype("float16"), rhs.astype("float16"), sizes, implementation=NAME)
            with pytest.raises(BackendRefused, match="preferred_element_type float16 is not one of"):
                grouped_matmul(lhs, rhs, sizes, implementation=NAME, preferred_element_type=jnp.float16)

    def test_order_on_a_tpu(self):
        for operation in (GROUPED_MATMUL, GROUPED_FFN):
            assert operation.names(None, "tpu") == (NAME, "padded", "ref")
