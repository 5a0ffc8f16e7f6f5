"""Shapes and group sizes shared by tests, benchmark and tuning.

The names of published models give the sizes of one expert and the rows (tokens x top-k) of one training
step's layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul.ffn import Weights


@dataclasses.dataclass(frozen=True)
class Shape:
    """One expert layer: E experts of D x F, P rows. `kind`: where it is meant to be timed."""

    name: str
    experts: int
    d_model: int
    d_expert: int
    rows: int
    kind: str

    def flops(self, *, matrices: int = 3, backward: bool = False) -> int:
        """FLOPs of the FFN's matmuls; the backward has two matmuls for each of the forward."""
        return 2 * self.rows * self.d_model * self.d_expert * matrices * (3 if backward else 1)

    def abstract(
        self, dtype: jnp.dtype, *, gated: bool = True
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Weights]:
        """(xs, group_sizes, weights) without data, for `Operation.explain` of grouped_ffn."""
        e, d, f = self.experts, self.d_model, self.d_expert

        def make():
            gate = jnp.zeros((e, d, f), dtype) if gated else None
            weights = Weights(gate, jnp.zeros((e, d, f), dtype), jnp.zeros((e, f, d), dtype))
            return jnp.zeros((self.rows, d), dtype), jnp.zeros(e, jnp.int32), weights

        return jax.eval_shape(make)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 4, 24, 16, 300, "test"),
        Shape("odd", 5, 13, 7, 37, "test"),
        Shape("few_rows", 6, 8, 12, 3, "test"),
        Shape("blocks", 4, 128, 384, 160, "test"),  # sizes that every back end takes
        Shape("odd_blocks", 3, 45, 300, 70, "test"),  # the last block of columns is not full
        Shape("cpu", 64, 256, 128, 32768, "cpu"),
        Shape("small_experts", 64, 512, 128, 524288, "gpu"),
        Shape("mixtral", 8, 4096, 14336, 16384, "gpu"),
        Shape("olmoe", 64, 2048, 1024, 65536, "gpu"),
        Shape("deepseek_v2_lite", 64, 2048, 1408, 49152, "gpu"),
        Shape("qwen3_moe", 128, 2048, 768, 65536, "gpu"),
        Shape("olmoe_decode", 64, 2048, 1024, 512, "gpu"),
    )
}


def uniform(experts: int, rows: int) -> np.ndarray:
    """Equal groups; the first ones take the remainder."""
    return (rows // experts + (np.arange(experts) < rows % experts)).astype(np.int32)


def dirichlet(experts: int, rows: int, alpha: float = 5.0, seed: int = 0) -> np.ndarray:
    """Rows split in shares drawn from Dirichlet(alpha), exactly `rows` in all; small alpha is more skewed."""
    shares = np.random.default_rng(seed).dirichlet(np.full(experts, alpha))
    ends = np.round(np.cumsum(shares) * rows).astype(np.int64)
    ends[-1] = rows
    return np.diff(ends, prepend=0).astype(np.int32)


def one_hot(experts: int, rows: int, expert: int = 0) -> np.ndarray:
    """All rows in one group."""
    return np.where(np.arange(experts) == expert, rows, 0).astype(np.int32)


def with_empties(pattern: int, experts: int, rows: int, seed: int = 0) -> np.ndarray:
    """Groups whose bit in `pattern` is 0 are empty, the others hold 1 .. rows / experts; the rest is tail."""
    alive = np.array([(pattern >> e) & 1 for e in range(experts)], np.int32)
    sizes = alive * np.random.default_rng(seed).integers(1, max(2, rows // experts + 1), experts)
    return sizes.astype(np.int32)
