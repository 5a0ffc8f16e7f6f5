"""Row gathers: the Hopper kernel under Pallas' interpreter and lowered for CUDA, what surrounds it, its benchmark."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import dispatch
from kernels_pallas.gather_rows import (
    COMBINE_ROWS,
    GATHER_ROWS,
    bench,
    combine_rows,
    gather_rows,
    mosaic_gpu,
    mosaic_gpu_combine,
    mosaic_gpu_scatter,
)
from kernels_pallas.gather_rows.mosaic_gpu import Config
from kernels_pallas.grouped_matmul.mosaic_gpu import backend, block
from moejax.dispatch import exchange
from moejax.dispatch import rows as moejax_rows
from moejax.types import DispatchPlan

LOWEST, HIGHEST = -(2**31), 2**31 - 1


@contextlib.contextmanager
def hopper(cores):
    """Traced as for a Hopper GPU of so many multiprocessors."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=cores)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


@pytest.fixture
def on_hopper(monkeypatch):
    """`implementation=None` picks as it would on a Hopper GPU."""
    monkeypatch.setattr(backend, "_hopper", lambda: None)
    monkeypatch.setattr(dispatch, "default_platform", lambda: "gpu")


def expected(x, index):
    """NumPy's rows, and zeros where NumPy would raise."""
    size = len(x)
    out = np.zeros((len(index), x.shape[1]), x.dtype)
    for row, source in enumerate(index.tolist()):
        if -size <= source < size:
            out[row] = x[source]
    return out


def summed(ys, rows, weight):
    """The sum that combine makes, in float64."""
    wide = [expected(ys, rows[:, k]).astype(np.float64) for k in range(rows.shape[1])]
    return sum(weight[:, k, None] * wide[k] for k in range(rows.shape[1]))


def table(size, count, seed=0):
    """Repeated rows, rows never chosen, and all that is out of bounds."""
    index = np.random.default_rng(seed).integers(-size, size, count)
    special = [size, -size - 1, LOWEST, HIGHEST, -1, 0, size - 1, -size, size + 1]
    index[: len(special)] = special[:count]
    return np.random.default_rng(seed + 1).permutation(index).astype(np.int32)


def normal(size, columns, dtype=jnp.float32):
    return np.random.default_rng(2).standard_normal((size, columns), np.float32).astype(dtype)


# --- the kernel, interpreted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "columns", "count", "config"),
    [
        # 8 stages of 2 rows, the last one of 1 row, over 2 blocks; two parts of a row.
        (jnp.float32, 512, 15, Config(rows=2, stages=3, blocks=1)),
        # Two stores in flight; parts of 240; one block has a stage less than the other.
        pytest.param(jnp.bfloat16, 960, 13, Config(rows=3, stages=4, stores=2, blocks=1), marks=pytest.mark.slow),
        # Fewer rows than a stage, and three blocks that have none.
        pytest.param(jnp.float16, 256, 3, Config(rows=4, stages=2, blocks=2), marks=pytest.mark.slow),
    ],
)
def test_copies_rows_bit_by_bit_without_a_race_and_zeros_where_there_is_none(dtype, columns, count, config):
    x, index = normal(10, columns, dtype), table(10, count)
    with hopper(2), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out = jax.block_until_ready(mosaic_gpu.gather_rows(jnp.asarray(x), jnp.asarray(index), config=config))
        assert not gpu_callbacks.get_races().races_found
    assert out.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(out), expected(x, index))


@pytest.mark.parametrize("count", [0, 7, pytest.param(15, marks=pytest.mark.slow), 1 << 30])
def test_copies_no_more_stages_than_are_asked_for(count):
    """The interpreter fills memory that nobody has written with NaN."""
    x, index = normal(10, 256), table(10, 15)
    wanted = min(count, 15)
    with hopper(2), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        arguments = jnp.asarray(x), jnp.asarray(index), jnp.int32(count)
        out = mosaic_gpu.gather_rows(*arguments, config=Config(rows=2, stages=3, blocks=1))
    np.testing.assert_array_equal(np.asarray(out)[:wanted], expected(x, index)[:wanted])
    assert np.isnan(np.asarray(out)[wanted + wanted % 2 :]).all()


