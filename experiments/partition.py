"""Splits each expert of a checkpoint into P narrower ones that together compute the same, or merges them again
(DualSparse-MoE, 2508.18376; ``docs/partition.md``).

    python -m experiments.partition --checkpoint=runs/mine --parts=2 --form=complete --output=runs/mine-p2
    python -m experiments.partition --checkpoint=runs/mine-p2 --form=merge --output=runs/mine-again

``--form=complete``: the router knows the parts, E P experts of which k P are chosen; for fine-tuning. ``partial``: the
router stays, and each pair is spread over its expert's parts when it is dispatched. ``merge``: what was split is
joined, ``moe.parts`` before ``router.copies``; bit for bit where P is a power of two. With ``--part_order=part`` the
parts of an expert (of the partial form) stand apart, for S-ETP; to change the order, merge and split again.

``--checkpoint`` is a workdir (its best checkpoint), a step folder or a Hugging Face folder. ``--output`` must be new or
empty and appears when it is complete: a workdir that every command takes. Of a run of ours it holds the optimizer's
state, the step and the place in the data, so that the run's command goes on in it, with the fields that this command
prints; ``--steps`` gives a finished run more steps. ``partition.json`` says what was done.
"""

import dataclasses
import json
from typing import Any

from absl import flags

from experiments import session
from moejax import count, derived
from moejax.config import ConfigError, ExperimentConfig, ModelConfig, MoEConfig, to_dict
from moejax.partition import complete, stored
from moejax.validate import check_model, has_experts


def planned(
    model: ModelConfig, form: str, parts: int, part_order: complete.PartOrder | None = None
) -> tuple[ModelConfig, int, complete.Form]:
    """The model that is made, of how many parts, and the form that they have or, with ``form="merge"``, had.

    Raises:
      ConfigError: the model cannot be split, or merged, like that.
    """
    if not has_experts(model):
        raise ConfigError("the model of --checkpoint has no experts to split")
    if form == "merge":
        if part_order:
            raise ConfigError(f"--part_order={part_order}: merging goes by the order that the parts have; leave it out")
        moe, parts, of_form = complete.merge_moe(model.moe, parts)
    else:
        if not parts:
            raise ConfigError(f"--parts is missing: into how many parts --form={form} splits each expert")
        of_form = "complete" if form == "complete" else "partial"
        moe = complete.split_moe(model.moe, parts, of_form, part_order)
    if model.moe.capacity_limits and of_form == "complete":
        raise ConfigError(
            f"moe.capacity_limits={model.moe.capacity_limits} of --checkpoint count and compare whole experts, and the "
            "complete form has others: add --without_limits, and set limits for the outcome"
        )
    if model.moe.capacity_factor > 0 and model.moe.capacity_order == "random" and of_form == "complete":
        raise ConfigError(
            "moe.capacity_order='random' of --checkpoint draws for each expert, so that parts of one would keep other "
            "tokens: choose --form=partial, or another order"
        )
    made = dataclasses.replace(model, moe=moe)
    check_model(made)
    return made, parts, of_form


def changes(before: Any, after: Any, path: str = "model") -> list[str]:
    """``field=value`` of each field that differs, as a command's flag names it."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [line for name in after for line in changes(before.get(name), after[name], f"{path}.{name}")]
    return [] if before == after else [f"--config.{path}={after}"]


def experts_of(moe: MoEConfig) -> str:
    order = " that stand apart" if moe.parts_apart else ""
    parts = f", each stored as {moe.parts} parts{order}" if moe.parts > 1 else ""
    copies = f" ({moe.num_experts // moe.router.copies} originals)" if moe.router.copies > 1 else ""
    return f"{moe.num_experts} experts{copies} of width {moe.expert_dim}, top-{moe.router.k}{parts}"


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    session.define_checkpoint_flag(values)
    flags.DEFINE_enum(
        "form", None, ["complete", "partial", "merge"], "How experts are split, or that they are merged again.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "parts", 0, "Parts of each expert. With --form=merge: how many are joined; 0: all.", flag_values=values
    )
    flags.DEFINE_enum(
        "part_order", None, ["expert", "part"], "Of --form=partial: the parts of an expert together, or apart, so that "
        "ranks of expert parallelism share each expert. Default: as they are.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("output", None, "Workdir to write; new or empty.", flag_values=values)
    flags.DEFINE_integer(
        "steps", 0, "train.steps of the outcome, to train on after a finished run; 0: as it was.", flag_values=values
    )
    flags.DEFINE_bool("without_limits", False, "Leave out the config's moe.capacity_limits.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    for name in ("checkpoint", "form", "output"):
        if not values[name].value:
            raise ConfigError(f"--{name} is missing: see python -m experiments.partition --help")
    if values.parts < 0 or values.steps < 0:
        raise ConfigError(f"--parts={values.parts}, --steps={values.steps}: must be 0 or more")
    derived.check_new(values.output)
    before = derived.stored(values.checkpoint)  # all that can be refused is, before weights are read
    if values.without_limits:
        moe = dataclasses.replace(before.model.moe, capacity_limits=())
        before = dataclasses.replace(before, model=dataclasses.replace(before.model, moe=moe))
    model, parts, of_form = planned(before.model, values.form, values.parts, values.part_order)
    source = derived.read(values.checkpoint)
    config = _config(before, model, values.steps, source)
    moe = before.model.moe
    if values.form == "merge":
        arrays = stored.merge_checkpoint(source.arrays, moe, parts)
    else:
        arrays = stored.split_checkpoint(source.arrays, moe, parts, of_form, values.part_order)
    record = {"command": session.command_line(), "form": values.form, "of_form": of_form, "parts": parts}
    told = json.dumps(record | {"source": source.origin}, indent=1, sort_keys=True) + "\n"
    derived.write(values.output, source, config, arrays, record, {"partition.json": told})
    layers = sum(name.startswith("params/") and name.endswith("/moe/store/up") for name in arrays)
    session.say(
        f"{values.output}: step {source.meta['step']} of {source.origin['folder']}, {layers} stacks of MoE layers; "
        f"{experts_of(moe)} -> {experts_of(model.moe)}; {count.parameters(model).total:,} parameters, were "
        f"{count.parameters(before.model).total:,}"
    )
    if source.trains:
        fields = changes(to_dict(before.model), to_dict(model))
        fields += [f"--config.train.steps={values.steps}"] if values.steps else []
        words = " ".join([f"--workdir={values.output}", *fields])
        session.say(f"with the optimizer's state: the run's own command goes on with {words}")
    else:
        session.say(
            "weights alone: train them with python -m experiments.run "
            f"--config=configs/pretrained.py:{values.output} --config.train.steps=N --workdir=DIR"
        )
    return 0


def _config(before: ExperimentConfig, model: ModelConfig, steps: int, source: derived.Source) -> ExperimentConfig:
    config = dataclasses.replace(before, model=model)
    if not steps:
        return config
    done = int(source.meta["step"])
    if not source.trains:
        raise ConfigError(
            f"--steps={steps} is for a run of ours that goes on, and --checkpoint has no optimizer's state"
        )
    if steps <= done:
        raise ConfigError(f"--steps={steps}: the checkpoint is of step {done}; give more")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


if __name__ == "__main__":
    session.launch(define_flags, command)
