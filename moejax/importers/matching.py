"""Which tensors fill which parameters of a model, decided from names, shapes and types before any value is read."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moejax.config import ConfigError, ModelConfig
from moejax.importers.files import Tensor
from moejax.importers.quantised import FLOAT8, MXFP4_BLOCK, PLAIN, BlockScaled, Mxfp4, Plain, Source
from moejax.importers.report import Problems
from moejax.importers.tables import LAYER, TABLES, Ignored, Row, Table
from moejax.model import layer_groups

FLOAT8_BLOCK = (128, 128)
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_COMPARED = 1 << 24


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a parameter: ``parameter[lead]`` is ``source``, along ``row``."""

    lead: tuple[int, ...]
    """Place in the stack: repeat of the group, and expert where each has a tensor."""
    row: Row
    source: Source


@dataclasses.dataclass
class Match:
    pieces: dict[str, list[Piece]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    """By parameter."""
    ignored: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    """Tensors that are not read, by reason."""
    layouts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Layers by how their experts lie."""


def blocks(config: ModelConfig) -> Iterable[tuple[int, str, int, bool]]:
    """For each layer: its number, the path of its block, its repeat in the stack, and whether it is MoE."""
    first = 0
    for g, (pattern, repeats) in enumerate(layer_groups(config)):
        for repeat in range(repeats):
            for b, is_moe in enumerate(pattern):
                yield first + repeat * len(pattern) + b, f"groups/{g}/blocks/{b}/", repeat, is_moe
        first += repeats * len(pattern)


def prediction_modules(config: ModelConfig) -> Iterable[tuple[str, str, bool]]:
    """For each multi-token-prediction module: its path, the beginning of its tensors' names, and whether it is MoE."""
    for k in range(config.mtp_layers):
        yield f"mtp/{k}/", LAYER.format(config.num_layers + k), layer_groups(config)[-1][0][-1]


def match(
    folder: Path, family: str, config: ModelConfig, raw: Mapping[str, Any], tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> Match:  # fmt: skip
    """Matches a folder's tensors to the parameters of a model.

    Args:
      raw: the folder's config.json.
      shapes: of every parameter of the model, by path.

    Raises:
      ConfigError: a parameter without a source, a tensor that is neither used nor known, or one of another shape or
        type; one error for all of them.
    """
    table = TABLES[family](config)
    search = _Search(tensors, _float8_block(folder, raw))
    search.add("", (), table.model, "")
    for layer, path, repeat, is_moe in blocks(config):
        layouts = search.add(path, (repeat,), table.block(is_moe), table.layer.format(layer))
        if layouts:
            search.found.layouts[" and ".join(layouts)] += 1
    for path, prefix, is_moe in prediction_modules(config):
        search.add_module(folder, table, path, prefix, is_moe)
    _check_table(family, search.targets, shapes)
    search.ignore(folder, table.ignored)
    if config.tie_embeddings:
        search.ignore_tied(folder)
    search.problems.unused = [name for name in tensors if name not in search.used]
    search.problems.raise_if_any(folder, config, tensors)
    return search.found


def _float8_block(folder: Path, raw: Mapping[str, Any]) -> tuple[int, int]:
    settings = raw.get("quantization_config") or {}
    block = (settings.get("weight_block_size") if isinstance(settings, dict) else None) or FLOAT8_BLOCK
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise ConfigError(
            f"{folder / 'config.json'}: weight_block_size={block!r} of quantization_config: expected two sizes"
        )
    return block[0], block[1]


class _Search:
    """Finds the sources of rows, and keeps what is missing or wrong."""

    def __init__(self, tensors: Mapping[str, Tensor], block: tuple[int, int]) -> None:
        self.tensors = tensors
        self.block = block
        self.found = Match()
        self.problems = Problems()
        self.used: set[str] = set()
        self.targets: dict[str, tuple[int, ...]] = {}
        """Shape of each parameter, without what it is stacked over, as the table has it."""

    def add(self, path: str, lead: tuple[int, ...], rows: Iterable[Row], prefix: str) -> list[str]:
        """Fills the parameters of one block, each from the row whose tensors are there; the layouts that were met."""
        choices: dict[str, list[Row]] = collections.defaultdict(list)
        sharing: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
        for row in rows:
            choices[row.target].append(row)
            sharing[row.source, row.layout].add(row.target)
        chosen = {target: self._choose(options, prefix) for target, options in choices.items()}
        for target, row in chosen.items():
            self.targets[path + target] = (row.count, *row.block) if row.count else row.block
            others = {
                t
                for t in sharing[row.source, row.layout]
                if chosen[t].source != row.source or chosen[t].layout != row.layout
            }
            if others and row.names(prefix)[0] in self.tensors:
                self.problems.wrong.append(
                    f"{row.names(prefix)[0]} also holds {', '.join(sorted(others))}, which another tensor gives too"
                )
            for e, source in enumerate(self._sources(row, prefix)):
                if source is not None:
                    self.found.pieces[path + target].append(Piece((*lead, e) if row.count else lead, row, source))
        present = {r.layout for r in chosen.values() if r.layout and any(n in self.tensors for n in r.names(prefix))}
        return sorted(present)

    def _choose(self, options: list[Row], prefix: str) -> Row:
        """The row whose tensors are there; of several, or of none, the first that has the most."""
        shares = [sum(n in self.tensors for n in r.names(prefix)) / len(r.names(prefix)) for r in options]
        return options[shares.index(max(shares))]

    def _sources(self, row: Row, prefix: str) -> list[Source | None]:
        names = row.names(prefix)
        self.used.update(names)
        if row.layout == "mxfp4":
            return [self._mxfp4(row, *names)]
        return [self._plain(row, name) for name in names]

    def _plain(self, row: Row, name: str) -> Source | None:
        tensor = self._tensor(name, row.stored)
        if tensor is None:
            return None
        if tensor.dtype in PLAIN:
            return Plain(tensor)
        if tensor.dtype not in FLOAT8 or len(tensor.shape) < 2:
            self.problems.wrong.append(f"{name} has type {tensor.dtype}, expected {', '.join((*PLAIN, *FLOAT8))}")
            return None
        grid = tuple(math.ceil(n / size) for n, size in zip(tensor.shape[-2:], self.block, strict=True))
        scale = self._tensor(name + "_scale_inv", (*tensor.shape[:-2], *grid), SCALES)
        self.used.add(name + "_scale_inv")
        return None if scale is None else BlockScaled(tensor, scale, self.block)

    def _mxfp4(self, row: Row, blocks: str, scales: str) -> Source | None:
        *outside, inner = row.stored
        groups = (*outside, math.ceil(inner / MXFP4_BLOCK))
        values = self._tensor(blocks, (*groups, MXFP4_BLOCK // 2), ("U8",))
        exponents = self._tensor(scales, groups, ("U8", "F8_E8M0"))
        return None if values is None or exponents is None else Mxfp4(values, exponents)

    def _tensor(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = ()) -> Tensor | None:
        tensor = self.tensors.get(name)
        if tensor is None:
            self.problems.missing.append(name)
        elif tensor.shape != shape:
            self.problems.wrong.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        elif dtypes and tensor.dtype not in dtypes:
            self.problems.wrong.append(f"{name} has type {tensor.dtype}, expected {' or '.join(dtypes)}")
        else:
            return tensor
        return None

    def add_module(self, folder: Path, table: Table, path: str, prefix: str, is_moe: bool) -> None:
        """Fills the parameters of a multi-token-prediction module; what it repeats of the model must be the same."""
        self.add(path, (), table.prediction, prefix)
        layouts = self.add(path + "block/", (), table.block(is_moe), prefix)
        if layouts:
            self.found.layouts[" and ".join(layouts)] += 1
        names = {row.target: row.source for row in table.model}
        for source, target in table.copies.items():
            why = "and a multi-token-prediction module shares it with the model: set model.mtp_layers=0"
            self.ignore_copy(folder, prefix + source, names[target], "the model's own tensor once more", why)

    def ignore(self, folder: Path, known: Iterable[Ignored]) -> None:
        """Sets aside the unused tensors that are known."""
        patterns = [(re.compile(rule.pattern), rule) for rule in known]
        for name in self.tensors:
            for pattern, rule in patterns if name not in self.used else ():
                hit = pattern.fullmatch(name)
                if hit and (not rule.beside or rule.beside.format(*hit.groups()) in self.tensors):
                    self.found.ignored[rule.reason].append(name)
                    self.used.add(name)
                    break

    def ignore_tied(self, folder: Path) -> None:
        """A matrix of logits beside tied embeddings must be the embeddings."""
        self.ignore_copy(
            folder, "lm_head.weight", "model.embed_tokens.weight", "the embeddings once more (tie_word_embeddings)",
            "and config.json has tie_word_embeddings=true: which of the two makes the logits cannot be known. Set it "
            "to false to use both",
        )  # fmt: skip

    def ignore_copy(self, folder: Path, name: str, other: str, reason: str, why: str) -> None:
        """Sets aside a tensor that repeats another, if it is there; ``why`` says why it must be bit-equal.

        Raises:
          ConfigError: it is not.
        """
        if name not in self.tensors or other not in self.tensors:
            return
        one, two = self.tensors[name], self.tensors[other]
        same = (one.dtype, one.shape) == (two.dtype, two.shape)
        for at in range(0, one.nbytes if same else 0, _COMPARED):
            end = min(at + _COMPARED, one.nbytes)
            same = same and one.map[one.start + at : one.start + end] == two.map[two.start + at : two.start + end]
        one.release()
        two.release()
        if not same:
            raise ConfigError(f"{folder}: {name} is another matrix than {other}, {why}")
        self.found.ignored[reason].append(name)
        self.used.add(name)


def _check_table(family: str, targets: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The table must know every parameter of the model, in its shape: else it is the table that is wrong."""
    if targets.keys() != shapes.keys():
        raise RuntimeError(f"{family}: table and model differ in {sorted(targets.keys() ^ shapes.keys())}")
    for name, shape in targets.items():
        if shapes[name][1 if name.startswith("groups/") else 0 :] != shape:
            raise RuntimeError(f"{family}: {name} is {shapes[name]} in the model, {shape} in the table")
