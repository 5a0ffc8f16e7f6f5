"""Expert parallelism: every degree and exchange against the dense reference, on a mesh and with emulated ranks.

Rows past the groups hold NaN in all of these runs, so none of them is ever read.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax import dispatch, experts, limits
from moejax.config import ConfigError, MoEConfig, RouterConfig
from moejax.dispatch import exchange, expert_parallel
from moejax.sharding import MESH_AXES, batch_sharding, tree_shardings
from tests import moe_fakes as fakes
from tests.moe_fakes import DIM, EXPERTS, context, random_table, router_config, table
from tests.small import quick_compilation
from tests.test_dispatch import by_loop, poisoned
from tests.test_moe import assert_as_on_one_device, model_value_and_grad

B, S = 8, 4
MASK = np.arange(S)[None] < np.asarray([4, 3, 4, 1, 4, 2, 4, 0])[:, None]
FULL = np.ones((B, S), bool)
ROUTERS = {"topk": router_config(bias=True), "switch": router_config("switch", bias=True)}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


@pytest.fixture(autouse=True)
def undefined_tails(monkeypatch):
    monkeypatch.setattr(experts, "grouped_ffn", poisoned(experts.grouped_ffn))


def ragged_by_gather(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """``jax.lax.ragged_all_to_all`` as its documentation has it, on a platform without it."""
    me = jax.lax.axis_index(axis_name)
    rows = jax.lax.all_gather(operand, axis_name)
    ranks = rows.shape[0]  # slices for a rank stand together
    start, size, target = (
        jax.lax.all_gather(a.reshape(ranks, -1), axis_name)[:, me] for a in (input_offsets, send_sizes, output_offsets)
    )
    place = jnp.arange(output.shape[0])
    for rank, i in np.ndindex(start.shape):
        offset = place - target[rank, i]
        hit = (offset >= 0) & (offset < size[rank, i])
        source = rows[rank].at[start[rank, i] + offset].get(mode="fill", fill_value=0)
        output = jnp.where(hit[:, None], source, output)
    sent = jax.lax.all_to_all(send_sizes, axis_name, 0, 0, tiled=True)
    return jnp.where(jnp.all(sent == recv_sizes), output, jnp.nan)  # what is said to arrive must be what was sent


@pytest.fixture
def has_ragged(monkeypatch):
    """A platform that has it: what "auto" is there, and the collective."""
    monkeypatch.setattr(exchange, "default_platform", lambda: "tpu")
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gather)


AUTO = (AxisType.Auto,) * 3
EXPLICIT = (AxisType.Explicit, AxisType.Explicit, AxisType.Auto)
"""Of the token axes: the kernels' loops have no place for weights whose type says that they are split over "model"."""


def mesh_of(sizes, axis_types=AUTO):
    count = int(np.prod(sizes))
    return Mesh(np.asarray(jax.devices()[:count]).reshape(sizes), MESH_AXES, axis_types=axis_types)


# --- the exchange by itself -------------------------------------------------------------------------------------------

T = 24
EXCHANGES = {
    "pairs": {"ep_send": "pairs"},
    "tokens": {"ep_send": "tokens"},
    "chunked 2": {"ep_exchange": "chunked", "ep_chunks": 2},
    "chunked 3": {"ep_exchange": "chunked", "ep_chunks": 3, "ep_send": "pairs"},  # of 4 tokens: 1, 1 and 2
}


def tables(k=3):
    """Over all ranks. Fields that play no part have one column, so that they can be split over ranks as they are."""
    rng = np.random.default_rng(k)
    one = np.broadcast_to(np.arange(k) + EXPERTS - k, (T, k))
    ones = np.ones((T, k))
    return {
        "random": random_table(rng, T, k, EXPERTS),
        "skewed, empty experts, padding": random_table(rng, T, k, EXPERTS, skew=2.0, masked=7),
        "dropped pairs": random_table(rng, T, k, EXPERTS, drop=0.5),
        "the same for all": table(one, ones, ones, ones, EXPERTS),
        "one expert": table(one, ones, ones, ones * (np.arange(k) == 0), EXPERTS),
        "none": random_table(rng, T, k, EXPERTS, drop=1.0),
    }


