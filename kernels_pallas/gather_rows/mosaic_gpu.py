"""Back end `mosaic_gpu`: rows from memory to memory through shared memory, by TMA alone (Hopper).

Each block has a ring of stages of some rows. It starts a copy for each row of the stages ahead, and as soon as a
stage is full, one copy of it to the result, where its rows are adjacent. No row goes through registers, and one
warpgroup is enough: what it does is to start copies and to await them.

Where only the leading rows are asked for, the blocks share those and leave the others as they are.

Nothing is masked. A copy that lies out of the array's bounds fills with zeros and reads nothing, which is what rows
without a source must be; and what the last stage has beyond the last row is not written. (Hopper's TMA has no gather
of many rows in one instruction: that came with Blackwell.)
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.ffn import accumulator
from kernels_pallas.grouped_matmul.mosaic_gpu import backend, block

ALIGN = 128  # bytes: TMA writes to shared memory at multiples of it
BOX = 256  # elements that a TMA copy may have along one axis
MOST_ROW_BYTES = 32 << 10
SHARED_BYTES = 220 << 10  # of a multiprocessor, for all its blocks
MOST_ROWS = 8  # of a stage by default: the copies of a stage are unrolled
MOST_STAGES = 16
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Config:
    """How one block works.

    Attributes:
        rows: rows of a stage.
        stages: of the ring.
        stores: stages that may be on their way out while the others are on their way in.
        blocks: on a multiprocessor.
    """

    rows: int
    stages: int
    stores: int = 1
    blocks: int = 2

    def refuse(self, row_bytes: int) -> str | None:
        """Why rows of so many bytes cannot be gathered in this way."""
        if min(self.rows, self.stores, self.blocks) < 1 or self.stages <= self.stores:
            return f"{self}: rows, stores and blocks must be at least 1, and stages more than stores"
        if (needed := self.blocks * self.stages * self.rows * row_bytes) > SHARED_BYTES:
            return f"{self} needs {needed} bytes of shared memory for rows of {row_bytes}: at most {SHARED_BYTES}"
        return None


class _Static(NamedTuple):
    """What is known when compiling: the configuration, and how many rows there are to choose from."""

    config: Config
    size: int


def default_config(row_bytes: int) -> Config:
    """Stages of up to 16 KiB, as many as fit for two blocks."""
    rows = max(1, min(MOST_ROWS, (16 << 10) // row_bytes))
    return Config(rows, most_stages(row_bytes, rows, blocks=2))


def most_stages(row_bytes: int, rows: int, blocks: int) -> int:
    """How many stages of so many rows fit."""
    return min(MOST_STAGES, SHARED_BYTES // (blocks * rows * row_bytes))


def widest_part(columns: int, itemsize: int) -> int | None:
    """The widest part of a row that one axis of a TMA copy can have; None if a row needs more parts than the other."""
    fits = [n for n in range(16 // itemsize, BOX + 1, 16 // itemsize) if columns % n == 0 and columns // n <= BOX]
    return max(fits, default=None)


def two_axes(columns: int, itemsize: int) -> tuple[int, int]:
    """A row, of those that `refuse_shapes` takes, as two axes: one may not be wider than a BOX."""
    part = widest_part(columns, itemsize)
    assert part is not None  # `refuse_shapes` says so
    return columns // part, part


def refuse(x: Any, index: Any, count: Any = None) -> str | None:
    """See `dispatch.Backend`."""
    del count
    return refuse_device() or refuse_shapes(x, index)


def refuse_device() -> str | None:
    """Why no array can be gathered from here: another device than Hopper, or a mesh that may split arrays."""
    if reason := backend._hopper():
        return reason
    mesh = jax.sharding.get_abstract_mesh()
    split = [name for name in mesh.axis_names if mesh.shape[name] > 1 and name not in mesh.manual_axes]
    return f"takes whole arrays, but the mesh axes {split} may split them: call it inside shard_map" if split else None


def refuse_shapes(x: Any, index: Any) -> str | None:
    """Why these arrays cannot be gathered from, on any device."""
    (size, columns), count, dtype = x.shape, index.shape[0], jnp.dtype(x.dtype)
    if dtype.name not in DTYPES:
        return f"copies {', '.join(DTYPES)}, not {dtype.name}"
    if index.dtype != jnp.int32:
        return f"index must be int32, not {index.dtype.name}"
    if size < 2 or 0 in (columns, count):  # a copy from an array of one row has no bounds along that axis
        return f"needs at least two rows to choose from and one to choose, not N={size}, D={columns}, R={count}"
    if max(size, count) * columns >= 1 << 31:
        return f"N={size} or R={count} rows of D={columns} are 2^31 elements or more: gather them in parts"
    row_bytes = columns * dtype.itemsize
    if row_bytes % ALIGN:
        return f"D={columns} of {dtype.name} is {row_bytes} bytes, which must be a multiple of {ALIGN} (a TMA copy)"
    if row_bytes > MOST_ROW_BYTES or widest_part(columns, dtype.itemsize) is None:
        return f"D={columns} of {dtype.name} is too wide for one TMA copy: at most {MOST_ROW_BYTES} bytes"
    return None


def in_bounds(source: Any, size: int) -> Any:
    """The row that an index means, as in NumPy; row `size`, which a copy reads as zeros, for one out of bounds."""
    source = jnp.where(source < 0, source + size, source)
    return jnp.where((source < 0) | (source >= size), size, source)


def _kernel(x: Any, index: Any, *refs: Any, config: Config) -> None:
    *leading, out, ring, full = refs
    size, count = x.shape[0], out.shape[0]
    block, stride = lax.axis_index("grid"), lax.axis_size("grid")
    wanted = jnp.clip(leading[0][0], 0, count) if leading else jnp.int32(count)
    all_steps = lax.div(wanted + (config.rows - 1), jnp.int32(config.rows))
    steps = lax.div(jnp.maximum(all_steps - block, 0) + (stride - 1), jnp.int32(stride))  # this block's
    ahead = config.stages - config.stores

    def row_of(step: Any) -> Any:
        return (block + step * stride) * config.rows

    def sources(step: Any) -> tuple:
        # The last row's again where a stage sticks out: what it has there is not written.
        return tuple(index[jnp.minimum(row_of(step) + i, count - 1)] for i in range(config.rows))

    def fetch(step: Any, found: tuple) -> None:
        slot = lax.rem(step, config.stages)
        for i, source in enumerate(found):
            plgpu.copy_gmem_to_smem(x.at[in_bounds(source, size)], ring.at[slot, i], full.at[slot])

    @pl.loop(0, jnp.minimum(ahead, steps))
    def _(step):
        fetch(step, sources(step))

    def turn(step: Any, found: tuple) -> tuple:
        slot = lax.rem(step, config.stages)
        following = sources(step + ahead + 1)  # a turn before they are needed: memory is slow to answer
        plgpu.barrier_wait(full.at[slot])
        plgpu.copy_smem_to_gmem(ring.at[slot], out.at[pl.ds(row_of(step), config.rows)])
        plgpu.wait_smem_to_gmem(config.stores, wait_read_only=True)  # so the stage that is filled next is read

        @pl.when(step + ahead < steps)
        def _():
            fetch(step + ahead, found)

        return following

    lax.fori_loop(0, steps, turn, sources(jnp.int32(ahead)))
    plgpu.wait_smem_to_gmem(0)


def _call(
    x: Float[Array, "N D"], index: Int[Array, "R"], leading: tuple[Int[Array, "1"], ...], config: Config
) -> Float[Array, "R D"]:
    (size, columns), count = x.shape, index.shape[0]
    if reason := config.refuse(columns * x.dtype.itemsize):
        raise ValueError(reason)
    row = two_axes(columns, x.dtype.itemsize)
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config),
        out_type=jax.ShapeDtypeStruct((count, *row), x.dtype),
        scratch_types=[
            plgpu.SMEM((config.stages, config.rows, *row), x.dtype),
            plgpu.Barrier(num_arrivals=config.rows, num_barriers=config.stages),
        ],
        grid=(block.multiprocessors() * config.blocks,),
        grid_names=("grid",),
        kernel_name="gather_rows",  # in a profile
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    out = kernel(x.reshape(size, *row), index, *leading).reshape(count, columns)
    # A kernel does not pass on over which mesh axes its operands vary.
    return groups.vary(out, x, index, *leading)


def joined(x: Array, index: Array, size: int, x_batched: bool, index_batched: bool) -> tuple[Array, Array]:
    """The rows of a batch of `size` as one array, and the indices, `[size, ...]`, of the same rows in it."""
    if not index_batched:
        index = jnp.broadcast_to(index, (size, *index.shape))
    if not x_batched:
        return x, index
    rows = x.shape[1]
    index = in_bounds(index, rows)
    first = rows * jnp.arange(size, dtype=index.dtype).reshape(-1, *[1] * (index.ndim - 1))
    return x.reshape(size * rows, x.shape[2]), jnp.where(index < rows, index + first, size * rows)


def _batched(x: Array, index: Array, leading: tuple[Array, ...], config: Config) -> Array:
    """`_call`, and what `jax.vmap` makes of it: one gather from all rows of the batch."""
    run = custom_vmap(functools.partial(_call, config=config))

    @run.def_vmap
    def _(axis_size: int, in_batched: list, x: Array, index: Array, leading: tuple) -> tuple[Array, bool]:
        del leading  # of each of the batch: all rows are copied
        x, index = joined(x, index, axis_size, *in_batched[:2])
        return _batched(x, index.reshape(-1), (), config).reshape(*index.shape, x.shape[1]), True

    return run(x, index, leading)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather(x: Array, index: Array, leading: tuple[Array, ...], static: _Static) -> Array:
    return _batched(x, index, leading, static.config)


def _gather_fwd(x: Array, index: Array, leading: tuple[Array, ...], static: _Static) -> tuple[Array, tuple]:
    return _gather(x, index, leading, static), (index, *leading)


def _gather_bwd(static: _Static, saved: tuple[Array, ...], dy: Array) -> tuple[Array, None, None]:
    index, *leading = saved
    if leading:  # the others are not part of the result
        index = jnp.where(jnp.arange(index.shape[0]) < leading[0], index, static.size)
    wide = accumulator(dy.dtype)
    zeros = groups.zeros((static.size, dy.shape[1]), wide, dy, index)
    return zeros.at[index].add(dy.astype(wide), mode="drop").astype(dy.dtype), None, None


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather_rows(
    x: Float[Array, "N D"],
    index: Int[Array, "R"],
    count: Int[Array, ""] | None = None,
    *,
    config: Config | None = None,
) -> Float[Array, "R D"]:
    """See `api.gather_rows`.

    Raises:
        ValueError: a configuration that does not fit the rows.
    """
    leading = () if count is None else (count.astype(jnp.int32).reshape(1),)
    given = x, index, *leading
    x, index, *leading = [groups.vary(a, *given) for a in given]
    config = config or default_config(x.shape[1] * x.dtype.itemsize)
    return _gather(x, index, tuple(leading), _Static(config, x.shape[0]))
