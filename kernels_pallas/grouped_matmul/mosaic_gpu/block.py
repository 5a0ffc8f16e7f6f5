"""How the warpgroups of a block work together, in all kernels here: the last one copies, the others multiply and store.

The copying warpgroup alone knows which tiles the block computes. It tells the others by notes in shared memory, so that
they lose no time between two tiles with finding the next one, which takes hundreds of cycles for each group on the way.

A ring of buffers holds operands: `claim` waits until one is free, `release_last` frees one, `drain` awaits the end.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kernels_pallas.grouped_matmul.groups import ExtentAxis

CONSUMERS = 2
SWIZZLE = 128  # bytes
NOTES = 4  # tiles that may be announced and not yet begun


class Spot(NamedTuple):
    """Where a tile, or a warpgroup's part of it, goes: first row, rows of it that are the group's, first column."""

    row: Any
    count: Any
    column: Any


class Spans(NamedTuple):
    """Which rows belong to which group, and what its extent limits: columns of the result, or depth."""

    group_sizes: Int[Array, "G"]
    extents: Int[Array, "G"] | None = None
    extent_axis: ExtentAxis = "n"


def multiprocessors() -> int:
    """Of the device that is compiled for."""
    if abstract := jax.sharding.get_abstract_mesh().abstract_device:
        return abstract.num_cores
    return jax.devices()[0].core_count


def tiled(dtype: jnp.dtype) -> tuple:
    """The layout of a tile in shared memory that TMA writes and wgmma reads without bank conflicts."""
    tiling, swizzle = plgpu.TilingTransform, plgpu.SwizzleTransform
    # Their base class declares a method that neither has, nor needs.
    return tiling((8, SWIZZLE // jnp.dtype(dtype).itemsize)), swizzle(SWIZZLE)  # ty: ignore[abstract-class-instantiation]


def ring_of(stages: int, tile: tuple[int, ...], axis: int, parts: list[int], dtype: jnp.dtype) -> list[Any]:
    """Buffers for tiles of so many stages; for each number of `parts` the same bytes as so many times as many buffers,
    each for a tile's part along `axis`."""

    def one(n: int) -> Any:
        return plgpu.SMEM(
            (stages * n, *tile[:axis], tile[axis] // n, *tile[axis + 1 :]), dtype, transforms=tiled(dtype)
        )

    return [one(n) for n in parts]


def two_views(shape: tuple[int, ...], dtype: jnp.dtype, interpret: bool) -> Any:
    """One buffer as two refs: rows (any row may be the first of a copy) and tiles (what wgmma and registers use).

    TMA copies to and from a *tiled* buffer start at rows that are multiples of 8. A tile of 8 rows as wide as the
    swizzle is contiguous, so that the bytes of both views are the same, and the untiled one may start anywhere. The
    interpreter does not model memory under two refs, and knows no alignment: it gets one.
    """
    tiles = tiled(dtype)
    if tiles[0].tiling[-1] != shape[-1]:
        raise ValueError(f"shape={shape}: two views need a last axis as wide as the swizzle, {tiles[0].tiling[-1]}")
    if interpret:
        return plgpu.SMEM(shape, dtype)
    return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=tiles[1:]), plgpu.SMEM(shape, dtype, transforms=tiles))


def free_slots(config: Any, number: int) -> Any:
    """Barriers on which consumers say that a buffer is read: in a cluster to both blocks, as both write to it."""
    if config.cluster == 1:
        return plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=number)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=CONSUMERS, num_barriers=number)


def launch(config: Any, *, barriers: bool = True, approximate: bool = False) -> dict[str, Any]:
    """Arguments of `plgpu.kernel` that all kernels here share.

    Args:
        config: the kernel's; its `cluster` counts.
        barriers: the compiler puts barriers around each access of shared memory. Only a kernel in which no thread reads
            what it or another thread of its warpgroup writes there may do without.
        approximate: exp2 and rsqrt are the card's own instructions, which are off by 2^-22 of the value; exp(x) is
            exp2(x log2 e), off by up to about |x| 2^-23 of the value more.
    """
    return {
        "grid": (multiprocessors() // config.cluster,),
        "grid_names": ("grid",),
        "cluster": (config.cluster,),
        "cluster_names": ("cluster",),
        "num_threads": CONSUMERS + 1,
        "thread_name": "wg",
        "compiler_params": plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=not barriers,
            approx_math=approximate,
        ),
    }


def announce(notes: Any, number: Any, *values: Any) -> None:
    """Tells the consumers what tile `number` of this block is. All threads of the warpgroup write the same words, and
    each of them arrives, so that its own are seen."""
    words, told, heard = notes
    at = lax.rem(number, NOTES)

    @pl.when(number >= NOTES)
    def _():
        plgpu.barrier_wait(heard.at[at])

    for i, value in enumerate(values):
        words[at, i] = value
    plgpu.barrier_arrive(told.at[at])


def dismiss(notes: Any, number: Any) -> None:
    """Tells the consumers that tile `number` does not exist, and awaits that they heard everything."""
    announce(notes, number, *[jnp.int32(-1)] * notes[0].shape[1])
    heard_all(notes, number + 1)


