"""Which tile each step of the persistent grid computes, found inside the kernel while it walks through the groups.

The copying warpgroup walks: it keeps the group it is in, and moves on when its next slot lies beyond that group's last
one. A table made before the kernel would cost several small kernels, which is as long as decoding one token.

The rows of a group are cut into tiles of `block_m` rows. A group's last tile is moved back to end at the group's end
when the group has `block_m` rows or more: it computes some rows twice (the same bits, so that two blocks may write
them) and every store is a whole tile. Only a group of fewer rows than a tile needs a masked store.

A cluster of two blocks takes two tiles that share an operand, read once for both: two row tiles of a group (shared:
the group's matrix), or, for the odd row tile that is left, two column tiles (shared: the rows). So a group is
padded to one tile of rows, never to two.

Where extents limit columns, an expert's groups, in the order of falling extents, are not tiled each by itself. Instead
each place has the columns that its group has and the next one has not, for its own rows and those of the expert's
groups before it. So all rows of an expert that reach a column fill tiles together, and rows are padded as often as
without extents. A column tile that sticks out beyond a group's extent writes what the groups before it have there, the
same bits.

Where extents limit the depth, the order of groups is by part: see `Grid.by_part`.

Order within a group: bands of `band` row tiles (pairs in a cluster), row tiles first, so that what runs at one time
reads about as many rows as columns, and both stay in the L2 cache.

Everything here is scalar int32 and runs inside a kernel (on refs) as well as outside (on arrays).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.groups import EXTENT_BLOCK, ExtentAxis

AHEAD = 4
"""Groups that are read together on the walk."""
AHEAD_OF_FEW = 16
"""The same where most groups are empty, as in decoding a token: 0.1 to 0.7 us of 17 (H100)."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is known of a grouped matmul when it is compiled.

    Attributes:
        groups, rows: sizes of `group_sizes` and of the rows' axis.
        columns: N, columns of the result.
        steps: steps along K.
        block_m, block_n, block_k: rows, columns of the result, and depth of a tile.
        cluster, band: see above.
        extent_axis: what a group's extent limits, its columns or its depth; None without extents.
        parts: groups of an expert.
    """

    groups: int
    rows: int
    columns: int
    steps: int
    block_m: int
    block_n: int
    block_k: int
    cluster: int
    band: int
    extent_axis: ExtentAxis | None
    parts: int = 1

    @property
    def joined(self) -> bool:
        """Whether rows of an expert's groups fill tiles together."""
        return self.extent_axis == "n" and self.parts > 1

    @property
    def by_part(self) -> bool:
        """Whether all experts' first groups come first, then their second ones, and so on.

        Where extents limit the depth, tiles differ in how long they take, and in the order of rows a block may happen
        to get the long ones of many experts. The longest ones first, each kind is spread evenly.
        """
        return self.extent_axis == "k" and self.parts > 1

    @property
    def unit(self) -> int:
        """Columns that a tile's first column is counted in, so that the compiler knows what divides it."""
        return math.gcd(self.block_n, EXTENT_BLOCK)


class Place(NamedTuple):
    """A group on the walk: its turn, first slot, slots, first row, rows."""

    turn: Any
    first: Any
    slots: Any
    start: Any
    size: Any


class Tile(NamedTuple):
    """One tile: first row, rows of it that are the group's, first column in units, steps along K; whether the cluster
    shares the matrix."""

    row: Any
    count: Any
    column: Any
    depth: Any
    shares_rhs: Any


def _cdiv(a: Any, b: int) -> Any:
    """Of numbers from 0 on."""
    if b & (b - 1):
        return lax.div(a + (b - 1), jnp.int32(b))
    return lax.shift_right_logical(a + (b - 1), jnp.int32(b.bit_length() - 1))


def _extent(grid: Grid, extents: Any, index: Any) -> Any:
    """A group's extent, rounded, of what the axis has."""
    full = grid.columns if grid.extent_axis == "n" else grid.steps * grid.block_k
    extent = jnp.minimum(jnp.maximum(extents[index], 0), full)
    return jnp.minimum(_cdiv(extent, EXTENT_BLOCK) * EXTENT_BLOCK, full)


def _columns(grid: Grid, extents: Any, index: Any) -> tuple[Any, Any]:
    """The first column of a group's place, and how many column tiles it has."""
    left, limit = jnp.int32(0), jnp.int32(grid.columns)
    if grid.extent_axis == "n":
        limit = _extent(grid, extents, index)
        if grid.joined:
            following = jnp.minimum(_extent(grid, extents, jnp.minimum(index + 1, grid.groups - 1)), limit)
            left = jnp.where(lax.rem(index + 1, jnp.int32(grid.parts)) == 0, 0, following)
    return left, _cdiv(limit - left, grid.block_n)


def _slots(grid: Grid, size: Any, columns: Any) -> Any:
    tiles = _cdiv(size, grid.block_m)
    if grid.cluster == 1:
        return tiles * columns
    return lax.shift_right_logical(tiles, 1) * columns + (tiles & 1) * _cdiv(columns, 2)


