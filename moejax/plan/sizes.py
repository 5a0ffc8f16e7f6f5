"""What one device holds of a config: the extents of every axis on a given mesh, without any device.

Letters: B sequences of one micro-batch on this device, S length, T = B S tokens, P rows of experts, D model, F expert
hidden, E experts, K choices, H heads, G key/value heads, N head dim, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.ffn import Weights
from kernels_pallas.grouped_matmul.mosaic_gpu import backend as mosaic_gpu
from moejax import limits
from moejax.config import ConfigError, ExperimentConfig, MeshConfig, ModelConfig
from moejax.dispatch import buffer_rows, most_of_rank, pieces, sends_tokens
from moejax.experts import GATED, expert_specs
from moejax.moe import MoELayer, shared_width
from moejax.types import RouteContext

Platform = Literal["cpu", "gpu", "tpu"]
F32 = INT = 4
"""Bytes of a float32 and of an int32."""


def parse_mesh(text: str, mesh: MeshConfig) -> MeshConfig:
    """``mesh`` with the axes that ``text`` names, as in ``data=8,expert=4``.

    Raises:
      ConfigError: an unknown axis, or a size that is no whole number of 1 or more.
    """
    sizes = {}
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        if name not in ("data", "expert", "model") or not value.isdigit() or int(value) < 1 or name in sizes:
            raise ConfigError(
                f"--mesh={text}: {word.strip()!r} is not AXIS=DEVICES with an axis of data, expert, model, each once, "
                "and 1 or more devices: write for example --mesh=data=8,expert=4"
            )
        sizes[name] = int(value)
    return dataclasses.replace(mesh, **sizes)


def resolve_mesh(mesh: MeshConfig) -> MeshConfig:
    """``mesh`` with ``data=-1`` (all devices that the other axes leave) taken as 1: devices are not looked at."""
    return dataclasses.replace(mesh, data=1) if mesh.data == -1 else mesh


def back_end(model: ModelConfig, rows: int, platform: Platform) -> str:
    """The back end of the grouped FFN that would run: the one named, or the first of the platform's order that takes
    this type and these sizes (``kernels_pallas.grouped_matmul.api``). The device itself is not asked."""
    if model.moe.dispatcher == "dense":
        return "ref"
    if model.moe.implementation != "auto":
        return model.moe.implementation
    if platform == "gpu":
        xs, weights = _experts(model, rows)
        return "padded" if mosaic_gpu.refuse_weights(xs, weights, model.activation) else "mosaic_gpu"
    return {"cpu": "cpu_tiled", "tpu": "mosaic_tpu"}[platform]


def _experts(model: ModelConfig, rows: int) -> tuple[Any, Weights]:
    """Shapes, in the place of arrays, of the rows and weights of one layer's experts."""
    moe = model.moe
    specs = expert_specs(moe.stored_experts, model.dim, moe.stored_dim, model.activation, moe.expert_bias)
    shapes: dict[str, Any] = {"gate": None} | {
        n: jax.ShapeDtypeStruct(spec.shape, model.compute_dtype) for n, spec in specs.items()
    }
    return jax.ShapeDtypeStruct((rows, model.dim), model.compute_dtype), Weights(**shapes)


def attention_core(model: ModelConfig, seq_len: int, platform: Platform) -> str:
    """``xla`` or ``cudnn``: the rule of ``moejax.attention``."""
    if model.attention.implementation != "auto":
        return model.attention.implementation
    if model.attention.kind == "latent" or model.attention.sinks or model.attention.score_softcap:
        return "xla"  # the fused core has none of them
    fits = model.compute_dtype == "bfloat16" and model.attention.head_dim in (64, 128) and seq_len % 64 == 0
    return "cudnn" if fits and platform == "gpu" else "xla"


