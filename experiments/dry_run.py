"""``experiments.run --dry_run``: the plan of a config for devices that need not be there (``docs/plan.md``)."""

import os
import sys

import jax.numpy as jnp
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import session
from moejax import importers, plan, pretrained, validate
from moejax.config import ConfigError, ExperimentConfig, config_hash, from_mapping
from moejax.plan import text

flags.disclaim_key_flags()  # they are those of experiments.run, and in its --help


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "dry_run", False, "Check the config, print the plan (memory, FLOPs, communication), and stop.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "mesh", None, "With --dry_run: devices to plan for, e.g. data=8,expert=4; they need not be there.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "platform", None, ["cpu", "gpu", "tpu"],
        "With --dry_run: which kernels to plan for. None: gpu for configs of scale h100 and paper, else cpu.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "dry_run_compile", False,
        "With --dry_run: also compile for the mesh, on this machine's devices, and print XLA's own figures.",
        flag_values=values,
    )  # fmt: skip


def check_flags(values: flags.FlagValues) -> None:
    """Raises ConfigError for a flag of the dry run without it."""
    given = [name for name in ("mesh", "platform", "dry_run_compile") if values[name].present]
    if given and not values.dry_run:
        raise ConfigError(f"--{given[0]} goes with --dry_run; a run takes its devices from config.mesh")


def command(values: flags.FlagValues) -> int:
    """Prints the plan; lists everything that does not divide, and then returns 2.

    Raises:
      ConfigError: what is wrong whatever the devices are.
    """
    config = pretrained.adopt(from_mapping(ExperimentConfig, values.config))
    asked = plan.parse_mesh(values.mesh, config.mesh) if values.mesh is not None else config.mesh
    mesh = plan.resolve_mesh(asked)
    problems = plan.problems(config, mesh) if min(mesh.data, mesh.expert, mesh.model) > 0 else []
    try:
        session.read_config(values.config)
        validate.check(config)
    except ConfigError as error:
        if not any(str(error).startswith(p.field.removeprefix("model.")) for p in problems):
            _report([*(str(p) for p in problems), str(error)])
            return 2
    if problems:
        _report([str(p) for p in problems])
        return 2
    counted, note = plan.with_vocabulary(config)
    kept = not config.train.steps and importers.is_hugging_face(config.init_from)
    weight_bytes = jnp.dtype(config.model.compute_dtype).itemsize if kept else jnp.dtype(jnp.float32).itemsize
    made = plan.make(counted, mesh, values.platform or plan.platform_of(config), weight_bytes)
    notes = [note] if note else []
    if asked.data == -1:
        notes.append("mesh.data=-1 takes all devices of a run; planned for one: --mesh=data=N for more")
    notes += plan.remarks(counted, mesh)
    _show(made, notes, config)
    if values.dry_run_compile:
        _compile(made)
    return 0


def _report(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    raise ConfigError("\n".join([f"{len(problems)} settings cannot work:", *(f"  {p}" for p in problems)]))


def _show(made: plan.Plan, notes: list[str], config: ExperimentConfig) -> None:
    console = Console()
    if not console.is_terminal:
        print(text.render(made, notes, config.name, config_hash(config)))
        return
    print("\n".join([*text.summary(made, config.name, config_hash(config)), *notes]))
    for table in text.tables(made):
        shown = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(table.head):
            shown.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*row, end_section=False, style="bold" if row[0] == "total" else None)
        console.print(shown)
    print("\n".join(["assumed", *(f"  {line}" for line in text.ASSUMPTIONS)]))


def _compile(made: plan.Plan) -> None:
    from moejax.plan import compiled  # it needs the training step, and so the whole library

    if made.train is None:
        raise ConfigError("--dry_run_compile compiles the training step, and train.steps=0 has none: leave it out")
    if not made.config.model.vocab_size:
        raise ConfigError("--dry_run_compile needs the vocabulary: set --config.model.vocab_size")
    # XLA plans memory while it compiles; a GPU's memory is not taken for that.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print("compiling the training step ...", file=sys.stderr, flush=True)
    figures = compiled.train_step(made.config, made.mesh)
    rows = [
        ("arguments", text.size(figures.argument_bytes), text.size(made.train.argument_bytes)),
        ("temporaries", text.size(figures.temp_bytes), text.size(made.train.peak.bytes)),
        ("sum", text.size(figures.total), text.size(made.train.total)),
    ]
    counted = {kind: 0 for kind in figures.sent}
    for collective in made.collectives:
        counted[collective.kind] = counted.get(collective.kind, 0) + collective.bytes
    rows += [(kind, text.size(figures.sent.get(kind, 0)), text.size(n)) for kind, n in counted.items()]
    print()
    print(
        text.Table(
            "XLA's figures for one device, beside the plan", ("training step", "compiled", "plan"), tuple(rows)
        ).plain()
    )
    if figures.uncounted:
        print(f"  {figures.uncounted} collectives are in loops of unknown length and count once")
