"""Public function: checks of the arguments, then the choice of a back end.

Every back end of `grouped_matmul` has one here of the same name, in the same order: the layer of `composed.py` on that
grouped matmul. `ref` is the oracle of `ref.py`.

A back end runs and refuses with the signature `(x, expert, weight, params, activation, valid=None)`.

Letters: T tokens, K choices of a token, E experts, D model, F expert hidden.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.dispatch import Backend, Implementation, Operation, default_platform
from kernels_pallas.grouped_matmul import groups
from kernels_pallas.grouped_matmul.api import GROUPED_MATMUL, check_gate, check_weights
from kernels_pallas.grouped_matmul.ffn import Activation, Weights
from kernels_pallas.grouped_matmul.mosaic_gpu import backend as mosaic_gpu
from kernels_pallas.moe_ffn import composed, ref


def _backend(name: str) -> Backend:
    if name == "ref":
        return Backend(name, ref.moe_ffn)
    if name == "mosaic_gpu":
        layer = composed.layer(composed.from_kernels(mosaic_gpu.KERNELS))
        return Backend(name, composed.whole_tiles(layer, mosaic_gpu.WHOLE), _refuse_mosaic_gpu)
    return Backend(name, composed.layer(composed.from_matmul(name)), composed.refuse_matmul(name))


def _refuse_mosaic_gpu(x, expert, weight, params: Weights, activation, valid=None) -> str | None:
    rows = jax.ShapeDtypeStruct((expert.size, x.shape[1]), x.dtype)
    del weight, valid
    return mosaic_gpu.refuse_ffn(rows, None, params, activation)


MOE_FFN = Operation("moe_ffn", {name: _backend(name) for name in GROUPED_MATMUL.backends}, GROUPED_MATMUL.order)


@groups.automatic
def moe_ffn(
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    weight: Float[Array, "T K"],
    gate: Float[Array, "E D F"] | None,
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: Activation,
    valid: Bool[Array, "T K"] | None = None,
    gate_bias: Float[Array, "E F"] | None = None,
    up_bias: Float[Array, "E F"] | None = None,
    down_bias: Float[Array, "E D"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "T D"]:
    """The routed experts of one layer: y[t] = sum over k of weight[t, k] * FFN_e(x[t]) with e = expert[t, k]

    (Shazeer et al. 2017, "Outrageously large neural networks", eq. 1, over the chosen experts only). FFN_e and
    `activation` are those of `grouped_ffn`.

    Differentiable in x, weight, weights and biases (reverse mode, once; `ref` any number of times). For the backward
    pass x, the gate and up pre-activations and routing are kept, no other array of T K rows (`ref` apart). Sums and
    activations are float32; rows of experts are rounded to the dtype of x, before and after the sum over k. Inside
    `shard_map` as `grouped_matmul`.

    Args:
        x: tokens.
        expert: the experts of each token, in any order, integers of any type; the same one twice counts twice. A pair
            whose expert is not in 0 .. E - 1 is dropped.
        weight: gate weights, of any floating-point type; the gradient has it too.
        gate: None for an activation without a gate.
        up: same dtype as x, as all weights and biases.
        down: from hidden to model.
        activation: "swiglu", "geglu", "swiglu_clamped", "gelu" or "relu", as in `grouped_ffn`.
        valid: False drops a pair: it adds nothing, its weight and expert may hold anything, NaN included, and the
            gradient of its weight is 0. None keeps all.
        gate_bias: only with a gate.
        up_bias: added to x @ up.
        down_bias: added to the experts' output, so multiplied by the gate weight.
        implementation: None (the platform's order), a back end's name, or names to try in order.

    Raises:
        ValueError: shapes or dtypes that do not fit, gate missing or superfluous, an unknown activation or
            implementation.
        BackendRefused: no allowed back end can run; a back end chosen by name is never replaced by another.

    It does not choose experts, nor does it limit how many tokens an expert takes: no pair is dropped but by `valid`, or
    by an expert that does not exist.
    """
    params = Weights(gate, up, down, gate_bias, up_bias, down_bias)
    x, weight, params, valid = jax.tree.map(jnp.asarray, (x, weight, params, valid))  # numpy's too
    expert = groups.to_int32(expert)
    _check_routing(x, expert, weight, valid)
    _check_params(x, params, activation)
    x, expert, weight, params, valid = groups.alike((x, expert, weight, params, valid))
    if 0 in (x.size, expert.size):
        MOE_FFN.names(implementation, default_platform())  # an unknown one is an error here too
        return jnp.zeros_like(x)
    args = (x, expert, weight, params, activation, valid)
    return MOE_FFN.select(implementation, *args).run(*args)


def _check_routing(x: Array, expert: Array, weight: Array, valid: Array | None) -> None:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has shape {x.shape} and dtype {x.dtype}: it must be floating-point [T, D]")
    if expert.ndim != 2 or expert.shape[0] != x.shape[0] or not jnp.issubdtype(expert.dtype, jnp.integer):
        raise ValueError(
            f"expert has shape {expert.shape} and dtype {expert.dtype}: it must hold integers, [{x.shape[0]}, K], "
            f"one row for each token of x.shape={x.shape}"
        )
    if weight.shape != expert.shape or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"weight has shape {weight.shape} and dtype {weight.dtype}: it must hold one floating-point number for "
            f"each entry of expert.shape={expert.shape}"
        )
    if valid is not None and (valid.shape != expert.shape or valid.dtype != bool):
        raise ValueError(
            f"valid has shape {valid.shape} and dtype {valid.dtype}: it must hold one bool for each entry of "
            f"expert.shape={expert.shape}, or be None to keep all"
        )


def _check_params(x: Array, params: Weights, activation: str) -> None:
    check_gate(params, activation)
    if params.up.ndim != 3 or params.up.shape[0] == 0:
        raise ValueError(f"up.shape={params.up.shape} must be [E, D, F] with at least one expert")
    check_weights("x", x, params, x.shape[1])
