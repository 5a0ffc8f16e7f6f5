"""Family `dense`: ceilings, matmuls of the same FLOPs without groups, and what the memory can move.

- `dense_mosaic`: [P,K] x [K,N] by the dense Hopper example of the jax package, the build that a grouped kernel can
  have too (persistent, warp-specialised, clusters); best of a few configurations;
- `dense_cublas`: the same by XLA's library; `batched_cublas`: E equal groups of P/E rows;
- `copy` (decode): bytes read and written by an elementwise pass over an array far larger than the cache.
"""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.rivals import case as cases
from kernels_pallas.rivals import jax_run, timing
from kernels_pallas.rivals.case import AnyCase, Case, LayerCase, Settings

COPY_BYTES = 1 << 30
# Minor dimension of the grid, tiles side by side, dimension split over warpgroups, dimension of the cluster. Of 72
# configurations the best ones all had tiles of 128 x 128 x 64 for each warpgroup, 4 stages and a cluster.
SHORT = tuple(itertools.product("MN", (4, 8), "MN", "MN"))
FULL = tuple(itertools.product("MN", (4, 8, 16), "MN", "MN"))


def shapes(case: AnyCase) -> dict[str, tuple[int, int, int]]:
    """(m, n, k) of the dense matmuls that a case is held against, by name; none for decode."""
    if isinstance(case, LayerCase):
        # gate and up are one matmul of 2F columns, as a fused kernel has them
        up, down = (2 * case.d_expert, case.d_model), (case.d_model, case.d_expert)
        return {"dense_mosaic/up": (case.rows, *up), "dense_mosaic/down": (case.rows, *down)}
    if case.operation == "decode":
        return {}
    columns = case.extent or case.d_expert
    n, k = (columns, case.d_model) if case.projection == "up" else (case.d_model, columns)
    return {"dense_mosaic": (case.rows, *((k, n) if case.operation == "dlhs" else (n, k)))}


