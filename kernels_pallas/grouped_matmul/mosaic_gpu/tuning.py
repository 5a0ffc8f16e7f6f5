"""How large tiles are: measured choices of the nearest shape, or a rule where nothing was measured.

`tuned/<device>.json` is written by `scripts/tune_kernels.py`: for each operation and shape the fastest configuration
and its time. Nearest: the smallest sum of squared differences of the logarithms of rows per expert, E, K and N.

    {"device": ..., "versions": {"jax": ..., "jaxlib": ...}, "commit": ...,
     "choices": [{"operation": ..., "rows": P, "experts": E, "k": K, "n": N, "config": {...}, "seconds": ...,
                  "default_seconds": ..., "spread": ..., "tried": ..., "rule": ..., ...}]}

`default_seconds` is the median of one call with the rule's configuration, `seconds` that with this one, timed in turn;
`spread` is the uncertainty of their difference (half a 90 % interval); `tried` counts timed configurations. With `rule`
nothing was faster than the rule's configuration: such a choice leaves the shape to the rule, also to a later one.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Generator
from typing import Any, cast

import jax

from kernels_pallas.grouped_matmul.groups import EXTENT_BLOCK
from kernels_pallas.grouped_matmul.mosaic_gpu import outer, rows

FOLDER = pathlib.Path(__file__).with_name("tuned")
DECODE_ROWS = 32  # mean rows of an expert: see `decodes`
FEW = 16  # rows that are copied at least: most groups have no more when a few hundred tokens are decoded
# From so many summed columns, or rows of an expert, on a tile takes so long that its end does not count (H100: deferred
# stores gain 4 to 11 % for 768 to 2,048 columns, 3 to 5 % for 4,096, and -1 to 2 % for 7,168 and more).
LONG_DEPTH, LONG_ROWS = 8192, 2048

Config = rows.Config | outer.Config
CONFIGS: dict[str, type[rows.Config] | type[outer.Config]] = {
    "forward": rows.Config,
    "transposed": rows.Config,
    "gated": rows.Config,
    "outer": outer.Config,
}
"""By operation: rows times matrices, times their transposes, gate and up with the activation, gradient of matrices."""
SIZES = ("rows", "experts", "k", "n")

_forced: contextvars.ContextVar[tuple[str, Config, list[bool]] | None] = contextvars.ContextVar("forced", default=None)


def path_of(device: str) -> pathlib.Path:
    """The file of a device kind."""
    return FOLDER / f"{device.replace(' ', '_')}.json"


def read(path: pathlib.Path) -> dict[str, Any]:
    """A file of measured choices.

    Raises:
      ValueError: it is not of the form above, or names an operation, or a field of a configuration, that is not there.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it, or delete it and tune again") from error
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list):
        raise ValueError(f"{path} must be an object with a list of choices: restore it, or delete it and tune again")
    for i, choice in enumerate(choices):
        if problem := _problem(choice):
            raise ValueError(f"{path}: choices[{i}] {problem}: remove this choice, or tune again")
    return found


def _problem(choice: Any) -> str | None:
    if not isinstance(choice, dict) or choice.get("operation") not in CONFIGS:
        return f"must have an operation of {', '.join(CONFIGS)}"
    for name in SIZES:
        if type(choice.get(name)) is not int or choice[name] < 1:
            return f"has {name}={choice.get(name)!r}, which must be a whole number above 0"
    for name in ("seconds", "default_seconds"):
        if not isinstance(choice.get(name), int | float) or not choice[name] > 0:
            return f"has {name}={choice.get(name)!r}, which must be a time above 0"
    config, fields = choice.get("config"), dataclasses.fields(CONFIGS[choice["operation"]])
    if not isinstance(config, dict) or config.keys() - {f.name for f in fields}:
        return f"has config={config!r}, which must be an object of {', '.join(f.name for f in fields)}"
    return None


@functools.cache
def table(device: str) -> list[dict]:
    """The measured choices for a device kind; empty if there are none. Raises ValueError for a damaged file."""
    path = path_of(device)
    return read(path)["choices"] if path.exists() else []