@pytest.mark.slow
def test_the_race_detector_sees_a_stage_filled_while_it_is_written_out(monkeypatch):
    wait = plgpu.wait_smem_to_gmem
    monkeypatch.setattr(plgpu, "wait_smem_to_gmem", lambda n, **options: wait(n + 1 if n else 0, **options))
    x, index = normal(4, 64), table(4, 12)
    with hopper(1), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        jax.block_until_ready(mosaic_gpu.gather_rows(jnp.asarray(x), jnp.asarray(index), config=Config(1, 2, blocks=1)))
        assert gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    ("dtype", "near", "columns", "choices", "config"),
    [
        # Five tokens over two blocks: one fills its ring of two stages again.
        (jnp.bfloat16, 2**-8, 512, 2, Config(rows=2, stages=2, blocks=2)),  # one rounding of the sum
        pytest.param(jnp.float32, 1e-5, 256, 3, Config(rows=3, stages=3, blocks=4), marks=pytest.mark.slow),
    ],
)
def test_sums_each_tokens_rows_without_a_race(dtype, near, columns, choices, config):
    """NaN in rows that nobody names reaches nothing."""
    ys, rows = normal(16, columns, dtype), table(16, 5 * choices).reshape(5, choices)
    ys[~np.isin(np.arange(16), rows % 16)] = np.nan
    weight = np.random.default_rng(3).random((5, choices), np.float32)
    with hopper(1), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        arguments = jnp.asarray(ys), jnp.asarray(rows), jnp.asarray(weight)
        out = jax.block_until_ready(mosaic_gpu_combine.combine_rows(*arguments, config=config))
        assert not gpu_callbacks.get_races().races_found
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), summed(ys, rows, weight), rtol=near, atol=1e-5)


def places_of(tokens, choices, kept=0.75, seed=0):
    """Places of some pairs in any order, without a gap; the others are out of bounds, in all ways there are."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(tokens * choices)
    held = pairs[: round(kept * len(pairs))]
    places = rng.choice([tokens * choices, tokens * choices + 5, -tokens * choices - 1, LOWEST, HIGHEST], len(pairs))
    places[held] = np.arange(len(held))
    index = np.full(len(pairs), tokens)
    index[: len(held)] = held // choices
    return places.reshape(tokens, choices).astype(np.int32), index.astype(np.int32), len(held)


@pytest.mark.parametrize(
    ("tokens", "choices", "columns", "dtype", "config"),
    [
        # Five stages of two tokens, the last one of one, over two blocks.
        (9, 2, 256, jnp.bfloat16, Config(rows=2, stages=3, blocks=1)),
        pytest.param(13, 4, 512, jnp.float32, Config(rows=2, stages=4, stores=2, blocks=2), marks=pytest.mark.slow),
        # Fewer tokens than two stages, and blocks that have none.
        pytest.param(5, 3, 256, jnp.float32, Config(rows=4, stages=3, blocks=2), marks=pytest.mark.slow),
    ],
)
def test_writes_each_row_to_its_places_without_a_race_and_nothing_else(tokens, choices, columns, dtype, config):
    x, (places, index, count) = normal(tokens, columns, dtype), places_of(tokens, choices)
    with hopper(2), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        arguments = jnp.asarray(x), jnp.asarray(places), len(index)
        out = np.asarray(jax.block_until_ready(mosaic_gpu_scatter.scatter_rows(*arguments, config=config)))
        assert not gpu_callbacks.get_races().races_found
    np.testing.assert_array_equal(out[:count], expected(x, index)[:count])
    assert np.isnan(out[count:].astype(np.float32)).all()


@pytest.mark.parametrize("too_soon", [False, True])
def test_a_stage_is_filled_again_when_its_rows_have_left(monkeypatch, too_soon):
    """A block's 21 steps go seven times round a ring of three; with one copy more in flight it is a race."""
    wait = plgpu.wait_smem_to_gmem
    monkeypatch.setattr(plgpu, "wait_smem_to_gmem", lambda n, **options: wait(n + too_soon if n else 0, **options))
    x, (places, index, _) = normal(21, 256), places_of(21, 1, kept=1.0)
    with hopper(1), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        arguments = jnp.asarray(x), jnp.asarray(places), len(index)
        config = Config(rows=1, stages=3, blocks=1)
        out = jax.block_until_ready(mosaic_gpu_scatter.scatter_rows(*arguments, config=config))
        assert gpu_callbacks.get_races().races_found == too_soon
    if not too_soon:
        np.testing.assert_array_equal(np.asarray(out), expected(x, index))


