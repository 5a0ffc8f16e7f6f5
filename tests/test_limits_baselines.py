"""The rules that threshold dropping is compared with, against loops in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import limits, validate
from moejax.config import ConfigError, MoEConfig, RouterConfig
from tests import limits_fakes as ref
from tests import moe_fakes as fakes
from tests.limits_fakes import TOKENS, K, kept_set
from tests.moe_fakes import context
from tests.small import small_model

CASES = ref.cases()


def run(limit, table):
    return jax.device_get(limit(jax.tree.map(jnp.asarray, table), context()))


def skipped(table, beta):
    """Token by token: whoever scores below beta times the best goes."""
    kept = set()
    for r in range(len(table.expert)):
        mine = [c for c in range(K) if table.valid[r, c]]
        best = max((table.score[r, c] for c in mine), default=0)
        kept |= {(r, int(table.expert[r, c])) for c in mine if not table.score[r, c] < np.float32(beta) * best}
    return kept


def opportunistic(table, keep):
    """OEA: everyone loads his best; then everyone takes what has been loaded."""
    surely, rest = set(), set()
    for r in range(len(table.expert)):
        mine = sorted((c for c in range(K) if table.valid[r, c]), key=lambda c: -table.score[r, c])
        surely |= {(r, int(table.expert[r, c])) for c in mine[:keep]}
        rest |= {(r, int(table.expert[r, c])) for c in mine[keep:]}
    loaded = {e for _, e in surely}
    return surely | {(r, e) for r, e in rest if e in loaded}


@pytest.mark.parametrize("case", CASES)
def test_a_second_expert_is_skipped_where_it_scores_below_beta_times_the_first(case):
    table, _ = CASES[case]
    for beta in (0.0, 0.3, 0.5, 0.9, 1.0):
        made = run(limits.skip_second(beta), table)
        assert kept_set(made) == skipped(table, beta)
        assert (made.valid.any(1) == np.asarray(table.valid).any(1)).all()  # a token's best pair always stays
        if beta == 0:
            fakes.assert_same((made.valid, made.weight), (table.valid, table.weight))


def test_what_is_left_takes_over_the_weight_of_the_skipped():
    """The published rule; DualSparse's thresholds keep the original weights instead, which the option gives."""
    table = ref.routed(np.random.default_rng(1), renormalise=True, k=2)
    made, raw = (run(limits.skip_second(0.6, renormalise=flag), table) for flag in (True, False))
    alone = made.valid.sum(1) == 1
    assert 0 < alone.sum() < TOKENS
    np.testing.assert_allclose(np.where(made.valid, made.weight, 0).sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(made.weight[~alone], table.weight[~alone])
    np.testing.assert_array_equal(raw.weight, table.weight)
    np.testing.assert_array_equal(raw.valid, made.valid)


def test_the_median_of_the_ratios_skips_half_of_the_second_experts():
    table = ref.routed(np.random.default_rng(2), rows=101, k=2)
    ratio, skippable = jax.device_get(limits.score_ratios(jax.tree.map(jnp.asarray, table)))
    by_hand = [float(min(s) / max(s)) for s in np.asarray(table.score)]
    np.testing.assert_allclose(np.sort(ratio[skippable]), np.sort(by_hand), rtol=1e-6)
    made = run(limits.skip_second(float(np.median(ratio[skippable]))), table)
    assert abs(int((~made.valid).sum()) - 50) <= 1
    tied, _ = CASES["tied"]
    assert (limits.score_ratios(jax.tree.map(jnp.asarray, tied))[1].sum(1) == K - 1).all()  # one best each, ties too


@pytest.mark.parametrize("case", CASES)
def test_opportunistic_drop_touches_the_experts_of_the_best_pairs_and_no_others(case):
    table, _ = CASES[case]
    for keep in (1, 2, K, K + 1):
        made = run(limits.opportunistic_drop(keep=keep), table)
        assert kept_set(made) == opportunistic(table, keep)
        if keep >= K:
            np.testing.assert_array_equal(made.valid, table.valid)


def test_opportunistic_drop_saves_experts_in_a_small_batch():
    """Counted in a layer: of four tokens' experts only those of the best pairs compute, and no token loses its best."""
    layer = fakes.small_layer(fakes.router_config(k=4))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, fakes.DIM)), jnp.float32)
    begin = fakes.jit(lambda limit: layer.begin(x, context(record=True), limit))
    none, few = begin(()), begin((limits.opportunistic_drop(keep=1),))
    touched = [int((np.asarray(flight.metrics.computed[0]) > 0).sum()) for flight in (none, few)]
    made, kept = jax.device_get((few.record.made, few.record.kept))
    best = np.take_along_axis(made.expert[0], made.score[0].argmax(1)[:, None], 1)
    assert touched[1] == len(np.unique(best)) < touched[0]
    assert few.metrics.computed[0].sum() > 4  # beside its best a token keeps what others load anyway
    assert kept.valid[0].any(1).all()