def group_of(grid: Grid, turn: Any) -> Any:
    """The group of a turn; of a turn behind the last one, the last group."""
    turn = jnp.minimum(turn, grid.groups - 1)
    if not grid.by_part:
        return turn
    experts = jnp.int32(grid.groups // grid.parts)
    return lax.rem(turn, experts) * grid.parts + lax.div(turn, experts)


class _Ahead(NamedTuple):
    """What is known of a turn before the walk reaches it: rows of its group, column tiles, and, where turns go by part,
    the group's first row, or (`further`) how far it lies behind that of the turn before."""

    rows: Any
    columns: Any
    further: Any = None
    start: Any = None


def _ahead(grid: Grid, sizes: Any, extents: Any, turn: Any) -> _Ahead:
    """Of a turn; behind the last one no rows."""
    group = group_of(grid, turn)
    columns = _columns(grid, extents, group)[1]
    if not grid.by_part:
        return _Ahead(jnp.where(turn < grid.groups, sizes[group], 0), columns)
    expert, part = lax.div(group, jnp.int32(grid.parts)), lax.rem(group, jnp.int32(grid.parts))
    further, before = jnp.int32(0), jnp.int32(0)
    for i in range(grid.parts):
        of_this, of_last = sizes[expert * grid.parts + i], sizes[jnp.maximum(expert - 1, 0) * grid.parts + i]
        before = before + jnp.where(i < part, of_this, 0)
        further = further + jnp.where(i < part, 0, of_last)
    rows = jnp.where(turn < grid.groups, sizes[group], 0)
    return _Ahead(rows, columns, before + further, jnp.where(expert == 0, before, -1))


def begin(grid: Grid, sizes: Any, extents: Any) -> Place:
    """The first group."""
    zero = jnp.int32(0)
    size = jnp.minimum(sizes[zero], grid.rows)
    return Place(zero, zero, _slots(grid, size, _columns(grid, extents, zero)[1]), zero, size)


def seek(grid: Grid, sizes: Any, extents: Any, place: Place, slot: Any) -> Place:
    """The place of a slot, from an earlier one on; turn `groups` when there are fewer slots.

    The steps of this walk depend on one another, and the card is slow at that: no more than they need is in them.
    """

    def earlier(p: Place) -> Any:
        return (slot >= p.first + p.slots) & (p.turn < grid.groups)

    def following(p: Place, ahead: _Ahead) -> Place:
        turn, start, above = p.turn + 1, p.start + p.size, jnp.int32(0)
        if grid.by_part:
            start = jnp.where(ahead.start < 0, p.start + ahead.further, ahead.start)
        elif grid.joined:  # with the rows of the expert's groups before it
            same = lax.rem(turn, jnp.int32(grid.parts)) != 0
            start, above = jnp.where(same, p.start, start), jnp.where(same, p.size, 0)
        size = jnp.maximum(jnp.minimum(above + ahead.rows, grid.rows - start), 0)
        if grid.joined:
            size = jnp.where(turn < grid.groups, size, 0)
        return Place(turn, p.first + p.slots, _slots(grid, size, ahead.columns), start, size)

    def advance(p: Place) -> Place:
        # What is read does not depend on the walk, so it is read for several groups at a time.
        together = AHEAD_OF_FEW if grid.rows < grid.groups else AHEAD
        for ahead in [_ahead(grid, sizes, extents, p.turn + 1 + i) for i in range(together)]:
            p = jax.tree.map(functools.partial(jnp.where, earlier(p)), following(p, ahead), p)
        return p

    return lax.while_loop(earlier, advance, place)


def tile(grid: Grid, extents: Any, place: Place, slot: Any, block: Any) -> Tile:
    """What a block of the cluster computes in a slot of the place's group."""
    cluster = grid.cluster
    group = group_of(grid, place.turn)
    first_column, columns = _columns(grid, extents, group)
    depth = jnp.int32(grid.steps)
    if grid.extent_axis == "k":
        depth = _cdiv(_extent(grid, extents, group), grid.block_k)
    pairs = lax.div(_cdiv(place.size, grid.block_m), jnp.int32(cluster))
    odd = _cdiv(place.size, grid.block_m) - pairs * cluster
    within = slot - place.first
    wide = jnp.maximum(grid.band * columns, 1)
    bands = lax.div(within, wide)
    in_band = within - bands * wide
    width = jnp.maximum(jnp.minimum(grid.band, pairs - bands * grid.band), 1)
    column = lax.div(in_band, width)
    index = (bands * grid.band + in_band - column * width) * cluster + block
    shares_rhs = jnp.bool_(True)
    if cluster > 1:
        shares_rhs = (within < pairs * columns) | (odd == 0)
        # An odd number of column tiles: the second block repeats the last one.
        left = jnp.minimum((within - pairs * columns) * cluster + block, columns - 1)
        index, column = jnp.where(shares_rhs, index, pairs * cluster), jnp.where(shares_rhs, column, left)
    row = place.start + jnp.minimum(index * grid.block_m, jnp.maximum(place.size - grid.block_m, 0))
    column = lax.div(first_column, jnp.int32(grid.unit)) + column * (grid.block_n // grid.unit)
    return Tile(row, jnp.minimum(place.size, grid.block_m), column, depth, shares_rhs)
