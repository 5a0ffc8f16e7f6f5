"""Families `tokamax` and `tokamax-triton`: tokamax' Mosaic GPU kernel, and the Pallas-Triton one of older releases.

Which release runs is a matter of the folders that the process imports from first. Each is tuned: "short" tries the
configurations that its own table of H100 results has most often, "full" every one that it lists for the shape.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Array

from kernels_pallas.rivals import jax_run
from kernels_pallas.rivals.case import Case, Settings

# (stages, persistent, minor dimension of the grid, tiles side by side) with tiles of 128 x 64 x 128
MOSAIC = (
    (4, True, 1, 4),
    (4, True, 1, 8),
    (4, True, 0, 1),
    (2, False, 0, 1),
    (2, False, 0, 2),
    (2, True, 0, 2),
    (2, True, 1, 2),
    (4, False, 0, 4),
)
MOSAIC_FEW_ROWS = ((64, 4, False, 1, 8), (64, 4, True, 1, 8), (16, 4, True, 1, 8))  # block_m first: decode
# (block_m, block_n, block_k, warps, stages)
TRITON = (
    (128, 128, 32, 4, 4),
    (128, 128, 32, 4, 3),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 4, 2),
    (128, 128, 64, 4, 2),
    (128, 256, 32, 8, 4),
)
TRITON_FEW_ROWS = ((32, 128, 64, 4, 4), (64, 128, 64, 4, 4), (32, 64, 128, 4, 4))


def modules() -> tuple[Any, Any, str]:
    """(api, base, version) of the tokamax that can be imported. Raises ImportError."""
    api = importlib.import_module("tokamax._src.ops.ragged_dot.api")
    base = importlib.import_module("tokamax._src.ops.ragged_dot.base")
    return api, base, importlib.import_module("tokamax").__version__


def configurations(operator: Any, name: str, case: Case, few: bool) -> list[Any]:
    """The short list for back end `name`."""
    make = operator.config_cls
    if name == "triton":
        wide = TRITON_FEW_ROWS + TRITON[:2] if few else TRITON
        return [make(block_m=m, block_n=n, block_k=k, num_warps=w, num_stages=s) for m, n, k, w, s in wide]
    rows = MOSAIC_FEW_ROWS if few else ()
    return [
        make(
            block_m=m, block_n=64, block_k=128, num_stages=s, split_k=1,
            persistent=p, grid_minor_dim=d, grid_tile_width=w,
        )
        for m, s, p, d, w in (*rows, *((128, *config) for config in MOSAIC))
    ]  # fmt: skip


def candidates(case: Case, settings: Settings, name: str) -> dict[str, jax_run.Product]:
    """Products by configuration; "as it comes" is what a user gets who tunes nothing."""
    api, base, _ = modules()
    operator = api.IMPLEMENTATIONS["mosaic_gpu" if name == "mosaic" else name]
    dimensions = {
        "dlhs": base.TRANS_RHS_RAGGED_DOT_DIM_NUMS,
        "drhs": base.RAGGED_CONTRACTING_DOT_DIM_NUMS,
    }.get(case.operation, base.DEFAULT_RAGGED_DOT_DIM_NUMS)

    def product(chosen: Any, a: Array, b: Array, sizes: Array) -> Array:
        return api.ragged_dot_general(a, b, sizes, dimensions, implementation=[chosen])

    found = {"as it comes": functools.partial(product, operator)}
    if settings.tune == "full":
        found |= {str(c): functools.partial(product, operator.replace(config=c)) for c in _listed(case, operator, api)}
    elif settings.tune == "short":
        few = case.rows < 64 * case.experts
        for config in configurations(operator, name, case, few):
            found[str(config)] = functools.partial(product, operator.replace(config=config))
    return found


def _listed(case: Case, operator: Any, api: Any) -> list[Any]:
    """Every configuration that tokamax' own tuning tries for these operands."""
    arguments = jax_run.operands(case)[0]
    bound = operator.bind(*arguments[:2], group_sizes=arguments[2])
    return sorted(bound.autotuning_configs, key=str)


def measurements(case: Case, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """One for each GPU back end that this release has; nothing for `major`, which it has no form of.

    Raises ImportError.
    """
    if case.operation == "major":
        return
    name, version = kernel()
    yield f"tokamax_{version}_{name}", functools.partial(measure, case, settings, name, version)


def kernel() -> tuple[str, str]:
    """(back end, version): a release is here for its best kernel: the newest for Mosaic GPU, an older for Triton."""
    api, _, version = modules()
    return "triton" if "triton" in api.IMPLEMENTATIONS else "mosaic", version


def prepare(case: Case, settings: Settings) -> None:
    """Compiles what `measurements` will try. Raises ImportError."""
    if case.operation != "major":
        name, version = kernel()
        jax_run.prepare_tuned(case, settings, f"tokamax_{version}_{name}", candidates(case, settings, name))


def measure(case: Case, settings: Settings, name: str, version: str) -> dict:
    if not jax_run.on_gpu():
        raise NotImplementedError("these kernels of tokamax are for GPUs")
    row = jax_run.time_best(case, settings, f"tokamax_{version}_{name}", candidates(case, settings, name))
    return row | {"role": "rival", "tokamax": version}
