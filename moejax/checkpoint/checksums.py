"""Checksums of what a checkpoint holds: made beside the save, compared at every read.

Orbax keeps none of its own for arrays: a flipped bit would be loaded without a word. The record is one JSON file in
the step folder with zlib's CRC-32 of each array's bytes (little-endian, C order, the whole global array, so that it
depends on no mesh), of the JSON text beside them, and of itself; and with the validation score, by which the best
checkpoint is chosen.
"""

import asyncio
import json
import os
import zlib
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

ITEM, FILE = "checksums", "checksums.json"
_THREADS = min(8, os.cpu_count() or 1)


class Damaged(ValueError):
    """What was read is not what was saved."""


def crc32(data: Any) -> str:
    """8 hex digits of the CRC-32 of an array's bytes in C order, or of a text's in UTF-8."""
    if isinstance(data, str):
        return f"{zlib.crc32(data.encode()):08x}"
    return f"{zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8)):08x}"


def of_arrays(makers: Mapping[str, Callable[[], np.ndarray] | None]) -> dict[str, str | None]:
    """Checksum of each array, several at a time; None stays None."""
    with ThreadPoolExecutor(_THREADS) as pool:  # zlib lets other threads run
        found = pool.map(lambda make: None if make is None else crc32(make()), makers.values())
        return dict(zip(makers, found, strict=True))


def of_values(arrays: Mapping[str, Any]) -> dict[str, str | None]:
    """Checksum of each array, those of the device copied to the host; None as in :func:`on_host`."""
    return of_arrays({name: on_host(array) for name, array in arrays.items()})


def on_host(leaf: Any) -> Callable[[], np.ndarray] | None:
    """Copies ``leaf`` to the host now and puts the whole array together when it is called.

    None where other processes hold a part of it: such an array has no checksum.
    """
    if not isinstance(leaf, jax.Array):
        value = np.array(leaf)
        return lambda: value
    if leaf.is_fully_replicated:
        value = np.asarray(leaf.addressable_data(0))
        return lambda: value
    if not leaf.is_fully_addressable:
        return None
    parts = [(shard.index, np.asarray(shard.data)) for shard in leaf.addressable_shards if shard.replica_id == 0]

    def whole() -> np.ndarray:
        out = np.empty(leaf.shape, leaf.dtype)  # shape and type outlive a donated array
        for index, part in parts:
            out[index] = part
        return out

    return whole


class Checksums:
    """Orbax's ``StatefulCheckpointable``: arrays are copied to the host at once, the rest is done beside the save."""

    def __init__(self, arrays: Mapping[str, Any], text: str, score: float | None) -> None:
        self.arrays, self.text, self.score = arrays, text, score

    async def save(self, directory: Any) -> Awaitable[None]:
        for leaf in self.arrays.values():
            if isinstance(leaf, jax.Array):
                for shard in leaf.addressable_shards:  # the same buffers that Orbax asks for: they are copied once
                    shard.data.copy_to_host_async()
        makers = {name: on_host(leaf) for name, leaf in self.arrays.items()}

        async def write() -> None:
            folder = Path(await directory.await_creation())
            if jax.process_index() == 0:
                await asyncio.to_thread(self._write, folder, makers)

        return write()

    def _write(self, folder: Path, makers: Mapping[str, Callable[[], np.ndarray] | None]) -> None:
        record = {"meta": crc32(self.text), "score": self.score, "arrays": of_arrays(makers)}
        content = {"algorithm": "CRC-32 (zlib) of the bytes in C order", "record": record, "crc32": _of_record(record)}
        with (folder / FILE).open("w", encoding="utf-8") as file:  # the folder's own rename makes it count
            json.dump(content, file, indent=0)
            file.flush()
            os.fsync(file.fileno())

    async def load(self, directory: Any) -> Awaitable[None]:
        raise NotImplementedError("the record is read as a file: moejax.checkpoint.checksums.read")


def _of_record(record: Mapping[str, Any]) -> str:
    return crc32(json.dumps(record, sort_keys=True))


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a step folder: ``meta``, ``score`` and ``arrays``; None in one made before there were records.

    Raises:
      Damaged: it is not what was written, or is gone.
    """
    path = folder / ITEM / FILE
    if not path.exists():
        listing = folder / "_CHECKPOINT_METADATA"  # Orbax's list of what a step folder holds
        if not listing.exists() or f'"{ITEM}"' in listing.read_text(encoding="utf-8", errors="replace"):
            raise Damaged("its record of checksums is missing")
        return None
    try:
        content = json.loads(path.read_bytes())
        record = content["record"]
        whole = content["crc32"] == _of_record(record) and isinstance(record["arrays"], dict)
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"its record of checksums is damaged ({error})") from error
    if not whole:
        raise Damaged("its record of checksums is damaged")
    return record


def compare(record: Mapping[str, Any], arrays: Mapping[str, Callable[[], np.ndarray] | None], text: str) -> None:
    """Raises Damaged where arrays, named as in the record, or the text differ from what was saved."""
    if record["meta"] != crc32(text):
        raise Damaged("its JSON text (config, step, position in the data) is not what was saved")
    known = {name: make for name, make in arrays.items() if record["arrays"][name] is not None}
    found = of_arrays(known)
    wrong = [name for name in known if found[name] is not None and found[name] != record["arrays"][name]]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(
            f"array {wrong[0]!r}{more} is not what was saved: CRC-32 {found[wrong[0]]}, "
            f"at its save {record['arrays'][wrong[0]]}"
        )
