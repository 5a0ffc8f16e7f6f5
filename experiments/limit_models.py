"""A whole model for ``experiments.limit_speed``: prefill on the devices of one host, by arm."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import ep_speed, rank_layers
from experiments.decode_speed import prompts, random_model
from experiments.drop_layers import compiled, gain, in_turn
from experiments.drop_scores import Setting
from experiments.limit_layers import BASE, How, Loads, families, loads_of, row_of
from experiments.speed import rate as per_second
from moejax import replicas, sharding
from moejax.model import Decoder
from moejax.results import ResultRow
from moejax.types import Limit

BATCH, CONTEXT = 8, 1024
"""Rows of each device, and their tokens."""
LOGITS = 0.25
"""Relative error of the logits: rounding moves a token's choice here and there, and later layers follow; an arm that
computes something else is off by their size."""


def prefill(model: Decoder, tokens: jax.Array, in_force: tuple[Limit, ...], record: bool = False) -> Any:
    """As :func:`moejax.decode.prefill`, with the model's report."""
    batch, context = tokens.shape
    lengths = jnp.full(batch, context, jnp.int32)
    cache = model.init_cache(batch, context)
    return model(tokens, cache=cache, limits=in_force, at=lengths - 1, prompt=lengths, record=record)


def output(model: Decoder, tokens: jax.Array, in_force: tuple[Limit, ...]) -> tuple[jax.Array, jax.Array, Any]:
    """What is timed: the logits after each row, pairs that found no room in a buffer, and the cache."""
    out = prefill(model, tokens, in_force)
    return out.logits[:, 0], jnp.sum(out.metrics.overflow), out.cache


def observed(model: Decoder, tokens: jax.Array, in_force: tuple[Limit, ...]) -> tuple[jax.Array, tuple]:
    """The logits, and what :func:`experiments.rank_layers.counted` needs of each layer."""
    out = prefill(model, tokens, in_force, record=True)
    made, kept = out.routing.made, out.routing.kept
    return out.logits[:, 0], (made.expert, kept.expert, kept.valid)


def model_of(setting: Setting, how: How, loads: Loads) -> Decoder:
    """A random model whose routers' logits are spread as those of :mod:`experiments.drop_scores`: the popularity of
    experts is a bias on them."""
    given = setting.config.model
    router = dataclasses.replace(given.moe.router, bias=True)
    config = dataclasses.replace(
        given, num_layers=how.layers or given.num_layers, vocab_size=given.vocab_size or 512,
        moe=dataclasses.replace(given.moe, expert_dim=setting.moe.expert_dim, losses=(), router=router),
    )  # fmt: skip
    model = random_model(config)
    for layer, numbers in replicas.moe_layers(model):
        arrays = layer.router.arrays
        kernel, bias = arrays["kernel"], arrays["logit_bias"]
        spread = setting.shape.scale / config.dim**0.5 / jnp.std(kernel[...])
        arrays["kernel"] = kernel.replace(kernel[...] * spread)
        arrays["logit_bias"] = bias.replace(jnp.asarray(np.stack([loads.means(int(i)) for i in numbers]), jnp.float32))
    return model


def with_moe(model: Decoder, k: int = 0, **changes: Any) -> Decoder:
    """The same arrays under another config of the MoE layers."""
    other = jax.tree.map(lambda leaf: leaf, model)
    moe = dataclasses.replace(model.config.moe, **changes)
    moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, k=k or moe.router.k))
    other.config = dataclasses.replace(model.config, moe=moe)
    for layer, _ in replicas.moe_layers(other):
        layer.config, layer.router.config = moe, moe.router
    return other


