"""Puts the report together: one self-contained HTML file from one workdir or several."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from moejax.report import sections, tables
from moejax.report.blocks import Cell, Notes, Row, Section, Table, fixed, number
from moejax.report.caveats import caveats
from moejax.report.load import Run, read_run, series
from moejax.results import write_atomically

SECTIONS: tuple[tuple[str, Callable[[Run], Section | list[Section]]], ...] = (
    ("Verdicts", lambda run: tables.verdict_counts([run])),
    ("Run", sections.facts),
    ("Tables", tables.tables),
    ("Loss", sections.curves),
    ("Held-out text", sections.held_out),
    ("Expert load", sections.load),
    ("Tasks", sections.tasks),
    ("What this does not show", caveats),
)
"""Name and maker, in the order of the page. A new part of the report is a function from a run, added here."""

_FOLDER = Path(__file__).parent


def build_report(workdirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the report of ``workdirs`` and returns its path.

    Args:
      workdirs: folders of runs; a run may be unfinished, and a part without data is named as missing.
      output: the file. None: ``report.html`` in the first workdir.

    Raises:
      ValueError: no workdir.
      FileNotFoundError: a workdir that does not exist.
    """
    if not workdirs:
        raise ValueError("--workdir: give the folder of at least one run")
    runs = [read_run(workdir, f"run-{i}") for i, workdir in enumerate(workdirs, start=1)]
    path = Path(output) if output is not None else Path(workdirs[0]) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(runs))
    return path


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
            [section for name, make in SECTIONS for section in _made(name, make, run)],
        )
        for run in runs
    ]
    return environment.get_template("template.html.jinja").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        parts=parts,
        overview=overview(runs) if len(runs) > 1 else [],
        css=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
    )


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


def overview(runs: Sequence[Run]) -> list[Section]:
    """Several runs beside each other: one line each, their losses in one figure, all verdicts."""
    labels = [run.name if [r.name for r in runs].count(run.name) == 1 else f"{run.name} ({run.key})" for run in runs]
    rows = []
    for run, label in zip(runs, labels, strict=True):
        losses, valid = (
            series(run.lines("train"), "ce")[1],
            series(run.lines("valid"), "mean_bits_per_byte")[1],
        )
        rows.append(
            [
                Cell(label),
                Cell(str(run.path)),
                Cell(run.status),
                number(fixed(losses[-1] if losses else None)),
                number(fixed(min(valid, default=None))),
                number(f"{len(run.rows):,}"),
            ]
        )
    columns = [
        "run",
        "workdir",
        "status",
        "last training cross-entropy, nats per token",
        "best validation, bits per byte",
        "results rows",
    ]
    figures = [
        sections.curve_figure(
            "compare-train",
            "Training cross-entropy",
            "nats per token",
            [(label, series(run.lines("train"), "ce")) for run, label in zip(runs, labels, strict=True)],
        ),
        sections.curve_figure(
            "compare-valid",
            "Validation, mean of domains",
            "bits per byte",
            [
                (label, series(run.lines("valid"), "mean_bits_per_byte"))
                for run, label in zip(runs, labels, strict=True)
            ],
        ),
    ]
    shown = [figure for figure in figures if figure is not None]
    blocks = [Table(columns, rows), *([Row(shown)] if shown else [])]
    return [Section("runs", "Runs", blocks), tables.verdict_counts(runs, "all-verdicts")]