def round_trip(x, factor, weight, routing, config):
    """Sends tokens to "experts" that multiply their rows by a factor of their own, and back. Other rows become NaN."""
    dispatcher = dispatch.ExpertParallel(config)

    def on_rank(x, weight, routing, factor):
        xs, plans = dispatcher.send(x, routing)

        def expert(rows, sizes):
            group = jnp.sum(jnp.arange(rows.shape[0])[:, None] >= jnp.cumsum(sizes), axis=1)
            return rows * factor.at[group].get(mode="fill", fill_value=jnp.nan)[:, None]

        ys = jax.tree.map(expert, xs, dispatcher.group_sizes(plans))
        return dispatcher.give_back(ys, weight, plans, x.shape[0])

    return dispatch.merge_shards(dispatch.per_shard(on_rank, (x, weight, routing), factor, split_experts=True))


@functools.partial(jax.jit, static_argnums=4)
def value_and_grads(x, factor, routing, u, config):
    def loss(x, factor, weight):
        y = round_trip(x, factor, weight, routing, config)
        return jnp.sum(y * u), y

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, factor, routing.weight)


def check_exchange(config, mesh=None, ranks=1):
    x, factor, u = (jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in ((T, DIM), 8, (T, DIM)))
    for name, routing in tables().items():
        args = (x, factor, routing, u)
        if mesh is None:
            with dispatch.emulated(ranks):
                got = value_and_grads(*args, config)
        else:
            with jax.set_mesh(mesh):
                sharding = batch_sharding(mesh)
                x_, routing_, u_ = jax.device_put((x, routing, u), sharding)
                factor_ = jax.device_put(factor, NamedSharding(mesh, PartitionSpec("expert")))
                got = value_and_grads(x_, factor_, routing_, u_, config)
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name),
            got, by_loop(x, factor, routing, u),
        )  # fmt: skip


def config(**moe):
    return MoEConfig(num_experts=EXPERTS, router=RouterConfig(k=2), dispatcher="ep", **moe)


GRID = [
    ((1, 8, 1), "pairs", "explicit"),
    ((2, 4, 1), "chunked 3", "auto"),
    ((4, 2, 1), "tokens", "auto"),
    ((1, 8, 1), "tokens", "explicit"),
]
ALL = itertools.product([(4, 2, 1), (2, 4, 1), (1, 8, 1), (1, 2, 1), (1, 4, 2)], EXCHANGES, ["auto", "explicit"])
GRIDS = [*GRID, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in GRID)]


@pytest.mark.parametrize(("sizes", "how", "axes"), GRIDS)
def test_every_exchange_equals_a_loop_over_pairs(sizes, how, axes):
    check_exchange(config(**EXCHANGES[how]), mesh_of(sizes, AUTO if axes == "auto" else EXPLICIT))


@pytest.mark.parametrize("ranks", [4, *(pytest.param(r, marks=pytest.mark.slow) for r in (2, 8))])
def test_emulated_ranks_do_too(ranks):
    check_exchange(config(), ranks=ranks)


@pytest.mark.parametrize(
    "sizes", [(1, 4, 1), *(pytest.param(s, marks=pytest.mark.slow) for s in [(4, 2, 1), (1, 8, 1)])]
)
def test_the_ragged_exchange_too(sizes, has_ragged):
    assert dispatch.ExpertParallel(config()).transport == "ragged"  # what "auto" is there
    check_exchange(config(), mesh_of(sizes))


