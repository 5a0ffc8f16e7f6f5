"""Which tiles the blocks of the Hopper kernels compute, and the pieces of the last round's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from kernels_pallas.grouped_matmul import specs
from kernels_pallas.grouped_matmul.mosaic_gpu import backend, rows, schedule, tuning, walk
from tests.kernels_pallas.test_mosaic_gpu import KERNELS, exact, interpreted, normal

MOST = 64  # tiles of a block


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def walked(grid, blocks, cuts, sizes, extents):
    """(tiles of each block [blocks, MOST], how many, its piece), as the copying warpgroups find them."""

    def tiles(_):
        def body(group, tile, carry):
            count, kept = carry
            found = {"group": group, **tile._asdict()}
            return count + 1, {name: kept[name].at[count].set(value) for name, value in found.items()}

        empty = {name: jnp.zeros(MOST, jnp.int32) for name in ("group", "row", "count", "column", "depth")}
        empty["shares_rhs"] = jnp.zeros(MOST, bool)
        (count, kept), piece = walk.fold(grid, sizes, extents, cuts, body, (jnp.int32(0), empty))
        return count, kept, piece

    def of_cluster(_):
        return jax.vmap(tiles, axis_name="cluster")(jnp.arange(1))

    return jax.tree.map(lambda a: a[:, 0], jax.vmap(of_cluster, axis_name="grid")(jnp.arange(blocks)))


@functools.partial(jax.jit, static_argnums=0)
def slots_of(grid, sizes, extents):
    return schedule.seek(grid, sizes, extents, schedule.begin(grid, sizes, extents), jnp.int32(1 << 30)).first


@pytest.mark.parametrize(("axis", "parts"), [(None, 1), ("n", 2), ("k", 2)])
@pytest.mark.parametrize(
    ("cuts", "block_n"), [(((2, 1), (4, 1), (4, 2)), 256), (((3, 1), (3, 2)), 192), (((2, 1), (2, 2)), 128)]
)
def test_whole_tiles_and_pieces_cover_what_whole_tiles_alone_do(cuts, block_n, axis, parts):
    rng = np.random.default_rng(0)
    blocks, groups, columns, block_m = 17, 6, 768, 128
    grid = schedule.Grid(groups, 3200, columns, 6, block_m, block_n, 64, 1, 8, axis, parts)
    seen, cuts = set(), tuple(walk.Cut(*cut) for cut in cuts)
    by_number = {cut.number: cut for cut in (walk.Cut(1), *cuts)}
    for case in range(60):
        sizes = rng.multinomial(rng.integers(0, 3000), rng.dirichlet(np.full(groups, 0.5 + case % 3)))
        extents = np.sort(rng.integers(0, 7, (groups // parts, parts)) * 64)[:, ::-1].reshape(-1)
        extents = jnp.asarray(extents, jnp.int32) if axis else None
        sizes = jnp.asarray(sizes, jnp.int32)
        whole, divided = (jax.device_get(walked(grid, blocks, some, sizes, extents)) for some in ((), cuts))
        slots = int(slots_of(grid, sizes, extents))
        left = slots % blocks if slots > blocks else 0
        number = max((some for some in by_number if 0 < left * some <= blocks), default=1)
        seen.add(number)

        def covered(found, number):
            """(first row, depth, column) of what is computed in 64 rows and 64 columns, those without valid rows left
            out."""
            counts, kept, piece = found
            out = []

            def add(row, count, depth, first, width, rows):
                for above in range(0, min(rows, count), 64):
                    out.extend((row + above, depth, column) for column in range(first, first + width, 64))

            for block, count in enumerate(counts):
                for i in range(count):
                    row, valid, depth, column = (
                        int(kept[name][block, i]) for name in ("row", "count", "depth", "column")
                    )
                    add(row, valid, depth, column * grid.unit, block_n, block_m)
                if piece is not None and piece.pieces[block] > 1:
                    assert piece.pieces[block] == number
                    cut, tile = by_number[number], jax.tree.map(lambda a, block=block: int(a[block]), piece.tile)
                    width, rows = block_n // cut.columns, block_m // cut.rows
                    add(tile.row, tile.count, tile.depth, tile.column * grid.unit, width, rows)
            return sorted(out)

        assert covered(divided, number) == covered(whole, 1)
        assert whole[0].sum() == slots
        assert divided[0].sum() == slots - (left if number > 1 else 0)
        assert np.sum(divided[2].pieces > 1) == (left * number if number > 1 else 0)
        # No block has more to do than a round for each whole round, and one thing in the last.
        assert divided[0].max() <= -(-slots // blocks)
    assert seen == set(by_number)


@pytest.mark.parametrize(
    ("sizes", "columns", "block_n", "split", "defer", "transpose_rhs", "pieces"),
    [
        ((128, 0, 512, 0), 256, 256, "m", True, False, 4),
        ((128, 0, 256), 512, 256, "n", False, True, 2),
        ((128, 512, 0), 192, 192, "m", True, True, 3),
        ((512, 0, 128), 128, 128, "m", True, True, 4),  # two pieces of the columns, each of half of the rows
        pytest.param((128, 0, 256), 512, 256, "m", True, False, 2, marks=pytest.mark.slow),
        pytest.param((128, 0, 512), 256, 256, "m", False, True, 4, marks=pytest.mark.slow),
        pytest.param((128, 512, 0), 192, 192, "m", False, False, 3, marks=pytest.mark.slow),
    ],
)
def test_pieces_have_the_same_bits_and_no_race(
    monkeypatch, sizes, columns, block_n, split, defer, transpose_rhs, pieces
):
    taken = count_pieces(monkeypatch)
    lhs, sizes = exact(0, sum(sizes), 192), jnp.array(sizes, jnp.int32)
    experts = len(sizes)
    rhs = exact(1, experts, columns, 192) if transpose_rhs else exact(1, experts, 192, columns)
    config = rows.Config(split=split, defer=defer, stages=2, block_n=block_n)
    options = {"transpose_rhs": transpose_rhs, "extent_axis": "n", "dtype": jnp.bfloat16}

    def run(divide):
        return KERNELS.product(lhs, rhs, sizes, None, config=dataclasses.replace(config, divide=divide), **options)

    same_without_races(run)
    assert max(taken) == pieces


@pytest.mark.parametrize(
    ("sizes", "save", "defer", "pieces"),
    [
        ((128, 0, 512, 128), True, False, 2),  # two tiles are left, for four blocks
        ((128, 0, 512), False, True, 4),  # one: its rows are divided too
        ((512, 40, 0, 0), True, False, 4),  # and of these rows none are left for the lower half
    ],
)
def test_pieces_of_gate_and_up_have_the_same_bits_and_no_race(monkeypatch, sizes, save, defer, pieces):
    taken, experts = count_pieces(monkeypatch), len(sizes)
    xs, gate, up = exact(0, sum(sizes), 128), exact(2, experts, 128, 128), exact(3, experts, 128, 128)
    biases = exact(4, experts, 128), exact(5, experts, 128)
    options = {"activation": "swiglu", "save": save, "interpret": True, "biases": biases}

    def run(divide):  # whole tiles are stored at once: deferred stores must not change the bits either
        config = rows.Config(split="m", stages=2, divide=divide, defer=defer and divide)
        return rows.gated_product(xs, gate, up, rows.Spans(jnp.array(sizes, jnp.int32)), config=config, **options)

    same_without_races(run)
    assert max(taken) == pieces


@pytest.mark.parametrize("axis", [None, "n", "k"])
def test_sizes_and_extents_near_or_far_give_the_same_bits(monkeypatch, axis):
    found = []
    # The interpreter takes each copy for a group of its own: whole tiles only.
    lhs, rhs, sizes = exact(0, 512, 256), exact(1, 4, 256, 256), jnp.array([256, 0, 128, 128], jnp.int32)
    extents = None if axis is None else jnp.array([256, 64, 128, 64], jnp.int32)
    config = rows.Config(split="m", stages=2, block_n=128, divide=True)
    for rounds in (0, 1 << 20):
        monkeypatch.setattr(walk, "FEW_ROUNDS", rounds)
        seen = watch(monkeypatch, "nearby")
        with interpreted(races=True):
            spans = rows.Spans(sizes, extents, axis or "n")
            options = {"transpose_rhs": False, "dtype": jnp.bfloat16, "config": config, "interpret": True}
            found.append(np.asarray(rows.product([(lhs, rhs)], spans, **options), np.float32))
            assert not gpu_callbacks.get_races().races_found
        assert [bool(scratch) for scratch in seen] == [rounds == 0]
    expected, start = np.full((512, 256), np.nan, np.float32), 0
    for expert, size in enumerate(sizes.tolist()):
        deep, wide = (int(extents[expert]) if axis == name else 256 for name in "kn")
        x, w = (np.asarray(a, np.float32) for a in (lhs[start : start + size, :deep], rhs[expert, :deep, :wide]))
        expected[start : start + size, :wide] = x @ w
        start += size
    valid = np.isfinite(expected)
    np.testing.assert_array_equal(found[0][valid], found[1][valid])
    np.testing.assert_allclose(found[0][valid], expected[valid], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("groups", "axis", "rounds", "free", "shape"),
    [
        (64, None, 8.0, 3072, (1, 64)),
        (64, "n", 8.0, 3072, (2, 64)),
        (128, "k", 8.0, 3072, (2, 128)),
        (8, "k", 8.0, 3072, (2, 32)),  # a copy begins at a multiple of 128 bytes
        (60, None, 8.0, 3072, (1, 64)),
        (256, None, 8.0, 3072, (1, 256)),
        (256, "n", 8.0, 3072, None),  # 2 KiB, and 2 more for notes and barriers
        (256, "n", 8.0, 4096, (2, 256)),
        (64, None, 8.0, 3071, None),
        (6, None, 8.0, 1 << 16, None),  # 24 bytes are no whole copy
        (512, None, 8.0, 1 << 16, None),
        (64, None, 3.9, 3072, None),
    ],
)
def test_what_is_brought_near_fits_beside_the_buffers(groups, axis, rounds, free, shape):
    grid = schedule.Grid(groups, 1600, 768, 6, 128, 256, 64, 1, 8, axis)
    scratch = walk.nearby(grid, rounds, walk.SHARED - free)
    assert [a.shape for a in scratch[:1]] == ([] if shape is None else [shape])


def watch(monkeypatch, name):
    """A list that gets what `walk`'s function of that name returns."""
    seen, plain = [], getattr(walk, name)
    monkeypatch.setattr(walk, name, lambda *args: seen.append(plain(*args)) or seen[-1])
    return seen


