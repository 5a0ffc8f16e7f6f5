"""Efficient Expert Pruning (EEP, 2402.14800, section 3.2): which experts of each layer may go for good.

For each layer every set of r experts is tried on calibration text, and the one stays whose layer output is closest to
that of all experts: the Frobenius norm of the difference, summed over batches. A layer's input is that of the whole
model, whatever is pruned before it (the published ``layerwise_pruning``). The router chooses among what is left, as if
the others had a score of 0: a family that renormalises does so over those.

It costs C(E, r) combinations of outputs that are computed once, so it is for few experts (Mixtral's 8).

Letters: E experts, r of them kept, N sets of them, T tokens, D model, L MoE layers, G ranks.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moejax import experts, routing
from moejax.config import ConfigError, ModelConfig
from moejax.data import Batch
from moejax.model import Decoder, layer_groups
from moejax.moe import MoELayer
from moejax.partition.complete import prune
from moejax.types import Activation, ExpertWeights, RouteContext, Routing

MOST_SETS = 5_000
"""Sets of experts that are tried for one layer, at most."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which experts stay."""

    kept: Int[np.ndarray, "L r"]
    """Ids, ascending."""
    error: Float[np.ndarray, "L"]
    """Norm of what the layer's output changes by, over that of its output."""
    sets: int
    """How many were tried for each layer."""


def sets_of(model: ModelConfig, kept: int) -> Int[np.ndarray, "N r"]:
    """All sets of ``kept`` experts, in lexical order.

    Raises:
      ConfigError: too many of them, or a layer whose outputs are not a weighted sum of experts that stand alone.
    """
    moe = model.moe
    if not moe.router.k <= kept < moe.num_experts:
        raise ConfigError(
            f"kept={kept}: experts that stay, from router.k={moe.router.k} to {moe.num_experts - 1} of "
            f"moe.num_experts={moe.num_experts}"
        )
    if moe.parts > 1 or moe.router.copies > 1 or moe.router.groups > 1 or moe.zero_experts:
        raise ConfigError(
            f"moe.parts={moe.parts}, router.copies={moe.router.copies}, router.groups={moe.router.groups}, "
            f"moe.zero_experts={moe.zero_experts}: experts are pruned where each stands alone; merge parts first "
            "(experiments.partition --form=merge), and prune no grouped router and no zero-computation experts"
        )
    if moe.weigh != "output" or not routing.FAMILIES[moe.router.name].causal:
        raise ConfigError(
            f"moe.weigh={moe.weigh!r}, router.name={moe.router.name!r}: experts are pruned by what each adds to a "
            "token's output, so weights must multiply outputs and rows be tokens"
        )
    if (number := math.comb(moe.num_experts, kept)) > MOST_SETS:
        raise ConfigError(
            f"kept={kept} of moe.num_experts={moe.num_experts}: {number:,} sets of experts, and each is tried in every "
            f"layer (at most {MOST_SETS:,}): pruning by enumeration is for few experts; keep another number of them"
        )
    return np.asarray(list(itertools.combinations(range(moe.num_experts), kept)), np.int32)


def outputs(
    x: Float[Array, "T D"], weights: ExpertWeights, activation: Activation, implementation: str = "auto"
) -> Float[Array, "E T D"]:
    """What every expert makes of every token."""
    num_experts, tokens = weights.up.shape[0], x.shape[0]
    sizes = jnp.full(num_experts, tokens, jnp.int32)
    made = experts.grouped_ffn(jnp.tile(x, (num_experts, 1)), sizes, weights, activation, implementation)
    return made.reshape(num_experts, tokens, -1).astype(jnp.float32)


def combined(routed: Routing, made: Float[Array, "E T D"]) -> Float[Array, "T D"]:
    """The weighted sum over each token's experts."""
    hit = routed.expert[..., None] == jnp.arange(made.shape[0], dtype=routed.expert.dtype)
    gates = jnp.sum(jnp.where(hit & routed.valid[..., None], routed.weight[..., None], 0.0), axis=1)  # [T, E]
    return jnp.einsum("te,etd->td", gates, made, precision=jax.lax.Precision.HIGHEST)


def set_errors(
    layer: MoELayer, x: Float[Array, "T D"], mask: Bool[Array, "T"], sets: Int[Array, "N r"]
) -> tuple[Float[Array, "N"], Float[Array, ""]]:
    """Frobenius norm of the change of the routed experts' output by each set that stays, and of the output itself."""
    config, ctx = layer.router.config, RouteContext(mask=mask)
    arrays, route = layer.router.weights(), layer.router.family.route
    specs = routing.router_arrays(config, x.shape[1], layer.config.num_experts)
    made = outputs(x, layer.store.get(), layer.activation, layer.config.implementation)
    whole = combined(route(x, arrays, ctx, config), made)

    def error(kept: Int[Array, "r"]) -> Float[Array, ""]:
        left = {name: jnp.take(array, kept, axis=specs[name].axes.index("router")) for name, array in arrays.items()}
        return jnp.linalg.norm(combined(route(x, left, ctx, config), made[kept]) - whole)

    return jax.lax.map(error, sets), jnp.linalg.norm(whole)


