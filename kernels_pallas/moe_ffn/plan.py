"""From each token's experts to rows sorted by expert, and back.

Letters: T tokens, K choices of a token, P = T K pairs and as many rows, E experts.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

Method = Literal["narrow", "packed", "count"]
METHODS: tuple[str, ...] = get_args(Method)

_BLOCK = 128  # pairs compared with one another by "count"
_SPAN = 64  # blocks summed together by "count"


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


def make_plan(
    expert: Int[Array, "T K"], valid: Bool[Array, "T K"] | None, experts: int, *, method: Method = "narrow"
) -> Plan:
    """Sorts the pairs by expert; stable, so every method gives the same plan.

    Args:
        expert: the expert of each pair; a pair whose expert is not in 0 .. E - 1 is dropped.
        valid: False drops a pair; None keeps all.
        experts: E.
        method: "narrow" sorts (expert in 8 or 16 bits, pair) by the first: XLA for GPU makes it a radix sort whose
            passes grow with the bits of the key; "packed" sorts expert and pair as one 32-bit number; "count" does
            not sort: a pair's row is the number of pairs of earlier experts, and of the same expert in earlier
            blocks and earlier in its block.

    Raises:
        ValueError: an unknown method, or "packed" with (E + 1) P of 2^31 or more.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {METHODS}")
    kept = (expert >= 0) & (expert < experts)
    if valid is not None:
        kept &= valid
    group = jnp.where(kept, expert, experts).astype(jnp.int32).reshape(-1)
    by = {"narrow": _narrow, "packed": _packed, "count": _count}[method]
    pair_of_row, row_of_pair, group_sizes = by(group, experts)
    return Plan(pair_of_row, jnp.where(kept, row_of_pair.reshape(expert.shape), expert.size), group_sizes)


def _narrow(group: Int[Array, "P"], experts: int) -> tuple[Array, Array, Array]:
    bits = 8 if experts < 2**8 else 16 if experts < 2**16 else 32
    pair = jnp.arange(group.shape[0], dtype=jnp.int32)
    ordered, pair_of_row = lax.sort((group.astype(f"uint{bits}"), pair), num_keys=1, is_stable=True)
    return pair_of_row, _inverse(pair_of_row), _sizes(ordered.astype(jnp.int32), experts)


def _packed(group: Int[Array, "P"], experts: int) -> tuple[Array, Array, Array]:
    pairs = group.shape[0]
    if (experts + 1) * pairs >= 2**31:
        raise ValueError(
            f"method='packed' with {experts} experts and {pairs} pairs: (experts + 1) * pairs must be under 2^31; "
            "choose another method"
        )
    key = jnp.sort(group * pairs + jnp.arange(pairs, dtype=jnp.int32))
    pair_of_row = key % pairs
    return pair_of_row, _inverse(pair_of_row), _sizes(key // pairs, experts)


def _count(group: Int[Array, "P"], experts: int) -> tuple[Array, Array, Array]:
    pairs = group.shape[0]
    blocks = -(-pairs // _BLOCK)
    # Padding acts as dropped pairs behind all others: their rows are P and beyond.
    block = jnp.pad(group, (0, blocks * _BLOCK - pairs), constant_values=experts).reshape(blocks, _BLOCK)
    same = block[:, :, None] == block[:, None, :]
    within = jnp.sum(same & jnp.tri(_BLOCK, k=-1, dtype=bool), axis=2, dtype=jnp.int32)
    held = jnp.sum(block[:, :, None] == jnp.arange(experts + 1), axis=1, dtype=jnp.int32)
    sizes = jnp.sum(held, axis=0, dtype=jnp.int32)
    base = _sum_before(sizes) + _sum_before_in_spans(held)
    row = (jnp.take_along_axis(base, block, axis=1) + within).reshape(-1)[:pairs]
    return _inverse(row), row, sizes[:-1]


def _sum_before(x: Int[Array, "... N M"] | Int[Array, "N"]) -> Array:
    """Sum of the earlier entries of the last axis of a vector, of the second last axis otherwise.

    A masked sum is one fused kernel where `jnp.cumsum` on a GPU is a chain of log2(N) or more.
    """
    if x.ndim == 1:
        return _sum_before(x[:, None])[:, 0]
    n = x.shape[-2]
    return jnp.sum(jnp.where(jnp.tri(n, k=-1, dtype=bool)[:, :, None], x[..., None, :, :], 0), axis=-2, dtype=x.dtype)


def _sum_before_in_spans(x: Int[Array, "B E"]) -> Int[Array, "B E"]:
    """`_sum_before` over the first axis in two levels, so that work grows with B, not with B^2."""
    spans = -(-x.shape[0] // _SPAN)
    split = jnp.pad(x, ((0, spans * _SPAN - x.shape[0]), (0, 0))).reshape(spans, _SPAN, x.shape[1])
    earlier_spans = _sum_before(jnp.sum(split, axis=1, dtype=x.dtype))
    return (_sum_before(split) + earlier_spans[:, None]).reshape(-1, x.shape[1])[: x.shape[0]]


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
