"""Which kernel calls the tuner times, and which configurations it tries: declared, the likely ones first."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from kernels_pallas.grouped_matmul import specs
from kernels_pallas.grouped_matmul.mosaic_gpu import tuning
from kernels_pallas.grouped_matmul.mosaic_gpu.block import CONSUMERS, SWIZZLE
from kernels_pallas.grouped_matmul.mosaic_gpu.trial import DTYPE, Problem

SHARED_MEMORY = 227 << 10  # of one block on a Hopper GPU: 228 KiB less 1 KiB that the driver takes
STAGED = CONSUMERS * 64 * SWIZZLE  # results on their way out, for each cell of a warpgroup
BARRIERS = 1 << 10
MOST_STAGES = 8

TILES: dict[str, list[dict[str, Any]]] = {
    "forward": [
        {"block_m": 128, "block_n": 256, "split": "m", "defer": True},
        {"block_m": 128, "block_n": 256, "split": "n", "defer": False},
        {"block_m": 128, "block_n": 256, "split": "m", "defer": False},
        {"block_m": 128, "block_n": 192, "split": "m", "defer": True},
        {"block_m": 256, "block_n": 128, "split": "m", "defer": False},
    ],
    "decode forward": [
        {"block_m": 64, "block_n": 256, "split": "n"},
        {"block_m": 64, "block_n": 128, "split": "n"},
        {"block_m": 128, "block_n": 64, "split": "m"},
        {"block_m": 128, "block_n": 128, "split": "m"},
    ],
    "gated": [
        {"block_m": 128, "block_n": 256, "split": "m", "defer": True},
        {"block_m": 128, "block_n": 256, "split": "m", "defer": False},
        {"block_m": 128, "block_n": 256, "split": "m", "cells": 4},
        {"block_m": 256, "block_n": 128, "split": "m", "defer": False},
    ],
    "decode gated": [
        {"block_m": 128, "block_n": 128, "split": "m"},
        {"block_m": 128, "block_n": 256, "split": "m"},
    ],
    "outer": [
        {"block_k": 128, "block_n": 256, "defer": True},
        {"block_k": 128, "block_n": 256, "defer": False},
        {"block_k": 256, "block_n": 128, "defer": False},
    ],
}
"""Tiles that lower, the likely ones first: a warpgroup's part is 64 rows and whole swizzles of 64 columns."""
TILES["transposed"] = TILES["forward"]
ORDERS = [{"cluster": c, "band": b} for c, b in ((2, 8), (1, 16), (2, 16), (1, 4))]


def label(config: tuning.Config) -> str:
    """The configuration in one word."""
    return ",".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())


def stages_that_fit(tile: dict[str, Any]) -> int:
    """The most stages that shared memory holds: each is 64 of the summed axis of both operands."""
    sides = tile.get("block_m", 0) + tile.get("block_k", 0) + tile["block_n"]
    room = SHARED_MEMORY - BARRIERS - tile.get("cells", 2) * STAGED
    return min(MOST_STAGES, room // (64 * sides * np.dtype(DTYPE).itemsize))


def first_round(problem: Problem, earlier: tuning.Config | None = None) -> list[tuning.Config]:
    """The default, the earlier choice, and each tile with as many stages as fit."""
    default = problem.default()
    of_kind = TILES[problem.operation]
    if tuning.decodes(problem.rows, problem.experts):
        of_kind = TILES.get(f"decode {problem.operation}", of_kind)
    tiles = [dataclasses.replace(default, **tile, stages=stages_that_fit(tile)) for tile in of_kind]
    return list(dict.fromkeys([default, *([earlier] if earlier else []), *tiles]))


def second_round(best: Iterable[tuning.Config]) -> list[tuning.Config]:
    """Other clusters and bands of each, a stage less, more or less staged at the end, and the last round whole."""
    found = []
    for config in best:
        found += [dataclasses.replace(config, **order) for order in ORDERS]
        if config.stages > 3:
            found.append(dataclasses.replace(config, stages=config.stages - 1))
        if getattr(config, "divide", False):
            found.append(dataclasses.replace(config, divide=False))
        if "cells" in (have := dataclasses.asdict(config)):
            for cells in (1, 4):
                stages = stages_that_fit(have | {"cells": cells})
                if stages >= 3:
                    found.append(dataclasses.replace(config, cells=cells, stages=stages))
    return list(dict.fromkeys(found))


def most_candidates(problem: Problem, survivors: int, limit: int | None) -> int:
    """How many candidates a problem has at most."""
    first = first_round(problem)
    second = second_round(first[:survivors])
    count = len(first) + len(second) - len(set(first) & set(second))
    return min(count, limit) if limit else count


def problems(shapes: Iterable[str], operations: Iterable[str], rows: Iterable[int]) -> list[Problem]:
    """The kernel calls of layers of these shapes; `rows` replaces those of decode shapes, which have no backward."""
    found = []
    for shape in (specs.SHAPES[name] for name in shapes):
        decode = shape.name.endswith("_decode")
        up, down = (shape.d_model, shape.d_expert), (shape.d_expert, shape.d_model)
        for count in rows if decode else [shape.rows]:
            for operation in operations:
                if not decode or operation in ("forward", "gated"):
                    sizes = [up] if operation == "gated" else [up, down]
                    found += [Problem(operation, count, shape.experts, *kn) for kn in sizes]
    return list(dict.fromkeys(found))
