"""``virtual_ranks=R`` on one device decides, pair by pair, what R ranks of expert parallelism decide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import dispatch, limits
from moejax.config import ConfigError
from moejax.routing import token_mask
from moejax.sharding import batch_sharding
from moejax.types import pytree
from tests import moe_fakes as fakes
from tests.moe_fakes import DIM, context, router_config
from tests.small import quick_compilation
from tests.test_dispatch_ep import mesh_of

B, S = 8, 6
MASK = np.arange(S)[None] < np.asarray([6, 5, 6, 2, 6, 0, 6, 6])[:, None]
ORDERS = ("score", "order", "reverse", "random")


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


@pytree
class AddLocal:
    """Appends a column for each expert of the rank, valid where the router had not chosen it; then at random."""

    def __call__(self, routing, ctx):
        local, tokens = ctx.local_experts, routing.expert.shape[0]
        expert = jnp.broadcast_to(local, (tokens, local.size))
        new = ~jnp.any(routing.expert[:, :, None] == local, axis=1) & token_mask(ctx, tokens)[:, None]
        new &= jax.random.bernoulli(ctx.key, 0.7, new.shape)
        score = jnp.take_along_axis(routing.probs, expert, axis=1)
        join = lambda a, b: jnp.concatenate([a, b], axis=1)  # noqa: E731
        return dataclasses.replace(
            routing, expert=join(routing.expert, expert), weight=join(routing.weight, score),
            score=join(routing.score, score), valid=join(routing.valid, new),
        )  # fmt: skip


def hidden():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, S, DIM)), jnp.float32)


def decisions(layer, x, mask, in_force, *, train=False):
    """Made and kept pairs of each limit, with the flat rank on the leading axis; and the metrics."""
    ctx = context(mask, key=jax.random.key(7), train=train, record=True)

    def one(limit):
        flight = layer.begin(x, ctx, (limit,))
        return flight.record, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), flight.metrics)

    return [one(limit) for limit in in_force]


def on(sizes, layer, in_force, **more):
    run = jax.jit(lambda layer, x, mask: decisions(layer, x, mask, in_force, **more))
    if sizes == (1, 1, 1):
        return jax.device_get(run(layer, hidden(), MASK))
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        x, mask = (jax.device_put(jnp.asarray(a), batch_sharding(mesh)) for a in (hidden(), MASK))
        return jax.device_get(run(layer, x, mask))


def assert_same_decisions(got, expected):
    for (a, metrics), (b, expected_metrics) in zip(got, expected, strict=True):
        for table, other in ((a.made, b.made), (a.kept, b.kept)):
            for name in ("expert", "valid", "token"):
                np.testing.assert_array_equal(getattr(table, name), getattr(other, name), err_msg=name)
            np.testing.assert_allclose(table.weight, other.weight, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(a.key, b.key)
        for name in ("tokens", "routed", "computed", "dropped", "added", "lost_tokens"):
            np.testing.assert_array_equal(getattr(metrics, name), getattr(expected_metrics, name), err_msg=name)


ALL_LIMITS = (*(limits.token_drop(0.75, order) for order in ORDERS), AddLocal())


SOME_LIMITS = ALL_LIMITS[3:]  # at random, and with columns of the rank's own experts


@pytest.mark.parametrize(
    ("data", "ranks", "in_force"),
    [
        (2, 4, SOME_LIMITS),
        *(pytest.param(*p, ALL_LIMITS, marks=pytest.mark.slow) for p in [(1, 2), (1, 4), (2, 4), (4, 2), (1, 8)]),
    ],
)
def test_virtual_ranks_keep_the_pairs_of_real_ones(data, ranks, in_force):
    real = on((data, ranks, 1), fakes.small_layer(dispatcher="ep"), in_force)
    virtual = on((data, 1, 1), fakes.small_layer(virtual_ranks=ranks), in_force)
    assert real[0][0].kept.valid.shape[0] == data * ranks
    assert_same_decisions(virtual, real)
    for _, metrics in real[:-1]:
        assert 0 < float(metrics.dropped) < float(metrics.routed.sum())
    assert float(real[-1][1].added) > 0


def test_tokens_need_not_divide_where_nothing_sees_ranks():
    """As in decoding, one token at a time."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, fakes.DIM)), jnp.float32)
    run = jax.jit(lambda layer, limit: layer(x, context(jnp.ones((1, 5), bool)), limit)[0], static_argnums=1)
    some, one = (fakes.small_layer(virtual_ranks=ranks) for ranks in (4, 1))
    np.testing.assert_array_equal(run(some, ()), run(one, ()))
    with pytest.raises(ConfigError, match="virtual_ranks=4 does not divide the 5 tokens"):
        some(x, context(jnp.ones((1, 5), bool)), (limits.token_drop(1.0),))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noisy_topk", "expert_choice"])
def test_routers_decide_on_virtual_ranks_too(name):
    """Noise is drawn by each rank, and an expert chooses among each rank's tokens."""
    router = router_config(name, jitter=0.0 if name == "expert_choice" else 0.01)
    real = on((1, 2, 1), fakes.small_layer(router, dispatcher="ep"), ALL_LIMITS[:1], train=True)
    virtual = on((1, 1, 1), fakes.small_layer(router, virtual_ranks=2), ALL_LIMITS[:1], train=True)
    assert_same_decisions(virtual, real)


@pytest.mark.slow
def test_outputs_are_those_of_the_pairs_kept():
    """The merged table names the right tokens: emulated ranks, which exchange, and virtual ones, which do not."""
    limit = SOME_LIMITS
    run = jax.jit(lambda layer, x: layer(x, context(MASK, key=jax.random.key(7)), limit))
    virtual, metrics = run(fakes.small_layer(virtual_ranks=4, implementation="ref"), hidden())
    with dispatch.emulated(4):
        real, expected = run(fakes.small_layer(dispatcher="ep", implementation="ref"), hidden())
    assert float(metrics.added) > 0 and float(metrics.dropped) > 0
    fakes.assert_close(metrics, expected)
    np.testing.assert_allclose(np.where(MASK[..., None], virtual, 0), np.where(MASK[..., None], real, 0), atol=1e-5)


def test_one_virtual_rank_changes_nothing():
    x = hidden()
    programs = [
        str(jax.make_jaxpr(lambda x, m=m: m(x, context(MASK))[0])(x))
        for m in (fakes.small_layer(virtual_ranks=1), fakes.small_layer())
    ]
    assert programs[0] == programs[1]


def test_tokens_that_do_not_divide_are_refused():
    layer = fakes.small_layer(virtual_ranks=4)
    with pytest.raises(ConfigError, match=r"moe\.virtual_ranks=4 does not divide the 6 tokens"):
        jax.eval_shape(lambda x: layer(x, context(), ALL_LIMITS[:1]), hidden()[:1])
