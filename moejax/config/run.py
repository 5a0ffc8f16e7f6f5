"""The fields that describe a run: data, training, evaluation, watching, mesh, table."""

import dataclasses
from typing import Literal

from moejax.config.model import ModelConfig, later


@dataclasses.dataclass(frozen=True)
class DomainConfig:
    train: str = ""
    """File, folder or glob of ``.txt`` or ``.jsonl`` (also ``.gz``, ``.xz``). Relative to ``data.root``."""
    valid: str = ""
    test: str = ""
    weight: float = 1.0
    """Share of training examples, relative to the other domains' weights."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: Literal["builtin", "files"] = "builtin"
    """"builtin": text collected from the locked environment at first use. "files": ``domains``."""
    root: str = ""
    domains: tuple[tuple[str, DomainConfig], ...] = ()
    """For "builtin" only the weights are read."""
    tokenizer: str = "byte"
    """"byte"; "bpe:FILE" (Hugging Face tokenizers JSON); "bpe-train:SIZE" trains one on the train split and keeps
    it; "pretrained:FOLDER" (a published model's own); "init_from": that of the weights that the run begins from."""
    seq_len: int = 128
    document_marker: str = "<|endoftext|>"
    """A line of ``.txt`` files that parts documents. Empty: each file is one document."""
    text_field: str = "text"
    """Field of ``.jsonl`` rows."""
    cache_dir: str = ""
    """Where tokens and the built-in corpus are kept. Empty: ``.cache/data`` beside the package."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    """0: none; the weights of ``init_from`` are evaluated as they are, without an optimizer."""
    batch_size: int = 16
    """Sequences per optimizer step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    balance_scope: Literal["batch", "micro"] = "batch"
    """Over what the auxiliary losses are taken when ``accumulate > 1``. "batch" is exact (one more forward pass)."""
    learning_rate: float = 3e-3
    warmup_steps: int = 10
    final_fraction: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of its peak."""
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    mtp_weight: float = later(0.0)
    """Weight of the multi-token-prediction loss (DeepSeek-V3, 2412.19437, eq. 25): times the mean over modules of their
    cross entropies, each a sum over its predictions divided by all tokens (eq. 24). DeepSeek-V3: 0.3, later 0.1."""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    """Newest checkpoints kept beside the best one on validation."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    batch_size: int = 16
    max_tokens: int = 0
    """Tokens of each domain that validation reads. 0: all. The final evaluation reads ``final_max_tokens``."""
    final_max_tokens: int = 0
    final_split: Literal["valid", "test"] = "test"
    tasks: tuple[str, ...] = ()
    """Task files (``docs/tasks.md``), relative to ``data.root``; "builtin" is cut from the held-out text."""
    task_limit: int = 0
    """First rows of each task that are scored. 0: all."""


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """When training warns of a collapsing router (``docs/healthy.md``). It changes no number; 0 switches a rule off."""

    dead_experts: int = 1
    """Experts of a layer without a pair in the window."""
    min_load_entropy: float = 0.5
    """Entropy of the experts' loads: 1 is even, 0 is all tokens on the same k experts. 0.5: the layer works like one
    with sqrt(k E) experts."""
    max_busiest: float = 0.75
    """Share of tokens that choose the busiest expert: 0 stands for an even k/E, 1 for all of them."""
    min_router_entropy: float = 0.02
    """Mean entropy of a token's router probabilities, as a share of ln E."""
    min_pairs: int = 100
    """An expert's even share of the window. A window is the steps between two log lines, or more to hold this.
    None is judged that began before ``train.warmup_steps``: there the loads are those of the random router."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1
    """-1: all devices that the other axes leave."""
    expert: int = 1
    model: int = 1


@dataclasses.dataclass(frozen=True)
class TableConfig:
    name: str = ""
    """Module under ``experiments/papers`` that makes the table after training. Empty: none."""
    seeds: tuple[int, ...] = ()
    """Training seeds of the table. Empty: the one of ``train.seed``."""
    tables: tuple[str, ...] = later(("1",))
    """Which of the paper's tables are made. It changes no number, and is no part of the config's hash."""
    arms: tuple[str, ...] = ()
    factors: tuple[float, ...] = ()
    layer_factors: tuple[float, ...] = later(())
    """A capacity factor for each MoE layer, of one row more in a table of arms at equal latency. It changes no other
    row, and is no part of the config's hash."""
    margin: float = 0.005
    """Bits per byte that a contrast must exceed."""
    tune_steps: int = later(0)
    """Steps for which a table that fine-tunes models trains each of them."""
    max_tokens: int = 0
    """Tokens of each domain that every arm reads. 0: all."""
    batch_size: int = 16
    """Sequences per batch; limits act within one batch, so it is part of every row."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    name: str = "base"
    scale: Literal["tiny", "h100", "paper", "custom"] = "custom"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()
    mesh: MeshConfig = MeshConfig()
    table: TableConfig = TableConfig()
    init_from: str = ""
    """Workdir, checkpoint folder or Hugging Face folder whose parameters start the run. Empty: random."""
    model_from: Literal["config", "init_from"] = later("config")
    """"init_from": the model is the one of those weights; of ``model`` only what changes no weight is read
    (``moejax.pretrained.CHOICES``)."""