def model_rows(setting: Setting, mesh: Mesh, how: How, shared: dict[str, Any]) -> Iterator[ResultRow]:
    """Prefill of a whole model, a row for each arm but those of "topk_first"."""
    ranks, experts = mesh.size, setting.moe.num_experts
    loads = loads_of(setting, how.loads, ranks)
    model = model_of(setting, how, loads)
    config = model.config
    of_family = families(config.moe.router.k, how.model_factors)
    arms = [BASE, *(arm for name in how.families if name != "topk_first" for arm in of_family[name])]
    batch, context = (ranks, 16) if how.tiny else (ranks * BATCH, CONTEXT)
    tokens = jnp.asarray(prompts(config, batch, context))
    virtual = {arm.kind: with_moe(model, arm.k, virtual_ranks=ranks) for arm in arms}
    run = compiled({arm.kind: (observed, (virtual[arm.kind], tokens, arm.limits)) for arm in arms})
    expected, counts = {}, {}
    for arm in arms:
        y, decided = jax.device_get(run[arm.kind](virtual[arm.kind], tokens, arm.limits))
        expected[arm.label], counts[arm.label] = y, []
        for i, each in enumerate(zip(*decided, strict=True)):
            copies = rank_layers.placement(counts[BASE.label][i].before, ranks) if arm.copies else None
            of_each = rank_layers.of_ranks((*each, None), ranks)
            counts[arm.label].append(rank_layers.counted(*of_each, experts=experts, copies=copies))
    del run, virtual
    none = counts[BASE.label]
    bases = {False: rank_layers.placed(model, mesh)}
    if any(arm.copies for arm in arms):
        pairs = np.stack([c.before for c in none])
        bases[True] = replicas.with_copies(bases[False], pairs, mesh, rank_layers.EXTRA)
    del model
    with jax.set_mesh(mesh):
        where = jax.device_put(tokens, NamedSharding(mesh, P(sharding.TOKEN_AXES)))
        arguments = {}
        for arm in arms:
            # One step more than was counted: rounding moves a few pairs of later layers.
            room = max(c.factor for c in counts[arm.label]) + 1 / ep_speed.FITS
            mine = with_moe(bases[arm.copies], arm.k, dispatcher="ep", ep_buffer_factor=room)
            arguments[arm.label] = (mine, where, arm.limits)
        made = compiled({label: (output, given) for label, given in arguments.items()})
        errors, calls = {}, {}
        for arm in arms:
            y, overflow, _ = made[arm.label](*arguments[arm.label])
            y, wanted = np.asarray(y), expected[arm.label]
            errors[arm.label] = error = float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))
            if not error <= LOGITS or float(overflow):
                how.wrong.append(f"{setting.name}, {arm.label}: the logits differ by {error:.1e} from one device with "
                                 f"{ranks} virtual ranks, {float(overflow):g} pairs overflowed")  # fmt: skip
            else:
                calls[arm.label] = functools.partial(made[arm.label], *arguments[arm.label])
        if BASE.label not in calls:
            return
        times = in_turn(calls, max(2, how.repeats // 2), how.target_ms)
    skews = [rank_layers.skew_of(c.before, ranks) for c in none]
    before, routed = sum(c.work.max() for c in none), sum(c.kept for c in none)
    for arm in (arm for arm in arms if arm.label in times):
        mine, (speedup, interval) = counts[arm.label], gain(times[BASE.label], times[arm.label])
        speed, spans = per_second(batch * context, times[arm.label].seconds)
        after, kept = sum(c.work.max() for c in mine), sum(c.kept for c in mine)
        moe = arguments[arm.label][0].config.moe
        facts: dict[str, Any] = times[arm.label].fields() | rank_layers.predicted(speedup, after, before) | spans | {
            "predicted_by_layer": [float(b.work.max() / max(a.work.max(), 1)) for a, b in zip(mine, none, strict=True)],
            "drop_rate": 1 - kept / routed, "added_share": (sum(c.work.sum() for c in mine) - kept) / routed,
            **{name: float(np.mean([skew[name] for skew in skews])) for name in skews[0]},
            "tokens_per_s": speed, "ep_buffer_factor": moe.ep_buffer_factor,
            "sent": rank_layers.sent(moe, batch * context // ranks, ranks), "error": errors[arm.label], "ranks": ranks,
            "layers": config.num_layers, "batch": batch, "context": context,
        }  # fmt: skip
        yield row_of(shared, setting, loads, arm, "prefill", speedup, interval, facts)
