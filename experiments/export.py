"""Writes a checkpoint as a Hugging Face folder, for transformers, vLLM and whatever else reads those.

    python -m experiments.export --checkpoint=runs/mine --output=runs/mine-hf [--format=fused] [--dtype=bfloat16]
        [--mtp]

``--checkpoint`` is a workdir, a step folder or a Hugging Face folder, of which ``--mtp`` also reads the
multi-token-prediction modules. ``--output`` must be new or empty, and appears
when it is complete: config.json, safetensors (with an index where they are several files), and the tokenizer files of
the published model, where the weights came from one. A model that no supported family computes the same way is refused.
"""

import dataclasses
from pathlib import Path

from absl import flags

from experiments import session
from moejax import importers, pretrained
from moejax.config import ConfigError, ExperimentConfig


def tokenizer_folder(config: ExperimentConfig) -> Path | None:
    """The Hugging Face folder whose tokenizer the model reads; None for a tokenizer of ours."""
    kind, _, place = config.data.tokenizer.partition(":")
    return Path(place) if kind == "pretrained" and importers.is_hugging_face(place) else None


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    session.define_checkpoint_flag(values)
    flags.DEFINE_string("output", None, "Folder to write; new or empty.", flag_values=values)
    flags.DEFINE_enum(
        "format",
        "per_expert",
        ["per_expert", "fused"],
        "Experts as 2-D tensors for each, as published, or as transformers 5 keeps them.",
        flag_values=values,
    )
    session.define_mtp_flag(values)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Type of matrices. Default: that of the weights.", flag_values=values
    )
    flags.DEFINE_string(
        "family", None, "model_type to write. Default: the first that computes this model.", flag_values=values
    )
    flags.DEFINE_bool(
        "dropless", False, "Leave out what drops pairs (moe.capacity_factor, moe.capacity_limits, "
        "moe.ep_buffer_factor), which no family has.", flag_values=values,
    )  # fmt: skip


def command(values: flags.FlagValues) -> int:
    for name in ("checkpoint", "output"):
        if not values[name].value:
            raise ConfigError(f"--{name} is missing: see python -m experiments.export --help")
    output = Path(values.output).expanduser()
    importers.check_new(output)  # before minutes of reading
    model, config, _ = pretrained.open_model(values.checkpoint, compute_dtype=values.dtype, mtp=values.mtp)
    written, moe = model.config, model.config.moe
    names = ["capacity_factor", "capacity_limits"] + ["ep_buffer_factor"] * (moe.dispatcher == "ep")
    limits = [f"moe.{name}={value!r}" for name in names if (value := getattr(moe, name))]
    if limits and not values.dropless:
        raise ConfigError(
            f"{', '.join(limits)} drops pairs, and no family does: --dropless writes the model without the limit, "
            "which gives other logits wherever it drops"
        )
    if written.moe.parts > 1:
        raise ConfigError(
            f"moe.parts={written.moe.parts}: no family stores an expert in parts; merge them first, with python -m "
            f"experiments.partition --checkpoint={values.checkpoint} --form=merge --output=DIR"
        )
    written = dataclasses.replace(
        written, moe=dataclasses.replace(moe, capacity_factor=0.0, capacity_limits=(), ep_buffer_factor=0.0)
    )
    source = tokenizer_folder(config)
    scaled = written.attention.rope.scaling != "none"
    family = importers.write(
        model,
        written,
        output,
        values.family,
        layout=values.format,
        dtype=values.dtype,
        source=source,
        context=None if source or scaled else config.data.seq_len,
    )
    files = sorted(output.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    tokenizer = "no tokenizer files: this model reads one of ours"
    if source:
        there = any(output.glob("*token*"))  # a folder of weights alone has none to copy
        tokenizer = f"tokenizer of {source}" if there else f"no tokenizer files: {source} has none"
    session.say(
        f"{output}: {family}, weights of {size / 1e9:.3g} GB in {', '.join(f.name for f in files)}; {tokenizer}"
    )
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
