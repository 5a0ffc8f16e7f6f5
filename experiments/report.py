"""Writes the report of one run or several, or prints committed results as Markdown.

python -m experiments.report --workdir=runs/a [--workdir=runs/b] [--output=report.html]
python -m experiments.report --results=experiments/results/x.jsonl --format=markdown [--output=x.md]
"""

import glob
from pathlib import Path

from absl import app, flags

from moejax.report import build_report, results_markdown
from moejax.results import ResultsError, read_rows, write_atomically

_WORKDIR = flags.DEFINE_multi_string("workdir", [], "Folder of a run; may be given several times.")
_RESULTS = flags.DEFINE_multi_string("results", [], "A results.jsonl, for --format=markdown; several are joined.")
_FORMAT = flags.DEFINE_enum("format", "html", ["html", "markdown"], "html: one file; markdown: tables only.")
_OUTPUT = flags.DEFINE_string("output", None, "File to write. html: report.html in the first workdir; markdown: print.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: folders are given as --workdir=DIR")
    try:
        if _FORMAT.value == "html":
            if _RESULTS.value or not _WORKDIR.value:
                raise app.UsageError("--format=html needs --workdir=DIR; --results goes with --format=markdown")
            print(build_report(_WORKDIR.value, _OUTPUT.value))
            return
        files = [
            *(name for pattern in _RESULTS.value for name in sorted(glob.glob(pattern)) or [pattern]),
            *(str(Path(folder) / "results.jsonl") for folder in _WORKDIR.value),
        ]
        if not files:
            raise app.UsageError("--format=markdown needs --results=FILE or --workdir=DIR")
        for file in files:
            if not Path(file).exists():
                raise FileNotFoundError(f"{file}: no such results file")
        text = results_markdown([row for file in files for row in read_rows(file)])
    except (FileNotFoundError, ResultsError) as error:
        raise SystemExit(f"error: {error}") from error
    if _OUTPUT.value:
        write_atomically(Path(_OUTPUT.value), text)
    else:
        print(text, end="")


if __name__ == "__main__":
    app.run(main)
