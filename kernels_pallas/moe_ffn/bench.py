"""Times whole MoE layers side by side with what else a user could take, in one run.

    python -m kernels_pallas.moe_ffn.bench [--shape NAME ... | sonic | all] [--pass forward forward+backward]
        [--scope experts layer] [--alpha A ...] [--implementation NAME ...] [--families NAME ...] [--seconds S]
        [--minutes M] [--repeats N] [--dtype bfloat16] [--in-turn] [--output FILE.jsonl]
    python -m kernels_pallas.moe_ffn.bench --summary FILE.jsonl

Scope `experts` takes the routing as given, with the skew of Dirichlet(alpha); scope `layer` has a linear router with
softmax and top-k before it, whose random weights spread tokens almost evenly. SwiGLU. Every implementation is checked
against float32 before it is timed, values and gradients; one that is wrong, refuses or crashes gives a row with
"error" and no time. FLOPs are those of the three matmuls (three times as many with the backward). Rows carry the
peak memory of a pass with its inputs and results, and ours what is saved for the backward pass.

On a GPU four processes (`--processes`) take the cases of ours in turn: one measures while the others, and the family
`dense`, compile what comes next. `--known` takes the best configurations of dense kernels from earlier rows.
`--in-turn` times all implementations of a case one timing each, so that a change of the card's clock counts for all.
"""

import argparse
import sys
from collections.abc import Iterator

import jax

from kernels_pallas.moe_ffn import specs
from kernels_pallas.rivals import case as cases
from kernels_pallas.rivals import command
from kernels_pallas.rivals import rows as results
from kernels_pallas.rivals.case import LayerCase


def layer_cases(
    shapes: list[str], passes: list[str], scopes: list[str], alphas: list[float], dtype: str
) -> Iterator[LayerCase]:
    """Every combination; the skew is a matter of scope `experts` alone."""
    for name in shapes:
        shape = specs.SHAPES[name]
        sizes = (shape.tokens, shape.d_model, shape.d_expert, shape.experts, shape.top_k)
        for scope in scopes:
            for alpha in alphas if scope == "experts" else [float("inf")]:
                for which in passes:
                    yield LayerCase(which, scope, name, *sizes, alpha, dtype)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; defaults depend on the platform."""
    command.shares_device()
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(specs.SHAPES)
    parser.add_argument("--shape", nargs="+", choices=[*names, "sonic", "all"], help=f"default: {specs.DEFAULT}")
    parser.add_argument("--pass", dest="passes", nargs="+", choices=cases.PASSES, default=list(cases.PASSES))
    parser.add_argument("--scope", nargs="+", choices=("experts", "layer"), default=["experts", "layer"])
    parser.add_argument("--alpha", nargs="+", type=command.concentration, default=[5.0], help="of Dirichlet")
    parser.add_argument("--dtype", choices=list(cases.ITEMSIZE), default="float32" if on_cpu else "bfloat16")
    command.add_flags(parser, "LAYER")
    args = parser.parse_args(argv)
    every = {"sonic": ("sonic",), "all": ("gpu", "sonic")}
    chosen = args.shape or (["cpu"] if on_cpu else list(specs.DEFAULT))
    args.shape = [n for c in chosen for n in ([s for s in names if specs.SHAPES[s].kind in every.get(c, ())] or [c])]
    return args


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs; 1 if an implementation of ours gave an error."""
    args = parse(argv)
    if args.summary:
        print(results.table(results.read(args.summary)))
        return 0
    todo = layer_cases(args.shape, args.passes, args.scope, args.alpha, args.dtype)
    return command.run(args, "LAYER", todo, command.settings(args))


if __name__ == "__main__":
    sys.exit(main())
