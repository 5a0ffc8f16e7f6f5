"""Gradient of the matrices on Hopper: out[e] = lhs[rows of e]^T @ grad[rows of e].

The sum runs over rows, so that groups cut the *depth* of the matmul. Copies start at multiples of 8 rows (TMA into
tiles); foreign rows at both ends are set to zero in shared memory, in `grad` always and in `lhs` where they could hold
NaN. Extents are about rows too: those that reach a tile's columns; the caller sets the columns beyond to zero.
Blocks, warpgroups and the ring of buffers are as `block.py` has them.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.groups import EXTENT_BLOCK
from kernels_pallas.grouped_matmul.mosaic_gpu.block import (
    CONSUMERS,
    SWIZZLE,
    Spans,
    announce,
    claim,
    deferred,
    dismiss,
    drain,
    due,
    follow,
    free_slots,
    in_cell,
    launch,
    notebook,
    parts_of,
    release_last,
    tiled,
)

BLOCK_ROWS = 64
NOTE = 7  # words of a note: expert, tile along K, along N, first row, end rows of both warpgroups, of the longer part
ALIGN = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """A block computes block_k x block_n of one expert's gradient; the other fields are as in `rows.Config`."""

    block_k: int = 128
    block_n: int = 256
    stages: int = 4
    cluster: int = 2
    band: int = 8
    defer: bool = False


