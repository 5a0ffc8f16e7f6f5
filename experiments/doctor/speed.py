"""About five seconds of work: a matmul, a copy, and the grouped FFN beside a dense one, checked against ``ref``."""

import time
from collections.abc import Callable
from typing import Any

from experiments.doctor.finding import Finding

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}
"""Norm of the error over the norm of the float32 reference: what the kernels' tests allow."""
SECONDS = 0.4
"""Spent on each measurement, after compilation."""


def speed_findings(facts: dict[str, Any]) -> list[Finding]:
    """Fills ``facts["speed"]``. A wrong result is an error; a slow one is only told: other programs may run."""
    import jax

    gpu = jax.default_backend() != "cpu"
    size, megabytes = (8192, 1024) if gpu else (1024, 64)
    dtype = "bfloat16" if gpu else "float32"
    tflops = 2 * size**3 / _seconds(*_matmul(size, dtype)) / 1e12
    copied = 2 * megabytes * 1e6 / _seconds(*_copy(megabytes)) / 1e9
    grouped, dense, backend = _grouped(gpu, dtype)
    errors = {name: _error(name) for name in TOLERANCE}
    facts["speed"] = {
        "matmul_tflops": tflops,
        "matmul_size": size,
        "dtype": dtype,
        "copy_gb_per_s": copied,
        "grouped_ffn_tflops": grouped,
        "dense_tflops": dense,
        "implementation": backend,
        "errors": errors,
    }
    found = [
        Finding(
            "ok", "speed", f"matmul {size}^3 {dtype} {tflops:.2f} TFLOP/s; copy {copied:.1f} GB/s (read and write)"
        ),
        Finding(
            "ok",
            "speed",
            f"grouped FFN by {backend!r}, {dtype}: {grouped:.2f} TFLOP/s, {grouped / dense:.0%} of a dense batched "
            f"matmul of the same FLOPs ({dense:.2f})",
        ),
    ]
    for name, (error, chosen) in errors.items():
        if not error <= TOLERANCE[name]:  # also NaN
            found.append(
                Finding(
                    "error",
                    "correctness",
                    f"grouped FFN by {chosen!r}, {name}: off by {error:.2g} of the reference's norm, allowed is "
                    f"{TOLERANCE[name]:g}",
                    "experts would compute something else than they should",
                    "run bash scripts/test.sh tests/kernels_pallas; set model.moe.implementation='padded' until then",
                )
            )
    if len(found) == 2:
        listed = ", ".join(f"{name} {error:.1g}" for name, (error, _) in errors.items())
        found.append(Finding("ok", "correctness", f"grouped FFN against the reference: {listed}"))
    return found


def _seconds(fn: Callable, *args: Any) -> float:
    """Of one call, the best of a few; compilation apart."""
    import jax

    jax.block_until_ready(fn(*args))
    best, end = float("inf"), time.perf_counter() + SECONDS
    while True:
        begin = time.perf_counter()
        jax.block_until_ready(fn(*args))
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() > end:
            return best


def _normal(seed: int, *shape: int) -> Any:
    """Not zeros: a GPU that multiplies zeros draws less power and looks faster."""
    import jax

    return jax.random.normal(jax.random.key(seed), shape, "float32")


def _matmul(size: int, dtype: str) -> tuple:
    import jax

    a, b = (_normal(seed, size, size).astype(dtype) for seed in (0, 1))
    return jax.jit(lambda a, b: a @ b), a, b


def _copy(megabytes: int) -> tuple:
    import jax

    x = _normal(2, megabytes * 250_000)
    return jax.jit(lambda x: x + 1.0), x


def _grouped(gpu: bool, dtype: str) -> tuple[float, float, str]:
    """TFLOP/s of the grouped FFN at skewed loads, of dense matmuls of the same FLOPs, and the back end."""
    import jax
    import jax.numpy as jnp

    import kernels_pallas
    from kernels_pallas.grouped_matmul.specs import Shape, dirichlet

    shape = Shape("doctor", 16, 2048, 1024, 32768, "gpu") if gpu else Shape("doctor", 16, 256, 128, 4096, "cpu")
    e, d, f, p = shape.experts, shape.d_model, shape.d_expert, shape.rows
    xs = _normal(3, p, d).astype(dtype)
    gate, up = ((_normal(seed, e, d, f) / d**0.5).astype(dtype) for seed in (4, 5))
    down = (_normal(6, e, f, d) / f**0.5).astype(dtype)
    sizes = jnp.asarray(dirichlet(e, p))

    @jax.jit
    def grouped(xs: Any, sizes: Any, gate: Any, up: Any, down: Any) -> Any:
        return kernels_pallas.grouped_ffn(xs, sizes, gate, up, down, activation="swiglu")

    @jax.jit
    def dense(xs: Any, gate: Any, up: Any, down: Any) -> Any:
        blocks = xs.reshape(e, p // e, d)
        hidden = jax.nn.silu(jnp.einsum("epd,edf->epf", blocks, gate)) * jnp.einsum("epd,edf->epf", blocks, up)
        return jnp.einsum("epf,efd->epd", hidden, down)

    chosen = kernels_pallas.GROUPED_FFN.explain(*shape.abstract(jnp.dtype(dtype)), "swiglu").chosen
    flops = shape.flops()
    times = _seconds(grouped, xs, sizes, gate, up, down), _seconds(dense, xs, gate, up, down)
    return flops / times[0] / 1e12, flops / times[1] / 1e12, str(chosen)


def _error(dtype: str) -> tuple[float, str]:
    """Error of the chosen back end against ``ref`` in float32, at sizes that all back ends take."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import kernels_pallas
    from kernels_pallas.grouped_matmul.specs import SHAPES

    shape = SHAPES["blocks"]
    e, d, f, p = shape.experts, shape.d_model, shape.d_expert, shape.rows
    sizes = jnp.asarray([p // 2, 0, p // 2 - 5, 5], jnp.int32)
    xs = _normal(3, p, d).astype(dtype)
    gate, up = ((_normal(seed, e, d, f) / d**0.5).astype(dtype) for seed in (4, 5))
    down = (_normal(6, e, f, d) / f**0.5).astype(dtype)
    wide = [a.astype("float32") for a in (gate, up, down)]
    # A lower precision that the user chose for all matmuls is no fault of a kernel (``known_bad`` notes it).
    with jax.default_matmul_precision(jax.config.jax_default_matmul_precision and "highest"):
        ys = kernels_pallas.grouped_ffn(xs, sizes, gate, up, down, activation="swiglu")
        want = kernels_pallas.grouped_ffn(xs.astype("float32"), sizes, *wide, activation="swiglu", implementation="ref")
    ys, want = np.asarray(ys, np.float32), np.asarray(want)
    chosen = kernels_pallas.GROUPED_FFN.explain(*shape.abstract(jnp.dtype(dtype)), "swiglu").chosen
    return float(np.linalg.norm(ys - want) / np.linalg.norm(want)), str(chosen)
