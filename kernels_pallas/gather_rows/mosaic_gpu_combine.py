"""Back end `mosaic_gpu` of `combine_rows`: the weighted sum of each token's rows in one pass (Hopper).

A stage of the ring is all rows of one token, each by a TMA copy of its own, as in `mosaic_gpu.py`. When they are
there, the block's one warpgroup sums them in float32 registers, while the rows of the next tokens arrive.
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

CELLS = 2  # sums on their way out
MOST_CHOICES = 16  # the rows of a token are unrolled
COLUMNS = 256  # a multiple of this is what D must be: two elements for each thread


def most_stages(row_bytes: int, choices: int, blocks: int) -> int:
    """How many tokens of so many rows fit into the ring of a block."""
    shared = mosaic_gpu.SHARED_BYTES // blocks - CELLS * row_bytes
    return min(mosaic_gpu.MOST_STAGES, shared // (choices * row_bytes))


def default_config(row_bytes: int, choices: int) -> Config:
    """Two blocks where each can have two tokens on their way."""
    blocks = 2 if most_stages(row_bytes, choices, 2) >= 2 else 1
    return Config(choices, most_stages(row_bytes, choices, blocks), 1, blocks)


def refuse(ys: Any, row_of_pair: Any, weight: Any) -> str | None:
    """See `dispatch.Backend`."""
    del weight
    return mosaic_gpu.refuse_device() or refuse_shapes(ys, row_of_pair)


def refuse_shapes(ys: Any, row_of_pair: Any) -> str | None:
    """Why these arrays cannot be combined, on any device."""
    tokens, choices = row_of_pair.shape
    if reason := mosaic_gpu.refuse_shapes(ys, jax.ShapeDtypeStruct((tokens * choices,), row_of_pair.dtype)):
        return reason
    if ys.shape[1] % COLUMNS:
        return f"D={ys.shape[1]} must be a multiple of {COLUMNS}"
    if choices > MOST_CHOICES:
        return f"K={choices} rows for each token: at most {MOST_CHOICES}"
    row_bytes = ys.shape[1] * jnp.dtype(ys.dtype).itemsize
    if most_stages(row_bytes, choices, 1) < 2:
        return f"K={choices} rows of {row_bytes} bytes do not fit twice into shared memory"
    return None


def _kernel(ys: Any, table: Any, weight: Any, out: Any, ring: Any, cells: Any, full: Any, *, stages: int) -> None:
    (tokens, choices), size = table.shape, ys.shape[0]
    block, stride = lax.axis_index("grid"), lax.axis_size("grid")
    steps = lax.div(tokens - block + (stride - 1), jnp.int32(stride))  # this block's

    def of_token(values: Any, step: Any) -> tuple:
        token = jnp.minimum(block + step * stride, tokens - 1)
        return tuple(values[token, k] for k in range(choices))

    def fetch(step: Any, found: tuple) -> None:
        slot = lax.rem(step, stages)
        for k, source in enumerate(found):
            plgpu.copy_gmem_to_smem(ys.at[mosaic_gpu.in_bounds(source, size)], ring.at[slot, k], full.at[slot])

    @pl.loop(0, jnp.minimum(stages, steps))
    def _(step):
        fetch(step, of_token(table, step))

    def turn(step: Any, carry: tuple) -> tuple:
        shares, found = carry
        slot, cell = lax.rem(step, stages), lax.rem(step, CELLS)
        following = of_token(weight, step + 1), of_token(table, step + stages + 1)  # a turn before they are needed
        plgpu.barrier_wait(full.at[slot])
        terms = [share * ring[slot, k].astype(jnp.float32) for k, share in enumerate(shares)]
        total = functools.reduce(jnp.add, terms)
        plgpu.wait_smem_to_gmem(CELLS - 1, wait_read_only=True)
        cells[cell] = total.astype(cells.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(cells.at[cell], out.at[block + step * stride])

        @pl.when(step + stages < steps)
        def _():
            fetch(step + stages, found)

        return following

    lax.fori_loop(0, steps, turn, (of_token(weight, jnp.int32(0)), of_token(table, jnp.int32(stages))))
    plgpu.wait_smem_to_gmem(0)


def _call(
    ys: Float[Array, "R D"], row_of_pair: Int[Array, "T K"], weight: Float[Array, "T K"], config: Config
) -> Float[Array, "T D"]:
    (size, columns), (tokens, choices) = ys.shape, row_of_pair.shape
    row_bytes = columns * ys.dtype.itemsize
    most = most_stages(row_bytes, choices, config.blocks)
    if not 2 <= config.stages <= most:
        raise ValueError(f"{config}: stages must be 2 to {most} for {choices} rows of {row_bytes} bytes for each token")
    row = mosaic_gpu.two_axes(columns, ys.dtype.itemsize)
    kernel = plgpu.kernel(
        functools.partial(_kernel, stages=config.stages),
        out_type=jax.ShapeDtypeStruct((tokens, *row), ys.dtype),
        scratch_types=[
            plgpu.SMEM((config.stages, choices, *row), ys.dtype),
            plgpu.SMEM((CELLS, *row), ys.dtype),
            plgpu.Barrier(num_arrivals=choices, num_barriers=config.stages),
        ],
        grid=(block.multiprocessors() * config.blocks,),
        grid_names=("grid",),
        kernel_name="combine_rows",  # in a profile
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    out = kernel(ys.reshape(size, *row), row_of_pair, weight).reshape(tokens, columns)
    return groups.vary(out, ys, row_of_pair, weight)


def _batched(ys: Array, row_of_pair: Array, weight: Array, config: Config) -> Array:
    """`_call`, and what `jax.vmap` makes of it: one call for the tokens of the whole batch."""
    run = custom_vmap(functools.partial(_call, config=config))

    @run.def_vmap
    def _(axis_size: int, in_batched: list, ys: Array, table: Array, weight: Array) -> tuple[Array, bool]:
        ys, table = mosaic_gpu.joined(ys, table, axis_size, *in_batched[:2])
        weight = weight if in_batched[2] else jnp.broadcast_to(weight, (axis_size, *weight.shape))
        tokens, choices = weight.shape[1:]
        out = _batched(ys, table.reshape(-1, choices), weight.reshape(-1, choices), config)
        return out.reshape(axis_size, tokens, -1), True

    return run(ys, row_of_pair, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(ys: Array, row_of_pair: Array, weight: Array, config: Config) -> Array:
    return _batched(ys, row_of_pair, weight, config)


def _combine_fwd(ys: Array, row_of_pair: Array, weight: Array, config: Config) -> tuple[Array, tuple]:
    return _combine(ys, row_of_pair, weight, config), (ys, row_of_pair, weight)


def _combine_bwd(config: Config, saved: tuple, dy: Array) -> tuple[Array, None, Array]:
    del config
    ys, row_of_pair, weight = saved
    dys, dweight = jax.vjp(lambda ys, weight: ref.combine_rows(ys, row_of_pair, weight), ys, weight)[1](dy)
    return dys, None, dweight


_combine.defvjp(_combine_fwd, _combine_bwd)


def combine_rows(
    ys: Float[Array, "R D"],
    row_of_pair: Int[Array, "T K"],
    weight: Float[Array, "T K"],
    *,
    config: Config | None = None,
) -> Float[Array, "T D"]:
    """See `api.combine_rows`; of the configuration stages (tokens of the ring) and blocks count.

    Raises:
        ValueError: a configuration that does not fit the rows.
    """
    operands = ys, row_of_pair, weight.astype(jnp.float32)
    config = config or default_config(ys.shape[1] * ys.dtype.itemsize, row_of_pair.shape[1])
    return _combine(*(groups.vary(a, *operands) for a in operands), config)
