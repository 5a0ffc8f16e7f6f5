"""Documents of local files: ``.txt`` and ``.jsonl``, each also compressed with gzip or xz.

Nothing is guessed and nothing is skipped silently: a file that cannot be read as text of documents is an
error that names the file and the place in it.
"""

import glob
import gzip
import json
import lzma
import re
import zlib
from pathlib import Path

from moejax.config import ConfigError

SUFFIXES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".xz"))
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def source_files(spec: str, *, root: str = "", field: str = "data.domains") -> list[Path]:
    """Files that ``spec`` names, in sorted order.

    Args:
      spec: a file, a folder (searched through all its levels; hidden files are left out) or a glob (``**``
        crosses folders).
      root: folder that a relative ``spec`` starts from.
      field: name of the setting, for messages.

    Raises:
      ConfigError: nothing there, no readable file in the folder, a glob without a match, an unknown kind of
        file.
    """
    if not spec:
        raise ConfigError(f"{field}='': empty; name a file, a folder or a glob of {', '.join(SUFFIXES)}")
    path = Path(root).expanduser() / Path(spec).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES) and not _hidden(p, path))
        if not files:
            raise ConfigError(f"{field}={spec!r}: folder {path} holds no {', '.join(SUFFIXES)} file")
    elif glob.has_magic(str(path)):
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise ConfigError(f"{field}={spec!r}: the glob {path} matches no file; check it, and data.root={root!r}")
    else:
        raise ConfigError(f"{field}={spec!r}: {path} does not exist; paths are relative to data.root={root!r}")
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise ConfigError(f"{field}={spec!r}: {file} is none of {', '.join(SUFFIXES)}; convert or rename it")
    return files


def read_documents(
    spec: str,
    *,
    root: str = "",
    document_marker: str = "<|endoftext|>",
    text_field: str = "text",
    field: str = "data.domains",
) -> list[str]:
    """Documents of a file, folder or glob, in the order of :func:`source_files` and then of each file.

    Args:
      spec, root, field: as in :func:`source_files`.
      document_marker: a line of ``.txt`` files that parts documents; newlines beside it belong to no
        document. Empty: each file is one document, unchanged.
      text_field: field of ``.jsonl`` rows that holds the text.

    Raises:
      ConfigError: as :func:`source_files`; a file without any document; bytes that are no UTF-8 text (with
        their offset); a row that is no JSON object or has no text in ``text_field`` (as file:line).
    """
    documents = []
    for file in source_files(spec, root=root, field=field):
        text = _read_text(file, field)
        if ".jsonl" in file.suffixes:
            found = _rows(text, file, text_field, field)
        else:
            found = _split(text, document_marker)
        if not found:
            raise ConfigError(f"{field}={spec!r}: {file} is empty; remove it or fill it")
        documents.extend(found)
    return documents


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _read_text(file: Path, field: str) -> str:
    opener = _OPENERS.get(file.suffix, open)
    try:
        with opener(file, "rb") as stream:
            data = stream.read()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(
            f"{field}: {file} is damaged or no {file.suffix} file ({error}); fetch or pack it again"
        ) from error
    except OSError as error:
        raise ConfigError(f"{field}: {file} cannot be read ({error.strerror or error})") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{field}: {file} is not UTF-8 text: byte 0x{data[error.start]:02x} at byte offset {error.start}"
            f" ({error.reason}); convert it to UTF-8"
        ) from error
    if (zero := data.find(b"\0")) >= 0:
        raise ConfigError(f"{field}: {file} is binary: zero byte at byte offset {zero}; name a text file")
    return text.removeprefix("\ufeff")


def _split(text: str, marker: str) -> list[str]:
    if not marker:
        return [text] if text else []
    parts = re.split(rf"^{re.escape(marker)}\r?$", text, flags=re.MULTILINE)
    return [part for part in (p.strip("\r\n") for p in parts) if part]


def _rows(text: str, file: Path, text_field: str, field: str) -> list[str]:
    documents = []
    # str.splitlines would also cut at U+2028 and the like, which JSON allows inside a string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{field}: {file}:{number}: not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict) or text_field not in row:
            has = f"fields {', '.join(map(repr, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ConfigError(f"{field}: {file}:{number}: no field {text_field!r} but {has}; set data.text_field")
        value = row[text_field]
        if not isinstance(value, str):
            raise ConfigError(f"{field}: {file}:{number}: {text_field!r} is a {type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # "\ud800" in JSON
            raise ConfigError(
                f"{field}: {file}:{number}: {text_field!r} has half a surrogate pair; repair it"
            ) from error
        if value:
            documents.append(value)
    return documents