def test_a_gradient_by_places_inside_shard_map(monkeypatch):
    """Tokens that all shards have, and places of each shard's own."""
    monkeypatch.setattr(block, "multiprocessors", lambda: 4)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def run(x, index, places):
        def loss(x):
            return jnp.sum(mosaic_gpu_scatter.gather_rows(x, index, jnp.int32(16), places) ** 2)

        return jax.grad(loss)(x)

    whole, mine = PartitionSpec(), PartitionSpec("data")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(whole, mine, mine), out_specs=whole)
    arguments = ((8, 128), jnp.float32), ((32,), jnp.int32), ((16, 2), jnp.int32)
    made = jax.eval_shape(sharded, *(jax.ShapeDtypeStruct(*argument) for argument in arguments))
    assert made.shape == (8, 128)


def test_numpy_arrays_are_taken():
    x, index = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([3, 0, 9])
    np.testing.assert_array_equal(gather_rows(x, index), [x[3], x[0], 0 * x[0]])
    made = combine_rows(x, np.array([[3, 1]]), np.array([[2.0, 1.0]], np.float32))
    np.testing.assert_array_equal(made, [2 * x[3] + x[1]])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
def test_indices_of_any_integer_type(dtype):
    """Also of one in which the number of rows has no place, or that holds more than int32 does."""
    x, most = np.arange(300, dtype=np.float32)[:, None] + 1, jnp.iinfo(dtype).max
    index = np.array([0, most, 2**32 + 1 if dtype == "int64" else 100], dtype)
    wanted = np.where(index < 300, index.astype(np.int64) + 1, 0)
    np.testing.assert_array_equal(gather_rows(x, index)[:, 0], wanted)
    np.testing.assert_array_equal(combine_rows(x, index[:, None], np.ones((3, 1), np.float32))[:, 0], wanted)


# --- the kernels on a device (`-m gpu`) -------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "count", "columns", "dtype"),
    [
        (10, 3, 256, "float32"),
        (2, 4099, 64, "bfloat16"),
        (1000, 4097, 2048, "bfloat16"),
        (77, 5001, 2880, "bfloat16"),
        (300, 1003, 7168, "float32"),
        (50, 70, 16384, "float16"),
    ],
)
def test_on_a_device_it_copies_bit_by_bit(size, count, columns, dtype):
    x, index = normal(size, columns, jnp.dtype(dtype)), table(size, count)
    wanted = expected(x, index)
    run = jax.jit(lambda x, index: gather_rows(x, index, implementation="mosaic_gpu"))
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(run(x, index)), wanted)
    batch = jax.jit(jax.vmap(run, in_axes=(0, None)))(np.stack([x, -x]), index)
    np.testing.assert_array_equal(np.asarray(batch), np.stack([wanted, -wanted + 0]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "choices", "columns", "dtype"),
    [(3, 1, 256, "float32"), (4097, 8, 2048, "bfloat16"), (1001, 2, 4096, "float16"), (77, 16, 7168, "float32")],
)
def test_on_a_device_it_writes_each_row_to_its_places(tokens, choices, columns, dtype):
    x, (places, index, count) = normal(tokens, columns, jnp.dtype(dtype)), places_of(tokens, choices)
    run = jax.jit(lambda x, places: mosaic_gpu_scatter.scatter_rows(x, places, len(index)))
    wanted = expected(x, index)[:count]
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(run(x, places))[:count], wanted)
    batch = np.asarray(jax.jit(jax.vmap(run, in_axes=(0, None)))(np.stack([x, -x]), places))[:, :count]
    np.testing.assert_array_equal(batch, np.stack([wanted, -wanted]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "choices", "columns", "dtype", "near"),
    [
        (1, 1, 256, "float32", 1e-5),
        (4097, 8, 2048, "bfloat16", 2**-8),
        (1001, 2, 4096, "float16", 2**-10),
        (500, 6, 7168, "bfloat16", 2**-8),
        (333, 4, 2816, "float32", 1e-5),
    ],
)
def test_on_a_device_it_sums_each_tokens_rows(tokens, choices, columns, dtype, near):
    size = tokens * choices + 3
    ys, rows = normal(size, columns, jnp.dtype(dtype)), table(size, tokens * choices).reshape(tokens, choices)
    ys[~np.isin(np.arange(size), rows % size)] = np.nan
    weight = np.random.default_rng(3).random((tokens, choices), np.float32)
    run = jax.jit(lambda *args: combine_rows(*args, implementation="mosaic_gpu"))
    for _ in range(3):
        out = np.asarray(run(ys, rows, weight), np.float32)
        np.testing.assert_allclose(out, summed(ys, rows, weight), rtol=near, atol=1e-5 * choices)


