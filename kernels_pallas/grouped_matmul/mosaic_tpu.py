"""Back end `mosaic_tpu`: Pallas kernels for TPU, one for the products by rows, one for the gradient of the weights.

Rows are cut into tiles of equal size, and a tile is visited once for each group that has rows in it. Which visits there
are depends on the group sizes: XLA works them out on the device, the kernels read them as prefetched scalars and take
their number as the size of the grid, so that only tiles with rows are visited. Tiles and columns beyond an extent are
neither multiplied nor, in the products by rows, fetched. No operand is padded or copied.

Correct when interpreted and accepted by the TPU compiler's front end; never timed: the tiles are a guess.

Letters: P rows, G groups, E experts, V visits (an upper bound), K x N one expert's matrix.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.grouped_matmul import ffn, groups
from kernels_pallas.grouped_matmul.groups import ExtentAxis
from kernels_pallas.grouped_matmul.ref import compose
from kernels_pallas.grouped_matmul.vjp import differentiable

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
LANES = 128  # of a vector register: tiles are multiples of it, or as wide as the array
LARGEST = 512  # tile: two buffers of each operand and of the result in float32, and the sum, take 7 of 16 MiB
SMALLEST_ROWS = 64

_interpret = contextvars.ContextVar[Any]("interpret", default=False)


@contextlib.contextmanager
def interpreted(params: pltpu.InterpretParams | None = None) -> Generator[None]:
    """Inside of it the kernels run in JAX's TPU interpreter, on any platform; slow, meant for tests.

    It decides while a function is traced: one that was jitted outside of it stays as it is.

    Args:
        params: of the interpreter; by default memory that was never written holds NaN.
    """
    token = _interpret.set(params or pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="eager"))
    try:
        yield
    finally:
        _interpret.reset(token)


class Visits(NamedTuple):
    """What the kernels know about groups; all int32, in scalar memory.

    Attributes:
        group, tile: of each visit, by row. Beyond the last visit they are in bounds and unused.
        first, last: whether a visit is the first or last one of its expert.
        start, end: rows of each group.
        limit_k, limit_n: leading columns of K and of N that take part in each group's rows.
    """

    group: Int[Array, "V"]
    tile: Int[Array, "V"]
    first: Int[Array, "V"]
    last: Int[Array, "V"]
    start: Int[Array, "G"]
    end: Int[Array, "G"]
    limit_k: Int[Array, "G"]
    limit_n: Int[Array, "G"]


def tile_size(size: int) -> int:
    """For an axis of columns: all of it if short, else the multiple of LANES of which padding and number cost least."""
    if size <= LARGEST:
        return size
    return min(range(LARGEST, 0, -LANES), key=lambda tile: pl.cdiv(size, tile) * (tile + LANES))


def row_tile(rows: int, group_count: int) -> int:
    """Half the mean group, as each group's first and last tiles are shared, in powers of two; all rows if few."""
    tile = LARGEST
    while tile > SMALLEST_ROWS and 2 * tile * group_count > rows:
        tile //= 2
    return min(tile, rows)


