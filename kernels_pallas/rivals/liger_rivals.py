"""Family `liger`: the fused MoE of liger-kernel (Triton, tunes itself at the first call); scope `experts` only."""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

from kernels_pallas.rivals import torch_layer, torch_run
from kernels_pallas.rivals.case import LayerCase, Settings


def measurements(case: LayerCase, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """`liger_fused_moe`; nothing for scope `layer`, since it has no router."""
    if case.scope == "experts":
        yield "liger_fused_moe", functools.partial(measure, case, settings)


def measure(case: LayerCase, settings: Settings) -> dict:
    torch = torch_run.torch()
    fused = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    if torch_run.device() != "cuda":
        raise NotImplementedError("the kernels of liger-kernel are for GPUs")

    def call(given: dict[str, Any]) -> tuple[Any, tuple]:
        expert = given["expert"].to(torch.int32)
        y = fused.apply(given["x"], given["gate_up"], given["down"], expert, given["weight"])
        return y, (given["expert"], given["weight"])

    row = torch_layer.measure(case, settings, call)
    return row | {"liger_kernel": importlib.metadata.version("liger-kernel")}
