"""Family `ours` of whole layers: `moe_ffn` by every back end that does not refuse the case.

A gradient is taken of x, the gate weights and the three stacks of expert weights.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import BackendRefused
from kernels_pallas.moe_ffn import MOE_FFN, moe_ffn
from kernels_pallas.rivals import case as cases
from kernels_pallas.rivals import jax_run, timing
from kernels_pallas.rivals.case import LayerCase, Settings

WEIGHTS = ("gate", "up", "down")


@functools.lru_cache(maxsize=1)
def operands(case: LayerCase) -> dict[str, Array]:
    """Random normal x, dy and weights of variance 1 / fan-in; the routing, or the router that makes it."""
    into, inner = case.d_model**-0.5, case.d_expert**-0.5
    scales = {"x": 1.0, "dy": 1.0, "gate": into, "up": into, "down": inner, "router": into}
    shapes, keys = abstract(case), jax.random.split(jax.random.key(0), len(scales))
    made = {
        name: jax_run.normal(key, shapes[name].shape, scale, case.dtype)
        for key, (name, scale) in zip(keys, scales.items(), strict=True)
    }
    expert, weight = case.routing()
    return jax.block_until_ready(made | {"expert": jnp.asarray(expert), "weight": jnp.asarray(weight)})


def abstract(case: LayerCase) -> dict[str, jax.ShapeDtypeStruct]:
    """`operands` without data."""
    t, d, f, e, k = case.tokens, case.d_model, case.d_expert, case.experts, case.top_k
    shapes = {"x": (t, d), "dy": (t, d), "gate": (e, d, f), "up": (e, d, f), "down": (e, f, d), "router": (d, e)}
    made = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype)) for name, shape in shapes.items()}
    routing = {"expert": jnp.dtype("int32"), "weight": jnp.dtype("float32")}
    return made | {name: jax.ShapeDtypeStruct((t, k), dtype) for name, dtype in routing.items()}


def route(x: Float[Array, "T D"], router: Float[Array, "D E"], top_k: int) -> tuple[Array, Array]:
    """(expert, weight) [T,k]: the k largest of a softmax in float32, scaled to sum to 1."""
    logits = jnp.dot(x, router, preferred_element_type=jnp.float32)
    weight, expert = jax.lax.top_k(jax.nn.softmax(logits), top_k)
    return expert, weight / weight.sum(axis=-1, keepdims=True)


def functions(case: LayerCase, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Of the whole pass, (operands) -> y, routing and, with a backward, gradients; and of the forward alone."""

    def forward(leaves: dict[str, Array], expert: Any) -> tuple[Array, tuple[Array, Array]]:
        if case.scope == "layer":
            routing = route(leaves["x"], leaves["router"], case.top_k)
        else:
            routing = (expert, leaves["weight"])
        gate, up, down = (leaves[w] for w in WEIGHTS)
        return moe_ffn(leaves["x"], *routing, gate, up, down, activation="swiglu", implementation=name), routing

    def run(given: dict[str, Array]) -> dict[str, Any]:
        leaves, expert = split(case, given)
        if "backward" not in case.passes:
            y, routing = forward(leaves, expert)
            return {"y": y, "routing": routing}
        y, pull, routing = jax.vjp(lambda leaves: forward(leaves, expert), leaves, has_aux=True)
        return {"y": y, "routing": routing, "gradients": pull(given["dy"])[0]}

    return run, forward


