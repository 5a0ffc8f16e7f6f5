"""Which tile each step of the persistent grid computes, found inside the kernel while it walks through the groups.

Each warpgroup walks by itself: it keeps the group it is in, and moves on when its next slot lies beyond that group's
last one. A table made before the kernel would cost several small kernels, which is as long as decoding one token.

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

Order within a group: bands of `band` row tiles (pairs in a cluster), row tiles first, so that what runs at one time
reads about as many rows as columns, and both stay in the L2 cache.

Everything here is scalar int32 and runs inside a kernel (on refs) as well as outside (on arrays).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.groups import EXTENT_BLOCK, ExtentAxis


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
    def unit(self) -> int:
        """Columns that a tile's first column is counted in, so that the compiler knows what divides it."""
        return math.gcd(self.block_n, EXTENT_BLOCK)


class Place(NamedTuple):
    """A group on the walk: its number, first slot, slots, first row, rows, first column, limit of columns, steps along
    K."""

    group: Any
    first: Any
    slots: Any
    start: Any
    size: Any
    left: Any
    limit: Any
    depth: Any


class Tile(NamedTuple):
    """One tile: first row, rows of it that are the group's, first column in units; whether the cluster shares the
    matrix."""

    row: Any
    count: Any
    column: Any
    shares_rhs: Any


def _cdiv(a: Any, b: int) -> Any:
    return lax.div(a + (b - 1), jnp.int32(b))


def _columns(grid: Grid, extents: Any, index: Any) -> Any:
    """A group's extent, rounded, of what the axis has."""
    full = grid.columns if grid.extent_axis == "n" else grid.steps * grid.block_k
    extent = jnp.minimum(jnp.maximum(extents[index], 0), full)
    return jnp.minimum(_cdiv(extent, EXTENT_BLOCK) * EXTENT_BLOCK, full)


def _enter(grid: Grid, sizes: Any, extents: Any, group: Any, first: Any, start: Any, above: Any) -> Place:
    """The place at a group's beginning; behind the last group a place without slots. `above`: rows of the expert's
    groups before it, where they are joined."""
    inside = group < grid.groups
    index = jnp.minimum(group, grid.groups - 1)
    size = jnp.where(inside, jnp.minimum(above + sizes[index], grid.rows - start), 0)
    left, limit, depth = jnp.int32(0), jnp.int32(grid.columns), jnp.int32(grid.steps)
    if grid.extent_axis == "n":
        limit = _columns(grid, extents, index)
        if grid.joined:
            following = jnp.minimum(_columns(grid, extents, jnp.minimum(index + 1, grid.groups - 1)), limit)
            left = jnp.where(lax.rem(index + 1, jnp.int32(grid.parts)) == 0, 0, following)
    elif grid.extent_axis == "k":
        depth = _cdiv(_columns(grid, extents, index), grid.block_k)
    tiles, columns = _cdiv(size, grid.block_m), _cdiv(limit - left, grid.block_n)
    if grid.cluster == 1:
        slots = tiles * columns
    else:
        slots = lax.shift_right_logical(tiles, 1) * columns + (tiles & 1) * _cdiv(columns, 2)
    return Place(group, first, slots, start, size, left, limit, depth)


def begin(grid: Grid, sizes: Any, extents: Any) -> Place:
    """The first group."""
    return _enter(grid, sizes, extents, jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def seek(grid: Grid, sizes: Any, extents: Any, place: Place, slot: Any) -> Place:
    """The group of a slot, from an earlier place on; `groups` when there are fewer slots."""

    def earlier(p: Place) -> Any:
        return (slot >= p.first + p.slots) & (p.group < grid.groups)

    def advance(p: Place) -> Place:
        group, start, above = p.group + 1, p.start + p.size, jnp.int32(0)
        if grid.joined:
            same = lax.rem(group, jnp.int32(grid.parts)) != 0
            start, above = jnp.where(same, p.start, start), jnp.where(same, p.size, 0)
        return _enter(grid, sizes, extents, group, p.first + p.slots, start, above)

    return lax.while_loop(earlier, advance, place)


def tile(grid: Grid, place: Place, slot: Any, block: Any) -> Tile:
    """What a block of the cluster computes in a slot of the place's group."""
    cluster = grid.cluster
    columns = _cdiv(place.limit - place.left, grid.block_n)
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
    column = lax.div(place.left, jnp.int32(grid.unit)) + column * (grid.block_n // grid.unit)
    return Tile(row, jnp.minimum(place.size, grid.block_m), column, shares_rhs)