# --- what surrounds the kernel ----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Shapes with which the kernel is called; XLA's gather answers in its place."""
    seen = []

    def call(x, index, leading, config):
        seen.append((x.shape, index.shape))
        return GATHER_ROWS.backends["ref"].run(x, index)

    def call_combine(ys, rows, weight, config):
        seen.append((ys.shape, rows.shape))
        return COMBINE_ROWS.backends["ref"].run(ys, rows, weight)

    monkeypatch.setattr(mosaic_gpu, "_call", call)
    monkeypatch.setattr(mosaic_gpu_combine, "_call", call_combine)
    return seen


def test_gradient_is_a_scatter_add(calls):
    x, index, dy = normal(10, 64), table(10, 40), normal(40, 64)

    @jax.jit
    def both(x, index, dy):
        out, pull = jax.vjp(lambda x: mosaic_gpu.gather_rows(x, index), x)
        return out, *pull(dy)

    out, dx = both(x, index, dy)
    np.testing.assert_array_equal(np.asarray(out), expected(x, index))
    scattered = np.zeros_like(x)
    for row, source in enumerate(index.tolist()):
        if -10 <= source < 10:
            scattered[source] += dy[row]
    np.testing.assert_allclose(np.asarray(dx), scattered, rtol=1e-5, atol=1e-5)
    assert calls == [((10, 64), (40,))]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("gather", [gather_rows, mosaic_gpu.gather_rows], ids=["ref", "mosaic_gpu"])
def test_a_gradient_of_many_equal_rows_is_rounded_once(calls, gather, dtype):
    index = np.random.default_rng(4).permutation(np.repeat([2, 5, 9, 10], 64)).astype(np.int32)
    x, dy = normal(10, 64, dtype), (1 + normal(256, 64)).astype(dtype)
    (dx,) = jax.jit(lambda x, index, dy: jax.vjp(lambda x: gather(x, index), x)[1](dy))(x, index, dy)
    scattered = np.zeros(x.shape, np.float64)
    np.add.at(scattered, index[index < len(x)], dy[index < len(x)].astype(np.float64))
    assert dx.dtype == dtype
    # Half a unit in the last place, and what float32 adds where that is nearly so.
    np.testing.assert_allclose(np.asarray(dx, np.float64), scattered, rtol=jnp.finfo(dtype).eps * 0.51, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("combine", [combine_rows, mosaic_gpu_combine.combine_rows], ids=["ref", "mosaic_gpu"])
def test_a_combines_gradient_is_rounded_once(calls, combine, dtype):
    """Each row is named in every of the K columns, and many times."""
    rng = np.random.default_rng(4)
    rows = np.stack([rng.permutation(np.repeat([2, 5, 9, 10], 8)) for _ in range(8)], axis=1).astype(np.int32)
    ys, dy, weight = normal(10, 256, dtype), (1 + normal(32, 256)).astype(dtype), rng.random((32, 8), np.float32)

    @jax.jit
    def gradients(ys, rows, weight, dy):
        return jax.vjp(lambda ys, weight: combine(ys, rows, weight), ys, weight)[1](dy)

    dys, dweight = gradients(ys, rows, weight, dy)
    wide, parts = np.zeros((11, 256)), weight[..., None] * dy[:, None].astype(np.float64)
    np.add.at(wide, rows, parts)  # row 10 is out of bounds
    assert dys.dtype == dtype and dweight.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(dys, np.float64), wide[:10], rtol=jnp.finfo(dtype).eps * 0.51, atol=1e-4)
    products = [np.sum(expected(ys, rows[:, k]).astype(np.float64) * dy.astype(np.float64), axis=1) for k in range(8)]
    np.testing.assert_allclose(np.asarray(dweight), np.stack(products, axis=1), rtol=1e-5, atol=1e-4)


