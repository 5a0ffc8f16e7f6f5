"""A model as a Hugging Face folder, along the same tables that import reads by."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from moejax.config import ConfigError, ModelConfig
from moejax.importers import files, tiles
from moejax.importers.config_json import write_config
from moejax.importers.files import DTYPES
from moejax.importers.matching import blocks, prediction_modules
from moejax.importers.tables import TABLES, Row, is_float32

BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""Files that are copied from the folder that a model came from."""
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range")
"""Keys that are taken over from its config.json."""
NAMES = {"float32": "F32", "bfloat16": "BF16"}
FILE_BYTES = 5_000_000_000
Format = Literal["per_expert", "fused"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one parameter gives to a tensor."""

    path: str
    lead: tuple[int, ...]
    row: Row


def write(
    params: Mapping[str, Any], config: ModelConfig, path: Path, *, family: str | None, layout: Format,
    dtype: Dtype | None, source: Path | None, context: int | None, file_bytes: int = FILE_BYTES,
) -> str:  # fmt: skip
    """:func:`moejax.importers.write` for parameters by path; returns the family.

    Raises:
      ConfigError: see there.
    """
    if jax.process_count() > 1:
        raise ConfigError("export runs in one process: start it without --distributed, on a checkpoint")
    params, config = _without_scale(dict(params), config)
    carried = files.read_json(source / "config.json") if source else {}
    length = carried.get("max_position_embeddings", carried.get("max_seq_len"))  # DBRX's name of it
    raw = write_config(config, family, context or length)
    raw |= {
        key: carried[key] for key in CARRIED if key in carried and (key != "max_position_embeddings" or not context)
    }
    family = raw["model_type"]
    dtype = dtype or ("bfloat16" if _bfloat16(params) else "float32")
    raw["torch_dtype"] = dtype
    tensors = _tensors(family, config, layout)
    small = {
        name: NAMES[dtype] if _exact(value, dtype) else "F32" for name, value in params.items() if is_float32(name)
    }
    specs = {name: (small.get(parts[0].path, NAMES[dtype]), parts[0].row.stored) for name, parts in tensors.items()}
    host = _Host(params)
    with new_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files.write_files(
            folder, specs, lambda name: _assembled(host, tensors[name], DTYPES[specs[name][0]]), file_bytes
        )
        for name in BESIDE if source else ():
            assert source is not None
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if family == "longcat_flash" and layout == "per_expert" and config.moe.zero_experts:
        logging.getLogger("absl").warning(
            "%s is in the published layout, which transformers 4 and vLLM read; transformers 5.17 cannot load it where "
            "there are zero-computation experts: for that write the fused layout", path,
        )  # fmt: skip
    logging.getLogger("absl").info("%s: %s, %d tensors, %s, experts %s", path, family, len(tensors), dtype, layout)
    return family


def _without_scale(params: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """No family multiplies embeddings by sqrt(D): the product is written, and the matrix of the logits apart."""
    if not config.scale_embeddings:
        return params, config
    embed = np.asarray(jax.device_get(params["embed"]))
    params.setdefault("unembed", params["embed"])
    params["embed"] = (embed.astype(np.float32) * np.float32(math.sqrt(config.dim))).astype(embed.dtype)
    logging.getLogger("absl").info("model.scale_embeddings is written as embeddings times %g", math.sqrt(config.dim))
    return params, dataclasses.replace(config, scale_embeddings=False, tie_embeddings=False)


def _bfloat16(params: Mapping[str, Any]) -> bool:
    return params["embed"].dtype == DTYPES["BF16"]


def _exact(value: Any, dtype: str) -> bool:
    """Whether a small array survives ``dtype``: norms and routers are float32 here, in most files they are not."""
    array = np.asarray(jax.device_get(value), np.float32)
    return bool(np.array_equal(array.astype(DTYPES[NAMES[dtype]]).astype(np.float32), array, equal_nan=True))


def _tensors(family: str, config: ModelConfig, layout: Format) -> dict[str, list[_Part]]:
    """The parts of every tensor, by name."""
    table = TABLES[family](config)
    found: dict[str, list[_Part]] = {}

    def add(rows: tuple[Row, ...], path: str, lead: tuple[int, ...], prefix: str) -> None:
        chosen: dict[str, Row] = {}
        for row in rows:
            kind = row.layout or layout
            if kind == layout or (kind == "fused" and family == "gpt_oss"):  # which has no other
                # of two names of one tensor the first is the published one, the last that of the fused layout
                if row.target not in chosen or layout == "fused":
                    chosen[row.target] = row
        for target, row in chosen.items():
            for e, name in enumerate(row.names(prefix)):
                found.setdefault(name, []).append(_Part(path + target, (*lead, e) if row.count else lead, row))

    add(table.model, "", (), "")
    for layer, path, repeat, is_moe in sorted(blocks(config)):
        add(table.block(is_moe), path, (repeat,), table.layer.format(layer))
    rows = {row.target: row for row in table.model}
    for path, prefix, is_moe in prediction_modules(config):
        add(table.prediction, path, (), prefix)
        add(table.block(is_moe), path + "block/", (), prefix)
        found |= {prefix + name: [_Part(target, (), rows[target])] for name, target in table.copies.items()}
    return found


class _Host:
    """Parameters, of which the layer in work is on the host."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self.layer = functools.lru_cache(maxsize=4)(
            lambda path, repeat: np.asarray(jax.device_get(params[path][repeat]))
        )

    def value(self, part: _Part) -> np.ndarray:
        if not part.lead:
            return np.asarray(jax.device_get(self.params[part.path]))
        return self.layer(part.path, part.lead[0])[part.lead[1:]]


def _assembled(host: _Host, parts: list[_Part], dtype: np.dtype) -> np.ndarray:
    row = parts[0].row
    out = np.zeros(row.factored, dtype)  # fused rows of zero-computation experts stay 0
    for part in parts:
        view = out[tuple(slice(r.start, r.stop, r.step) for r in part.row.taken)].transpose(part.row.permutation)
        tiles.copy(view, host.value(part))
    return out.reshape(row.stored)


def check_new(path: Path) -> None:
    """Raises ConfigError unless a folder can be made at ``path``: nothing is overwritten."""
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is there and not empty: choose a new folder, nothing is overwritten")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first")


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A folder to write into, which becomes ``path`` when all went well and otherwise leaves nothing.

    Raises:
      ConfigError: see :func:`check_new`; or it cannot be made.
    """
    path = path.absolute()
    check_new(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): choose a folder that you may write") from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their maker alone
        os.rename(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
