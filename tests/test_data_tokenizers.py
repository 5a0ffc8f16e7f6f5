"""Tokenizers give back what they were given, and count its bytes."""

import numpy as np
import pytest
import tokenizers as hf

from moejax.config import ConfigError
from moejax.data.tokenizers import EOT, BpeTokenizer, load_tokenizer, train_bpe, training_sample

SAMPLE = [
    "the cat sat on the mat, the hat and the bat.\n" * 20,
    "def f(x):\n    return x + 1\n" * 20,
    "ünï çödé 中文 🎉 " * 9,
]
TEXTS = [
    *SAMPLE,
    "",
    " ",
    "a\u0301 á \x00\x7f \r\n\t",
    f"text that says {EOT} itself",
    "never seen: \U0010ffff",
]


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request):
    return load_tokenizer("byte") if request.param == "byte" else BpeTokenizer(train_bpe(300, SAMPLE), "trained")


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_byte_lengths(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,) and tokenizer.byte_lengths.dtype == np.int32
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.decode([tokenizer.eot_id, *ids, tokenizer.eot_id]) == text


def test_end_of_text_has_no_bytes_and_ids_are_checked(tokenizer):
    assert tokenizer.byte_lengths[tokenizer.eot_id] == 0
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
            tokenizer.decode([0, wrong])


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert tokenizer.encode("é!").tolist() == [0xC3, 0xA9, 0x21]
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_training_twice_gives_the_same_file_and_shorter_text():
    first = train_bpe(300, SAMPLE)
    assert first == train_bpe(300, SAMPLE)
    tokenizer = BpeTokenizer(first, "trained")
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(SAMPLE[0])) < len(SAMPLE[0]) / 2


def test_bpe_train_is_kept_and_repaired(tmp_path, capsys):
    calls = []

    def documents():
        calls.append(1)
        return {"a": SAMPLE}

    first = load_tokenizer("bpe-train:300", cache_root=tmp_path, documents=documents)
    again = load_tokenizer("bpe-train:300", cache_root=tmp_path, documents=documents)
    assert capsys.readouterr().err.count("training a byte-level BPE") == 1
    assert first.hash == again.hash != load_tokenizer("byte").hash
    (file,) = tmp_path.rglob("tokenizer.json")
    file.write_bytes(file.read_bytes()[:100])
    assert load_tokenizer("bpe-train:300", cache_root=tmp_path, documents=documents).hash == first.hash
    named = load_tokenizer(f"bpe:{file.relative_to(tmp_path)}", root=str(tmp_path))
    assert named.encode(TEXTS[0]).tolist() == first.encode(TEXTS[0]).tolist()


def test_the_sample_is_bounded_and_weighted():
    documents = {"a": ["é" * 300] * 50, "b": [f"{i} " * 100 for i in range(50)], "none": ["x" * 900]}
    sample = training_sample(documents, {"a": 1.0, "b": 0.25, "none": 0.0}, limit=4000)
    sizes = {name: sum(len(t.encode()) for t in sample if mark in t) for name, mark in (("a", "é"), ("b", " "))}
    assert 3990 <= sizes["a"] <= 4000 and 990 <= sizes["b"] <= 1000
    assert not any("x" in text for text in sample)


def _json(**parts):
    tokenizer = hf.Tokenizer.from_str(train_bpe(280, SAMPLE))
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer.to_str()


def _word_level():
    return hf.Tokenizer(hf.models.WordLevel({"a": 0, EOT: 1}, unk_token="a")).to_str()


@pytest.mark.parametrize(
    "make, rule",
    [
        (lambda: "no json", "no `tokenizers` JSON"),
        (_word_level, "not byte-level"),
        (lambda: _json(normalizer=hf.normalizers.Lowercase()), "loses bytes"),
        (lambda: _json(normalizer=hf.normalizers.NFC()), "loses bytes"),
        (lambda: _json(pre_tokenizer=hf.pre_tokenizers.ByteLevel(add_prefix_space=True)), "loses bytes"),
        (lambda: _json().replace(EOT, "<|other|>"), "no end-of-text token"),
    ],
)
def test_unfit_files_are_refused(tmp_path, make, rule):
    (tmp_path / "t.json").write_text(make())
    with pytest.raises(ConfigError, match=rule):
        load_tokenizer("bpe:t.json", root=str(tmp_path))


@pytest.mark.parametrize("spec", ["", "bytes", "bpe:", "bpe-train:", "bpe-train:x", "bpe-train:256", "bpe:none.json"])
def test_unknown_forms_are_refused(tmp_path, spec):
    with pytest.raises(ConfigError, match=r"data\.tokenizer="):
        load_tokenizer(spec, root=str(tmp_path), cache_root=tmp_path, documents=lambda: {"a": ["x"]})