def moe_layers(model: Decoder) -> list[MoELayer]:
    """The MoE layers of a decoder in order, each on its own."""
    found = []
    for group, (pattern, repeats) in zip(model.groups, layer_groups(model.config), strict=True):
        for i in range(repeats):
            blocks = [b for b, is_moe in zip(group.blocks, pattern, strict=True) if is_moe]
            found += [jax.tree.map(lambda leaf, i=i: leaf[i], block.moe) for block in blocks]
    return found


def inputs_fn(model_def: nnx.GraphDef, mesh: jax.sharding.Mesh) -> Callable[..., Float[Array, "L G t D"]]:
    """A compiled ``(params, router_state, batch) ->`` what each MoE layer reads, without limits."""

    @jax.jit
    def run(params: nnx.State, router_state: nnx.State, batch: dict) -> Array:
        out = nnx.merge(model_def, params, router_state)(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], mask=batch["mask"],
            limits=(), record="inputs",
        )  # fmt: skip
        return out.routing.inputs

    def read(*arguments: Any) -> Array:
        with jax.set_mesh(mesh):
            return run(*arguments)

    return read


def choose(
    model_def: nnx.GraphDef,
    params: nnx.State,
    router_state: nnx.State,
    batches: Iterable[Batch],
    kept: int,
    mesh: jax.sharding.Mesh,
    put: Callable[[dict], dict],
) -> Choice:
    """The experts of each layer that stay, ``kept`` of them.

    Args:
      batches: calibration text.
      put: places a batch on the devices of ``mesh``.

    Raises:
      ConfigError: as :func:`sets_of`; or there is no text.
    """
    model = nnx.merge(model_def, params, router_state)
    sets = sets_of(model.config, kept)
    layers, read = moe_layers(model), inputs_fn(model_def, mesh)
    errors, whole = np.zeros((len(layers), len(sets))), np.zeros(len(layers))
    measure = jax.jit(set_errors)
    batch = None
    for batch in batches:
        given = put({name: batch[name] for name in ("tokens", "positions", "segment_ids", "mask")})
        inputs = jax.device_get(read(params, router_state, given))
        mask = np.asarray(batch["mask"]).reshape(-1)
        for i, layer in enumerate(layers):
            error, norm = measure(layer, inputs[i].reshape(-1, inputs.shape[-1]), mask, sets)
            errors[i] += np.asarray(error)
            whole[i] += float(norm)
    if batch is None:
        raise ConfigError("pruning experts needs calibration text, and there is none: give a split with text")
    best = errors.argmin(axis=1)  # of equal ones the first set
    return Choice(sets[best], errors.min(axis=1) / np.maximum(whole, 1e-20), len(sets))


def pruned(
    arrays: Mapping[str, Any], model: ModelConfig, kept: Int[np.ndarray, "L r"]
) -> tuple[dict[str, Any], ModelConfig]:
    """The arrays of a checkpoint, by path, with only the experts ``kept`` of each MoE layer, and the model that they
    are of. Those of an optimizer go.

    Raises:
      ConfigError: as :func:`moejax.partition.complete.prune`; or there are multi-token-prediction modules.
    """
    if model.mtp_layers:
        raise ConfigError(
            f"model.mtp_layers={model.mtp_layers}: its experts were not measured, so they cannot be pruned; set it to 0"
        )
    made = {name: array for name, array in arrays.items() if not name.startswith("opt_state/")}
    moe, first = model.moe, 0
    for g, (pattern, repeats) in enumerate(layer_groups(model)):
        places = [b for b, is_moe in enumerate(pattern) if is_moe]
        for i, b in enumerate(places):
            ids = kept[first + i : first + len(places) * repeats : len(places)]  # of each repeat
            stem = f"groups/{g}/blocks/{b}/moe/"
            mine = {name: name.partition(stem)[2] for name in made if stem in name}
            layers = [prune({mine[n]: made[n][j] for n in mine}, model.moe, its) for j, its in enumerate(ids)]
            made |= {name: np.stack([arrays[mine[name]] for arrays, _ in layers]) for name in mine}
            moe = layers[0][1]
        first += len(places) * repeats
    return made, dataclasses.replace(model, moe=moe)
