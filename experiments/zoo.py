"""The model zoo: what published mixture-of-experts models count to, beside what was published.

    python -m experiments.zoo                                      # all rows
    python -m experiments.zoo --model=deepseek_v3                  # one, with its parts
    python -m experiments.zoo --model=deepseek_v3 --mtp=1          # with a multi-token-prediction module
    python -m experiments.zoo --format=markdown --output=docs/zoo.md

Models with a preset under ``configs/models`` are counted from it; the others are added up in ``experiments.zoo_rows``,
with a word on what is missing here to run them. No device is asked and nothing is allocated.
"""

import dataclasses
import difflib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import session
from experiments.zoo_rows import ROWS, Reason, Row
from moejax import count
from moejax.config import ConfigError, ExperimentConfig, ModelConfig, from_mapping
from moejax.plan.text import Table
from moejax.results import write_atomically
from moejax.validate import check_model

CONTEXT = 4096
"""Tokens of the sequence whose mean token's FLOPs are shown."""
WITHIN = 0.01
"""Relative difference that a count may have from the published figure, where its rounding does not allow more."""
UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one row counts to."""

    row: Row
    parts: dict[str, tuple[int, int]]
    """Parameters by part: all, and those used for one token."""
    total: int
    active: int
    flops: float | None
    """Of one token's forward pass at :data:`CONTEXT`. None where this count does not cover the model."""
    cache_bytes: int | None
    """Of one token, bfloat16."""
    router: str

    @property
    def expert_share(self) -> float:
        """Routed experts' share of all parameters."""
        return self.parts["routed experts"][0] / self.total


def router_style(model: ModelConfig) -> str:
    """The router in words: family, k, and every flag that is not the plainest."""
    moe, router = model.moe, model.moe.router
    families = {
        "topk_of_softmax": f"top-{router.k} of softmax",
        "softmax_of_topk": f"softmax of the top-{router.k} logits",
        "sigmoid_bias": f"top-{router.k} of sigmoid with selection bias",
        "softmax_bias": f"top-{router.k} of softmax with selection bias",
        "topk_of_sigmoid": f"top-{router.k} by sigmoid",
        "sparsemixer": f"top-{router.k} by SparseMixer-v2",
    }
    words = [families.get(router.name, f"{router.name}, k={router.k}")]
    if router.name not in ("softmax_of_topk", "sparsemixer"):
        words.append("renormalised" if router.renormalise else "as is")
    if router.scale != 1:
        words.append(f"times {router.scale:g}")
    if router.groups > 1:
        scored = "best expert" if router.group_score == "max" else "best two"
        words.append(f"in the best {router.groups_kept} of {router.groups} groups by their {scored}")
    if moe.weigh == "input":
        words.append("weighs the experts' input")
    if router.bias:
        words.append("bias on the logits")
    words.append(f"{moe.num_experts} experts")
    if moe.zero_experts:
        words.append(f"{moe.zero_experts} that return their input")
    if moe.shared_experts:
        words.append(f"{moe.shared_experts} shared" + (" behind a gate" if moe.shared_gate == "sigmoid" else ""))
    if moe.first_dense:
        words.append(f"first {moe.first_dense} dense" if moe.first_dense > 1 else "first layer dense")
    return ", ".join(words)


def figures(row: Row, mtp_layers: int = 0) -> Figures:
    """Counts ``row``, from its preset or its parts.

    ``mtp_layers``: multi-token-prediction modules that are counted as parts, too, and in no total, as in published
    figures; only of a preset.
    """
    if row.parts is not None:
        if mtp_layers:
            raise ConfigError(f"--mtp={mtp_layers}: {row.id} is counted from published sizes, without such modules")
        parts = {name: (round(total), round(active)) for name, (total, active) in row.parts.parts.items()}
        return Figures(
            row, parts, row.parts.total, row.parts.active, row.parts.flops(CONTEXT), row.parts.cache_bytes or None,
            row.router,
        )  # fmt: skip
    config = importlib.import_module(f"configs.models.{row.id}").get_config()
    model = from_mapping(ExperimentConfig, config).model
    p = count.parameters(model)
    table = model.vocab_size * model.dim
    sizes = {
        "input embedding": table,
        "output embedding": p.embedding - table,
        "attention": p.attention,
        "dense FFN": p.dense_ffn,
        "shared experts": p.shared_experts,
        "router": p.router,
    }
    sizes["norms"] = p.total - p.routed_experts - sum(sizes.values())
    parts = {name: (size, size) for name, size in sizes.items() if size}
    parts["routed experts"] = (p.routed_experts, p.routed_experts - (p.total - p.active))
    if mtp_layers:
        further = dataclasses.replace(model, mtp_layers=mtp_layers)
        check_model(further)
        modules = count.prediction_parameters(further)
        parts["multi-token prediction, beside the total"] = (modules, 0)
        parts["its copies of embedding and head in files"] = (2 * mtp_layers * table, 0)
    flops = count.forward_flops_per_token(model, CONTEXT)
    return Figures(row, parts, p.total, p.active, flops, count.cache_bytes_per_token(model), router_style(model))


