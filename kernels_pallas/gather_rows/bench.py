"""Times row gathers, scatters and combines beside XLA's and a plain copy, in one run.

    python -m kernels_pallas.gather_rows.bench [--operation gather scatter combine] [--shape NAME ...]
        [--padding SHARE ...] [--rows N ...] [--stages N ...] [--stores N ...] [--blocks N ...] [--repeats N]
        [--target-ms MS] [--minutes M] [--dtype bfloat16] [--output FILE.jsonl]
    python -m kernels_pallas.gather_rows.bench --summary FILE.jsonl

Shapes: tokens to the rows of experts in order, with uniform routing (`olmoe_8k`, `olmoe_16k`, `mixtral`), and rows
received from two ranks to the order of experts (`olmoe_unpack`, long runs of adjacent rows; no combine). `--padding` is
the share of rows without a source, which are written as zeros; combine leaves out as many pairs.

`scatter` gives the rows of `gather`, found by the tokens' places: each token is read once.

`copy` moves as many bytes as the operation reads and writes, elementwise: the ceiling. `xla` is back end `ref`.
Configurations of the kernel: `--rows` of a stage, `--stages` (0: as many as fit), `--stores` in flight, `--blocks` on a
multiprocessor; a stage of combine is one token, and scatter has one configuration. `mosaic_gpu` alone is the default
one. Each is checked before it is timed: gathers and scatters with NumPy, all of it and bit by bit, sums with XLA's in
float32, row by row. Then all are timed in turns, so that a change of the device's clock falls on all alike. GB/s: bytes
of the rows read, each as often as it is named (by a scatter once), plus those written.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels_pallas.gather_rows import mosaic_gpu, mosaic_gpu_combine, mosaic_gpu_scatter, ref
from kernels_pallas.gather_rows.mosaic_gpu import Config
from kernels_pallas.rivals import child, command, jax_run, timing
from kernels_pallas.rivals import rows as results
from kernels_pallas.rivals.case import TOLERANCE, WrongResult

OPERATIONS = ("gather", "scatter", "combine")
PERIOD = 32


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens (or received rows) of D columns, each chosen `top_k` times, for `experts`.

    With `ranks`, rows that came sorted by rank and expert are put in the order of expert and rank.
    """

    name: str
    tokens: int
    d_model: int
    experts: int
    top_k: int
    ranks: int = 0

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe_8k", 8192, 2048, 64, 8),
        Shape("olmoe_16k", 16384, 2048, 64, 8),
        Shape("olmoe_unpack", 65536, 2048, 64, 1, ranks=2),
        Shape("mixtral", 16384, 4096, 8, 2),
        Shape("test", 96, 64, 8, 2),
        Shape("test_unpack", 96, 64, 8, 1, ranks=2),
    )
}
BENCHED = ("olmoe_8k", "olmoe_16k", "olmoe_unpack", "mixtral")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One operation: operands, what must come out, and rows read (with and without repeated ones) and written."""

    operation: str
    operands: tuple[Array, ...]
    wanted: Array
    dtype: Any
    read: tuple[int, int]
    written: int
    held: Array | bool = True  # rows of the result that are to be checked


def table(shape: Shape, padding: float) -> np.ndarray:
    """The source of each row, in order of expert; a share of the rows, the last ones of every PERIOD, have none."""
    rng = np.random.default_rng(0)
    if shape.ranks:
        runs = np.arange(shape.rows).reshape(shape.ranks, shape.experts // shape.ranks, -1)
        index = runs.transpose(1, 0, 2).reshape(-1)
    else:
        chosen = np.argpartition(rng.random((shape.tokens, shape.experts)), shape.top_k - 1, axis=1)[:, : shape.top_k]
        index = np.argsort(chosen.reshape(-1), kind="stable") // shape.top_k
    empty = np.arange(shape.rows) % PERIOD >= round(PERIOD * (1 - padding))
    return np.where(empty, shape.tokens, index).astype(np.int32)


def table_of_tokens(shape: Shape, padding: float) -> np.ndarray:
    """The row of each pair, [T, K], in the order of the rows; those that `table` has without a source have none."""
    tokens = table(shape, padding)
    pairs = np.argsort(table(shape, 0.0), kind="stable")
    return np.where(tokens[pairs] < shape.tokens, pairs, shape.rows).reshape(-1, shape.top_k).astype(np.int32)


def configurations(args: argparse.Namespace, operation: str, row_bytes: int, top_k: int) -> dict[str, Config]:
    """Those of the command line that fit, by name; a stage of combine is one token, whatever `--rows` says, and scatter
    has the default one alone."""
    found = {"mosaic_gpu": mosaic_gpu.default_config(row_bytes)}
    if operation == "scatter":
        return {"mosaic_gpu": mosaic_gpu_scatter.default_config(row_bytes, top_k)}
    if operation == "combine":
        found = {"mosaic_gpu": mosaic_gpu_combine.default_config(row_bytes, top_k)}
        for stages, blocks in itertools.product(args.stages, args.blocks):
            most = mosaic_gpu_combine.most_stages(row_bytes, top_k, blocks)
            config = Config(top_k, stages or most, 1, blocks)
            if 2 <= config.stages <= most and config not in found.values():
                found[f"mosaic_gpu s{config.stages} b{blocks}"] = config
        return found
    for rows, stages, stores, blocks in itertools.product(args.rows, args.stages, args.stores, args.blocks):
        config = Config(rows, stages or mosaic_gpu.most_stages(row_bytes, rows, blocks), stores, blocks)
        if config.refuse(row_bytes) is None and config not in found.values():
            found[f"mosaic_gpu r{config.rows} s{config.stages} o{stores} b{blocks}"] = config
    return found


@functools.partial(jax.jit, static_argnums=1)
def _bits(x: Array, itemsize: int) -> Array:
    return jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[itemsize])


@jax.jit
def _far(out: Array, wanted: Array, tolerance: float) -> Array:
    """Whether each row's error, by norm, is above the tolerance or NaN; a row of zeros must be exactly that."""
    wide = wanted.astype(jnp.float32)
    error = jnp.linalg.norm(out.astype(jnp.float32) - wide, axis=1)
    return ~(error <= tolerance * jnp.linalg.norm(wide, axis=1))


