"""Family `ours`: the back ends of `grouped_matmul` that do not refuse the case.

A back end registered later is timed without a change here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.dispatch import BackendRefused
from kernels_pallas.grouped_matmul import GROUPED_MATMUL, grouped_matmul
from kernels_pallas.rivals import jax_run
from kernels_pallas.rivals.case import Case, Settings


def product(case: Case, name: str, layout: str) -> jax_run.Product:
    """The operation by back end `name`; weights, and their gradient, are [E,K,N], or [E,N,K] for layout "ENK"."""
    options: dict = {"implementation": name}
    if layout == "ENK":
        options["transpose_rhs"] = True
    if case.operation == "major":
        options |= {
            "extents": jnp.full(case.experts, case.d_expert // 2, jnp.int32),
            "extent_axis": "n" if case.projection == "up" else "k",
        }
    matmul = functools.partial(grouped_matmul, **options)

    def dlhs(dy: Array, rhs: Array, sizes: Array) -> Array:
        like = jnp.zeros((case.rows, case.k), dy.dtype)
        return jax.vjp(lambda lhs: matmul(lhs, rhs, sizes), like)[1](dy)[0]

    def drhs(lhs: Array, dy: Array, sizes: Array) -> Array:
        like = jnp.zeros((case.experts, *((case.n, case.k) if layout == "ENK" else (case.k, case.n))), lhs.dtype)
        return jax.vjp(lambda rhs: matmul(lhs, rhs, sizes), like)[1](dy)[0]

    return {"dlhs": dlhs, "drhs": drhs}.get(case.operation, matmul)


def measurements(case: Case, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(back end, or back end/layout; function) for each back end to be timed."""
    for name in GROUPED_MATMUL.backends:
        if jax_run.wanted(name, settings):
            for layout in settings.layouts:
                label = name if layout == "EKN" else f"{name}/{layout}"
                yield label, functools.partial(measure, case, settings, name, layout)


def measure(case: Case, settings: Settings, name: str, layout: str) -> dict:
    """Columns of a row, or {"refused": reason}; `major` is timed beside the same call without extents."""

    def swap(x: Array) -> Array:
        return jnp.swapaxes(x, 1, 2)

    def transform(operands: jax_run.Operands) -> jax_run.Operands:
        a, b, sizes = operands
        return a, swap(b) if layout == "ENK" and case.operation != "drhs" else b, sizes

    view = swap if layout == "ENK" and case.operation == "drhs" else jax_run.same
    role = "rival" if name in ("lax", "tokamax") else "ours"
    try:
        jax.eval_shape(product(case, name, layout), *jax.eval_shape(transform, jax_run.abstract(case)))
    except BackendRefused as refusal:
        return {"refused": refusal.refusals.get(name, str(refusal))}
    row = jax_run.time_product(case, settings, product(case, name, layout), transform, view)
    if case.operation == "major":
        whole = dataclasses.replace(case, operation="forward")
        full = jax_run.time_product(whole, settings, product(whole, name, layout), transform, view)
        row |= {"full_median_ms": full["median_ms"], "ratio_to_full": row["median_ms"] / full["median_ms"]}
    return row | {"role": role, "layout": layout}
