"""Who may import whom (``docs/architecture.md``), held by reading the source, not by importing it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A unit is a file or folder of moejax. Each may import those on earlier lines and on its own; no circles.
CHAIN = (
    ("types",),
    ("config", "sharding"),
    ("routing", "losses", "limits", "partition", "replication", "norm", "rope"),
    ("dispatch", "experts", "attention", "neurons"),
    ("moe",),
    ("blocks",),
    ("mtp",),
    ("model",),
    (
        "decode",
        "derived",
        "importance",
        "offload",
        "checkpoint",
        "importers",
        "pretrained",
        "train",
        "trace",
        "replay",
        "replicas",
        "count",
        "loop",
        "meter",
        "plan",
        "pruning",
        "thresholds",
        "validate",
        "watch",
    ),
)
# Units that know no model: they work on files, text, numbers and rows. The last line of CHAIN imports them.
MODEL_FREE = (
    "data", "ngram", "tasks", "interrupt", "metrics", "progress", "recompile", "results", "verdicts", "report",
    "evaluate",
)  # fmt: skip
# A calculator that runs without devices.
CALCULATOR = ("tune",)

RANK = {unit: rank for rank, units in enumerate(CHAIN) for unit in units}
FIRST_WITH_KERNELS = RANK["experts"]

KERNEL_PACKAGES = {"kernels_pallas", "jax", "jaxtyping", "numpy"}
CONFIG_PACKAGES = {"configs", "ml_collections"}

DEPRECATED = (
    "jax.experimental.shard_map",
    "jax.experimental.pjit",
    "jax.experimental.maps",
    "jax.pmap",
    "jax.tree_map",
)
MAX_LINES = 400


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                kept = package[: len(package) - (node.level - 1)]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def unit_of(name: str) -> str | None:
    """The unit of moejax that ``name`` is in: ``routing`` for ``moejax.routing.x``; None outside moejax."""
    parts = name.split(".")
    return parts[1] if parts[0] == "moejax" and len(parts) > 1 else None


def may_import(unit: str, other: str) -> bool:
    """Whether ``moejax/<unit>`` may import ``moejax/<other>``."""
    if unit == other:
        return True
    if unit in CALCULATOR:
        return other == "config"
    if unit in MODEL_FREE:
        return other in ("types", "config", *MODEL_FREE)
    if other in MODEL_FREE + CALCULATOR:
        return unit in CHAIN[-1]
    return RANK[other] <= RANK[unit]


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What ``module`` imports against the rule, one sentence for each."""
    top = module.split(".")[0]
    unit = unit_of(module)
    found = []
    for line, name in imported(source, module, is_package):
        package = name.split(".")[0]
        other = unit_of(name)
        why = None
        if package == "experiments" and top != "experiments":
            why = "nothing imports experiments"
        elif top == "kernels_pallas" and package not in KERNEL_PACKAGES | sys.stdlib_module_names:
            why = f"kernels_pallas imports {sorted(KERNEL_PACKAGES)} and the standard library only"
        elif top == "configs" and package not in CONFIG_PACKAGES | sys.stdlib_module_names:
            why = f"configs import {sorted(CONFIG_PACKAGES)} and the standard library only"
        elif top == "moejax" and package == "configs":
            why = "the library knows no config file"
        elif unit and package == "kernels_pallas" and RANK.get(unit, -1) < FIRST_WITH_KERNELS:
            why = "kernels are called from the experts on"
        elif unit and other and is_known(unit) and is_known(other) and not may_import(unit, other):
            why = f"moejax/{unit} may not import moejax/{other}"
        if why:
            found.append(f"{module}:{line} imports {name}: {why}")
    return found


def is_known(unit: str) -> bool:
    return unit in RANK or unit in MODEL_FREE + CALCULATOR


def dotted(node: ast.AST) -> str:
    """``jax.lax.psum`` for the expression that reads so, and '' for any that is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def names_used(source: str, module: str) -> Iterator[tuple[int, str]]:
    yield from imported(source, module)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            yield node.lineno, name


def name_violations(module: str, source: str) -> list[str]:
    """Deprecated names, and ``shard_map`` outside the dispatcher."""
    found = []
    for line, name in names_used(source, module):
        if any(name == old or name.startswith(old + ".") for old in DEPRECATED):
            found.append(f"{module}:{line} uses {name}, which is deprecated")
        elif name == "jax.shard_map" and unit_of(module) != "dispatch":
            found.append(f"{module}:{line} uses {name}: only moejax/dispatch does")
    return found


def edges(modules: dict[str, str]) -> dict[str, set[str]]:
    """Who imports whom among the units of moejax. ``modules``: source by module name."""
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        if unit := unit_of(module):
            others = {unit_of(name) for _, name in imported(source, module)}
            graph.setdefault(unit, set()).update(other for other in others if other and other != unit)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Units in or before a circle: those left after removing, again and again, what imports none left."""
    left = {unit: set(others) for unit, others in graph.items()}
    while done := [unit for unit, others in left.items() if not others & left.keys()]:
        for unit in done:
            del left[unit]
    return sorted(left)


