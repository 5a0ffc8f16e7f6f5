"""Puts the report together: one self-contained HTML file from one workdir or several."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from moejax.report import compare, health, pareto, sections, sweeps, tables
from moejax.report.blocks import Notes, Section
from moejax.report.caveats import caveats
from moejax.report.load import Run, read_run
from moejax.results import scan_rows, write_atomically

SECTIONS: tuple[tuple[str, Callable[[Run], Section | list[Section]]], ...] = (
    ("Verdicts", lambda run: tables.verdict_counts([run])),
    ("Run", sections.facts),
    ("Sweep", sweeps.sweep),
    ("Tables", tables.tables),
    ("Loss", sections.curves),
    ("Held-out text", sections.held_out),
    ("Warnings", health.warnings),
    ("Expert load", sections.load),
    ("Expert load by domain and token class", health.load_parts),
    ("Tasks", sections.tasks),
    ("What this does not show", caveats),
)
"""Name and maker, in the order of the page. A new part of the report is a function from a run, added here."""

_FOLDER = Path(__file__).parent


def build_report(
    workdirs: Sequence[str | Path], output: str | Path | None = None, results: Sequence[str | Path] = ()
) -> Path:
    """Writes the report of ``workdirs`` and of ``results`` and returns its path.

    Args:
      workdirs: folders of runs or sweeps; a run may be unfinished, and a part without data is named as missing.
      output: the file. None: ``report.html`` in the first workdir.
      results: results files without a workdir, such as committed ones.

    Raises:
      ValueError: nothing to report, or results files only and no ``output``.
      FileNotFoundError: a workdir or file that does not exist, or a folder that is no workdir.
    """
    if not (workdirs or results):
        raise ValueError("--workdir: give the folder of at least one run")
    if output is None and not workdirs:
        raise ValueError("--output: name the file that the report of results files goes to")
    runs = [read_run(workdir, f"run-{i}") for i, workdir in enumerate(workdirs, start=1)]
    runs += [_of_file(Path(file), f"run-{i}") for i, file in enumerate(results, start=len(runs) + 1)]
    path = Path(output) if output is not None else Path(workdirs[0]) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(runs))
    return path


def _of_file(path: Path, key: str) -> Run:
    if not path.is_file():
        raise FileNotFoundError(f"--results={path}: no such file")
    rows, broken = scan_rows(path)
    return Run(path, key, rows=rows, problems=broken)


def render(runs: Sequence[Run]) -> str:
    """The HTML of a report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["verdict_class"] = lambda verdict: verdict.split(" (")[0].replace(" ", "-")
    environment.filters["svg"] = Markup  # made by plots.render, which escapes what it takes
    parts = [
        (
            run,
            Notes(run.problems, "problem") if run.problems else None,
            _sections(run),
        )
        for run in runs
    ]
    return environment.get_template("template.html.jinja").render(
        title=sweeps.title(runs[0])[0] if len(runs) == 1 else f"{len(runs)} runs",
        titles={run.key: sweeps.title(run) for run in runs},
        parts=parts,
        overview=[*(compare.overview(runs) if len(runs) > 1 else []), *pareto.sections(runs)],
        css=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
    )


def _sections(run: Run) -> list[Section]:
    """All sections; those of training that are missing are left out where there was none: a sweep, a results file."""
    found = [section for name, make in SECTIONS for section in _made(name, make, run)]
    if run.config or run.env or any(run.metrics.values()) or not (run.rows or (run.path / sweeps.LEDGER).exists()):
        return found
    return [section for section in found if not section.absent or section.anchor.startswith("failed-")]


def _made(name: str, make: Callable[[Run], Section | list[Section]], run: Run) -> list[Section]:
    """The sections of one maker. A file that holds something unforeseen costs one section, not the report."""
    try:
        found = make(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"Could not be drawn from what is in {run.path}: {type(error).__name__}: {error}"
        return [Section(f"failed-{name.lower().replace(' ', '-')}", name, absent=why)]
    return found if isinstance(found, list) else [found]


def _data_uri(text: str) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode()).decode()
