"""Times the forward FFN of groups that keep only the leading half of F, in turn with that of all of F.

This is operation `major_ffn` of `python -m kernels_pallas.grouped_matmul.bench`: what a group of rows costs that keeps
its major neurons only. Operation `major` times the products up and down one by one; an FFN with a gate has another
kernel for the first, which reads the rows once for two matrices. Both results are checked against float32 before
anything is timed. On a GPU the programs are compiled together, some at a time.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels_pallas.grouped_matmul import GROUPED_FFN, ffn_bench, grouped_ffn, groups, specs
from kernels_pallas.grouped_matmul.ffn import Weights
from kernels_pallas.rivals import jax_run, timing
from kernels_pallas.rivals import rows as results
from kernels_pallas.rivals.case import LAYER_TOLERANCE, Settings, WrongResult


def program(name: str, half: bool) -> Callable[..., Array]:
    """(xs, group sizes, extents, weights) -> ys; all of F goes without extents, as where there are no major groups."""

    def run(xs: Array, sizes: Array, extents: Array, weights: Weights) -> Array:
        more = {"extents": extents} if half else {}
        return grouped_ffn(xs, sizes, *weights[:3], activation="swiglu", implementation=name, **more)

    return run


def operands(shape: specs.Shape, dtype: str, alpha: float) -> tuple[Any, ...]:
    """(xs, group sizes, extents, weights), with half of F in every group."""
    xs, weights, _ = ffn_bench.inputs(shape, jnp.dtype(dtype))
    sizes = jnp.asarray(specs.dirichlet(shape.experts, shape.rows, alpha))
    return xs, sizes, groups.round_extents(jnp.full(shape.experts, shape.d_expert // 2), shape.d_expert), weights


def oracle(given: tuple[Any, ...], extent: int) -> np.ndarray:
    """ys in float32 with the leading `extent` neurons of each expert."""
    xs, sizes, _, weights = given
    cut = Weights(weights.gate[:, :, :extent], weights.up[:, :, :extent], weights.down[:, :extent])
    padded, place = ffn_bench.by_expert(xs, np.asarray(sizes))
    product = jax.jit(ffn_bench.einsum_ffn, compiler_options=jax_run.UNTUNED)
    ys = product(padded, jax.tree.map(lambda w: w.astype(jnp.float32), cut))
    return np.asarray(ys).reshape(-1, xs.shape[1])[place]


def refusal(name: str, given: tuple[Any, ...]) -> str | None:
    """Why a back end does not take it, if so."""
    xs, sizes, extents, weights = given
    explained = GROUPED_FFN.explain(xs, sizes, weights, "swiglu", implementation=name, extents=extents)
    return explained.refusals.get(name)


def measure(shape: specs.Shape, name: str, dtype: str, alpha: float, settings: Settings) -> results.Row:
    """Columns of a row. Raises WrongResult: a result is not within tolerance of float32."""
    given = operands(shape, dtype, alpha)
    full, extent = shape.d_expert, int(given[2][0])
    calls, errors = {}, []
    for which, columns in (("half", extent), ("full", full)):
        run = jax_run.program((name, shape.name, which), program(name, which == "half"), *given)
        calls[which] = functools.partial(run, *given)
        errors.append(ffn_bench.largest_error(calls[which](), [oracle(given, columns)]))
        if not errors[-1] <= LAYER_TOLERANCE[dtype]:
            limit = LAYER_TOLERANCE[dtype]
            raise WrongResult(f"{shape.name}, {name}, {columns} of {full}: error {errors[-1]:.1e} is above {limit:.0e}")
    timings = timing.in_turns(calls, jax.block_until_ready, settings.repeats, settings.target_ms)
    half = timings["half"]
    return {
        "operation": "major_ffn",
        "implementation": name,
        **dataclasses.asdict(shape),
        "dtype": dtype,
        "alpha": alpha,
        "extent": extent,
        **half.fields(),
        **jax_run.beside_full(half, timings["full"]),
        "tflops_per_s": 6 * shape.rows * shape.d_model * extent / half.median / 1e12,
        "full_tflops_per_s": shape.flops() / timings["full"].median / 1e12,
        "relative_error": max(errors),
        **jax_run.versions(),
    }


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Prints a line for each shape, skew and back end, and appends its row to --output."""
    shapes = [specs.SHAPES[name] for name in args.shape]
    ahead: dict[tuple[str, str, str], Callable[[], None]] = {}
    for shape in shapes:
        given = jax.eval_shape(functools.partial(operands, shape, args.dtype, args.alpha[0]))
        for name in args.implementation or GROUPED_FFN.names(None, jax.default_backend()):
            if reason := refusal(name, given):
                print(f"{shape.name}: {name} refuses: {reason}")
            elif name != "ref" or args.implementation:  # ref does E times the work: by name only
                for which in ("half", "full"):
                    key = (name, shape.name, which)
                    ahead[key] = functools.partial(jax_run.prepare, key, program(name, which == "half"), *given)
    jax_run.in_parallel({" ".join(key): job for key, job in ahead.items() if jax_run.leaves_device_alone(key[0])})
    facts = results.run_facts()
    print(results.HEAD)
    for shape in shapes:
        for alpha in args.alpha:
            for name in dict.fromkeys(key[0] for key in ahead if key[1] == shape.name):
                row = measure(shape, name, args.dtype, alpha, settings)
                print(results.line(row), flush=True)
                results.append(args.output, row | facts)
