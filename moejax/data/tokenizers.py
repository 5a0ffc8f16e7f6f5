"""Tokenizers: bytes, or a byte-level BPE in the ``tokenizers`` form, read from a file or trained on the train
split.

Every tokenizer here is lossless: the bytes that its tokens stand for are the bytes of the text, which is what
makes bits per byte comparable between tokenizers. One that is not is refused, unless it is the one of a published model
(``moejax.data.pretrained``).
"""

import abc
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf

from moejax.config import ConfigError
from moejax.data import cache

EOT = "<|endoftext|>"
SAMPLE_BYTES = 4 << 20
"""Bytes of the heaviest domain that train a BPE; the others give in proportion to their weights."""

_PIECE_BYTES = 256 << 10  # of one document, so that a sample holds many
_EOT_NAMES = (EOT, "<|end_of_text|>", "<|eot_id|>", "<eos>", "</s>", "<|im_end|>")
HARD_SAMPLE = (
    "".join(map(chr, range(1, 128))),
    " leading,  double   triple\t\ttabs\n\n\nlines\r\nand trailing  \n ",
    "café cafe\u0301 ﬁ ½ ２ Ωmega Ω 中文 한글 \u1112\u1161\u11ab עִבְרִית 👩‍👩‍👧 🇺🇳 \u200b\ufeff\u2028\u00a0.",
    f"a {EOT} within text, <s> </s> [CLS] <|im_end|>",
    "def f(x):\n\treturn x**2  # 1234567890 0x1F don't DON'T we'll\n",
)

Documents = Callable[[], Mapping[str, Sequence[str]]]
"""Training documents by domain, read only when a tokenizer has to be trained."""


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
      name: short, for tables: "byte", "bpe4096".
      hash: 16 hex digits of what decides its ids.
      vocab_size: number of ids.
      eot_id: the id that begins each document. No text is ever encoded to it.
      byte_lengths: int32 ``[V]``, UTF-8 bytes that each token stands for; 0 for special tokens.
      start_ids, stop_ids: what a text to be continued begins with, and what ends its continuation.
      exact: every text comes back byte for byte.
    """

    name: str
    hash: str
    vocab_size: int
    eot_id: int
    byte_lengths: np.ndarray
    start_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    exact: bool = True

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32, without special tokens."""

    @abc.abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each id stands for, perhaps a part of a character; empty for special tokens."""

    @abc.abstractmethod
    def _decode(self, ids: np.ndarray) -> str: ...

    def seen(self, text: str) -> bytes:
        """What the tokens of ``text`` stand for: its bytes, unless a published tokenizer changes the text first."""
        return text.encode()

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, int32, without special tokens."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ``ids``; special tokens give nothing, bytes that are no UTF-8 give U+FFFD.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        array = np.asarray(ids, np.int64).reshape(-1)
        if len(array) and not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size:
            wrong = array[(array < 0) | (array >= self.vocab_size)][0]
            raise ValueError(f"token id {wrong} is outside 0..{self.vocab_size - 1}, the vocabulary of {self.name}")
        return self._decode(array)


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the UTF-8 bytes, 256 is the end of text."""

    def __init__(self) -> None:
        self.name = "byte"
        self.vocab_size, self.eot_id = 257, 256
        self.start_ids = self.stop_ids = (self.eot_id,)
        self.hash = hashlib.sha256(b"byte 257").hexdigest()[:16]
        self.byte_lengths = np.array([1] * 256 + [0], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)] + [b""]

    def _decode(self, ids: np.ndarray) -> str:
        return bytes(ids[ids < 256].tolist()).decode("utf-8", errors="replace")


