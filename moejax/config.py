"""Configuration: what a user sets, as frozen dataclasses, and every check that can be made before anything compiles.

The edge of the program is an ``ml_collections.ConfigDict`` (``configs/*.py`` and ``--config.field=value`` flags);
:func:`from_mapping` turns it into the dataclasses below and reports an unknown field, a wrong type or a broken rule
with the field's full name, the value, the rule and a way out. Below the edge nobody sees a ConfigDict.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, cast

from moejax.types import Activation


class ConfigError(ValueError):
    """A setting that cannot work. The message names the field, the value, the rule and the way out."""


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    name: str = "topk_of_softmax"
    """A name in the registry of ``moejax.routing``."""
    k: int = 2
    """Experts per token (for expert choice: average experts per token)."""
    renormalise: bool = True
    """Divide the chosen probabilities by their sum, where the family leaves the choice."""
    scale: float = 1.0
    """Routed scaling factor: multiplies every gate weight."""
    jitter: float = 0.0
    """Half width of the multiplicative input noise during training (Switch: 0.01)."""
    bias_update_rate: float = 0.001
    """Step of the selection bias after each optimizer step (auxiliary-loss-free balancing)."""
    noncausal: Literal["refuse", "allow"] = "refuse"
    """A router whose choice depends on later tokens needs "allow" in a causal decoder."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    num_experts: int = 8
    expert_dim: int = 128
    """Hidden width F of one routed expert."""
    router: RouterConfig = RouterConfig()
    losses: tuple[tuple[str, float], ...] = (("balance", 0.01), ("z", 0.001))
    """Auxiliary losses by name in the registry of ``moejax.losses``, with their coefficients."""
    first_dense: int = 0
    """The first layers that have a dense FFN instead of experts."""
    every: int = 1
    """After those, one MoE layer in every ``every`` layers (the last of each group)."""
    shared_experts: int = 0
    """Experts that every token uses, fused into one FFN of width ``shared_experts * expert_dim``."""
    shared_gate: Literal["none", "sigmoid"] = "none"
    """"sigmoid": a learned gate per token scales the shared experts' output (Qwen)."""
    capacity_factor: float = 0.0
    """Limit of each expert's load as a multiple of the mean, also during training. 0: dropless."""
    capacity_order: Literal["score", "order", "reverse", "random"] = "score"
    dispatcher: Literal["local", "dense"] = "local"
    """"dense" computes every expert on every token: the slow reference."""
    implementation: str = "auto"
    """Back end of the grouped matmul (``kernels_pallas.grouped_matmul``); "auto" picks and is named in the run's
    facts."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    qk_norm: bool = False
    bias: bool = False
    """Biases on the query, key and value projections (Qwen)."""
    rope_theta: float = 10_000.0
    implementation: Literal["auto", "xla", "cudnn"] = "auto"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 256
    num_layers: int = 2
    dim: int = 128
    ffn_dim: int = 512
    """Hidden width of a dense FFN layer."""
    activation: Activation = "swiglu"
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    wiring: Literal["standard"] = "standard"
    """Order of the MoE stages among attention and FFN (seam 6)."""
    tie_embeddings: bool = True
    scale_embeddings: bool = True
    """Multiply embeddings by sqrt(dim), so that tied embeddings enter the first block with unit variance."""
    norm_eps: float = 1e-6
    logit_softcap: float = 0.0
    """Soft cap of the logits, ``c * tanh(z / c)``. 0: none."""
    init_scale: float = 1.0
    """Multiplies the standard deviation 1/sqrt(fan-in) of every matrix at initialisation."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    layer_loop: Literal["scan", "unroll"] = "scan"
    """"unroll" compiles slower and lets a debugger see each layer."""
    remat: Literal["none", "block", "dots"] = "none"
    """Rematerialisation: nothing, whole blocks, or all but matmul outputs."""


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
    it."""
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
    arms: tuple[str, ...] = ()
    factors: tuple[float, ...] = ()
    margin: float = 0.005
    """Bits per byte that a contrast must exceed."""
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
    """Workdir or checkpoint folder whose parameters start the run. Empty: random."""


def from_mapping[T](cls: type[T], mapping: Mapping[str, Any], path: str = "config") -> T:
    """Builds the dataclass ``cls`` from a nested mapping.

    Args:
      cls: one of the dataclasses of this module.
      mapping: plain dict or ``ConfigDict``; missing fields take their defaults.
      path: name of ``mapping`` in error messages.

    Raises:
      ConfigError: unknown field, wrong type, value outside a Literal.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cast(Any, cls))}
    values = {}
    for name, value in mapping.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}.{name}: unknown field; {hint}")
        values[name] = _convert(hints[name], value, f"{path}.{name}")
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            choices = ", ".join(repr(a) for a in args)
            close = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            raise ConfigError(
                f"{path}={value!r}: choose one of {choices}" + (f" (did you mean {close[0]!r}?)" if close else "")
            )
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, cast(type, hint)):
            return value
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"{path}={value!r}: expected a group of fields, not a {type(value).__name__}")
        return from_mapping(cast(type, hint), value, path)
    if origin is tuple:
        return _convert_tuple(args, value, path)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _convert_tuple(args: tuple, value: Any, path: str) -> tuple:
    item = args[0]
    if typing.get_origin(item) is tuple and hasattr(value, "items"):  # a mapping kept as sorted pairs: hashable
        _, inner = typing.get_args(item)
        return tuple((str(k), _convert(inner, v, f"{path}.{k}")) for k, v in sorted(value.items()))
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigError(f"{path}={value!r}: expected a tuple, e.g. ({value!r},)")
    return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON values; pairs become objects again, so that ``from_mapping`` reads it back."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            if value and all(isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value):
                return {k: plain(v) for k, v in value}
            return [plain(v) for v in value]
        return value

    return plain(config)


def config_hash(config: Any) -> str:
    """First 12 hex digits of the SHA-256 of the config as sorted JSON, without where data and cache lie and when
    warnings are given, which change no result."""
    fields = {name: value for name, value in to_dict(config).items() if name != "watch"}
    if isinstance(fields.get("data"), dict):
        fields["data"] = {k: v for k, v in fields["data"].items() if k not in ("root", "cache_dir")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
