"""Every limit against loops in NumPy, the laws of the paper's algorithms, and the traps of its published code."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import limits, routing
from tests import limits_fakes as ref
from tests import moe_fakes as fakes
from tests.limits_fakes import EXPERTS, LOCAL, TOKENS, K, kept_set, loads
from tests.moe_fakes import context

FACTORS = (0.0, 0.3, 0.5, 1.0, 1.3, 2.0, 3.0, math.inf)
CASES = ref.cases()
LOCAL_IDS = jnp.asarray(LOCAL, jnp.int32)


def run(limit, table, ctx):
    """Not compiled as a whole: all limits are made of the same few operations, and their tables have one shape."""
    return limit(jax.tree.map(jnp.asarray, table), ctx)


def limited(limit, table, mask=None, **ctx):
    mask = np.ones(len(table.expert), bool) if mask is None else mask
    return jax.device_get(run(limit, table, context(mask, **ctx)))


# --- against the loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_token_drop_is_algorithm_1(case):
    table, mask = CASES[case]
    for factor in FACTORS[:-1]:
        assert kept_set(limited(limits.token_drop(factor), table, mask)) == ref.token_drop(table, factor)


@pytest.mark.parametrize("priority", ["score", "topk"])
def test_expanded_drop_is_algorithm_2(priority):
    for table, mask in CASES.values():
        for factor, floor in [(f, 0.0) for f in FACTORS[:-1]] + [(1.0, 0.05), (2.0, 0.2)]:
            limit = limits.expanded_drop(factor, priority=priority, floor=floor)
            made = limited(limit, table, mask, local_experts=LOCAL_IDS)
            assert kept_set(made) == ref.expanded_drop(
                table, mask, factor, local=LOCAL, priority=priority, floor=float(np.float32(floor))
            )
            # the router's own columns are untouched but for `valid`; what is added stands behind them
            fakes.assert_same(
                (made.expert[:, :K], made.weight[:, :K], made.score[:, :K]), (table.expert, table.weight, table.score)
            )
            assert not (made.valid[:, :K] & ~np.asarray(table.valid)).any()


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_reroute_is_the_rule_of_the_first_version(rounds):
    for table, mask in CASES.values():
        for factor in (0.0, 0.5, 1.0, 1.3, 3.0):
            made = limited(limits.reroute(factor, rounds=rounds), table, mask)
            assert kept_set(made) == ref.reroute(table, factor, rounds)
            if rounds == 1:
                assert kept_set(made) == ref.token_drop(table, factor)


def test_expert_drop_skips_the_least_loaded_by_tokens():
    """Trap: the published code sums the mask over the expert axis, which gives every token the same number, k."""
    for table, mask in CASES.values():
        for count in (0, 1, 3):
            limit = limits.ExpertDrop(jnp.float32(count))
            assert kept_set(limited(limit, table, mask)) == ref.expert_drop(table, count)
    table = CASES["skewed"][0]
    wrong = np.asarray(table.valid).sum(1)  # what the trap ranks by
    assert (wrong == K).all()
    left = kept_set(limited(limits.expert_drop(experts=2), table))
    assert len(left) >= len(kept_set(table)) * (1 - 2 / EXPERTS)  # the least loaded have no more than their share


def test_expert_drop_takes_a_share_and_known_loads():
    table = CASES["random"][0]
    for share, count in ((0.1, 1), (0.25, 2), (0.5, 4)):  # 10 % of eight is one, as in the paper's Mixtral
        limit = limits.expert_drop(share=share)
        assert kept_set(limited(limit, table)) == ref.expert_drop(table, count)
    known = jnp.asarray([9.0, 9, 9, 0, 9, 9, 9, 9])
    assert {e for _, e in kept_set(limited(limits.expert_drop(experts=1), table, loads=known))} == set(range(8)) - {3}


@pytest.mark.parametrize("ranks", [2, 4])
def test_device_budget_keeps_the_best_of_each_device(ranks):
    """Trap 8: the published code has no device level; here the sum over a device's experts is at most n_l C."""
    for table, mask in CASES.values():
        for factor in FACTORS:
            made = limited(limits.device_budget(factor, ranks=ranks), table, mask)
            assert kept_set(made) == ref.device_budget(table, factor, ranks)
            by_device = loads(made).reshape(ranks, -1).sum(1)
            if factor < math.inf:
                assert by_device.max() <= factor * table.valid.sum() / ranks


