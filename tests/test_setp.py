"""S-ETP: experts stored in parts (``moe.parts``) under plain expert parallelism, which may then have more ranks than
experts, against the dense reference and against true expert-tensor parallelism (``moejax.partition``)."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import checkpoint, dispatch, experts, limits, partition, plan, validate
from moejax.checkpoint import Checkpoints
from moejax.config import ConfigError, MeshConfig, MoEConfig, RouterConfig
from moejax.moe import MoELayer
from moejax.sharding import ArraySpec, batch_sharding
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
    made = fakes.small_layer(
        router, num_experts=experts, implementation="ref", dispatcher="ep", expert_bias=bias,
        expert_dim=12 if bias else 8,
    )  # fmt: skip
    made.router.arrays["logit_bias"][...] = -0.4 * jnp.arange(experts)  # busy experts and idle ones
    return made


def changed(layer: MoELayer, **moe) -> MoELayer:
    """The same layer under another config, with its weights cut as that stores them."""
    made = jax.tree.map(lambda leaf: leaf, layer)
    made.config = dataclasses.replace(layer.config, **moe)
    cut = partition.split(layer.store.get(), made.config.parts, made.config.parts_apart)
    for name, value in dataclasses.asdict(cut).items():
        variable = getattr(made.store, name)
        setattr(made.store, name, None if value is None else variable.replace(value))
    return made


def run_on(layer: MoELayer, sizes: tuple[int, int, int], fn=value_and_grad, collectives: set[str] | None = None):
    """``collectives``: all that the program may have."""
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        args = (placed(layer, mesh), *jax.device_put((hidden(), FULL), batch_sharding(mesh)))
        run = jax.jit(fn).lower(*args).compile()
        made = set(re.findall(r" (all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute)", run.as_text()))
        assert collectives is None or made == collectives
        return jax.device_get(run(*args))


def value(layer: MoELayer, x: jax.Array, mask: jax.Array):
    return layer(x, fakes.context(mask))


@functools.cache
def dense(experts: int, bias: bool = False):
    return jax.device_get(jax.jit(value_and_grad)(changed(whole(experts, bias), dispatcher="dense"), hidden(), FULL))


def assert_equal(got, expected, parts: int, apart: bool = False) -> None:
    """Output, metrics, and gradients: those of the parts are the parts of the gradient."""
    (y, metrics, (of_layer, of_x)), (y_, metrics_, (of_layer_, of_x_)) = got, expected
    cut = partition.split(of_layer_.store.get(), parts, apart)
    if cut.down_bias is not None:  # each part adds its share of the bias, so each has the whole gradient
        cut = dataclasses.replace(cut, down_bias=parts * cut.down_bias)
    of_router, of_router_ = (jax.tree.leaves(made.router) for made in (of_layer, of_layer_))
    fakes.assert_close(
        (y, metrics, of_layer.store.get(), of_router, of_x), (y_, metrics_, cut, of_router_, of_x_), 1e-5, 1e-5
    )


def test_it_equals_the_dense_reference_and_true_expert_tensor_parallelism():
    """8 ranks, 4 experts: each holds a half of one, in both orders. Rows travel by all-to-all, weights not at all; sums
    are of metrics and of the router's gradient."""
    expected = dense(4)
    apart = changed(whole(4), parts=2, part_order="part")
    got = run_on(apart, (1, 8, 1), collectives={"all-to-all", "all-reduce"})
    assert_equal(got, expected, 2, apart=True)
    for layer, sizes in ((changed(whole(4), parts=2), (1, 8, 1)), (whole(4), (1, 4, 2))):
        fakes.assert_close(run_on(layer, sizes, value), expected[:2], 1e-5, 1e-5)
    assert float(got[1].computed.max()) > 1.25 * float(got[1].computed.mean()) and float(got[1].overflow) == 0


def test_parts_apart_lie_as_in_true_expert_tensor_parallelism():
    """Rank p 4 + g has part p of the experts of group g: what the devices of group g share by their axis."""
    soft, true = mesh_of((1, 8, 1)), mesh_of((1, 4, 2))
    here = placed(changed(whole(8), parts=2, part_order="part"), soft).store
    there = placed(whole(8), true).store
    for name in ("up", "gate", "down"):
        mine, theirs = (
            {shard.device: np.asarray(shard.data) for shard in getattr(store, name)[...].addressable_shards}
            for store in (here, there)
        )
        for (group, part), device in np.ndenumerate(true.devices[0]):
            rank = soft.devices[0, 4 * part + group, 0]
            assert mine[rank].shape == (2, *theirs[device].shape[1:])
            np.testing.assert_array_equal(mine[rank], theirs[device])


