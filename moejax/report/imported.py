"""Tables of rows about imported checkpoints: parity with transformers by family, and memory while loading."""

from collections.abc import Sequence

from moejax.report.blocks import NONE, Cell, Table, fixed, is_number, number
from moejax.results import ResultRow


def parity_table(rows: Sequence[ResultRow], folded: bool = False) -> Table:
    """A line for each family: its models, their flags, and the worst of their errors (``experiments.parity``)."""
    families: dict[str, list[ResultRow]] = {}
    for row in rows:
        families.setdefault(str(row.extra.get("family", row.row)), []).append(row)
    cells = []
    for family, models in families.items():
        versions = sorted({str(v) for row in models for v in row.extra.get("transformers", ())})
        cells.append(
            [
                Cell(family),
                number(str(len(models))),
                Cell(", ".join(str(row.extra.get("variant", row.row)).replace("_", " ") for row in models)),
                Cell(" and ".join(versions) or NONE),
                number(_worst([row.value for row in models])),
                number(_worst([row.extra.get("cache_error") for row in models])),
            ]
        )
    bounds = sorted({row.extra["bound"] for row in rows if is_number(row.extra.get("bound"))})
    caption = "Largest error of a family's golden models, as a share of the largest logit, in float32"
    caption += "".join(f"; the bound is {bound:g}" for bound in bounds)
    caption += ". Cache: tokens through the key/value cache against all at once."
    columns = ["family", "models", "flags", "transformers", "logits", "cache"]
    return Table(columns, cells, caption, folded)


def _worst(errors: Sequence[object]) -> str:
    """The largest; an error that is no number is worse than any."""
    known = [error for error in errors if is_number(error)]
    return f"{max(known):.1e}" if known and len(known) == len(errors) else "not a number"


def loading_table(rows: Sequence[ResultRow], folded: bool = False) -> Table:
    """A line for each load, in GB (``experiments.load_memory``)."""
    names = {
        "checkpoint_bytes": "checkpoint",
        "largest_file_bytes": "largest file",
        "held_bytes": "arrays on all devices",
        "largest_shard_bytes": "largest shard",
        "anonymous_bytes": "peak anonymous",
        "beyond_model_bytes": "of it beyond the arrays",
        "resident_bytes": "peak resident, with file pages",
    }
    cells = [
        [
            Cell(row.row, title=f"row {row.id}"),
            *(number(fixed(row.extra[key] / 1e9, 2) if is_number(row.extra.get(key)) else NONE) for key in names),
        ]
        for row in rows
    ]
    caption = (
        "Memory of a process that loads a checkpoint, GB above its state before. Devices are emulated on the CPU, so "
        "their arrays lie in the same memory. Anonymous: what the system cannot take back."
    )
    return Table(["program, mesh", *names.values()], cells, caption, folded)


OWN_TABLES = {"parity": parity_table, "loading": loading_table}
"""By ``ResultRow.paper``: rows that are shown in a form of their own."""
