"""What the pages say: every link, command, flag, field, path and name in them is there, and the code in them runs."""

import ast
import dataclasses
import importlib
import importlib.util
import re
import shlex
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from experiments import run, session
from kernels_pallas import GROUPED_FFN
from moejax import dispatch, routing
from moejax.config import ConfigError, ExperimentConfig, RouterConfig
from moejax.report import results_markdown
from moejax.results import read_rows
from tests import goldens, moe_fakes
from tests import test_losses as loss_laws
from tests import test_routing as router_laws

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OWN = ("moejax", "kernels_pallas", "configs", "experiments", "scripts", "tests", "docs")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def code_words(page: Path) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def commands(page: Path) -> list[list[str]]:
    """Command lines of the page, cut into words: those in fences, and those between backticks."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines + code_words(page) if re.match(r"(python|bash) \S", line)]
    return [shlex.split(line, comments=True) for line in lines]


ALL_COMMANDS = [pytest.param(c, id=f"{p.name}: {' '.join(c)[:60]}") for p in PAGES for c in commands(p)]
RUNS = [pytest.param(c[3:], id=p.name) for p in PAGES for c in commands(p) if c[1:3] == ["-m", "experiments.run"]]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- what pages point at ----------------------------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


def test_every_page_can_be_reached_from_the_readme():
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", README.read_text())}
    assert set(PAGES[1:]) <= linked


@every_page
def test_paths_exist(page: Path):
    for word in code_words(page):
        if re.fullmatch(rf"({'|'.join(OWN)})/[\w./]*", word):
            assert (ROOT / word).exists(), f"{page.name} names {word}"


def test_the_map_shows_what_is_there():
    (tree,) = re.findall(r"## Map\n+```\n(.*?)```", README.read_text(), re.DOTALL)
    top = ""
    for line in tree.splitlines():
        if not line.startswith(" "):
            top = line.split()[0]
            assert (ROOT / top).is_dir(), top
        names = line.split("  ")[0] if not line.startswith(" ") else re.split(r"\s{2,}", line.strip())[0]
        for name in names.split():
            path = ROOT / top / name if line.startswith(" ") else ROOT / name
            assert path.exists(), f"the map names {name} in {top}"
    assert all(f"{name}/" in tree for name in OWN)


@every_page
def test_dotted_names_resolve(page: Path):
    for word in code_words(page):
        if re.fullmatch(r"(moejax|kernels_pallas)(\.\w+)+", word):
            resolve(word)


def resolve(name: str) -> Any:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if importlib.util.find_spec(parts[0]) and is_module(parts[:cut]):
            value: Any = importlib.import_module(".".join(parts[:cut]))
            for attribute in parts[cut:]:
                value = getattr(value, attribute)
            return value
    raise AssertionError(f"{name} is no module")


def is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@every_page
def test_python_blocks_import_what_there_is(page: Path):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN:
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_commands_name_programs_and_flags_that_exist(words: list[str]):
    if words[1] == "-m":
        spec = importlib.util.find_spec(words[2])
        assert spec is not None and spec.origin, words[2]
        program, rest = Path(spec.origin), words[3:]
        assert '__name__ == "__main__"' in program.read_text(), f"{program.name} is no program"
    else:
        program, rest = ROOT / words[1], words[2:]
        assert program.is_file(), words[1]
    for word in rest:
        flag = re.match(r"--(\w+)", word)
        if flag:
            # absl turns a boolean flag off by "no" before its name.
            known = rf"""["' ](--)?({flag[1]}|{flag[1].removeprefix("no")})\b"""
            assert re.search(known, program.read_text()), f"{program.name} has no --{flag[1]}"
        elif "/" in word and "*" not in word:
            assert (ROOT / word).exists(), word


def dry_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of ``experiments.run`` with these arguments, as far as it goes without data."""
    words = ["run", *arguments, "--dry_run"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)  # ml_collections looks for overrides of fields there
    return session.call(run.define_flags, run.command, words[1:])


@pytest.mark.parametrize("arguments", RUNS)
def test_run_commands_pass_every_check(
    arguments: list[str],
    top_p: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    published = goldens.unpack("olmoe-base", tmp_path / "published")  # what FOLDER stands for
    code = dry_run([argument.replace("FOLDER", str(published)) for argument in arguments], monkeypatch)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert re.search(r"^parameters [\d,]+ total", out, re.MULTILINE)


def test_some_commands_are_read():
    assert len(RUNS) >= 3
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= {words[1] for words in commands(README)}


@every_page
def test_fields_exist(page: Path):
    known = list(field_paths(ExperimentConfig))
    text = re.sub(r"^error: .*$", "", page.read_text(), flags=re.MULTILINE)
    named = re.findall(r"--config\.([a-z_0-9.]+)=", text)
    for word in code_words(page):
        named += re.findall(r"^((?:model|data|train|eval|mesh|table|moe|router)\.[a-z_0-9.]+)", word)
    for name in named:
        name = re.sub(r"((?:losses|domains))\..*", r"\1", name.rstrip("."))  # their keys are names, not fields
        if not name.endswith(".py"):
            assert any(f".{path}".endswith(f".{name}") for path in known), f"{page.name} names the field {name}"


def field_paths(cls: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from field_paths(hints[field.name], f"{prefix}{field.name}.")


# --- what the README quotes -------------------------------------------------------------------------------------------


def test_errors_are_quoted_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    quoted = [line for block in blocks(README, "") for line in block.splitlines() if line.startswith("error: ")]
    field, router = quoted
    assert dry_run(["--config=configs/quickstart.py", "--config.train.stepz=20"], monkeypatch) == 2
    assert capsys.readouterr().err.strip() == field
    with pytest.raises(ConfigError) as error:
        routing.family(RouterConfig(name="topk"), 8)
    assert f"error: {error.value}" == router


def delimited(name: str) -> str:
    found = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", README.read_text(), re.DOTALL)
    assert len(found) == 1, name
    return found[0].strip()


def test_generated_parts_are_delimited():
    assert delimited("quickstart output")
    assert README.read_text().count("<!-- end -->") == 2


def sections(markdown: str) -> list[str]:
    return [part.strip() for part in re.split(r"^(?=### )", markdown, flags=re.MULTILINE) if part.strip()]


def test_results_are_those_of_the_committed_rows():
    """Whole tables as ``experiments.report --format=markdown`` prints them, not one digit by hand."""
    files = sorted((ROOT / "experiments" / "results").glob("*.jsonl"))
    printed = sections(results_markdown([row for file in files for row in read_rows(file)]))
    shown = sections(delimited("results"))
    if printed:
        assert shown and [part for part in shown if part not in printed] == []
    else:
        assert shown == ["(filled from experiments/results)"]


@pytest.mark.parametrize(
    "registry",
    [routing.FAMILIES, dispatch.PLANS, GROUPED_FFN.backends],
    ids=["routers", "dispatchers", "back ends"],
)
def test_the_table_of_seams_lists_what_is_registered(registry: Any):
    rows = re.findall(r"^\| \d .*$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert len(rows) == 9
    assert [name for name in registry if f"`{name}`" not in "\n".join(rows)] == []


# --- add a router -----------------------------------------------------------------------------------------------------

ADD_A_ROUTER = ROOT / "docs" / "add_a_router.md"
ROUTER, TEST, *_ = blocks(ADD_A_ROUTER, "python")


@pytest.fixture
def top_p() -> Iterator[None]:
    """The page's router, as if pasted at the end of ``moejax/routing/families.py``."""
    exec(compile(ROUTER, "docs/add_a_router.md", "exec"), dict(vars(routing.families)))
    yield
    del routing.FAMILIES["top_p"]


def laws(*modules: ModuleType) -> list[Any]:
    """The tests of ``modules`` that run over all registered routers, or over those of token choice."""
    found = []
    for module in modules:
        for name, test in vars(module).items():
            marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
            over = [m.args[1] for m in marks if m.args[0] == "name"]
            if len(marks) == 1 and over in ([moe_fakes.FAMILIES], [moe_fakes.TOKEN_CHOICE]):
                found.append(pytest.param(test, id=name))
    return found


LAWS = laws(router_laws, loss_laws)


def test_the_page_keeps_its_promise_of_forty_lines():
    assert len((ROUTER + TEST).splitlines()) <= 40


def test_the_routers_own_test_passes(top_p: None):
    namespace = dict(vars(router_laws))
    exec(compile(TEST, "docs/add_a_router.md", "exec"), namespace)
    (own,) = [value for name, value in namespace.items() if name not in vars(router_laws) and callable(value)]
    own()


def test_the_page_lists_the_laws():
    (table,) = re.findall(r"^\| test \| law \|\n\|---\|---\|\n((?:\|.*\n)+)", ADD_A_ROUTER.read_text(), re.MULTILINE)
    assert len(table.splitlines()) <= len(LAWS)


@pytest.mark.parametrize("law", LAWS)
def test_the_router_keeps_every_law(law: Any, top_p: None):
    law("top_p")


# --- the kernels page -------------------------------------------------------------------------------------------------


def test_the_example_of_the_kernels_page_computes_what_it_says(capsys: pytest.CaptureFixture[str]):
    (code,) = blocks(ROOT / "docs/kernels.md", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    x, gate, up, down, weight, chosen = (
        np.asarray(names[name], np.float32) for name in ("x", "gate", "up", "down", "weight", "expert")
    )
    wanted, ups = np.zeros_like(x), []
    for token, (experts, weights) in enumerate(zip(chosen.astype(int), weight, strict=True)):
        for expert, share in zip(experts, weights, strict=True):
            h = x[token] @ gate[expert]
            ups.append((expert, x[token] @ up[expert]))
            wanted[token] += share * (h / (1 + np.exp(-h)) * ups[-1][1] @ down[expert])
    np.testing.assert_allclose(np.asarray(names["y"], np.float32), wanted, atol=0.03)  # bfloat16 of up to about 4
    sorted_ups = np.stack([row for _, row in sorted(ups, key=lambda pair: pair[0])])
    np.testing.assert_allclose(np.asarray(names["hidden"], np.float32), sorted_ups, atol=0.03)
    whole = np.tile([True, False], len(gate)).repeat(np.asarray(names["halves"]))
    some = np.asarray(names["some"], np.float32)
    np.testing.assert_allclose(some[whole], sorted_ups[whole], atol=0.03)
    np.testing.assert_allclose(some[~whole, :128], sorted_ups[~whole, :128], atol=0.03)
    assert "mosaic_gpu: " in capsys.readouterr().out
