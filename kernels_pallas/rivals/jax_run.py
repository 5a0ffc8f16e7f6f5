"""Inputs, check and timing of one grouped matmul in JAX; `product(a, b, group_sizes)` is what a family passes in.

Operands by operation (major has a fourth, the extents: a constant in the program would be made anew in each call):
    forward, decode, major   a = lhs [P,K]   b = rhs [E,K,N]   -> [P,N]
    dlhs                     a = dy [P,N]    b = rhs [E,K,N]   -> [P,K]
    drhs                     a = lhs [P,K]   b = dy [P,N]      -> [E,K,N]
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels_pallas.rivals import case as cases
from kernels_pallas.rivals import timing
from kernels_pallas.rivals.case import BETWEEN_USES, MANY, Case, Settings, WrongResult

Operands = tuple[Array, ...]
Product = Callable[..., Array]
# Checks are not timed: XLA need not search for their fastest matmul, which takes longer than the check.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def versions() -> dict[str, str]:
    """Columns that say where a row was measured."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def _normal(key: Array, shape: tuple[int, ...], scale: float, dtype: str) -> Array:
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)


normal = jax.jit(_normal, static_argnums=(1, 2, 3))


def abstract(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Operands without data."""
    a, b = (jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype)) for shape in case.operand_shapes)
    of_groups = jax.ShapeDtypeStruct((case.experts,), jnp.dtype("int32"))
    return a, b, *[of_groups] * (1 if case.extent is None else 2)


def input_sets(case: Case) -> int:
    """How many sets of operands `operands` makes."""
    return timing.copies(case.bytes, BETWEEN_USES) if case.operation == "decode" and on_gpu() else 1


@functools.lru_cache(maxsize=1)  # one case at a time: a second would double what the device holds
def operands(case: Case) -> tuple[Operands, ...]:
    """Sets of random normal operands; several where one set would stay in the cache (decode)."""
    a_shape, b_shape = case.operand_shapes
    of_groups = [jnp.asarray(case.group_sizes, jnp.int32)]
    if case.extent is not None:
        of_groups.append(jnp.full(case.experts, case.extent, jnp.int32))
    sets = []
    for i in range(input_sets(case)):
        keys = jax.random.split(jax.random.key(i), 2)
        a = normal(keys[0], a_shape, 1.0, case.dtype)
        b = normal(keys[1], b_shape, 1.0 if case.operation == "drhs" else a_shape[1] ** -0.5, case.dtype)
        if case.extent is not None and case.projection == "down":
            # Columns beyond the extent are ignored: what stands there must not matter.
            a = jnp.where(jnp.arange(case.k) < case.extent, a, jnp.nan).astype(a.dtype)
        sets.append((a, b, *of_groups))
    return tuple(jax.block_until_ready(sets))


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def wanted(name: str, settings: Settings) -> bool:
    """Whether a back end of ours is to be timed: those named, or all but a few.

    `ref` does E times the work, `lax` may not fit the device and has a family of its own, as `tokamax` has; and a loop
    made for CPUs says nothing elsewhere.
    """
    if settings.implementations:
        return name in settings.implementations
    return name not in ("ref", "lax", "tokamax", *(() if jax.default_backend() == "cpu" else ("cpu_tiled",)))


@functools.partial(jax.jit, static_argnums=(3, 4), compiler_options=UNTUNED)
def _row_errors(out: Array, operands: Operands, where: tuple[Array, Array], spec: str, case: Case) -> Array:
    """Relative norm of the error on some rows of some groups, [G]; of `case` only the shape matters."""
    a, b, *_ = operands
    group, rows = where

    def one(args: tuple[Array, Array]) -> Array:
        g, row = args
        x, w = a[row].astype(jnp.float32), b[g].astype(jnp.float32)
        y = out[row].astype(jnp.float32)
        if case.extent is not None:
            x, w, y = (x, w[:, : case.extent], y[:, : case.extent]) if case.projection == "up" else (
                x[:, : case.extent], w[: case.extent], y
            )  # fmt: skip
        expected = jnp.einsum(spec, x, w, precision="highest")
        return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)

    return jax.lax.map(one, (group, rows))


@functools.partial(jax.jit, static_argnums=(3,), compiler_options=UNTUNED)
def _outer_error(out: Array, a: Array, b: Array, rows: int, start: Array, size: Array, expert: Array) -> Array:
    """Relative norm of the error of one expert's weight gradient; `rows` bounds its group."""
    row = jnp.where(jnp.arange(rows) < size, start + jnp.arange(rows), a.shape[0])
    x, dy = (v.at[row].get(mode="fill", fill_value=0).astype(jnp.float32) for v in (a, b))
    expected = jnp.einsum("rk,rn->kn", x, dy, precision="highest")
    return jnp.linalg.norm(out[expert].astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


def error(case: Case, operands: Operands, out: Array) -> float:
    """Largest relative norm of the error over sampled groups, against float32; NaN if a valid element is not finite.

    Rows: 64 of each of 8 groups, the first and last of a group among them. Weight gradients: three experts as a
    whole, and exact zeros for the experts without rows.
    """
    a, b, *_ = operands
    if case.operation == "drhs":
        expert = cases.sampled_experts(case)
        sizes, largest = np.asarray(case.group_sizes), max(case.group_sizes)
        errors = [_outer_error(out, a, b, largest, case.starts[e], sizes[e], e) for e in expert]
        empty = np.flatnonzero(sizes == 0)
        if len(empty) and not bool(jnp.all(out[empty] == 0)):
            raise WrongResult(f"weight gradients of the {len(empty)} experts without rows are not zero")
    else:
        spec = "rn,kn->rk" if case.operation == "dlhs" else "rk,kn->rn"
        errors = list(_row_errors(out, operands, cases.sampled_rows(case), spec, cases.without_groups(case)))
    return float(np.max(np.asarray(errors, np.float32)))


def finite(case: Case, out: Array) -> bool:
    """Whether every valid element is finite (columns beyond an extent are not valid)."""
    columns = case.extent if case.extent is not None and case.projection == "up" else out.shape[-1]
    return bool(_finite(out, columns))


@functools.partial(jax.jit, static_argnums=1)
def _finite(out: Array, columns: int) -> Array:
    return jnp.isfinite(out[..., :columns]).all()


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """The executable of `function` for these arguments."""
    return jax.jit(function).lower(*args).compile()


_PREPARED: dict[Hashable, Any] = {}  # executables that were compiled before their case was to be measured


def prepare(key: Hashable, function: Callable[..., Any], *args: Any) -> None:
    """Compiles `function` for arguments that may be abstract, so that `program` of the same key need not."""
    if key not in _PREPARED:
        _PREPARED[key] = compiled(function, *args)


def program(key: Hashable, function: Callable[..., Any], *args: Any) -> Any:
    """`compiled`, or what was prepared under this key, which is used once."""
    return _PREPARED.pop(key, None) or compiled(function, *args)


def leaves_device_alone(name: str) -> bool:
    """Whether a back end compiles without the device: XLA times its own matmuls there, beside what is measured."""
    return not on_gpu() or name == "mosaic_gpu"


def in_parallel(calls: Mapping[str, Callable[[], Any]]) -> dict[str, concurrent.futures.Future]:
    """The calls, each in a thread; compiling leaves Python's lock for much of its time."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return {name: pool.submit(call) for name, call in calls.items()}


def check(case: Case, out: Array, operands: Operands) -> float:
    """The error of `out`; raises WrongResult if it is above TOLERANCE or NaN."""
    found = error(case, operands, out)
    if not found <= cases.TOLERANCE[case.dtype]:
        raise WrongResult(f"relative error {found:.2e} is above {cases.TOLERANCE[case.dtype]:.0e}")
    return found


def same(x: Any) -> Any:
    return x


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A program whose results on all sets of operands were right."""

    case: Case
    run: Any
    sets: list[Operands]
    view: Callable[[Array], Array]
    error: float

    @property
    def products(self) -> int:
        """How many a call makes."""
        return len(self.sets) * rounds(self.case)

    def call(self) -> list[Array]:
        return self.run(*self.sets)

    def finite(self) -> None:
        """Raises WrongResult if a valid element is not."""
        if not all(finite(self.case, self.view(out)) for out in self.call()):
            raise WrongResult("some valid elements are not finite after the timings")


def _checked(
    case: Case,
    product: Product,
    transform: Callable[[Operands], Operands] = same,
    view: Callable[[Array], Array] = same,
    label: str = "",
) -> _Checked:
    originals = operands(case)
    sets = [transform(s) for s in originals]
    run = program((label, cases.without_groups(case)), over_sets(product, rounds(case)), *sets)
    found = max(check(case, view(out), s) for out, s in zip(run(*sets), originals, strict=True))
    return _Checked(case, run, sets, view, found)


def time_product(
    case: Case,
    settings: Settings,
    product: Product,
    transform: Callable[[Operands], Operands] = same,
    view: Callable[[Array], Array] = same,
    read: Callable[[str], dict] | None = None,
    label: str = "",
) -> dict:
    """Columns of a row: check, time, check again that all valid elements are finite. Raises WrongResult.

    `transform` changes the operands beforehand, say to another layout of the weights, and `view` a result before
    its check; neither is timed. `read` makes further columns from the text of the compiled program. Under `label` the
    program may have been prepared.
    """
    it = _checked(case, product, transform, view, label)
    batch = timing.wall_clock(it.call, jax.block_until_ready)
    timings = timing.repeat(batch, settings.repeats, settings.target_ms, per_call=it.products)
    it.finite()
    return _columns(it, timings) | (read(it.run.as_text()) if read else {})


def time_beside_full(
    case: Case,
    settings: Settings,
    product: Callable[[Case], Product],
    transform: Callable[[Operands], Operands] = same,
    label: str = "",
) -> dict:
    """As `time_product` for `major`, timed in turn with the same call without extents; `ratio_to_full` is the median of
    the ratios of timings that follow one another."""
    full = dataclasses.replace(case, operation="forward")
    both = {name: _checked(one, product(one), transform, label=label) for name, one in (("", case), ("full_", full))}
    calls = {name: one.call for name, one in both.items()}
    each = both[""].products
    timings = timing.in_turns(calls, jax.block_until_ready, settings.repeats, settings.target_ms, per_call=each)
    for one in both.values():
        one.finite()
    return _columns(both[""], timings[""]) | beside_full(timings[""], timings["full_"])


def beside_full(part: timing.Timings, full: timing.Timings) -> dict:
    """Columns of a row that hold a part of F, timed in turn, against all of it."""
    ratios = np.asarray(part.seconds) / np.asarray(full.seconds)
    return {
        "full_median_ms": 1e3 * full.median,
        "ratio_to_full": float(np.median(ratios)),
        "ratio_to_full_p10": float(np.percentile(ratios, 10)),
        "ratio_to_full_p90": float(np.percentile(ratios, 90)),
    }


def _columns(it: _Checked, timings: timing.Timings) -> dict:
    memory = getattr(it.run.memory_analysis(), "temp_size_in_bytes", None)
    row = {"relative_error": it.error, "temporary_bytes": memory}
    return timings.fields() | row | {"input_sets": len(it.sets), "rounds": rounds(it.case)} | versions()


def rounds(case: Case) -> int:
    """How often a program of this case goes over its sets."""
    return MANY if case.operation == "decode" and on_gpu() else 1


def over_sets(product: Callable[..., Any], rounds: int = 1) -> Callable[..., list[Any]]:
    """A program that calls `product` on every set of operands, so many times over; it returns the last results.

    Short calls need several rounds: to start a program of eight kernels took the host of an H100 longer (11 to 25 us a
    kernel, one without any rows too; by hand) than the kernels took that decode eight rows. The rounds are a loop, as
    decoding is, in which buffers stay where they are, so that a CUDA graph of its kernels serves all of them.
    """

    def once(*sets: Operands) -> list[Any]:
        return [product(*s) for s in sets]

    def many(*sets: Operands) -> list[Any]:
        def again(_: Any, carry: tuple[list[Array], list[Any]]) -> Any:
            firsts, _ = carry
            outs = once(*((first, *others[1:]) for first, others in zip(firsts, sets, strict=True)))
            # Else XLA would compute once what is always the same. It may still do so with what no first has part in.
            return lax.optimization_barrier((firsts, outs))

        outs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(once, *sets))
        return lax.fori_loop(0, rounds, again, ([s[0] for s in sets], outs))[1]

    return once if rounds == 1 else many


def prepare_product(case: Case, product: Product, label: str, transform: Callable[[Operands], Operands] = same) -> None:
    """Compiles what `time_product` of the same label will run; nothing runs on the device."""
    sets = [jax.eval_shape(transform, abstract(case))] * input_sets(case)
    prepare((label, cases.without_groups(case)), over_sets(product, rounds(case)), *sets)


def best_of(
    args: tuple[Any, ...],
    candidates: Mapping[str, Callable[..., Array]],
    verify: Callable[[Array], Any],
    settings: Settings,
    known: str | None,
    key: Hashable = None,
) -> tuple[str, dict[str, str]]:
    """(name of the fastest candidate on `args`, reasons of those that failed).

    Compiles in parallel, checks each by `verify`, which raises, and times each a little. `known` (found by an
    earlier run) saves the sweep; under `key` the candidates may have been prepared. Raises RuntimeError with the first
    reasons if none runs.
    """
    if known is not None and known in candidates:
        return known, {}
    failures: dict[str, str] = {}
    times = []
    jobs = {name: functools.partial(program, (key, name), one, *args) for name, one in candidates.items()}
    for name, job in in_parallel(jobs).items():
        try:
            run = job.result()
            verify(run(*args))
            batch = timing.wall_clock(functools.partial(run, *args), jax.block_until_ready)
            times.append((timing.repeat(batch, 3, settings.target_ms / 3, alone=True).median, name))
        except Exception as problem:
            failures[name] = f"{type(problem).__name__}: {problem}"
    if not times:
        reasons = "; ".join(f"{name}: {reason[:200]}" for name, reason in list(failures.items())[:3])
        raise RuntimeError(f"none of {len(candidates)} configurations ran ({reasons})")
    return min(times)[1], failures


def prepare_best(
    args: tuple[Any, ...], candidates: Mapping[str, Callable[..., Array]], known: str | None, key: Hashable
) -> bool:
    """Compiles what `best_of` of the same key will try; False if a known configuration leaves it nothing to try."""
    if known is not None and known in candidates:
        return False
    in_parallel({name: functools.partial(prepare, (key, name), one, *args) for name, one in candidates.items()})
    return True


def prepare_tuned(case: Case, settings: Settings, label: str, candidates: Mapping[str, Product]) -> None:
    """Compiles what `time_best` will try, or its known configuration."""
    known = settings.known.get(cases.key(label, case))
    if not prepare_best(abstract(case), candidates, known, (label, cases.without_groups(case))):
        assert known is not None
        prepare_product(case, candidates[known], f"{label} {known}")


def time_best(case: Case, settings: Settings, label: str, candidates: Mapping[str, Product]) -> dict:
    """`time_product` of the fastest of several configurations; which one it was is a column."""
    operand = operands(case)[0]
    known = settings.known.get(cases.key(label, case))
    key = (label, cases.without_groups(case))
    name, failures = best_of(operand, candidates, lambda out: check(case, out, operand), settings, known, key)
    row = time_product(case, settings, candidates[name], label=f"{label} {name}")
    tried = 1 if name == known else len(candidates)
    return row | {"config": name, "configs_tried": tried, "configs_failed": len(failures)}


def gradient(matmul: Product, operation: str) -> Product:
    """`product` of an operation from a differentiable matmul; what the other gradient needs is dead code."""

    def dlhs(dy: Array, rhs: Array, sizes: Array) -> Array:
        like = jnp.zeros((dy.shape[0], rhs.shape[1]), dy.dtype)
        return jax.vjp(lambda lhs: matmul(lhs, rhs, sizes), like)[1](dy)[0]

    def drhs(lhs: Array, dy: Array, sizes: Array) -> Array:
        like = jnp.zeros((sizes.shape[0], lhs.shape[1], dy.shape[1]), lhs.dtype)
        return jax.vjp(lambda rhs: matmul(lhs, rhs, sizes), like)[1](dy)[0]

    return {"dlhs": dlhs, "drhs": drhs}.get(operation, matmul)
