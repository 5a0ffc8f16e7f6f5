"""From each token's experts to rows sorted by expert, and back.

Letters: T tokens, K choices of a token, P = T K pairs and as many rows, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from kernels_pallas.grouped_matmul import groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where pairs lie. Rows of expert e follow those of e - 1; within an expert, rows are in the order of pairs.

    Dropped pairs fill the tail, the rows beyond `sum(group_sizes)`, so `pair_of_row` is a permutation and in
    bounds everywhere.

    Attributes:
        pair_of_row: the pair `t K + k` in each row.
        row_of_pair: the row of each pair; P, out of bounds, for a dropped one.
        group_sizes: rows of each expert.
    """

    pair_of_row: Int[Array, "P"]
    row_of_pair: Int[Array, "T K"]
    group_sizes: Int[Array, "E"]

    @property
    def token_of_row(self) -> Int[Array, "P"]:
        """The token in each row, in bounds everywhere. Not stored: a division costs less than P integers kept."""
        return self.pair_of_row // self.row_of_pair.shape[1]


def make_plan(expert: Int[Array, "T K"], valid: Bool[Array, "T K"] | None, experts: int) -> Plan:
    """Sorts the pairs by expert; stable.

    Keys are as narrow as the number of experts allows: XLA for GPU makes it a radix sort, whose passes grow with the
    bits of the key. One 32-bit number of expert and pair, and counting instead of sorting, were slower (rows "plan" of
    `measured/h100.jsonl`).

    Args:
        expert: the expert of each pair; a pair whose expert is not in 0 .. E - 1 is dropped.
        valid: False drops a pair; None keeps all.
        experts: E.
    """
    expert = groups.to_int32(expert)
    kept = (expert >= 0) & (expert < experts)
    if valid is not None:
        kept &= valid
    group = jnp.where(kept, expert, experts).astype(jnp.int32).reshape(-1)
    bits = 8 if experts < 2**8 else 16 if experts < 2**16 else 32
    pair = jnp.arange(expert.size, dtype=jnp.int32)
    ordered, pair_of_row = lax.sort((group.astype(f"uint{bits}"), pair), num_keys=1, is_stable=True)
    row_of_pair = jnp.where(kept, _inverse(pair_of_row).reshape(expert.shape), expert.size)
    return Plan(pair_of_row, row_of_pair, _sizes(ordered.astype(jnp.int32), experts))


def _inverse(permutation: Int[Array, "P"]) -> Int[Array, "P"]:
    place = jnp.arange(permutation.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(place).at[permutation].set(place, unique_indices=True, mode="promise_in_bounds")


def _sizes(ordered: Int[Array, "P"], experts: int) -> Int[Array, "E"]:
    """Group sizes from sorted groups: the last row of each group writes where it ends; no histogram, no search."""
    pairs = ordered.shape[0]
    place = jnp.arange(pairs, dtype=jnp.int32)
    last = jnp.concatenate([ordered[1:] != ordered[:-1], jnp.ones(1, bool)])
    # Rows that are not last write out of bounds, each elsewhere: indices stay unique.
    where = jnp.where(last & (ordered < experts), ordered, experts + place)
    end = jnp.zeros(experts, jnp.int32).at[where].set(place + 1, mode="drop", unique_indices=True)
    # An empty group ends where the last group before it that has rows does.
    end = jnp.max(jnp.where(jnp.tri(experts, dtype=bool), end, 0), axis=1)
    return jnp.diff(end, prepend=0)
