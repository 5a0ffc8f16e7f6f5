"""Tokenizers of published models: what they put before a text, what ends one, and the bytes of each token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf

from moejax.config import ConfigError
from moejax.data import load_tokenizer
from moejax.data.corpus import tokenise
from moejax.data.pretrained import PretrainedTokenizer
from moejax.data.tokenizers import train_bpe

TEXT = ["the cat sat on the mat, the hat", "def f(x): return x + 1", "naïve café, 中文"]


def write(folder: Path, source: str, **settings: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(source)
    for name, value in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def byte_level(**changes: Any) -> str:
    """A byte-level BPE (the kind of OLMoE and Qwen), with parts of its JSON replaced."""
    return json.dumps(json.loads(train_bpe(300, TEXT)) | changes)


def byte_fallback() -> str:
    """A BPE with byte fallback and a space before the text (the kind of Mixtral)."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"thecasmonf", "▁t", "th"]
    model = hf.models.BPE(
        vocab={t: i for i, t in enumerate(tokens)},
        merges=[("▁", "t"), ("t", "h")],
        byte_fallback=True,
        unk_token="<unk>",
    )
    tokenizer = hf.Tokenizer(model)
    tokenizer.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
    d = hf.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = hf.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer.to_str()


def metaspace() -> str:
    """The same, with the space from a pre-tokenizer: the form that newer files have."""
    tokenizer = hf.Tokenizer.from_str(byte_fallback())
    source = json.loads(tokenizer.to_str()) | {"normalizer": None}
    source["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return json.dumps(source)


def bytes_of(tokenizer: PretrainedTokenizer, text: str) -> bytes:
    pieces = tokenizer.token_bytes()
    return b"".join(pieces[i] for i in tokenizer.encode(text))


def test_byte_level_is_exact(tmp_path: Path):
    tokenizer = PretrainedTokenizer(write(tmp_path, byte_level(), generation_config={"eos_token_id": [0, 7]}))
    assert tokenizer.exact and tokenizer.start_ids == () and tokenizer.stop_ids == (0, 7) and tokenizer.eot_id == 0
    for text in (*TEXT, " <|endoftext|> \t\n"):
        assert bytes_of(tokenizer, text) == text.encode() and tokenizer.decode(tokenizer.encode(text)) == text
        assert 0 not in tokenizer.encode(text)
    assert np.array_equal(tokenizer.byte_lengths, [len(piece) for piece in tokenizer.token_bytes()])


def test_a_normaliser_makes_it_inexact_and_bytes_are_those_that_the_model_sees(tmp_path: Path):
    source = byte_level(normalizer={"type": "NFC"})
    tokenizer = PretrainedTokenizer(write(tmp_path, source, config={"eos_token_id": 0}))
    assert not tokenizer.exact
    assert bytes_of(tokenizer, "cafe\u0301") == "café".encode()


def test_byte_fallback_with_a_first_token(tmp_path: Path):
    tokenizer = PretrainedTokenizer(write(tmp_path, byte_fallback(), tokenizer_config={"eos_token": "</s>"}))
    assert tokenizer.start_ids == (1,) and tokenizer.stop_ids == (2,) and tokenizer.eot_id == 1 and not tokenizer.exact
    assert bytes_of(tokenizer, "the cat 中") == " the cat 中".encode()
    assert tokenizer.decode(tokenizer.encode("the cat 中")) == "the cat 中"
    assert tokenizer.encode("the </s>").tolist().count(2) == 0


@pytest.mark.parametrize(
    ("source", "added"),
    [(byte_fallback(), 1), (byte_level(normalizer={"type": "NFC"}), -1), (metaspace(), 1)],
    ids=["byte_fallback", "nfc", "metaspace"],
)
def test_texts_are_tokenised_for_evaluation_as_the_model_sees_them(tmp_path: Path, source: str, added: int):
    tokenizer = PretrainedTokenizer(write(tmp_path, source, config={"eos_token_id": 0}))
    assert not tokenizer.exact
    text = "the cafe\u0301 \u2581 中"
    if added < 0:
        assert len(tokenizer.seen(text)) == len(text.encode()) + added
    for document in (text, " the", "  x = 1\n"):
        assert bytes_of(tokenizer, document) == tokenizer.seen(document)
        ids, starts = tokenise([document], tokenizer)
        assert int(tokenizer.byte_lengths[ids].sum()) == len(tokenizer.seen(document)) and starts.tolist() == [0]
    tokenizer.byte_lengths = tokenizer.byte_lengths + 1
    with pytest.raises(ConfigError, match="loses bytes of document 0"):
        tokenise([text], tokenizer)


def test_the_chat_template_is_rendered_in_a_sandbox(tmp_path: Path):
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{{ raise }}"
    settings = {"eos_token": {"content": "</s>"}, "chat_template": template}
    tokenizer = PretrainedTokenizer(write(tmp_path, byte_fallback(), tokenizer_config=settings))
    ids = tokenizer.encode_chat([{"role": "a", "content": "the"}]).tolist()
    assert ids[0] == 1 and ids[-1] == 2  # special tokens are special here
    assert 1 not in tokenizer.encode("<s>")  # and text again
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "chat_template.jinja").write_text(escape)
    with pytest.raises(ConfigError, match=r"chat template of .* fails"):
        PretrainedTokenizer(tmp_path).encode_chat([])
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('only two roles') }}")
    with pytest.raises(ConfigError, match="only two roles"):
        PretrainedTokenizer(tmp_path).encode_chat([])


