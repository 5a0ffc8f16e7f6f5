"""Seams compose: every pair of seams, each at its default and off it, on a two-layer model in training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses, validate
from tests import moe_fakes as fakes
from tests.moe_fakes import model_config, router_config

# Columns: router, limit, dispatcher, placement, shared experts, experts (biases and clamped swiglu), zero-computation
# experts, wiring, settings of the router (bias, and groups where it has them). 0 is the default. Off it, several values
# take turns.
PLACEMENT, WIRING = 3, 7
ROWS = [
    ((0, 0, 0, 0, 0, 0, 0, 0, 0), {}),
    ((1, 1, 1, 0, 1, 0, 0, 1, 0), {"router": "noisy_topk", "order": "random", "shared": "sigmoid"}),
    ((1, 1, 0, 1, 1, 1, 1, 0, 0), {"router": "expert_choice", "order": "reverse", "shared": "none"}),
    ((1, 0, 1, 1, 0, 1, 0, 0, 1), {"router": "sigmoid_bias", "dense": "layers"}),
    ((0, 1, 1, 1, 0, 0, 1, 0, 1), {"order": "score"}),
    ((0, 0, 0, 0, 1, 1, 1, 1, 1), {"shared": "sigmoid"}),
    ((1, 1, 1, 0, 0, 1, 0, 1, 0), {"router": "softmax_bias", "order": "score"}),
]


def test_the_rows_cover_every_pair_of_seams():
    for a, b in itertools.combinations(range(9), 2):
        pairs = set(itertools.product((0, 1), repeat=2))
        if (a, b) == (PLACEMENT, WIRING):  # the LongCat block has experts in every layer
            pairs.remove((1, 1))
        assert {(row[a], row[b]) for row, _ in ROWS} == pairs


@pytest.mark.parametrize(("row", "value"), ROWS, ids=lambda v: "".join(map(str, v)) if isinstance(v, tuple) else "")
def test_seams_compose(row, value):
    router, limit, dispatcher, placement, shared, experts, zero, wiring, settings = row
    name_of_router = value["router"] if router else "topk_of_softmax"
    flags = {}
    if settings:
        flags = {"bias": True, "groups": 2, "group_score": "max" if zero else "top2_sum"}
    moe = {
        "router": router_config(name_of_router, **flags),
        "capacity_factor": 0.75 if limit else 0.0,
        "capacity_order": value["order"] if limit else "score",
        "dispatcher": "dense" if dispatcher else "local",
        "first_dense": placement if "dense" not in value else 0,
        "dense_layers": (0,) if "dense" in value else (),
        "shared_experts": shared,
        "shared_gate": value["shared"] if shared else "none",
        "shared_dim": 12 * shared,
        "expert_bias": bool(experts),
        "zero_experts": 2 * zero,
    }
    changes = {"moe": moe, "wiring": "longcat" if wiring else "standard"}
    if experts:
        changes["activation"] = "swiglu_clamped"
    validate.check_model(model_config(**changes))
    model = fakes.small_model(**changes)
    tokens = jnp.asarray(fakes.tokens(2, 8))
    mask = np.arange(8)[None] < np.asarray([[8], [5]])

    @fakes.jit
    def run(model):
        def loss(model):
            out = model(tokens, mask=mask, key=jax.random.key(0), train=True)
            nll = -jnp.take_along_axis(jax.nn.log_softmax(out.logits), jnp.roll(tokens, -1, 1)[..., None], 2)[..., 0]
            return jnp.sum(nll * mask) + losses.total(out.metrics, dict(model.config.moe.losses))[0], out.metrics

        return jax.grad(loss, has_aux=True)(model)

    grads, m = jax.tree.map(np.asarray, run(model))
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(g).all(), name
        if "arrays.bias" not in name:  # the selection bias has no gradient; every other array of every layer has
            assert (np.abs(g).reshape(g.shape[0], -1).max(1) > 0).any(), name
    k, ids = model.config.moe.router.k, 4 + 2 * zero
    assert m.tokens.shape == (1 if placement else 2,) and (m.tokens == 13).all()
    np.testing.assert_array_equal(m.routed.sum(1), m.computed.sum(1) + m.dropped)
    assert (m.added == 0).all() and (m.overflow == 0).all()
    assert ((m.dropped > 0) == bool(limit)).all()
    per_layer = -(-13 * k // ids) * ids if name_of_router == "expert_choice" else 13 * k
    assert (m.zero_routed is not None) == bool(zero)
    free = m.zero_routed.sum(1) if zero else 0  # in no limit's hands, and in no row
    assert (m.routed.sum(1) + free == per_layer).all()
