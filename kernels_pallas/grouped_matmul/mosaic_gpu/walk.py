"""Which tiles a block computes: in each round the blocks take as many slots of the schedule, one each.

The slots are seldom a multiple of the blocks, and while the last round's few are computed all other blocks wait. So if
they are at most half (a third, a quarter) as many as the blocks, each is computed in so many pieces of its columns, by
as many blocks. A piece sums what the tile would sum, in the same order, so that the bits do not depend on it.

How many slots there are is found on the walk: a block looks up the end of each round, beyond which its own next slot
lies anyway. The first round is never divided: the look ahead would delay its first copies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.mosaic_gpu import schedule


class _Round(NamedTuple):
    """First slot of a round, a place not behind it, this block's place, and the place of the round's last slot."""

    first: Any
    before: schedule.Place
    place: schedule.Place
    end: schedule.Place


class Piece(NamedTuple):
    """One of `pieces` of a tile's columns, which are the group's; no tile if `pieces` is 1."""

    pieces: Any
    group: Any
    tile: schedule.Tile


def fold(
    grid: schedule.Grid, sizes: Any, extents: Any, pieces: tuple[int, ...], body: Callable, init: Any
) -> tuple[Any, Piece | None]:
    """Folds `body(group, tile, carry)` over this block's tiles; (carry, the piece that it takes after them).

    Args:
        grid: what is computed.
        sizes, extents: of the groups, refs.
        pieces: into how many a tile may be cut, the least first; none: it is not, and there is no piece.
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
        for number in pieces:
            found = jnp.where(last & ((at.end.first - at.first) * number <= count), number, found)
        return found

    def going(state):
        at, _ = state
        return (at.place.turn < grid.groups) & (cut(at) == 1)

    def step(state):
        at, carry = state
        carry = body(*tile_of(at.place, at.first + mine), carry)
        first = at.first + count
        place = seek(at.end, first + mine)
        return _Round(first, at.end, place, seek(place, first + count - 1) if pieces else place), carry

    begin = schedule.begin(grid, sizes, extents)
    place = seek(begin, mine)
    # The end of the first round is not looked up: for it stands a place before it, and not behind the last group.
    end = jax.tree.map(lambda a, b: jnp.where(place.turn < grid.groups, a, b), place, begin)
    at, carry = lax.while_loop(going, step, (_Round(jnp.int32(0), begin, place, end), init))
    if not pieces:
        return carry, None
    number = cut(at)
    number = jnp.where(mine < (at.end.first - at.first) * number, number, 1)
    slot = at.first + lax.div(mine, number)
    group, tile = tile_of(seek(at.before, slot), slot)
    width = lax.div(jnp.int32(grid.block_n // grid.unit), number)
    return carry, Piece(number, group, tile._replace(column=tile.column + lax.rem(mine, number) * width))
