"""A corpus: documents and token streams by domain and split, read lazily and cached."""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import ConfigError, DataConfig, DomainConfig
from moejax.data import cache, tokenizers
from moejax.data.builtin import DOMAINS, SPLITS, build_builtin
from moejax.data.sources import read_documents, source_files

_BATCH_BYTES = 8 << 20  # of text encoded at once: documents for every core, without gigabytes of results
_KEEP_BYTES = 32 << 20  # a split up to this size stays in memory once it has been read
_PROGRESS_SECONDS = 3.0
_TOKEN_FORMAT = 1


@dataclass(frozen=True)
class TokenStream:
    """A split as one stream: each document is ``<eot> tokens...``.

    Attributes:
      ids: ``[N]`` uint16 or int32, memory-mapped.
      starts: int64 ``[documents]``, where each ``<eot>`` stands.
    """

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Split:
    sha256: str
    documents: int
    bytes: int
    read: Callable[[], list[str]]


class Corpus:
    """Texts and tokens by domain and split. Make one with :func:`load_corpus`.

    Attributes:
      domains: names in the order of the ``domain`` index of batches.
      weights: share of training examples of each domain; they sum to 1. A domain of weight 0 is only
        evaluated on.
      tokenizer: of all domains.
      seq_len: tokens of one example.
      hash: 16 hex digits of all texts, their domains and splits.
      cache_dir: the cache folder.
      record: where the texts are from: versions, deleted blocks (built-in) or settings (files).
    """

    def __init__(
        self,
        *,
        splits: Mapping[tuple[str, str], _Split],
        weights: Mapping[str, float],
        tokenizer: tokenizers.Tokenizer,
        seq_len: int,
        cache_dir: Path,
        record: Mapping[str, Any],
    ):
        self.domains = tuple(weights)
        total = sum(weights.values())
        self.weights = tuple(weight / total for weight in weights.values())
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.cache_dir = cache_dir
        self.record = dict(record)
        self._splits = dict(splits)
        parts = sorted(f"{domain}/{split} {s.sha256}" for (domain, split), s in splits.items())
        self.hash = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        self._texts: dict[tuple[str, str], list[str]] = {}
        self._streams: dict[tuple[str, str], TokenStream] = {}

    def splits(self, domain: str) -> tuple[str, ...]:
        """Splits that ``domain`` has, of train, valid, test."""
        return tuple(split for split in SPLITS if (domain, split) in self._splits)

    def documents(self, domain: str, split: str) -> list[str]:
        """Texts of a split.

        Raises:
          ConfigError: no such domain or split.
        """
        found = self._split(domain, split)
        if (domain, split) in self._texts:
            return self._texts[domain, split]
        texts = found.read()
        if found.bytes <= _KEEP_BYTES:
            self._texts[domain, split] = texts
        return texts

    def text_bytes(self, domain: str, split: str) -> int:
        """UTF-8 bytes of a split, without anything between documents."""
        return self._split(domain, split).bytes

    def tokens(self, domain: str, split: str) -> TokenStream:
        """Token stream of a split; tokenised at first use.

        Raises:
          ConfigError: no such domain or split, or a text that the tokenizer does not give back.
        """
        found = self._split(domain, split)
        if (domain, split) not in self._streams:
            label = f"{domain}/{split}"
            self._streams[domain, split] = _tokens(found, self.tokenizer, self.cache_dir / "tokens", label)
        return self._streams[domain, split]

    def stats(self) -> dict[str, dict[str, dict[str, int]]]:
        """``documents``, ``bytes`` and ``tokens`` (with one end-of-text per document) by domain and split."""
        return {
            domain: {
                split: {
                    "documents": self._splits[domain, split].documents,
                    "bytes": self._splits[domain, split].bytes,
                    "tokens": len(self.tokens(domain, split)),
                }
                for split in self.splits(domain)
            }
            for domain in self.domains
        }

    def epochs(self, tokens_seen: int) -> dict[str, float]:
        """Epochs of each domain with a train split in ``tokens_seen`` training tokens (examples times ``seq_len``)."""
        return {
            domain: tokens_seen * weight / max(1, len(self.tokens(domain, "train")) - 1)
            for domain, weight in zip(self.domains, self.weights, strict=True)
            if weight > 0 and (domain, "train") in self._splits
        }

    def _split(self, domain: str, split: str) -> _Split:
        if domain not in self.domains:
            raise ConfigError(f"domain {domain!r}: not in this corpus; choose one of {', '.join(self.domains)}")
        if (domain, split) not in self._splits:
            has = ", ".join(self.splits(domain))
            raise ConfigError(f"domain {domain!r} has no split {split!r} but {has}; set data.domains.{domain}.{split}")
        return self._splits[domain, split]


