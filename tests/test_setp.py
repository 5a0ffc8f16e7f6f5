"""S-ETP: experts stored in parts (``moe.parts``) under plain expert parallelism, which may then have more ranks than
experts, against the dense reference and against true expert-tensor parallelism (``moejax.partition``)."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from moejax import checkpoint, dispatch, limits, partition, plan, validate
from moejax.checkpoint import Checkpoints
from moejax.config import ConfigError, MeshConfig, MoEConfig, RouterConfig
from moejax.moe import MoELayer
from moejax.sharding import batch_sharding
from moejax.train import Trainer
from tests import moe_fakes as fakes
from tests import test_checkpoint as checkpoints
from tests import test_plan as plans
from tests import test_virtual_ranks as ranks
from tests.small import flat, quick_compilation, small_config, small_model
from tests.test_dispatch_ep import hidden, mesh_of, placed, value_and_grad

FULL = jnp.ones(hidden().shape[:2], bool)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


# --- equal to the dense reference and to true expert-tensor parallelism ----------------------------------------------


@functools.cache
def whole(experts: int, bias: bool = False) -> MoELayer:
    router = fakes.router_config(k=min(2, experts), bias=True)
    made = fakes.small_layer(router, num_experts=experts, implementation="ref", dispatcher="ep", expert_bias=bias)
    made.router.arrays["logit_bias"][...] = -0.4 * jnp.arange(experts)  # busy experts and idle ones
    return made


def changed(layer: MoELayer, **moe) -> MoELayer:
    """The same layer under another config, with its weights cut as that stores them."""
    made = jax.tree.map(lambda leaf: leaf, layer)
    made.config = dataclasses.replace(layer.config, **moe)
    for name, value in dataclasses.asdict(partition.split(layer.store.get(), made.config.parts)).items():
        variable = getattr(made.store, name)
        setattr(made.store, name, None if value is None else variable.replace(value))
    return made


def run_on(layer: MoELayer, sizes: tuple[int, int, int], fn=value_and_grad):
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        x, mask = jax.device_put((hidden(), FULL), batch_sharding(mesh))
        return jax.device_get(jax.jit(fn)(placed(layer, mesh), x, mask))


def value(layer: MoELayer, x: jax.Array, mask: jax.Array):
    return layer(x, fakes.context(mask))


@functools.cache
def dense(experts: int, bias: bool = False):
    return jax.device_get(jax.jit(value_and_grad)(changed(whole(experts, bias), dispatcher="dense"), hidden(), FULL))


def assert_equal(got, expected, parts: int) -> None:
    """Output, metrics, and gradients: those of the parts are the parts of the gradient."""
    (y, metrics, (of_layer, of_x)), (y_, metrics_, (of_layer_, of_x_)) = got, expected
    cut = partition.split(of_layer_.store.get(), parts)
    if cut.down_bias is not None:  # each part adds its share of the bias, so each has the whole gradient
        cut = dataclasses.replace(cut, down_bias=parts * cut.down_bias)
    of_router, of_router_ = (jax.tree.leaves(made.router) for made in (of_layer, of_layer_))
    fakes.assert_close(
        (y, metrics, of_layer.store.get(), of_router, of_x), (y_, metrics_, cut, of_router_, of_x_), 1e-5, 1e-5
    )


def test_it_equals_the_dense_reference_and_true_expert_tensor_parallelism():
    """8 ranks, 4 experts: each holds a half of one."""
    got, expected = run_on(changed(whole(4), parts=2), (1, 8, 1)), dense(4)
    assert_equal(got, expected, 2)
    fakes.assert_close(run_on(whole(4), (1, 4, 2), value), expected[:2], 1e-5, 1e-5)
    assert float(got[1].computed.max()) > 1.25 * float(got[1].computed.mean()) and float(got[1].overflow) == 0


MORE = [(4, 2, (1, 8, 1), (1, 4, 2)), (2, 4, (1, 8, 1), (1, 2, 4)), (8, 2, (1, 8, 1), (1, 4, 2)),
        (2, 2, (2, 4, 1), (2, 2, 2))]  # fmt: skip
"""Experts, parts, the mesh of S-ETP and that of true expert-tensor parallelism."""


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "parts", "soft", "true"), MORE)
def test_gradients_of_all_three_are_equal(experts, parts, soft, true):
    assert_equal(run_on(changed(whole(experts), parts=parts), soft), dense(experts), parts)
    assert_equal(run_on(whole(experts), true), dense(experts), 1)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [{}, {"ep_exchange": "chunked", "ep_chunks": 3}])
def test_with_biases_chunks_and_a_rank_that_has_parts_of_two_experts(exchange):
    """3 experts in 4 parts over 4 ranks: the second has the last part of expert 0 and two of expert 1."""
    layer = changed(whole(3, bias=True), parts=4, **exchange)
    assert_equal(run_on(layer, (1, 4, 1)), dense(3, True), 4)


# --- buffers ----------------------------------------------------------------------------------------------------------


def test_buffers_hold_all_parts():
    rows, config = dispatch.buffer_rows, MoEConfig(num_experts=4, router=RouterConfig(k=2), parts=4)
    assert rows(config, (100, 8), 100, 8, 16, 4) == 200  # a rank has 2 of the 4 parts of one expert
    assert rows(config, (100, 8), 100, 16, 16, 4) == 100
    assert rows(config, (100, 8), 100, 2, 16, 4) == 800  # both choices' experts, whole
    factor = dataclasses.replace(config, ep_buffer_factor=1.0)
    assert rows(factor, (100, 8), 100, 8, 16, 4) == 104  # an even share of 100 x 2 x 4 rows, rounded up to 8


@pytest.mark.parametrize("form", ["stored", "split"])
def test_a_factor_is_of_the_rows_that_travel(form):
    """Halves are rows of their own too, whether the store holds them or the limit makes them."""
    moe = {"num_experts": 2, "expert_dim": 8, "ep_buffer_factor": 1.0, "dispatcher": "ep", "implementation": "ref"}
    layer = fakes.small_layer(fakes.router_config(k=2), parts=2 if form == "stored" else 1, **moe)
    limit = () if form == "stored" else (limits.threshold_drop(0.01, gap=0.0, form="split"),)
    degree = 4 if form == "stored" else 2
    with dispatch.emulated(degree):
        flight = jax.eval_shape(lambda layer, x: layer.begin(x, fakes.context(), limit), layer, hidden())
    tokens = FULL.size // degree
    assert flight.xs[0].shape == (degree, degree * tokens * 2 * 2 // degree, fakes.DIM)


# --- limits -----------------------------------------------------------------------------------------------------------


def small_in_parts(**moe) -> MoELayer:
    return fakes.small_layer(fakes.router_config(k=2), **{"num_experts": 4, "expert_dim": 8, "parts": 2} | moe)


KEPT = {
    "token_drop": limits.token_drop(0.75),
    "at random": limits.token_drop(0.75, "random"),
    "halved": limits.threshold_drop(0.45, gap=0.05, major=4),
    "by load": limits.threshold_drop(0.49, gap=0.02, major=4, load_aware="water", ranks=4),
    "a device's budget": limits.device_budget(0.75, ranks=4),
}


@pytest.mark.parametrize("names", [("by load",), pytest.param(tuple(KEPT), marks=pytest.mark.slow)])
def test_virtual_ranks_decide_as_more_ranks_than_experts(names):
    """Before pairs are spread over parts: the same pairs, pair by pair."""
    in_force = [KEPT[name] for name in names]
    real = ranks.on((1, 8, 1), small_in_parts(dispatcher="ep"), in_force)
    virtual = ranks.on((1, 1, 1), small_in_parts(virtual_ranks=8), in_force)
    ranks.assert_same_decisions(virtual, real)
    for _, metrics in real:
        assert 0 < float(metrics.dropped) < float(metrics.routed.sum())


REFUSED = {
    "expanded_drop:factor=1.5": "moe.capacity_limits: ExpandedDrop adds the experts of a token's own rank",
    "device_budget:factor=1,ranks=4,expanded=true": "DeviceBudget adds the experts of a token's own rank",
    "device_budget:factor=1": "DeviceBudget follows the loads of devices, .* say ranks=4",
    "measured_budget": "MeasuredBudget follows the loads of devices",
    "threshold_drop:threshold=0.1,load_aware=water": "ThresholdDrop follows the loads of devices",
}


@pytest.mark.parametrize("text", REFUSED)
def test_limits_that_need_whole_experts_are_refused(text):
    """By the config's checks on real and on virtual ranks, and in a layer that is given them, before it compiles."""
    model = small_model(capacity_limits=(text,), parts=2, dispatcher="ep")
    config = dataclasses.replace(small_config(model), mesh=MeshConfig(data=1, expert=8))
    with pytest.raises(ConfigError, match=REFUSED[text]):
        validate.check(config)
    (problem,) = plan.problems(config, config.mesh)
    assert problem.field == "model.moe.capacity_limits" and re.search(REFUSED[text], problem.text)
    virtual = dataclasses.replace(model.moe, dispatcher="local", virtual_ranks=8)
    with pytest.raises(ConfigError, match=REFUSED[text]):
        validate.check_model(dataclasses.replace(model, moe=virtual))
    with dispatch.emulated(8), pytest.raises(ConfigError, match="which experts its rank hosts"):
        jax.eval_shape(
            lambda layer, x: layer(x, fakes.context(), (limits.parse(text),)), small_in_parts(dispatcher="ep"), hidden()
        )
    # As many ranks as experts host whole ones.
    validate.check(dataclasses.replace(config, mesh=MeshConfig(data=1, expert=4)))


