"""Tasks read from JSONL."""

import dataclasses
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, get_args

from moejax.config import ConfigError
from moejax.tasks.forms import Item, Kind, Task

ROW_FIELDS: dict[Kind, tuple[str, ...]] = {
    "last_word": ("context", "target"),
    "winograd": ("context_options", "continuation", "gold"),
    "multiple_choice": ("context", "choices", "gold"),
    "minimal_pairs": ("good", "bad"),
}
"""Fields that a row of each kind must have. ``query`` may stand for ``context``."""

GROUP_FIELDS = ("group", "domain", "task")
"""The first of these that a row has names its group, unless the header says which field does."""

HEADER_FIELDS = ("task", "kind", "cue", "neutral", "group")
ANSWER_CUE = "Answer:"


def load_task(path: str | Path, limit: int = 0) -> Task:
    """Reads a task from ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.xz``.

    The kind follows from the fields of the first row (:data:`ROW_FIELDS`) unless the first line is a header,
    an object with ``kind`` and optionally ``task``, ``cue``, ``neutral`` and ``group``. A multiple-choice
    file whose header gives no ``cue`` and in which every context has a line ``Question: ...`` and no
    ``Answer:`` after it gets ``Answer:`` on a line of its own after each context; the reference context of
    ``acc_pmi`` is then ``Answer:`` too.

    Args:
      path: the file. Its name without suffixes is the task's name unless the header gives one.
      limit: items kept, from the first; 0 keeps all. All rows are checked either way.

    Raises:
      ConfigError: no such file, a suffix that is not read, a row that breaks its form (named by file and
        line), or a task that is scored by generation (GSM8K: question and answer), which is not offered.
    """
    path = Path(path)
    if limit < 0:
        raise ConfigError(f"limit={limit}: must be 0 (all rows) or positive")
    rows = _read_rows(path)
    if not rows:
        raise ConfigError(f"{path}: no rows; a task needs at least one")
    header: dict[str, Any] = {}
    if "kind" in rows[0][1]:
        header = _check_header(*rows.pop(0))
        if not rows:
            raise ConfigError(f"{path}: a header and no rows; a task needs at least one")
    name = header.get("task") or path.name.split(".jsonl")[0]
    kind: Kind = header.get("kind") or _detect_kind(*rows[0])
    items = [_read_item(name, kind, where, row, header.get("group")) for where, row in rows]
    cue = header.get("cue")
    if cue is None:
        cue = "\n" + ANSWER_CUE if kind == "multiple_choice" and all(_asks(i.contexts[0]) for i in items) else ""
    items = [dataclasses.replace(i, contexts=tuple(_with_cue(c, cue) for c in i.contexts)) for i in items]
    return Task(name, kind, tuple(items[:limit] if limit else items), header.get("neutral", cue.strip()))


