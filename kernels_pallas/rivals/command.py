"""What the benchmarks' command lines share: families, budget, output."""

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence

import jax

from kernels_pallas.grouped_matmul import GROUPED_MATMUL
from kernels_pallas.moe_ffn import MOE_FFN
from kernels_pallas.rivals import child, rows, worker
from kernels_pallas.rivals.case import AnyCase, Settings

CEILINGS = {"GROUPED": ("dense_mosaic", "dense_cublas", "batched_cublas", "copy"), "LAYER": ("dense_mosaic",)}


def positive(text: str) -> int:
    """A flag's whole number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def concentration(text: str) -> float:
    """A flag's Dirichlet concentration."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError("must be finite and above 0")
    return float(text)


def _end(*_: object) -> None:
    raise SystemExit(143)  # so that what is in `finally` runs


def add_flags(parser: argparse.ArgumentParser, kind: str) -> None:
    """Flags of every benchmark of `families.GROUPED` or `families.LAYER`."""
    known = list(child.families_of(kind))
    parser.add_argument("--families", nargs="+", choices=known, help="default: all on a GPU, ours on a CPU")
    ours = {"GROUPED": GROUPED_MATMUL, "LAYER": MOE_FFN}[kind].backends
    parser.add_argument(
        "--implementation",
        nargs="+",
        default=[],
        choices=list(ours),
        help="of ours, by name; default: all that can run",
    )
    parser.add_argument("--repeats", type=positive, help="timings of each; default 20")
    parser.add_argument("--target-ms", type=float, default=25.0, help="how long one timing lasts")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for one implementation of one case")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no case starts after that")
    parser.add_argument("--tune", choices=("none", "short", "full"), default="short", help="of rivals")
    parser.add_argument(
        "--ceiling", nargs="+", default=[], choices=CEILINGS[kind], help="of family dense, by name; default: all"
    )
    parser.add_argument(
        "--in-turn",
        action="store_true",
        help="all implementations of a case one timing each, its rows at its end; not of ffn, major_ffn",
    )
    parser.add_argument("--processes", type=positive, default=4, help="of ours: while one measures, the others compile")
    parser.add_argument("--known", nargs="+", metavar="FILE", default=[], help="use configurations of these rows too")
    parser.add_argument("--output", help="JSON lines, appended as they come; configurations in it are used again")
    parser.add_argument("--summary", metavar="FILE", help="print the table of a file of rows, and end")
    parser.add_argument("--tokamax", metavar="FOLDERS", help="import tokamax from there (MOEJAX_TOKAMAX)")
    parser.add_argument("--tokamax-triton", metavar="FOLDERS", help="an older tokamax (MOEJAX_TOKAMAX_TRITON)")
    parser.add_argument("--liger", metavar="FOLDERS", help="import liger-kernel from there (MOEJAX_LIGER)")


def settings(args: argparse.Namespace, layouts: Sequence[str] = ("EKN",)) -> Settings:
    """What the flags say; later files' configurations go before those of earlier ones, the output's before all."""
    device = jax.devices()[0].device_kind
    known: dict[str, str] = {}
    rows.check_folder(args.output)
    for path in (*args.known, *([args.output] if args.output and os.path.exists(args.output) else ())):
        known |= rows.known_configurations(rows.read(path), device)
    return Settings(
        args.repeats or 20, args.target_ms, tuple(args.implementation), tuple(layouts), args.tune, tuple(args.ceiling),
        known, args.in_turn,
    )  # fmt: skip


def shares_device() -> None:
    """Processes share one device: this one must not take all its memory. Before JAX first uses it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def run(args: argparse.Namespace, kind: str, todo: Iterable[AnyCase], settings: Settings, say: Callable = print) -> int:
    """Runs all cases; returns 1 if an implementation of ours gave an error, else 0.

    Families run in processes of their own, on a CPU in this one.
    """
    started = time.monotonic()
    for variable in ("tokamax", "tokamax_triton", "liger"):
        if value := getattr(args, variable):
            os.environ[f"MOEJAX_{variable.upper()}"] = value
    on_cpu = jax.default_backend() == "cpu"
    names = [name for name in child.families_of(kind) if name in (args.families or child.families_of(kind))]
    if on_cpu and not args.families:
        names = ["ours"]
    todo = list(todo)
    if not todo:
        raise SystemExit("no case: operations and shapes do not go together")
    workers: dict[str, worker.Inline | worker.Team] = {}
    for name in names:
        if on_cpu:
            workers[name] = worker.Inline(kind, name)
        else:
            count = max(1, args.processes if child.families_of(kind)[name].team else 1)
            members = [worker.Worker(kind, name, args.seconds) for _ in range(min(count, len(todo)))]
            workers[name] = worker.Team(members, todo, settings)
    problems = []
    before = signal.signal(signal.SIGTERM, _end)  # of `timeout`, say: no child is to go on and disturb the next run
    extra = rows.run_facts()
    device = jax.devices()[0].device_kind
    say(f"{device}, jax {jax.__version__}, families: {' '.join(names)}")
    say(rows.HEAD)
    try:
        teams = [process for process in workers.values() if isinstance(process, worker.Team)]
        for process in teams:
            process.start()  # all at once
        for process in teams:
            process.greet()
        for case in todo:
            if time.monotonic() - started > 60 * args.minutes:
                say(f"stopped before {case.name} {case.fields()['operation']}: --minutes {args.minutes:g} are over")
                break
            for row in rows.run_case(workers, case, settings, extra):
                problems += [row["role"]] if "error" in row else []
                rows.append(args.output, row)
                say(rows.line(row), flush=True)
    finally:
        for process in workers.values():
            process.close()
        signal.signal(signal.SIGTERM, before)
    say(f"{len(problems)} rows with an error, {problems.count('ours')} of them ours")
    return int("ours" in problems)