def test_xlas_gather_is_differentiable_forwards_too():
    x, index = jnp.asarray(normal(10, 64)), jnp.asarray(table(10, 40))
    out, tangent = jax.jvp(lambda x: gather_rows(x, index), (x,), (2 * x,))
    np.testing.assert_array_equal(tangent, 2 * out)


def test_what_is_not_asked_for_has_no_part_in_the_gradient(calls):
    x, index, dy = normal(10, 64), table(10, 40), normal(40, 64)
    dy[25:] = np.nan
    _, pull = jax.vjp(lambda x: mosaic_gpu.gather_rows(x, jnp.asarray(index), jnp.int32(25)), jnp.asarray(x))
    _, pull_25 = jax.vjp(lambda x: mosaic_gpu.gather_rows(x, jnp.asarray(index[:25])), jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(pull(jnp.asarray(dy))[0]), np.asarray(pull_25(jnp.asarray(dy[:25]))[0]))
    assert calls[0] == ((10, 64), (40,))


def test_a_count_that_is_no_integer_is_refused():
    x, index = jnp.zeros((4, 64)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="must be one integer, or None"):
        gather_rows(x, index, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="must be one integer, or None"):
        gather_rows(x, index, jnp.float32(2))


@pytest.mark.parametrize(("of_x", "of_index"), [(0, 0), (0, None), (None, 0)])
def test_a_batch_is_one_gather(calls, of_x, of_index):
    xs = np.stack([normal(10, 64), -normal(10, 64)])
    tables = np.stack([table(10, 40, seed) for seed in (0, 5)])
    arguments = xs if of_x == 0 else xs[0], tables if of_index == 0 else tables[0]
    out = jax.vmap(mosaic_gpu.gather_rows, in_axes=(of_x, of_index))(*map(jnp.asarray, arguments))
    for i in range(2):
        np.testing.assert_array_equal(
            np.asarray(out[i]), expected(xs[i if of_x == 0 else 0], tables[i if of_index == 0 else 0])
        )
    # Before, it is traced for one of the batch, which leaves nothing behind.
    assert calls == [((10, 64), (40,)), ((20 if of_x == 0 else 10, 64), (80,))]


@pytest.mark.parametrize("batched", [(0, 0, 0), pytest.param((None, 0, None), marks=pytest.mark.slow)])
def test_a_batch_is_one_combine_and_its_gradients_are_those_of_xla(calls, batched):
    ys, rows = np.stack([normal(10, 256), -normal(10, 256)]), np.stack([table(10, 12, i).reshape(6, 2) for i in (0, 5)])
    weight, dy = np.random.default_rng(3).random((2, 6, 2), np.float32), normal(12, 256).reshape(2, 6, 256)
    ys, rows, weight = (a if at == 0 else a[0] for a, at in zip((ys, rows, weight), batched, strict=True))

    def both(combine):
        @jax.jit
        def run(ys, rows, weight, dy):
            many = jax.vmap(combine, in_axes=batched)
            out, pull = jax.vjp(lambda ys, weight: many(ys, rows, weight), ys, weight)
            return out, *pull(dy)

        return run(ys, rows, weight, dy)

    for a, b in zip(both(mosaic_gpu_combine.combine_rows), both(combine_rows), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)
    assert calls == [((10, 256), (6, 2)), ((20 if batched[0] == 0 else 10, 256), (12, 2))]


SHAPES = [(2, 1, 256, "bfloat16"), (8192, 65533, 2048, "bfloat16"), (4096, 1000, 2880, "bfloat16")]
SLOW = [(16384, 32768, 4096, "bfloat16"), (64, 64, 7168, "float32"), (64, 50, 64, "bfloat16"), (9, 9, 5120, "float16")]


