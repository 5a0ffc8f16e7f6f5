"""Windows, packing, mixing, resuming, evaluation: every token a target once, and the same order always."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from moejax.config import ConfigError, DataConfig, DomainConfig
from moejax.data import eval_batches, load_corpus, train_iterator
from moejax.data.pipeline import mix_proportions, pack
from moejax.ngram import ByteNGram, ngram_baseline

S = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two domains of digits and letters, a third that is only evaluated on; documents of 1 to 40 bytes."""
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for domain, alphabet in (("digits", "0123456789"), ("letters", "abcdefghijklmnop"), ("extra", "xyz")):
        for split, count in (("train", 60), ("valid", 7)):
            texts = ["".join(rng.choice(list(alphabet), rng.integers(1, 40))) for _ in range(count)]
            (root / f"{domain}.{split}.txt").write_text("\n<|endoftext|>\n".join(texts))
    domains = (
        ("digits", DomainConfig(train="digits.train.txt", valid="digits.valid.txt", weight=3.0)),
        ("letters", DomainConfig(train="letters.train.txt", valid="letters.valid.txt")),
        ("extra", DomainConfig(valid="extra.valid.txt", weight=0.0)),
    )
    return DataConfig(source="files", root=str(root), domains=domains, seq_len=S, cache_dir=str(root / "cache"))


@pytest.fixture(scope="module")
def corpus(config):
    return load_corpus(config)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_pack_by_hand():
    batch = pack(np.array([[9, 1, 2, 9, 9, 3], [4, 5, 9, 6, 7, 9]], np.uint16), eot_id=9)
    assert batch["tokens"].tolist() == [[9, 1, 2, 9, 9], [4, 5, 9, 6, 7]]
    assert batch["targets"].tolist() == [[1, 2, 9, 9, 3], [5, 9, 6, 7, 9]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 3], [1, 1, 2, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 1, 2]]
    assert batch["mask"].all()
    assert {name: v.dtype.name for name, v in batch.items()} == {
        "tokens": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32", "mask": "bool",
    }  # fmt: skip


def test_the_stream_is_end_of_text_then_document(corpus):
    texts = corpus.documents("digits", "valid")
    stream = corpus.tokens("digits", "valid")
    assert stream.ids.tolist() == [i for text in texts for i in (256, *text.encode())]
    assert (stream.ids[stream.starts] == 256).all() and len(stream.starts) == len(texts)
    facts = corpus.stats()["digits"]["valid"]
    size = sum(map(len, texts))
    assert facts == {"documents": 7, "bytes": size, "tokens": size + 7}
    assert corpus.text_bytes("digits", "valid") == size


def test_an_epoch_of_training_tiles_the_stream_once(config):
    one = dataclasses.replace(config, domains=config.domains[:1])
    corpus = load_corpus(one)
    ids = corpus.tokens("digits", "train").ids.astype(np.int32)
    count = (len(ids) - 1) // S
    expected = sorted(ids[i * S : i * S + S + 1].tolist() for i in range(count))
    batches = take(train_iterator(corpus, batch_size=1, seed=0), 3 * count)
    windows = [[*b["tokens"][0].tolist(), int(b["targets"][0, -1])] for b in batches]
    epochs = [windows[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert corpus.epochs(count * S)["digits"] == pytest.approx(1, abs=S / len(ids))


def test_the_seed_decides_the_order(corpus):
    first = take(train_iterator(corpus, batch_size=4, seed=0), 9)
    assert_equal(first, take(train_iterator(corpus, batch_size=4, seed=0), 9))
    other = take(train_iterator(corpus, batch_size=4, seed=1), 9)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("before", [0, 1, 7])
def test_resume_is_exact(config, corpus, before):
    whole = take(train_iterator(corpus, batch_size=3, seed=5), before + 40)
    iterator = train_iterator(corpus, batch_size=3, seed=5)
    take(iterator, before)
    state = json.loads(json.dumps(iterator.get_state()))
    assert_equal(take(iterator, 40), whole[before:])
    resumed = train_iterator(load_corpus(config), batch_size=3, seed=5)
    take(resumed, 2)  # also from an iterator that has run already
    resumed.set_state(state)
    assert_equal(take(resumed, 40), whole[before:])


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"seed": 6}])
def test_a_state_of_other_settings_is_refused(corpus, change):
    settings = {"batch_size": 3, "seed": 5}
    state = train_iterator(corpus, **settings).get_state()
    with pytest.raises(ConfigError, match=next(iter(change))):
        train_iterator(corpus, **{**settings, **change}).set_state(state)


def test_mixture_has_the_asked_shares(corpus):
    assert corpus.weights == (0.75, 0.25, 0.0)
    batches = take(train_iterator(corpus, batch_size=16, seed=0), 50)
    shares = np.bincount(np.concatenate([b["domain"] for b in batches]), minlength=3) / 800
    np.testing.assert_allclose(shares, corpus.weights, atol=0.01)
    for batch in batches:
        letters = (batch["tokens"] >= ord("a")) & (batch["tokens"] < 256)
        assert (letters.any(axis=1) <= (batch["domain"] == 1)).all()
    assert mix_proportions((0.4, 0.0, 0.15, 0.04)) == (1000, 375, 100)