@pytest.mark.parametrize("slices", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_the_ragged_exchange_in_slices_too(slices, has_ragged, monkeypatch):
    """12 slices are 3 for each of 4 ranks; 1 is one, as there cannot be fewer."""
    monkeypatch.setattr(exchange, "default_platform", lambda: "gpu")
    monkeypatch.setattr(exchange, "SLICES", {"gpu": slices})
    check_exchange(config(ep_exchange="ragged"), mesh_of((1, 4, 1)))


def test_slices_are_even_and_cover_all_rows():
    begins, sizes = exchange._cut(jnp.array([0, 2, 7, 8], jnp.int32), 3)
    np.testing.assert_array_equal(sizes, [[0, 0, 0], [1, 1, 0], [3, 2, 2], [3, 3, 2]])
    np.testing.assert_array_equal(begins, np.cumsum(sizes, axis=1) - sizes)


def test_a_cpu_has_no_ragged_exchange():
    with pytest.raises(ConfigError, match=r"moe\.ep_exchange='ragged' cannot run on a CPU"):
        check_exchange(config(ep_exchange="ragged"), ranks=2)


# --- in a layer -------------------------------------------------------------------------------------------------------


@functools.cache
def layer(router="topk", **moe):
    return fakes.small_layer(ROUTERS[router], shared_experts=1, implementation="ref", **moe)


def with_taste(made, taste):
    """The same layer with a bias on the router's logits, ``[E]``."""
    copy = jax.tree.map(lambda leaf: leaf, made)
    copy.router.arrays["logit_bias"][...] = jnp.asarray(taste, jnp.float32)
    return copy


def hidden(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, S, DIM)), jnp.float32)


