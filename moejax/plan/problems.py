"""What does not divide: every field at once, where a run would stop at the first."""

import dataclasses
import math

from moejax import limits
from moejax.config import ConfigError, ExperimentConfig, MeshConfig
from moejax.model import layer_groups


@dataclasses.dataclass(frozen=True)
class Problem:
    """A field that does not fit the mesh or another field."""

    field: str
    text: str

    def __str__(self) -> str:
        return self.text


def problems(config: ExperimentConfig, mesh: MeshConfig) -> list[Problem]:
    """All of them, in the order of the config. ``mesh`` has no axis of -1."""
    model, moe, attention, train = config.model, config.model.moe, config.model.attention, config.train
    flags = {flag for pattern, _ in layer_groups(model) for flag in pattern}
    found: list[Problem] = []

    def split(field: str, size: int, axis: str) -> None:
        devices = getattr(mesh, axis)
        if size % devices:
            choices = [d for d in range(1, size + 1) if size % d == 0]
            found.append(
                Problem(
                    field,
                    f"{field}={size} not divisible by mesh axis {axis!r}={devices}: choose an axis of "
                    f"{_some(choices)}, or a multiple of {devices}",
                )
            )

    split("model.attention.num_heads", attention.num_heads, "model")
    split("model.attention.num_kv_heads", attention.num_kv_heads, "model")
    if False in flags or model.wiring == "longcat":
        split("model.ffn_dim", model.ffn_dim, "model")
    if True in flags:
        of_parts, one = (" x parts", " / parts") if moe.parts > 1 else ("", "")
        split("model.moe.num_experts" + of_parts, moe.stored_experts, "expert")
        split("model.moe.expert_dim" + one, moe.stored_dim, "model")
        if moe.shared_dim:
            split("model.moe.shared_dim", moe.shared_dim, "model")
        elif moe.shared_experts and moe.expert_dim % mesh.model:
            split("model.moe.shared_experts x expert_dim", moe.shared_experts * moe.expert_dim, "model")
    if True in flags and moe.dispatcher == "ep":
        try:
            limits.check_ranks(limits.of_config(moe), moe, mesh.expert)
        except ConfigError as error:  # what is wrong on any mesh is not of this list
            if str(error).startswith("moe.capacity_limits: "):
                found.append(Problem("model.moe.capacity_limits", f"model.{error}"))
    shards = mesh.data * mesh.expert
    if train.batch_size % (shards * train.accumulate):
        unit = shards * train.accumulate
        found.append(
            Problem(
                "train.batch_size",
                f"train.batch_size={train.batch_size} not divisible by train.accumulate={train.accumulate} x "
                f"{shards} devices (mesh data x expert): choose a multiple of {unit}",
            )
        )
    for field, size in (("eval.batch_size", config.eval.batch_size), ("table.batch_size", config.table.batch_size)):
        if size % shards:
            found.append(
                Problem(
                    field,
                    f"{field}={size} not divisible by {shards} devices (mesh data x expert): choose a multiple of "
                    f"{shards}",
                )
            )
    if True in flags:
        batches = [("eval.batch_size", config.eval.batch_size, shards, "an evaluation batch")]
        if train.steps:
            parts = shards * train.accumulate
            batches.insert(0, ("train.batch_size", train.batch_size, parts, "a training micro-batch"))
        if config.table.name:
            batches.append(("table.batch_size", config.table.batch_size, shards, "a table's batch"))
        for field, size, parts, what in batches:
            if size % parts == 0:  # else it is on the list
                found += cut_by_virtual_ranks(config, field, size, config.data.seq_len, parts, what)
    return found


def cut_by_virtual_ranks(
    config: ExperimentConfig, field: str, size: int, tokens: int, parts: int, what: str
) -> list[Problem]:
    """No problem, or that ``moe.virtual_ranks`` does not divide the tokens of a batch on a device. It always has to:
    training and evaluation give every pass a random key, so that what is drawn depends on ranks even without a limit.

    Args:
      field: that sets the batch: ``size`` sequences of ``tokens`` each, divided by ``parts``.
      what: this batch is called.
    """
    ranks, here = config.model.moe.virtual_ranks, size // parts * tokens
    if here % ranks == 0:
        return []
    unit = parts * ranks // math.gcd(ranks, tokens)
    return [
        Problem(
            "model.moe.virtual_ranks",
            f"model.moe.virtual_ranks={ranks} does not divide the {here} tokens of {what} on a device, {size // parts} "
            f"x {tokens} with {field}={size} and data.seq_len={config.data.seq_len}: choose a divisor of {here}, or "
            f"{field} as a multiple of {unit}",
        )
    ]


def _some(choices: list[int]) -> str:
    shown = [str(c) for c in choices]
    return ", ".join(shown if len(shown) < 10 else [*shown[:8], "...", shown[-1]])
