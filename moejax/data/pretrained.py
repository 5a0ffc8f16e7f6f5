"""The tokenizer of a published model: a Hugging Face folder's ``tokenizer.json``, special tokens and chat template.

Two kinds are read: byte-level BPE (OLMoE, Qwen, DeepSeek, gpt-oss) and BPE with byte fallback (Mixtral). Unlike a
tokenizer of our own it may change the text first (Unicode NFC, a space before it): ``byte_lengths`` are those of the
text as the model sees it, so bits per byte are over that text, and ``exact`` says whether it is the text itself.
Nothing of the folder is executed but its chat template, a Jinja program, in Jinja's sandbox.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moejax.config import ConfigError
from moejax.data.tokenizers import HARD_SAMPLE, Tokenizer, byte_alphabet

SPACE = "\u2581"
"""Stands for a space in vocabularies with byte fallback."""


class PretrainedTokenizer(Tokenizer):
    """See the module's text.

    Attributes:
      start_ids: what the model's own tokenizer puts before a text; may be empty.
      stop_ids: ids that end a generation, from ``generation_config.json``, ``config.json`` or the tokenizer's
        ``eos_token``, the first that names some.
      eot_id: begins each document in our data: the last of ``start_ids``, or the first of ``stop_ids``.
      exact: every text comes back byte for byte.
      chat_template: None where the folder has none.

    Raises:
      ConfigError: files missing or damaged, another kind of tokenizer, no end-of-text token, or one that is no token.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}): text needs the model's tokenizer.json beside its weights; a folder "
                "with tokenizer.model alone is converted by saving its fast tokenizer once"
            ) from error
        try:
            self._tokenizer = hf.Tokenizer.from_str(source)
            parts = json.loads(source)
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"{path} is no `tokenizers` JSON file ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = {name: _json(self.folder / name) for name in SETTINGS}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._bytes = self._token_bytes(vocab, parts, path)
        self.byte_lengths = np.array([len(text) for text in self._bytes], np.int32)
        self.start_ids = self._start()
        self.stop_ids = _stop_ids(self.folder, settings, vocab)
        if not self.start_ids and not self.stop_ids:
            raise ConfigError(f"{self.folder} names no end-of-text token: add eos_token_id to generation_config.json")
        self.eot_id = self.start_ids[-1] if self.start_ids else self.stop_ids[0]
        self.chat_template = self._template(settings["tokenizer_config.json"])
        self._names = {n: _name(settings["tokenizer_config.json"].get(n)) for n in ("bos_token", "eos_token")}
        self.name = f"{self.folder.resolve().name or 'pretrained'}{self.vocab_size}"
        identity = f"{self.start_ids} {self.stop_ids}\n{source}"
        self.hash = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._tokenizer.encode_special_tokens = True  # "</s>" within a text is text
        first = b"".join(self._bytes[i] for i in self.encode("a"))
        self._adds_space = first.startswith(b" ")  # also without a normaliser: a pre-tokenizer may
        self.exact = all([self._survives(text, path) for text in HARD_SAMPLE])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """Ids of a conversation (``[{"role": "user", "content": ...}]``) in the model's own format, up to where the
        assistant answers.

        Raises:
          ConfigError: the folder has no chat template, or one that fails on these messages.
        """
        if self.chat_template is None:
            raise ConfigError(f"{self.folder} has no chat template: it is no chat model; leave --chat out")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            text = environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=True, tools=None, documents=None,
                raise_exception=_refuse, strftime_now=_today, **self._names,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"the chat template of {self.folder} fails: {error}") from error
        self._tokenizer.encode_special_tokens = False  # here they are the format
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self._tokenizer.encode_special_tokens = True

    def token_bytes(self) -> list[bytes]:
        return list(self._bytes)

    def seen(self, text: str) -> bytes:
        normalizer = self._tokenizer.normalizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        text = text if self._byte_level else text.replace(SPACE, " ")
        begins = text.startswith(" ") or not text
        return (text if begins or not self._adds_space else f" {text}").encode()

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def _token_bytes(self, vocab: Mapping[str, int], parts: Mapping[str, Any], path: Path) -> list[bytes]:
        text = json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])
        self._byte_level = "ByteLevel" in text
        if self._byte_level:
            alphabet = byte_alphabet()
            of = lambda token: bytes(alphabet.get(c, 0) for c in token)  # noqa: E731
        elif "ByteFallback" in text or parts["model"].get("byte_fallback"):
            of = lambda t: bytes([int(m[1], 16)]) if (m := BYTE.fullmatch(t)) else t.replace(SPACE, " ").encode()  # noqa: E731
        else:
            raise ConfigError(
                f"{path}: neither byte-level nor with byte fallback (model {parts['model'].get('type')}), so some text "
                "would have no ids"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        pieces = [b""] * self.vocab_size
        for token, i in vocab.items():
            if i not in added:
                pieces[i] = of(token)
            elif not added[i].special:
                pieces[i] = token.encode()
        return pieces

    def _start(self) -> tuple[int, ...]:
        """Ids that the post-processor puts before a text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        places = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        return tuple(whole[: places[0]]) if places else ()

    def _template(self, settings: Mapping[str, Any]) -> str | None:
        beside = self.folder / "chat_template.jinja"
        if beside.exists():
            return beside.read_text(encoding="utf-8")
        template = settings.get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        return template

    def _survives(self, text: str, path: Path) -> bool:
        """Whether ``text`` comes back byte for byte.

        Raises:
          ConfigError: not even as the text that the model sees.
        """
        ids = self.encode(text)
        got = b"".join(self._bytes[i] for i in ids)
        if self.eot_id in ids:
            raise ConfigError(f"{path}: id {self.eot_id}, which parts texts, is an ordinary token: mend eos_token_id")
        if got != self.seen(text):
            raise ConfigError(f"{path} loses bytes: {text[:60]!r} becomes {got[:60]!r}, so bits per byte mean nothing")
        return got == text.encode() and self.decode(ids) == text


SETTINGS = ("generation_config.json", "config.json", "tokenizer_config.json")
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): fetch it again") from error
    return value if isinstance(value, dict) else {}


def _stop_ids(folder: Path, settings: Mapping[str, Mapping[str, Any]], vocab: Mapping[str, int]) -> tuple[int, ...]:
    """The end tokens of the first file that names some.

    Raises:
      ConfigError: an id that no token has: documents would begin with another one, or with none.
    """
    known = set(vocab.values())
    for name in SETTINGS[:2]:
        found = settings[name].get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if wrong := [i for i in ids if type(i) is not int or i not in known]:
            raise ConfigError(
                f"{folder / name}: eos_token_id={found!r}: tokenizer.json has no token {wrong[0]!r}; its ids are whole "
                f"numbers in 0..{max(known)}: mend it, or fetch both files again"
            )
        if ids:
            return tuple(ids)
    token = _name(settings["tokenizer_config.json"].get("eos_token"))
    return (vocab[token],) if token in vocab else ()


def _name(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _today(form: str) -> str:
    return datetime.datetime.now(datetime.UTC).strftime(form)


def _refuse(message: str) -> None:
    raise TemplateError(message)