def same_without_races(run):
    """Of `run(divide)`, interpreted."""
    found = []
    for divide in (False, True):
        with interpreted(races=True):
            found.append(jax.block_until_ready(run(divide)))
            assert not gpu_callbacks.get_races().races_found
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *found)


def count_pieces(monkeypatch):
    """A list that gets, of each block, into how many pieces its last tile was cut."""
    taken, plain = [], walk.fold

    def fold(*args):
        carry, piece = plain(*args)
        if piece is not None:
            jax.debug.callback(lambda number: taken.append(int(number)), piece.pieces)
        return carry, piece

    monkeypatch.setattr(walk, "fold", fold)
    return taken


@pytest.mark.gpu
@pytest.mark.parametrize("extent", [None, 512])
@pytest.mark.parametrize("kernel", ["product", "gated"])
def test_on_a_device_pieces_have_the_same_bits(kernel, extent):
    """More tiles than multiprocessors, which the small shapes of the other tests never have: from one round to 17."""
    most, experts, d, f = 32768, 64, 2048, 1024
    xs, gate, up = normal(0, most, d), normal(1, experts, d, f), normal(2, experts, d, f)
    extents = None if extent is None else jnp.full(experts, extent, jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(divide, xs, gate, up, sizes):
        if kernel == "product":
            config = dataclasses.replace(tuning.for_rows(most, experts, d, f, False), divide=divide)
            options = {"transpose_rhs": False, "extent_axis": "n", "dtype": jnp.bfloat16, "config": config}
            return backend.KERNELS.product(xs, up, sizes, extents, **options)
        config = dataclasses.replace(tuning.for_gated(most, experts, d, f), divide=divide)
        options = {"activation": "swiglu", "save": False, "config": config, "interpret": False}
        return rows.gated_product(xs, gate, up, rows.Spans(sizes, extents), **options)[0]

    for total in (2048, 6144, 10240, 16384, 20480, 24576, most):
        sizes = jnp.asarray(specs.dirichlet(experts, total, 5.0))
        whole, cut = (np.asarray(run(divide, xs, gate, up, sizes)[:total, :extent]) for divide in (False, True))
        np.testing.assert_array_equal(whole, cut)