def test_a_device_is_as_many_experts_as_a_rank_hosts():
    table = CASES["skewed"][0]
    by_rank = limited(limits.device_budget(0.7), table, local_experts=LOCAL_IDS)
    assert kept_set(by_rank) == ref.device_budget(table, 0.7, EXPERTS // len(LOCAL))
    with pytest.raises(ValueError, match="8 experts do not divide over 3 devices"):
        limits.device_budget(1.0, ranks=3)(table, context())


@pytest.mark.parametrize("seconds", [(1, 1, 1, 1), (1, 1, 4, 2)])
def test_measured_budget_drops_what_exceeds_the_second_slowest(seconds):
    for table, mask in CASES.values():
        limit = limits.measured_budget(ranks=4, seconds_per_row=tuple(map(float, seconds)))
        made = limited(limit, table, mask)
        assert kept_set(made) == ref.measured_budget(table, 4, seconds)
    assert kept_set(limited(limits.measured_budget(), table)) == kept_set(table)  # one device: nothing to wait for


def test_measured_budget_takes_the_loads_of_all_ranks():
    """Device 2 is the slowest of all, though not here: its quota here is the same share of its own pairs."""
    table = CASES["random"][0]
    known = jnp.asarray([10.0, 10, 10, 10, 40, 40, 10, 10])  # device 2 has 80, the next 20
    made = limited(limits.measured_budget(ranks=4), table, loads=known)
    before, after = (loads(t).reshape(4, -1).sum(1) for t in (table, made))
    assert after[2] == math.floor(before[2] * 20 / 80) and (np.delete(before, 2) == np.delete(after, 2)).all()


# --- laws ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), factor=st.sampled_from(FACTORS), skew=st.floats(0, 2), decimals=st.integers(1, 3))
def test_no_column_exceeds_its_capacity_and_padding_takes_no_slot(seed, factor, skew, decimals):
    masked = seed % TOKENS
    table = ref.routed(np.random.default_rng(seed), skew=skew, masked=masked, decimals=decimals)
    mask = np.arange(TOKENS) < TOKENS - masked
    real = ref.routed(np.random.default_rng(seed), skew=skew, decimals=decimals)
    assert (np.asarray(real.expert) == np.asarray(table.expert)).all()
    most = TOKENS * K if factor == math.inf else ref.room(factor, int(np.asarray(table.valid).sum()))
    for limit, local in (
        (limits.token_drop(factor), None),
        (limits.expanded_drop(factor), LOCAL_IDS),
        (limits.expanded_drop(factor, priority="topk"), LOCAL_IDS),
        (limits.reroute(factor), None),
    ):
        made = limited(limit, table, mask, local_experts=local)
        assert loads(made).max(initial=0) <= most
        assert all(mask[t] for t, _ in kept_set(made))
        if factor == 0:
            assert not kept_set(made)


def test_expanded_drop_over_all_experts_is_expert_choice():
    """Trap of section 3: with the default of one process all experts are local, and this is another method."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(TOKENS, fakes.DIM)), jnp.float32)
    weights = fakes.router_weights("topk_of_softmax")
    config = fakes.router_config(k=K, renormalise=False)
    chosen = routing.FAMILIES["expert_choice"].route(x, weights, context(), config)
    made = limited(limits.expanded_drop(1.0), routing.topk_of_softmax(x, weights, context(), config))
    assert TOKENS * K % EXPERTS == 0 and kept_set(made) == kept_set(chosen)
    local = limited(
        limits.expanded_drop(1.0), routing.topk_of_softmax(x, weights, context(), config), local_experts=LOCAL_IDS
    )
    assert kept_set(local) != kept_set(made)


def test_priority_for_the_top_k_never_displaces_a_genuine_pair():
    """The text says overfull experts stay as they are; Algorithm 2 does not ensure it, the priority does."""
    displaced = 0
    for table, mask in CASES.values():
        for factor in (0.5, 1.0, 1.5):
            dropped = kept_set(limited(limits.token_drop(factor), table, mask))
            made = limited(limits.expanded_drop(factor, priority="topk"), table, mask, local_experts=LOCAL_IDS)
            assert kept_set(made) >= dropped
            assert {p for p in kept_set(made) if p[1] not in LOCAL} == {p for p in dropped if p[1] not in LOCAL}
            papers = limited(limits.expanded_drop(factor), table, mask, local_experts=LOCAL_IDS)
            displaced += len(dropped - kept_set(papers))
    assert displaced > 0  # the paper's form does


def test_candidates_are_the_ranks_own_experts_and_no_others():
    """Trap 7: "overselect" in MolmoE and in the generic patch takes a token's next best experts, wherever they are."""
    table, mask = CASES["random"]
    made = limited(limits.expanded_drop(math.inf), table, mask, local_experts=LOCAL_IDS)
    assert kept_set(made) - kept_set(table) == {
        (t, e) for t in range(TOKENS) for e in LOCAL if e not in np.asarray(table.expert)[t]
    }
    assert loads(made).sum() > loads(table).sum()  # a large factor is not neutral


def test_limits_of_each_rank_imply_the_limit_of_all():
    table = ref.routed(np.random.default_rng(9), skew=1.0, rows=4 * TOKENS)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i * TOKENS : (i + 1) * TOKENS], table) for i in range(4)]
    for factor in (0.5, 1.0, 1.5):
        for limit in (limits.token_drop(factor), limits.expanded_drop(factor), limits.device_budget(factor, ranks=4)):
            local = [jnp.asarray([2 * i, 2 * i + 1], jnp.int32) for i in range(4)]
            made = [limited(limit, part, local_experts=ids) for part, ids in zip(parts, local, strict=True)]
            total = sum(loads(part) for part in made)
            most = factor * 4 * TOKENS * K / EXPERTS
            if isinstance(limit, limits.DeviceBudget):
                assert total.reshape(4, -1).sum(1).max() <= 2 * most
            else:
                assert total.max() <= most