def load_corpus(config: DataConfig, *, train: bool = True) -> Corpus:
    """The corpus of a configuration: the built-in one, or files.

    Texts are found and hashed here (files that have not changed since, by size and time of change, are not
    read again); they are tokenised at first use. ``train`` False: for evaluation alone, domains need no train split.

    Raises:
      ConfigError: anything in ``config`` that cannot work.
    """
    if config.seq_len < 1:
        raise ConfigError(f"data.seq_len={config.seq_len}: must be at least 1")
    root = cache.cache_root(config)
    if config.source == "builtin":
        weights, splits, record = _builtin(config, root)
    else:
        weights, splits, record = _files(config, root)
    needed = train or config.tokenizer.startswith("bpe-train:")
    for domain, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"data.domains.{domain}.weight={weight}: must be a finite number of at least 0")
        if needed and weight > 0 and (domain, "train") not in splits:
            raise ConfigError(
                f"data.domains.{domain}.train='': a domain of weight {weight} needs it; or set weight to 0"
            )
    if not any(weights.values()):
        raise ConfigError(f"data.domains: every weight is 0 ({', '.join(weights)}); give one domain a weight")
    tokenizer = tokenizers.load_tokenizer(
        config.tokenizer,
        root=config.root,
        cache_root=root,
        documents=lambda: {d: splits[d, "train"].read() for d in weights if weights[d] > 0},
        weights=weights,
    )
    return Corpus(
        splits=splits,
        weights=weights,
        tokenizer=tokenizer,
        seq_len=config.seq_len,
        cache_dir=root,
        record=record,
    )


Parts = tuple[dict[str, float], dict[tuple[str, str], _Split], dict[str, Any]]


def _builtin(config: DataConfig, root: Path) -> Parts:
    given = dict(config.domains)
    for name in given:
        if name not in DOMAINS:
            raise ConfigError(f"data.domains.{name}: not in the built-in corpus; choose of {', '.join(DOMAINS)}")
    weights = {domain: given.get(domain, DomainConfig()).weight for domain in DOMAINS}
    folder, manifest = build_builtin(root)
    splits = {}
    for domain in DOMAINS:
        for split in SPLITS:
            name = f"{split}.{domain}"
            count, size = manifest["documents"][name], manifest["text_bytes"][name]
            digest = manifest["text_sha256"][name]
            splits[domain, split] = _Split(digest, count, size, functools.partial(_rows, folder / f"{name}.jsonl"))
    return weights, splits, {k: v for k, v in manifest.items() if k != "files"}


