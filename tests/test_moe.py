"""The MoE layer against NumPy, and the same layer and model on meshes of 8 emulated devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import dispatch, limits
from moejax.config import MeshConfig
from moejax.moe import MoELayer
from moejax.partition import Identity
from moejax.sharding import Rules, batch_sharding, make_mesh, tree_shardings
from tests import moe_fakes as fakes
from tests.moe_fakes import DIM, EXPERTS, context

MESHES = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)]
B, S = 8, 4
MASK = np.arange(S)[None] < np.asarray([4, 3, 4, 1, 4, 2, 4, 4])[:, None]


def hidden(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, S, DIM)), jnp.float32)


forward = fakes.jit(lambda layer, x, mask: layer(x, context(mask)))


def by_numpy(layer, x):
    """Top-2 of the softmax, renormalised, and the shared experts."""
    x = fakes.f64(x).reshape(-1, DIM)
    p = fakes.softmax(x @ fakes.f64(layer.router.weights()["kernel"]))
    expert = fakes.topk_rows(p, 2)
    weight = np.take_along_axis(p, expert, 1)
    weight = weight / weight.sum(1, keepdims=True)
    made = fakes.table(expert, weight, weight, np.ones_like(expert), EXPERTS)
    y = fakes.moe(x, made, fakes.experts_of(layer), layer.activation)
    if layer.shared is not None:
        gate = None if layer.shared.gate is None else fakes.f64(layer.shared.gate[...])
        shared = fakes.ffn(
            x, fakes.f64(layer.shared.up[...]), gate, fakes.f64(layer.shared.down[...]), layer.activation
        )
        if layer.shared_gate is not None:
            shared = fakes.sigmoid(x @ fakes.f64(layer.shared_gate[...])) * shared
        y = y + shared
    return y.reshape(B, S, DIM)


@pytest.mark.parametrize(
    ("activation", "shared", "gate"),
    [("swiglu", 2, "none"), ("geglu", 1, "sigmoid"), ("gelu", 0, "none"), ("relu", 1, "sigmoid")],
)
def test_the_layer_equals_numpy(activation, shared, gate):
    layer = fakes.small_layer(activation=activation, shared_experts=shared, shared_gate=gate)
    assert (layer.shared_gate is not None) == (gate == "sigmoid")
    if shared:
        assert layer.shared.up.shape == (DIM, shared * fakes.EXPERT_DIM)  # fused
    y, metrics = forward(layer, hidden(), np.ones((B, S), bool))
    np.testing.assert_allclose(y, by_numpy(layer, hidden()), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(metrics.routed, metrics.computed)
    assert float(metrics.routed.sum()) == 2 * B * S and metrics.tokens == B * S
    assert metrics.dropped == metrics.added == metrics.overflow == metrics.lost_tokens == 0


def test_bfloat16_computes_experts_but_not_the_router():
    """5e-3 is the bound that DESIGN sets for bfloat16 kernels: the norm of the error over that of the result."""
    layer = fakes.small_layer()
    x = hidden().astype(jnp.bfloat16)
    y, metrics = forward(layer, x, np.ones((B, S), bool))
    wide, wide_metrics = forward(layer, x.astype(jnp.float32), np.ones((B, S), bool))
    assert y.dtype == jnp.bfloat16
    fakes.assert_close(metrics, wide_metrics, rtol=1e-6)  # the router saw the same numbers in the same precision
    error = np.linalg.norm(np.asarray(y, np.float32) - wide) / np.linalg.norm(wide)
    assert 0 < error < 5e-3


def test_a_transform_that_does_nothing_changes_nothing():
    plain = fakes.small_layer(implementation="ref")
    layer = jax.tree.map(lambda leaf: leaf, plain)
    layer.transforms = (Identity(),)
    fakes.assert_same(forward(layer, hidden(), MASK), forward(plain, hidden(), MASK))


def test_in_flight_leaves_have_a_leading_shard_axis():
    layer = fakes.small_layer(implementation="ref")
    flight = jax.eval_shape(lambda layer, x: layer.begin(x, context()), layer, hidden())
    assert {leaf.shape[0] for leaf in jax.tree.leaves(flight)} == {1}
    assert flight.xs.shape == (1, 2 * B * S, DIM)


# --- meshes -------------------------------------------------------------------------------------------------


def mesh_of(sizes):
    data, expert, model = sizes
    return make_mesh(MeshConfig(data=data, expert=expert, model=model))


def placed(module, mesh):
    """The module's arrays where the rules put them."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.device_put(state, tree_shardings(state, mesh)))