@pytest.mark.parametrize(
    ("size", "count", "columns", "dtype"), [*SHAPES, *(pytest.param(*s, marks=pytest.mark.slow) for s in SLOW)]
)
def test_lowers_for_cuda(on_hopper, size, count, columns, dtype):
    x, index = jax.ShapeDtypeStruct((size, columns), dtype), jax.ShapeDtypeStruct((count,), jnp.int32)
    with hopper(132):
        text = jax.jit(gather_rows).trace(x, index).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("tokens", "choices", "columns"),
    [
        (8191, 8, 2048),
        pytest.param(16384, 2, 4096, marks=pytest.mark.slow),
        pytest.param(300, 6, 2816, marks=pytest.mark.slow),
        pytest.param(9, 4, 7168, marks=pytest.mark.slow),
    ],
)
def test_combine_lowers_for_cuda(on_hopper, tokens, choices, columns):
    ys, rows = jax.ShapeDtypeStruct((9000, columns), jnp.bfloat16), jax.ShapeDtypeStruct((tokens, choices), jnp.int32)
    weight = jax.ShapeDtypeStruct((tokens, choices), jnp.float32)
    with hopper(132):
        text = jax.jit(combine_rows).trace(ys, rows, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


def test_lowers_inside_shard_map_with_its_gradient(on_hopper, monkeypatch):
    """Rows that all devices share, chosen by each device's own table; and XLA's gather where axes are not manual."""
    monkeypatch.setattr(block, "multiprocessors", lambda: 132)

    def run(x, index):
        y, pull = jax.vjp(lambda x: gather_rows(x, index), x)
        return y, *pull(y)

    data, whole = PartitionSpec("data"), PartitionSpec()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(whole, data), out_specs=(data, whole))
    arguments = jax.ShapeDtypeStruct((16, 128), jnp.bfloat16), jax.ShapeDtypeStruct((64,), jnp.int32)
    text = jax.jit(sharded).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    with jax.set_mesh(mesh):
        assert "inside shard_map" in GATHER_ROWS.explain(*arguments).refusals["mosaic_gpu"]


@pytest.mark.parametrize(
    ("size", "columns", "count", "dtype", "index", "reason"),
    [
        (8, 64, 8, "bfloat16", "int32", None),
        (8, 64, 8, "int32", "int32", "not int32"),
        (8, 64, 8, "bfloat16", "int8", "index must be int32"),
        (8, 96, 8, "bfloat16", "int32", "192 bytes, which must be a multiple of 128"),
        (8, 16448, 8, "bfloat16", "int32", "too wide"),
        (1, 64, 8, "bfloat16", "int32", "at least two rows"),
        (8, 64, 0, "bfloat16", "int32", "at least two rows"),
        (8, 2048, 1 << 20, "bfloat16", "int32", "in parts"),
    ],
)
def test_refusals(on_hopper, size, columns, count, dtype, index, reason):
    shapes = jax.ShapeDtypeStruct((size, columns), dtype), jax.ShapeDtypeStruct((count,), index)
    told = GATHER_ROWS.explain(*shapes)
    assert told.chosen == ("mosaic_gpu" if reason is None else "ref")
    assert reason is None or reason in told.refusals["mosaic_gpu"]


@pytest.mark.parametrize(
    ("columns", "choices", "reason"),
    [
        (2048, 8, None),
        (2880, 4, "D=2880 must be a multiple of 256"),
        (2048, 17, "at most 16"),
        (7168, 8, "do not fit twice"),
        (96, 2, "multiple of 128"),
    ],
)
def test_refusals_of_combine(on_hopper, columns, choices, reason):
    ys, table = jax.ShapeDtypeStruct((8, columns), "bfloat16"), jax.ShapeDtypeStruct((8, choices), "int32")
    told = COMBINE_ROWS.explain(ys, table, jax.ShapeDtypeStruct((8, choices), "float32"))
    assert told.chosen == ("mosaic_gpu" if reason is None else "ref")
    assert reason is None or reason in told.refusals["mosaic_gpu"]


def test_default_configurations_fit_every_width():
    for columns in range(64, 16385, 64):
        shapes = jax.ShapeDtypeStruct((8, columns), "bfloat16"), jax.ShapeDtypeStruct((8,), "int32")
        assert mosaic_gpu.refuse_shapes(*shapes) is None
        assert mosaic_gpu.default_config(2 * columns).refuse(2 * columns) is None
    config = Config(8, 8)
    with pytest.raises(ValueError, match="stages must be 2 to 3"):
        mosaic_gpu_combine.combine_rows(
            jnp.zeros((8, 2048), jnp.bfloat16), jnp.zeros((8, 8), jnp.int32), jnp.zeros((8, 8)), config=config
        )
    with pytest.raises(ValueError, match="shared memory"):
        mosaic_gpu.gather_rows(jnp.zeros((8, 2048)), jnp.zeros(8, jnp.int32), config=config)