# --- beside the published figures -------------------------------------------------------------------------------------


def published(figure: str) -> tuple[float, float]:
    """``46.7B`` as ``(value, one of its last digit)``."""
    digits, unit = figure[:-1], UNITS[figure[-1]]
    return float(digits) * unit, unit * 10.0 ** -len(digits.partition(".")[2])


def within(counted: float, figure: str) -> bool:
    """Whether a count is the published figure within 1 % or its rounding."""
    value, digit = published(figure)
    return abs(counted - value) <= max(WITHIN * value, digit / 2)


def holds(reason: Reason, made: Figures, which: str) -> bool:
    """Whether what ``reason`` states is so; one that states nothing to check holds."""
    figure, index = getattr(made.row, which), ("total", "active").index(which)
    counted, value = getattr(made, which), published(figure)[0]
    left = counted - sum(made.parts[name][index] for name in reason.without)
    if reason.truncated:
        return value <= left < value + published(figure)[1]
    if reason.alone:
        return made.parts[reason.alone][index] > value
    if reason.missing:
        return within(counted + reason.missing, figure)
    if reason.between:
        return counted - made.parts[reason.between][index] < value < counted
    return within(left, figure) if reason.without else True


def beside(made: Figures, which: str) -> str:
    """The published figure and the ratio of the count to it: ``46.7B (1.000)``."""
    figure = getattr(made.row, which)
    return f"{figure} ({getattr(made, which) / published(figure)[0]:.3f})" if figure else "-"


def remarks(made: Figures) -> list[str]:
    """Everything to be said of a row, in sentences."""
    row = made.row
    said = [f"{which}: {reason.text}" for which, reason in row.off.items()]
    return [*([f"Counted, not run: {row.why}."] if row.why else []), *(f"Off in {s}." for s in said),
            *([row.note] if row.note else [])]  # fmt: skip


# --- formats ----------------------------------------------------------------------------------------------------------

HEAD = ("model", "total", "published", "active", "published", "GFLOPs/token", "KV B/token", "experts")


def short(number: float) -> str:
    """A count in billions (or millions) with four digits."""
    return f"{number / 1e9:,.4g}B" if number >= 1e9 else f"{number / 1e6:,.4g}M"


def cells(made: Figures) -> tuple[str, ...]:
    flops = "-" if made.flops is None else f"{made.flops / 1e9:,.2f}"
    cache = "-" if made.cache_bytes is None else f"{made.cache_bytes:,}"
    return (made.row.name, short(made.total), beside(made, "total"), short(made.active), beside(made, "active"),
            flops, cache, f"{made.expert_share:.1%}")  # fmt: skip


def as_text(rows: list[Figures]) -> str:
    if len(rows) > 1:
        title = f"published models; FLOPs of the forward pass at context {CONTEXT:,}, cache in bfloat16"
        return Table(title, HEAD, tuple(cells(made) for made in rows)).plain()
    (made,) = rows
    lines = [f"{name:14s} {cell}" for name, cell in zip(HEAD, cells(made), strict=True)]
    lines += [f"router         {made.router}", f"published in   {made.row.source}", *remarks(made)]
    if made.row.parts is None:
        lines.append(f"Preset: --config=configs/models/{made.row.id}.py")
    table = Table("parameters", ("part", "all", "for one token"),
                  tuple((n, f"{t:,}", f"{a:,}") for n, (t, a) in made.parts.items()))  # fmt: skip
    return "\n".join([*lines, table.plain()])


