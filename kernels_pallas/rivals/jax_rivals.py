"""Family `lax`: `jax.lax.ragged_dot` and its autodiff, what every JAX user has."""

import functools
from collections.abc import Callable, Iterator

import jax
from jaxtyping import Array

from kernels_pallas.rivals import jax_run
from kernels_pallas.rivals.case import Case, Settings


def matmul(lhs: Array, rhs: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(lhs, rhs, sizes)


def path(text: str) -> dict[str, str]:
    """Which code XLA took, from the compiled program: a grouped kernel of cuDNN, or a dense rewrite."""
    lines = [line for line in text.splitlines() if "custom-call" in line or "ragged" in line]
    if any("cudnn" in line for line in lines):
        return {"path": "cudnn"}
    return {"path": "ragged" if any("ragged-dot" in line for line in lines) else "dense rewrite"}


def measurements(case: Case, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """`jax_ragged_dot`; nothing for `major`, which it has no form of."""
    if case.operation != "major":
        yield "jax_ragged_dot", functools.partial(measure, case, settings)


def measure(case: Case, settings: Settings) -> dict:
    product = jax_run.gradient(matmul, case.operation)
    return jax_run.time_product(case, settings, product, read=path) | {"role": "rival"}
