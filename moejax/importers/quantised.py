"""What a tensor of a checkpoint stands for: its values as they are, or those of a block-quantised form.

Every source has a logical ``shape`` and gives any rectangle of it. Quantised ones come in float32 and read only the
blocks that the rectangle touches.
"""

import dataclasses
import math
from typing import Protocol

import ml_dtypes
import numpy as np

from moejax.importers.files import DTYPES, Tensor

PLAIN = ("F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
_POSITIVE = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1 = np.concatenate([_POSITIVE, -_POSITIVE])
"""Values of four bits: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)."""
_PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1).view(np.uint64)[:, 0]
"""For each byte its two values, the lower nibble's first, as eight bytes that are looked up at once."""
MXFP4_BLOCK = 32
"""Values that share one scale."""

Rectangle = tuple[slice, ...]
"""One slice for each dimension, with start and stop, of step 1."""


class Source(Protocol):
    """A logical tensor of the checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def read(self, where: Rectangle) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """Values as they lie in the file; ``read`` gives a view of it."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def read(self, where: Rectangle) -> np.ndarray:
        return self.tensor.view()[where]


@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """Float8 values with one scale for each block of the last two dimensions (DeepSeek-V3: 128 x 128).

    ``w[i, j] = q[i, j] * scale[i // rows, j // columns]``; blocks at the edges are cut off where sizes do not divide.
    """

    tensor: Tensor
    scale: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.tensor, self.scale

    def read(self, where: Rectangle) -> np.ndarray:
        *lead, rows, columns = where
        values = _float8(self.tensor)[self.tensor.view()[where].view(np.uint8)]
        grid = self.scale.view()[(*lead, _blocks(rows, self.block[0]), _blocks(columns, self.block[1]))]
        grid = _scales(grid, self.scale.dtype)
        of_row = np.repeat(grid, self.block[0], axis=-2)[..., rows.start % self.block[0] :, :]
        of_row = of_row[..., : rows.stop - rows.start, :]
        edge = columns.start // self.block[1] * self.block[1] - columns.start
        for j in range(grid.shape[-1]):
            part = slice(max(edge + j * self.block[1], 0), edge + (j + 1) * self.block[1])
            values[..., part] *= of_row[..., j : j + 1]
        return values


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """Four-bit values, two in a byte with the lower nibble first, and a power of two for every 32 of them (gpt-oss).

    ``blocks [..., R, G, 16]`` and ``scales [..., R, G]`` stand for ``[..., R, 32 G]``; a scale s means 2^(s - 127), and
    255 is not a number (OCP Microscaling Formats 1.0).
    """

    blocks: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, groups, size = self.blocks.shape
        return (*lead, groups * size * 2)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.blocks, self.scales

    def read(self, where: Rectangle) -> np.ndarray:
        *lead, columns = where
        groups = _blocks(columns, MXFP4_BLOCK)
        values = _PAIRS[self.blocks.view()[(*lead, groups)]].view(np.float32)
        values *= _scales(self.scales.view()[(*lead, groups)], "U8")[..., None]
        flat = values.reshape(*values.shape[:-2], -1)
        return flat[..., columns.start % MXFP4_BLOCK :][..., : columns.stop - columns.start]


def _blocks(where: slice, size: int) -> slice:
    return slice(where.start // size, math.ceil(where.stop / size))


def _float8(tensor: Tensor) -> np.ndarray:
    """Float32 value of each of the 256 bytes."""
    return np.arange(256, dtype=np.uint8).view(DTYPES[tensor.dtype]).astype(np.float32)


def _scales(grid: np.ndarray, dtype: str) -> np.ndarray:
    """Scales in float32; bytes are exponents."""
    if dtype == "U8":
        grid = grid.view(ml_dtypes.float8_e8m0fnu)
    return grid.astype(np.float32)