def _kernel(
    sizes,
    extents,
    total,
    lhs,
    grad,
    out,
    a_smem,
    b_smem,
    staged,
    full,
    empty,
    meet,
    *notes,
    config: Config,
    axis: str | None,
):
    wg = lax.axis_index("wg")
    block = lax.axis_index("cluster")
    stages, bk, bn, cluster = config.stages, config.block_k, config.block_n, config.cluster
    wn = bn // CONSUMERS
    (experts, k, n), num_rows = out.shape, lhs.shape[0]
    parts, limit = sizes.shape[0] // experts, k if axis == "k" else n
    tiles_k, tiles_n = pl.cdiv(k, bk), pl.cdiv(n, bn)
    # Blocks of a cluster stand along K and share grad, the larger tile, unless only N has an even number of tiles.
    along_k = tiles_k % 2 == 0 or tiles_n % 2 == 1
    pairs_k, pairs_n = (pl.cdiv(tiles_k, cluster), tiles_n) if along_k else (tiles_k, pl.cdiv(tiles_n, cluster))
    each = pairs_k * pairs_n
    band = min(config.band, pairs_k)

    def place(slot):
        """(expert, tile along K, tile along N): bands of K tiles, so that both operands stay in the L2 cache."""
        expert, i = slot // each, lax.rem(slot, each)
        wide = band * pairs_n
        width = jnp.minimum(band, pairs_k - i // wide * band)
        ik, jn = i // wide * band + lax.rem(lax.rem(i, wide), width), lax.rem(i, wide) // width
        if along_k:
            return expert, jnp.minimum(ik * cluster + block, tiles_k - 1), jn
        return expert, ik, jnp.minimum(jn * cluster + block, tiles_n - 1)

    def rows_of(group, start):
        return jnp.minimum(sizes[group], num_rows - start)

    def walk(body, init):
        """Folds `body(where, carry)` over this block's tiles: (expert, its first row, tile along K, tile along N)."""

        def first_row(expert, start, target):
            def pass_by(state):
                expert, start = state
                for part in range(parts):
                    start = start + rows_of(expert * parts + part, start)
                return expert + 1, start

            return lax.while_loop(lambda state: state[0] < target, pass_by, (expert, start))[1]

        cluster, count = lax.axis_index("grid"), lax.axis_size("grid")
        slots = experts * each

        def tile(i, state):
            expert, start, carry = state
            target, ik, jn = place(cluster + i * count)
            start = first_row(expert, start, target)
            return target, start, body((target, start, ik, jn), carry)

        zero = jnp.int32(0)
        return lax.fori_loop(0, (slots - cluster + count - 1) // count, tile, (zero, zero, init))[2]

    def end_row(where, which):
        """The row after the last that counts in the tile's columns (of warpgroup `which` along N).

        With extents an expert's groups stand in the order of falling extents: the rows that reach a column come first.
        Those that reach the first of these columns count in all of them, with zeros where they reach no further.
        """
        expert, start, ik, jn = where
        column = ik * bk if axis == "k" else jn * bn + which * wn
        block = lax.div(column, jnp.int32(EXTENT_BLOCK)) * EXTENT_BLOCK
        last = end = start
        for part in range(parts):
            group = expert * parts + part
            last = last + rows_of(group, last)
            end = last if axis is None else jnp.where(jnp.minimum(extents[group], limit) > block, last, end)
        return end

    def longest(where):
        """Blocks of a cluster must take the same number of steps: to the end row of the first one's first columns."""
        expert, start, ik, jn = where
        if along_k and axis == "k":
            ik = ik - lax.rem(ik, cluster)
        if not along_k and axis == "n":
            jn = jn - lax.rem(jn, cluster)
        return end_row((expert, start, ik, jn), 0)

    def depth(start, end):
        return jnp.where(end > start, (end - start // ALIGN * ALIGN + BLOCK_ROWS - 1) // BLOCK_ROWS, 0)

    @pl.when(wg == CONSUMERS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def tile(where, carry):
            expert, start, ik, jn = where
            number, step = carry
            end = longest(where)
            announce(notes, number, expert, ik, jn, start, *(end_row(where, which) for which in range(CONSUMERS)), end)
            axis_name = None if cluster == 1 else "cluster"
            of_lhs, of_grad = (None, axis_name) if along_k else (axis_name, None)

            def fetch(i, step):
                at = claim(empty, step, stages)
                rows = pl.ds((start // ALIGN + i * (BLOCK_ROWS // ALIGN)) * ALIGN, BLOCK_ROWS)
                plgpu.copy_gmem_to_smem(
                    lhs.at[rows, pl.ds(ik * bk, bk)], a_smem.at[at], full.at[at], collective_axes=of_lhs
                )
                plgpu.copy_gmem_to_smem(
                    grad.at[rows, pl.ds(jn * bn, bn)], b_smem.at[at], full.at[at], collective_axes=of_grad
                )
                return step + 1

            return number + 1, lax.fori_loop(0, depth(start, end), fetch, step)

        number, step = walk(tile, (jnp.int32(0), jnp.int32(0)))
        dismiss(notes, number)
        drain(empty, step, stages)

    @pl.when(wg < CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        columns = pl.ds(wg * wn, wn)

        late = deferred(config, out.dtype)
        parts = range(parts_of((bk, wn), staged.at[wg]))

        def store(part, value, at):
            expert, ik, jn = at
            _, _, cell_k, cell_n = staged.shape

            def send(cell, i, j):
                @pl.when(expert >= 0)
                def _():
                    target = pl.ds(ik * bk + i * cell_k, cell_k), pl.ds(jn * bn + wg * wn + j * cell_n, cell_n)
                    plgpu.copy_smem_to_gmem(staged.at[wg, cell], out.at[(expert, *target)])

            in_cell(part, value, staged.at[wg], send)

        last_valid = total[0]

        def tile(note, hear, carry):
            (expert, ik, jn, start, *ends, far), (step, held) = note, carry
            end = jnp.where(wg == 0, *ends)
            base = start // ALIGN * ALIGN
            steps, mine = depth(start, far), depth(start, end)

            def accumulate(acc):
                def clear(ref, row, low, high):
                    """Sets the rows outside low .. high to zero."""
                    shape = ref.shape
                    index = row + plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 0), plgpu.Layout.WGMMA)
                    keep = (index >= low) & (index < high)
                    ref[...] = jnp.where(keep, ref[...], jnp.zeros((), ref.dtype))

                def clear_lhs(at, row):
                    """Rows of lhs that may hold NaN: the tail."""

                    @pl.when(row + BLOCK_ROWS > last_valid)
                    def _():
                        # Both warpgroups read lhs: each clears its half, then they wait for one another.
                        half = pl.ds(wg * (bk // CONSUMERS), bk // CONSUMERS)
                        clear(a_smem.at[at, :, half], row, 0, last_valid)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(meet)
                        plgpu.barrier_wait(meet)

                def step_k(i, step):
                    at = lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[at])
                    row = base + i * BLOCK_ROWS
                    edge = (row < start) | (row + BLOCK_ROWS > end)

                    @pl.when(edge)
                    def _():
                        # The previous wgmma still reads other buffers only; this one is nobody else's to write.
                        clear(b_smem.at[at, :, columns], row, start, end)
                        plgpu.commit_smem()

                    clear_lhs(at, row)
                    plgpu.wgmma(acc, a_smem.at[at].T, b_smem.at[at, :, columns])
                    plgpu.wgmma_wait(1)
                    release_last(empty, step, stages, i > 0)
                    return step + 1

                after, begun = step, jnp.int32(0)
                for value, at in held:
                    for part in parts:
                        until = due(part, len(parts), mine)
                        after = lax.fori_loop(begun, until, step_k, after)
                        store(part, value, at)
                        begun = until
                after = lax.fori_loop(begun, mine, step_k, after)
                # The next tile is told once all buffers of this one are asked for. With extents `skip` frees some of
                # them, so to hear of it before would be to wait for oneself.
                following = hear() if axis is None else None
                plgpu.wgmma_wait(0)
                release_last(empty, after, stages, mine > 0)

                def skip(i, step):
                    at = lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[at])
                    clear_lhs(at, base + i * BLOCK_ROWS)
                    plgpu.barrier_arrive(empty.at[at])
                    return step + 1

                after = lax.fori_loop(mine, steps, skip, after)
                following = hear() if following is None else following
                value, at = acc[...].astype(out.dtype), (expert, ik, jn)
                if late:
                    return following, (after, [(value, at)])
                for part in parts:
                    store(part, value, at)
                return following, (after, [])

            return pl.run_scoped(accumulate, plgpu.ACC((bk, wn), jnp.float32))

        nowhere = jnp.int32(-1), jnp.int32(0), jnp.int32(0)  # nothing is stored before the first tile is there
        nothing = [(jnp.zeros((bk, wn), out.dtype), nowhere)] if late else []
        _, (_, held) = follow(notes, tile, (jnp.int32(0), nothing))
        for value, at in held:
            for part in parts:
                store(part, value, at)
        plgpu.wait_smem_to_gmem(0)


def outer(lhs: Array, grad: Array, spans: Spans, *, experts: int, dtype: jnp.dtype, config: Config) -> Array:
    """[E, K, N]; extents limit the side that `spans` names.

    There the columns from a row's extent on must hold zeros: a tile is wider than a block of extents, and a row whose
    extent ends within a warpgroup's part of it is summed there with all of its columns.
    """
    sizes, extents = spans.group_sizes.astype(jnp.int32), spans.extents
    total = jnp.sum(groups.within(sizes, lhs.shape[0]), keepdims=True, dtype=jnp.int32)
    total = jnp.minimum(total, lhs.shape[0])
    bk, bn, stages = config.block_k, config.block_n, config.stages
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config, axis=None if extents is None else spans.extent_axis),
        out_type=jax.ShapeDtypeStruct((experts, lhs.shape[1], grad.shape[1]), dtype),
        scratch_types=[
            plgpu.SMEM((stages, BLOCK_ROWS, bk), lhs.dtype, transforms=tiled(lhs.dtype)),
            plgpu.SMEM((stages, BLOCK_ROWS, bn), grad.dtype, transforms=tiled(grad.dtype)),
            plgpu.SMEM((CONSUMERS, 2, 64, SWIZZLE // jnp.dtype(dtype).itemsize), dtype, transforms=tiled(dtype)),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            free_slots(config, stages),
            plgpu.Barrier(num_arrivals=CONSUMERS),
            *notebook(NOTE),
        ],
        kernel_name="grouped_outer",
        **launch(config),
    )
    operands = (sizes, sizes if extents is None else extents.astype(jnp.int32), total, lhs, grad)
    return groups.vary(kernel(*operands), *operands)
