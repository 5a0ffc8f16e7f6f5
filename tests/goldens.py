"""The golden models of tests/golden: what transformers wrote and computed (scripts/make_golden.py), as folders."""

import functools
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from experiments import parity
from experiments.parity import BOUND as TOLERANCE
from experiments.parity import WEIGHTS, Golden, error, run, through_cache
from moejax.config import ModelConfig
from moejax.model import Decoder, build
from moejax.sharding import RouterState

__all__ = [
    "FAMILIES", "NAMES", "ROOT", "TOLERANCE", "WEIGHTS", "error", "golden", "run", "through_cache", "unpack",
    "with_config",
]  # fmt: skip

ROOT = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in ROOT.glob("*.zip"))
FAMILIES = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "longcat_flash", "phimoe",
    "dbrx", "llama4_text",
)  # fmt: skip


@functools.cache
def golden(name: str) -> Golden:
    return parity.read(ROOT / f"{name}.zip")


def unpack(name: str, folder: Path, version: str = "", weights: str = "model", **changes: Any) -> Path:
    """``folder`` as a Hugging Face folder of the case of that name: see :func:`experiments.parity.unpack`."""
    return parity.unpack(golden(name), folder, version, weights, **changes)


def with_config(model: Decoder, config: ModelConfig) -> Decoder:
    """The same weights in a model of another config; what that one has no place for is left out."""
    graph, *wanted = nnx.split(jax.eval_shape(lambda: build(config)), nnx.Param, RouterState)
    _, *given = nnx.split(model, nnx.Param, RouterState)
    for want, have in zip(wanted, given, strict=True):
        leaves = dict(nnx.to_flat_state(have))
        want.update(nnx.from_flat_state({path: leaves[path] for path, _ in nnx.to_flat_state(want)}))
    return nnx.merge(graph, *wanted)
