"""Documents of files: what is read, and what is refused with its place."""

import gzip
import json
import lzma

import pytest

from moejax.config import ConfigError
from moejax.data.sources import read_documents, source_files

TEXT = "one\nmore\n<|endoftext|>\n\n  two\n<|endoftext|>\n"


@pytest.mark.parametrize(
    "name, write",
    [("a.txt", open), ("a.txt.gz", gzip.open), ("a.txt.xz", lzma.open)],
    ids=["txt", "gz", "xz"],
)
def test_txt_is_parted_at_marker_lines_only(tmp_path, name, write):
    with write(tmp_path / name, "wb") as file:
        file.write((TEXT + "inside <|endoftext|> a line").encode())
    assert read_documents(name, root=str(tmp_path)) == ["one\nmore", "  two", "inside <|endoftext|> a line"]


def test_without_a_marker_a_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert read_documents("a.txt", root=str(tmp_path), document_marker="") == [TEXT]


def test_jsonl_reads_the_named_field(tmp_path):
    rows = [{"body": "café\u2028x"}, {"body": "b\nc", "text": "no"}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_documents("a.jsonl.gz", root=str(tmp_path), text_field="body") == ["café\u2028x", "b\nc"]


def test_folders_and_globs_are_sorted(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/.hidden/x.txt", "c.jsonl", "note.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "c"}' if name.endswith("jsonl") else name)
    assert read_documents(".", root=str(tmp_path)) == ["a/z.txt", "b.txt", "c"]
    assert [p.name for p in source_files("**/*.txt", root=str(tmp_path))] == ["z.txt", "b.txt"]
    assert read_documents(str(tmp_path / "b.txt"), root="/elsewhere") == ["b.txt"]


@pytest.mark.parametrize(
    "name, content, rule",
    [
        ("missing.txt", None, "does not exist"),
        ("*.txt", None, "matches no file"),
        ("empty.txt", b"", "is empty"),
        ("marks.txt", b"<|endoftext|>\n", "is empty"),
        ("latin.txt", b"caf\xe9 au lait", r"latin\.txt is not UTF-8 text: byte 0xe9 at byte offset 3"),
        ("zero.txt", b"ab\0cd", r"zero\.txt is binary: zero byte at byte offset 2"),
        ("a.md", b"text", r"is none of \.txt"),
        ("bad.txt.gz", b"no gzip at all", "is damaged"),
        ("cut.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:30], "is damaged"),
        ("cut.txt.xz", lzma.compress(b"some text" * 99)[:40], "is damaged"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": 1}\n', r"a\.jsonl:3: no field 'text' but fields 'txt'"),
        ("b.jsonl", b'{"text": "a"}\n{"text": \n', r"b\.jsonl:2: not JSON"),
        ("c.jsonl", b"[1]\n", r"c\.jsonl:1: no field 'text' but a list"),
        ("d.jsonl", b'{"text": 3}\n', r"d\.jsonl:1: 'text' is a int"),
        ("e.jsonl", b'{"text": "\\ud800"}\n', r"e\.jsonl:1: 'text' has half a surrogate pair"),
        ("", None, "empty"),
    ],
)
def test_bad_input_is_refused_with_its_place(tmp_path, name, content, rule):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rule) as error:
        read_documents(name, root=str(tmp_path), field="data.domains.web.train")
    assert "data.domains.web.train" in str(error.value)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ConfigError, match="holds no"):
        read_documents(".", root=str(tmp_path))