TASTES = {
    "uniform": (np.zeros(EXPERTS), FULL),
    "padding": (np.zeros(EXPERTS), MASK),
    "skewed": (-0.5 * np.arange(EXPERTS), MASK),
    "empty experts": (np.where(np.arange(EXPERTS) % 4 == 1, -99, 0), FULL),
    "the same for all": (np.where(np.arange(EXPERTS) == EXPERTS - 1, 99, 0), FULL),
    "all on one rank": (np.where(np.arange(EXPERTS) < EXPERTS // 4, 99, 0), MASK),
}


def value_and_grad(made, x, mask):
    def loss(made, x):
        y, metrics = made(x, context(mask))
        return jnp.sum(jnp.where(mask[..., None], y, 0) ** 2) + metrics.z_sum, (y, metrics)

    (_, (y, metrics)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(made, x)
    return jnp.where(mask[..., None], y, 0), metrics, grads


@functools.cache
def dense(router, name):
    taste, mask = TASTES[name]
    run = _dense_program(router)
    return run(with_taste(layer(router, dispatcher="dense"), taste), hidden(), jnp.asarray(mask))


@functools.cache
def _dense_program(router):
    return jax.jit(value_and_grad)


def placed(module, mesh):
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.device_put(state, tree_shardings(state, mesh)))


def check(made, router="topk", mesh=None, ranks=1):
    """Values, metrics and gradients of all tastes, by one program."""
    run = jax.jit(value_and_grad)
    for name, (taste, mask) in TASTES.items():
        mine, x, mask = with_taste(made, taste), hidden(), jnp.asarray(mask)
        if mesh is None:
            with dispatch.emulated(ranks):
                assert isinstance(dispatch.in_force(made.config), dispatch.ExpertParallel)
                got = run(mine, x, mask)
        else:
            with jax.set_mesh(mesh):
                sharding = batch_sharding(mesh)
                got = run(placed(mine, mesh), jax.device_put(x, sharding), jax.device_put(mask, sharding))
        try:
            assert_as_on_one_device(got, dense(router, name))
        except AssertionError as error:
            raise AssertionError(name) from error


LAYERS = [((2, 2, 2), "tokens", "auto")]
ALL_LAYERS = itertools.product([(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)], EXCHANGES, ["auto", "explicit"])
MESHES = [*LAYERS, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL_LAYERS if case not in LAYERS)]


@pytest.mark.parametrize(("sizes", "how", "axes"), MESHES)
def test_a_layer_on_a_mesh_equals_the_dense_reference(sizes, how, axes):
    check(layer(dispatcher="ep", **EXCHANGES[how]), mesh=mesh_of(sizes, AUTO if axes == "auto" else EXPLICIT))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_layer_with_emulated_ranks_does(ranks):
    check(layer(dispatcher="ep"), ranks=ranks)


@pytest.mark.slow
def test_a_layer_with_the_ragged_exchange_does(has_ragged):
    check(layer("switch", dispatcher="ep"), "switch", mesh=mesh_of((1, 4, 1)))


def test_one_rank_is_local():
    """Nothing is exchanged: the very program."""
    x = hidden()
    for made in (layer(dispatcher="ep", ep_exchange="chunked"), layer(dispatcher="ep", ep_exchange="ragged")):
        assert dispatch.in_force(made.config) == dispatch.OneRank("local")
    programs = [str(jax.make_jaxpr(lambda x, m=m: m(x, context())[0])(x)) for m in (made, layer())]
    assert programs[0] == programs[1]


# --- weights stay where they are ------------------------------------------------------------------------------------


def collectives(made, sizes):
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        x = jax.device_put(hidden(), batch_sharding(mesh))
        text = jax.jit(lambda m, x: m(x, context())[0]).lower(placed(made, mesh), x).compile().as_text()
    return {name: text.count(f" {name}(") for name in ("all-gather", "all-to-all", "all-reduce")}


@pytest.mark.parametrize(("sent", "exchanges"), [("pairs", 3), ("tokens", 4)])
def test_rows_travel_and_no_weight_does(sent, exchanges):
    """Counts (and the places of pairs), rows out, rows back; where tokens travel, gate weights too."""
    found = collectives(layer(dispatcher="ep", ep_send=sent), (1, 2, 1))
    assert found["all-gather"] == 0
    assert found["all-to-all"] == exchanges


# --- plans ----------------------------------------------------------------------------------------------------------

TOKENS = 16


def routings(ranks, k, **kwargs):
    """One table for each rank, stacked."""
    rng = np.random.default_rng(ranks + k)
    return jax.tree.map(
        lambda *a: jnp.stack(a), *[random_table(rng, TOKENS, k, EXPERTS, **kwargs) for _ in range(ranks)]
    )


@pytest.mark.parametrize(("ranks", "k", "capacity"), [(2, 3, 16), (8, 2, 3)])
def test_plans_equal_a_loop_over_pairs(ranks, k, capacity):
    """Who sends which pair to whom, what overflows, and in which order experts see the rows of all ranks."""
    made = routings(ranks, k, skew=0.4, drop=0.2, masked=3)

    def on_rank(made):
        plan = dispatch.exchange_plan(made, TOKENS, capacity)
        rank = jax.lax.axis_index("expert")
        ids = jnp.where(plan.home.pair_of_row < TOKENS * k, rank * TOKENS * k + plan.home.pair_of_row, -1)[:, None]
        arrived = exchange.padded(ids, *expert_parallel.rows_by_rank(plan), "expert")
        place_of_row, row_of_place = exchange.by_expert(plan.received, capacity)
        ordered = exchange.take(arrived + 1, place_of_row)[:, 0] - 1
        return plan, ordered, place_of_row, row_of_place

    plan, ordered, place_of_row, row_of_place = jax.device_get(jax.jit(jax.vmap(on_rank, axis_name="expert"))(made))
    expert, valid = np.asarray(made.expert), np.asarray(made.valid)
    e, total = EXPERTS // ranks, ranks * capacity
    sent = {}  # (source, destination) -> pairs in order
    for source in range(ranks):
        lost = 0
        for destination in range(ranks):
            mine = [
                (int(expert[source, r, j]), r * k + j)
                for r, j in np.argwhere(valid[source])
                if expert[source, r, j] // e == destination
            ]
            mine.sort()
            sent[source, destination] = mine[:capacity]
            lost += len(mine[capacity:])
            rows = plan.home.row_of_pair[source].reshape(-1)
            assert [rows[p] for _, p in mine] == [
                destination * capacity + i if i < capacity else total for i in range(len(mine))
            ]
        assert plan.home.overflow[source] == lost
    for rank in range(ranks):
        wanted = sorted((x, s, p) for s in range(ranks) for x, p in sent[s, rank])
        assert ordered[rank, : len(wanted)].tolist() == [s * TOKENS * k + p for _, s, p in wanted]
        assert (place_of_row[rank, len(wanted) :] == total).all()
        there = row_of_place[rank] < total
        assert there.sum() == len(wanted)
        np.testing.assert_array_equal(place_of_row[rank][row_of_place[rank][there]], np.flatnonzero(there))
        assert plan.received[rank].sum(0).tolist() == np.bincount([x for x, _, _ in wanted], minlength=EXPERTS)[
            rank * e : (rank + 1) * e
        ].tolist()  # fmt: skip
    assert capacity > 3 or plan.home.overflow.sum() > 0


def fields_of(dispatcher, table):
    """What experts are given of each pair's row (token, expert, gate weight), what is lost, and what comes back."""
    token = jnp.arange(table.expert.shape[0]) + table.expert.shape[0] * jax.lax.axis_index("expert")
    x = jnp.broadcast_to(token.astype(jnp.float32)[:, None], (token.shape[0], DIM))
    rows, plans = dispatcher.send(x, table)
    weighed, _ = dispatcher.send(jnp.ones_like(x), table, weigh=True)
    sizes = dispatcher.group_sizes(plans)
    held = jnp.arange(rows[0].shape[0]) < jnp.sum(sizes[0])
    ys = jnp.where(held[:, None], rows[0], jnp.nan)
    back = dispatcher.give_back((ys,), table.weight, plans, x.shape[0])
    ordered, weights = (jnp.where(held, a[0][:, 0], -1) for a in (rows, weighed))
    return ordered, weights, sizes, dispatcher.overflow(plans), dispatcher.sent(table, plans).valid, back


@pytest.mark.parametrize(
    ("ranks", "k", "factor"), [(2, 3, 0.0), (4, 3, 1.0), pytest.param(8, 2, 0.5, marks=pytest.mark.slow)]
)
def test_tokens_become_the_rows_that_pairs_are(ranks, k, factor):
    """The same pairs, bit for bit the same rows in the same order with the same weights; sums of another order."""
    made = routings(ranks, k, skew=0.4, drop=0.2, masked=3)
    dispatchers = [dispatch.ExpertParallel(config(ep_send=s, ep_buffer_factor=factor)) for s in ("pairs", "tokens")]
    run = jax.jit(jax.vmap(lambda t: [fields_of(d, t) for d in dispatchers], axis_name="expert"))
    (*pairs, sums), (*tokens, other) = jax.device_get(run(made))
    jax.tree.map(np.testing.assert_array_equal, pairs, tokens)
    np.testing.assert_allclose(other, sums, rtol=1e-6, atol=1e-6)
    assert (pairs[3].sum() > 0) == bool(factor)
    assert (pairs[0] >= 0).sum() > ranks * TOKENS  # more rows than tokens


def test_tokens_travel_where_that_spares_rows():
    def sent(factor, ranks, **moe):
        c = config(ep_buffer_factor=factor, **moe)
        return dispatch.sends_tokens(c, 64, dispatch.buffer_rows(c, (64, 2), 64, ranks))

    assert sent(0.0, 2)  # 128 pairs for a rank, of 64 tokens
    assert sent(1.25, 2)  # 80: tokens spare a fifth of the rows
    assert not sent(1.12, 2)  # 72
    assert not sent(0.0, 8)  # one expert a rank
    assert not sent(0.0, 2, ep_send="pairs")
    assert sent(1.0, 8, ep_send="tokens")
    assert not dispatch.sends_tokens(config(), 64, 128, by_token=False)  # where experts choose, rows are pairs


@pytest.mark.parametrize("ranks", [4, 2])
def test_a_second_pair_of_a_token_for_an_expert_is_counted_where_it_is_lost(ranks):
    """No router or limit here makes such a table. On four ranks a token has a place for each of their two experts: of
    the 32 pairs that fit, those of 11 tokens, one of each is computed. On two ranks there is one for each pair."""
    ones = np.ones((TOKENS, 3))
    made = table(np.zeros((TOKENS, 3)), ones, ones, ones, EXPERTS)

    def on_rank(made):
        dispatcher = dispatch.ExpertParallel(config(ep_send="tokens"))
        _, plans = dispatcher.send(jnp.ones((TOKENS, DIM)), made)
        return dispatcher.overflow(plans)

    overflow = jax.jit(jax.vmap(on_rank, axis_name="expert"))(jax.tree.map(lambda a: jnp.stack([a] * ranks), made))
    assert overflow.sum() == (4 * (3 * TOKENS - 11) if ranks == 4 else 0)


def test_buffers_hold_the_worst_case_or_the_factor():
    rows = dispatch.buffer_rows
    assert rows(config(), (100, 2), 100, 2) == 200  # both choices of all tokens
    assert rows(config(), (100, 2), 100, 8) == 100  # a rank with one expert gets a token once
    assert rows(config(), (100, 2 + 4), 100, 2) == 400  # candidates appended by a limit: all experts of a rank
    assert rows(config(ep_buffer_factor=1.0), (100, 2), 100, 4) == 56  # 50, rounded up to 8
    assert rows(config(ep_buffer_factor=1.12), (100, 2), 100, 4) == 56  # 56.000001 in floats
    assert rows(config(ep_buffer_factor=99.0), (100, 2), 100, 4) == 200
    assert rows(config(ep_buffer_factor=1.0), (32, 1), 16, 4) == 8  # expert choice: a row is a pair


@pytest.mark.parametrize(
    "moe", [{}, pytest.param(EXCHANGES["chunked 2"], marks=pytest.mark.slow)], ids=["padded", "chunked"]
)
def test_what_does_not_fit_is_counted_and_nothing_else_changes(moe):
    """Overflow equals a count by hand; the output is that of the pairs that did fit."""
    made = with_taste(layer(dispatcher="ep", ep_buffer_factor=0.5, **moe), TASTES["all on one rank"][0])
    seq, ranks = 16, 4
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, seq, DIM)), jnp.float32)
    with dispatch.emulated(ranks):
        y, report = jax.jit(lambda m, x: m.reported(x, context(record=True)))(made, x)
    kept, metrics = jax.device_get(report.record.kept), report.metrics
    tokens, pieces = B * seq // ranks, 2 if moe else 1
    capacity = dispatch.buffer_rows(made.config, (tokens // pieces, 2), tokens // pieces, ranks)
    fits = np.zeros_like(kept.valid)
    for rank in range(ranks):
        for first in range(0, tokens, tokens // pieces):
            part = range(first, first + tokens // pieces)
            for destination in range(ranks):
                pairs = [(kept.expert[rank, t, j], t, j) for t in part for j in range(2)]
                mine = sorted(p for p in pairs if p[0] // (EXPERTS // ranks) == destination)
                for _, t, j in mine[:capacity]:
                    fits[rank, t, j] = True
    lost = fits.size - int(fits.sum())
    assert float(metrics.overflow) == lost > 0
    assert float(metrics.dropped) == 0  # by a limit
    assert float(metrics.computed.sum()) == fits.sum()
    assert float(metrics.routed.sum()) == fits.size
    assert float(metrics.lost_tokens) == (~fits.any(-1)).sum()
    left = fakes.table(
        kept.expert.reshape(-1, 2), kept.score.reshape(-1, 2), kept.weight.reshape(-1, 2), fits.reshape(-1, 2), EXPERTS
    )
    expected = fakes.moe(fakes.f64(x).reshape(-1, DIM), left, fakes.experts_of(made), "swiglu").reshape(x.shape)
    expected += fakes.f64(made.shared_output(x))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


# --- other parts of a layer -----------------------------------------------------------------------------------------

OTHERS = {
    "expert choice": (router_config("expert_choice"), {"ep_buffer_factor": 1.0}),
    "experts without a computation, biases, weighed inputs": (
        router_config(),
        {"zero_experts": 2, "expert_bias": True, "weigh": "input"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_with_other_parts_of_a_layer(name):
    """Against the dense reference on the same ranks: expert choice chooses among each rank's own tokens."""
    router, moe = OTHERS[name]
    run = jax.jit(value_and_grad)
    ranks = 2
    with dispatch.emulated(ranks):
        got, expected = (
            run(fakes.small_layer(router, implementation="ref", dispatcher=d, **moe), hidden(), MASK)
            for d in ("ep", "dense")
        )
    assert float(expected[1].computed.sum()) > 0
    assert float(got[1].overflow) == 0
    assert_as_on_one_device(jax.tree.leaves(got), jax.tree.leaves(expected))


def test_a_limit_sees_its_rank_and_the_experts_there():
    seen = []

    def look(routing, ctx):
        seen.append((ctx.axis_name, ctx.local_experts is None, routing.expert.shape))
        mine = (
            jnp.zeros(EXPERTS, bool) if ctx.local_experts is None else jnp.isin(jnp.arange(EXPERTS), ctx.local_experts)
        )
        return dataclasses.replace(routing, valid=routing.valid & mine[routing.expert])

    record = jax.jit(lambda m, x: m.reported(x, context(record=True), (jax.tree_util.Partial(look),))[1].record)
    with jax.set_mesh(mesh_of((2, 4, 1))):
        got = jax.device_get(record(layer(dispatcher="ep"), hidden()).kept)
    assert seen == [("expert", False, (4, 2))]
    rank = np.arange(8) % 4  # the axis "expert" is the inner one of both
    np.testing.assert_array_equal(got.valid, got.expert // 2 == rank[:, None, None])
    seen.clear()
    with jax.set_mesh(mesh_of((2, 4, 1))):
        record(layer(), hidden())
    assert seen == [(None, True, (4, 2))]


@pytest.mark.slow
def test_a_limit_drops_the_same_pairs_as_without_exchange():
    """TokenDrop acts on each device's own tokens, so it does not matter where the experts are."""
    made, limit = [layer(**m) for m in ({"dispatcher": "ep"}, {})], (limits.token_drop(0.75),)
    mesh = mesh_of((1, 2, 1))
    run = jax.jit(lambda m, x: m(x, context(MASK), limit))
    with jax.set_mesh(mesh):
        x = jax.device_put(hidden(), batch_sharding(mesh))
        (y, metrics), (plain, expected) = (run(m, x) for m in made)
    assert float(metrics.dropped) > 0
    fakes.assert_close(metrics, expected)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)


# --- in a model -----------------------------------------------------------------------------------------------------


@functools.cache
def model_on_one_device():
    return jax.jit(model_value_and_grad)(small_model("local"), jnp.asarray(fakes.tokens(B, S)), jnp.asarray(MASK))


def small_model(dispatcher):
    return fakes.small_model(moe={"num_experts": 8, "dispatcher": dispatcher}, layer_loop="unroll", num_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_a_model_on_a_mesh_equals_one_device(axes):
    """With Explicit axes the model is not written in; ``jax.sharding.auto_axes`` runs it there."""
    mesh, run = mesh_of((2, 4, 1), AUTO if axes == "auto" else (AxisType.Explicit,) * 3), model_value_and_grad
    if axes == "explicit":
        run = jax.sharding.auto_axes(run, out_sharding=PartitionSpec())
    with jax.set_mesh(mesh):
        sharding = batch_sharding(mesh)
        tokens, mask = (jax.device_put(jnp.asarray(a), sharding) for a in (fakes.tokens(B, S), MASK))
        got = jax.jit(run)(placed(small_model("ep"), mesh), tokens, mask)
    assert_as_on_one_device(jax.tree.leaves(got), jax.tree.leaves(model_on_one_device()))