def check(problem: Problem, out: Array) -> None:
    """Raises WrongResult unless every bit of a gather is as wanted, and every row of a sum within TOLERANCE."""
    wanted, dtype = problem.wanted, problem.dtype
    if out.shape != wanted.shape or out.dtype != dtype:
        raise WrongResult(f"{out.shape} of {out.dtype} instead of {wanted.shape} of {dtype}")
    if problem.operation != "combine":
        wrong = problem.held & jnp.any(_bits(out, dtype.itemsize) != _bits(wanted, dtype.itemsize), axis=1)
    else:
        wrong = _far(out, wanted, TOLERANCE[dtype.name])
    if count := int(jnp.sum(wrong)):
        raise WrongResult(f"{count} of {len(wanted)} rows are wrong, the first one is row {int(jnp.argmax(wrong))}")


def make(operation: str, shape: Shape, padding: float, dtype: str) -> Problem:
    """Random normal rows, and for a sum gate weights between 0 and 1."""
    source = table(shape, padding)
    valid, d_model = int(np.sum(source < shape.tokens)), shape.d_model
    if operation != "combine":
        x = jax_run.normal(jax.random.key(0), (shape.tokens, d_model), 1.0, dtype)
        host = np.asarray(x)
        wanted = jnp.asarray(np.concatenate([host, np.zeros_like(host[:1])])[source])
        once = min(valid, shape.tokens)
        if operation == "gather":
            return Problem(operation, (x, jnp.asarray(source)), wanted, jnp.dtype(dtype), (valid, once), shape.rows)
        operands = x, jnp.asarray(source), jnp.asarray(table_of_tokens(shape, padding))
        held = jnp.asarray(source < shape.tokens)
        return Problem(operation, operands, wanted, jnp.dtype(dtype), (once, once), valid, held)
    ys = jax_run.normal(jax.random.key(0), (shape.rows, d_model), 1.0, dtype)
    rows = jnp.asarray(table_of_tokens(shape, padding))
    weight = jax.random.uniform(jax.random.key(1), rows.shape)
    wanted = jax.jit(ref.combine_rows)(ys.astype(jnp.float32), rows, weight)
    return Problem(operation, (ys, rows, weight), wanted, jnp.dtype(dtype), (valid, valid), shape.tokens)


def _scatter(x: Array, index: Array, places: Array, config: Config | None = None) -> Array:
    return mosaic_gpu_scatter.scatter_rows(x, places, index.shape[0], config=config)


def _refuse_scatter(x: Array, index: Array, places: Array) -> str | None:
    return mosaic_gpu.refuse(x, index) or mosaic_gpu_scatter.refuse_shapes(x, places, index.shape[0])


def programs(args: argparse.Namespace, problem: Problem, shape: Shape) -> dict[str, tuple[results.Row, Callable]]:
    """Columns of each program but `copy`, and the function; of one that refuses only the columns count."""
    ours, xla, refuse = {
        "gather": (mosaic_gpu.gather_rows, ref.gather_rows, mosaic_gpu.refuse),
        "scatter": (_scatter, lambda x, index, places: ref.gather_rows(x, index), _refuse_scatter),
        "combine": (mosaic_gpu_combine.combine_rows, ref.combine_rows, mosaic_gpu_combine.refuse),
    }[problem.operation]
    made: dict[str, tuple[results.Row, Callable]] = {"xla": ({"role": "rival"}, xla)}
    if reason := refuse(*problem.operands):
        return made | {"mosaic_gpu": ({"role": "ours", "refused": reason}, ours)}
    row_bytes = shape.d_model * problem.dtype.itemsize
    for name, config in configurations(args, problem.operation, row_bytes, shape.top_k).items():
        columns = {f"config_{key}": value for key, value in dataclasses.asdict(config).items()}
        made[name] = {"role": "ours"} | columns, functools.partial(ours, config=config)
    return made


