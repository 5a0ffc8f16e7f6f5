"""What each neuron of a layer's experts does: the sums behind its importance (DualSparse-MoE, 2508.18376, section 3.2).

Neuron n of an expert is column n of ``gate`` and ``up`` with row n of ``down``. Over the pairs of token and expert::

    gate         sum act(x gate_n)               gate_abs     sum |act(x gate_n)|
    gate_up      sum h_n                         gate_up_abs  sum |h_n|
    output       sum w |h_n| * ||down_n||        h_n = act(x gate_n) (x up_n), w the gate weight of the pair

The first four are the paper's. ``output`` is ours: what a neuron adds to the layer's output is ``w h_n down_n``, and
this is the sum of its norms. Biases are part of what is activated. Without a gate (gelu, relu) ``act(x up_n)`` takes
the place of both ``act(x gate_n)`` and h_n: gate and gate_up are one then, and so are their absolute forms. For
swiglu_clamped the activated gate is ``c sigmoid(1.702 c)``, with c the clamped one.

Letters: P rows (pairs) sorted by expert, D model, F expert hidden, E experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import kernels_pallas as kernels
from moejax import dispatch
from moejax.config import ConfigError, MoEConfig
from moejax.experts import activate
from moejax.types import Activation, ExpertWeights, InFlight, NeuronSums

METRICS = ("gate", "gate_abs", "gate_up", "gate_up_abs", "output")


def of_layer(flight: InFlight, weights: ExpertWeights, activation: Activation, config: MoEConfig) -> NeuronSums:
    """The sums of one layer over all devices, of what ``begin`` dispatched and ``compute`` has not computed yet.

    Raises:
      ConfigError: pairs are not in order of expert on the device that has the tokens.
    """
    if dispatch.in_force(config) != dispatch.OneRank("local"):
        raise ConfigError(
            f"moe.dispatcher={config.dispatcher!r}: neurons are measured where the tokens are: set it to 'local', "
            "which computes the same"
        )

    def on_shard(xs: Array, weight: Array, pairs: Array, sizes: Array, weights: ExpertWeights) -> NeuronSums:
        with jax.named_scope("neurons"):
            of_row = weight.reshape(-1).at[pairs[0]].get(mode="fill", fill_value=0)
            return sums(xs[0], of_row, sizes[0], weights, activation, config.implementation)

    plan = flight.plan
    assert not isinstance(plan, tuple)  # those of "ep"
    arrived = (flight.xs, flight.weight, plan.pair_of_row, plan.group_sizes)
    made = dispatch.per_shard(on_shard, arrived, weights)
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), made)


def sums(
    xs: Float[Array, "P D"],
    weight: Float[Array, "P"],
    group_sizes: Int[Array, "E"],
    weights: ExpertWeights,
    activation: Activation,
    implementation: str = "auto",
) -> NeuronSums:
    """The sums over rows that are sorted by expert, in float32; rows beyond ``sum(group_sizes)`` are in none of them.

    Args:
      xs: what the experts compute; matmuls are in its type, as in the layer, and accumulate in float32.
      weight: gate weight of each row's pair.
      implementation: back end of the grouped matmul.
    """
    if group_sizes.shape[0] != weights.up.shape[0]:
        raise ValueError(f"{group_sizes.shape[0]} groups of rows for {len(weights.up)} experts: measure without limits")
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(xs.shape[0])[:, None]
    of_expert = ((row >= ends - group_sizes) & (row < ends)).astype(jnp.float32)  # [P, E]
    held = row < ends[-1]

    def product(matrix: Array | None, bias: Array | None) -> Array | None:
        if matrix is None:
            return None
        made = kernels.grouped_matmul(
            xs, matrix.astype(xs.dtype), group_sizes, preferred_element_type=jnp.float32,
            implementation=None if implementation == "auto" else implementation,
        )  # fmt: skip
        made = jnp.where(held, made, 0.0)  # rows of no pair may hold NaN
        return made if bias is None else made + exactly(of_expert, bias.astype(xs.dtype).astype(jnp.float32))

    gate, up = product(weights.gate, weights.gate_bias), product(weights.up, weights.up_bias)
    assert up is not None
    hidden = activate(activation, up, gate)
    neutral = jnp.zeros_like(up) if activation == "swiglu_clamped" else jnp.ones_like(up)  # which multiplies by up + 1
    activated = hidden if gate is None else activate(activation, neutral, gate)

    def total(values: Float[Array, "P F"]) -> Float[Array, "E F"]:
        return exactly(of_expert.T, values)

    weighted = total(weight.astype(jnp.float32)[:, None] * jnp.abs(hidden))
    return NeuronSums(
        gate=total(activated),
        gate_abs=total(jnp.abs(activated)),
        gate_up=total(hidden),
        gate_up_abs=total(jnp.abs(hidden)),
        output=weighted * jnp.linalg.norm(weights.down.astype(jnp.float32), axis=-1),
        pairs=group_sizes.astype(jnp.float32),
    )


def exactly(a: Float[Array, "N K"], b: Float[Array, "K M"]) -> Float[Array, "N M"]:
    """A product in float32 proper: one factor is zeros and ones."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
