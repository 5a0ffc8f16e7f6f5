"""What is wrong with the tensors of a folder, as one error with the likeliest cause."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from moejax.config import ConfigError, ModelConfig
from moejax.importers.files import Tensor
from moejax.importers.tables import EXPERT_OF, LAYER, LAYER_OF

ADAPTERS = ("lora_A", "lora_B", "modules_to_save")
OTHER_QUANTISATIONS = (".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".weight_scale", ".weight_packed")


@dataclasses.dataclass
class Problems:
    missing: list[str] = dataclasses.field(default_factory=list)
    """Tensors that a parameter needs."""
    unused: list[str] = dataclasses.field(default_factory=list)
    """Tensors that nothing needs."""
    wrong: list[str] = dataclasses.field(default_factory=list)
    """Tensors of another shape or type, a sentence for each."""

    def raise_if_any(self, folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        """Raises ConfigError with all of it, shortened."""
        self.missing = list(dict.fromkeys(self.missing))
        self.wrong = list(dict.fromkeys(self.wrong))
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} tensors are missing: {shortened(self.missing)}")
        if self.unused:
            parts.append(f"{len(self.unused)} are not known: {shortened(self.unused)}")
        if self.wrong:
            parts.append(f"{len(self.wrong)} do not fit: {shortened(self.wrong, '; ')}")
        if parts:
            cause = self._cause(config, tensors)
            raise ConfigError(f"{folder} does not hold the model of its config.json. {'. '.join(parts)}. {cause}")

    def _cause(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> str:
        """The likeliest one."""
        if any(part in name for name in self.unused for part in ADAPTERS):
            return "These are an adapter's: merge it into the model's weights first"
        if any(name.endswith(OTHER_QUANTISATIONS) for name in self.unused):
            return "The weights are quantised in a form that is not read: only float8 blocks and mxfp4 are"
        modules = tuple(LAYER.format(config.num_layers + k) for k in range(config.mtp_layers))
        unasked = tuple(prefix for prefix in _prediction_layers(tensors) if prefix not in modules)
        if modules and self.missing and all(name.startswith(modules) for name in self.missing):
            absent = [prefix for prefix in modules if not any(name.startswith(prefix) for name in tensors)]
            if absent:
                return (
                    f"config.json has num_nextn_predict_layers, and nothing of {absent[0]}* is there (transformers "
                    "leaves it out when it saves): fetch the published files, or set model.mtp_layers=0"
                )
        if renamed := self._prefix():
            return f"Likely a renamed prefix: names begin with {renamed[0]!r} where {renamed[1]!r} is expected"
        for what, key, pattern, count in (
            ("layers", "num_hidden_layers", LAYER_OF, config.num_layers + len(modules)),
            ("experts", "the number of experts", EXPERT_OF, config.moe.num_experts),
        ):
            there = [int(hit[1]) for name in tensors if (hit := pattern.search(name)) and not name.startswith(unasked)]
            if there and max(there) + 1 != count and (max(there) >= count or self.missing):
                return (
                    f"The tensors are of {max(there) + 1} {what}, and config.json says {count}: correct {key}, or "
                    "fetch the rest"
                )
        if self.missing == ["lm_head.weight"]:
            return "Likely tie_word_embeddings: false in config.json, and the embeddings are tied"
        if self.missing and self.unused:
            return f"Likely renamed tensors: {self.unused[0]} may be {_closest(self.unused[0], self.missing)}"
        if self.missing:
            return "Likely an incomplete folder: a file of weights is missing, or was written without these tensors"
        if self.unused:
            return "Likely weights of another model than the config's: a key of config.json that adds them may be wrong"
        return "Likely a config.json of another model"

    def _prefix(self) -> tuple[str, str] | None:
        """``(theirs, ours)`` if most missing tensors are there under another beginning."""
        ends: dict[str, str] = {}
        for name in self.unused:
            parts = name.split(".")
            for i in range(1, len(parts)):
                ends.setdefault(".".join(parts[i:]), ".".join(parts[:i]) + ".")
            ends.setdefault(name, "")
        pairs: dict[tuple[str, str], int] = {}
        for name in self.missing:
            parts = name.split(".")
            for i in range(len(parts)):
                rest, ours = ".".join(parts[i:]), "".join(part + "." for part in parts[:i])
                if rest in ends:
                    if rest.count(".") >= 2 and ends[rest] != ours:
                        pairs[ends[rest], ours] = pairs.get((ends[rest], ours), 0) + 1
                    break
        if not pairs:
            return None
        best = max(pairs, key=lambda pair: pairs[pair])
        return best if pairs[best] > len(self.missing) / 2 and not LAYER_OF.fullmatch(best[1]) else None


def _prediction_layers(tensors: Iterable[str]) -> list[str]:
    """Beginnings of the names of multi-token-prediction modules, which are no layers of the model."""
    return [name.removesuffix("eh_proj.weight") for name in tensors if name.endswith(".eh_proj.weight")]


def _closest(name: str, names: Iterable[str]) -> str:
    """The one that shares most parts from its ends."""
    parts = name.split(".")

    def common(other: str) -> int:
        theirs = other.split(".")
        pairs = [*zip(parts, theirs, strict=False), *zip(reversed(parts), reversed(theirs), strict=False)]
        return sum(one == two for one, two in pairs)

    return max(names, key=common)


def shortened(items: list[str], by: str = ", ", count: int = 4) -> str:
    return by.join(items[:count]) + (f"{by}..." if len(items) > count else "")
