"""Inputs, check and timing in torch, alike those in `jax_run`: same shapes, groups, distributions and tolerance.

torch is imported when a function is called, and its device is the first CUDA device, or the CPU.
"""

import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_pallas.rivals import case as cases
from kernels_pallas.rivals import timing
from kernels_pallas.rivals.case import BETWEEN_USES, MANY, Case, Settings, WrongResult

Tensors = tuple[Any, Any, Any]


def torch() -> Any:
    """The module. Raises ModuleNotFoundError."""
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError("torch not installed") from problem


def device() -> str:
    return "cuda" if torch().cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Columns that say where a row was measured."""
    name = torch().cuda.get_device_name() if device() == "cuda" else "cpu"
    return {"device": name, "torch": torch().__version__}


def normal(seed: int, shape: tuple[int, ...], scale: float, dtype: str) -> Any:
    generator = torch().Generator(device=device()).manual_seed(seed)
    return (torch().randn(shape, generator=generator, device=device()) * scale).to(getattr(torch(), dtype))


@functools.lru_cache(maxsize=1)  # one case at a time: a second would double what the device holds
def operands(case: Case) -> tuple[Tensors, ...]:
    """Sets of (a, b, ends of groups int32), a and b as in `jax_run`."""
    a_shape, b_shape = case.operand_shapes
    count = timing.copies(case.bytes, BETWEEN_USES) if case.operation == "decode" and device() == "cuda" else 1
    ends = torch().tensor(np.cumsum(case.group_sizes), dtype=torch().int32, device=device())
    scale = 1.0 if case.operation == "drhs" else a_shape[1] ** -0.5
    return tuple(
        (normal(2 * i, a_shape, 1.0, case.dtype), normal(2 * i + 1, b_shape, scale, case.dtype), ends)
        for i in range(count)
    )


def relative(difference: Any, expected: Any) -> float:
    return float(difference.norm() / expected.norm())


def check(case: Case, out: Any, operands: Tensors) -> float:
    """Largest relative norm of the error over the same samples as in `jax_run`; raises WrongResult above TOLERANCE."""
    a, b, _ = operands
    if case.operation == "drhs":
        errors = []
        for e in cases.sampled_experts(case):
            rows = slice(case.starts[e], case.starts[e] + case.group_sizes[e])
            expected = a[rows].float().T @ b[rows].float()
            errors.append(relative(out[int(e)].float() - expected, expected))
        empty = np.flatnonzero(np.asarray(case.group_sizes) == 0)
        if len(empty) and not bool((out[torch().as_tensor(empty, device=device())] == 0).all()):
            raise WrongResult(f"weight gradients of the {len(empty)} experts without rows are not zero")
    else:
        errors = []
        for g, row in zip(*cases.sampled_rows(case), strict=True):
            rows = torch().as_tensor(row, dtype=torch().int64, device=device())
            w = b[int(g)].float()
            expected = a[rows].float() @ (w.T if case.operation == "dlhs" else w)
            errors.append(relative(out[rows].float() - expected, expected))
    found = float(np.max(errors))
    if not found <= cases.TOLERANCE[case.dtype]:
        raise WrongResult(f"relative error {found:.2e} is above {cases.TOLERANCE[case.dtype]:.0e}")
    return found


def events(call: Callable[[], object]) -> Callable[[int], float]:
    """A `batch` for `timing.repeat`: k calls between two CUDA events, or by the clock on a CPU."""

    def on_device(k: int) -> float:
        start, end = (torch().cuda.Event(enable_timing=True) for _ in range(2))
        torch().cuda.synchronize()
        start.record()
        for _ in range(k):
            call()
        end.record()
        torch().cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def on_host(k: int) -> float:
        begun = time.perf_counter()
        for _ in range(k):
            call()
        return time.perf_counter() - begun

    return on_device if device() == "cuda" else on_host


def graph(call: Callable[[], object]) -> Callable[[], object]:
    """`call` captured in a CUDA graph, so that launching many small kernels is not what is timed."""
    stream = torch().cuda.Stream()
    with torch().cuda.stream(stream):
        call()
    torch().cuda.synchronize()
    captured = torch().cuda.CUDAGraph()
    with torch().cuda.graph(captured):
        kept = call()

    def replay() -> object:
        captured.replay()
        return kept

    return replay


def time_product(case: Case, settings: Settings, product: Callable[..., Any]) -> dict:
    """Columns of a row: check, time, check again that all elements are finite. Raises WrongResult."""
    with torch().no_grad():
        sets = operands(case)
        found = max(check(case, product(*s), s) for s in sets)

        def every() -> object:
            return [product(*s) for s in sets]

        def many() -> object:
            return [every() for _ in range(MANY)][-1]

        call: Callable[[], object] = every
        rounds = 1
        if case.operation == "decode" and device() == "cuda":
            try:
                call, rounds = graph(many), MANY  # as many as in a program of ours: replays have gaps between them
            except RuntimeError:
                torch().cuda.synchronize()
        timings = timing.repeat(events(call), settings.repeats, settings.target_ms, per_call=len(sets) * rounds)
        if not all(bool(torch().isfinite(product(*s)).all()) for s in sets):
            raise WrongResult("some elements are not finite after the timings")
    graphs = {"rounds": rounds, "cuda_graph": rounds > 1}
    return timings.fields() | {"relative_error": found, "input_sets": len(sets)} | graphs | versions()


def release() -> None:
    """Gives cached memory back to the device, for the other processes on it."""
    operands.cache_clear()
    if device() == "cuda":
        torch().cuda.empty_cache()
