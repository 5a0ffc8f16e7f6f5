"""Writes the report of runs, sweeps and results files as one HTML file, or prints results as Markdown.

python -m experiments.report --workdir=runs/a [--workdir=runs/b] [--output=report.html]
python -m experiments.report --results=experiments/results/x.jsonl --output=x.html
python -m experiments.report --results=experiments/results/x.jsonl --format=markdown [--output=x.md]
"""

import glob
import sys
from pathlib import Path

from absl import app, flags

from moejax.report import build_report, results_markdown
from moejax.report.load import check_workdir
from moejax.results import scan_rows, write_atomically

_WORKDIR = flags.DEFINE_multi_string("workdir", [], "Folder of a run or a sweep; may be given several times.")
_RESULTS = flags.DEFINE_multi_string("results", [], "A results.jsonl, or a pattern; may be given several times.")
_FORMAT = flags.DEFINE_enum("format", "html", ["html", "markdown"], "html: one file; markdown: tables only.")
_OUTPUT = flags.DEFINE_string("output", None, "File to write. html: report.html in the first workdir; markdown: print.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: folders are given as --workdir=DIR")
    files = [name for pattern in _RESULTS.value for name in sorted(glob.glob(pattern)) or [pattern]]
    if not (files or _WORKDIR.value):
        raise app.UsageError("nothing to report: give --workdir=DIR or --results=FILE")
    try:
        if _FORMAT.value == "html":
            print(build_report(_WORKDIR.value, _OUTPUT.value, files))
            return
        for folder in map(Path, _WORKDIR.value):
            check_workdir(folder)
            files.append(str(folder / "results.jsonl"))
        for file in files:
            if not Path(file).exists():
                raise FileNotFoundError(f"{file}: no such results file")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    found = [scan_rows(file) for file in files]
    text = results_markdown([row for rows, _ in found for row in rows])
    if _OUTPUT.value:
        write_atomically(Path(_OUTPUT.value), text)
    else:
        print(text, end="")
    problems = [problem for _, broken in found for problem in broken]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:  # what could be read is there; a script must not take it for everything
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
