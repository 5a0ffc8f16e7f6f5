"""Which tiles a block computes: in each round the blocks take as many slots of the schedule, one each.

The slots are seldom a multiple of the blocks, and while the last round's few are computed all other blocks wait. So if
they are at most half (a third, a quarter, ...) as many as the blocks, each is computed in so many pieces, by as many
blocks: of its columns, or also of its rows (`Cut`). A piece sums what the tile would sum, in the same order, so that
the bits do not depend on it.

The sizes and extents of the groups lie in shared memory where there is room for them (`nearby`, `bring`): the steps of
the walk depend on one another, and each would wait for the L2 cache.

How many slots there are is found on the walk: a block looks up the end of each round, beyond which its own next slot
lies anyway. The first round is never divided: the look ahead would delay its first copies.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.mosaic_gpu import schedule

SHARED = 227 * 1024  # bytes of a block on Hopper
ALIGNED = 1024  # bytes that a buffer begins at a multiple of
COPIED = 16, 128, 256  # a copy has a multiple of so many bytes, begins at one of so many, and takes so many elements
FEW_ROUNDS = 4
"""Below so many rounds of tiles sizes stay where they are. Whether decoding would gain is not known: it was timed only
with the host's start of its programs, which took longer."""


class _Round(NamedTuple):
    """First slot of a round, a place not behind it, this block's place, and the place of the round's last slot."""

    first: Any
    before: schedule.Place
    place: schedule.Place
    end: schedule.Place


class Cut(NamedTuple):
    """How a tile may be divided: into so many parts of its columns, and each of them into so many of its rows."""

    columns: int
    rows: int = 1

    @property
    def number(self) -> int:
        return self.columns * self.rows


def across(cuts: Sequence[Cut]) -> list[int]:
    """Into how many parts of its columns a tile may be divided; 1 is a whole tile."""
    return sorted({1, *(cut.columns for cut in cuts)})


class Piece(NamedTuple):
    """One of `pieces` of a tile, which is the group's; no tile if `pieces` is 1."""

    pieces: Any
    group: Any
    tile: schedule.Tile


def nearby(grid: schedule.Grid, rounds: float, taken: int) -> list[Any]:
    """The scratch that `bring` needs; nothing where the walk is short, or the groups do not fit beside the `taken`
    bytes of a block's buffers or into a copy."""
    multiple, start, most = COPIED
    arrays, row = 1 + (grid.extent_axis is not None), -(-4 * grid.groups // start) * start
    own = -(-arrays * row // ALIGNED) * ALIGNED
    fits = 4 * grid.groups % multiple == 0 and grid.groups <= most
    if rounds < FEW_ROUNDS or not fits or taken + own + 2 * ALIGNED > SHARED:  # beside notes and barriers
        return []
    return [plgpu.SMEM((arrays, row // 4), jnp.int32), plgpu.Barrier(num_arrivals=arrays)]


def bring(scratch: Sequence[Any], sizes: Any, extents: Any) -> tuple[Any, Any]:
    """(sizes, extents) in shared memory, or as they are if there is no scratch; without extents there is one array."""
    if not scratch:
        return sizes, extents
    near, arrived = scratch
    count = near.shape[0]
    for i, far in enumerate((sizes, extents)[:count]):
        plgpu.copy_gmem_to_smem(far, near.at[i, : far.shape[0]], arrived)
    plgpu.barrier_wait(arrived)
    return near.at[0], near.at[count - 1]


def fold(
    grid: schedule.Grid, sizes: Any, extents: Any, cuts: tuple[Cut, ...], body: Callable, init: Any
) -> tuple[Any, Piece | None]:
    """Folds `body(group, tile, carry)` over this block's tiles; (carry, the piece that it takes after them).

    Args:
        grid: what is computed.
        sizes, extents: of the groups, refs.
        cuts: how a tile may be cut, into the fewest pieces first; none: it is not, and there is no piece.
        body: what is done with a whole tile.
        init: the first carry.
    """
    block, mine, count = lax.axis_index("cluster"), lax.axis_index("grid"), lax.axis_size("grid")

    def seek(place, slot):
        return schedule.seek(grid, sizes, extents, place, slot)

    def tile_of(place, slot):
        return schedule.group_of(grid, place.turn), schedule.tile(grid, extents, place, slot, block)

    def cut(at):
        """Into how many pieces the tiles of a round are cut."""
        found, last = jnp.int32(1), at.end.turn >= grid.groups
        for some in cuts:
            found = jnp.where(last & ((at.end.first - at.first) * some.number <= count), some.number, found)
        return found

    def going(state):
        at, _ = state
        return (at.place.turn < grid.groups) & (cut(at) == 1)

    def step(state):
        at, carry = state
        carry = body(*tile_of(at.place, at.first + mine), carry)
        first = at.first + count
        place = seek(at.end, first + mine)
        return _Round(first, at.end, place, seek(place, first + count - 1) if cuts else place), carry

    begin = schedule.begin(grid, sizes, extents)
    place = seek(begin, mine)
    # The end of the first round is not looked up: for it stands a place before it, and not behind the last group.
    end = jax.tree.map(lambda a, b: jnp.where(place.turn < grid.groups, a, b), place, begin)
    at, carry = lax.while_loop(going, step, (_Round(jnp.int32(0), begin, place, end), init))
    if not cuts:
        return carry, None
    number = cut(at)
    number = jnp.where(mine < (at.end.first - at.first) * number, number, 1)
    slot = at.first + lax.div(mine, number)
    group, tile = tile_of(seek(at.before, slot), slot)
    columns = jnp.int32(1)
    for some in cuts:
        columns = jnp.where(number == some.number, some.columns, columns)
    which, height = lax.rem(mine, number), lax.div(grid.block_m * columns, number)
    column = tile.column + lax.rem(which, columns) * lax.div(jnp.int32(grid.block_n // grid.unit), columns)
    above = lax.div(which, columns) * height
    return carry, Piece(number, group, tile._replace(row=tile.row + above, count=tile.count - above, column=column))
