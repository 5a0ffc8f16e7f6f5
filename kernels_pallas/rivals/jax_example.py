"""Family `example`: the grouped kernels for Hopper that the jax package itself holds as examples, best of a few tiles.

`jax.experimental.pallas.ops.gpu.ragged_dot_mgpu` (forward and dlhs) and `transposed_ragged_dot_mgpu` (drhs).
Tiles that do not divide N are left out: these kernels give wrong results there.
"""

import functools
import importlib
from collections.abc import Callable, Iterator

from jaxtyping import Array

from kernels_pallas.rivals import jax_run
from kernels_pallas.rivals.case import Case, Settings

NAME = "jax_example_ragged_dot"
FOLDER = "jax.experimental.pallas.ops.gpu"
# (block_m, block_n, stages, tiles of N side by side)
FORWARD = ((128, 128, 4, 8), (128, 192, 4, 8), (64, 256, 4, 4), (64, 128, 6, 4))
DRHS = ((128, 128, 4, 8), (128, 128, 2, 4), (64, 128, 4, 8))


def candidates(case: Case) -> dict[str, jax_run.Product]:
    """Products by configuration."""
    if case.operation == "drhs":
        drhs = importlib.import_module(f"{FOLDER}.transposed_ragged_dot_mgpu").transposed_ragged_dot
        fitting = [c for c in DRHS if case.k % c[0] == 0 and case.n % c[1] == 0]
        return {str(c): functools.partial(_call, drhs, c, {}) for c in fitting}
    forward = importlib.import_module(f"{FOLDER}.ragged_dot_mgpu").ragged_dot
    columns = case.k if case.operation == "dlhs" else case.n
    options = {"transpose_rhs": True} if case.operation == "dlhs" else {}
    return {str(c): functools.partial(_call, forward, c, options) for c in FORWARD if columns % c[1] == 0}


def _call(kernel: Callable, config: tuple[int, ...], options: dict, a: Array, b: Array, sizes: Array) -> Array:
    m, n, stages, width = config
    tiles = {"block_m": m, "block_n": n, "block_k": 64, "max_concurrent_steps": stages, "grid_block_n": width}
    return kernel(a, b, group_sizes=sizes, **tiles, **options)


def measurements(case: Case, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Nothing for `major`, which it has no form of."""
    if case.operation != "major":
        yield NAME, functools.partial(measure, case, settings)


def prepare(case: Case, settings: Settings) -> None:
    """Compiles what `measurements` will try."""
    if case.operation != "major":
        jax_run.prepare_tuned(case, settings, NAME, candidates(case))


def measure(case: Case, settings: Settings) -> dict:
    if not jax_run.on_gpu():
        raise NotImplementedError("the example kernels are for Hopper GPUs")
    return jax_run.time_best(case, settings, NAME, candidates(case)) | {"role": "rival"}
