"""How large tiles are: measured choices of the nearest shape, or a rule where nothing was measured.

`tuned/<device>.json` is written by `scripts/tune_kernels.py`: for each operation and shape the fastest configuration
and its time. Nearest: the smallest sum of squared differences of the logarithms of rows per expert, E, K and N.
"""

import functools
import json
import math
import pathlib

import jax

from kernels_pallas.grouped_matmul.mosaic_gpu import outer, rows

FOLDER = pathlib.Path(__file__).with_name("tuned")
DECODE_ROWS = 32  # mean rows of an expert up to which reading the matrices is what takes time


@functools.cache
def table(device: str) -> list[dict]:
    """The measured choices for a device kind; empty if there are none."""
    path = FOLDER / f"{device.replace(' ', '_')}.json"
    return json.loads(path.read_text())["choices"] if path.exists() else []


def device_kind() -> str:
    """Of the device that is compiled for."""
    if abstract := jax.sharding.get_abstract_mesh().abstract_device:
        return abstract.device_kind
    return jax.devices()[0].device_kind


def nearest(operation: str, num_rows: int, experts: int, k: int, n: int) -> dict | None:
    """The configuration measured for the nearest shape; None if none is near (4 = one size off by a factor 4)."""
    wanted = (num_rows / experts, experts, k, n)

    def distance(choice: dict) -> float:
        have = (choice["rows"] / choice["experts"], choice["experts"], choice["k"], choice["n"])
        return sum(math.log2(max(a, 0.25) / max(b, 0.25)) ** 2 for a, b in zip(wanted, have, strict=True))

    choices = [c for c in table(device_kind()) if c["operation"] == operation]
    best = min(choices, key=distance, default=None)
    return best["config"] if best is not None and distance(best) <= 4.0 else None


def for_rows(num_rows: int, experts: int, k: int, n: int, transpose_rhs: bool) -> rows.Config:
    """Configuration of `rows.product`."""
    found = nearest("transposed" if transpose_rhs else "forward", num_rows, experts, k, n)
    if found is not None:
        return rows.Config(**found)
    if num_rows / experts <= DECODE_ROWS:
        return rows.Config(block_m=64)
    return rows.Config()


def for_gated(num_rows: int, experts: int, d: int, f: int) -> rows.Config:
    """Configuration of `rows.gated_product`: warpgroups divide the rows, so that each holds gate and up of its own."""
    found = nearest("gated", num_rows, experts, d, f)
    return rows.Config(**found) if found is not None else rows.Config(split="m")


def for_outer(num_rows: int, experts: int, k: int, n: int) -> outer.Config:
    """Configuration of `outer.outer`."""
    found = nearest("outer", num_rows, experts, k, n)
    return outer.Config(**found) if found is not None else outer.Config()