def _rows(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def _files(config: DataConfig, root: Path) -> Parts:
    if not config.domains:
        raise ConfigError("data.domains: empty with data.source='files'; name at least one domain with a train path")
    used: dict[Path, str] = {}
    splits = {}
    for domain, paths in config.domains:
        for split in SPLITS:
            spec = getattr(paths, split)
            if not spec:
                continue
            field = f"data.domains.{domain}.{split}"
            files = source_files(spec, root=config.root, field=field)
            for file in files:
                before = used.setdefault(file.resolve(), field)
                if before != field and "train" in (split, before.rpartition(".")[2]):
                    raise ConfigError(
                        f"{field}={spec!r}: {file} is also read by {before}; keep held-out text out of train"
                    )
            splits[domain, split] = _indexed(files, spec, field, config, root)
    weights = {domain: paths.weight for domain, paths in config.domains}
    return weights, splits, {"files": {f"{d}/{s}": {"sha256": v.sha256} for (d, s), v in splits.items()}}


def _indexed(files: list[Path], spec: str, field: str, config: DataConfig, root: Path) -> _Split:
    """Hash, documents and bytes of a split, kept by path, size and time of change: loading again is fast."""
    read = functools.partial(
        read_documents,
        spec,
        root=config.root,
        document_marker=config.document_marker,
        text_field=config.text_field,
        field=field,
    )
    seen = [[str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = json.dumps([seen, config.document_marker, config.text_field])
    path = root / "sources" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    facts: Any = cache.read_json(path)
    if not isinstance(facts, dict) or set(facts) != {"sha256", "documents", "bytes"}:
        texts = read()
        facts = {
            "sha256": cache.sha256_texts(texts),
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
        }
        cache.write_json(path, facts)
    return _Split(str(facts["sha256"]), int(facts["documents"]), int(facts["bytes"]), read)


def _tokens(split: _Split, tokenizer: tokenizers.Tokenizer, root: Path, label: str) -> TokenStream:
    folder = root / f"{split.sha256[:16]}-{tokenizer.name}-{tokenizer.hash}-{_TOKEN_FORMAT}"
    if cache.verified(folder) is None:
        texts = split.read()
        if cache.sha256_texts(texts) != split.sha256:
            raise ConfigError(f"data: the text of {label} changed since it was loaded; start again")
        ids, starts = tokenise(texts, tokenizer, label)
        cache.publish(folder, {"ids.npy": ids, "starts.npy": starts}, {"text_sha256": split.sha256})
    return TokenStream(np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "starts.npy"))


def tokenise(documents: list[str], tokenizer: tokenizers.Tokenizer, label: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The stream of ``documents``: ids (uint16 where they fit, else int32) and the places of end-of-text ids.

    Args:
      documents: texts in order.
      tokenizer: lossless; each document is checked.
      label: names the split in messages; a line of progress appears every few seconds.

    Raises:
      ConfigError: a document whose tokens do not stand for its bytes.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    eot = np.array([tokenizer.eot_id], dtype)
    sizes = [len(text.encode()) for text in documents]
    total, done = sum(sizes), 0
    began = spoke = time.monotonic()
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    first = 0
    while first < len(documents):
        last, size = first, 0
        while last < len(documents) and (last == first or size + sizes[last] <= _BATCH_BYTES):
            size += sizes[last]
            last += 1
        for i, ids in enumerate(tokenizer.encode_batch(documents[first:last]), first):
            seen = sizes[i] if tokenizer.exact else len(tokenizer.seen(documents[i]))
            if int(tokenizer.byte_lengths[ids].sum()) != seen or (ids == tokenizer.eot_id).any():
                raise ConfigError(
                    f"data.tokenizer: {tokenizer.name} loses bytes of document {i} of {label}"
                    f" ({documents[i][:40]!r}...); use 'byte' or a byte-level BPE"
                )
            pieces += [eot, ids.astype(dtype)]
            lengths.append(len(ids) + 1)
        first, done = last, done + size
        if (now := time.monotonic()) - spoke > _PROGRESS_SECONDS or (done == total and now - began > _PROGRESS_SECONDS):
            spoke = now
            cache.say(
                f"tokenising {label} with {tokenizer.name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB,"
                f" {done / 1e6 / (now - began):.1f} MB/s"
            )
    ids = np.concatenate(pieces) if pieces else np.empty(0, dtype)
    return ids, np.cumsum([0, *lengths[:-1]], dtype=np.int64)
