"""Python source, parted into code without words about it and the English of its docstrings and comments."""

import ast
import inspect
import io
import re
import tokenize
import warnings
from collections.abc import Iterator

_BODIES = ("body", "orelse", "finalbody")
_LETTERS = re.compile(r"[A-Za-z]{2,}")
_MIN_WORDS = 4


def split_source(source: str) -> tuple[str, str]:
    """Parts a module's source.

    Docstrings are all statements that are only a string (they do nothing, wherever they stand).

    Args:
      source: text of one module.

    Returns:
      ``(code, docs)``: the source without docstrings and comments, which parses to the same tree but for
      them; and the English paragraphs of docstrings and comments in their order. Doctests, commented-out
      code, rules and paragraphs of fewer than four words are left out of ``docs``. Either may be empty.

    Raises:
      SyntaxError: ``source`` does not parse, or (a defect) ``code`` would not.
    """
    tree = parse_quietly(source)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    lines = source.split("\n")
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    strings = list(_bare_strings(tree))
    code = _without(lines, comments, strings, _rows_inside_strings(tokens))
    parse_quietly(code)
    return code, _english(lines, comments, strings)


def parse_quietly(source: str) -> ast.Module:
    """``ast.parse`` without its warnings about old escapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _bare_strings(tree: ast.Module) -> Iterator[tuple[ast.Expr, bool]]:
    """Each string statement, and whether something must stand in its place."""
    for node in ast.walk(tree):
        for name in _BODIES:
            body = getattr(node, name, None)
            if not isinstance(body, list):
                continue  # ``body`` of a lambda or a conditional expression
            bare = [s for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
            bare = [s for s in bare if isinstance(s.value, ast.Constant) and isinstance(s.value.value, str)]
            alone = len(bare) == len(body) and not isinstance(node, ast.Module)
            for i, statement in enumerate(bare):
                yield statement, alone and i == 0


def _rows_inside_strings(tokens: list[tokenize.TokenInfo]) -> set[int]:
    """Rows (from 1) that begin inside a string: their blank lines are content."""
    rows: set[int] = set()
    opened: list[int] = []
    for token in tokens:
        if token.type == tokenize.STRING:
            rows.update(range(token.start[0] + 1, token.end[0] + 1))
        elif token.type == tokenize.FSTRING_START:
            opened.append(token.start[0])
        elif token.type == tokenize.FSTRING_END:
            rows.update(range(opened.pop() + 1, token.end[0] + 1))
    return rows


def _without(lines: list[str], comments: list, strings: list[tuple[ast.Expr, bool]], inside: set[int]) -> str:
    kept: list[str | None] = list(lines)
    touched = set()
    for token in comments:
        row, column = token.start
        kept[row - 1] = lines[row - 1][:column].rstrip()
        touched.add(row)
    # from the last to the first, so that columns stay true where two share a line
    for statement, needed in sorted(strings, key=lambda s: (s[0].lineno, s[0].col_offset), reverse=True):
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        head = _before(lines[first - 1], statement.col_offset)
        rest_line = kept[last - 1] or ""
        tail = rest_line[len(_before(lines[last - 1], statement.end_col_offset or 0)) :]
        shares_line = bool(head.strip() or tail.strip())
        kept[first - 1] = head + ("pass" if needed or shares_line else "") + tail
        for row in range(first + 1, last + 1):
            kept[row - 1] = None
        inside.difference_update(range(first + 1, last + 1))
        touched.add(first)
    result: list[str] = []
    blanks = 0
    for row, line in enumerate(kept, 1):
        if line is None:
            continue
        if line.strip() or row in inside:
            result.append(line)
            blanks = 0
        elif row not in touched and blanks < 2:
            result.append("")
            blanks += 1
    return "\n".join(result).strip("\n") + "\n" if any(result) else ""


def _before(line: str, byte_offset: int) -> str:
    """``ast`` counts columns in UTF-8 bytes."""
    return line.encode()[:byte_offset].decode()


def _english(lines: list[str], comments: list, strings: list[tuple[ast.Expr, bool]]) -> str:
    found: list[tuple[int, str]] = []
    for statement, _ in strings:
        assert isinstance(statement.value, ast.Constant)
        found.append((statement.lineno, inspect.cleandoc(str(statement.value.value))))
    block: list[str] = []
    previous = (-1, -1)
    for token in comments:
        if token.string.startswith("#!"):
            continue
        row, column = token.start
        whole_line = not lines[row - 1][:column].strip()
        if not (whole_line and previous == (row - 1, column)):
            block = []
            found.append((row, ""))
        block.append(re.sub(r"^#+:? ?", "", token.string))
        found[-1] = (found[-1][0], "\n".join(block))
        previous = (row, column) if whole_line else (-1, -1)
    paragraphs = []
    for _, text in sorted(found, key=lambda f: f[0]):
        for paragraph in re.split(r"\n\s*\n", text):
            rows = [line.rstrip() for line in paragraph.split("\n") if _LETTERS.search(line)]
            if rows and _is_english("\n".join(rows)):
                paragraphs.append("\n".join(rows))
    return "\n\n".join(paragraphs) + "\n" if paragraphs else ""


def _is_english(paragraph: str) -> bool:
    if paragraph.lstrip().startswith((">>>", "...")) or "-*-" in paragraph:
        return False
    if len(_LETTERS.findall(paragraph)) < _MIN_WORDS:
        return False
    try:
        parse_quietly(inspect.cleandoc(paragraph))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    return False  # it is a program: commented-out code or an example
