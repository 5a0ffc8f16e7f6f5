"""Results rows as Markdown, for the tables of the README and the docs: generated, never typed."""

from collections.abc import Sequence

from moejax.report.blocks import Cell, Table, metric_words
from moejax.report.tables import commands, contrast_table, group_rows, headline, table_title, value_tables
from moejax.results import ResultRow
from moejax.verdicts import count_verdicts


def results_markdown(rows: Sequence[ResultRow]) -> str:
    """Every table of ``rows``: values, contrasts, verdict counts and where they come from.

    Returns "" for no rows. The output depends on the rows alone, so that a test can compare it with a
    committed page.
    """
    parts = []
    for (paper, table, setting), group in group_rows(rows).items():
        parts.append(f"### {table_title(paper, table, setting)}")
        values = [row for row in group if row.kind == "value"]
        contrasts = [row for row in group if row.kind == "contrast"]
        parts += [_table(table) for table in value_tables(values, headline(group))]
        if contrasts:
            parts.append(_table(contrast_table(contrasts)))
        counts = count_verdicts([row.verdict for row in group])
        if any(counts.values()):
            parts.append("Verdicts: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + ".")
        parts.append(_origin(group))
    return "\n\n".join(part for part in parts if part) + "\n" if parts else ""


def _table(table: Table) -> str:
    keep = [
        i
        for i, _ in enumerate(table.columns)
        if i == 0 or table.columns[i] == "verdict" or any(row[i].text != "–" for row in table.rows)
    ]
    head = [table.columns[i] for i in keep]
    align = ["--:" if table.rows[0][i].kind in ("number", "strong") else "---" for i in keep]
    lines = [table.caption, "", _line(head), "|" + "|".join(align) + "|"]
    lines += [_line([_text(row[i]) for i in keep]) for row in table.rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(cell: Cell) -> str:
    text = " ".join(cell.text.split())
    for character in "\\|<>*_`":
        text = text.replace(character, f"\\{character}")
    return f"**{text}**" if cell.kind == "verdict" else text


def _origin(rows: Sequence[ResultRow]) -> str:
    devices = sorted({f"{row.device} × {row.device_count}" for row in rows if row.device})
    commits = sorted(
        {row.commit[:12] + (" with uncommitted changes" if row.dirty else "") for row in rows if row.commit}
    )
    metrics = sorted({metric_words(row.metric) for row in rows})
    facts = [f"{len(rows)} rows" + (f" ({', '.join(metrics)})" if len(metrics) <= 4 else "")]
    facts += [f"measured on {', '.join(devices)}"] if devices else []
    facts += [f"commit {', '.join(commits)}"] if commits else []
    return "; ".join(facts) + "." + "".join(f"\n\n```\n{command}\n```" for command in commands(rows))
