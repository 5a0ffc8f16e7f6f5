"""A plan as tables: the same cells for a terminal (rich) and for plain text."""

import dataclasses

from moejax.config import config_hash
from moejax.plan import Plan
from moejax.plan.memory import GRADIENTS, Memory
from moejax.plan.sizes import Array

ASSUMPTIONS = (
    "arrays are counted as the code makes them; XLA fuses some and keeps others longer (docs/plan.md: how far off)",
    "not included: fragmentation, the allocator's and the runtime's own memory, checkpoints being written, host memory",
    "parameters, gradients and AdamW moments are float32; the state is donated, so a step holds it once",
    "a collective's bytes are those of the array on one device; 'sent' is by a ring",
)
COLUMNS = ("parameters", "AdamW moments", "gradients", "activations", "input")


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned, the others right."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def plain(self) -> str:
        lines = (self.head, *self.rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        shown = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in shown)])


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves a number of 1 or more: ``1.50 GiB``."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:,.2f} {unit}"
    return f"{count:,.0f} B"


def summary(plan: Plan, name: str, hash_: str) -> list[str]:
    """The lines above the tables. Name and hash are those of the config as given."""
    p, config, sizes = plan.parameters, plan.config, (plan.train or plan.evaluation).sizes
    forward, training = plan.flops_per_token, 3 * plan.flops_per_token
    planned = "no training (train.steps=0): weights are evaluated as they are"
    flops = f"FLOPs per token: {forward:,.0f} forward"
    if plan.train:
        tokens = config.train.steps * plan.tokens_per_step
        planned = (
            f"training {config.train.steps:,} steps x {config.train.batch_size} sequences x {config.data.seq_len} "
            f"tokens = {tokens:,} tokens, {training * tokens:.3g} model FLOPs"
        )
        flops += f", {training:,.0f} training; {training * plan.tokens_per_step / plan.devices:.3g} per step and device"
    return [
        f"config {name} ({hash_})",
        f"parameters {p.total:,} total, {p.active:,} active per token; routed experts {p.routed_experts / p.total:.0%}",
        planned,
        flops,
        f"mesh data={plan.mesh.data} x expert={plan.mesh.expert} x model={plan.mesh.model} = {plan.devices} "
        f"device{'s' * (plan.devices > 1)} ({plan.platform}); experts by {sizes.back_end!r}, "
        f"attention by {sizes.core!r}, remat {config.model.remat!r}",
    ]


def tables(plan: Plan) -> list[Table]:
    """Parameters, memory of training and evaluation by part, and communication."""
    programs = {"training step": plan.train, "evaluation batch": plan.evaluation}
    found = [_parameters(plan), *(_memory(title, memory) for title, memory in programs.items() if memory)]
    if plan.collectives:
        rows = tuple(
            (c.cause, c.kind, f"{c.over} ({c.devices})", size(c.bytes), size(c.wire)) for c in plan.collectives
        )
        head = ("cause", "collective", "over", "bytes", "sent")
        found.append(Table("communication of a training step, on one device", head, rows))
    return found


def _parameters(plan: Plan) -> Table:
    p = plan.parameters
    parts = [("embedding", p.embedding), ("attention", p.attention), ("dense FFN", p.dense_ffn),
             ("routed experts", p.routed_experts), ("shared experts", p.shared_experts),
             ("router", p.router)]  # fmt: skip
    parts.append(("multi-token prediction", p.prediction))
    parts.append(("norms", p.total - sum(n for _, n in parts)))
    rows = [(name, f"{n:,}", f"{n / p.total:.1%}") for name, n in parts if n]
    return Table("parameters of the model", ("part", "number", "share"), tuple(rows))


def _memory(title: str, memory: Memory) -> Table:
    """One row a part; columns are what the program is given, then what is alive at its largest moment."""
    columns: dict[str, list[Array]] = {name: [] for name in COLUMNS}
    for a in memory.arguments:
        columns[a.what if a.what in columns else "input"].append(a)
    for a in memory.peak.arrays:
        columns["gradients" if a.what in GRADIENTS else "activations"].append(a)
    sums = {name: memory.by_part(arrays) for name, arrays in columns.items() if arrays}
    rows = []
    for part in memory.by_part([*memory.arguments, *memory.peak.arrays]):
        cells = [column.get(part, 0) for column in sums.values()]
        rows.append((part, *(size(c) if c else "" for c in cells), size(sum(cells))))
    totals = [sum(column.values()) for column in sums.values()]
    rows.append(("total", *(size(c) for c in totals), size(sum(totals))))
    name = f"memory of one device, {title}, at its largest moment ({memory.peak.name})"
    return Table(name, ("part", *sums, "sum"), tuple(rows))


def render(plan: Plan, notes: list[str], name: str, hash_: str | None = None) -> str:
    """All of it as plain text."""
    blocks = ["\n".join([*summary(plan, name, hash_ or config_hash(plan.config)), *notes])]
    blocks += [table.plain() for table in tables(plan)]
    blocks.append("\n".join(["assumed", *(f"  {line}" for line in ASSUMPTIONS)]))
    return "\n\n".join(blocks)
