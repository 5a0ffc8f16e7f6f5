"""Rows to places of their own: each row of an array is read once and written wherever a table says (Hopper).

A dispatch that gathers reads a token's row once for each of its experts, in the order of experts, so far apart that it
comes from memory nearly every time. Here blocks go through tokens: a stage of the ring is some adjacent ones, brought
by one TMA copy, and each goes out by a TMA copy of its own to each of its places. What lies out of bounds is written
nowhere. So x is read once, and the time is that of writing the rows there are.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from kernels_pallas.gather_rows import mosaic_gpu, ref
from kernels_pallas.gather_rows.mosaic_gpu import Config
from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.mosaic_gpu import block

MOST_CHOICES = 16  # the places of a row are unrolled
MOST_COPIES = 32  # of a stage, unrolled too


def default_config(row_bytes: int, choices: int) -> Config:
    """Stages of up to 16 KiB and :data:`MOST_COPIES` copies, as many as fit for two blocks."""
    rows = max(1, min(MOST_COPIES // choices, (16 << 10) // row_bytes))
    return Config(rows, mosaic_gpu.most_stages(row_bytes, rows, blocks=2), stores=2)


def refuse_shapes(x: Any, places: Any, size: int) -> str | None:
    """Why these arrays cannot be scattered, on any device."""
    if reason := mosaic_gpu.refuse_shapes(x, jax.ShapeDtypeStruct((size,), places.dtype)):
        return reason
    if 0 in places.shape:
        return "no row has a place"
    if places.shape[1] > MOST_CHOICES:
        return f"K={places.shape[1]} places for each row: at most {MOST_CHOICES}"
    if default_config(x.shape[1] * jnp.dtype(x.dtype).itemsize, places.shape[1]).stages < 3:
        return f"three stages of rows of D={x.shape[1]} do not fit into shared memory"
    return None


def _kernel(x: Any, places: Any, out: Any, ring: Any, full: Any, *, config: Config) -> None:
    (tokens, choices), size = places.shape, out.shape[0]
    block, stride = lax.axis_index("grid"), lax.axis_size("grid")
    all_steps = (tokens + config.rows - 1) // config.rows
    steps = lax.div(all_steps - block + (stride - 1), jnp.int32(stride))  # this block's
    ahead = config.stages - config.stores

    def first_of(step: Any) -> Any:
        return (block + step * stride) * config.rows

    def fetch(step: Any) -> None:
        slot = lax.rem(step, config.stages)
        plgpu.copy_gmem_to_smem(x.at[pl.ds(first_of(step), config.rows)], ring.at[slot], full.at[slot])

    def targets(step: Any) -> tuple:
        """Of a stage that sticks out the last rows have no place."""
        found = []
        for i in range(config.rows):
            token = first_of(step) + i
            at = jnp.minimum(token, tokens - 1)
            for k in range(choices):
                place = mosaic_gpu.in_bounds(places[at, k], size)
                found.append(jnp.where(token < tokens, place, size))
        return tuple(found)

    @pl.loop(0, jnp.minimum(ahead, steps))
    def _(step):
        fetch(step)

    def turn(step: Any, found: tuple) -> tuple:
        slot = lax.rem(step, config.stages)
        following = targets(step + 1)  # a turn before they are needed: memory is slow to answer
        plgpu.barrier_wait(full.at[slot])
        for n, place in enumerate(found):

            @pl.when(place < size)
            def _(n=n, place=place):
                plgpu.copy_smem_to_gmem(ring.at[slot, n // choices], out.at[place], commit_group=False)

        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(config.stores, wait_read_only=True)  # so the stage that is filled next is read

        @pl.when(step + ahead < steps)
        def _():
            fetch(step + ahead)

        return following

    lax.fori_loop(0, steps, turn, targets(jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)


def _call(x: Float[Array, "N D"], places: Int[Array, "N K"], size: int, config: Config) -> Float[Array, "R D"]:
    tokens, columns = x.shape
    row = mosaic_gpu.two_axes(columns, x.dtype.itemsize)
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config),
        out_type=jax.ShapeDtypeStruct((size, *row), x.dtype),
        scratch_types=[
            plgpu.SMEM((config.stages, config.rows, *row), x.dtype),
            plgpu.Barrier(num_barriers=config.stages),
        ],
        grid=(block.multiprocessors() * config.blocks,),
        grid_names=("grid",),
        kernel_name="scatter_rows",  # in a profile
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    out = kernel(x.reshape(tokens, *row), places).reshape(size, columns)
    return groups.vary(out, x, places)


def _batched(x: Array, places: Array, size: int, config: Config) -> Array:
    """`_call`, and what `jax.vmap` makes of it: one scatter of all rows of the batch."""
    run = custom_vmap(functools.partial(_call, size=size, config=config))

    @run.def_vmap
    def _(batch: int, in_batched: list, x: Array, places: Array) -> tuple[Array, bool]:
        x = x if in_batched[0] else jnp.broadcast_to(x, (batch, *x.shape))
        places = places if in_batched[1] else jnp.broadcast_to(places, (batch, *places.shape))
        places = mosaic_gpu.in_bounds(places, size)
        first = size * jnp.arange(batch, dtype=places.dtype)[:, None, None]
        joined = jnp.where(places < size, places + first, batch * size)
        flat = _batched(x.reshape(-1, x.shape[2]), joined.reshape(-1, joined.shape[2]), batch * size, config)
        return flat.reshape(batch, size, -1), True

    return run(x, places)


def scatter_rows(
    x: Float[Array, "N D"], places: Int[Array, "N K"], size: int, *, config: Config | None = None
) -> Float[Array, "R D"]:
    """``out[places[n, k]] = x[n]``, bit by bit, of R = `size` rows. A place out of bounds is nowhere, no other one is
    there twice, and rows that have none may hold anything.

    Raises:
        ValueError: a configuration that does not fit the rows.
    """
    x, places = (groups.vary(a, x, places) for a in (x, places))
    row_bytes = x.shape[1] * x.dtype.itemsize
    config = config or default_config(row_bytes, places.shape[1])
    if reason := config.refuse(row_bytes):
        raise ValueError(reason)
    return _batched(x, places, size, config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scatter(x: Array, places: Array, size: int) -> Array:
    return scatter_rows(x, places, size)


def _scatter_fwd(x: Array, places: Array, size: int) -> tuple[Array, Array]:
    return scatter_rows(x, places, size), places


def _scatter_bwd(size: int, places: Array, dy: Array) -> tuple[Array, None]:
    del size
    return ref.combine_rows(dy, places, jnp.ones_like(places, dy.dtype)), None


_scatter.defvjp(_scatter_fwd, _scatter_bwd)


def gather_rows(
    x: Float[Array, "N D"],
    index: Int[Array, "R"],
    count: Int[Array, ""] | None = None,
    places: Int[Array, "N K"] | None = None,
) -> Float[Array, "R D"]:
    """See `api.gather_rows`: from `places`, where they are told and fit, or else row by row."""
    if places is None or refuse_shapes(x, places, index.shape[0]) is not None:
        return mosaic_gpu.gather_rows(x, index, count)
    # Here too, outside the custom gradient: that of an x which varies over fewer axes is then summed over the others.
    x, places = (groups.vary(a, x, places) for a in (x, places))
    return _scatter(x, places, index.shape[0])