def assert_as_on_one_device(got, expected):
    """Gradients are sums over devices in another order: 1e-5 of the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def layer_value_and_grad(layer, x, mask, limit):
    def loss(layer, x):
        y, metrics = layer(x, context(mask, key=jax.random.key(0)), limit)
        return jnp.sum(jnp.where(mask[..., None], y, 0) ** 2) + metrics.z_sum, (y, metrics)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


@functools.cache
def mesh_layer() -> MoELayer:
    return fakes.small_layer(shared_experts=1, shared_gate="sigmoid", implementation="ref")


@functools.cache
def layer_on_one_device():
    return fakes.jit(layer_value_and_grad)(mesh_layer(), hidden(), MASK, ())


# (2, 2, 2) has all axes, the whole model below runs on (2, 4, 1), and so does the layer of
# tests/test_moe_zero_experts.py: the others are slow.
@pytest.mark.parametrize("sizes", [pytest.param(m, marks=() if m == (2, 2, 2) else pytest.mark.slow) for m in MESHES])
def test_the_layer_on_a_mesh_equals_one_device(sizes):
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        assert dispatch.token_shards() == sizes[0] * sizes[1]
        x = jax.device_put(hidden(), batch_sharding(mesh))
        got = fakes.jit(layer_value_and_grad)(placed(mesh_layer(), mesh), x, jnp.asarray(MASK), ())
    assert_as_on_one_device(got, layer_on_one_device())


@functools.cache
def model_case():
    model = fakes.small_model(moe={"num_experts": 8, "shared_experts": 1})
    return model, jnp.asarray(fakes.tokens(B, S))


def model_value_and_grad(model, tokens, mask):
    def loss(model):
        out = model(tokens, mask=mask)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits), jnp.roll(tokens, -1, 1)[..., None], 2)[..., 0]
        return -jnp.sum(picked * mask) + jnp.sum(out.metrics.z_sum), (out.logits, out.metrics)

    return jax.value_and_grad(loss, has_aux=True)(model)


@functools.cache
def model_on_one_device():
    return fakes.jit(model_value_and_grad)(*model_case(), jnp.asarray(MASK))


@pytest.mark.parametrize("sizes", [pytest.param(m, marks=() if m == (2, 4, 1) else pytest.mark.slow) for m in MESHES])
def test_the_model_on_a_mesh_equals_one_device(sizes):
    mesh = mesh_of(sizes)
    model, tokens = model_case()
    with jax.set_mesh(mesh):
        sharding = batch_sharding(mesh)
        tokens, mask = jax.device_put(tokens, sharding), jax.device_put(jnp.asarray(MASK), sharding)
        got = fakes.jit(model_value_and_grad)(placed(model, mesh), tokens, mask)
    assert_as_on_one_device(got, model_on_one_device())


@functools.partial(fakes.jit, static_argnums=4)
def limited(layer, x, mask, limit, mesh):
    del mesh  # only to be traced once for each
    return layer(x, context(mask, key=jax.random.key(0)), limit)


@pytest.mark.parametrize("order", ["score", "random"])
def test_limits_act_on_each_shard_alone(order):
    """The pairs kept are those of each device's tokens run by themselves: no synchronisation (2503.05066)."""
    layer, mesh, limit = fakes.small_layer(implementation="ref"), mesh_of((2, 4, 1)), (limits.token_drop(0.75, order),)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, 12, DIM)), jnp.float32)
    mask = jnp.arange(12)[None] < jnp.asarray([12, 9, 12, 5, 12, 12, 1, 12])[:, None]
    alone = [limited(layer, x[i : i + 1], mask[i : i + 1], limit, None) for i in range(B)]
    with jax.set_mesh(mesh):
        y, metrics = limited(layer, jax.device_put(x, batch_sharding(mesh)), mask, limit, mesh)
    together = jax.tree.map(lambda *leaves: sum(leaves), *[m for _, m in alone])
    counted = ("tokens", "routed", "computed", "dropped", "added", "overflow")
    fakes.assert_close([getattr(metrics, f) for f in counted], [getattr(together, f) for f in counted])
    assert 0 < float(metrics.dropped) < float(metrics.routed.sum())
    if order == "score":
        np.testing.assert_allclose(y, np.concatenate([y for y, _ in alone]), rtol=1e-5, atol=1e-6)
    else:  # each device draws its own numbers: equal shards lose different pairs
        with jax.set_mesh(mesh):
            rows = np.asarray(limited(layer, jnp.broadcast_to(x[:1], x.shape), mask | True, limit, mesh)[0])
        assert any(not np.allclose(rows[0], row, atol=1e-3) for row in rows[1:])


def test_two_dimensions_of_an_array_cannot_share_a_mesh_axis():
    with pytest.raises(ValueError, match="collide on mesh axes"):
        Rules(embed="model").spec(("embed", "ffn"))
    with pytest.raises(ValueError, match=r"\['nobody'\] have no rule"):
        Rules().spec(("nobody",))
