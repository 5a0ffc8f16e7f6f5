"""Times the expert FFN, forward and backward, beside a batched einsum of the same FLOPs in the same run.

This is operation `ffn` of `python -m kernels_pallas.grouped_matmul.bench`. Each back end is first checked, values and
gradients, against one einsum over groups padded on the host (float32). Then every timed function runs once per
round, in turn, so that load on the machine falls on all of them alike. Groups are drawn from Dirichlet(alpha). A back
end that refuses is listed with its reason, and not replaced.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas.grouped_matmul import GROUPED_FFN, grouped_ffn, specs
from kernels_pallas.grouped_matmul.ffn import Hidden, Weights, activate
from kernels_pallas.rivals.case import TOLERANCE
from kernels_pallas.rivals.jax_run import UNTUNED
from kernels_pallas.rivals.rows import append, commit


@dataclasses.dataclass
class Timed:
    """A compiled function, its temporaries in bytes, and seconds of each run."""

    run: Callable[[], Any]
    temporaries: int
    seconds: list[float] = dataclasses.field(default_factory=list)


def forward_backward(ffn: Callable[..., Array]) -> Callable[..., Any]:
    """(xs, weights, dy, *others of ffn) -> (ys, (dxs, dweights))."""

    def run(xs: Array, weights: Weights, dy: Array, *others: Array) -> Any:
        ys, pull = jax.vjp(lambda xs, weights: ffn(xs, weights, *others), xs, weights)
        return ys, pull(dy)

    return run


def einsum_ffn(xs: Float[Array, "E C D"], w: Weights) -> Float[Array, "E C D"]:
    """SwiGLU FFN of equal groups as batched matmuls: the bound in dtype of xs, the oracle in float32."""
    precision = jax.lax.Precision.HIGHEST if xs.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision)
    hidden = Hidden(einsum("ecd,edf->ecf", xs, w.gate), einsum("ecd,edf->ecf", xs, w.up))
    return einsum("ecf,efd->ecd", activate("swiglu", hidden), w.down)


def inputs(shape: specs.Shape, dtype: jnp.dtype) -> tuple[Array, Weights, Array]:
    """Random normal rows, weights of variance 1 / fan-in, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 5)
    e, d, f, p = shape.experts, shape.d_model, shape.d_expert, shape.rows

    def normal(key: Array, dims: tuple[int, ...], scale: float) -> Array:
        return (jax.random.normal(key, dims, jnp.float32) * scale).astype(dtype)

    weights = Weights(
        normal(keys[0], (e, d, f), d**-0.5),
        normal(keys[1], (e, d, f), d**-0.5),
        normal(keys[2], (e, f, d), f**-0.5),
    )
    return normal(keys[3], (p, d), 1.0), weights, normal(keys[4], (p, d), 1.0)


def by_expert(rows: Array, sizes: np.ndarray) -> tuple[Array, np.ndarray]:
    """([E, C, D] float32, each group's rows and then zeros; where each row lies in it when flattened), on the host."""
    place = np.concatenate([e * sizes.max() + np.arange(n) for e, n in enumerate(sizes)])
    out = np.zeros((len(sizes) * sizes.max(), rows.shape[1]), np.float32)
    out[place] = np.asarray(rows[: sizes.sum()], np.float32)
    return jnp.asarray(out.reshape(len(sizes), sizes.max(), -1)), place


def oracle(xs: Array, weights: Weights, dy: Array, sizes: np.ndarray) -> list[np.ndarray]:
    """(ys, dxs, *dweights) in float32: groups padded to the largest on the host, one einsum, autodiff."""
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    padded, place = by_expert(xs, sizes)
    both = jax.jit(forward_backward(einsum_ffn), compiler_options=UNTUNED)
    ys, (dxs, dw) = both(padded, wide, by_expert(dy, sizes)[0])
    rows = [np.asarray(a).reshape(-1, xs.shape[1])[place] for a in (ys, dxs)]
    return rows + [np.asarray(d) for d in jax.tree.leaves(dw)]


def largest_error(result: Any, expected: list[np.ndarray]) -> float:
    """Largest relative norm of the error over output and gradients."""
    errors = []
    for a, b in zip(jax.tree.leaves(result), expected, strict=True):
        difference = np.asarray(a, np.float32)[: len(b)] - b
        errors.append(float(np.linalg.norm(difference) / np.linalg.norm(b)))
    return max(errors)


