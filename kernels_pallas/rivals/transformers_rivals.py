"""Family `transformers`: the MoE layer that users of Hugging Face transformers have (`Qwen3MoeSparseMoeBlock`).

Scope `experts` times its experts module alone with the given routing, scope `layer` the block with its router.
Implementations of the experts: `grouped_mm` (torch's grouped matmul) and `eager` (a loop over experts).
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from kernels_pallas.rivals import torch_layer, torch_run
from kernels_pallas.rivals.case import LayerCase, Settings

EXPERTS = ("grouped_mm", "eager")


def block(case: LayerCase, implementation: str) -> Any:
    """The module, without weights of its own. Raises ModuleNotFoundError."""
    torch = torch_run.torch()
    transformers = importlib.import_module("transformers")
    modeling = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = transformers.Qwen3MoeConfig(
        hidden_size=case.d_model, moe_intermediate_size=case.d_expert, num_experts=case.experts,
        num_experts_per_tok=case.top_k, norm_topk_prob=True, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        return modeling.Qwen3MoeSparseMoeBlock(config)


def run(case: LayerCase, implementation: str) -> Callable[[dict], tuple[Any, tuple]]:
    """(operands) -> (y, (expert, weight)); parameters of the module are the operands themselves."""
    module = block(case, implementation)

    def attach(owner: Any, name: str, tensor: Any) -> None:
        if getattr(owner, name) is not tensor:  # a Parameter that shares the operand, and its gradient
            del owner._parameters[name]
            setattr(owner, name, tensor)

    def call(given: dict[str, Any]) -> tuple[Any, tuple]:
        attach(module.experts, "gate_up_proj", given["gate_up"])
        attach(module.experts, "down_proj", given["down"])
        if case.scope == "experts":
            y = module.experts(given["x"], given["expert"], given["weight"])
            return y, (given["expert"], given["weight"])
        attach(module.gate, "weight", given["router"])
        routing: list[Any] = []
        handle = module.gate.register_forward_hook(lambda _module, _args, out: routing.extend(out))
        y = module(given["x"][None])
        handle.remove()
        _, weight, expert = routing
        return (y[0] if isinstance(y, tuple) else y)[0], (expert, weight)

    return call


def measurements(case: LayerCase, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """One for each implementation of the experts."""
    for implementation in EXPERTS:
        yield f"transformers_{implementation}", functools.partial(measure, case, settings, implementation)


def measure(case: LayerCase, settings: Settings, implementation: str) -> dict:
    function = run(case, implementation)
    row = torch_layer.measure(case, settings, function)
    return row | {"transformers": importlib.import_module("transformers").__version__}
