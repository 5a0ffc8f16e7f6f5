"""Rows of groups laid out in blocks of equal size `[G, R, N]`, so that one batched matmul serves them all.

Both directions are gathers (each row has one place), never scatters: deterministic, and fast on accelerators.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

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