def split(case: LayerCase, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """(what gradients are taken of, the given routing)."""
    names = ("x", "router" if case.scope == "layer" else "weight", *WEIGHTS)
    return {name: given[name] for name in names}, given["expert"] if case.scope == "experts" else None


def saved(forward: Callable, leaves: dict[str, Array], expert: Any) -> list[tuple[str, int]]:
    """(dtype[shape], bytes) of each array kept for the backward pass, weights left out; nothing is run."""
    names = sorted(leaves)

    def both(*values: Array) -> Any:
        y, pull, _ = jax.vjp(lambda *v: forward(dict(zip(names, v, strict=True)), expert), *values, has_aux=True)
        return y, pull

    closed, shapes = jax.make_jaxpr(both, return_shape=True)(*(leaves[name] for name in names))
    results = list(zip(closed.jaxpr.outvars, jax.tree.leaves(shapes), strict=True))[1:]
    weights = {id(v) for name, v in zip(names, closed.jaxpr.invars, strict=True) if name in (*WEIGHTS, "router")}
    kept = {id(variable): what for variable, what in results if id(variable) not in weights and what.ndim}
    return [(f"{a.dtype}{list(a.shape)}", a.size * a.dtype.itemsize) for a in kept.values()]


def measurements(case: LayerCase, settings: Settings) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(back end, function) for each back end to be timed."""
    for name in MOE_FFN.backends:
        if jax_run.wanted(name, settings):
            yield name, functools.partial(measure, case, settings, name)


def prepare(case: LayerCase, settings: Settings) -> None:
    """Compiles what `measurements` will run, where that leaves the device alone; a router is a matmul of XLA's."""
    if case.scope == "layer" and jax_run.on_gpu():
        return
    for name in filter(jax_run.leaves_device_alone, MOE_FFN.backends):
        if jax_run.wanted(name, settings) and refusal(case, name) is None:
            jax_run.prepare((name, case), functions(case, name)[0], abstract(case))


def refusal(case: LayerCase, name: str) -> str | None:
    """Why the back end does not take the case, if it does not."""
    try:
        jax.eval_shape(functions(case, name)[0], abstract(case))
    except BackendRefused as refused:
        return refused.refusals.get(name, str(refused))
    return None


def measure(case: LayerCase, settings: Settings, name: str) -> dict:
    """Columns of a row, or {"refused": reason}. Raises WrongResult."""
    if reason := refusal(case, name):
        return {"refused": reason}
    given = operands(case)
    run, forward = functions(case, name)
    executable = jax_run.program((name, case), run, given)
    found = check(case, given, executable(given))
    batch = timing.wall_clock(functools.partial(executable, given), jax.block_until_ready)
    row = timing.repeat(batch, settings.repeats, settings.target_ms).fields()
    if not bool(jnp.isfinite(executable(given)["y"]).all()):
        raise cases.WrongResult("some elements are not finite after the timings")
    analysis = executable.memory_analysis()
    if analysis is not None:
        parts = {part: getattr(analysis, f"{part}_size_in_bytes", 0) for part in ("argument", "output", "temp")}
        row |= {"peak_bytes": sum(parts.values()), "temporary_bytes": parts["temp"]}
    if "backward" in case.passes:
        kept = saved(forward, *split(case, given))
        row |= {"saved_bytes": sum(n for _, n in kept), "saved": [what for what, _ in kept]}
    role = "rival" if name in ("lax", "tokamax") else "ours"
    return row | {"relative_error": found, "role": role} | jax_run.versions()


def _ffn(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """One expert's SwiGLU FFN on rows, as in a textbook, float32."""
    dot = functools.partial(jnp.dot, precision="highest")
    return dot(jax.nn.silu(dot(x, gate)) * dot(x, up), down)


@functools.partial(jax.jit, compiler_options=jax_run.UNTUNED)
def _tokens(x: Array, weight: Array, dy: Array, expert: Array, stacks: tuple) -> tuple[Array, Array, Array]:
    """(y, dx, dweight) of a few tokens, one after the other, in float32."""

    def one(args: tuple) -> tuple[Array, Array, Array]:
        x, weight, dy, expert = args
        chosen = [stack[expert].astype(jnp.float32) for stack in stacks]

        def forward(x: Array, weight: Array) -> Array:
            return weight @ jax.vmap(lambda *w: _ffn(x[None], *w)[0])(*chosen)

        y, pull = jax.vjp(forward, x, weight)
        return y, *pull(dy)

    return jax.lax.map(one, (*(a.astype(jnp.float32) for a in (x, weight, dy)), expert))


@functools.partial(jax.jit, compiler_options=jax_run.UNTUNED)
def _expert(x: Array, weight: Array, dy: Array, stacks: tuple) -> tuple:
    """Weight gradients of one expert from its rows, in float32."""
    x, weight, dy, *wide = (a.astype(jnp.float32) for a in (x, weight, dy, *stacks))
    return jax.vjp(lambda *w: _ffn(x, *w), *wide)[1](weight[:, None] * dy)


def samples(
    case: LayerCase, expert: Int[np.ndarray, "T k"]
) -> tuple[Int[np.ndarray, "S"], int, Int[np.ndarray, "R"], Int[np.ndarray, "R"]]:
    """(tokens to check, an expert to check, its tokens, and at which of their k places it stands)."""
    tokens = np.random.default_rng(1).choice(case.tokens, 8, replace=False)
    counts = np.bincount(expert.ravel(), minlength=case.experts)
    middle = int(np.argsort(counts)[case.experts // 2])
    return tokens, middle, *np.nonzero(expert == middle)


def check(case: LayerCase, given: dict[str, Array], got: dict[str, Any]) -> float:
    """Largest relative norm of the error of y, and of the gradients; raises WrongResult above the tolerance.

    y (and, with a given routing, dx and the gradient of the gate weights) of 8 tokens; the three weight gradients of
    the expert in the middle by load. With a router the routing that it made is taken as it is.
    """
    expert, weight = (np.asarray(a) for a in got["routing"])
    tokens, middle, rows, place = samples(case, expert)
    stacks = tuple(given[w] for w in WEIGHTS)
    y, dx, dweight = _tokens(given["x"][tokens], weight[tokens], given["dy"][tokens], expert[tokens], stacks)
    pairs = {"y": (got["y"][tokens], y)}
    if gradients := got.get("gradients"):
        if case.scope == "experts":
            pairs |= {"dx": (gradients["x"][tokens], dx), "dweight": (gradients["weight"][tokens], dweight)}
        own = tuple(stack[middle] for stack in stacks)
        expected = _expert(given["x"][rows], jnp.asarray(weight[rows, place]), given["dy"][rows], own)
        pairs |= {f"d{w}": (gradients[w][middle], e) for w, e in zip(WEIGHTS, expected, strict=True)}
    errors = {
        what: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for what, (a, b) in pairs.items()
    }
    worst = max(errors, key=lambda what: np.nan_to_num(errors[what], nan=np.inf))
    if not errors[worst] <= cases.LAYER_TOLERANCE[case.dtype]:
        limit = cases.LAYER_TOLERANCE[case.dtype]
        raise cases.WrongResult(f"relative error of {worst} {errors[worst]:.2e} is above {limit:.0e}")
    return errors[worst]