def test_a_seed_gives_the_same_experts_in_both_orders(monkeypatch: pytest.MonkeyPatch):
    def create(spec: ArraySpec, key: jax.Array, scale: float) -> nnx.Param:
        return nnx.Param(jnp.asarray(np.arange(np.prod(spec.shape), dtype=np.float32).reshape(spec.shape)))

    monkeypatch.setattr(experts, "create", create)  # random numbers would have to be compiled

    def made(apart: bool) -> dict[str, np.ndarray]:
        store = experts.DeviceStore(4, 3, 8, "gelu", jax.random.key(0), 1.0, bias=True, parts=2, apart=apart)
        return {n: np.asarray(leaf) for n, leaf in checkpoint.flatten(nnx.state(store)).items()}

    together, apart = made(False), made(True)
    for name, array in together.items():
        np.testing.assert_array_equal(
            apart[name], array.reshape(4, 2, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        )


MORE = [(4, 2, (1, 8, 1), (1, 4, 2)), (2, 4, (1, 8, 1), (1, 2, 4)), (8, 2, (1, 8, 1), (1, 4, 2)),
        (2, 2, (2, 4, 1), (2, 2, 2))]  # fmt: skip
"""Experts, parts, the mesh of S-ETP and that of true expert-tensor parallelism."""


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "parts", "soft", "true"), MORE)
def test_gradients_of_all_three_are_equal(experts, parts, soft, true):
    for order in ("expert", "part"):
        layer = changed(whole(experts), parts=parts, part_order=order)
        assert_equal(run_on(layer, soft), dense(experts), parts, order == "part")
    assert_equal(run_on(whole(experts), true), dense(experts), 1)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "experts", "parts", "degree"), [("expert", 3, 4, 4), ("part", 4, 3, 2)])
@pytest.mark.parametrize("exchange", [{}, {"ep_exchange": "chunked", "ep_chunks": 3}])
def test_with_biases_chunks_and_a_rank_that_has_parts_of_two_experts(exchange, order, experts, parts, degree):
    """3 experts in 4 parts over 4 ranks: the second has the last part of expert 0 and two of expert 1. With parts
    apart, of 4 experts in 3 parts over 2 ranks, the first has part 0 of all and part 1 of two."""
    layer = changed(whole(experts, bias=True), parts=parts, part_order=order, **exchange)
    assert_equal(run_on(layer, (1, degree, 1)), dense(experts, True), parts, order == "part")


# --- buffers ----------------------------------------------------------------------------------------------------------


def test_buffers_hold_all_parts():
    rows, config = dispatch.buffer_rows, MoEConfig(num_experts=4, router=RouterConfig(k=2), parts=4)
    assert rows(config, (100, 8), 100, 8, 16, 4) == 200  # a rank has 2 of the 4 parts of one expert
    assert rows(config, (100, 8), 100, 16, 16, 4) == 100
    assert rows(config, (100, 8), 100, 2, 16, 4) == 800  # both choices' experts, whole
    apart = dataclasses.replace(config, part_order="part")
    assert [rows(apart, (100, 8), 100, ranks, 16, 4) for ranks in (16, 8, 4, 2, 1)] == [100, 200, 200, 400, 800]
    assert rows(apart, (100, 1), 25, 8, 16, 4) == 100  # expert choice: rows are pairs, and may all be of one rank
    factor = dataclasses.replace(config, ep_buffer_factor=1.0)
    assert rows(factor, (100, 8), 100, 8, 16, 4) == 104  # an even share of 100 x 2 x 4 rows, rounded up to 8


