"""Family `torch`: `torch._grouped_mm`, the grouped matmul that torch users have, in both layouts of the weights.

`torch_grouped_mm` reads weights as stored here, [E,K,N]; `torch_grouped_mm/ENK` has them stored [E,N,K], as torch
modules do, and passes the transposed view. Gradients are what its autograd calls: the product with the transposed
weights (dlhs), and the form with two 2-D operands (drhs).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from kernels_pallas.rivals import torch_run
from kernels_pallas.rivals.case import Case, Settings


def product(case: Case, layout: str) -> Callable[..., Any]:
    """(a, b, ends) -> result; with layout "ENK" b is a transposed view of contiguous weights."""
    grouped_mm = torch_run.torch()._grouped_mm
    if case.operation == "dlhs":
        return lambda dy, rhs, ends: grouped_mm(dy, rhs.transpose(-2, -1), offs=ends)
    if case.operation == "drhs" and layout == "ENK":
        return lambda lhs, dy, ends: grouped_mm(dy.T, lhs, offs=ends).transpose(-2, -1)
    if case.operation == "drhs":
        return lambda lhs, dy, ends: grouped_mm(lhs.T, dy, offs=ends)
    return lambda lhs, rhs, ends: grouped_mm(lhs, rhs, offs=ends)


def measurements(case: Case, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Both layouts; nothing for `major`, which it has no form of."""
    if case.operation != "major":
        for layout in ("EKN", "ENK"):
            name = "torch_grouped_mm" + ("" if layout == "EKN" else f"/{layout}")
            yield name, functools.partial(measure, case, settings, layout)


def measure(case: Case, settings: Settings, layout: str) -> dict:
    run = product(case, layout)
    if layout == "ENK" and case.operation != "drhs":
        stored = {id(s[1]): s[1].transpose(-2, -1).contiguous() for s in torch_run.operands(case)}
        base = run

        def run(a: Any, b: Any, ends: Any) -> Any:
            return base(a, stored[id(b)].transpose(-2, -1), ends)

    row = torch_run.time_product(case, settings, run) | {"role": "rival", "layout": layout}
    if layout == "ENK" or settings.in_turn:  # in turn, either may be the last
        torch_run.release()
    return row