def visits(
    group_sizes: Int[Array, "G"],
    extents: Int[Array, "G"] | None,
    extent_axis: ExtentAxis,
    *,
    rows: int,
    k: int,
    n: int,
    tile: int,
    experts: int,
    every_expert: bool,
) -> tuple[Visits, Int[Array, ""]]:
    """The visits, and how many there are (at least 1).

    Args:
        every_expert: one visit for experts without rows too: their gradient must be written.
    """
    start, end = groups.bounds(group_sizes, rows)
    count, tiles = group_sizes.shape[0], pl.cdiv(rows, tile)
    first_tile = start // tile
    number = jnp.where(end > start, (end - 1) // tile - first_tile + 1, 0)
    parts = count // experts
    if every_expert:
        none = jnp.sum(number.reshape(experts, parts), axis=1, keepdims=True) == 0
        number = number.reshape(experts, parts).at[:, :1].max(none.astype(jnp.int32)).reshape(-1)
    # A tile is visited once, and once more for each group that begins within it: at most tiles + G - 1 in all.
    after = jnp.cumsum(number, dtype=jnp.int32)
    visit = jnp.arange(tiles + count - 1, dtype=jnp.int32)
    group = jnp.minimum(groups.row_group(after, visit.size), count - 1)
    place = first_tile[group] + visit - (after - number)[group]
    expert = group // parts
    changes = expert[1:] != expert[:-1]
    true = jnp.ones(1, bool)
    total = jnp.maximum(after[-1], 1)
    last = jnp.concatenate([changes, true]) | (visit == total - 1)
    size = {"k": k, "n": n}
    limits = {axis: jnp.full(count, columns, jnp.int32) for axis, columns in size.items()}
    if extents is not None:
        limits[extent_axis] = groups.round_extents(extents, size[extent_axis])
    plan = Visits(
        group=group,
        tile=jnp.clip(place, 0, tiles - 1).astype(jnp.int32),
        first=jnp.concatenate([true, changes]).astype(jnp.int32),
        last=last.astype(jnp.int32),
        start=start,
        end=end,
        limit_k=limits["k"],
        limit_n=limits["n"],
    )
    return plan, total


def _within(shape: tuple[int, ...], axis: int, offset: Array, low: Array | int, high: Array) -> Bool[Array, "..."]:
    """Whether low <= offset + (index along axis) < high."""
    index = lax.broadcasted_iota(jnp.int32, shape, axis) + offset
    return (index >= low) & (index < high)


def _select(mask: Array, x: Array) -> Array:
    """x where the mask is set, else 0, as float32: TPUs before the sixth generation cannot select bfloat16."""
    return jnp.where(mask, x.astype(jnp.float32), 0)


def _call(
    kernel: Callable, plan: Visits, operands: tuple[Array, ...], out: jax.ShapeDtypeStruct, interpret: Any, **spec
):
    """`pallas_call` with the plan prefetched, also where arrays vary over manual mesh axes."""
    arrays = (*plan, *operands)

    def cast(x: Array) -> Array:
        return groups.vary(x, *arrays)

    like = jax.typeof(cast(operands[0])).manual_axis_type
    semantics = spec.pop("dimension_semantics")
    spec["grid"] = tuple(cast(axis) if isinstance(axis, jax.Array) else axis for axis in spec["grid"])
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=like),
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(plan), **spec),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
    )(*map(cast, plan), *map(cast, operands))


