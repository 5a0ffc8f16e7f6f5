"""Grouped matmul on Hopper: rows of groups times their expert's matrix, with an optional activation in the epilogue.

One block a multiprocessor, three warpgroups (`block.py`): the third only copies (TMA), the first two only multiply
(wgmma) and store. The copying warpgroup walks through all tiles without waiting for a tile's end, so the next tile's
operands arrive while the last one is stored. With `Config.defer` the last tile is stored while the next one is
multiplied.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.mosaic_gpu import block, schedule, walk
from kernels_pallas.grouped_matmul.mosaic_gpu.activation import gated
from kernels_pallas.grouped_matmul.mosaic_gpu.block import (
    CONSUMERS,
    SWIZZLE,
    Spans,
    Spot,
    announce,
    by_size,
    claim,
    deferred,
    dismiss,
    drain,
    due,
    follow,
    free_slots,
    heard_all,
    in_cell,
    launch,
    notebook,
    parts_of,
    pass_by,
    release_last,
    ring_of,
    store_rows,
    two_views,
)
from kernels_pallas.grouped_matmul.mosaic_gpu.config import Config

BLOCK_K = 64
# Words of a note: first row, rows of it that are the group's, first column in units, depth; with biases one more, the
# expert, before the depth.
NOTE = 4
MOST_STEPS = 1 << 20
"""A last note, of a piece of a tile, ends with -1 - (how many pieces) * MOST_STEPS - (its steps)."""
MOST_ROUNDS = 28
"""To divide a last round costs 0.6 to 1.5 % (H100, by the look ahead), and saves a quarter of a round in the mean."""


def _kernel(
    sizes: Any,
    extents: Any,
    *refs: Any,
    grid: schedule.Grid,
    config: Config,
    operands: int,
    biased: int,
    outputs: int,
    transpose_rhs: bool,
    activation: str | None,
    cuts: tuple[walk.Cut, ...],
    near: bool,
    interpret: bool,
) -> None:
    refs, brought = (refs[:-2], refs[-2:]) if near else (refs, ())
    lhs, rhs = refs[:operands], refs[operands : 2 * operands] if activation is None else refs[operands : operands + 2]
    biases, outs = refs[-8 - outputs - biased : -8 - outputs], refs[-8 - outputs : -8]
    a_smem, b_views, stage, full, empty, *notes = refs[-8:]
    a_in, a_smem = (a_smem, a_smem) if interpret else a_smem
    staged_out, staged = (stage, stage) if interpret else stage
    wg = lax.axis_index("wg")
    stages, bm, bn = config.stages, config.block_m, config.block_n
    wm, wn = (bm // CONSUMERS, bn) if config.split == "m" else (bm, bn // CONSUMERS)
    width = grid.block_n  # columns of the result in a tile
    whole = walk.Cut(1)
    b_views = dict(zip(walk.across(cuts), b_views, strict=True)) if cuts and not interpret else {1: b_views}

    def operand(cut, at):
        """The matrix's buffer of a step; of a piece as many columns as it has."""
        if not interpret:
            return b_views[cut.columns].at[at]
        columns = pl.ds(lax.rem(at, cut.rows) * (width // cut.columns), width // cut.columns)
        return b_views[1].at[lax.div(at, cut.rows)].at[(columns, slice(None)) if transpose_rhs else (..., columns)]

    def rows_of(buffer, cut, at, mine):
        """The rows of a step; where they are half of a tile's, two steps lie where one of a tile lies."""
        return buffer.at[
            (at, mine) if cut.rows == 1 else (lax.div(at, cut.rows), pl.ds(lax.rem(at, cut.rows) * wm, wm))
        ]

    @pl.when(wg == CONSUMERS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        spans = walk.bring(brought, sizes, extents)

        def copies(cut, expert, tile, step):
            column, depth = tile.column * grid.unit, tile.depth
            columns, ring = pl.ds(column, width // cut.columns), stages * cut.rows

            def fetch(shares_rhs, pair, k, step):
                at = claim(empty, step, ring)
                span = pl.ds(k * BLOCK_K, BLOCK_K)
                axis = None if config.cluster == 1 else "cluster"
                of_lhs, of_rhs = (None, axis) if shares_rhs else (axis, None)

                def take(height):
                    source = lhs[pair].at[pl.ds(tile.row, height), span]
                    into = rows_of(a_in, cut, at, pl.ds(0, height))
                    plgpu.copy_gmem_to_smem(source, into, full.at[at], collective_axes=of_lhs)

                by_size(tile.count, config.heights(cut), take)
                into = operand(cut, at)
                if activation is not None:
                    for half in range(2):
                        source = rhs[half].at[expert, span, columns]
                        plgpu.copy_gmem_to_smem(source, into.at[half], full.at[at], collective_axes=of_rhs)
                else:
                    source = rhs[pair].at[(expert, columns, span) if transpose_rhs else (expert, span, columns)]
                    plgpu.copy_gmem_to_smem(source, into, full.at[at], collective_axes=of_rhs)
                return step + 1

            def loop(shares_rhs):
                def run(step):
                    for pair in range(operands):
                        step = lax.fori_loop(0, depth, functools.partial(fetch, shares_rhs, pair), step)
                    return step

                return run

            if config.cluster == 1:
                return loop(True)(step)
            return lax.cond(tile.shares_rhs, loop(True), loop(False), step)

        def tell(number, group, tile, last):
            expert = lax.div(group, jnp.int32(grid.parts))
            announce(notes, number, tile.row, tile.count, tile.column, *([expert] if biased else []), last)
            return expert

        def tile(group, tile, carry):
            number, step = carry
            expert = tell(number, group, tile, tile.depth)
            return number + 1, copies(whole, expert, tile, step)

        (number, step), piece = walk.fold(grid, *spans, cuts, tile, (jnp.int32(0), jnp.int32(0)))
        if piece is None:
            dismiss(notes, number)
            drain(empty, step, stages)
            return
        last = jnp.where(piece.pieces == 1, -1, -1 - piece.pieces * MOST_STEPS - piece.tile.depth)
        expert = tell(number, piece.group, piece.tile, last)
        drain(empty, step, stages)  # a piece's buffers lie across those of tiles

        for cut in cuts:

            @pl.when(piece.pieces == cut.number)
            def _(cut=cut):
                drain(empty, copies(cut, expert, piece.tile, jnp.int32(0)), stages * cut.rows)

        heard_all(notes, number + 1)

    @pl.when(wg < CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        tall = config.split == "m"
        mine_m = pl.ds(wg * wm, wm) if tall else slice(None)

        def layout(cut):
            """Shape of a warpgroup's result, and in how many parts it leaves."""
            shape = (wm, (wn if activation is None else width) // cut.columns)
            return shape, parts_of(shape, staged.at[wg])

        def store(part, value, out, at):
            _, _, cell_m, cell_n = staged.shape

            def send(cell, i, j):
                inside = jnp.clip(at.count - i * cell_m, 0, cell_m)
                target = at.row + i * cell_m, at.column + j * cell_n
                store_rows(staged_out.at[wg, cell], out, *target, inside, cell_m, cell_n)
                plgpu.commit_smem_to_gmem_group()

            in_cell(part, value, staged.at[wg], send)

        late = outputs == 1 and deferred(config, outs[0].dtype)

        def tile(note, hear, carry, cut=whole):
            step, held = carry
            row, count, column, *expert, depth = note
            column, depth = column * grid.unit, depth * operands
            (shape, parts), ring = layout(cut), stages * cut.rows
            mine_n = slice(None) if tall else pl.ds(wg * shape[1], shape[1])
            if tall:
                row, count = row + wg * wm, jnp.clip(count - wg * wm, 0, wm)
            else:
                column = column + wg * shape[1]
            at = Spot(row, count, column)

            def accumulate(*accs):
                def multiply(k, step):
                    at = lax.rem(step, ring)
                    plgpu.barrier_wait(full.at[at])
                    a, b = rows_of(a_smem, cut, at, mine_m), operand(cut, at)
                    if activation is not None:
                        for half, acc in enumerate(accs):
                            plgpu.wgmma(acc, a, b.at[half])
                    elif transpose_rhs:
                        plgpu.wgmma(accs[0], a, b.at[mine_n, :].T)
                    else:
                        plgpu.wgmma(accs[0], a, b.at[:, mine_n])
                    plgpu.wgmma_wait(len(accs))  # so the step before is done, and its buffers are free
                    release_last(empty, step, ring, k > 0)
                    return step + 1

                after, begun = step, jnp.int32(0)
                for value, of_last in held:
                    for part in range(parts):
                        until = due(part, parts, depth)
                        after = lax.fori_loop(begun, until, multiply, after)
                        store(part, value, outs[0], of_last)
                        begun = until
                after = lax.fori_loop(begun, depth, multiply, after)
                following = hear()
                plgpu.wgmma_wait(0)
                release_last(empty, after, ring, depth > 0)
                values = [acc[...] for acc in accs]
                for i, bias in enumerate(biases):  # read here: before, there are no registers for it
                    ours = bias.at[expert[0], pl.ds(column, shape[1])]
                    added = plgpu.load(ours, optimized=False).astype(jnp.float32)
                    values[i] = values[i] + lax.broadcast_in_dim(added, shape, (1,))
                if activation is not None:
                    values = [gated(activation, *values), *values][:outputs]
                values = [value.astype(out.dtype) for value, out in zip(values, outs, strict=True)]
                if late and cut == whole:
                    return following, (after, [(values[0], at)])
                for value, out in zip(values, outs, strict=True):
                    for part in range(parts):
                        store(part, value, out, at)
                return following, (after, [])

            accs = [plgpu.ACC(shape, jnp.float32)] * (1 if activation is None else 2)
            return pl.run_scoped(accumulate, *accs)

        nowhere = Spot(jnp.int32(0), jnp.int32(0), jnp.int32(0))  # no rows: nothing is stored before the first tile
        nothing = [(jnp.zeros(layout(whole)[0], outs[0].dtype), nowhere)] if late else []
        (*place, last), (_, held) = follow(notes, tile, (jnp.int32(0), nothing))
        for value, of_last in held:
            for part in range(layout(whole)[1]):
                store(part, value, outs[0], of_last)
        if cuts:  # a piece may leave in another number of parts, so that cells cannot be told by what was last in them
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for cut in cuts:

            @pl.when(lax.div(-1 - last, jnp.int32(MOST_STEPS)) == cut.number)
            def _(cut=cut):
                note = *place, lax.rem(-1 - last, jnp.int32(MOST_STEPS))

                @pl.when((wg == 0) | (cut.rows == 1))
                def _():
                    tile(note, lambda: (), (jnp.int32(0), []), cut)

                @pl.when((wg != 0) & (cut.rows > 1))
                def _():
                    pass_by(full, empty, note[-1] * operands, stages * cut.rows)

        plgpu.wait_smem_to_gmem(0)


def product(
    pairs: Sequence[tuple[Array, Array]],
    spans: Spans,
    *,
    transpose_rhs: bool,
    dtype: jnp.dtype,
    config: Config,
    interpret: bool,
    bias: Float[Array, "E N"] | None = None,
) -> Float[Array, "P N"]:
    """out[row] = sum over pairs of lhs[row] @ rhs[expert of the row], plus the expert's bias; rows in no group are not
    written.

    All pairs have the same shapes: one kernel, one accumulator, no sum of intermediate results in memory.
    """
    lhs, rhs = zip(*pairs, strict=True)
    columns = rhs[0].shape[1 if transpose_rhs else 2]
    b_tile = (config.block_n, BLOCK_K) if transpose_rhs else (BLOCK_K, config.block_n)
    out = jax.ShapeDtypeStruct((lhs[0].shape[0], columns), dtype)
    options = {"transpose_rhs": transpose_rhs, "activation": None}
    biases = () if bias is None else (bias,)
    return _call(lhs, rhs, biases, spans, [out], config.block_n, b_tile, 2, config, interpret, **options)[0]


def gated_product(
    lhs: Array,
    gate: Array,
    up: Array,
    spans: Spans,
    *,
    activation: str,
    save: bool,
    config: Config,
    interpret: bool,
    biases: tuple[Float[Array, "E F"], Float[Array, "E F"]] | tuple[()] = (),
) -> list[Float[Array, "P F"]]:
    """[act(lhs @ gate) * (lhs @ up)] and, if `save`, both products; a tile is block_n / 2 columns of each. Biases, of
    gate and up, are added to the products."""
    outs = [jax.ShapeDtypeStruct((lhs.shape[0], up.shape[2]), lhs.dtype)] * (3 if save else 1)
    options = {"transpose_rhs": False, "activation": activation}
    width = config.block_n // 2
    return _call((lhs,), (gate, up), biases, spans, outs, width, (2, BLOCK_K, width), 3, config, interpret, **options)


def _call(lhs, rhs, biases, spans, outs, width, b_tile, copies, config, interpret, **options) -> list[Array]:
    sizes, extents = spans.group_sizes, spans.extents
    grid = schedule.Grid(
        groups=sizes.shape[0],
        rows=lhs[0].shape[0],
        columns=outs[0].shape[1],
        steps=lhs[0].shape[1] // BLOCK_K,
        block_m=config.block_m,
        block_n=width,
        block_k=BLOCK_K,
        cluster=config.cluster,
        band=config.band,
        extent_axis=None if extents is None else spans.extent_axis,
        parts=sizes.shape[0] // rhs[0].shape[0],
    )
    options |= {"grid": grid, "config": config, "operands": len(lhs), "outputs": len(outs), "interpret": interpret}
    rounds = -(-grid.rows // grid.block_m) * -(-grid.columns // width) / block.multiprocessors()
    cuts = config.cuts(width) if rounds < MOST_ROUNDS else ()
    item, out_item = (jnp.dtype(a.dtype).itemsize for a in (rhs[0], outs[0]))
    taken = config.stages * (config.block_m * BLOCK_K + math.prod(b_tile)) * item
    near = walk.nearby(grid, rounds, taken + CONSUMERS * config.cells * 64 * SWIZZLE)
    options |= {"biased": len(biases), "cuts": cuts, "near": bool(near)}
    # The last tile's columns may stick out; unlike a copy's, a load's must be there.
    biases = [jnp.pad(bias, ((0, 0), (0, width))) for bias in biases]
    buffers = ring_of(config.stages, b_tile, b_tile.index(width), walk.across(cuts), rhs[0].dtype)
    ring = config.stages * max((cut.rows for cut in cuts), default=1)
    kernel = plgpu.kernel(
        functools.partial(_kernel, **options),
        out_type=list(outs),
        scratch_types=[
            two_views((config.stages, config.block_m, BLOCK_K), lhs[0].dtype, interpret),
            buffers[0] if interpret or len(buffers) == 1 else plgpu.RefUnion(*buffers),
            two_views((CONSUMERS, config.cells, 64, SWIZZLE // out_item), outs[0].dtype, interpret),
            plgpu.Barrier(num_arrivals=copies, num_barriers=ring),
            free_slots(config, ring),
            *notebook(NOTE + bool(biases)),
            *near,
        ],
        kernel_name="grouped_matmul" if options["activation"] is None else "grouped_gate_up",  # in a profile
        **launch(config, barriers=False, approximate=options["activation"] is not None),
    )
    sizes = sizes.astype(jnp.int32)  # the walk adds up the groups of an expert before it cuts them off
    sizes = groups.within(sizes, grid.rows) if grid.parts > 1 else sizes
    operands = (sizes, sizes if extents is None else extents.astype(jnp.int32), *lhs, *rhs, *biases)
    # A kernel does not pass on over which mesh axes its operands vary.
    return [groups.vary(out, *operands) for out in kernel(*operands)]