def test_zero_computation_experts_are_compared_and_never_skipped():
    table = ref.routed(np.random.default_rng(8))
    free = dataclasses.replace(table, zero_experts=2)
    costs = np.asarray(table.expert) < ref.EXPERTS - 2
    few = jax.tree.map(lambda leaf: leaf[:2], free)  # more tokens touch all experts
    for limit, its in ((limits.skip_second(1.0), free), (limits.opportunistic_drop(keep=1), few)):
        made = run(limit, its)
        assert (made.valid | costs[: len(made.valid)]).all() and not made.valid.all()
    best_costs = costs[np.arange(TOKENS), np.asarray(table.score).argmax(1)]
    assert run(limits.skip_second(1.0), free).valid[costs].sum() == best_costs.sum() < TOKENS


def test_a_token_with_scores_that_are_nan_is_not_skipped():
    table = ref.routed(np.random.default_rng(8))
    broken = dataclasses.replace(table, score=np.asarray(table.score).copy())
    broken.score[0] = np.nan
    for renormalise in (True, False):
        made = run(limits.skip_second(0.9, renormalise=renormalise), broken)
        assert made.valid[0].all() and not made.valid[1:].all()


def test_a_beta_for_each_layer_and_new_numbers_without_a_new_program():
    table, _ = CASES["skewed"]
    limit = limits.skip_second((0.1, 0.9))
    for layer, beta in enumerate((0.1, 0.9)):
        assert kept_set(run(limits.for_layer((limit,), jnp.int32(layer))[0], table)) == skipped(table, beta)
    traced = []

    @jax.jit
    def kept(limit, table):
        traced.append(limit)
        return limit(table, context()).valid

    for value in (1, 2):
        for limit in (limits.skip_second(value / 4), limits.opportunistic_drop(keep=value)):
            kept.eval_shape(limit, jax.tree.map(jnp.asarray, table))
    assert len(traced) == 2


def test_what_cannot_work_is_refused():
    for text, why in (
        ("skip_second:beta=1.5", "beta=1.5: a share of the token's best score"),
        ("skip_second", "skip_second needs beta, e.g. skip_second:beta=0.4"),
        ("opportunistic_drop:keep=0", "keep=0: pairs of each token"),
        ("opportunistic_drop", "needs keep, e.g. opportunistic_drop:keep=2"),
    ):
        with pytest.raises(ConfigError, match=why):
            limits.parse(text)
    for limit in ("skip_second:beta=0.5", "opportunistic_drop:keep=1"):
        with pytest.raises(ConfigError, match="compares the pairs of a token"):
            validate.check_model(
                small_model(RouterConfig("expert_choice", noncausal="allow"), capacity_limits=(limit,))
            )
    with pytest.raises(ConfigError, match="3 betas for 2 MoE layers"):
        limits.check((limits.skip_second((0.1, 0.2, 0.3)),), MoEConfig(), 2, causal=True)
    rows = fakes.table(np.zeros((4, 1)), np.ones((4, 1)), np.ones((4, 1)), np.ones((4, 1)), 2, np.arange(4) // 2)
    for limit in (limits.skip_second(0.5), limits.opportunistic_drop(keep=1)):
        with pytest.raises(ValueError, match="rows of expert choice are pairs"):
            limit(rows, context())


def test_skipping_without_renormalisation_is_1t_drop_for_two_experts():
    """s2 < beta s1 says the same of the second expert as s2 / (s1 + s2) < beta / (1 + beta)."""
    table = ref.routed(np.random.default_rng(3), k=2, renormalise=True)
    for beta in (0.2, 0.6, 0.95):
        skip = run(limits.skip_second(beta, renormalise=False), table)
        drop = run(limits.threshold_drop(beta / (1 + beta)), table)
        fakes.assert_same((skip.valid, skip.weight), (drop.valid, drop.weight))
        assert not skip.valid.all()
