"""Parameters from a matched folder, straight into their sharding.

Each process reads, for each shard of its own devices, the byte ranges of that shard alone, from memory maps; the host
holds one shard at a time. Orbax v1 reads safetensors too, each tensor as it lies in the file. Our parameters are
stacked over layers and experts and transposed, so its result would have to be put together afterwards, on devices that
then hold a parameter twice, from as many arrays as there are experts in all layers, none of which can be split over the
mesh's expert axis; and it leaves no place for dequantisation. So the arrays are made here, by the sharding's own map of
devices to indices. (Memory of the host alone decides nothing on one device: both need one parameter beyond the model,
if the allocator returns what many small arrays leave behind, and Orbax five times that if it does not. Rows:
``experiments.load_memory``.)
"""

import collections
import concurrent.futures
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moejax.importers import tiles
from moejax.importers.matching import Match, Piece
from moejax.importers.quantised import Plain

Index = tuple[slice, ...]
THREADS = 16


def fill(match: Match, leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters by path. Each leaf says type and sharding."""
    arrays = {}
    for name, leaf in leaves.items():
        pieces = match.pieces[name]
        arrays[name] = place(leaf, lambda where, p=pieces, leaf=leaf: read(p, where, leaf.dtype))
        logging.getLogger("absl").debug("read %s %s %s", name, leaf.dtype, leaf.shape)
    return arrays


def place(leaf: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array in ``leaf.sharding``, each part of it read once and copied to the devices that hold it."""
    sharding = leaf.sharding
    assert sharding is not None
    parts: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), leaf.shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in parts.items():
        part = read(tuple(slice(*b) for b in bounds))
        arrays += [jax.device_put(part, device) for device in devices]
        jax.block_until_ready(arrays)  # copies are asynchronous: without it the host would hold them all
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays, dtype=leaf.dtype)


def read(pieces: list[Piece], where: Index, dtype: Any) -> np.ndarray:
    """A rectangle of one parameter; several pieces at a time, as copies leave Python's lock to others."""
    out = np.empty([s.stop - s.start for s in where], dtype)

    def one(piece: Piece) -> None:
        lead = [i - s.start for i, s in zip(piece.lead, where, strict=False)]
        if all(0 <= at < s.stop - s.start for at, s in zip(lead, where, strict=False)):
            _copy(piece, where[len(lead) :], out[tuple(lead)] if lead else out)
            for tensor in piece.source.tensors:
                tensor.release()

    with concurrent.futures.ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1, THREADS)) as pool:
        collections.deque(pool.map(one, pieces), maxlen=0)
    return out


def _copy(piece: Piece, where: Index, out: np.ndarray) -> None:
    """``out`` becomes the rectangle ``where`` of the piece's target."""
    row = piece.row
    if not isinstance(piece.source, Plain) and len(where) == 3 and len(out) > 1 and row.permutation[0] == 0:
        for i in range(len(out)):  # expert by expert: dequantised values take memory, those of a file are a view
            _copy(piece, (slice(where[0].start + i, where[0].start + i + 1), *where[1:]), out[i : i + 1])
        return
    wanted: list[range] = [range(0)] * len(row.factored)
    for s, axis in zip(where, row.permutation, strict=True):
        wanted[axis] = row.taken[axis][s]
    rectangle, within, axis = [], [], 0
    for size in row.shape:
        factors = size if isinstance(size, tuple) else (size,)
        first = wanted[axis]
        inner = int(np.prod(factors[1:], dtype=np.int64))
        rectangle.append(slice(first.start * inner, (first[-1] + 1) * inner if first else first.start * inner))
        within.append(slice(0, None, first.step))
        within += [slice(r.start, r.stop, r.step) for r in wanted[axis + 1 : axis + len(factors)]]
        axis += len(factors)
    values = piece.source.read(tuple(rectangle))
    shape = [n for size, r in zip(row.shape, rectangle, strict=True) for n in _factors(size, r.stop - r.start)]
    tiles.copy(out, values.reshape(shape)[tuple(within)].transpose(row.permutation))


def _factors(size: int | tuple[int, ...], length: int) -> tuple[int, ...]:
    if not isinstance(size, tuple):
        return (length,)
    return (length // int(np.prod(size[1:], dtype=np.int64)), *size[1:])