@pytest.mark.parametrize("factor", [EXPERTS / K, math.inf])
def test_large_factors_are_neutral_where_nothing_is_added(factor):
    table, mask = CASES["skewed"]
    for limit in (
        limits.token_drop(factor, renormalise=True), limits.token_drop(factor, keep_top1=True),
        limits.device_budget(factor, ranks=2), limits.reroute(factor),
    ):  # fmt: skip
        made = limited(limit, table, mask)
        np.testing.assert_array_equal(made.valid[:, :K], table.valid)
        np.testing.assert_array_equal(made.weight[:, :K], table.weight)  # bit for bit, renormalised or not
        assert not made.valid[:, K:].any()


# --- weights ------------------------------------------------------------------------------------------------


def test_dropped_slots_are_not_refilled_and_weights_not_renormalised():
    """Traps 3 to 6: the generic patch refilled dropped slots from the same top-k and took the softmax over what was
    left; a flag of the harness switched the router's own renormalisation off. Here the router's weights stay."""
    for renormalise in (False, True):
        table = ref.routed(np.random.default_rng(1), skew=1.0, renormalise=renormalise)
        made = limited(limits.token_drop(0.7), table)
        assert kept_set(made) < kept_set(table) and made.valid.shape == table.valid.shape
        np.testing.assert_array_equal(made.weight, table.weight)


