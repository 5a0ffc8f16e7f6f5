"""Rows of a benchmark: what is added to a measurement, the file they are appended to, and the short table of one."""

import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kernels_pallas.rivals import turns, worker
from kernels_pallas.rivals.case import AnyCase, Case, LayerCase, Settings

Row = dict[str, Any]
UNSTEADY = 1.2  # timings whose 90th percentile is so many times the 10th are marked in the table
ROLES = ("ceiling", "rival", "ours")


def commit() -> str:
    """MOEJAX_COMMIT if set (where the code runs without its history), else the commit of the working tree, or ""."""
    if name := os.environ.get("MOEJAX_COMMIT"):
        return name
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def run_facts() -> Row:
    """Columns that all rows of a run share: commit, when it began, and its command, with files by name alone."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec is not None else [Path(sys.argv[0]).name]
    given = []
    for argument in sys.argv[1:]:
        flag, equals, value = argument.rpartition("=")
        given.append(flag + equals + Path(value).name if os.sep in value else argument)
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "run": began, "command": shlex.join([*program, *given])}


def read(path: str | os.PathLike) -> list[Row]:
    """The rows of a file of JSON lines. Raises SystemExit where the file or a line cannot be read."""
    found: list[Row] = []
    number = 0
    try:
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):  # noqa: B007
            if line.strip():
                found.append(json.loads(line))
                if not isinstance(found[-1], dict):
                    raise ValueError("is no row")
    except OSError as problem:
        raise SystemExit(f"{path}: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise SystemExit(f"{path} is no text") from problem
    except ValueError as problem:
        raise SystemExit(f"{path}, line {number}: not a JSON row ({problem}); was a run ended there?") from problem
    return found


def append(path: str | os.PathLike | None, row: Row) -> None:
    """Appends one row at once, so that a run that ends early keeps what it measured.

    On a line of its own, though an earlier run was ended within its last one.
    """
    if path:
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")


def check_folder(path: str | os.PathLike | None) -> None:
    """Before anything is measured: raises SystemExit where the folder of an output does not exist."""
    if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise SystemExit(f"--output={path}: there is no such folder")


def known_configurations(rows: Iterable[Row], device: str) -> dict[str, str]:
    """Best configurations of earlier rows on the same device, for `Settings.known`."""
    found: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row.get("config") and row.get("device") == device and "error" not in row:
            if "dense_shape" in row:
                key = f"dense_mosaic {row['dense_shape']}"
            elif "projection" in row:
                name = f"{row['implementation']} {row['operation']} {row['projection']}"
                key = f"{name} {row['name']} {row['rows']} {row['dtype']}"
            else:
                continue
            ms = row.get("median_ms", float("inf"))
            if key not in found or ms < found[key][0]:
                found[key] = ms, row["config"]
    return {key: config for key, (_, config) in found.items()}


def speed(case: AnyCase, measured: Row) -> Row:
    """TFLOP/s of valid rows, and for decode GB/s of the bytes that must move; nothing without a time."""
    if "median_ms" not in measured:
        return {}
    seconds = 1e-3 * measured["median_ms"]
    row = {} if "tflops_per_s" in measured or "gb_per_s" in measured else {"tflops_per_s": case.flops / seconds / 1e12}
    if isinstance(case, Case) and case.operation == "decode" and "gb_per_s" not in measured:
        row["gb_per_s"] = case.bytes / seconds / 1e9
    return row


def ceiling(case: AnyCase, measured: Mapping[str, Row]) -> Row:
    """The ceiling of a case from the rows of family `dense`: its name, and its value in TFLOP/s or, decode, GB/s.

    Grouped matmuls: `dense_mosaic` times the share of rows in tiles of 128 that are real. A layer: the time of its
    three matmuls as two dense ones, gate and up together. Empty where it was not measured.
    """
    good = {name: row for name, row in measured.items() if "median_ms" in row}
    if isinstance(case, LayerCase):
        parts = [good.get(f"dense_mosaic/{name}") for name in ("up", "down")]
        if None in parts:
            return {}
        seconds = sum(1e-3 * part["median_ms"] for part in parts if part) * case.flops
        value = case.flops * 6 * case.rows * case.d_model * case.d_expert / seconds / 1e12
        return {"ceiling": "dense_mosaic", "ceiling_value": value}
    if case.operation == "decode" and "copy" in good:
        return {"ceiling": "copy", "ceiling_value": good["copy"]["gb_per_s"]}
    if "dense_mosaic" in good:
        value = good["dense_mosaic"]["tflops_per_s"] * case.tile_share
        return {"ceiling": "dense_mosaic x tile_share", "ceiling_value": value, "tile_share": case.tile_share}
    return {}


def complete(case: AnyCase, measured: Row, ceilings: Mapping[str, Row], best_rival: Row | None, extra: Row) -> Row:
    """The row to be written: case, measurement, speed, share of the ceiling, our speed over the best rival's.

    Where they were timed in turn, both are medians of the rounds' ratios (a layer's ceiling, the sum of two, is not),
    and the latter has their 10th and 90th percentile.
    """
    row = case.fields() | measured | speed(case, measured) | extra
    if measured.get("role") == "ceiling" or "median_ms" not in measured:
        return row
    if top := ceiling(case, ceilings):
        value = row["gb_per_s"] if top["ceiling"] == "copy" else row["tflops_per_s"]
        row |= top | {"share_of_ceiling": value / top["ceiling_value"]}
        of_one = ceilings.get(top["ceiling"].split()[0], {})
        if rounds := turns.ratios(row, of_one):
            row["share_of_ceiling"] *= float(np.median(rounds)) * row["median_ms"] / of_one["median_ms"]
    if measured.get("role") == "ours" and best_rival:
        row |= {
            "best_rival": best_rival["implementation"],
            "ratio_to_best_rival": best_rival["median_ms"] / row["median_ms"],
        }
        if rounds := turns.ratios(row, best_rival):
            low, middle, high = (float(np.percentile(rounds, at)) for at in (10, 50, 90))
            row |= {"ratio_to_best_rival": middle, "ratio_to_best_rival_p10": low, "ratio_to_best_rival_p90": high}
    return row


def run_case(
    workers: Mapping[str, worker.Worker | worker.Team | worker.Inline], case: AnyCase, settings: Settings, extra: Row
) -> Iterator[Row]:
    """All rows of a case, each as soon as it is there: ceilings, then rivals, then ours.

    Timed in turn, they come together at the case's end. A back end that refuses gives a row with "refused" only if it
    was named in the settings.
    """
    ceilings: dict[str, Row] = {}
    best: Row | None = None
    one_by_one = ((family, row) for family, process in workers.items() for row in process.rows(case, settings))
    for family, measured in turns.measure(workers, case, settings) if settings.in_turn else one_by_one:
        if "refused" in measured and measured["implementation"].split("/")[0] not in settings.implementations:
            continue
        if family == "dense":
            ceilings[measured["implementation"]] = measured
        measured.setdefault("role", {"dense": "ceiling", "ours": "ours"}.get(family, "rival"))
        yield complete(case, measured, ceilings, best, extra)
        if measured["role"] == "rival" and "median_ms" in measured:
            if best is None or measured["median_ms"] < best["median_ms"]:
                best = measured


def _figure(row: Row) -> str:
    if "gb_per_s" in row:
        return f"{row['gb_per_s']:.4g} GB/s"
    return f"{row['tflops_per_s']:.3g} TF/s" if "tflops_per_s" in row else "-"


def _problem(row: Row, width: int = 60) -> str:
    text = row.get("error") or (f"refuses: {row['refused']}" if "refused" in row else "")
    return text if len(text) <= width else text[: width - 3] + "..."


def line(row: Row) -> str:
    """One row of the short table."""
    what = " ".join(
        str(row[name]) for name in ("operation", "pass", "scope", "projection") if row.get(name) is not None
    )
    alpha = "-" if row.get("alpha") is None else f"{row['alpha']:g}"
    head = f"{row.get('name', '-'):<23}{what:<31}{row.get('rows', '-'):>8}{alpha:>5} {row['implementation']:<30}"
    if "median_ms" not in row:
        return f"{head} {_problem(row)}"
    share = f"{100 * row['share_of_ceiling']:.0f}%" if "share_of_ceiling" in row else "-"
    rival = f"{row['ratio_to_best_rival']:.2f}" if "ratio_to_best_rival" in row else "-"
    more = [f"{row['ratio_to_full']:.2f} of full"] if "ratio_to_full" in row else []
    for part in ("peak", "saved"):
        if f"{part}_bytes" in row:
            more.append(f"{part} {row[f'{part}_bytes'] / 2**30:.2f} GiB")
    if "ratio_to_best_rival_p10" in row:
        more.append(f"rounds {row['ratio_to_best_rival_p10']:.2f} to {row['ratio_to_best_rival_p90']:.2f}")
    if row.get("p10_ms") and row["p90_ms"] > UNSTEADY * row["p10_ms"]:
        more.append(f"unsteady: p90/p10 {row['p90_ms'] / row['p10_ms']:.2f}")
    return f"{head}{row['median_ms']:>10.4g}{_figure(row):>15}{share:>8}{rival:>8} {', '.join(more)}".rstrip()


HEAD = (
    f"{'shape':<23}{'what':<31}{'rows':>8}{'skew':>5} {'implementation':<30}{'ms':>10}{'speed':>15}"
    f"{'ceiling':>8}{'/rival':>8}"
)


def table(rows: Iterable[Row]) -> str:
    """The rows as text, one line each; `ceiling` is our share of it, `/rival` our speed over the best rival's."""
    return "\n".join([HEAD, *(line(row) for row in rows)])
