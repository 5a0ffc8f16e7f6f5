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

from kernels_pallas.grouped_matmul import groups

# Fields of one entry of the table, in this order.
ROW, COUNT, GROUP, COLUMN, DEPTH, SHARED = range(6)
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
    *,
    max_columns: int,
    block_m: int,
    cluster: int,
    band: int,
) -> Schedule:
    """The schedule of a grouped matmul: `columns` column tiles and `depth` steps along K for each group.

    Entry: first row, rows that belong to the group, group, column tile, depth, which operand the cluster shares.
    """
    start, end = groups.bounds(group_sizes, rows)
    size = end - start
    tiles = (size + block_m - 1) // block_m
    columns = jnp.broadcast_to(jnp.asarray(columns, jnp.int32), size.shape)
    depth = jnp.broadcast_to(jnp.asarray(depth, jnp.int32), size.shape)
    pairs, odd = tiles // cluster, tiles % cluster
    slots = pairs * columns + odd * ((columns + 1) // cluster)
    last = jnp.cumsum(slots)
    capacity = max_slots(rows, size.shape[0], max_columns, block_m, cluster)

    slot = jnp.arange(capacity, dtype=jnp.int32)
    # One masked sum over groups for each quantity: small, and XLA makes one kernel of all of them.
    done = last[None, :] <= slot[:, None]
    group = jnp.minimum(jnp.sum(done, 1, dtype=jnp.int32), size.shape[0] - 1)
    mine = group[:, None] == jnp.arange(size.shape[0], dtype=jnp.int32)

    def of_group(x: Array) -> Array:
        return jnp.sum(jnp.where(mine, x[None, :], 0), 1, dtype=jnp.int32)[:, None]

    first, size, start = of_group(last - slots), of_group(size), of_group(start)
    pairs, columns, depth = of_group(pairs), of_group(columns), of_group(depth)
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
        jnp.zeros_like(row),
        jnp.zeros_like(row),
    ]
    return Schedule(jnp.stack(fields, -1).reshape(-1), last[-1:])
