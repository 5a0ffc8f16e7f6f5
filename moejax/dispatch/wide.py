"""The weighted sum of wide tables: many columns, of which a token has few (limits that add pairs append a column for
each expert of the rank). Its cost goes with the rows there are, not with the columns.

Each token's valid columns are moved to its front and cut into blocks of :data:`BLOCK`. The first block is summed for
all tokens. The blocks beyond it, of all tokens together, are at most :func:`further_blocks`, a static number: they are
listed one after the other, summed in float32, and each token adds its own to its first one. Every index is read or
written once, so there is no scatter-add and the result is deterministic.

Letters: T tokens, D model, K columns, P rows, N further blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.dispatch.plans import placed

BLOCK = 8
"""Columns that are summed together."""
NARROW = 16
"""Up to so many columns are always summed one by one."""
SETUP = 1 << 15
"""What moving columns and listing blocks counts as, in visits (:func:`visits`): a dozen small kernels, some 50 us, and
a visit of 2048 columns of D took 2 ns on an H200. An estimate, not a measurement."""


def pays(rows: int, tokens: int, columns: int) -> bool:
    """Whether :func:`wide_sum` is worth it for ``[P, D]`` rows and a ``[T, K]`` table, against a sum over all columns:
    it saves at least a quarter of the visits, its :data:`SETUP` counted."""
    every = tokens * columns
    return columns > NARROW and 4 * (visits(rows, tokens, columns) + SETUP) <= 3 * every


def visits(rows: int, tokens: int, columns: int) -> int:
    """Rows that :func:`wide_sum` reads or would read, as out-of-bounds ones cost nearly as much; the plain sum makes
    ``T K``. Those are the columns of all blocks, and each further block once more, by its token."""
    return BLOCK * (tokens + further_blocks(rows, tokens, columns)) + tokens * (_blocks(columns) - 1)


def further_blocks(rows: int, tokens: int, columns: int) -> int:
    """N: the most blocks that tokens can have beyond their first one, if no row belongs to two pairs.

    A token with b of them has more than ``BLOCK b`` pairs, and b is at most ``m = ceil(K / BLOCK) - 1``. So n tokens
    with N in all take ``BLOCK N + n`` rows or more, and ``N <= m n``: ``N <= P m / (BLOCK m + 1)``.
    """
    most = _blocks(columns) - 1
    return min(tokens * most, rows * most // (BLOCK * most + 1))


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def wide_sum(
    ys: Float[Array, "P D"], weight: Float[Array, "T K"], row_of_pair: Int[Array, "T K"]
) -> Float[Array, "T D"]:
    """``out[t] = sum over k of weight[t, k] * ys[row_of_pair[t, k]]`` in float32, as
    ``kernels_pallas.gather_rows.combine_rows``: rows out of bounds count as zeros, rows that nobody names may hold
    anything, -1 is the last row.

    No row may be named twice: tokens may then have more further blocks than there is room for, and some be lost. A
    token's pairs are summed in the order of k, those beyond its first block apart, block by block.
    """
    (rows, _), (tokens, columns) = ys.shape, weight.shape
    blocks, listed = _blocks(columns), further_blocks(rows, tokens, columns)
    held = (row_of_pair >= -rows) & (row_of_pair < rows)
    before = jnp.cumsum(held, axis=1, dtype=jnp.int32)
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    size = tokens * blocks * BLOCK
    place = jnp.where(held, token * (blocks * BLOCK) + before - 1, size)
    row = placed(place, row_of_pair, size, rows).reshape(tokens, blocks, BLOCK)
    weight = placed(place, weight.astype(jnp.float32), size, 0).reshape(tokens, blocks, BLOCK)

    total = _sum(ys, row[:, 0], weight[:, 0])
    if listed:
        further = jnp.maximum(before[:, -1] - 1, 0) // BLOCK
        start = jnp.cumsum(further) - further
        block = jnp.arange(1, blocks, dtype=jnp.int32)
        place = jnp.where(block <= further[:, None], start[:, None] + block - 1, listed)
        source = placed(place, token * blocks + block, listed, tokens * blocks)
        row, weight = row.reshape(-1, BLOCK), weight.reshape(-1, BLOCK)
        made = _sum(ys, _read(row, source, rows), _read(weight, source, 0))
        # Made once: fused into the sum below, each block would be made again for each token.
        made = jax.lax.optimization_barrier(made)
        for i in range(blocks - 1):
            total = total + _read(made, place[:, i], 0)
    return total.astype(ys.dtype)


def _sum(ys: Array, row: Array, weight: Array) -> Array:
    """The weighted sum of all columns, one by one: no ``[T, K, D]`` temporary."""
    total = jnp.zeros_like(ys, jnp.float32, shape=(row.shape[0], ys.shape[1]))
    for k in range(row.shape[1]):
        total = total + weight[:, k, None] * _read(ys, row[:, k], 0).astype(jnp.float32)
    return total


def _read(x: Array, index: Array, otherwise: float) -> Array:
    return x.at[index].get(mode="fill", fill_value=otherwise)