INTRO = f"""# The model zoo

Published mixture-of-experts models, counted by this code beside what was published. This page is the output of

```
python -m experiments.zoo --format=markdown --output=docs/zoo.md
```

`python -m experiments.zoo --model=deepseek_v3` prints one row with its parts. In brackets stands the count divided by
the published figure. A count is within 1 % of it or within its rounding, or the remarks say why not; such a reason is
checked against the count where it can be. *Active* is what one token uses: all but the routed experts that it does not
choose, input embedding included. FLOPs are those of one token's forward pass, the mean over a sequence of {CONTEXT:,}
tokens, latent attention as it is trained. KV bytes are those that one token takes in the decoding cache, in bfloat16,
over all layers (a layer with a window needs no more than its window). *Experts* is the routed experts' share of all
parameters.
"""
RUNNABLE = """## Models with a preset

`--config=configs/models/NAME.py` is the published size, `--config=configs/models/NAME.py:tiny` the same architecture at
a size that a CPU trains in seconds. What the full size needs on a mesh ([plan](plan.md)):

```
python -m experiments.run --config=configs/models/olmoe_1b_7b.py --dry_run --mesh=data=2,expert=8
```
"""
COUNTED = """## Models that are counted only

What is missing here to run them stands in the remarks. Sizes are those of Table 2 of the survey 2407.06204 and of the
models' own papers. FLOPs of encoder-decoders and of Mamba layers, and a cache of the former, are not counted.
"""


def markdown_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" if i == 0 else "---:" for i in range(len(head))), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(rows: list[Figures]) -> str:
    """The whole page."""
    blocks = [INTRO]
    for text, chosen in ((RUNNABLE, [r for r in rows if r.row.parts is None]),
                         (COUNTED, [r for r in rows if r.row.parts is not None])):  # fmt: skip
        if not chosen:
            continue
        runs = chosen[0].row.parts is None
        named = [(f"{c[0]}<br>`{r.row.id}`" if runs else c[0], *c[1:]) for r in chosen for c in [cells(r)]]
        said = [f"- **{r.row.name}** ({r.row.source}): {r.router}. {' '.join(remarks(r))}".rstrip() for r in chosen]
        blocks += [text, markdown_table(HEAD, named) + "\n", "\n".join(said) + "\n"]
    return "\n".join(blocks)


def as_json(rows: list[Figures]) -> str:
    def fields(made: Figures) -> dict[str, Any]:
        row = made.row
        return {
            "id": row.id, "name": row.name, "preset": row.parts is None, "total": made.total, "active": made.active,
            "published_total": row.total or None, "published_active": row.active or None, "source": row.source,
            "off": {which: reason.text for which, reason in row.off.items()}, "forward_flops_per_token": made.flops,
            "context": CONTEXT, "cache_bytes_per_token": made.cache_bytes, "expert_share": made.expert_share,
            "router": made.router, "parts": made.parts, "remarks": remarks(made),
        }  # fmt: skip

    return json.dumps([fields(made) for made in rows], indent=1)


FORMATS = {"text": as_text, "markdown": as_markdown, "json": as_json}


def choose(name: str | None) -> list[Row]:
    """The row of that name, or all.

    Raises:
      ConfigError: there is none.
    """
    if name is None:
        return list(ROWS)
    names = [row.id for row in ROWS]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? All: " if close else "choose one of "
        raise ConfigError(f"--model={name}: there is no such row; {hint}{', '.join(names)}")
    return [row for row in ROWS if row.id == name]


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    flags.DEFINE_string("model", None, "One row, by its name. None: all.", flag_values=values)
    flags.DEFINE_integer(
        "mtp", 0, "With --model: multi-token-prediction modules that are counted beside it.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum("format", "text", list(FORMATS), "How the rows are written.", flag_values=values)
    flags.DEFINE_string("output", None, "File to write. None: standard output.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if values.mtp and values.model is None:
        raise ConfigError(f"--mtp={values.mtp} counts modules of one model: name it with --model")
    text = FORMATS[values.format]([figures(row, values.mtp) for row in choose(values.model)]).rstrip() + "\n"
    if values.output is None:
        print(text, end="")
        return 0
    path = Path(values.output)
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--output={path}: must be a file in a folder that is there")
    try:
        write_atomically(path, text)
    except PermissionError as error:
        raise ConfigError(f"--output={path} cannot be written: choose a folder that you may write") from error
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