def measurements(case: AnyCase, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The ceilings of a case, those wanted; for `major` those of the effective columns."""
    for name, run in _all(case, settings):
        if not settings.ceilings or name.split("/")[0] in settings.ceilings:
            yield name, run


def _all(case: AnyCase, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    for name, shape in shapes(case).items():
        yield name, functools.partial(mosaic, *shape, case.dtype, settings)
    if isinstance(case, LayerCase):
        return
    if case.operation == "decode":
        yield "copy", functools.partial(copy, settings)
        return
    yield "dense_cublas", functools.partial(cublas, *shapes(case)["dense_mosaic"], case.dtype, settings)
    if case.operation != "major":
        yield "batched_cublas", functools.partial(batched, case, settings)


def prepare(case: AnyCase, settings: Settings) -> None:
    """Compiles what `mosaic` will try; XLA's own matmuls are tuned on the device, when it is their turn."""
    for m, n, k in shapes(case).values() if jax_run.on_gpu() else ():
        shape = f"{m} {n} {k} {case.dtype}"
        if shape not in _MEASURED:
            args = tuple(jax.ShapeDtypeStruct(of, jnp.dtype(case.dtype)) for of in ((m, k), (k, n)))
            found, known = candidates(settings), settings.known.get(dense_key(shape))
            if not jax_run.prepare_best(args, found, known, shape):
                assert known is not None
                jax_run.prepare((shape, "timed"), found[known], *args)


def _row(timings: timing.Timings, flops: int) -> dict:
    row = timings.fields() | {"role": "ceiling"} | jax_run.versions()
    return row | {"tflops_per_s": flops / timings.median / 1e12}


def _time(run: Callable[[], object], settings: Settings) -> timing.Timings:
    batch = timing.wall_clock(run, jax.block_until_ready)
    return timing.repeat(batch, settings.repeats, settings.target_ms)


def matrices(m: int, n: int, k: int, dtype: str) -> tuple[Array, Array]:
    """Random normal [m,k] and [k,n]."""
    a = jax_run.normal(jax.random.key(0), (m, k), 1.0, dtype)
    return a, jax_run.normal(jax.random.key(1), (k, n), k**-0.5, dtype)


_MEASURED: dict[str, dict] = {}  # skews, and operations of one shape, share a ceiling within a run


def _shared(shape: str, settings: Settings, measure: Callable[[dict], dict]) -> dict:
    """What was measured of a shape, if that counts, or else what `measure(row found before)` gives now."""
    found = _MEASURED.get(shape, {})
    if not found or settings.in_turn:  # timed in turn with others, it is of their case alone
        _MEASURED[shape] = measure(found)
    return _MEASURED[shape]


def candidates(settings: Settings) -> dict[str, Callable[..., Array]]:
    """Configurations of the example kernel by name."""
    example = importlib.import_module("jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu")
    side = example.MatmulDimension

    def candidate(minor: str, width: int, split: str, cluster: str) -> Callable[..., Array]:
        config = example.TuningConfig(128, 128, 64, 4, 64, 64, side[minor], width, side[split], side[cluster])
        return lambda a, b: example.matmul(a, b, None, config)

    tried = FULL if settings.tune == "full" else SHORT
    return {f"minor {c[0]} width {c[1]} warpgroups {c[2]} cluster {c[3]}": candidate(*c) for c in tried}


@functools.partial(jax.jit, compiler_options=jax_run.UNTUNED)
def _expected(a: Array, b: Array, rows: Array) -> Array:
    return jnp.dot(a[rows].astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def mosaic(m: int, n: int, k: int, dtype: str, settings: Settings) -> dict:
    """Columns of `dense_mosaic` at [m,k] x [k,n]. Raises RuntimeError if no configuration runs."""
    if not jax_run.on_gpu():
        raise NotImplementedError("the dense example kernel is for Hopper GPUs")
    shape = f"{m} {n} {k} {dtype}"

    def measure(before: dict) -> dict:
        a, b = matrices(m, n, k, dtype)
        rows = jnp.arange(0, m, max(1, m // 64))
        expected = _expected(a, b, rows)

        def verify(out: Array) -> None:
            difference = out[rows].astype(jnp.float32) - expected
            if not float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected)) <= cases.TOLERANCE[dtype]:
                raise cases.WrongResult("the dense example is wrong here")

        found, known = candidates(settings), before.get("config", settings.known.get(dense_key(shape)))
        name, failures = jax_run.best_of((a, b), found, verify, settings, known, shape)
        tried = {"configs_tried": 1 if name == known else len(found), "configs_failed": len(failures)}
        tried |= {field: before[field] for field in tried if field in before}
        run = jax_run.program((shape, "timed"), found[name], a, b)
        verify(run(a, b))
        timings = _time(functools.partial(run, a, b), settings)
        return _row(timings, 2 * m * n * k) | {"config": name} | tried | {"dense_shape": shape}

    return _shared(shape, settings, measure)


def dense_key(shape: str) -> str:
    """Under which the best configuration for a `dense_shape` is kept."""
    return f"dense_mosaic {shape}"


def cublas(m: int, n: int, k: int, dtype: str, settings: Settings) -> dict:
    """Columns of `dense_cublas` at [m,k] x [k,n]."""

    def measure(_: dict) -> dict:
        a, b = matrices(m, n, k, dtype)
        run = jax_run.compiled(jnp.dot, a, b)
        return _row(_time(functools.partial(run, a, b), settings), 2 * m * n * k)

    return _shared(f"cublas {m} {n} {k} {dtype}", settings, measure)


def batched(case: Case, settings: Settings) -> dict:
    """E equal groups as one einsum, on slices of the case's operands; the skew does not matter."""
    return _shared(f"batched {cases.without_groups(case)}", settings, lambda _: _batched(case, settings))


def _batched(case: Case, settings: Settings) -> dict:
    a, b, _ = jax_run.operands(case)[0]
    each = case.rows // case.experts

    def equal(x: Array) -> Array:
        return x[: each * case.experts].reshape(case.experts, each, -1)

    spec = {"dlhs": "epn,ekn->epk", "drhs": "epk,epn->ekn"}.get(case.operation, "epk,ekn->epn")
    args = (equal(a), equal(b) if case.operation == "drhs" else b)
    run = jax_run.compiled(lambda a, b: jnp.einsum(spec, a, b), *args)
    flops = 2 * each * case.experts * case.d_model * case.d_expert
    return _row(_time(functools.partial(run, *args), settings), flops)


def copy(settings: Settings) -> dict:
    """GB/s, bytes read plus bytes written."""
    x = jax.lax.iota(jnp.int32, COPY_BYTES // 4 if jax_run.on_gpu() else 1 << 16)
    run = jax_run.compiled(lambda x: ~x, x)
    timings = _time(functools.partial(run, x), settings)
    return timings.fields() | {"role": "ceiling", "gb_per_s": 2 * x.nbytes / timings.median / 1e9} | jax_run.versions()
