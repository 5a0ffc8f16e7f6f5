"""Safetensors files: names, types and shapes from their headers, values by memory map, and a writer.

A file is eight bytes (length n of the header, little endian), n bytes of JSON (``{name: {dtype, shape,
data_offsets}}``) and the values, row-major, without gaps. Nothing in it is executed. The ``safetensors`` library reads
bfloat16 into NumPy but not float8 (0.8.0), and keeps every page that was read in memory until the file is closed; hence
this reader.
"""

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moejax.config import ConfigError

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file; its values stay there until they are asked for."""

    name: str
    path: Path
    dtype: str
    """As the format writes it, e.g. ``BF16``."""
    shape: tuple[int, ...]
    map: mmap.mmap = dataclasses.field(repr=False)
    start: int
    """Byte of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def view(self) -> np.ndarray:
        """The values as a view of the file: only what is copied from it is read."""
        flat = np.frombuffer(self.map, DTYPES[self.dtype], math.prod(self.shape), self.start)
        return flat.reshape(self.shape)

    def release(self) -> None:
        """Lets the system take back the memory of pages that were read."""
        first = self.start // mmap.PAGESIZE * mmap.PAGESIZE
        if self.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, first, self.start + self.nbytes - first)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ConfigError: no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object: copy it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name: of the files that its index names, or of its one file.

    Raises:
      ConfigError: no safetensors there, a file missing, cut short or damaged, a tensor in two files, or an index that
        tells of tensors that are not there.
    """
    index = folder / INDEX
    places = _weight_map(index) if index.is_file() else None
    if places is not None:
        paths = [folder / name for name in sorted(set(places.values()))]
        gone = [path.name for path in paths if not path.is_file()]
        if gone:
            raise ConfigError(
                f"{folder} lacks {len(gone)} of the {len(paths)} files that {INDEX} names: {_short(gone)}. "
                "The download or copy is incomplete: fetch them too"
            )
        if (folder / SINGLE).is_file() and SINGLE not in places.values():
            raise ConfigError(f"{folder} has {SINGLE} and an index that does not name it: remove the one that is stale")
    else:
        paths = [_single(folder)]
    found: dict[str, Tensor] = {}
    for path in paths:
        for tensor in open_file(path):
            if tensor.name in found:
                raise ConfigError(
                    f"{folder}: tensor {tensor.name} is in {found[tensor.name].path.name} and in {path.name}: "
                    "the files are of two different checkpoints"
                )
            found[tensor.name] = tensor
    if places is not None:
        lost = [n for n, file in places.items() if n not in found or found[n].path.name != file]
        if lost:
            raise ConfigError(
                f"{index} names {len(lost)} tensors that are not in the files it gives: {_short(lost)}. "
                "The index and the files are of two different checkpoints, or a file was replaced"
            )
    return found


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ConfigError(f"{index} has no weight_map of tensor names to file names: copy it again")
    outside = sorted({file for file in places.values() if Path(file).name != file or not file.endswith(".safetensors")})
    if outside:
        raise ConfigError(f"{index} names {_short(outside)}: only safetensors files beside it are read")
    return places


def _single(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) == 1:
        return folder / others[0]
    if others:
        raise ConfigError(f"{folder} has {len(others)} safetensors files and no {INDEX}: copy the index too")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{folder} has its weights as {_short(pickles)} only: such files are pickles, which run code when they are "
            "read, and are refused. Convert them with transformers (save_pretrained writes safetensors)"
        )
    raise ConfigError(f"{folder} has no {SINGLE} and no {INDEX}: the weights are missing")


def open_file(path: Path) -> list[Tensor]:
    """The tensors of one file, after checking its header against its length.

    Raises:
      ConfigError: the file is damaged or cut short.
    """

    def damaged(why: str) -> ConfigError:
        return ConfigError(f"{path} is damaged: {why}. Copy or download it again")

    size = path.stat().st_size
    if size < 8:
        raise damaged(f"it has {size} bytes, too few for a header")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise damaged(f"its header would have {length} bytes, and the file has {size}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise damaged(f"its header is no JSON ({error})") from error
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if not isinstance(header, dict):
        raise damaged("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, ends = [], []
    for name, entry in header.items():
        if not _well_formed(entry):
            raise damaged(f"the header's entry of {name} is {json.dumps(entry)[:100]}")
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"{path}: tensor {name} has type {entry['dtype']}; read are {', '.join(DTYPES)}")
        first, last = entry["data_offsets"]
        tensor = Tensor(name, path, entry["dtype"], tuple(entry["shape"]), whole, 8 + length + first)
        if last - first != tensor.nbytes:
            raise damaged(f"{name} has shape {list(tensor.shape)} of {tensor.dtype} and {last - first} bytes")
        tensors.append(tensor)
        ends.append((first, last))
    at = 0
    for first, last in sorted(ends):
        if first != at:
            raise damaged(f"its tensors overlap or leave a gap at byte {at} of the values")
        at = last
    if 8 + length + at != size:
        raise damaged(f"its header tells of {8 + length + at} bytes, and it has {size}: the file was cut short or grew")
    return tensors


def _well_formed(entry: Any) -> bool:
    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and naturals(entry.get("shape"))
        and naturals(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _short(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")


# --- writing --------------------------------------------------------------------------------------------------------

Specs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type, as the format writes it, and shape of each tensor by name."""


def write_files(folder: Path, specs: Specs, value: Callable[[str], np.ndarray], max_bytes: int) -> None:
    """Writes the tensors into one file, or into several of at most ``max_bytes`` (or one tensor) with an index.

    One tensor at a time is in memory.

    Args:
      folder: exists and is empty of such files.
      value: the tensor of a name, of the type and shape in ``specs``.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = _nbytes(spec)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    total = sum(_nbytes(spec) for spec in specs.values())
    places = {}
    for i, names in enumerate(groups):
        file = SINGLE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / file, {name: specs[name] for name in names}, value)
        places |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _nbytes(spec: tuple[str, tuple[int, ...]]) -> int:
    return math.prod(spec[1]) * DTYPES[spec[0]].itemsize


def _write_file(path: Path, specs: Specs, value: Callable[[str], np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec[0], "shape": list(spec[1]), "data_offsets": [at, at + _nbytes(spec)]}
        at += _nbytes(spec)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of eight
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in specs.items():
            array = value(name)
            assert array.shape == shape and array.dtype == DTYPES[dtype], name  # else the header would lie
            file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        file.flush()
        os.fsync(file.fileno())