@pytest.mark.parametrize("batch_size, max_tokens", [(3, 0), (1, 0), (50, 0), (3, 30), (4, 32), (2, 10**9)])
def test_evaluation_scores_each_token_once_in_order(corpus, batch_size, max_tokens):
    ids = corpus.tokens("letters", "valid").ids.astype(np.int32)
    batches = list(eval_batches(corpus, "letters", "valid", batch_size=batch_size, max_tokens=max_tokens))
    mask = np.concatenate([b["mask"].ravel() for b in batches])
    targets = np.concatenate([b["targets"].ravel() for b in batches])[mask]
    tokens = np.concatenate([b["tokens"].ravel() for b in batches])[mask]
    end = min(len(ids), max_tokens + 1) if max_tokens else len(ids)
    assert targets.tolist() == ids[1:end].tolist() and tokens.tolist() == ids[: end - 1].tolist()
    for batch in batches:
        assert batch["tokens"].shape == (batch_size, S) and (batch["domain"] == 1).all()
        padding = ~batch["mask"]
        assert (batch["segment_ids"][padding] == 0).all() and (batch["segment_ids"][batch["mask"]] > 0).all()
        assert (batch["tokens"][padding] == 256).all() and (batch["targets"][padding] == 256).all()
        assert (batch["positions"][padding] == 0).all()
    if not max_tokens:
        assert corpus.tokenizer.byte_lengths[targets].sum() == corpus.text_bytes("letters", "valid")


def test_hash_is_of_the_texts_not_of_their_packing(config, corpus, tmp_path):
    for path in corpus_files(config):
        (tmp_path / path.name).write_text(path.read_text().replace("\n<|endoftext|>\n", "\n\n<|endoftext|>\n"))
    moved = dataclasses.replace(config, root=str(tmp_path))
    assert load_corpus(moved).hash == corpus.hash
    path = tmp_path / "extra.valid.txt"
    path.write_text(path.read_text() + "x")
    assert load_corpus(moved).hash != corpus.hash


def corpus_files(config):
    from pathlib import Path

    return sorted(Path(config.root).glob("*.txt"))


def test_a_truncated_token_cache_is_rebuilt(config, tmp_path, capsys):
    config = dataclasses.replace(config, cache_dir=str(tmp_path))
    before = load_corpus(config).tokens("digits", "train").ids.tolist()
    folders = [f.parent for f in tmp_path.glob("tokens/*/ids.npy")]
    assert len(folders) == 1 and not list(tmp_path.rglob("*.tmp"))
    data = (folders[0] / "ids.npy").read_bytes()
    for broken in (data[:-3], data[:-2] + b"\xff\xff", None):
        (folders[0] / "ids.npy").unlink() if broken is None else (folders[0] / "ids.npy").write_bytes(broken)
        assert load_corpus(config).tokens("digits", "train").ids.tolist() == before
        assert "rebuilding" in capsys.readouterr().err
    for index in tmp_path.glob("sources/*.json"):
        index.write_text('{"sha')
    assert load_corpus(config).tokens("digits", "train").ids.tolist() == before


def test_the_environment_moves_the_cache(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "here"))
    assert load_corpus(dataclasses.replace(config, cache_dir="")).cache_dir == tmp_path / "here"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        load_corpus(dataclasses.replace(config, cache_dir=str(tmp_path / "file")))


@pytest.mark.parametrize(
    "domains, rule",
    [
        ((), r"data\.domains: empty"),
        ((("a", DomainConfig(valid="digits.valid.txt")),), r"data\.domains\.a\.train=''"),
        ((("a", DomainConfig(train="none.txt")),), r"data\.domains\.a\.train='none\.txt'"),
        ((("a", DomainConfig(train="digits.train.txt", weight=-1.0)),), r"data\.domains\.a\.weight=-1"),
        ((("a", DomainConfig(valid="digits.valid.txt", weight=0.0)),), "every weight is 0"),
        (
            (("a", DomainConfig(train="*.txt", valid="digits.valid.txt")),),
            r"also read by data\.domains\.a\.train",
        ),
    ],
)
def test_bad_domains_are_refused(config, domains, rule):
    with pytest.raises(ConfigError, match=rule):
        load_corpus(dataclasses.replace(config, domains=domains))


def test_an_unknown_built_in_domain_lists_the_known(config):
    bad = dataclasses.replace(config, source="builtin", domains=(("news", DomainConfig()),))
    with pytest.raises(ConfigError, match="choose of code, docs, prose"):
        load_corpus(bad)


def test_unknown_domains_splits_and_short_texts_are_refused(config, corpus):
    with pytest.raises(ConfigError, match="choose one of digits, letters, extra"):
        eval_batches(corpus, "news", "valid", batch_size=1)
    with pytest.raises(ConfigError, match=r"no split 'test' but train, valid"):
        eval_batches(corpus, "digits", "test", batch_size=1)
    with pytest.raises(ConfigError, match="fewer than one window of 100001"):
        train_iterator(load_corpus(dataclasses.replace(config, seq_len=100_000)), batch_size=1, seed=0)


def test_ngram_baseline_fits_each_domain_on_its_own_text(corpus):
    result = ngram_baseline(corpus, 2, "valid", max_train_bytes=200)
    assert set(result) == {"digits", "letters"}  # "extra" has no train split
    text = "".join(corpus.documents("digits", "train"))[:200]
    assert len(text) == 200
    assert 3.2 < result["digits"] < 4.2 and 3.9 < result["letters"] < 5.2  # uniform: log2 10 and log2 16
    first, left = [], 200
    for document in corpus.documents("digits", "train"):
        first.append(document[:left])
        left -= len(first[-1])
    own = ByteNGram([t for t in first if t], 2).bits_per_byte(corpus.documents("digits", "valid"))
    assert result["digits"] == pytest.approx(own)
    kept = json.loads((corpus.cache_dir / "ngram" / f"{corpus.hash}.json").read_text())
    assert sorted(kept.values()) == sorted(result.values())
    assert ngram_baseline(corpus, 2, "valid", max_train_bytes=200) == result