def heard_all(notes: Any, total: Any) -> None:
    """Awaits that the consumers heard so many notes."""
    drain(notes[2], total, NOTES)


def follow(notes: Any, body: Callable, init: Any) -> Any:
    """Folds `body(note, hear, carry)` over what was announced, until the last value of a note is below 0; (that note,
    carry).

    The body calls `hear()` once, and returns what that gave it, the next note, and the carry: it knows when there is
    something else to wait for. The note comes only when the copying warpgroup has got all buffers for this tile, so
    all that it may wait for must be freed before.
    """
    words, told, heard = notes

    def hear(number):
        at = lax.rem(number, NOTES)
        plgpu.barrier_wait(told.at[at])
        note = tuple(words[at, i] for i in range(words.shape[1]))
        plgpu.barrier_arrive(heard.at[at])
        return note

    def step(state):
        number, note, carry = state
        return number + 1, *body(note, functools.partial(hear, number + 1), carry)

    first = jnp.int32(0)
    return lax.while_loop(lambda state: state[1][-1] >= 0, step, (first, hear(first), init))[1:]


def notebook(words: int) -> list[Any]:
    """What `announce` and `follow` need in shared memory."""
    told, heard = (plgpu.Barrier(num_arrivals=n, num_barriers=NOTES) for n in (1, CONSUMERS))
    return [plgpu.SMEM((NOTES, words), jnp.int32), told, heard]


def claim(empty: Any, step: Any, stages: int) -> Any:
    """The buffer of a step, once the consumers are done with what it held."""
    at = lax.rem(step, stages)

    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(empty.at[at])

    return at


def drain(empty: Any, total: Any, stages: int) -> None:
    """Awaits every arrival: a block of a cluster must not end while its partner still signals it."""

    @pl.loop(jnp.maximum(total - stages, 0), total)
    def _(step):
        plgpu.barrier_wait(empty.at[lax.rem(step, stages)])


def release_last(empty: Any, step: Any, stages: int, condition: Any) -> None:
    """Frees the buffer of the step before `step`, if there is one."""

    @pl.when(condition)
    def _():
        plgpu.barrier_arrive(empty.at[lax.rem(step + stages - 1, stages)])


def by_size(count: Any, sizes: tuple[int, ...], body: Callable[[int], None]) -> None:
    """Calls `body` with the first of some rising sizes that holds `count`; with the last if none does."""
    below = [True, *(count > size for size in sizes[:-1])]
    for size, more in zip(sizes, below, strict=True):
        condition = more if size == sizes[-1] else more & (count <= size)
        body(size) if condition is True else pl.when(condition)(functools.partial(body, size))


def pass_by(full: Any, empty: Any, steps: Any, stages: int) -> None:
    """What a warpgroup does that has nothing to multiply: frees each buffer as soon as it is full."""

    @pl.loop(0, steps)
    def _(step):
        at = lax.rem(step, stages)
        plgpu.barrier_wait(full.at[at])
        plgpu.barrier_arrive(empty.at[at])


def parts_of(shape: tuple[int, ...], staged: Any) -> int:
    """In how many parts a warpgroup's tile leaves: a staging cell holds one."""
    _, cell_m, cell_n = staged.shape
    return shape[0] // cell_m * (shape[1] // cell_n)


def in_cell(part: int, value: Array, staged: Any, send: Callable[[int, int, int], None]) -> None:
    """A part of a warpgroup's tile leaves through its staging cell; `send(cell, i, j)` starts the copy of what lies i
    cells down and j across. All parts of all tiles, and results, must leave in order."""
    cells, cell_m, cell_n = staged.shape
    parts = parts_of(value.shape, staged)
    i, j = divmod(part, value.shape[1] // cell_n)
    # The copy that last read this cell may have been of the tile before: with three parts, two cells go 0 1 0 0 1 0.
    last = max(earlier for earlier in range(-parts, part) if earlier % parts % cells == part % cells)
    plgpu.wait_smem_to_gmem(part - last - 1, wait_read_only=True)
    staged[part % cells] = value[i * cell_m : (i + 1) * cell_m, j * cell_n : (j + 1) * cell_n]
    plgpu.commit_smem()
    send(part % cells, i, j)


def store_rows(staged: Any, out: Any, row: Any, column: Any, count: Any, rows: int, width: int) -> None:
    """Stores the first `count` of `rows` staged rows, by powers of two, since the size of a TMA copy is static."""
    at = 0
    power = rows
    while power:
        take = (count & power) != 0

        @pl.when(take)
        def _(at=at, power=power):
            target = out.at[pl.ds(row + at, power), pl.ds(column, width)]
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(at, power)], target, commit_group=False)

        at = at + jnp.where(take, power, 0)
        power //= 2


def deferred(config: Any, dtype: jnp.dtype) -> bool:
    """Whether results are stored while the next tile is multiplied: two bytes each, they fit into the registers that
    the accumulators leave."""
    return config.defer and jnp.dtype(dtype).itemsize <= 2


def due(part: int, parts: int, steps: Any) -> Any:
    """After how many of a tile's steps a part of the tile before leaves: spread over all of them, since stores in a row
    hold up the copies that bring the next operands."""
    return jnp.minimum(lax.div(part * steps, jnp.int32(parts)) + 1, steps)
