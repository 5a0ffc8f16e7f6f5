"""How one block of the kernels of rows works (`rows.py`)."""

import dataclasses
from typing import Literal

from kernels_pallas.grouped_matmul.mosaic_gpu import walk
from kernels_pallas.grouped_matmul.mosaic_gpu.block import CONSUMERS


@dataclasses.dataclass(frozen=True)
class Config:
    """How one block works.

    Attributes:
        block_m, block_n: tile of a block; BLOCK_K columns of lhs are taken at a time.
        stages: tiles of operands in flight.
        cells: pieces of the result that a warpgroup has on their way out, each 64 rows of one swizzle.
        split: which side of the tile the two multiplying warpgroups divide.
        cluster: blocks that share an operand's copy, 1 or 2.
        band: clusters' row tiles that are worked on together.
        defer: a tile's result stays in registers, and is stored while the next tile is multiplied. Of one result of two
            bytes an element: for more there are not enough registers.
        divide: the tiles of the last round are divided among blocks that would wait for them (`walk.py`), without
            clusters, and where there are few rounds.
        few: of a tile with at most so many rows only these are copied (`heights`); 0: always all. Not of clusters, and
            not of divided tiles.
    """

    block_m: int = 128
    block_n: int = 256
    stages: int = 4
    cells: int = 2
    split: Literal["m", "n"] = "n"
    cluster: int = 1
    band: int = 8
    defer: bool = False
    divide: bool = False
    few: int = 0

    def cuts(self, width: int) -> tuple[walk.Cut, ...]:
        """How a tile of `width` columns may be cut: a warpgroup's are whole swizzles of 64. Where rows are halved too,
        a block has one warpgroup's, and the other has nothing to do."""
        least = 64 if self.split == "m" else 64 * CONSUMERS
        across = [n for n in (2, 3, 4) if width % (n * least) == 0] if self.divide and self.cluster == 1 else []
        return (*map(walk.Cut, across), *(walk.Cut(n, CONSUMERS) for n in across[-1:] if self.split == "m"))

    def heights(self, cut: walk.Cut) -> tuple[int, ...]:
        """How many rows may be copied of a tile that is cut so: `few`, four times as many and so on, and all.

        TMA takes about three cycles for a row of 128 bytes (H100), also for one that is not there. What lies in the
        place of the others does not matter: their results are not stored.
        """
        most, found = self.block_m // cut.rows, []
        if self.few and self.cluster == 1 and not self.divide:
            found = [self.few << 2 * i for i in range(most.bit_length()) if self.few << 2 * i < most]
        return *found, most
