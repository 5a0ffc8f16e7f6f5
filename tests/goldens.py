"""The golden models of tests/golden: what transformers wrote and computed (scripts/make_golden.py), as folders."""

import dataclasses
import functools
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moejax.config import ModelConfig
from moejax.model import Decoder, ModelOutput, build
from moejax.sharding import RouterState

ROOT = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in ROOT.glob("*.zip"))
FAMILIES = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "longcat_flash",
)  # fmt: skip
TOLERANCE = 1e-4
"""Of the largest logit."""
WEIGHTS = ("model", "written", "fused")
"""Files of weights that a case may hold: the published layout, and those of transformers 5."""


@dataclasses.dataclass(frozen=True)
class Golden:
    name: str
    facts: dict[str, Any]
    tokens: np.ndarray
    logits: np.ndarray
    configs: dict[str, dict[str, Any]]
    """config.json by the major version of transformers that wrote it."""
    weights: tuple[str, ...]
    """Those of :data:`WEIGHTS` that are there."""


@functools.cache
def golden(name: str) -> Golden:
    with zipfile.ZipFile(ROOT / f"{name}.zip") as file:
        members = set(file.namelist())
        with np.load(io.BytesIO(file.read("golden.npz"))) as arrays:
            tokens, logits = arrays["tokens"], arrays["logits"]
        versions = [version for version in ("4", "5") if f"config.{version}.json" in members]
        return Golden(
            name=name,
            facts=json.loads(file.read("case.json")),
            tokens=tokens,
            logits=logits,
            configs={version: json.loads(file.read(f"config.{version}.json")) for version in versions},
            weights=tuple(weights for weights in WEIGHTS if f"{weights}.safetensors" in members),
        )


def unpack(name: str, folder: Path, version: str = "", weights: str = "model", **changes: Any) -> Path:
    """``folder`` as a Hugging Face folder of the case: config.json and model.safetensors.

    Args:
      version: of transformers, whose config.json it is; empty: the oldest there is.
      weights: one of :data:`WEIGHTS`.
      changes: to config.json.
    """
    case = golden(name)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**case.configs[version or min(case.configs)], **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with zipfile.ZipFile(ROOT / f"{name}.zip") as file:
        (folder / "model.safetensors").write_bytes(file.read(f"{weights}.safetensors"))
        for member in {"tokenizer.json", "tokenizer_config.json", "requests.json"} & set(file.namelist()):
            (folder / member).write_bytes(file.read(member))
    return folder


def error(logits: Any, reference: np.ndarray) -> float:
    """The largest difference, as a share of the reference's largest logit."""
    return float(np.abs(np.asarray(logits) - reference).max() / np.abs(reference).max())


@jax.jit
def run(model: Decoder, tokens: Any, mask: Any = None, cache: Any = None) -> ModelOutput:
    return model(tokens, mask=mask, cache=cache)


def with_config(model: Decoder, config: ModelConfig) -> Decoder:
    """The same weights in a model of another config; what that one has no place for is left out."""
    graph, *wanted = nnx.split(jax.eval_shape(lambda: build(config)), nnx.Param, RouterState)
    _, *given = nnx.split(model, nnx.Param, RouterState)
    for want, have in zip(wanted, given, strict=True):
        leaves = dict(nnx.to_flat_state(have))
        want.update(nnx.from_flat_state({path: leaves[path] for path, _ in nnx.to_flat_state(want)}))
    return nnx.merge(graph, *wanted)
