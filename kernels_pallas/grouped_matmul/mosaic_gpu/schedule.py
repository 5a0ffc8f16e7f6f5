"""Which tile each step of the persistent grid computes: found once on the device, before the kernel.

The rows of a group are cut into tiles of `block_m` rows. A group's last tile is moved back to end at the group's end
when the group has `block_m` rows or more: it computes some rows twice (the same bits, so that two blocks may write
them) and every store is a whole tile. Only a group of fewer rows than a tile needs a masked store.

A cluster of two blocks takes two tiles that share an operand, read once for both: two row tiles of a group (shared:
the group's matrix), or, for the odd row tile that is left, two column tiles (shared: the rows). So a group is
padded to one tile of rows, never to two.

Order within a group: bands of `band` row tiles (pairs in a cluster), row tiles first, so that what runs at one time
reads about as many rows as columns, and both stay in the L2 cache.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

# Fields of one entry of the table, in this order.
ROW, COUNT, GROUP, COLUMN, DEPTH, SHARED, LIMIT = range(7)
FIELDS = 8  # padded, so that an entry is one aligned 32-byte read
SHARE_RHS, SHARE_LHS = 0, 1


class Schedule(NamedTuple):
    """`table[(slot * cluster + block) * FIELDS + field]` and the number of slots in use, `[1]`."""

    table: Int[Array, "S"]
    slots: Int[Array, "1"]


def max_slots(rows: int, num_groups: int, columns: int, block_m: int, cluster: int) -> int:
    """An upper bound of the slots, for any group sizes: `columns` is the number of column tiles."""
    tiles = -(-rows // block_m) + num_groups - 1
    if cluster == 1:
        return max(1, tiles * columns)
    odd = min(num_groups, tiles)
    return max(1, (tiles * columns + odd * (columns % 2)) // 2 + odd)


def row_schedule(
    group_sizes: Int[Array, "G"],
    rows: int,
    columns: Int[Array, "G"] | int,
    depth: Int[Array, "G"] | int,
    limit: Int[Array, "G"] | int,
    *,
    max_columns: int,
    block_m: int,
    cluster: int,
    band: int,
) -> Schedule:
    """The schedule of a grouped matmul: a group has `columns` column tiles, `limit` columns, `depth` steps along K.

    Entry: first row, rows of the group, group, column tile, depth, which operand the cluster shares, limit.
    """
    num_groups = group_sizes.shape[0]
    index = jnp.arange(num_groups, dtype=jnp.int32)
    earlier = index[None, :] < index[:, None]

    def sum_before(x: Array) -> Array:
        # A masked sum is one small kernel; a cumulative sum is several.
        return jnp.sum(jnp.where(earlier, x[None, :], 0), 1, dtype=jnp.int32)

    sizes = group_sizes.astype(jnp.int32)
    start = jnp.minimum(sum_before(sizes), rows)
    size = jnp.minimum(start + sizes, rows) - start
    tiles = (size + block_m - 1) // block_m
    columns = jnp.broadcast_to(jnp.asarray(columns, jnp.int32), size.shape)
    depth = jnp.broadcast_to(jnp.asarray(depth, jnp.int32), size.shape)
    limit = jnp.broadcast_to(jnp.asarray(limit, jnp.int32), size.shape)
    pairs, odd = tiles // cluster, tiles % cluster
    slots = pairs * columns + odd * ((columns + 1) // cluster)
    first = sum_before(slots)
    last = first + slots
    capacity = max_slots(rows, num_groups, max_columns, block_m, cluster)

    slot = jnp.arange(capacity, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(last[None, :] <= slot[:, None], 1, dtype=jnp.int32), num_groups - 1)

    def of_group(x: Array) -> Array:
        return x.at[group].get(mode="promise_in_bounds")[:, None]

    first, size, start, pairs = of_group(first), of_group(size), of_group(start), of_group(pairs)
    columns, depth, limit = of_group(columns), of_group(depth), of_group(limit)
    block = jnp.arange(cluster, dtype=jnp.int32)[None, :]
    within = slot[:, None] - first
    paired = within < pairs * columns

    wide = jnp.maximum(band * columns, 1)
    in_band = within % wide
    width = jnp.maximum(jnp.minimum(band, pairs - within // wide * band), 1)
    pair = within // wide * band + in_band % width
    left = within - pairs * columns
    tile = jnp.where(paired, pair * cluster + block, pairs * cluster)
    # An odd number of column tiles: the second block repeats the last one.
    column = jnp.where(paired, in_band // width, jnp.clip(left * cluster + block, 0, jnp.maximum(columns - 1, 0)))
    row = start + jnp.minimum(tile * block_m, jnp.maximum(size - block_m, 0))
    fields = [
        row,
        jnp.broadcast_to(jnp.minimum(size, block_m), row.shape),
        jnp.broadcast_to(group[:, None], row.shape),
        column,
        jnp.broadcast_to(depth, row.shape),
        jnp.broadcast_to(jnp.where(paired, SHARE_RHS, SHARE_LHS), row.shape),
        jnp.broadcast_to(limit, row.shape),
        jnp.zeros_like(row),
    ]
    return Schedule(jnp.stack(fields, -1).reshape(-1), last[-1:])