def compiled(function: Callable[..., Any], *args: Any) -> Timed:
    """Compiles and warms up."""
    executable = jax.jit(function).lower(*args).compile()
    analysis = executable.memory_analysis()
    timed = Timed(lambda: jax.block_until_ready(executable(*args)), getattr(analysis, "temp_size_in_bytes", -1))
    timed.run()
    return timed


def measure(
    shape: specs.Shape, implementations: list[str], dtype: str, alpha: float, repeats: int
) -> list[dict[str, Any]]:
    """One result for each implementation and pass: times, ratio to the einsum bound, temporaries, error."""
    xs, weights, dy = inputs(shape, jnp.dtype(dtype))
    sizes = specs.dirichlet(shape.experts, shape.rows, alpha)
    group_sizes = jnp.asarray(sizes)
    expected = oracle(xs, weights, dy, sizes)

    each = shape.rows // shape.experts
    equal = [a[: each * shape.experts].reshape(shape.experts, each, -1) for a in (xs, dy)]
    cases: dict[tuple[str, str], Timed] = {
        ("einsum bound", "forward"): compiled(einsum_ffn, equal[0], weights),
        ("einsum bound", "forward+backward"): compiled(forward_backward(einsum_ffn), equal[0], weights, equal[1]),
    }
    errors: dict[str, float] = {}
    for name in implementations:
        refusals = GROUPED_FFN.explain(xs, group_sizes, weights, "swiglu", implementation=name).refusals
        if name in refusals:
            print(f"{shape.name}: {name} refuses: {refusals[name]}")
            continue

        # An argument, not a constant, as in a model: the compiler must not know the loops' trip counts.
        def ffn(xs: Array, w: Weights, sizes: Array, name: str = name) -> Array:
            return grouped_ffn(xs, sizes, *w[:3], activation="swiglu", implementation=name)

        both = compiled(forward_backward(ffn), xs, weights, dy, group_sizes)
        errors[name] = largest_error(both.run(), expected)
        if not errors[name] < TOLERANCE[dtype]:
            raise AssertionError(f"{name}: relative error {errors[name]:.1e} is not under {TOLERANCE[dtype]:.0e}")
        cases[name, "forward"] = compiled(ffn, xs, weights, group_sizes)
        cases[name, "forward+backward"] = both

    for _ in range(repeats):
        for timed in cases.values():
            start = time.perf_counter()
            timed.run()
            timed.seconds.append(time.perf_counter() - start)

    rows = []
    for (name, which), timed in cases.items():
        median = statistics.median(timed.seconds)
        flops = shape.flops(backward="backward" in which)
        rows.append(
            {
                "operation": "grouped_ffn",
                "implementation": name,
                "pass": which,
                **dataclasses.asdict(shape),
                "dtype": dtype,
                "alpha": alpha,
                "median_ms": 1e3 * median,
                "min_ms": 1e3 * min(timed.seconds),
                "max_ms": 1e3 * max(timed.seconds),
                "repeats": repeats,
                "ratio_to_bound": median / statistics.median(cases["einsum bound", which].seconds),
                "tflops_per_s": flops / median / 1e12,
                "temporary_bytes": timed.temporaries,
                "relative_error": errors.get(name),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    head = f"{'shape':<17}{'implementation':<15}{'pass':<17}{'median':>9}{'min':>9}{'max':>9}"
    lines = [head + f"{'x bound':>9}{'TFLOP/s':>9}{'temp MB':>9}{'error':>9}"]
    for r in rows:
        error = "-" if r["relative_error"] is None else f"{r['relative_error']:.0e}"
        lines.append(
            f"{r['name']:<17}{r['implementation']:<15}{r['pass']:<17}{r['median_ms']:>9.2f}{r['min_ms']:>9.2f}"
            f"{r['max_ms']:>9.2f}{r['ratio_to_bound']:>9.2f}{r['tflops_per_s']:>9.2f}"
            f"{r['temporary_bytes'] / 1e6:>9.0f}{error:>9}"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Prints a table (times in ms) for each shape and skew of the command line, appends its rows to --output."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}, ms")
    # ref does E times the work: by name only.
    default = [b for b in GROUPED_FFN.names(None, jax.default_backend()) if b != "ref"]
    for name in args.shape:
        for alpha in args.alpha:
            print(f"Dirichlet({alpha:g})")
            rows = measure(specs.SHAPES[name], args.implementation or default, args.dtype, alpha, args.repeats or 11)
            print(table(rows), flush=True)
            for row in rows:
                append(args.output, row | {"commit": commit()})
