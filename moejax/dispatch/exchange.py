"""The exchange of rows between the ranks of expert parallelism: transports, and the order of received rows.

Every rank has a send buffer ``[ranks * C, D]``, C rows for each destination, whose leading rows are filled, and
receives a buffer of the same shape, C rows of each source. A transport moves one into the other:

``padded``
    One dense ``jax.lax.all_to_all``: padding travels, and nobody computes it.
``ragged``
    ``jax.lax.ragged_all_to_all``: filled rows only. Not on a CPU.

Letters: P = ranks * C rows, D model, e experts of one rank.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import default_platform
from moejax.config import ConfigError
from moejax.dispatch.rows import take

Transport = Callable[[Array, Array, Array, str], Array]
"""``(buffer [P, D], rows sent to each rank, rows received of each rank, axis) -> buffer [P, D]``."""


SLICES = {"gpu": 1024}
"""In how many slices, to all ranks together, `ragged` sends a buffer on a platform; elsewhere in one to each rank.
Within a host XLA gives each slice one block of 128 threads (``xla/backends/gpu/runtime/ragged_all_to_all.cc``): with
one slice a rank, two GPUs copy with two blocks each."""


def padded(buffer: Float[Array, "P D"], sent: Int[Array, "ranks"], received: Int[Array, "ranks"], axis: str) -> Array:
    del sent, received
    return jax.lax.all_to_all(buffer, axis, 0, 0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged(buffer: Float[Array, "P D"], sent: Int[Array, "ranks"], received: Int[Array, "ranks"], axis: str) -> Array:
    """Rows beyond those received are 0. Its transpose is the way back."""
    ranks = jax.lax.axis_size(axis)
    rows, each = buffer.shape[0] // ranks, max(1, SLICES.get(default_platform(), 1) // ranks)
    begins, sizes = _cut(sent, each)
    starts = rows * jnp.arange(ranks, dtype=sent.dtype)[:, None] + begins
    targets = rows * jax.lax.axis_index(axis).astype(sent.dtype) + begins
    _, arriving = _cut(received, each)
    flat = [a.reshape(-1) for a in (starts, sizes, targets, arriving)]
    return jax.lax.ragged_all_to_all(buffer, jnp.zeros_like(buffer), *flat, axis_name=axis)


def _cut(count: Int[Array, "ranks"], each: int) -> tuple[Int[Array, "ranks each"], Int[Array, "ranks each"]]:
    """Rows in ``each`` slices as even as can be: where each begins, and its size."""
    index = jnp.arange(each, dtype=count.dtype)
    whole, more = count[:, None] // each, count[:, None] % each
    return index * whole + jnp.minimum(index, more), whole + (index < more)


def _ragged_fwd(buffer: Array, sent: Array, received: Array, axis: str) -> tuple[Array, tuple]:
    return ragged(buffer, sent, received, axis), (sent, received)


def _ragged_bwd(axis: str, sizes: tuple, dy: Array) -> tuple[Array, None, None]:
    sent, received = sizes
    return ragged(dy, received, sent, axis), None, None


ragged.defvjp(_ragged_fwd, _ragged_bwd)

TRANSPORTS: dict[str, Transport] = {"padded": padded, "ragged": ragged}
BY_PLATFORM = {"tpu": "ragged"}
"""The transport of "auto" where it is not "padded"."""


def resolve(exchange: str, platform: str | None = None) -> str:
    """The ``moe.ep_exchange`` that runs: "auto" is "padded" on a CPU or GPU, "ragged" on a TPU.

    Raises:
      ConfigError: "ragged" on a CPU.
    """
    platform = platform or default_platform()
    if exchange == "ragged" and platform == "cpu":
        raise ConfigError(
            "moe.ep_exchange='ragged' cannot run on a CPU: XLA has no ragged all-to-all there; choose 'padded', which "
            "computes the same, or 'auto'"
        )
    return BY_PLATFORM.get(platform, "padded") if exchange == "auto" else exchange


def by_expert(received: Int[Array, "ranks e"], capacity: int) -> tuple[Int[Array, "P"], Int[Array, "P"]]:
    """How received rows are ordered by expert, then source: ``(place in the buffer of each ordered row, ordered row of
    each place)``, both out of bounds (P) where there is no row.

    ``received`` counts the rows of each source for each expert; within a source they are ordered by expert.
    """
    ranks, experts = received.shape
    total = ranks * capacity
    ends = jnp.cumsum(received, axis=1)
    begins = ends - received  # of each expert's run within its source
    runs = received.T.reshape(-1)  # in the order wanted
    run_ends = jnp.cumsum(runs)
    run_begins = run_ends - runs

    row = jnp.arange(total, dtype=jnp.int32)
    # Compare and sum, not a binary search: `jnp.searchsorted` fails inside shard_map (JAX 0.11.2).
    run = jnp.sum(row[:, None] >= run_ends, axis=1)  # ranks * e past the last one
    first = (begins + capacity * jnp.arange(ranks, dtype=jnp.int32)[:, None]).T.reshape(-1)
    place_of_row = jnp.where(row < run_ends[-1], take(first - run_begins, run) + row, total)

    offset = jnp.arange(capacity, dtype=jnp.int32)
    expert = jnp.sum(offset[:, None] >= ends[:, None, :], axis=2)  # [ranks, C]; e past the source's last row
    shift = run_begins.reshape(experts, ranks).T - begins
    shift = jnp.take_along_axis(shift, jnp.minimum(expert, experts - 1), axis=1)
    row_of_place = jnp.where(expert < experts, shift + offset, total)
    return place_of_row.astype(jnp.int32), row_of_place.reshape(-1).astype(jnp.int32)


@jax.custom_vjp
def permuted(
    x: Float[Array, "P D"], source: Int[Array, "P"], back: Int[Array, "P"], count: Int[Array, ""] | None = None
) -> Float[Array, "P D"]:
    """``x[source]``, zeros where that is out of bounds, anything from row ``count`` on; ``back`` is its inverse, and
    the gradient a gather too."""
    del back
    return take(x, source, count)


permuted.defvjp(
    lambda x, source, back, count: (take(x, source, count), back),
    lambda back, dy: (take(dy, back), None, None, None),
)