@dataclasses.dataclass(frozen=True)
class Array:
    """Bytes on one device of one array, or of several of a kind."""

    part: str
    what: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Extents on one device, for one micro-batch. Axes that the mesh splits are divided already."""

    model: ModelConfig
    batch: int
    seq: int
    token_shards: int
    expert_shards: int
    model_shards: int
    back_end: str
    core: str

    @property
    def itemsize(self) -> int:
        """Bytes of the compute type."""
        return jnp.dtype(self.model.compute_dtype).itemsize

    @property
    def cast(self) -> bool:
        """Whether float32 parameters are cast for the computation, which makes copies of them."""
        return self.itemsize < F32

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def heads(self) -> int:
        return _share(self.model.attention.num_heads, self.model_shards)

    @property
    def kv_heads(self) -> int:
        return _share(self.model.attention.num_kv_heads, self.model_shards)

    @property
    def expert_dim(self) -> int:
        """Width of an expert as it is stored: of a part, where it is stored in parts."""
        return _share(self.model.moe.stored_dim, self.model_shards)

    @property
    def ffn_dim(self) -> int:
        return _share(self.model.ffn_dim, self.model_shards)

    @property
    def shared_dim(self) -> int:
        return _share(shared_width(self.model.moe), self.model_shards)

    @property
    def choices(self) -> int:
        """Experts that the router chooses among, those without a computation too."""
        return self.model.moe.num_experts + self.model.moe.zero_experts

    @property
    def matrices(self) -> int:
        """Matrices of one FFN: gate, up, down or up, down."""
        return 3 if self.model.activation in GATED else 2

    @property
    def columns(self) -> int:
        """K, pairs of a row of the Routing table, with those that the config's limits append for pairs they may add."""
        return table_columns(self.model, self.expert_shards if self.expert_parallel else 1)

    @property
    def pairs(self) -> int:
        """R K, entries of the Routing table."""
        moe = self.model.moe
        if moe.router.name == "expert_choice":
            return moe.num_experts * min(self.tokens, math.ceil(self.tokens * moe.router.k / moe.num_experts))
        return self.tokens * self.columns

    @property
    def expert_parallel(self) -> bool:
        """Whether tokens travel to their experts."""
        return self.model.moe.dispatcher == "ep" and self.expert_shards > 1

    @property
    def experts(self) -> int:
        """Experts, as they are stored, whose weights a device computes with."""
        experts = self.model.moe.stored_experts
        return _share(experts, self.expert_shards) if self.expert_parallel else experts

    @property
    def rows(self) -> int:
        """P, rows of experts; under expert parallelism those of the buffers, of all pieces."""
        moe = self.model.moe
        if not self.expert_parallel:
            return moe.stored_experts * self.tokens if moe.dispatcher == "dense" else self.pairs * moe.parts
        return sum(self.expert_shards * capacity for _, capacity in self.buffers)

    @property
    def buffers(self) -> list[tuple[int, int]]:
        """Under expert parallelism the tokens of each piece, and the rows of experts for each destination."""
        moe, found = self.model.moe, []
        for part in pieces(moe, self.tokens):
            tokens = part.stop - part.start
            expert_choice = moe.router.name == "expert_choice"
            table = (self.pairs * moe.parts, 1) if expert_choice else (tokens, self.columns * moe.parts)
            rows = buffer_rows(moe, table, tokens, self.expert_shards, moe.stored_experts, moe.parts)
            found.append((tokens, rows))
        return found

    @property
    def token_pieces(self) -> list[tuple[int, int]]:
        """Of :attr:`buffers` those of pieces whose tokens travel, and not their pairs."""
        by_token = self.model.moe.router.name != "expert_choice"
        return (
            [of for of in self.buffers if sends_tokens(self.model.moe, *of, by_token)] if self.expert_parallel else []
        )

    @property
    def sent_rows(self) -> int:
        """Rows of the buffers of the exchange, of all pieces."""
        spared = sum(capacity - min(tokens, capacity) for tokens, capacity in self.token_pieces)
        return self.rows - self.expert_shards * spared

    @property
    def pairs_of_rank(self) -> int:
        """W, pairs of a token for one rank at most."""
        moe = self.model.moe
        return most_of_rank(moe, self.columns * moe.parts, self.expert_shards, moe.stored_experts, moe.parts)

    @property
    def scores(self) -> int:
        """Elements of one [B, H, S, S]."""
        return self.tokens * self.seq * self.heads


@functools.cache
def table_columns(model: ModelConfig, ranks: int) -> int:
    """Columns of the Routing table after the config's limits, on one of ``ranks`` ranks; k without limits."""
    moe = model.moe
    if not limits.of_config(moe):
        return moe.router.k
    moe = dataclasses.replace(moe, dispatcher="local", virtual_ranks=ranks)

    def decided(x: jax.Array) -> jax.Array:
        layer = MoELayer(moe, model.dim, model.activation, jax.random.key(0))
        record = layer.begin(x, RouteContext(key=jax.random.key(0), record=True)).record
        assert record is not None
        return record.kept.expert

    return jax.eval_shape(decided, jax.ShapeDtypeStruct((1, 8 * ranks, model.dim), jnp.float32)).shape[-1]


def _share(size: int, shards: int) -> int:
    return -(-size // shards)


def make(config: ExperimentConfig, mesh: MeshConfig, platform: Platform, *, train: bool) -> Sizes:
    """Sizes of a training micro-batch or of an evaluation batch on one device of ``mesh`` (no axis may be -1)."""
    shards = mesh.data * mesh.expert
    batch = config.train.batch_size // config.train.accumulate if train else config.eval.batch_size
    sizes = Sizes(
        config.model, _share(batch, shards), config.data.seq_len, shards, mesh.expert, mesh.model,
        back_end="", core=attention_core(config.model, config.data.seq_len, platform),
    )  # fmt: skip
    return dataclasses.replace(sizes, back_end=back_end(config.model, sizes.rows, platform))


def tree_bytes(tree: object) -> int:
    """Bytes of all leaves of a tree of arrays or of their shapes."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
