import gzip
import json
import lzma
import re
from typing import Any

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.tasks import continuation_task, load_task


def write(path, rows):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


CHOICE = {"context": "It rains, so I", "choices": ["stay in.", "swim."], "gold": 0}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz"])
def test_multiple_choice_in_each_compression(tmp_path, suffix):
    query = {"query": "Café: ", "choices": ["über", " naïve", "x"], "gold": 2}
    task = load_task(write(tmp_path / f"mine{suffix}", [CHOICE, "", query]))
    assert (task.name, task.kind, task.neutral) == ("mine", "multiple_choice", "")
    first, second = task.items
    assert (first.id, second.id) == ("mine:1", "mine:3")  # lines of the file; the blank one counts
    assert first.contexts == ("It rains, so I",) * 2 and first.choices == ("stay in.", "swim.")
    assert (first.gold, second.gold) == (0, 2)
    assert second.contexts == ("Café: ",) * 3


def test_one_space_joins_only_where_there_is_none(tmp_path):
    rows = [
        {"context": "no space", "target": "word"},
        {"context": "space ", "target": "word"},
        {"context": "line\n", "target": "word"},
        {"context": "own", "target": " word"},
        {"context": "", "target": "word"},
    ]
    items = load_task(write(tmp_path / "t.jsonl", rows)).items
    assert [i.continuation(0) for i in items] == [" word", "word", "word", " word", "word"]


def test_other_kinds_are_detected(tmp_path):
    last = load_task(write(tmp_path / "a.jsonl", [{"context": "c", "target": "t"}]))
    assert (last.kind, last.items[0].choices, last.items[0].gold) == ("last_word", ("t",), 0)
    row = {"context_options": ["Ann", "Bob"], "continuation": "left.", "gold": 1}
    winograd = load_task(write(tmp_path / "b.jsonl", [row]))
    assert winograd.kind == "winograd"
    assert (winograd.items[0].contexts, winograd.items[0].choices) == (("Ann", "Bob"), ("left.", "left."))
    row = {"task": "island", "field": "syntax", "good": "yes", "bad": "no"}
    pairs = load_task(write(tmp_path / "c.jsonl", [row]))
    assert (pairs.kind, pairs.items[0].group) == ("minimal_pairs", "island")
    assert (pairs.items[0].contexts, pairs.items[0].choices, pairs.items[0].gold) == (
        ("", ""),
        ("yes", "no"),
        0,
    )


def test_questions_get_an_answer_cue_only_if_all_rows_ask(tmp_path):
    ask = {"context": "Question: Why?", "choices": ["a", "b"], "gold": 0}
    passage = {"context": "Passage: x\nQuestion: is it?\n", "choices": ["a", "b"], "gold": 1}
    shots = {"context": "Question: A?\nAnswer: b\nQuestion: C?", "choices": ["a", "b"], "gold": 1}
    task = load_task(write(tmp_path / "q.jsonl", [ask, passage, shots]))
    assert task.neutral == "Answer:"
    assert [i.contexts[0] for i in task.items] == [
        "Question: Why?\nAnswer:",
        "Passage: x\nQuestion: is it?\nAnswer:",
        "Question: A?\nAnswer: b\nQuestion: C?\nAnswer:",
    ]
    assert task.items[0].continuation(0) == " a"
    answered = {"context": "Question: Why?\nAnswer: since", "choices": ["a", "b"], "gold": 0}
    for other in (CHOICE, answered):
        task = load_task(write(tmp_path / "q.jsonl", [ask, other]), limit=1)  # the unread rest decides too
        assert (task.neutral, task.items[0].contexts[0]) == ("", "Question: Why?")


def test_header_names_kind_cue_neutral_and_group(tmp_path):
    header = {"task": "T", "kind": "multiple_choice", "cue": " ->", "neutral": "So", "group": "field"}
    task = load_task(write(tmp_path / "x.jsonl", [header, {**CHOICE, "field": "f", "domain": "d"}]))
    assert (task.name, task.neutral, task.items[0].group, task.items[0].id) == ("T", "So", "f", "T:2")
    assert task.items[0].contexts[0] == "It rains, so I ->"
    ask = {"context": "Question: Why?", "choices": ["a", "b"], "gold": 0}
    task = load_task(write(tmp_path / "x.jsonl", [{"kind": "multiple_choice", "cue": ""}, ask]))
    assert (task.name, task.neutral, task.items[0].contexts[0]) == ("x", "", "Question: Why?")