def test_renormalised_weights_keep_the_sum_of_the_token():
    table = ref.routed(np.random.default_rng(1), skew=1.0)
    for limit in (
        limits.token_drop(0.7, renormalise=True), limits.expanded_drop(0.7, renormalise=True),
        limits.reroute(0.7, renormalise=True), limits.device_budget(0.7, ranks=4, renormalise=True),
        limits.MeasuredBudget(ranks=4, renormalise=True),
    ):  # fmt: skip
        made = limited(limit, table, local_experts=LOCAL_IDS)
        total = np.where(made.valid, made.weight, 0).sum(1)
        some = made.valid.any(1)
        assert not np.array_equal(made.valid[:, :K], table.valid)
        np.testing.assert_allclose(total[some], np.asarray(table.weight).sum(1)[some], rtol=1e-5)


@pytest.mark.parametrize("make", [limits.expanded_drop, limits.reroute])
def test_weight_of_an_added_pair(make):
    """Its score as the router gave it (the paper), or on the footing of the token's own weights."""
    rng = np.random.default_rng(3)
    for renormalise in (False, True):
        table = ref.routed(rng, skew=1.0, renormalise=renormalise)
        for how in ("score", "like_own"):
            made = limited(make(1.0, added_weight=how), table, local_experts=LOCAL_IDS)
            rows, columns = np.nonzero(made.valid[:, K:])
            assert len(rows)
            score = np.asarray(table.probs)[rows, made.expert[:, K:][rows, columns]]
            np.testing.assert_array_equal(made.score[:, K:][rows, columns], score)
            own = np.asarray(table.score).sum(1)[rows]
            expected = score / own if how == "like_own" and renormalise else score
            np.testing.assert_allclose(made.weight[:, K:][rows, columns], expected, rtol=1e-5)


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [limits.token_drop, limits.expanded_drop, lambda f, **o: limits.device_budget(f, ranks=4, **o)]
)
def test_a_tokens_best_pair_stays_and_the_excess_is_counted(make):
    for name in ("skewed", "thinned", "padded"):
        table, mask = CASES[name]
        for factor in (0.0, 0.5, 1.0):
            made = limited(make(factor, keep_top1=True), table, mask, local_experts=LOCAL_IDS)
            score = np.where(table.valid, table.score, -1)
            for t in np.flatnonzero(np.asarray(table.valid).any(1)):
                assert made.valid[t, score[t].argmax()]
            pairs = int(np.asarray(table.valid).sum())
            device = isinstance(make(1.0), limits.DeviceBudget)
            load = loads(made).reshape(4, -1).sum(1) if device else loads(made)
            most = ref.room(factor * (2 if device else 1), pairs)
            assert made.exceeded.sum() == np.maximum(load - most, 0).sum()
        assert made.exceeded.shape == (TOKENS,)
    assert limited(make(0.5), table, mask, local_experts=LOCAL_IDS).exceeded is None


@pytest.mark.parametrize(("rounding", "few"), [("floor", 0), ("ceil", 1), ("at_least_one", 1)])
def test_rounding_of_few_tokens(rounding, few):
    """One token of top-3 of 8 experts has a mean load of 3/8: rounded down nothing is left of it."""
    one = jax.tree.map(lambda leaf: leaf[:1], CASES["random"][0])
    made = limited(limits.token_drop(1.0, rounding=rounding), one)
    assert len(kept_set(made)) == few * K
    for factor in (0.0, 0.5, 1.3, 2.0):
        table, mask = CASES["skewed"]
        load = loads(limited(limits.token_drop(factor, rounding=rounding), table, mask))
        np.testing.assert_array_equal(load, np.minimum(loads(table), ref.room(factor, TOKENS * K, rounding=rounding)))


def test_image_first_drops_no_text_while_an_image_token_is_left():
    table = CASES["skewed"][0]
    image = np.random.default_rng(0).random(TOKENS) < 0.6
    made = limited(limits.token_drop(0.8, drop_first=1), table, modality=jnp.asarray(image, jnp.int32))
    dropped = kept_set(table) - kept_set(made)
    for e in range(EXPERTS):
        text_dropped = any(x == e and not image[t] for t, x in dropped)
        assert not text_dropped or not any(x == e and image[t] for t, x in kept_set(made))
    np.testing.assert_array_equal(loads(made), loads(limited(limits.token_drop(0.8), table)))
    with pytest.raises(ValueError, match=r"needs RouteContext\(modality="):
        limits.token_drop(0.8, drop_first=1)(table, context())