def _read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows with the place (``file:line``) of each; blank lines are passed over."""
    openers: dict[str, Callable[..., IO[str]]] = {
        ".jsonl": open,
        ".jsonl.gz": gzip.open,
        ".jsonl.xz": lzma.open,
    }
    suffix = next((s for s in openers if path.name.endswith(s)), None)
    if suffix is None:
        raise ConfigError(f"{path}: a task file ends in one of {', '.join(openers)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such task file")
    rows = []
    try:
        with openers[suffix](path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{where}: not JSON ({error}); each line is one JSON object") from error
                if not isinstance(row, dict):
                    raise ConfigError(f"{where}: a {type(row).__name__}; each line is one JSON object")
                rows.append((where, row))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{path}: not UTF-8 text in the form that {suffix} promises ({error})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    return rows


def _check_header(where: str, header: dict[str, Any]) -> dict[str, Any]:
    kinds = get_args(Kind)
    if header["kind"] == "generation":
        raise ConfigError(f"{where}: {_NO_GENERATION}")
    if header["kind"] not in kinds:
        raise ConfigError(f"{where}: kind={header['kind']!r}: choose one of {', '.join(kinds)}")
    for field, value in header.items():
        if field not in HEADER_FIELDS:
            raise ConfigError(f"{where}: unknown header field {field!r}; known: {', '.join(HEADER_FIELDS)}")
        if not isinstance(value, str):
            raise ConfigError(f"{where}: header field {field}={value!r}: must be a string")
    return header


_NO_GENERATION = (
    "a task of questions and free answers is scored by generating text, which is not offered; "
    "tasks here are scored by log-likelihood (" + ", ".join(ROW_FIELDS) + ")"
)


def _detect_kind(where: str, row: dict[str, Any]) -> Kind:
    fields = set(row) | ({"context"} if "query" in row else set())
    for kind, required in ROW_FIELDS.items():
        if fields.issuperset(required):
            return kind
    if {"question", "answer"} <= fields and "choices" not in fields:
        raise ConfigError(f"{where}: {_NO_GENERATION}")
    # The kind with the most of its fields present is the likeliest to have been meant.
    kind, required = max(ROW_FIELDS.items(), key=lambda form: len(fields.intersection(form[1])) / len(form[1]))
    missing = ", ".join(f for f in required if f not in fields)
    raise ConfigError(f"{where}: fields {sorted(row)} fit no kind; nearest is {kind}, which also needs {missing}")


def _read_item(name: str, kind: Kind, where: str, row: dict[str, Any], group_field: str | None) -> Item:
    if "query" in row and "context" not in row:
        row = {**row, "context": row["query"]}
    for field in (*ROW_FIELDS[kind], *([group_field] if group_field else [])):
        if field not in row:
            raise ConfigError(f"{where}: field {field!r} is missing; a row of kind {kind} needs {ROW_FIELDS[kind]}")

    def text(field: str, value: Any, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {field}={value!r}: must be a string")
        if not value.strip() and not may_be_empty:
            raise ConfigError(f"{where}: {field} is empty; there is nothing to score")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # "\ud800" in JSON
            raise ConfigError(f"{where}: {field} has half a surrogate pair; repair it") from error
        return value

    def texts(field: str, may_be_empty: bool = False) -> tuple[str, ...]:
        values = row[field]
        if not isinstance(values, list) or len(values) < 2:
            raise ConfigError(f"{where}: {field}={values!r}: must be a list of at least two strings")
        return tuple(text(f"{field}[{i}]", v, may_be_empty) for i, v in enumerate(values))

    def gold(count: int) -> int:
        value = row["gold"]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise ConfigError(f"{where}: gold={value!r}: must be an integer in [0, {count}), the right option")
        return value

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    match kind:
        case "last_word":
            contexts, choices, right = (
                (text("context", row["context"], True),),
                (text("target", row["target"]),),
                0,
            )
        case "multiple_choice":
            choices = texts("choices")
            contexts, right = (text("context", row["context"], True),) * len(choices), gold(len(choices))
        case "winograd":
            contexts = texts("context_options", True)
            choices, right = (text("continuation", row["continuation"]),) * len(contexts), gold(len(contexts))
        case "minimal_pairs":
            contexts, choices, right = ("", ""), (text("good", row["good"]), text("bad", row["bad"])), 0
    grouped_by = group_field or next((f for f in GROUP_FIELDS if f in row), None)
    group = "" if grouped_by is None else str(row[grouped_by])
    return Item(f"{name}:{where.rpartition(':')[2]}", contexts, choices, right, group)


def _asks(context: str) -> bool:
    """Whether the context poses a question in the form ``Question: ...`` that nothing has answered yet."""
    asked = re.split(r"(?m)^Question:", context)
    return len(asked) > 1 and not re.search(r"(?m)^Answer:", asked[-1])


def _with_cue(context: str, cue: str) -> str:
    return context + (cue.removeprefix("\n") if context.endswith("\n") else cue)
