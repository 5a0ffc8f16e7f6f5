"""Verdict rules: every verdict by example, margin edges, and what the intervals cover."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from moejax.verdicts import (
    VERDICTS,
    Arm,
    BatchBootstrap,
    Contrast,
    SeedDifferences,
    at_chance,
    better_sign,
    count_verdicts,
    holm,
    judge,
    judge_value,
    side_of,
)


def contrast(name="score > random", a="score", b="random", **fields):
    return Contrast.on_metric(name, "bits_per_byte", a, b, **fields)


def seeds(*values, **fields):
    return Arm(dict(enumerate(values)), **fields)


def one(*values, **fields):
    return Arm({0: float(np.mean(values))}, batches=values, **fields)


def verdict(a, b, same_setting=False, baseline_at_chance=False, **fields):
    (found,) = judge(
        [contrast(**fields)],
        {"score": a, "random": b},
        same_setting=same_setting,
        baseline_at_chance=baseline_at_chance,
    )
    return found


# --- signs ----------------------------------------


def test_better_means_less_in_bits_per_byte_and_more_in_accuracy():
    assert better_sign("bits_per_byte/english") == "a < b"
    assert better_sign("accuracy") == "a > b"
    with pytest.raises(ValueError, match=r"wobble.*no known direction"):
        better_sign("wobble")


def test_a_sign_that_calls_the_claimed_arm_worse_is_refused():
    with pytest.raises(ValueError, match="worse arm in bits_per_byte; swap arm_a and arm_b"):
        Contrast("c", "bits_per_byte", "score", "random", "a > b")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sign": "a>b"}, "sign='a>b': choose one of"),
        ({"claim": "equal"}, "claim='equal': choose one of"),
        ({"arm_b": "score"}, "name two different arms"),
        ({"margin": -0.1}, "margin=-0.1: give a finite number >= 0"),
        ({"margin": math.nan}, "margin=nan"),
    ],
)
def test_contrast_errors_name_the_field(fields, message):
    base = {"name": "c", "metric": "wobble", "arm_a": "score", "arm_b": "random", "sign": "a < b"}
    with pytest.raises(ValueError, match=message):
        Contrast(**(base | fields))


def test_difference_keeps_the_metrics_sign_and_advantage_is_on_the_claimed_side():
    found = verdict(seeds(1.0, 1.1, 1.2), seeds(1.3, 1.42, 1.5))
    assert found.difference == pytest.approx(np.mean([-0.3, -0.32, -0.3]))
    assert found.interval[0] < found.difference < found.interval[1] < 0
    assert found.verdict == "direction"
    higher = judge(
        [Contrast.on_metric("c", "accuracy", "x", "y")],
        {"x": seeds(0.7, 0.71, 0.72), "y": seeds(0.5, 0.52, 0.5)},
    )[0]
    assert higher.difference and higher.interval
    assert higher.difference > 0 and higher.interval[0] > 0 and higher.verdict == "direction"


# --- intervals ----------------------------------------


def test_t_interval_by_hand():
    # mean 0.02, s = 0.01, standard error 0.01 / sqrt(3); t(2, 97.5 %) = 4.302653 from any printed table.
    low, high = SeedDifferences([0.01, 0.02, 0.03]).interval()
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (low, high) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-8)


def test_t_p_value_is_scipys_one_sample_test():
    values = [0.011, 0.024, 0.016, 0.02]
    assert SeedDifferences(values).p_value(0.005) == pytest.approx(stats.ttest_1samp(values, 0.005).pvalue)


def test_equal_differences_give_a_point():
    sample = SeedDifferences([0.25, 0.25, 0.25])
    assert sample.interval() == (0.25, 0.25)
    assert (sample.p_value(0.25), sample.p_value(0.2)) == (1.0, 0.0)


def test_holm_textbook_example():
    # p = 0.01, 0.04, 0.03, 0.005: sorted x (4, 3, 2, 1) = 0.02, 0.03, 0.06, 0.04 -> running maximum.
    adjusted, levels = holm([0.01, 0.04, 0.03, 0.005], alpha=0.05)
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # 0.005 <= 0.05/4 and 0.01 <= 0.05/3 are rejected; 0.03 > 0.05/2 stops, and 0.04 stays at that level.
    assert levels == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])


def test_holm_of_one_is_no_correction():
    assert holm([0.03]) == ([0.03], [0.05])


@pytest.mark.parametrize("seed", range(20))
def test_interval_at_its_holm_level_excludes_the_border_iff_holm_rejects(seed):
    rng = np.random.default_rng(seed)
    base = {s: 1.0 for s in range(4)}
    arms = {"base": Arm(base)}
    contrasts = []
    for i, shift in enumerate((0.005, 0.012, 0.03)):
        arms[f"a{i}"] = Arm({s: 1.0 - shift - rng.normal(0, 0.006) for s in range(4)})
        contrasts.append(contrast(f"c{i}", f"a{i}", "base"))
    for found in judge(contrasts, arms):
        assert found.interval and found.p_value is not None
        low, high = sorted(found.contrast.advantage(v) for v in found.interval)
        rejected = found.p_value <= 0.05
        assert rejected == (not low <= 0.005 <= high)
        assert rejected == (found.verdict != "inconclusive")


def test_bootstrap_is_seeded_paired_and_weighted():
    values, mass = np.linspace(0.0, 0.3, 16), np.arange(1.0, 17.0)
    first, again = BatchBootstrap(values, mass), BatchBootstrap(values, mass)
    assert first.interval() == again.interval()
    assert BatchBootstrap(values, mass, seed=1).interval() != first.interval()
    assert first.mean == pytest.approx(np.sum(values * mass) / mass.sum())
    # The arms vary wildly between batches, their difference does not: pairing makes the interval narrow.
    common = np.random.default_rng(0).normal(2, 1, 40)
    found = verdict(one(*(common - 0.1)), one(*common))
    assert found.interval == pytest.approx((-0.1, -0.1))


def test_bootstrap_interval_is_close_to_t_for_normal_differences():
    values = np.random.default_rng(3).normal(0.01, 0.02, 200)
    # Both approximate the same interval; the resampling error of a quantile is about 2 % of its width.
    np.testing.assert_allclose(
        BatchBootstrap(values).interval(),
        SeedDifferences(values).interval(),
        atol=0.1 * 0.02 / math.sqrt(200),
    )


def test_strata_are_averaged_equally_and_not_mixed():
    # Two domains without spread: the mean over domains is 0.2 whatever their number of batches.
    sample = BatchBootstrap([0.1] * 30 + [0.3] * 10, strata=["a"] * 30 + ["b"] * 10)
    assert sample.mean == pytest.approx(0.2)
    assert sample.interval() == pytest.approx((0.2, 0.2))
    assert sample.n == 10


def test_bootstrap_p_value_is_the_level_at_which_the_interval_reaches_the_border():
    sample = BatchBootstrap(np.random.default_rng(5).normal(0.01, 0.02, 25))
    p = sample.p_value(0.0)
    assert 0.001 < p < 0.2
    low, _ = sample.interval(p)
    # One resample of 10,000 moves the quantile by far less than this part of the interval's width.
    assert low == pytest.approx(0.0, abs=2e-4)


def test_bootstrap_errors():
    with pytest.raises(ValueError, match="3 differences, 2 weights"):
        BatchBootstrap([1, 2, 3], [1, 1])
    with pytest.raises(ValueError, match="must be positive"):
        BatchBootstrap([1, 2, 3], [1, 0, 1])
    with pytest.raises(ValueError, match="1 batches in a stratum"):
        BatchBootstrap([1, 2, 3], strata=["a", "a", "b"])


def _coverage(make_interval, draw, truth, trials):
    return np.mean([low <= truth <= high for low, high in (make_interval(draw()) for _ in range(trials))])


def test_t_interval_covers_95_percent():
    rng = np.random.default_rng(0)
    share = _coverage(lambda v: SeedDifferences(v).interval(), lambda: rng.normal(0.01, 0.02, 3), 0.01, 2000)
    # Exact for normal differences; 3.5 binomial standard errors of 2000 trials = 0.017.
    assert share == pytest.approx(0.95, abs=0.017)


@pytest.mark.parametrize("n", [8, 30])
def test_bootstrap_covers_about_95_percent_with_few_batches(n):
    rng = np.random.default_rng(n)
    share = _coverage(
        lambda v: BatchBootstrap(v, resamples=1000).interval(), lambda: rng.normal(0.01, 0.02, n), 0.01, 600
    )
    # 3.5 binomial standard errors of 600 trials = 0.031, and 0.01 for 1000 resamples. Plain percentiles
    # cover about 0.87 at n = 8 and fail here.
    assert share == pytest.approx(0.95, abs=0.041)


def test_bootstrap_of_skewed_differences_covers_at_least_90_percent():
    rng = np.random.default_rng(9)
    share = _coverage(
        lambda v: BatchBootstrap(v, resamples=1000).interval(), lambda: rng.exponential(0.02, 30), 0.02, 600
    )
    # An exponential (skewness 2) is worse than differences of batch means; it costs 2 to 3 points at n = 30.
    assert 0.90 <= share <= 0.98


# --- verdicts ----------------------------------------


@pytest.mark.parametrize(
    "claim, interval, expected",
    [
        ("better", (0.006, 0.02), "direction"),
        ("better", (0.005, 0.02), "inconclusive"),  # lower end on the margin: not wholly beyond it
        ("better", (-0.001, 0.02), "inconclusive"),
        ("better", (-0.02, 0.02), "inconclusive"),
        ("better", (-0.004, 0.005), "not reproduced"),  # wholly within the margin, its edge included
        ("better", (-0.004, 0.0051), "inconclusive"),
        ("better", (-0.02, 0.004), "not reproduced"),  # partly within, partly on the other side
        ("better", (-0.03, -0.01), "not reproduced"),
        ("no_loss", (-0.004, 0.02), "direction"),
        ("no_loss", (-0.005, 0.02), "inconclusive"),  # the loss's upper bound is on the margin, not under it
        ("no_loss", (-0.02, 0.01), "inconclusive"),
        ("no_loss", (-0.02, -0.005), "not reproduced"),
        ("no_loss", (-0.02, -0.0049), "inconclusive"),
    ],
)
def test_margin_edges(claim, interval, expected):
    assert side_of(interval, contrast(claim=claim)) == expected


def test_each_verdict_is_reached():
    score, far = seeds(1.00, 1.01, 0.99), seeds(1.10, 1.12, 1.10)
    assert verdict(score, far, same_setting=True).verdict == "reproduced"
    assert verdict(score, far).verdict == "direction"
    assert verdict(far, score).verdict == "not reproduced"
    assert verdict(score, seeds(1.0, 1.1, 0.95)).verdict == "inconclusive"
    idle = seeds(1.00, 1.01, 0.99, exercised_share=0.009)
    assert verdict(idle, far).verdict == "not exercised"
    assert verdict(score, far, baseline_at_chance=True).verdict == "not exercised"
    assert verdict(score, Arm({})).verdict == "not run"
    assert judge([contrast()], {"score": score})[0].note == "no measurement of 'random'"


def test_one_model_is_said_in_the_verdict():
    rng = np.random.default_rng(1)
    random = rng.normal(2.0, 0.3, 20)
    better, equal = random - rng.normal(0.05, 0.01, 20), random + rng.normal(0.0, 0.001, 20)
    assert verdict(one(*better), one(*random)).verdict == "direction (one model)"
    assert verdict(one(*better), one(*random), same_setting=True).verdict == "reproduced (one model)"
    assert verdict(one(*random), one(*better)).verdict == "not reproduced (one model)"
    assert verdict(one(*equal), one(*random)).verdict == "not reproduced (one model)"
    assert verdict(one(*equal), one(*random), claim="no_loss").verdict == "direction (one model)"
    assert verdict(one(*(random + rng.normal(0, 0.3, 20))), one(*random)).verdict == "inconclusive (one model)"
    found = verdict(one(*better), one(*random))
    assert found.interval_kind == "95 %, bootstrap over batches, one model"


@pytest.mark.parametrize(
    "a, b, expected, note",
    [
        (seeds(1.0, 1.0), seeds(2.0, 2.0), "inconclusive", "2 seeds in both arms: an interval needs 3"),
        (Arm({0: 1.0}), Arm({1: 2.0}), "inconclusive", "0 seeds in both arms"),
        (Arm({0: 1.0}), Arm({0: 2.0}), "inconclusive (one model)", "no values by evaluation batch"),
        (one(*[1.0] * 7), one(*[2.0] * 7), "inconclusive (one model)", "7 evaluation batches: .* needs 8"),
        (
            one(*[1.0] * 20, strata=["a"] * 15 + ["b"] * 5),
            one(*[2.0] * 20, strata=["a"] * 15 + ["b"] * 5),
            "inconclusive (one model)",
            "5 evaluation batches in the smallest domain",
        ),
    ],
)
def test_too_little_evidence_is_inconclusive_however_large_the_difference(a, b, expected, note):
    found = verdict(a, b)
    assert found.verdict == expected
    assert re.search(note, found.note)
    assert found.interval is None


def test_seeds_of_one_arm_only_are_left_out_and_named():
    found = verdict(seeds(1.0, 1.01, 0.99, 5.0), seeds(1.1, 1.12, 1.1))
    assert sorted(found.differences_by_seed) == [0, 1, 2]
    assert "seeds [3] are in one arm only" in found.note


def test_exercised_share_is_the_least_of_the_arms_that_have_a_mechanism():
    score, far = seeds(1.0, 1.01, 0.99, exercised_share=0.2), seeds(1.1, 1.12, 1.1)
    assert verdict(score, far).exercised_share == 0.2
    assert verdict(score, far).verdict == "direction"
    assert verdict(score, seeds(1.1, 1.12, 1.1, exercised_share=0.01)).verdict == "direction"  # 1 % is enough
    assert verdict(score, seeds(1.1, 1.12, 1.1, exercised_share=0.0)).verdict == "not exercised"


def test_different_batches_cannot_be_paired():
    with pytest.raises(ValueError, match="number of batches of 'score' and 'random' differ"):
        verdict(one(*[1.0] * 9), one(*[2.0] * 8))
    with pytest.raises(ValueError, match="weights of 'score' and 'random' differ"):
        verdict(one(*[1.0] * 8, weights=[1] * 8), one(*[2.0] * 8, weights=[2] * 8))


def test_a_family_has_at_most_three_primary_contrasts_and_never_shrinks():
    four = [contrast(f"c{i}") for i in range(4)]
    with pytest.raises(ValueError, match="at most 3; set primary=False"):
        judge(four, {})
    # s = 0.01, n = 3, advantage 0.0355: from 0.0107 at 95 %, but 0.0355 - 7.65 * 0.00577 < 0.005 at 98.3 %.
    arms = {"score": seeds(1.0, 1.0, 1.0), "random": seeds(1.0255, 1.0355, 1.0455)}
    alone = judge([contrast()], arms)[0]
    stated = judge([contrast(), contrast("c1", b="never"), contrast("c2", b="ran")], arms)
    assert alone.verdict == "direction"
    assert [found.verdict for found in stated] == ["inconclusive", "not run", "not run"]
    assert stated[0].interval_kind == "98.33 %, t over seeds; Holm over 3"
    secondary = judge([contrast(primary=False), contrast("c1", b="never"), contrast("c2", b="ran")], arms)[0]
    assert secondary.verdict == "direction"
    assert secondary.interval_kind.endswith("secondary, not corrected")


def test_values_are_judged_in_the_published_setting_only():
    assert judge_value(64.0, 64.0, same_setting=True)[0] == "reproduced"
    assert judge_value(63.0, 64.0, same_setting=True, tolerance=0.5)[0] == "not reproduced"
    assert judge_value(1.5, 64.0, same_setting=False) == (
        None,
        "another model, data or metric than the published value: judged by contrasts only",
    )
    assert judge_value(None, 64.0, same_setting=True)[0] == "not run"
    assert judge_value(1.5, None, same_setting=True)[0] is None


def test_at_chance():
    assert at_chance(0.269, 0.01, 0.25)
    assert at_chance(0.231, 0.01, 0.25)
    assert not at_chance(0.271, 0.01, 0.25)


def test_counts_list_every_verdict():
    counts = count_verdicts(["direction", None, "direction (one model)", "direction"])
    assert counts == dict.fromkeys(VERDICTS, 0) | {"direction": 2, "direction (one model)": 1}