def test_on_other_platforms_it_is_xlas_gather():
    x, index = normal(10, 24), table(10, 40)
    np.testing.assert_array_equal(np.asarray(gather_rows(jnp.asarray(x), jnp.asarray(index))), expected(x, index))
    assert gather_rows(jnp.zeros((3, 5)), jnp.zeros(0, jnp.int32)).shape == (0, 5)
    none, dnone = jax.vjp(lambda x: gather_rows(x, jnp.arange(4)), jnp.ones((0, 5), jnp.bfloat16))
    assert (none.shape, none.dtype, np.any(none)) == ((4, 5), jnp.bfloat16, False)
    assert dnone(none)[0].shape == (0, 5)
    assert not np.any(combine_rows(jnp.ones((0, 5)), jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2))))
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        gather_rows(jnp.zeros(3), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        combine_rows(jnp.zeros((3, 4)), jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 3)))
    with pytest.raises(dispatch.BackendRefused, match="needs a Hopper GPU"):
        gather_rows(jnp.zeros((3, 5)), jnp.zeros(3, jnp.int32), implementation="mosaic_gpu")


# --- where moejax uses it ---------------------------------------------------------------------------------


def test_dispatch_and_the_order_of_received_rows_use_it_with_their_own_gradients(on_hopper, calls):
    """Backward passes stay gathers; sums over a token's rows stay one fused pass of XLA."""
    tokens, pairs, columns = 6, 12, 64
    order = np.random.default_rng(0).permutation(pairs).astype(np.int32)
    row_of_pair = np.argsort(order).astype(np.int32).reshape(tokens, 2)
    plan = DispatchPlan(
        token_of_row=jnp.asarray(np.append(order // 2, [tokens] * 3).astype(np.int32)),  # three rows of padding
        row_of_pair=jnp.asarray(row_of_pair),
        pair_of_row=jnp.asarray(np.append(order, [pairs] * 3).astype(np.int32)),
        group_sizes=jnp.array([pairs], jnp.int32),
        token=None,
        overflow=jnp.int32(0),
    )
    x = normal(tokens, columns)
    dys, back = normal(pairs + 3, columns), np.argsort(order).astype(np.int32)

    @jax.jit
    def run(x, dys, plan, order, back):
        ys, pull = jax.vjp(lambda x: moejax_rows.dispatch(x, plan), x)
        out, put_back = jax.vjp(lambda rows: exchange.permuted(rows, order, back), dys[:pairs])
        return ys, *pull(dys), out, *put_back(out)

    ys, dx, out, same = map(np.asarray, run(x, dys, plan, order, back))
    np.testing.assert_array_equal(ys, expected(x, np.asarray(plan.token_of_row)))
    np.testing.assert_allclose(dx, dys[row_of_pair].sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(out, dys[order])
    np.testing.assert_array_equal(same, dys[:pairs])
    assert calls == [((tokens, columns), (pairs + 3,)), *[((pairs, columns), (pairs,))] * 2]


# --- the benchmark ----------------------------------------------------------------------------------------


def test_benchmark_gives_rows_and_says_what_refuses(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    quick = ["--repeats", "2", "--target-ms", "0.1", "--output", str(output)]
    assert bench.main(["--shape", "test_unpack", "--padding", "0.25", *quick]) == 0  # combine is left out
    found = [json.loads(line) for line in output.read_text().splitlines()]
    for operation, written in (("gather_rows", 96), ("scatter_rows", 72)):
        rows = {row["implementation"]: row for row in found if row["operation"] == operation}
        assert list(rows) == ["copy", "xla", "mosaic_gpu"]
        assert "needs a Hopper GPU" in rows["mosaic_gpu"]["refused"]
        xla = rows["xla"]
        assert (xla["rows"], xla["d_model"], xla["padding"]) == (96, 64, 0.25)
        assert xla["gb_per_s"] == pytest.approx((72 + written) * 64 * 2 / (1e-3 * xla["median_ms"]) / 1e9)
    assert bench.main(["--summary", str(output)]) == 0
    assert capsys.readouterr().out.count("test_unpack") == 12


def test_benchmark_times_each_configuration_that_is_right(tmp_path, monkeypatch, on_hopper, calls):
    """All of the kernel's way but the kernel, for which XLA answers, for some configurations wrongly."""
    right = mosaic_gpu._call

    def call(x, index, leading, config):
        rows = right(x, index, leading, config)
        return rows.at[7].add(1) if config.rows == 4 else rows

    monkeypatch.setattr(mosaic_gpu, "_call", call)
    output = tmp_path / "rows.jsonl"
    quick = ["--repeats", "1", "--target-ms", "0.1", "--stores", "1", "--blocks", "1", "--output", str(output)]
    assert bench.main(["--operation", "gather", "--shape", "test", "--rows", "2", "4", *quick]) == 1
    rows = {row["implementation"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert list(rows) == ["copy", "xla", "mosaic_gpu", "mosaic_gpu r2 s16 o1 b1", "mosaic_gpu r4 s16 o1 b1"]
    assert rows["mosaic_gpu"]["ratio_to_best_rival"] > 0
    assert rows["mosaic_gpu"]["config_rows"] == 8
    wrong = rows["mosaic_gpu r4 s16 o1 b1"]
    assert "1 of 192 rows are wrong, the first one is row 7" in wrong["error"]
    assert "median_ms" not in wrong


def test_benchmark_sums_are_checked_row_by_row():
    wanted = normal(96, 8)
    wanted[7] = 0
    problem = bench.Problem("combine", (), wanted, jnp.dtype("bfloat16"), (0, 0), 0)
    right = wanted.astype(jnp.bfloat16)
    bench.check(problem, right)
    for row, change in ((5, 1), (5, np.nan), (7, 1e-6)):
        broken = right.copy()
        broken[row, 3] += change
        with pytest.raises(bench.WrongResult, match=f"1 of 96 rows are wrong, the first one is row {row}"):
            bench.check(problem, broken)


def test_benchmark_checks_rows_of_a_scatter_that_have_a_token():
    problem = bench.make("scatter", bench.SHAPES["test"], 0.25, "bfloat16")
    x, _, places = problem.operands
    out = np.full(problem.wanted.shape, np.nan, jnp.bfloat16)
    kept = np.asarray(places) < len(out)
    out[np.asarray(places)[kept]] = np.repeat(np.asarray(x), places.shape[1], 0).reshape(*places.shape, -1)[kept]
    assert kept.sum() == problem.written == 144
    bench.check(problem, jnp.asarray(out))
    out[np.asarray(places)[kept][5], 1] += 1
    with pytest.raises(bench.WrongResult, match="1 of 192 rows are wrong"):
        bench.check(problem, jnp.asarray(out))


def test_benchmark_tables_are_in_order_of_expert():
    shape = bench.SHAPES["test"]
    tokens = bench.table(shape, 0.0)
    assert np.bincount(tokens, minlength=shape.tokens).tolist() == [shape.top_k] * shape.tokens
    assert np.sum(np.diff(tokens) < 0) < shape.experts  # within an expert tokens ascend
    unpack = bench.table(bench.SHAPES["test_unpack"], 0.0)
    assert sorted(unpack.tolist()) == list(range(96))
    assert unpack[:24].tolist() == [*range(12), *range(48, 60)][:24]
    rows = bench.table_of_tokens(shape, 0.25)
    assert np.sum(rows == shape.rows) == 48
    padded = np.append(bench.table(shape, 0.25), -1)
    assert np.all((padded[rows] == np.arange(shape.tokens)[:, None]) | (rows == shape.rows))


def test_rows_have_a_gradient_beside_weights_that_are_integers():
    ys, rows = jnp.ones((4, 8)), jnp.asarray([[0, 1], [1, 1], [2, 9]])
    grad = jax.grad(lambda ys, w: combine_rows(ys, rows, w, implementation="ref").sum())
    np.testing.assert_array_equal(grad(ys, jnp.full((3, 2), 2)), grad(ys, jnp.full((3, 2), 2.0)))