def _product(
    lhs: Float[Array, "P K"],
    rhs: Float[Array, "E K N"] | Float[Array, "E N K"],
    group_sizes: Int[Array, "G"],
    extents: Int[Array, "G"] | None,
    *,
    transpose_rhs: bool,
    extent_axis: ExtentAxis,
    dtype: jnp.dtype,
    interpret: Any,
) -> Float[Array, "P N"]:
    """out[p] = lhs[p] @ rhs[e]: for each tile of N and visit, the sum over tiles of K, then a store of its rows."""
    rows, k = lhs.shape
    experts, n = rhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    parts = group_sizes.shape[0] // experts
    tm, tk, tn = row_tile(rows, group_sizes.shape[0]), tile_size(k), tile_size(n)
    sizes = {"rows": rows, "k": k, "n": n, "tile": tm, "experts": experts}
    plan, count = visits(group_sizes, extents, extent_axis, **sizes, every_expert=False)
    high = ffn.precision(lhs.dtype)

    def steps(plan: Visits, j: Array, v: Array) -> Array:
        """Tiles of K to be summed; 0 if no column of the result's tile is wanted."""
        group = plan.group[v]
        return jnp.where(j * tn < plan.limit_n[group], pl.cdiv(plan.limit_k[group], tk), 0)

    # Where there is nothing to do the last tile stays, so that none is fetched.
    def step(plan: Visits, j: Array, v: Array, i: Array) -> Array:
        return jnp.minimum(i, jnp.maximum(steps(plan, j, v) - 1, 0))

    def lhs_tile(j, v, i, *scalars):
        plan = Visits(*scalars)
        return plan.tile[v], step(plan, j, v, i)

    def rhs_tile(j, v, i, *scalars):
        plan = Visits(*scalars)
        group = plan.group[v]
        column = jnp.minimum(j, jnp.maximum(pl.cdiv(plan.limit_n[group], tn) - 1, 0))
        place = (column, step(plan, j, v, i)) if transpose_rhs else (step(plan, j, v, i), column)
        return group // parts, *place

    def out_tile(j, v, i, *scalars):
        del i
        return Visits(*scalars).tile[v], j

    def kernel(*refs):
        *scalars, lhs_ref, rhs_ref, out_ref, total = refs
        plan = Visits(*scalars)
        j, v, i = (pl.program_id(axis) for axis in range(3))
        group = plan.group[v]
        wanted = i < steps(plan, j, v)
        limit = plan.limit_k[group]
        inside = (i + 1) * tk <= limit

        @pl.when(i == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        def add(a: Array, b: Array) -> None:
            contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))
            total[...] += lax.dot_general(a, b, contract, precision=high, preferred_element_type=jnp.float32)

        @pl.when(wanted & inside)
        def _():
            add(lhs_ref[...], rhs_ref[...])

        # Beyond the limit lhs may hold NaN, and beyond K both hold what happens to lie in memory.
        @pl.when(wanted & ~inside)
        def _():
            a, b = lhs_ref[...], rhs_ref[...]
            keep_a = _within(a.shape, 1, i * tk, 0, limit)
            keep_b = _within(b.shape, 1 if transpose_rhs else 0, i * tk, 0, limit)
            add(_select(keep_a, a).astype(a.dtype), _select(keep_b, b).astype(b.dtype))

        @pl.when((i == pl.num_programs(2) - 1) & (j * tn < plan.limit_n[group]))
        def _():
            mine = _within(out_ref.shape, 0, plan.tile[v] * tm, plan.start[group], plan.end[group])
            # Visits of one tile follow each other, and what the earlier ones stored is still here.
            out_ref[...] = jnp.where(mine, total[...], out_ref[...].astype(jnp.float32)).astype(out_ref.dtype)

    return _call(
        kernel,
        plan,
        (lhs, rhs),
        jax.ShapeDtypeStruct((rows, n), dtype),
        interpret,
        grid=(pl.cdiv(n, tn), count, pl.cdiv(k, tk)),
        in_specs=[
            pl.BlockSpec((tm, tk), lhs_tile),
            pl.BlockSpec((None, tn, tk) if transpose_rhs else (None, tk, tn), rhs_tile),
        ],
        out_specs=pl.BlockSpec((tm, tn), out_tile),
        scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32)],
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
    )