CODE = sources("moejax", "kernels_pallas", "configs", "experiments")


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_rule(path: Path):
    source = path.read_text()
    assert violations(module_name(path), source, path.name == "__init__.py") == []
    assert name_violations(module_name(path), source) == []


def test_every_unit_has_a_place():
    units = {path.relative_to(ROOT / "moejax").parts[0].removesuffix(".py") for path in sources("moejax")}
    unplaced = sorted(unit for unit in units - {"__init__"} if not is_known(unit))
    assert not unplaced, f"give {unplaced} a place in CHAIN or MODEL_FREE above, and in docs/architecture.md"


def test_no_circles():
    assert circle(edges({module_name(path): path.read_text() for path in sources("moejax")})) == []


@pytest.mark.parametrize("path", sources("moejax", "kernels_pallas"), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines: make it a folder of the same name"


def test_no_utils():
    folders = ("moejax", "kernels_pallas", "configs", "experiments", "scripts", "tests")
    assert [path for path in sources(*folders) if path.stem in ("util", "utils")] == []


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("kernels_pallas.dispatch", "import moejax.types", "kernels_pallas imports"),
        ("kernels_pallas.dispatch", "def f():\n    from flax import nnx", "kernels_pallas imports"),
        ("moejax.train", "from experiments import run", "nothing imports experiments"),
        ("moejax.train", "import configs.base", "no config file"),
        ("configs.quickstart", "import jax", "configs import"),
        ("moejax.types", "from moejax.config import Config", "may not import moejax/config"),
        ("moejax.routing", "from moejax import config, moe", "may not import moejax/moe"),
        ("moejax.routing", "from . import moe", "may not import moejax/moe"),
        ("moejax.data.text", "from ..model import Model", "may not import moejax/model"),
        ("moejax.evaluate", "from moejax.model import Model", "may not import moejax/model"),
        ("moejax.tune", "from moejax.routing import FAMILIES", "may not import moejax/routing"),
        ("moejax.model", "from moejax.data import text", "may not import moejax/data"),
        ("moejax.routing", "from kernels_pallas import grouped_matmul", "from the experts on"),
    ],
)
def test_the_rule_catches(module: str, source: str, reason: str):
    (sentence,) = violations(module, source)
    assert reason in sentence


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels_pallas.dispatch", "import dataclasses, jax.numpy, numpy\nfrom kernels_pallas import ref"),
        ("configs.papers.x", "import math\nfrom configs import base\nfrom ml_collections import ConfigDict"),
        ("moejax.experts", "from kernels_pallas import grouped_matmul\nfrom moejax.types import Routing"),
        ("moejax.losses", "from moejax.routing import FAMILIES"),
        ("moejax.train", "from moejax import checkpoint, data, evaluate, model"),
        ("moejax.evaluate", "from moejax import data, metrics"),
        ("experiments.sweep", "from experiments import run\nfrom moejax import train"),
    ],
)
def test_the_rule_allows(module: str, source: str):
    assert violations(module, source) == []


def test_deprecated_names_are_caught():
    assert name_violations("moejax.moe", "import jax\njax.shard_map(f)") == [
        "moejax.moe:2 uses jax.shard_map: only moejax/dispatch does"
    ]
    assert name_violations("moejax.dispatch", "import jax\njax.shard_map(f)") == []
    assert name_violations("moejax.moe", "from jax import shard_map") != []
    assert name_violations("moejax.dispatch", "from jax.experimental.shard_map import shard_map") != []
    assert name_violations("moejax.train", "import jax\ny = jax.pmap(f)(x)") != []
    assert name_violations("moejax.train", "import jax\njax.tree.map(f, x)") == []


def test_circles_are_caught():
    modules = {"moejax.routing": "import moejax.losses", "moejax.losses": "from moejax import routing, types"}
    assert circle(edges(modules)) == ["losses", "routing"]
    assert circle(edges({**modules, "moejax.losses": "from moejax import types"})) == []
