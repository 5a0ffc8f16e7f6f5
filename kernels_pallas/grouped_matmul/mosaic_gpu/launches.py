r"""One launch of each kernel of a shape, whole and with the leading half of F, for Nsight Compute to look at:

    XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_enable_command_buffer= \
    ncu --clock-control none --profile-from-start off --section SpeedOfLight --section MemoryWorkloadAnalysis \
        --csv --log-file FILE.csv python -m kernels_pallas.grouped_matmul.mosaic_gpu.launches --shape olmoe qwen3_moe
    python -m kernels_pallas.grouped_matmul.mosaic_gpu.launches --shape olmoe qwen3_moe --label FILE.csv > LABELLED.csv

For each shape, in this order: up, up of half the columns, down, down of half the depth. Group sizes and operands are
those of the benchmark. Without ncu it only runs them. `--label` says, without a GPU, which launch ncu's rows are of.
"""

import argparse
import csv
import ctypes
import functools
import glob
import pathlib
import sys

import jax

from kernels_pallas.grouped_matmul import specs
from kernels_pallas.grouped_matmul.mosaic_gpu.tune import hopper_is_missing
from kernels_pallas.rivals import jax_run, ours
from kernels_pallas.rivals.case import Case

PROJECTIONS, OPERATIONS = ("up", "down"), ("forward", "major")
COLUMNS = ("Kernel Name", "Section Name", "Metric Name", "Metric Unit", "Metric Value")


def labelled(path: pathlib.Path, names: list[str]) -> list[list[str]]:
    """ncu's rows of the grouped matmuls, each with the shape, projection and operation that it is of.

    Raises ValueError if there are not as many launches as the shapes have.
    """
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row["Kernel Name"].startswith("grouped")]
    launches = [(name, p, o) for name in names for p in PROJECTIONS for o in OPERATIONS]
    ids = list(dict.fromkeys(row["ID"] for row in rows))
    if len(ids) != len(launches):
        raise ValueError(f"{path} has {len(ids)} launches of grouped matmuls, {' '.join(names)} are {len(launches)}")
    of_id = dict(zip(ids, launches, strict=True))
    return [[*of_id[row["ID"]], *(row[name] for name in COLUMNS)] for row in rows if row["Metric Name"]]


def runtime() -> ctypes.CDLL:
    """CUDA's runtime: of a Python package, or of the system. Raises OSError where there is none."""
    folders = [path for path in sys.path if path.endswith("-packages")]
    found = [name for path in folders for name in sorted(glob.glob(f"{path}/nvidia/**/libcudart.so*", recursive=True))]
    return ctypes.CDLL(found[0] if found else "libcudart.so")


def calls(shape: specs.Shape, implementation: str, alpha: float = 5.0) -> list:
    """Compiled programs with their operands, run once."""
    sizes = tuple(int(n) for n in specs.dirichlet(shape.experts, shape.rows, alpha))
    sized = shape.name, shape.experts, shape.d_model, shape.d_expert, shape.rows, alpha, "bfloat16", sizes
    found = []
    for projection in PROJECTIONS:
        for operation in OPERATIONS:
            case = Case(operation, projection, *sized)
            product, given = ours.product(case, implementation, "EKN"), jax_run.operands(case)[0]
            found.append(functools.partial(jax_run.compiled(product, *given), *given))
            jax.block_until_ready(found[-1]())
    return found


def main(argv: list[str] | None = None, implementation: str = "mosaic_gpu") -> int:
    """Parses the command line and launches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(specs.SHAPES), default=["olmoe"])
    parser.add_argument("--label", type=pathlib.Path, metavar="FILE", help="ncu's output, to be printed with labels")
    args = parser.parse_args(argv)
    names = args.shape
    if args.label:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["name", "projection", "operation", *COLUMNS])
        writer.writerows(labelled(args.label, names))
        return 0
    if implementation == "mosaic_gpu" and (reason := hopper_is_missing()):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    cuda = runtime() if jax.default_backend() == "gpu" else None
    for name in names:
        programs = calls(specs.SHAPES[name], implementation)
        if cuda:
            cuda.cudaProfilerStart()
        for program in programs:
            jax.block_until_ready(program())
        if cuda:
            cuda.cudaProfilerStop()
        print(f"{name}: {len(programs)} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