def requests(sizes, rng=None):
    ids = np.repeat(np.arange(len(sizes)) * 7 + 3, sizes)  # numbers with gaps
    return ids if rng is None else rng.permutation(ids)


def test_fair_limits_take_the_same_share_of_every_request():
    table = ref.routed(np.random.default_rng(4), skew=1.0)
    ids = requests((12, 8, 4), np.random.default_rng(0))
    load = loads(table)
    for factor in (0.5, 1.0):
        made = limited(limits.token_drop(factor, scope="fair"), table, request_ids=jnp.asarray(ids))
        np.testing.assert_array_equal(loads(made), loads(limited(limits.token_drop(factor), table)))
        for e in range(EXPERTS):
            left = loads(made)[e] / max(load[e], 1)
            for i in np.unique(ids):
                had = sum(x == e and ids[t] == i for t, x in kept_set(table))
                kept = sum(x == e and ids[t] == i for t, x in kept_set(made))
                assert abs(kept - left * had) <= 1, (e, i)
    with pytest.raises(ValueError, match=r"needs RouteContext\(request_ids="):
        limits.token_drop(1.0, scope="fair")(table, context())


@pytest.mark.parametrize("make", [limits.token_drop, limits.expanded_drop])
def test_limits_within_a_request_do_not_depend_on_the_batch(make):
    """Trap 2: capacities of the whole batch let a request's result depend on its neighbours and on padding."""
    table = ref.routed(np.random.default_rng(6), skew=1.0)
    ids = requests((10, 9, 5))
    limit, local = make(1.0, scope="request"), LOCAL_IDS
    together = limited(limit, table, request_ids=jnp.asarray(ids), local_experts=local)
    shuffled = np.random.default_rng(0).permutation(TOKENS)
    for mine in np.unique(ids):
        mask = ids == mine
        alone = dataclasses.replace(table, valid=np.asarray(table.valid) & mask[:, None])
        made = limited(limit, alone, mask, request_ids=jnp.asarray(ids), local_experts=local)
        np.testing.assert_array_equal(made.valid[mask], together.valid[mask])
        by_reference = ref.room(1.0, int(mask.sum()) * K)
        assert loads(made).max() <= by_reference
    moved = jax.tree.map(lambda leaf: leaf[shuffled], table)
    made = limited(limit, moved, request_ids=jnp.asarray(ids[shuffled]), local_experts=local)
    np.testing.assert_array_equal(made.valid, together.valid[shuffled])
    whole = limited(make(1.0), table, local_experts=local)
    alone = dataclasses.replace(table, valid=np.asarray(table.valid) & (ids == 3)[:, None])
    assert not np.array_equal(limited(make(1.0), alone, ids == 3, local_experts=local).valid[ids == 3],
                              whole.valid[ids == 3])  # fmt: skip
    assert loads(together).max() <= 1.0 * TOKENS * K / EXPERTS  # the bound of the whole follows by summation


def test_expert_choice_tables_are_fair_by_the_request_of_each_pairs_token():
    rng = np.random.default_rng(2)
    token, ones = rng.permutation(48) % 12, np.ones((48, 1))
    table = fakes.table(rng.integers(0, 2, (48, 1)), rng.random((48, 1)), ones, ones, 2, token)
    run = fakes.jit(lambda limit, table, ctx: limit(table, ctx))
    ids = np.arange(12) // 6
    made = run(limits.token_drop(0.5, scope="request"), table, context(request_ids=jnp.asarray(ids)))
    for i in (0, 1):
        here = ids[token] == i
        for e in (0, 1):
            column = here & (np.asarray(table.expert)[:, 0] == e)
            assert np.asarray(made.valid)[column].sum() == min(column.sum(), math.floor(0.5 * here.sum() / 2))
    best = run(limits.token_drop(0.0, keep_top1=True), table, context())
    assert sorted(int(token[r]) for r, _ in np.argwhere(best.valid)) == list(range(12))
    for limit in (limits.expanded_drop(1.0), limits.reroute(1.0)):
        with pytest.raises(ValueError, match="needs token choice"):
            limit(table, context())


