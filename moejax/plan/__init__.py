"""The dry run: what a config needs on a mesh, by arithmetic. No device is asked and nothing is allocated.

``make`` gives a :class:`Plan`: problems by field name, bytes on one device for training and evaluation, FLOPs, and what
the devices send each other. ``docs/plan.md`` says how far to trust it; ``compiled`` asks XLA instead.
"""

import dataclasses
import math

from moejax import count
from moejax.config import ExperimentConfig, MeshConfig
from moejax.plan import communication, memory
from moejax.plan.communication import Collective
from moejax.plan.memory import Memory
from moejax.plan.problems import Problem, cut_by_virtual_ranks, problems
from moejax.plan.sizes import F32, Platform, parse_mesh, resolve_mesh

__all__ = [
    "Collective", "Memory", "Plan", "Platform", "Problem", "cut_by_virtual_ranks", "make", "parse_mesh", "platform_of",
    "problems", "remarks", "resolve_mesh", "with_vocabulary",
]  # fmt: skip

BYTE_VOCABULARY = 257


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a run before it has devices. Bytes are those of one device."""

    config: ExperimentConfig
    mesh: MeshConfig
    platform: Platform
    parameters: count.Parameters
    train: Memory | None
    """None for a config that trains nothing (``train.steps=0``)."""
    evaluation: Memory
    collectives: tuple[Collective, ...]
    flops_per_token: float
    """Forward; training is three times this."""

    @property
    def devices(self) -> int:
        return self.mesh.data * self.mesh.expert * self.mesh.model

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.seq_len


def platform_of(config: ExperimentConfig) -> Platform:
    """Where the config says that it runs: ``scale`` "h100" and "paper" on GPUs, the others on a CPU."""
    return "gpu" if config.scale in ("h100", "paper") else "cpu"


def with_vocabulary(config: ExperimentConfig) -> tuple[ExperimentConfig, str]:
    """``model.vocab_size=0`` filled in as a run would (``moejax.loop.resolve_vocab``), and a note on where it is from.

    A tokenizer that is a file is not opened: its vocabulary stays 0, and the note says what is left out.
    """
    if config.model.vocab_size:
        return config, ""
    name, _, size = config.data.tokenizer.partition(":")
    known = BYTE_VOCABULARY if name == "byte" else int(size) if name == "bpe-train" and size.isdigit() else 0
    if not known:
        return config, (
            "vocabulary: taken from the tokenizer when data is read; embeddings and logits are not counted here: "
            "set --config.model.vocab_size to count them"
        )
    padded = 64 * math.ceil(known / 64)
    filled = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=padded))
    return filled, f"vocabulary: taken from the tokenizer when data is read; counted as {padded:,}"


def remarks(config: ExperimentConfig, mesh: MeshConfig) -> list[str]:
    """Where the arithmetic is coarser than elsewhere, by the setting's name."""
    model, said = config.model, []
    a = model.attention
    if a.window:
        said.append(
            "attention.window: scores and masks are counted over whole sequences, as plain XLA makes them; FLOPs over "
            "the window"
        )
    if a.kind == "latent" and mesh.model > 1:
        said.append(
            "attention.kind='latent' over mesh axis 'model': what it sends was not compared with a compiled program"
        )
    if model.moe.zero_experts:
        said.append(
            "moe.zero_experts: rows are reserved for all k choices; FLOPs and active parameters are the mean of a "
            "uniform choice"
        )
    if model.mtp_layers:
        said.append(
            "model.mtp_layers: counted whole on each device but for the experts, and not compared with a compiled "
            "program; FLOPs and what devices send are the main model's"
        )
    if model.wiring == "longcat":
        said.append(
            "model.wiring='longcat': the largest moment takes the paths of a block to be alive together (docs/plan.md: "
            "12 % too high under remat)"
        )
    return said


def make(config: ExperimentConfig, mesh: MeshConfig, platform: Platform, weight_bytes: int = F32) -> Plan:
    """The plan of a config that passed ``validate.check``, on ``mesh`` (an axis of -1 stands for 1).

    ``weight_bytes`` are those of one parameter while nothing is trained: weights of a Hugging Face folder keep the type
    of the computation.

    Sizes that do not divide (:func:`problems`) are rounded up, so that a plan can be shown beside them.
    """
    mesh = resolve_mesh(mesh)
    return Plan(
        config=config,
        mesh=mesh,
        platform=platform,
        parameters=count.parameters(config.model),
        train=memory.train(config, mesh, platform) if config.train.steps else None,
        evaluation=memory.evaluate(config, mesh, platform, weight_bytes),
        collectives=tuple(communication.collectives(config, mesh, platform)) if config.train.steps else (),
        flops_per_token=count.forward_flops_per_token(config.model, config.data.seq_len),
    )
