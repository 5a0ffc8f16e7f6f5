"""The report of a run as one self-contained HTML file, and results rows as Markdown."""

from moejax.report.build import build_report
from moejax.report.markdown import results_markdown

__all__ = ["build_report", "results_markdown"]