def test_without_a_chat_template(tmp_path: Path):
    tokenizer = PretrainedTokenizer(write(tmp_path, byte_level(), config={"eos_token_id": 0}))
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer.encode_chat([])


def test_hash_follows_what_decides_ids(tmp_path: Path):
    one = PretrainedTokenizer(write(tmp_path / "a", byte_level(), config={"eos_token_id": 0}))
    same = load_tokenizer(
        "pretrained:b", root=str(write(tmp_path / "b", byte_level(), config={"eos_token_id": 0}).parent)
    )
    other = PretrainedTokenizer(write(tmp_path / "c", byte_level(), config={"eos_token_id": [0, 1]}))
    assert one.hash == same.hash != other.hash


def test_an_end_token_that_text_may_hold(tmp_path: Path):
    with pytest.raises(ConfigError, match="id 40, which parts texts, is an ordinary token"):
        PretrainedTokenizer(write(tmp_path, byte_level(), config={"eos_token_id": 40}))


@pytest.mark.parametrize("found", [5000, [0, 5000], -1, "<|endoftext|>", [0.0], True])
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_an_end_token_that_no_token_is(tmp_path: Path, name: str, found: Any):
    """Its embedding would be that of another: jax.numpy takes the last row for an index beyond all."""
    write(tmp_path, byte_level(), **{name: {"eos_token_id": found}})
    with pytest.raises(ConfigError, match=rf"/{name}\.json: eos_token_id=.*tokenizer\.json has no token"):
        PretrainedTokenizer(tmp_path)


def test_a_file_that_names_no_end_token_leaves_it_to_the_next(tmp_path: Path):
    write(tmp_path, byte_level(), generation_config={"eos_token_id": []}, config={"eos_token_id": 0})
    assert PretrainedTokenizer(tmp_path).stop_ids == (0,)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (None, {}, "tokenizer.json cannot be read"),
        ("{", {}, "no `tokenizers` JSON file"),
        (byte_level(), {}, "names no end-of-text token"),
        (hf.Tokenizer(hf.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")).to_str(), {}, "neither byte-level nor"),
        (byte_level(normalizer={"type": "Lowercase"}), {"config": {"eos_token_id": 0}}, None),
    ],
)
def test_folders_that_do_not_work(tmp_path: Path, source: str | None, settings: dict, message: str | None):
    if source is not None:
        write(tmp_path, source, **settings)
    if message is None:  # a lossy normaliser is what the model was trained with: read, and said to be inexact
        assert not PretrainedTokenizer(tmp_path).exact
        return
    with pytest.raises(ConfigError, match=message):
        PretrainedTokenizer(tmp_path)


def test_settings_that_are_no_json(tmp_path: Path):
    write(tmp_path, byte_level())
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json is not JSON"):
        PretrainedTokenizer(tmp_path)