def test_limits_that_only_drop_are_not():
    for text in ("token_drop:factor=1", "threshold_drop:threshold=0.1", "device_budget:factor=1,ranks=4"):
        model = small_model(capacity_limits=(text,), parts=2, dispatcher="ep")
        validate.check(dataclasses.replace(small_config(model), mesh=MeshConfig(data=1, expert=8)))


def test_ranks_that_the_parts_do_not_divide_over_are_refused():
    config = small_config(small_model(parts=2, dispatcher="ep"))
    with pytest.raises(ConfigError, match=r"moe.num_experts=4 x moe.parts=2 not divisible by mesh axis 'expert'=3"):
        validate.check(dataclasses.replace(config, mesh=MeshConfig(data=1, expert=3)))
    found = plan.problems(config, MeshConfig(data=1, expert=3))
    assert "model.moe.num_experts x parts=8" in str(found[0])


# --- checkpoints ------------------------------------------------------------------------------------------------------


def in_parts(degree: int) -> Trainer:
    moe = dataclasses.replace(checkpoints.CONFIG.model.moe, num_experts=4, parts=2, dispatcher="ep")
    return checkpoints.trainer(MeshConfig(expert=degree), 8, moe=moe)


@pytest.mark.slow
def test_every_degree_reads_what_more_ranks_than_experts_saved(tmp_path):
    """8 ranks with half an expert each wrote, 2 with whole ones read: bit for bit, the optimizer's moments too."""
    writer = Checkpoints(tmp_path, keep=1)
    writer.save(7, checkpoints.state_of(in_parts(8), 7), {"step": 7}, score=None)
    writer.close()
    other, reader = in_parts(2), Checkpoints(tmp_path, writer=False)
    restored, _ = reader.restore(other.abstract, 7)
    reader.close()
    fakes.assert_same(flat(restored), flat(checkpoints.state_of(other, 7)))
    leaf = checkpoint.flatten(restored)["opt_state/1/0/mu/groups/1/blocks/1/moe/store/up"]
    assert leaf.shape[1] == 8 and leaf.addressable_shards[0].data.shape[1] == 4


# --- the dry run ------------------------------------------------------------------------------------------------------


def planned(factor: float = 0.0):
    moe = {"num_experts": 2, "parts": 2, "dispatcher": "ep", "router": RouterConfig(k=2), "ep_buffer_factor": factor}
    return plans.tiny(moe=moe)


@pytest.mark.parametrize("factor", [0.0, pytest.param(1.25, marks=pytest.mark.slow)])
def test_the_plan_counts_the_parts(factor):
    plans.check_kept(planned(factor), MeshConfig(data=2, expert=4))


@pytest.mark.slow
def test_a_training_step_is_planned_as_compiled():
    plans.compare_training(planned(), MeshConfig(data=2, expert=4))