def device_kind() -> str:
    """Of the device that is compiled for."""
    if abstract := jax.sharding.get_abstract_mesh().abstract_device:
        return abstract.device_kind
    return jax.devices()[0].device_kind


def nearest(operation: str, num_rows: int, experts: int, k: int, n: int) -> dict | None:
    """The configuration measured for the nearest shape; None if none is near (4 = one size off by a factor 4) or the
    rule's was the fastest there."""
    wanted = (num_rows / experts, experts, k, n)

    def distance(choice: dict) -> float:
        have = (choice["rows"] / choice["experts"], choice["experts"], choice["k"], choice["n"])
        return sum(math.log2(max(a, 0.25) / max(b, 0.25)) ** 2 for a, b in zip(wanted, have, strict=True))

    choices = [c for c in table(device_kind()) if c["operation"] == operation]
    best = min(choices, key=distance, default=None)
    if best is None or best.get("rule") or distance(best) > 4.0:
        return None
    return best["config"]


def decodes(num_rows: int, experts: int) -> bool:
    """Whether rows are so few that reading the matrices is what takes time."""
    return num_rows <= DECODE_ROWS * experts


def default(operation: str, num_rows: int, experts: int, k: int) -> Config:
    """The rule where nothing was measured."""
    if operation == "outer":  # the sum runs over rows
        return outer.Config(cluster=1, defer=True) if num_rows / experts < LONG_ROWS else outer.Config()
    if operation == "gated":
        # Warpgroups divide the rows, so that each holds gate and up of its own. Deferred stores gain 0 to 2 % (H100).
        if decodes(num_rows, experts):
            return rows.Config(block_n=128, stages=5, split="m", few=FEW)
        return rows.Config(split="m", defer=True, divide=True)
    if decodes(num_rows, experts):
        # Few rows: narrow tiles, so that even few groups with rows keep all multiprocessors reading, and deep buffers.
        return rows.Config(block_m=64, block_n=128, stages=8, few=FEW)
    return rows.Config(split="m", defer=True, divide=True) if k < LONG_DEPTH else rows.Config(divide=True)


@contextlib.contextmanager
def using(operation: str, config: Config) -> Generator[None]:
    """What is traced within takes `config` for `operation`, whatever its shape: for the tuner and for tests.

    Raises:
      RuntimeError: nothing asked for a configuration of the operation, so that `config` had no effect.
    """
    asked: list[bool] = []
    token = _forced.set((operation, config, asked))
    try:
        yield
    finally:
        _forced.reset(token)
    if not asked:
        raise RuntimeError(f"no kernel asked for the configuration of operation={operation!r}: {config} had no effect")


def choose(operation: str, num_rows: int, experts: int, k: int, n: int) -> Config:
    """The configuration of an operation on these sizes."""
    if (forced := _forced.get()) is not None and forced[0] == operation:
        forced[2].append(True)
        return forced[1]
    found = nearest(operation, num_rows, experts, k, n)
    return default(operation, num_rows, experts, k) if found is None else CONFIGS[operation](**found)


def for_rows(
    num_rows: int, experts: int, k: int, n: int, transpose_rhs: bool, *, cut_columns: bool = False
) -> rows.Config:
    """Configuration of `rows.product`; `cut_columns`: some groups take only their leading columns, say half of them."""
    config = cast(rows.Config, choose("transposed" if transpose_rhs else "forward", num_rows, experts, k, n))
    half = -(-n // (2 * EXTENT_BLOCK)) * EXTENT_BLOCK
    if cut_columns and half % config.block_n and half % 192 == 0:  # e.g. F = 768: half is two tiles, not one and a half
        return dataclasses.replace(config, block_m=128, block_n=192, stages=4, split="m")
    return config


def for_gated(num_rows: int, experts: int, d: int, f: int) -> rows.Config:
    """Configuration of `rows.gated_product`."""
    return cast(rows.Config, choose("gated", num_rows, experts, d, f))


def for_outer(num_rows: int, experts: int, k: int, n: int) -> outer.Config:
    """Configuration of `outer.outer`."""
    return cast(outer.Config, choose("outer", num_rows, experts, k, n))