def _outer(
    lhs: Float[Array, "P K"],
    grad: Float[Array, "P N"],
    group_sizes: Int[Array, "G"],
    extents: Int[Array, "G"] | None,
    *,
    experts: int,
    extent_axis: ExtentAxis,
    dtype: jnp.dtype,
    interpret: Any,
) -> Float[Array, "E K N"]:
    """out[e] = lhs[rows of e]^T @ grad[rows of e]: for each tile of K x N, the sum over an expert's visits."""
    (rows, k), n = lhs.shape, grad.shape[1]
    parts = group_sizes.shape[0] // experts
    tm, tk, tn = row_tile(rows, group_sizes.shape[0]), tile_size(k), tile_size(n)
    sizes = {"rows": rows, "k": k, "n": n, "tile": tm, "experts": experts}
    plan, count = visits(group_sizes, extents, extent_axis, **sizes, every_expert=True)
    high = ffn.precision(lhs.dtype)

    def kernel(*refs):
        *scalars, lhs_ref, grad_ref, out_ref, total = refs
        plan = Visits(*scalars)
        i, j, v = (pl.program_id(axis) for axis in range(3))
        group = plan.group[v]
        row, start, end = plan.tile[v] * tm, plan.start[group], plan.end[group]
        limit_k, limit_n = plan.limit_k[group], plan.limit_n[group]
        wanted = (i * tk < limit_k) & (j * tn < limit_n) & (start < end)
        inside = (start <= row) & (row + tm <= end) & ((i + 1) * tk <= limit_k) & ((j + 1) * tn <= limit_n)

        @pl.when(plan.first[v] == 1)
        def _():
            total[...] = jnp.zeros_like(total)

        def add(a: Array, b: Array) -> None:
            # Transposed in float32, which every generation can.
            a = a.astype(jnp.float32).T.astype(b.dtype)
            total[...] += jnp.dot(a, b, precision=high, preferred_element_type=jnp.float32)

        @pl.when(wanted & inside)
        def _():
            add(lhs_ref[...], grad_ref[...])

        # Rows of other groups count for nothing, nor do columns beyond the limit; both may hold NaN.
        @pl.when(wanted & ~inside)
        def _():
            a, b = lhs_ref[...], grad_ref[...]
            keep_a = _within(a.shape, 0, row, start, end) & _within(a.shape, 1, i * tk, 0, limit_k)
            keep_b = _within(b.shape, 0, row, start, end) & _within(b.shape, 1, j * tn, 0, limit_n)
            add(_select(keep_a, a), _select(keep_b, b).astype(b.dtype))

        @pl.when(plan.last[v] == 1)
        def _():
            out_ref[...] = total[...].astype(out_ref.dtype)

    return _call(
        kernel,
        plan,
        (lhs, grad),
        jax.ShapeDtypeStruct((experts, k, n), dtype),
        interpret,
        grid=(pl.cdiv(k, tk), pl.cdiv(n, tn), count),
        in_specs=[
            pl.BlockSpec((tm, tk), lambda i, j, v, *plan: (Visits(*plan).tile[v], i)),
            pl.BlockSpec((tm, tn), lambda i, j, v, *plan: (Visits(*plan).tile[v], j)),
        ],
        out_specs=pl.BlockSpec((None, tk, tn), lambda i, j, v, *plan: (Visits(*plan).group[v] // parts, i, j)),
        scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
    )


@functools.cache
def _matmul(interpret: Any) -> Callable[..., Array]:
    # Bound here, not read inside: the backward may be traced outside of `interpreted`.
    return differentiable(
        functools.partial(_product, interpret=interpret), functools.partial(_outer, interpret=interpret)
    )


def grouped_matmul(
    lhs: Float[Array, "P K"],
    rhs: Float[Array, "E K N"] | Float[Array, "E N K"],
    group_sizes: Int[Array, "G"],
    *,
    transpose_rhs: bool = False,
    extents: Int[Array, "G"] | None = None,
    extent_axis: ExtentAxis = "n",
    preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "P N"]:
    """See `api.grouped_matmul`."""
    return _matmul(_interpret.get())(
        lhs,
        rhs,
        group_sizes,
        transpose_rhs=transpose_rhs,
        extents=extents,
        extent_axis=extent_axis,
        preferred_element_type=preferred_element_type,
    )


grouped_ffn = compose(grouped_matmul)


def refuse(rows: jax.ShapeDtypeStruct, *args, preferred_element_type: jnp.dtype | None = None, **kwargs) -> str | None:
    """Off TPU unless `interpreted`, and dtypes other than bfloat16 and float32; `rows` is lhs or xs."""
    del args, kwargs
    for name, dtype in (("dtype", rows.dtype), ("preferred_element_type", preferred_element_type or rows.dtype)):
        if jnp.dtype(dtype) not in DTYPES:
            return f"{name} {jnp.dtype(dtype)} is not one of {', '.join(map(str, DTYPES))}: cast, or use padded"
    platform = dispatch.default_platform()
    if platform != "tpu" and not _interpret.get():
        return f"needs a TPU and the platform is {platform} (elsewhere only inside mosaic_tpu.interpreted(), for tests)"
    return None