def test_a_factor_for_each_layer_is_chosen_by_the_layers_number():
    table, mask = CASES["skewed"]
    limit = limits.token_drop((0.5, 1.0, 2.0))
    for layer, factor in enumerate((0.5, 1.0, 2.0)):
        made = limited(*limits.for_layer((limit,), jnp.int32(layer)), table, mask)
        assert kept_set(made) == ref.token_drop(table, factor)
    with pytest.raises(ValueError, match="3 factors, one for each layer"):
        limit(table, context())


def test_limits_run_under_vmap_over_ranks():
    """As virtual ranks do: one table for each rank, each with its own experts."""
    parts = [ref.routed(np.random.default_rng(i), skew=0.5) for i in range(4)]
    ids = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    for limit in (limits.device_budget(1.0, expanded=True, keep_top1=True),):
        together = fakes.jit(jax.vmap(lambda t, i, limit=limit: limit(t, context(local_experts=i))))(stacked, ids)
        for i, part in enumerate(parts):
            alone = limited(limit, part, np.ones(TOKENS, bool), local_experts=ids[i])
            np.testing.assert_array_equal(np.asarray(together.valid)[i], alone.valid)


def test_zero_computation_experts_are_neither_counted_nor_dropped_nor_added():
    """The last two ids cost nothing (LongCat): limits are those of a model with the other six."""
    table, mask = CASES["skewed"]
    free = dataclasses.replace(table, zero_experts=2)
    costs = np.asarray(table.expert) < EXPERTS - 2
    thinned = dataclasses.replace(table, valid=table.valid & costs, probs=table.probs[:, :-2])
    for limit in (
        limits.token_drop(0.5, keep_top1=True), limits.expanded_drop(0.8), limits.device_budget(0.5, ranks=3),
        limits.reroute(0.7, rounds=1), limits.measured_budget(ranks=3),
    ):  # fmt: skip
        made, alone = (limited(limit, t, mask, local_experts=LOCAL_IDS) for t in (free, thinned))
        assert (made.valid[:, :K] | costs).all() and kept_set(made) != kept_set(free)
        assert {p for p in kept_set(made) if p[1] < EXPERTS - 2} == kept_set(alone)


def test_a_layer_counts_what_exceeds_the_capacity_and_what_was_added():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, fakes.DIM)), jnp.float32)
    layer = fakes.small_layer(virtual_ranks=2)
    begin = fakes.jit(lambda limit: layer.begin(x, context(), limit).metrics)
    kept = begin((limits.token_drop(0.0, keep_top1=True),))
    assert float(kept.exceeded[0]) == 32 == float(kept.computed.sum())
    wide = begin((limits.expanded_drop(2.0),))
    assert float(wide.added[0]) > 0
    assert float(wide.computed.sum()) == 64 - float(wide.dropped[0]) + float(wide.added[0])


def test_a_new_number_does_not_retrace():
    traced = []

    @jax.jit
    def kept(limit, table):
        traced.append(type(limit))
        return limit(table, context(local_experts=LOCAL_IDS)).valid

    for value in (1.0, 1.5):
        for limit in (
            limits.expanded_drop(value, floor=value / 10), limits.reroute(value), limits.expert_drop(share=value / 4),
            limits.device_budget(value), limits.measured_budget(ranks=2, seconds_per_row=(1.0, value)),
        ):  # fmt: skip
            kept.eval_shape(limit, CASES["random"][0])  # traces, and compiles nothing
    assert len(traced) == 5