def measure(operation: str, shape: Shape, padding: float, args: argparse.Namespace) -> list[results.Row]:
    """A row for each program: ceiling, rival, ours."""
    problem = make(operation, shape, padding, args.dtype)
    row_bytes = shape.d_model * problem.dtype.itemsize
    moved = (problem.read[0] + problem.written) * row_bytes
    rows: dict[str, results.Row] = {"copy": {"role": "ceiling"}}
    runs: dict[str, Callable[[], Any]] = {}
    for name, (columns, function) in programs(args, problem, shape).items():
        rows[name] = columns
        if "refused" in columns:
            continue
        executable = None
        try:
            executable = jax_run.compiled(function, *problem.operands)
            # What a kernel leaves unwritten must not be the last one's result: fill the memory that it will get.
            jax.block_until_ready(jnp.full(problem.wanted.shape, jnp.nan, problem.dtype))
            runs[name] = functools.partial(executable, *problem.operands)
            check(problem, runs[name]())
        except Exception as failure:
            runs.pop(name, None)
            rows[name] = columns | {"error": child.describe(failure)}
            if executable is not None and not isinstance(failure, WrongResult):
                break  # it ran and failed: the device may be spoiled, and other programs' errors would mislead
    try:
        words = jax.lax.iota(jnp.int32, max(1, moved // 8))
        runs["copy"] = functools.partial(jax_run.compiled(lambda words: ~words, words), words)
        timings = timing.in_turns(runs, jax.block_until_ready, args.repeats or 20, args.target_ms)
    except Exception as failure:
        timings, told = {}, {"error": child.describe(failure)}
        rows = {name: row if "refused" in row else told | row for name, row in rows.items()}

    for name, measured in timings.items():
        unique = (problem.read[1] + problem.written) * row_bytes
        rows[name] |= measured.fields() | {"gb_per_s": moved / measured.median / 1e9}
        rows[name]["unique_gb_per_s"] = unique / measured.median / 1e9
        if name != "copy":
            rows[name] |= {"ceiling": "copy", "share_of_ceiling": _ratio(timings["copy"], measured)}
        if rows[name]["role"] == "ours" and "xla" in timings:
            rows[name] |= {"best_rival": "xla", "ratio_to_best_rival": _ratio(timings["xla"], measured)}
    facts = {"operation": f"{operation}_rows", **dataclasses.asdict(shape), "rows": shape.rows, "padding": padding}
    facts |= {"dtype": args.dtype} | jax_run.versions()
    return [facts | {"implementation": name} | row for name, row in rows.items()]


def _ratio(one: timing.Timings, other: timing.Timings) -> float:
    """The median of time of one over that of the other, by rounds."""
    return float(np.median(np.divide(one.seconds, other.seconds)))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    command.shares_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = jax.default_backend() == "cpu"
    names = ["test", "test_unpack"] if on_cpu else list(BENCHED)
    parser.add_argument("--operation", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=names)
    parser.add_argument("--padding", nargs="+", type=float, default=[0.0], help="share of rows without a source")
    parser.add_argument("--dtype", choices=mosaic_gpu.DTYPES, default="bfloat16")
    parser.add_argument("--rows", nargs="*", type=int, default=[2, 4, 8], help="of a stage")
    parser.add_argument("--stages", nargs="*", type=int, default=[0], help="of the ring; 0: as many as fit")
    parser.add_argument("--stores", nargs="*", type=int, default=[1, 2], help="stages on their way out")
    parser.add_argument("--blocks", nargs="*", type=int, default=[1, 2], help="on a multiprocessor")
    parser.add_argument("--repeats", type=int, help="timings of each; default 20")
    parser.add_argument("--target-ms", type=float, default=25.0, help="how long one timing lasts")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no shape starts after that")
    parser.add_argument("--output", help="JSON lines, appended after each shape")
    parser.add_argument("--summary", metavar="FILE", help="print the table of a file of rows, and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs; 1 if a program gave an error."""
    args = parse(argv)
    if args.summary:
        print(results.table(results.read(args.summary)))
        return 0
    results.check_folder(args.output)
    started, errors, extra = time.monotonic(), 0, results.run_facts()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}")
    print(results.HEAD)
    for name, operation, padding in itertools.product(args.shape, args.operation, args.padding):
        if operation == "combine" and SHAPES[name].ranks:
            continue
        if time.monotonic() - started > 60 * args.minutes:
            print(f"stopped before {name}: --minutes {args.minutes:g} are over")
            break
        for row in measure(operation, SHAPES[name], padding, args):
            errors += "error" in row
            results.append(args.output, row | extra)
            print(results.line(row), flush=True)
    print(f"{errors} rows with an error")
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