@pytest.mark.parametrize(("experts", "parts", "k"), [(6, 2, 2), (6, 4, 3), (4, 3, 2)])
def test_the_worst_case_of_parts_apart_is_reached_and_not_exceeded(experts: int, parts: int, k: int):
    """Of all choices of a token, for every number of ranks, also where a rank has experts of two parts."""
    config = MoEConfig(num_experts=experts, expert_dim=12, router=RouterConfig(k=k), parts=parts, part_order="part")
    chosen = np.array(list(itertools.combinations(range(experts), k)))
    ids = (chosen[:, None] + experts * np.arange(parts)[:, None]).reshape(len(chosen), -1)
    for ranks_ in (r for r in range(1, experts * parts + 1) if experts * parts % r == 0):
        of_rank = ids // (experts * parts // ranks_)
        most = max(np.bincount(one, minlength=ranks_).max() for one in of_rank)
        assert dispatch.buffer_rows(config, (1, k * parts), 1, ranks_, experts * parts, parts) == most


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
    "1T by load": limits.threshold_drop(0.49, load_aware="water", ranks=4),
}
APART = tuple(name for name in KEPT if name != "by load")  # halves by load are refused there


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("part", ("1T by load",)),
        pytest.param("part", APART, marks=pytest.mark.slow),
        pytest.param("expert", tuple(KEPT), marks=pytest.mark.slow),
    ],
)
def test_virtual_ranks_decide_as_more_ranks_than_experts(order, names):
    """Before pairs are spread over parts: the same pairs, pair by pair, whatever their order."""
    in_force = [KEPT[name] for name in names]
    real = ranks.on((1, 8, 1), small_in_parts(dispatcher="ep", part_order=order), in_force)
    virtual = ranks.on((1, 1, 1), small_in_parts(virtual_ranks=8, part_order=order), in_force)
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("expanded_drop:factor=1.5", r"choose moe.part_order='expert' and ranks of \[1, 2, 4\]"),
        ("device_budget:factor=1", "4 ranks host parts of the moe.num_experts=4 .* say ranks=2 in its text"),
        ("threshold_drop:threshold=0.1,load_aware=paper", "say ranks=2 in its text"),
    ],
)
def test_with_parts_apart_no_rank_hosts_whole_experts(text: str, said: str):
    """4 ranks, 4 experts in halves: two ranks share two experts. One rank has all of them, whole."""
    model = small_model(capacity_limits=(text,), parts=2, part_order="part", dispatcher="ep")
    config = dataclasses.replace(small_config(model), mesh=MeshConfig(data=1, expert=4))
    with pytest.raises(ConfigError, match=said):
        validate.check(config)
    (problem,) = plan.problems(config, config.mesh)
    assert re.search(said, problem.text)
    virtual = dataclasses.replace(model.moe, dispatcher="local", virtual_ranks=4)
    with pytest.raises(ConfigError, match=said):
        validate.check_model(dataclasses.replace(model, moe=virtual))
    with dispatch.emulated(4), pytest.raises(ConfigError, match="which experts its rank hosts"):
        layer = small_in_parts(dispatcher="ep", part_order="part")
        jax.eval_shape(lambda layer, x: layer(x, fakes.context(), (limits.parse(text),)), layer, hidden())
    validate.check(dataclasses.replace(config, mesh=MeshConfig(data=1, expert=1)))


HALVED = "threshold_drop:threshold=0.1,gap=0.01"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": 1}, "moe.part_order='part' .* moe.parts=1: set that to 2 or more"),
        ({"capacity_limits": (f"{HALVED},form=split",)}, "form='split' halves whole experts"),
        ({"capacity_limits": (f"{HALVED},load_aware=water,ranks=2",)}, "unequal loads"),
        ({"capacity_limits": (HALVED, "threshold_drop:threshold=0.1,load_aware=paper,ranks=2")}, "unequal loads"),
        ({"capacity_limits": (HALVED, "measured_budget:ranks=2")}, "or leave out gap or measured_budget"),
    ],
)
def test_what_does_not_go_with_parts_apart_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        validate.check_model(small_model(**{"parts": 2, "part_order": "part"} | changes))


def test_limits_that_only_drop_are_not():
    for text in ("token_drop:factor=1", "threshold_drop:threshold=0.1", "device_budget:factor=1,ranks=4"):
        for order in ("expert", "part"):
            model = small_model(capacity_limits=(text,), parts=2, part_order=order, dispatcher="ep")
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


def planned(factor: float = 0.0, order: str = "expert"):
    moe = {"num_experts": 2, "parts": 2, "dispatcher": "ep", "router": RouterConfig(k=2), "ep_buffer_factor": factor}
    return plans.tiny(moe=moe | {"part_order": order})


@pytest.mark.parametrize(
    ("factor", "order", "mesh"),
    [
        (0.0, "expert", MeshConfig(data=2, expert=4)),
        pytest.param(1.25, "expert", MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
        pytest.param(0.0, "part", MeshConfig(data=2, expert=2), marks=pytest.mark.slow),
    ],
)
def test_the_plan_counts_the_parts(factor, order, mesh):
    plans.check_kept(planned(factor, order), mesh)


@pytest.mark.slow
def test_a_training_step_is_planned_as_compiled():
    plans.compare_training(planned(), MeshConfig(data=2, expert=4))
