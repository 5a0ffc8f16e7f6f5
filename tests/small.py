"""Small configs and workdirs that several test files share."""

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import checkpoint
from moejax.config import (
    AttentionConfig,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    TrainConfig,
    from_mapping,
)
from moejax.train import Trainer, TrainState

LAB = ("olmoe_like", "mixtral_like", "qwen_like", "deepseek_like")
ZOO = (
    "mixtral_8x7b", "mixtral_8x22b", "olmoe_1b_7b", "deepseek_moe_2b", "deepseek_moe_16b", "deepseek_moe_145b",
    "deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "qwen15_moe_a27b", "qwen2_57b_a14b", "qwen3_30b_a3b",
    "qwen3_235b_a22b", "gpt_oss_20b", "gpt_oss_120b", "longcat_flash", "dbrx", "grok_1", "phi35_moe", "llama4_scout",
)  # fmt: skip
MODELS = {f"configs.models.{name}": ("full", "tiny") for name in ZOO}
FILES = {
    "configs.quickstart": ("full", "short"),
    **{f"configs.lab.{name}": ("tiny", "h100") for name in LAB},
    "configs.papers.capacity_aware": ("tiny", "h100", "paper"),
    "configs.papers.dualsparse": ("tiny", "lab", "paper", "tiny,model=deepseek_like"),
    **MODELS,
}
VARIANTS = [(module, variant) for module, variants in FILES.items() for variant in variants]
VOCAB = 64


@contextlib.contextmanager
def quick_compilation(cache: Path | None = None) -> Iterator[None]:
    """For programs that run for milliseconds and compile for seconds; ``cache`` keeps them for others of the module."""
    settings: dict[str, Any] = {"jax_disable_most_optimizations": True}
    if cache is not None:
        settings |= {"jax_compilation_cache_dir": str(cache), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def load(module: str, variant: str) -> ExperimentConfig:
    """A variant of a config file, as the commands read it."""
    return from_mapping(ExperimentConfig, importlib.import_module(module).get_config(variant))


def with_vocab(config: ModelConfig, vocab_size: int) -> ModelConfig:
    return dataclasses.replace(config, vocab_size=vocab_size)


def small_model(router: RouterConfig | None = None, **moe: Any) -> ModelConfig:
    """Float32, 3 layers, the first dense and the last MoE: all kinds of stacking at the smallest size."""
    moe = {"first_dense": 1, "every": 2, "num_experts": 4, "expert_dim": 8, **moe}
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, bias=True, qk_norm=True)
    return ModelConfig(
        vocab_size=VOCAB,
        num_layers=3,
        dim=16,
        ffn_dim=24,
        attention=attention,
        moe=MoEConfig(router=router or RouterConfig(), **moe),
        compute_dtype="float32",
    )


def small_config(model: ModelConfig | None = None, **train: Any) -> ExperimentConfig:
    train = {"steps": 10, "batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-2, **train}
    return ExperimentConfig(model=model or small_model(), train=TrainConfig(**train))


def random_batch(micros: int = 1, batch: int = 8, seq: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """A packed batch ``[micros, batch / micros, seq]`` with two documents a row and the last rows' ends masked."""
    rng = np.random.default_rng(seed)
    # A skewed choice of ids: routing is then uneven, and differs between micro-batches.
    windows = (VOCAB * rng.random((batch, seq + 1)) ** 3).astype(np.int32)
    windows[batch // 2 :] = VOCAB - 1 - windows[batch // 2 :]
    places = np.broadcast_to(np.arange(seq, dtype=np.int32), (batch, seq))
    second = places >= seq // 3
    mask = np.ones((batch, seq), bool)
    mask[-3:, -4:] = False
    flat = {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "positions": np.where(second, places - seq // 3, places).astype(np.int32),
        "segment_ids": (1 + second).astype(np.int32),
        "mask": mask,
    }
    return {name: leaf.reshape(micros, batch // micros, seq) for name, leaf in flat.items()}


def start(made: Trainer) -> TrainState:
    """An initial state without compiling the initialisation: matrices at random, scales 1, the rest 0."""
    rng = np.random.default_rng(0)

    def value(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = name.rpartition("/")[2]
        if not name.startswith("params/") or kind.endswith("_bias"):
            return np.zeros(leaf.shape, leaf.dtype)
        return np.ones(leaf.shape, leaf.dtype) if kind == "scale" else rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)

    values = [value(name, leaf) for name, leaf in checkpoint.flatten(made.abstract).items()]
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(made.abstract), values), made.shardings)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in checkpoint.flatten(tree).items()}


WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on")


def write_texts(root: Path) -> None:
    """Small files of random words: ``root/<split>/<domain>.txt``, other text in each."""
    for i, domain in enumerate(("a", "b")):
        for j, split in enumerate(("train", "valid", "test")):
            rng = np.random.default_rng([i, j])
            size = 900 if split == "train" else 200
            documents = [" ".join(rng.choice(WORDS, size).tolist()) for _ in range(3)]
            path = root / split / f"{domain}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")


CONFIG_FILE = '''"""A model that trains in a second, on files beside this one."""

from pathlib import Path

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "table") -> ConfigDict:
    if variant not in ("table", "plain"):
        raise ValueError(f"variant {variant!r}: choose table or plain")
    here = Path(__file__).resolve().parent
    config = base.get_config()
    config.name = f"small:{variant}"
    config.model.dim = 16
    config.model.ffn_dim = 32
    config.model.compute_dtype = "float32"
    config.model.attention.num_heads = 2
    config.model.attention.num_kv_heads = 2
    config.model.attention.head_dim = 8
    config.model.moe.num_experts = 4
    config.model.moe.expert_dim = 8
    config.data.source = "files"
    config.data.root = str(here)
    config.data.cache_dir = str(here / "cache")
    config.data.seq_len = 32
    for name in ("a", "b"):
        splits = {split: f"{split}/{name}.txt" for split in ("train", "valid", "test")}
        config.data.domains[name] = ConfigDict({**splits, "weight": 1.0})
    config.train.steps = 6
    config.train.batch_size = 8
    config.train.warmup_steps = 1
    config.train.log_every = 2
    config.train.eval_every = 3
    config.train.checkpoint_every = 2
    config.eval.batch_size = 8
    config.eval.max_tokens = 256
    config.eval.final_max_tokens = 512
    config.mesh.data = 1
    if variant == "table":
        config.table.name = "capacity_aware"
        config.table.arms = ("order", "reverse", "random", "score")
        config.table.factors = (1.0, 0.5)
        config.table.batch_size = 8
        config.table.max_tokens = 512
    return config
'''


def write_workspace(root: Path) -> Path:
    """Texts and a config file for them; returns the config file."""
    write_texts(root)
    path = root / "small_config.py"
    path.write_text(CONFIG_FILE, encoding="utf-8")
    return path


def load_plain(path: Path) -> Any:
    """The ConfigDict of variant "plain" of a file that :func:`write_workspace` wrote."""
    spec = importlib.util.spec_from_file_location("small_config", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("plain")


def execute(*arguments: str) -> int:
    """experiments.run with these arguments, in this process; its exit code."""
    from experiments import run, session

    return session.call(run.define_flags, run.command, arguments)
