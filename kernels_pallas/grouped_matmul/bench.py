"""Times grouped matmuls side by side with what else a user could take, in one run.

    python -m kernels_pallas.grouped_matmul.bench [--operation forward dlhs drhs decode major] [--shape NAME ...]
        [--projection up down] [--alpha A ...] [--rows N ...] [--implementation NAME ...] [--layout EKN ENK]
        [--families NAME ...] [--seconds S] [--minutes M] [--repeats N] [--dtype bfloat16] [--output FILE.jsonl]
        [--tune none short full] [--known FILE.jsonl ...] [--ceiling NAME ...] [--processes N] [--in-turn]
    python -m kernels_pallas.grouped_matmul.bench --operation ffn major_ffn [--shape NAME ...]
    python -m kernels_pallas.grouped_matmul.bench --summary FILE.jsonl

`ffn`, the default on a CPU, times the whole expert FFN beside a batched einsum (`ffn_bench.py`). The other operations
time one grouped matmul: families and their order are in `kernels_pallas.rivals.families`. Every implementation is
checked against float32 before it is timed; one that is wrong, refuses or crashes gives a row with "error" and no
time. Groups are drawn from Dirichlet(alpha): 5 is mild, 0.5 harsh. `decode` counts bytes that must move, the
others floating-point operations of valid rows. `major` gives every group the leading half of F; `major_ffn` times the
whole FFN so, beside that with all of F (`major_bench.py`).

On a GPU four processes (`--processes`) take the cases of ours in turn: one measures while the others, and the family
`dense`, compile what comes next. `--known` takes the best configurations of dense and rival kernels from earlier
rows instead of a sweep, `--ceiling` names the dense matmuls to time. Within a run the card's clock moves by more than
most kernels differ: `--in-turn` times all implementations of a case one timing each, so that it counts for all alike.
"""

import argparse
import sys
from collections.abc import Iterator

import jax

from kernels_pallas.grouped_matmul import ffn_bench, major_bench, specs
from kernels_pallas.rivals import case as cases
from kernels_pallas.rivals import command
from kernels_pallas.rivals import rows as results
from kernels_pallas.rivals.case import Case

DECODE_ROWS = (8, 512, 2048)
OF_FFN = ("ffn", "major_ffn")


def grouped_cases(
    operations: list[str], shapes: list[str], projections: list[str], alphas: list[float], rows: list[int], dtype: str
) -> Iterator[Case]:
    """Every combination; `rows` replaces the rows of decode shapes only (others are of one training step)."""
    for name in shapes:
        shape = specs.SHAPES[name]
        few = name.endswith("_decode")
        for operation in operations:
            if (operation == "decode") != few and shape.kind != "test":
                continue
            for count in (rows or DECODE_ROWS) if few else [shape.rows]:
                for alpha in alphas:
                    sizes = tuple(int(n) for n in specs.dirichlet(shape.experts, count, alpha))
                    for projection in projections:
                        yield Case(
                            operation, projection, name, shape.experts, shape.d_model, shape.d_expert, count, alpha,
                            dtype, sizes,
                        )  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; defaults depend on the platform."""
    command.shares_device()
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operation", nargs="+", choices=(*cases.OPERATIONS, *OF_FFN), help="default: ffn on a CPU")
    parser.add_argument("--shape", nargs="+", choices=list(specs.SHAPES), help="default: those of this platform")
    parser.add_argument("--projection", nargs="+", choices=cases.PROJECTIONS, default=list(cases.PROJECTIONS))
    parser.add_argument("--alpha", nargs="+", type=command.concentration, help="default 5, and 0.5 on a GPU")
    parser.add_argument("--rows", nargs="+", type=command.positive, help=f"of decode shapes; default {DECODE_ROWS}")
    parser.add_argument("--layout", nargs="+", choices=("EKN", "ENK"), default=["EKN"], help="of weights, ours")
    parser.add_argument("--dtype", choices=list(cases.ITEMSIZE), default="float32" if on_cpu else "bfloat16")
    command.add_flags(parser, "GROUPED")
    args = parser.parse_args(argv)
    args.operation = args.operation or (["ffn"] if on_cpu else list(cases.OPERATIONS))
    args.alpha = args.alpha or ([5.0] if on_cpu else [5.0, 0.5])
    kind = "cpu" if on_cpu else "gpu"
    # small_experts is a shape of training runs here, not of a published model
    args.shape = args.shape or [s.name for s in specs.SHAPES.values() if s.kind == kind and s.name != "small_experts"]
    return args


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs; 1 if an implementation of ours gave an error."""
    args = parse(argv)
    if args.summary:
        print(results.table(results.read(args.summary)))
        return 0
    results.check_folder(args.output)
    if "ffn" in args.operation:
        ffn_bench.run(args)
    if "major_ffn" in args.operation:
        major_bench.run(args, command.settings(args))
    operations = [name for name in args.operation if name not in OF_FFN]
    if not operations:
        return 0
    todo = grouped_cases(operations, args.shape, args.projection, args.alpha, args.rows, args.dtype)
    return command.run(args, "GROUPED", todo, command.settings(args, args.layout))


if __name__ == "__main__":
    sys.exit(main())
