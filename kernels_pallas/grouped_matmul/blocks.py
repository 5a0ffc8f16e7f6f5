"""Rows of groups laid out in blocks of equal size `[G, R, N]`, so that one batched matmul serves them all.

Both directions are gathers (each row has one place), never scatters: deterministic, and fast on accelerators.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.grouped_matmul import groups


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Where rows go.

    Attributes:
        rows: the row in each place, P (out of bounds) for none.
        places: the place of each row, G R (out of bounds) for none.
    """

    rows: Int[Array, "G R"]
    places: Int[Array, "P"]

    def gather(self, x: Shaped[Array, "P N"]) -> Shaped[Array, "G R N"]:
        """Rows into blocks; places without a row are zero."""
        return x.at[self.rows].get(mode="fill", fill_value=0)

    def restore(self, y: Shaped[Array, "G R N"], otherwise: Shaped[Array, "P N"] | None = None) -> Shaped[Array, "P N"]:
        """Blocks back into rows; rows without a place come from `otherwise` (zero by default)."""
        flat = y.reshape(-1, y.shape[-1]).at[self.places].get(mode="fill", fill_value=0)
        if otherwise is None:
            return flat
        return jnp.where((self.places < self.rows.size)[:, None], flat, otherwise)


def capacity(start: Array, end: Array, rows: int, size: int, skip: int | Array = 0) -> Blocks:
    """One block for each group: its rows `skip .. skip + size`."""
    experts = start.shape[0]
    source = (start + skip)[:, None] + jnp.arange(size, dtype=jnp.int32)
    source = jnp.where(source < end[:, None], source, rows)
    group = groups.row_group(end, rows)
    within = jnp.arange(rows, dtype=jnp.int32) - start.at[group].get(mode="fill", fill_value=0) - skip
    inside = (group < experts) & (within >= 0) & (within < size)
    return Blocks(source, jnp.where(inside, group * size + within, experts * size))


def count(rows: int, experts: int, size: int) -> int:
    """Blocks of `size` rows that always suffice: the most that `rows` rows in `experts` groups can touch."""
    return (rows + min(rows, experts) * (size - 1)) // size


def tiled(start: Array, end: Array, rows: int, size: int) -> tuple[Blocks, Int[Array, "G"]]:
    """As many blocks for a group as it needs, group after group; and each block's group (E if unused)."""
    experts, n = start.shape[0], count(rows, start.shape[0], size)
    needed = (end - start + size - 1) // size
    after = jnp.cumsum(needed, dtype=jnp.int32)
    first = after - needed
    owner = groups.row_group(after, n)
    known = jnp.minimum(owner, experts - 1)
    source = (start[known] + (jnp.arange(n, dtype=jnp.int32) - first[known]) * size)[:, None]
    source = source + jnp.arange(size, dtype=jnp.int32)
    source = jnp.where((owner < experts)[:, None] & (source < end[known][:, None]), source, rows)
    group = groups.row_group(end, rows)
    mine = jnp.minimum(group, experts - 1)
    place = first[mine] * size + jnp.arange(rows, dtype=jnp.int32) - start[mine]
    return Blocks(source, jnp.where(group < experts, place, n * size)), owner


def owners(weights: Float[Array, "E K N"], owner: Int[Array, "G"]) -> Float[Array, "G K N"]:
    """Each block's copy of its group's weights (unused blocks take the last group's: their rows are zero)."""
    return weights.at[owner].get(mode="clip", indices_are_sorted=True)


def sum_by_owner(d: Float[Array, "G ..."], owner: Int[Array, "G"], experts: int) -> Float[Array, "E ..."]:
    """Sum over each group's blocks; unused blocks (owner E) are left out."""
    return jax.ops.segment_sum(d, owner, experts, indices_are_sorted=True)
