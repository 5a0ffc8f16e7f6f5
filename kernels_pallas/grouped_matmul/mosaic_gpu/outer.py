"""Gradient of the matrices on Hopper: out[e] = lhs[rows of e]^T @ grad[rows of e].

The sum runs over rows, so that groups cut the *depth* of the matmul. Copies start at multiples of 8 rows (TMA into
tiles); foreign rows at both ends are set to zero in shared memory, in `grad` always and in `lhs` where they could hold
NaN.
Blocks, warpgroups and the ring of buffers are those of `rows.py`.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.mosaic_gpu.rows import (
    CONSUMERS,
    SWIZZLE,
    claim,
    drain,
    free_slots,
    in_cells,
    launch,
    release_last,
    ring,
    tiled,
)

BLOCK_ROWS = 64
ALIGN = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """A block computes block_k x block_n of one expert's gradient; the other fields as in `rows.Config`."""

    block_k: int = 128
    block_n: int = 256
    stages: int = 4
    cluster: int = 2
    band: int = 8


def ends(
    group_sizes: Int[Array, "G"], rows: int, parts: int, extents: Int[Array, "G"] | None, blocks: int
) -> tuple[Int[Array, "E"], Int[Array, "E B"], Int[Array, "1"]]:
    """(first row of each expert, row after its last row that reaches column block b, row after the last group).

    With extents an expert's groups stand in the order of falling extents: the rows that reach a column come first.
    """
    start, end = groups.bounds(group_sizes, rows)
    first, size = start[::parts], (end - start).reshape(-1, parts)
    if extents is None:
        reach = jnp.sum(size, 1, dtype=jnp.int32)[:, None] + jnp.zeros(blocks, jnp.int32)
    else:
        column = jnp.arange(blocks, dtype=jnp.int32) * groups.EXTENT_BLOCK
        inside = extents.reshape(-1, parts)[:, :, None] > column
        reach = jnp.sum(jnp.where(inside, size[:, :, None], 0), 1, dtype=jnp.int32)
    return first, first[:, None] + reach, end[-1:]


def _kernel(
    first,
    last,
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
    *,
    config: Config,
    axis: str,
    blocks: int,
):
    wg = lax.axis_index("wg")
    block = lax.axis_index("cluster")
    stages, bk, bn, cluster = config.stages, config.block_k, config.block_n, config.cluster
    wn = bn // CONSUMERS
    experts, k, n = out.shape
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

    def span(expert, ik, jn, which):
        """(first row, row after the last) that count in the tile, in warpgroup `which`'s columns."""
        at = ik if axis == "k" else jn * CONSUMERS + which
        return first[expert], last[expert * blocks + jnp.minimum(at, blocks - 1)]

    def longest_span(expert, ik, jn):
        """Blocks of a cluster must take the same number of steps: the span of the first one's first columns."""
        if along_k and axis == "k":
            ik = ik - lax.rem(ik, cluster)
        if not along_k and axis == "n":
            jn = jn - lax.rem(jn, cluster)
        return span(expert, ik, jn, 0)

    def depth(start, end):
        return jnp.where(end > start, (end - start // ALIGN * ALIGN + BLOCK_ROWS - 1) // BLOCK_ROWS, 0)

    @pl.when(wg == CONSUMERS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def tile(slot, step):
            expert, ik, jn = place(slot)
            start, end = longest_span(expert, ik, jn)
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

            return lax.fori_loop(0, depth(start, end), fetch, step)

        drain(empty, ring(experts * each, tile, jnp.int32(0)), stages)

    @pl.when(wg < CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        columns = pl.ds(wg * wn, wn)

        def tile(slot, step):
            expert, ik, jn = place(slot)
            start, longest = longest_span(expert, ik, jn)
            _, end = span(expert, ik, jn, wg)
            base, last_valid = start // ALIGN * ALIGN, total[0]
            steps, mine = depth(start, longest), depth(start, end)

            def accumulate(acc):
                def clear(ref, row, low, high):
                    """Sets the rows outside low .. high to zero."""
                    shape = ref.shape
                    index = row + plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 0), plgpu.Layout.WGMMA)
                    keep = (index >= low) & (index < high)
                    ref[...] = jnp.where(keep, ref[...], jnp.zeros((), ref.dtype))

                def clear_lhs(at, row):
                    """Rows of lhs that may hold NaN: the tail; for "k" also foreign rows, cut at another extent."""
                    low, high = (0, last_valid) if axis == "n" else (start, end)

                    @pl.when((row < low) | (row + BLOCK_ROWS > high))
                    def _():
                        # Both warpgroups read lhs: each clears its half, then they wait for one another.
                        half = pl.ds(wg * (bk // CONSUMERS), bk // CONSUMERS)
                        clear(a_smem.at[at, :, half], row, low, high)
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

                after = lax.fori_loop(0, mine, step_k, step)
                plgpu.wgmma_wait(0)
                release_last(empty, after, stages, mine > 0)

                def skip(i, step):
                    at = lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[at])
                    clear_lhs(at, base + i * BLOCK_ROWS)
                    plgpu.barrier_arrive(empty.at[at])
                    return step + 1

                after = lax.fori_loop(mine, steps, skip, after)
                _, _, cell_k, cell_n = staged.shape

                def send(cell, i, j):
                    at = pl.ds(ik * bk + i * cell_k, cell_k), pl.ds(jn * bn + wg * wn + j * cell_n, cell_n)
                    plgpu.copy_smem_to_gmem(staged.at[wg, cell], out.at[(expert, *at)])

                in_cells(acc[...].astype(out.dtype), staged.at[wg], send)
                return after

            return pl.run_scoped(accumulate, plgpu.ACC((bk, wn), jnp.float32))

        ring(experts * each, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def outer(
    lhs: Array,
    grad: Array,
    group_sizes: Int[Array, "G"],
    *,
    parts: int,
    extents: Int[Array, "G"] | None,
    axis: str,
    dtype: jnp.dtype,
    config: Config,
) -> Array:
    """[E, K, N]; `axis` ("n" or "k") is the side that `extents` limits."""
    experts = group_sizes.shape[0] // parts
    k, n = lhs.shape[1], grad.shape[1]
    blocks = -(-(k if axis == "k" else n) // groups.EXTENT_BLOCK)
    first, last, total = ends(group_sizes, lhs.shape[0], parts, extents, blocks)
    bk, bn, stages = config.block_k, config.block_n, config.stages
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config, axis=axis, blocks=blocks),
        out_type=jax.ShapeDtypeStruct((experts, k, n), dtype),
        scratch_types=[
            plgpu.SMEM((stages, BLOCK_ROWS, bk), lhs.dtype, transforms=tiled(lhs.dtype)),
            plgpu.SMEM((stages, BLOCK_ROWS, bn), grad.dtype, transforms=tiled(grad.dtype)),
            plgpu.SMEM((CONSUMERS, 2, 64, SWIZZLE // jnp.dtype(dtype).itemsize), dtype, transforms=tiled(dtype)),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            free_slots(config),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        **launch(config),
    )
    operands = (first, last.reshape(-1), total, lhs, grad)
    return groups.vary(kernel(*operands), *operands)
