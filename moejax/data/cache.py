"""The data cache: entries that are either complete and verified or rebuilt, whatever interrupted their
making.

An entry is a folder of files with a ``manifest.json`` that is written last and holds the size and SHA-256 of
each file. Every file is written under a temporary name and moved into place with ``os.replace``, so a reader
never sees half of one; two processes that build the same entry write the same bytes.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from moejax.config import ConfigError, DataConfig

MANIFEST = "manifest.json"
_HASH_LIMIT = 1 << 30  # above this many bytes only the size is checked: hashing would take longer than it protects
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def cache_root(config: DataConfig) -> Path:
    """Folder of the data cache: ``config.cache_dir``, else ``$MOEJAX_CACHE``, else ``.cache/data`` beside the
    package.

    Raises:
      ConfigError: the folder cannot be made or written to.
    """
    root = Path(config.cache_dir or os.environ.get("MOEJAX_CACHE") or _PACKAGE_PARENT / ".cache" / "data")
    root = root.expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={str(root)!r}: not a writable folder ({error.strerror or error}); set"
            " data.cache_dir or the environment variable MOEJAX_CACHE to one that is"
        ) from error
    return root


def say(message: str) -> None:
    """One line of progress on standard error."""
    print(f"data: {message}", file=sys.stderr, flush=True)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_texts(documents: list[str]) -> str:
    """SHA-256 of documents, each preceded by its length, so that moving a boundary changes the hash."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Generator[IO[bytes]]:
    """A temporary file that takes the place of ``path`` when the block ends, and disappears if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would keep a shared cache from its other readers
        os.replace(name, path)
    except BaseException:  # also KeyboardInterrupt: leave nothing behind
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON value of a cache file, or None where the file is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def publish(folder: Path, files: Mapping[str, bytes | np.ndarray], record: Mapping[str, Any]) -> dict[str, Any]:
    """Writes an entry: ``files`` (arrays as ``.npy``), then the manifest. Returns the manifest.

    Args:
      folder: where; made if missing.
      files: content by name.
      record: what else the manifest shall say, as JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listing = {}
    for name, content in files.items():
        path = folder / name
        with replacing(path) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content, allow_pickle=False)
        listing[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest = {**record, "files": listing}
    write_json(folder / MANIFEST, manifest)
    return manifest


def verified(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete entry, or None where it must be (re)built; damage is named on stderr."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        say(f"{folder / MANIFEST} is damaged: rebuilding")
        return None
    for name, facts in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else -1
        if size != facts["bytes"] or (size < _HASH_LIMIT and sha256_file(path) != facts["sha256"]):
            say(f"{path} is missing, truncated or changed: rebuilding")
            return None
    return manifest
