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
        options["extent_axis"] = "n" if case.projection == "up" else "k"
    matmul = functools.partial(grouped_matmul, **options)

    def major(lhs: Array, rhs: Array, sizes: Array, extents: Array) -> Array:
        return matmul(lhs, rhs, sizes, extents=extents)

    def dlhs(dy: Array, rhs: Array, sizes: Array) -> Array:
        like = jnp.zeros((case.rows, case.k), dy.dtype)
        return jax.vjp(lambda lhs: matmul(lhs, rhs, sizes), like)[1](dy)[0]

    def drhs(lhs: Array, dy: Array, sizes: Array) -> Array:
        like = jnp.zeros((case.experts, *((case.n, case.k) if layout == "ENK" else (case.k, case.n))), lhs.dtype)
        return jax.vjp(lambda rhs: matmul(lhs, rhs, sizes), like)[1](dy)[0]

    return {"dlhs": dlhs, "drhs": drhs, "major": major}.get(case.operation, matmul)


def measurements(case: Case, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(back end, or back end/layout; function) for each back end to be timed."""
    for name in GROUPED_MATMUL.backends:
        if jax_run.wanted(name, settings):
            for layout in settings.layouts:
                label = name if layout == "EKN" else f"{name}/{layout}"
                yield label, functools.partial(measure, case, settings, name, layout)


def prepare(case: Case, settings: Settings) -> None:
    """Compiles what `measurements` will run, where that leaves the device alone."""
    for name in filter(jax_run.leaves_device_alone, GROUPED_MATMUL.backends):
        for layout in settings.layouts if jax_run.wanted(name, settings) else ():
            if refusal(case, name, layout) is None:
                for each in (case, *([dataclasses.replace(case, operation="forward")] if case.extent else [])):
                    one = product(each, name, layout)
                    jax_run.prepare_product(each, one, f"{name}/{layout}", _stored(case, layout))


def _swap(x: Array) -> Array:
    return jnp.swapaxes(x, 1, 2)


def _stored(case: Case, layout: str) -> Callable[[jax_run.Operands], jax_run.Operands]:
    """Operands with the weights, if they are one, in this layout."""

    def transform(operands: jax_run.Operands) -> jax_run.Operands:
        a, b, *of_groups = operands
        return a, _swap(b) if layout == "ENK" and case.operation != "drhs" else b, *of_groups

    return transform


def refusal(case: Case, name: str, layout: str) -> str | None:
    """Why the back end does not take the case, if it does not."""
    try:
        given = jax.eval_shape(_stored(case, layout), jax_run.abstract(case))
        jax.eval_shape(product(case, name, layout), *given)
    except BackendRefused as refused:
        return refused.refusals.get(name, str(refused))
    return None


def measure(case: Case, settings: Settings, name: str, layout: str) -> dict:
    """Columns of a row, or {"refused": reason}; `major` is timed in turn with the same call without extents."""
    view = _swap if layout == "ENK" and case.operation == "drhs" else jax_run.same
    role = "rival" if name in ("lax", "tokamax") else "ours"
    if reason := refusal(case, name, layout):
        return {"refused": reason}

    stored, label = _stored(case, layout), f"{name}/{layout}"
    if case.operation == "major":
        row = jax_run.time_beside_full(case, settings, lambda one: product(one, name, layout), stored, label)
    else:
        row = jax_run.time_product(case, settings, product(case, name, layout), stored, view, label=label)
    return row | {"role": role, "layout": layout}