class BpeTokenizer(Tokenizer):
    """A byte-level BPE (GPT-2's kind) from the JSON of Hugging Face ``tokenizers``.

    Args:
      source: text of the JSON file.
      label: name of the file, for messages and for ``name``.
      eot: names of the end-of-text token, in order of preference.

    Raises:
      ConfigError: not such a file; not byte-level; no end-of-text token; a round trip that loses bytes.
    """

    def __init__(self, source: str, label: str, eot: Sequence[str] = _EOT_NAMES):
        # the library decides by this whether encode_batch uses its threads; unset, it warns after a fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        try:
            tokenizer = hf.Tokenizer.from_str(source)
            parts = json.loads(source)
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"data.tokenizer: {label} is no `tokenizers` JSON file ({error})") from error
        if "ByteLevel" not in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")]):
            raise ConfigError(
                f"data.tokenizer: {label} is not byte-level (model {parts['model'].get('type')}); use a"
                " byte-level BPE, or train one with data.tokenizer='bpe-train:4096'"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" within a text is text
        found = next((name for name in eot if tokenizer.token_to_id(name) is not None), None)
        if found is None:
            raise ConfigError(
                f"data.tokenizer: {label} has no end-of-text token (looked for {', '.join(eot)}); add one"
            )
        self._tokenizer = tokenizer
        self.eot_id = int(tokenizer.token_to_id(found) or 0)
        self.start_ids = self.stop_ids = (self.eot_id,)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.name = f"bpe{self.vocab_size}"
        self.hash = hashlib.sha256(f"{found}\n{source}".encode()).hexdigest()[:16]
        self._bytes = [b""] * self.vocab_size
        added, alphabet = tokenizer.get_added_tokens_decoder(), byte_alphabet()
        for token, i in vocab.items():
            if i not in added:
                # text never gives a token with a character outside the alphabet; it keeps its length
                self._bytes[i] = bytes(alphabet.get(character, 0) for character in token)
            elif not added[i].special:
                self._bytes[i] = token.encode()
        self.byte_lengths = np.array([len(text) for text in self._bytes], np.int32)
        for text in HARD_SAMPLE:
            self._check(text, label)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]

    def token_bytes(self) -> list[bytes]:
        return list(self._bytes)

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def _check(self, text: str, label: str) -> None:
        ids = self.encode(text)
        back = self.decode(ids)
        if back != text or int(self.byte_lengths[ids].sum()) != len(text.encode()) or self.eot_id in ids:
            raise ConfigError(
                f"data.tokenizer: {label} loses bytes: {text[:60]!r} comes back as {back[:60]!r}; use a"
                " byte-level BPE without normaliser or added prefix space"
            )


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table): printable ones of Latin-1
    themselves, the others the characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def load_tokenizer(
    spec: str,
    *,
    root: str = "",
    cache_root: Path | None = None,
    documents: Documents | None = None,
    weights: Mapping[str, float] | None = None,
) -> Tokenizer:
    """The tokenizer of ``DataConfig.tokenizer``.

    Args:
      spec: "byte", "bpe:FILE", "pretrained:FOLDER" or "bpe-train:SIZE".
      root: folder that a relative FILE or FOLDER starts from.
      cache_root: where a trained one is kept; needed for "bpe-train".
      documents: train split by domain; needed for "bpe-train".
      weights: of the domains, for the sample that trains.

    Raises:
      ConfigError: another form, a missing or unfit file, a SIZE that is no number of at least 257.
    """
    kind, _, value = spec.partition(":")
    if spec == "byte":
        return ByteTokenizer()
    if kind == "bpe" and value:
        path = Path(root).expanduser() / Path(value).expanduser()
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.tokenizer={spec!r}: {path} cannot be read ({error}); paths are relative to data.root={root!r}"
            ) from error
        return BpeTokenizer(source, str(path))
    if kind == "pretrained" and value:
        from moejax.data.pretrained import PretrainedTokenizer  # it is a Tokenizer

        return PretrainedTokenizer(Path(root).expanduser() / Path(value).expanduser())
    if kind == "bpe-train" and value.isdecimal() and int(value) >= 257:
        if cache_root is None or documents is None:
            raise ConfigError(f"data.tokenizer={spec!r}: training needs a train split and a cache folder")
        return _trained(int(value), documents, weights or {}, cache_root)
    raise ConfigError(
        f"data.tokenizer={spec!r}: choose 'byte', 'bpe:FILE', 'pretrained:FOLDER' (a model's own) or "
        "'bpe-train:SIZE' with SIZE >= 257 (256 bytes and end of text)"
    )


def train_bpe(size: int, sample: Sequence[str]) -> str:
    """The JSON of a byte-level BPE of at most ``size`` tokens. The same sample gives the same JSON."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOT],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer.to_str(pretty=True)


def training_sample(
    documents: Mapping[str, Sequence[str]], weights: Mapping[str, float], limit: int = SAMPLE_BYTES
) -> list[str]:
    """A bounded sample by domain: beginnings of documents in the order of a hash, ``limit`` bytes for the
    heaviest domain.

    Args:
      documents: by domain.
      weights: by domain; missing ones count 1.
      limit: bytes.
    """
    shares = {domain: weights.get(domain, 1.0) for domain in documents}
    most = max(shares.values(), default=0.0) or 1.0
    sample = []
    for domain in sorted(documents):
        left = int(limit * shares[domain] / most)
        keyed = sorted((hashlib.sha256(text[:4096].encode()).digest(), i) for i, text in enumerate(documents[domain]))
        for _, i in keyed:
            if left <= 0:
                break
            piece = documents[domain][i].encode()[: min(left, _PIECE_BYTES)].decode("utf-8", errors="ignore")
            sample.append(piece)
            left -= len(piece.encode()) or 1
    return sample


def _trained(size: int, documents: Documents, weights: Mapping[str, float], root: Path) -> BpeTokenizer:
    sample = training_sample(documents(), weights)
    key = f"{size} {hf.__version__} {cache.sha256_texts(sample)}"
    folder = root / "tokenizers" / f"bpe{size}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if cache.verified(folder) is None:
        total = sum(len(text.encode()) for text in sample)
        cache.say(f"training a byte-level BPE of {size} tokens on {total / 1e6:.1f} MB of the train split (once)")
        source = train_bpe(size, sample)
        cache.publish(folder, {"tokenizer.json": source.encode()}, {"size": size, "sample_bytes": total})
    tokenizer = BpeTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), str(folder / "tokenizer.json"))
    if tokenizer.vocab_size < size:
        cache.say(f"the train split has merges for {tokenizer.vocab_size} of the {size} tokens asked for")
    return tokenizer