def test_limit_keeps_the_first_rows(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"context": "c", "target": w} for w in "abc"])
    assert [i.choices[0] for i in load_task(path, limit=2).items] == ["a", "b"]
    assert len(load_task(path, limit=9).items) == len(load_task(path).items) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([CHOICE, {"context": "c", "choices": ["a", "b"]}], r"x\.jsonl:2: field 'gold' is missing"),
        ([{"context": "c", "choices": ["a", "b"]}], r"x\.jsonl:1: .*multiple_choice, which also needs gold"),
        ([CHOICE, {**CHOICE, "gold": 2}], r"x\.jsonl:2: gold=2: must be an integer in \[0, 2\)"),
        ([{**CHOICE, "gold": True}], r"x\.jsonl:1: gold=True"),
        ([{**CHOICE, "gold": "0"}], r"x\.jsonl:1: gold='0'"),
        ([{**CHOICE, "choices": ["a"]}], r"x\.jsonl:1: choices=\['a'\]: must be a list of at least two"),
        ([{**CHOICE, "choices": ["a", " "]}], r"x\.jsonl:1: choices\[1\] is empty"),
        ([{**CHOICE, "choices": ["a", 3]}], r"x\.jsonl:1: choices\[1\]=3: must be a string"),
        ([{"context": "c", "target": ""}], r"x\.jsonl:1: target is empty"),
        ([{"good": "a", "bad": "b"}, {"good": "a"}], r"x\.jsonl:2: field 'bad' is missing"),
        ([{"question": "1+1?", "answer": "2"}], r"x\.jsonl:1: .*generating text, which is not offered"),
        ([{"kind": "generation"}, {"q": ""}], r"x\.jsonl:1: .*generating text, which is not offered"),
        ([{"kind": "essay"}, CHOICE], r"x\.jsonl:1: kind='essay': choose one of last_word"),
        ([{"kind": "last_word", "shots": 3}, CHOICE], r"x\.jsonl:1: unknown header field 'shots'"),
        (
            [{"kind": "multiple_choice", "cue": 3}, CHOICE],
            r"x\.jsonl:1: header field cue=3: must be a string",
        ),
        ([{"kind": "multiple_choice", "group": "g"}, CHOICE], r"x\.jsonl:2: field 'g' is missing"),
        ([{"kind": "multiple_choice"}], r"x\.jsonl: a header and no rows"),
        ([CHOICE, "{broken"], r"x\.jsonl:2: not JSON"),
        ([CHOICE, "[" * 100_000], r"x\.jsonl:2: not JSON"),
        ([CHOICE, f'{{"gold": {"1" * 5000}}}'], r"x\.jsonl:2: not JSON"),
        ([{**CHOICE, "choices": ["a", "\ud800"]}], r"x\.jsonl:1: choices\[1\] has half a surrogate pair"),
        ([[1]], r"x\.jsonl:1: a list; each line is one JSON object"),
        ([], r"x\.jsonl: no rows"),
    ],
)
def test_mistakes_name_file_line_and_field(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        load_task(write(tmp_path / "x.jsonl", rows))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jsonl: no such task file"):
        load_task(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"ends in one of \.jsonl, \.jsonl\.gz, \.jsonl\.xz"):
        load_task(tmp_path / "x.csv")
    (tmp_path / "plain.jsonl.xz").write_text("{}")
    with pytest.raises(ConfigError, match=r"plain\.jsonl\.xz: not UTF-8 text in the form"):
        load_task(tmp_path / "plain.jsonl.xz")
    packed = bytearray(gzip.compress("".join(f'{{"number": {i}}}\n' for i in range(1000)).encode()))
    packed[20] ^= 0xFF  # where the codes of the compressed text are told
    (tmp_path / "damaged.jsonl.gz").write_bytes(packed)
    with pytest.raises(ConfigError, match=r"damaged\.jsonl\.gz: not UTF-8 text in the form"):
        load_task(tmp_path / "damaged.jsonl.gz")
    with pytest.raises(ConfigError, match="limit=-1"):
        load_task(tmp_path / "none.jsonl", limit=-1)


def test_a_file_that_the_disk_does_not_give(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", [CHOICE])

    def fail(*args, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(ConfigError, match=r"x\.jsonl: cannot be read \(Permission denied\)"):
        load_task(path)


def prose(seed, words=600):
    """Random words, some of them with letters of two and three bytes."""
    rng = np.random.default_rng(seed)
    syllables = ["ka", "lo", "mi", "né", "ßu", "te", "漢"]
    return " ".join("".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(words))


DOCUMENTS = {"prose": [prose(i) for i in range(4)], "one": [prose(9, 2500)]}
SIZES: dict[str, Any] = {"per_domain": 20, "seed": 3, "context_bytes": 120, "choice_bytes": 40}


def cut(documents, **changes: Any):
    return continuation_task(documents, **(SIZES | changes))


def test_continuations_are_true_distinct_and_within_size():
    task = cut(DOCUMENTS)
    assert (task.name, task.kind, task.neutral, len(task.items)) == ("builtin", "multiple_choice", "", 40)
    assert len({item.id for item in task.items}) == 40
    for item in task.items:
        documents = DOCUMENTS[item.group]
        context, true = item.contexts[0], item.choices[item.gold]
        assert item.contexts == (context,) * 4 and len(item.choices) == 4
        (home,) = (d for d in documents if context + true in d)  # it really is what comes next
        assert item.continuation(item.gold) == true  # ... and nothing is put between
        assert 60 <= len(context.encode()) <= 120 and context[-1] == " "
        assert len(set(item.choices)) == 4
        for i, choice in enumerate(item.choices):
            assert 20 <= len(choice.encode()) <= 40
            (place,) = ((d, m.start()) for d in documents for m in re.finditer(re.escape(choice), d))
            document, start = place
            end = start + len(choice)
            assert start == 0 or document[start - 1] == " "
            assert end == len(document) or document[end] == " "
            if i != item.gold and item.group == "prose":
                assert document is not home  # other documents are preferred
            if i != item.gold and item.group == "one":
                span = document.index(context + true)
                assert end <= span or start >= span + len(context + true)


def test_wrong_continuations_keep_clear_of_the_own_passage():
    document = prose(7, 70)
    sizes: dict[str, Any] = {"per_domain": 2, "context_bytes": 80, "choice_bytes": 30}
    for seed in range(20):
        for item in continuation_task({"short": [document]}, seed=seed, **sizes).items:
            passage = item.contexts[0] + item.choices[item.gold]
            start = document.index(passage)
            for i, choice in enumerate(item.choices):
                place = document.index(choice)
                assert i == item.gold or place + len(choice) <= start or place >= start + len(passage)


def test_true_continuations_do_not_overlap():
    starts = {}
    for item in cut(DOCUMENTS).items:
        text = item.contexts[0] + item.choices[item.gold]
        d, document = next((d, doc) for d, doc in enumerate(DOCUMENTS[item.group]) if text in doc)
        byte = len(document[: document.index(text)].encode()) + len(item.contexts[0].encode())
        starts.setdefault((item.group, d), []).append(byte)
    assert sum(map(len, starts.values())) == 40
    assert all(np.diff(sorted(s)).min() >= 40 for s in starts.values() if len(s) > 1)


def test_continuations_are_fixed_by_the_seed_and_the_domain_alone():
    task = cut(DOCUMENTS)
    assert cut(DOCUMENTS) == task
    assert cut(DOCUMENTS, seed=4) != task
    alone = cut({"one": DOCUMENTS["one"]})
    assert alone.items == tuple(item for item in task.items if item.group == "one")


def test_gold_place_is_uniform():
    task = cut({"one": [prose(1, 30_000)]}, per_domain=800)
    counts = np.bincount([item.gold for item in task.items], minlength=4)
    assert ((counts - 200) ** 2 / 200).sum() < 16.3  # chi-square of 3 degrees of freedom at p = 0.001


def test_code_is_cut_at_lines():
    rng = np.random.default_rng(0)

    def line():
        return "    " * rng.integers(0, 3) + f"x{rng.integers(10**6)} = {rng.integers(10**6)}"

    documents = ["\n".join(line() for _ in range(120)) + "\n" for _ in range(3)]
    task = cut({"code": documents})
    indented = 0
    for item in task.items:
        context, true = item.contexts[0], item.choices[item.gold]
        document = next(d for d in documents if context + true in d)
        assert context.endswith("\n") and (context + true + "\n") in document
        assert document.startswith(context) or ("\n" + context) in document
        for choice in item.choices:
            assert any(("\n" + choice + "\n") in ("\n" + d) for d in documents)
            indented += choice.startswith("    ")
    assert indented > 0  # indentation belongs to the line


def test_repeated_text_gives_no_repeated_choices():
    rng = np.random.default_rng(5)
    licence = "Permission is granted to anyone to use this text for any purpose at all without fee"
    documents = [licence + " " + prose(i, 60) + " " + licence.upper() for i in rng.integers(100, size=6)]
    for item in cut({"d": documents}, per_domain=10).items:
        folded = [choice.casefold() for choice in item.choices]
        assert all(not a.startswith(b) for i, a in enumerate(folded) for j, b in enumerate(folded) if i != j)


def test_too_little_text_says_so():
    with pytest.raises(ConfigError, match=r"'prose': 4 documents have room for \d+ items, not per_domain=5000"):
        cut({"prose": DOCUMENTS["prose"]}, per_domain=5000)
    same = ["word " * 100]
    with pytest.raises(ConfigError, match=r"'d': found only 0 passages unlike a true continuation, not 3"):
        continuation_task({"d": same}, per_domain=1, seed=0, context_bytes=20, choice_bytes=4)
    with pytest.raises(ConfigError, match=r"room for 0 items"):
        cut({"d": ["", "short", "\n \n"]})
    with pytest.raises(ConfigError, match="choice_bytes=1: must be at least 2"):
        cut(DOCUMENTS, choice_bytes=1)
    with pytest.raises(ConfigError, match="documents_by_domain is empty"):
        cut({})
