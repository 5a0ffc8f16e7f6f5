"""Inputs, check and timing of a whole MoE layer in torch, alike those in `layer`: same shapes, routing and tolerance.

A rival gives `run(operands) -> (y, (expert, weight), leaves)`; weights are in the layout of torch's expert modules,
gate_up [E,2F,D] (gate first) and down [E,D,F].
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kernels_pallas.rivals import case as cases
from kernels_pallas.rivals import timing, torch_run
from kernels_pallas.rivals.case import LayerCase, Settings

LEAVES = ("x", "weight", "gate_up", "down", "router")


@functools.lru_cache(maxsize=1)
def operands(case: LayerCase) -> dict[str, Any]:
    """Random normal x, dy and weights of variance 1 / fan-in; the routing, or the router that makes it."""
    torch = torch_run.torch()
    t, d, f, e = case.tokens, case.d_model, case.d_expert, case.experts
    expert, weight = case.routing()
    made = {
        "x": torch_run.normal(0, (t, d), 1.0, case.dtype),
        "dy": torch_run.normal(1, (t, d), 1.0, case.dtype),
        "gate_up": torch_run.normal(2, (e, 2 * f, d), d**-0.5, case.dtype),
        "down": torch_run.normal(3, (e, d, f), f**-0.5, case.dtype),
        "router": torch_run.normal(4, (e, d), d**-0.5, case.dtype),
        "expert": torch.as_tensor(expert, dtype=torch.int64, device=torch_run.device()),
        # as the routers of transformers give them: in the dtype of the layer
        "weight": torch.as_tensor(weight, device=torch_run.device()).to(getattr(torch, case.dtype)),
    }
    for name in LEAVES:
        made[name].requires_grad_(True)
    return made


def clear(given: dict[str, Any]) -> None:
    for name in LEAVES:
        given[name].grad = None


def measure(case: LayerCase, settings: Settings, run: Callable[[dict], tuple[Any, tuple]]) -> dict:
    """Columns of a row: check, time, peak memory of a pass with its inputs and results. Raises WrongResult."""
    torch = torch_run.torch()
    given = operands(case)
    backward = "backward" in case.passes

    def once() -> Any:
        if not backward:
            with torch.no_grad():
                return run(given)
        clear(given)
        y, routing = run(given)
        y.backward(given["dy"])
        return y, routing

    found = check(case, given, *once())
    clear(given)
    row = {}
    if torch_run.device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        once()
        torch.cuda.synchronize()
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    timings = timing.repeat(torch_run.events(once), settings.repeats, settings.target_ms)
    if not bool(torch.isfinite(once()[0]).all()):
        raise cases.WrongResult("some elements are not finite after the timings")
    clear(given)
    return timings.fields() | {"relative_error": found, "role": "rival"} | row | torch_run.versions()


def _ffn(x: Any, gate_up: Any, down: Any) -> Any:
    """One expert's SwiGLU FFN on rows, in float32."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (torch_run.torch().nn.functional.silu(gate) * up) @ down.T


def _wide(*tensors: Any) -> Iterator[Any]:
    return (tensor.detach().float().requires_grad_(True) for tensor in tensors)


def check(case: LayerCase, given: dict[str, Any], y: Any, routing: tuple[Any, Any]) -> float:
    """Largest relative norm of the error; the same samples as in `layer.check`; raises WrongResult."""
    torch = torch_run.torch()
    expert, weight = (part.detach() for part in routing)
    chosen = expert.cpu().numpy()
    tokens = np.random.default_rng(1).choice(case.tokens, 8, replace=False)
    gradients = given["down"].grad is not None
    expected: dict[str, list] = {"y": [], "dx": [], "dweight": []}
    for t in tokens.tolist():
        x, w = _wide(given["x"][t], weight[t])
        parts = [_ffn(x, *_wide(given["gate_up"][e], given["down"][e])) for e in chosen[t].tolist()]
        total = w @ torch.stack(parts)
        total.backward(given["dy"][t].float())
        for name, value in (("y", total), ("dx", x.grad), ("dweight", w.grad)):
            expected[name].append(value.detach())
    at = torch.as_tensor(tokens, device=torch_run.device())
    pairs = {"y": (y.detach().reshape(case.tokens, -1)[at], torch.stack(expected["y"]))}
    if gradients:
        if case.scope == "experts":
            pairs["dx"] = (given["x"].grad[at], torch.stack(expected["dx"]))
            pairs["dweight"] = (given["weight"].grad[at], torch.stack(expected["dweight"]))
        counts = np.bincount(chosen.ravel(), minlength=case.experts)
        middle = int(np.argsort(counts)[case.experts // 2])
        rows, place = (torch.as_tensor(i, device=torch_run.device()) for i in np.nonzero(chosen == middle))
        gate_up, down = _wide(given["gate_up"][middle], given["down"][middle])
        out = _ffn(given["x"].detach()[rows].float(), gate_up, down)
        out.backward(weight[rows, place].float()[:, None] * given["dy"][rows].float())
        pairs["dgate_up"] = (given["gate_up"].grad[middle], gate_up.grad)
        pairs["ddown"] = (given["down"].grad[middle], down.grad)
    errors = {name: torch_run.relative(a.float() - b, b) for name, (a, b) in pairs.items()}
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    limit = cases.LAYER_TOLERANCE[case.dtype]
    if not errors[worst] <= limit:
        raise cases.WrongResult(f"relative error of {worst} {errors[worst]:.2e} is above {limit:.0e}")
    return errors[worst]
