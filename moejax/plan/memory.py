"""Bytes on one device: what a training step and an evaluation batch are given, and hold at their largest moment."""

import dataclasses
from collections.abc import Iterable

import jax

from moejax.config import ExperimentConfig, MeshConfig
from moejax.model import layer_groups
from moejax.plan import activations
from moejax.plan.attention import backward
from moejax.plan.sizes import F32, INT, Array, Platform, Sizes, make
from moejax.routing import FAMILIES

BATCH_BYTES = 4 * INT + 1
"""Of one token: tokens, targets, positions, segment ids, and the mask."""

GRADIENTS = ("gradients", "sum of gradients", "gradients and updates")
"""Arrays of a moment that are as large as the parameters."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """One point of a step, with what is alive there beside the arguments."""

    name: str
    arrays: tuple[Array, ...]

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)


@dataclasses.dataclass(frozen=True)
class Memory:
    """One program's memory on one device."""

    arguments: tuple[Array, ...]
    """Given and returned: parameters, optimizer state, the batch."""
    moments: tuple[Moment, ...]
    sizes: Sizes

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def argument_bytes(self) -> int:
        return sum(a.bytes for a in self.arguments)

    @property
    def total(self) -> int:
        """Arguments and the largest moment: what ``memory_analysis`` calls argument and temp size."""
        return self.argument_bytes + self.peak.bytes

    def by_part(self, arrays: Iterable[Array]) -> dict[str, int]:
        """Bytes of each part, in the order of ``activations.PARTS``."""
        sums = dict.fromkeys((*activations.PARTS, "batch"), 0)
        for a in arrays:
            sums[a.part] += a.bytes
        return {part: size for part, size in sums.items() if size}


def train(config: ExperimentConfig, mesh: MeshConfig, platform: Platform) -> Memory:
    """Of a training step. ``mesh`` has no axis of -1."""
    s = make(config, mesh, platform, train=True)
    weights = {part: n * F32 for part, n in activations.parameters(config.model, s).items() if n}
    micros = config.train.accumulate
    arguments = _weights("parameters", weights) + _weights("AdamW moments", weights, 2) + _state(s)
    arguments.append(Array("batch", "tokens, targets, positions, segments, mask", micros * s.tokens * BATCH_BYTES))

    copies = _gradient_copies(s) + (1 if micros > 1 else 0)
    grads = _weights("gradients", weights, copies)
    kept = activations.kept_by_layers(s) + activations.once(s, s.model.remat != "none") + _slices(s, weights)
    kept += activations.prediction(s)
    # With micro-batches the sum of gradients is there from the first one on.
    summed = _weights("sum of gradients", weights) if micros > 1 else []
    moments = [
        Moment("backward pass of the logits", (*kept, *activations.head(s), *summed, *activations.backward_of_head(s))),
        Moment("optimizer update", tuple(_weights("gradients and updates", weights, 2))),
    ]
    for pattern, repeats in layer_groups(s.model):
        # XLA orders a loop's body as a whole: of several blocks in it, the working sets are alive together.
        loop = s.model.layer_loop == "scan" and repeats > 1
        for i, is_moe in enumerate(pattern):
            others = [
                a for j, flag in enumerate(pattern) if j != i and loop for a in activations.backward_of_block(s, flag)
            ]
            if s.model.wiring == "longcat" and s.model.remat == "none":  # the dense path beside the experts
                others += activations.backward_of_block(s, False)
            name = f"backward pass of {'the experts' if is_moe else 'a dense FFN'}"
            again = activations.recomputed(s, at_attention=False)
            moments.append(Moment(name, (*kept, *grads, *again, *others, *activations.backward_of_ffn(s, is_moe))))
            again = activations.recomputed(s, at_attention=True)
            arrays = (*kept, *grads, *again, *others, *backward(s))
            moments.append(Moment("backward pass of attention", arrays))
    return Memory(tuple(arguments), tuple(moments), s)


def evaluate(config: ExperimentConfig, mesh: MeshConfig, platform: Platform, weight_bytes: int = F32) -> Memory:
    """Of an evaluation batch (``eval.batch_size``), without a cache. ``weight_bytes``: of one parameter."""
    s = make(config, mesh, platform, train=False)
    weights = {part: n * weight_bytes for part, n in activations.parameters(config.model, s).items() if n}
    arguments = [*_weights("parameters", weights), *_state(s)]
    flags = {flag for pattern, _ in layer_groups(s.model) for flag in pattern}
    arguments.append(Array("batch", "tokens, targets, positions, segments, mask", s.tokens * BATCH_BYTES))
    logits = [
        Array("logits and loss", "logits [T,V]", s.tokens * s.model.vocab_size * F32),
        Array("norms", "input", 2 * s.tokens * s.model.dim * s.itemsize),
    ]
    if s.model.logit_bias or s.model.logit_softcap:
        logits.append(Array("logits and loss", "with bias or soft cap [T,V]", s.tokens * s.model.vocab_size * F32))
    moments = [Moment("logits", tuple(logits))]
    for is_moe in sorted(flags):
        names = ("attention", "experts" if is_moe else "dense FFN")
        moments += [Moment(n, tuple(a)) for n, a in zip(names, activations.forward_of_block(s, is_moe), strict=True)]
    return Memory(tuple(arguments), tuple(moments), s)


def _weights(what: str, parts: dict[str, int], times: int = 1) -> list[Array]:
    return [Array(part, what, size * times) for part, size in parts.items()]


def _state(s: Sizes) -> list[Array]:
    """Router state that the optimizer never sees."""
    layers = sum(sum(pattern) * repeats for pattern, repeats in layer_groups(s.model))
    if not layers:
        return []
    specs = FAMILIES[s.model.moe.router.name].arrays(s.model.dim, s.choices).values()
    state = sum(jax.ShapeDtypeStruct(spec.shape, "float32").size for spec in specs if spec.kind == "state")
    return [Array("router", "selection state", layers * state * F32)] if state else []


def _stacked(s: Sizes) -> bool:
    """Whether unrolled layers are cut out of stacked arrays."""
    return s.model.layer_loop == "unroll" and any(repeats > 1 for _, repeats in layer_groups(s.model))


def _slices(s: Sizes, weights: dict[str, int]) -> list[Array]:
    """Unrolled layers: each layer's weights, cut out of the stack and kept (or their cast copies instead)."""
    if not _stacked(s) or s.cast or s.model.remat != "none":
        return []
    inside = {part: size for part, size in weights.items() if part != "embedding"}
    return _weights("each layer's slice", inside)


def _gradient_copies(s: Sizes) -> int:
    """Gradients are added up in place by the scan; unrolled, each layer's is padded to the stack before it is added."""
    return 2 if _stacked(s) else 1
