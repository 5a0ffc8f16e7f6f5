"""Bits per byte and the metrics of each kind of task, against sums by hand."""

import math

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.evaluate import bits_per_byte
from tests.evaluate_fakes import BIGRAM, BYTE, EOT, MergingTokenizer, bigram, by_hand, run, task_of, value_of


def text_batch(*rows, seq_len=12):
    """Right-padded rows of token lists."""
    batch = {k: np.zeros((len(rows), seq_len), np.int32) for k in ("tokens", "targets", "positions", "segment_ids")}
    batch["mask"] = np.zeros((len(rows), seq_len), bool)
    for r, row in enumerate(rows):
        n = len(row) - 1
        batch["tokens"][r, :n], batch["targets"][r, :n] = row[:-1], row[1:]
        batch["mask"][r, :n] = True
    return batch


def test_one_bit_a_byte_by_hand():
    batches = [text_batch([EOT, *"é漢x".encode(), EOT, 97]), text_batch([EOT, 98], [99, EOT])]

    def half(batch):
        return np.full(batch["tokens"].shape, -math.log(2), np.float32), np.zeros(batch["tokens"].shape, bool)

    result = bits_per_byte(half, batches, BYTE)
    assert (result.bytes, result.tokens) == (8, 8)  # 2 + 3 + 1 bytes and the a; b; no end of text, no padding
    assert result.bits_per_byte == pytest.approx(1, abs=1e-6)
    assert result.perplexity == pytest.approx(2, abs=1e-6)
    assert [size for _, size in result.per_batch] == [7, 1]
    assert [nll for nll, _ in result.per_batch] == pytest.approx([7 * math.log(2), math.log(2)])


def test_bytes_are_those_of_the_tokens():
    result = bits_per_byte(bigram, [text_batch([EOT, 1, 97, 2])], MergingTokenizer())
    nll = -float(BIGRAM[EOT, 1] + BIGRAM[1, 97] + BIGRAM[97, 2])
    assert (result.bytes, result.tokens) == (5, 3)
    assert result.nll_nats == pytest.approx(nll, abs=1e-5)
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / 5, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll / 3), rel=1e-6)


def test_what_padding_and_end_of_text_score_is_never_read():
    batch = text_batch([EOT, 97, 98, EOT], [EOT, 99])
    unread = ~batch["mask"] | (batch["targets"] == EOT)

    def noisy(batch):
        logprob, greedy = bigram(batch)
        return np.where(unread, np.nan, logprob), greedy

    assert bits_per_byte(noisy, [batch], BYTE) == bits_per_byte(bigram, [batch], BYTE)


def test_text_that_a_broken_model_scores_is_an_error():
    def broken(batch):
        logprob, greedy = bigram(batch)
        return np.where(batch["targets"] == 99, np.nan, logprob), greedy

    batches = [text_batch([EOT, 97, 98]), text_batch([EOT, 99, 98])]
    with pytest.raises(FloatingPointError, match="batch 1: the model gave NaN for 1 of 2 tokens"):
        bits_per_byte(broken, batches, BYTE)


def test_text_sums_do_not_depend_on_batching():
    rng = np.random.default_rng(2)
    rows = [[EOT, *rng.integers(0, 256, 11).tolist()] for _ in range(12)]
    one = bits_per_byte(bigram, [text_batch(*rows)], BYTE)
    for size in (1, 5):
        batches = [text_batch(*rows[i : i + size]) for i in range(0, 12, size)]
        assert bits_per_byte(bigram, batches, BYTE).nll_nats == pytest.approx(one.nll_nats, abs=1e-9)


def test_text_without_bytes_is_an_error():
    for batches in ([], [text_batch([EOT, EOT])]):
        with pytest.raises(ConfigError, match="no byte of text"):
            bits_per_byte(bigram, batches, BYTE)


MIXED = task_of(
    "multiple_choice",
    ("The sky", ["blue", "a very long shade of green", "né"], 0),
    ("", ["alone", "together"], 1),
    ("Wörter ", ["für", "漢字", "x", "yz"], 2),
    ("no", ["one", "two"], 0),
    neutral="Answer:",
)


def test_multiple_choice_equals_brute_force():
    result = run(MIXED)
    scores = {"acc": [], "acc_norm": [], "acc_pmi": []}
    for item, got in zip(MIXED.items, result.logprobs, strict=True):
        joint = "" if item.contexts[0] in ("", "Wörter ") else " "
        plain = np.array([by_hand(item.contexts[0], joint + c) for c in item.choices])
        np.testing.assert_allclose(got, plain, atol=1e-5)
        sizes = np.array([len(c.encode()) for c in item.choices])
        pmi = plain - np.array([by_hand("Answer:", joint + c) for c in item.choices])
        for metric, values in {"acc": plain, "acc_norm": plain / sizes, "acc_pmi": pmi}.items():
            scores[metric].append(bool(np.delete(values, item.gold).max() < values[item.gold]))
    for metric, right in scores.items():
        assert result.correct[metric].tolist() == right
        row, mean = value_of(result, metric), np.mean(right)
        assert row["value"] == pytest.approx(mean)
        assert row["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 4))
        assert row["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)
        assert (row["n"], row["truncated"]) == (4, 0)
    assert result.ids == ("t:1", "t:2", "t:3", "t:4")


def forced(**probabilities):
    """A bigram over named letters: ``ab=0.5`` is p(b | a); ``_``: end of text; the rest is 1e-3."""
    table = np.full((257, 257), 1e-3)
    for pair, p in probabilities.items():
        a, b = (EOT if c == "_" else ord(c) for c in pair)
        table[a, b] = p

    def score(batch):
        p = table[batch["tokens"]]
        return np.log(np.take_along_axis(p, batch["targets"][..., None], -1)[..., 0]), p.argmax(-1) == batch["targets"]

    return score


def test_each_metric_can_disagree():
    score = forced(**{" x": 0.4, " y": 0.3, " z": 0.5, "zz": 0.5, "_x": 0.5, "_y": 0.1, "_z": 0.4})
    result = run(task_of("multiple_choice", *[("c ", ["x", "y", "zz"], gold) for gold in range(3)]), score)
    # p = .4, .3, .25; per byte x .4, y .3, zz .5; PMI .4/.5, .3/.1, (.5 x .5)/(.4 x .5)
    assert result.correct["acc"].tolist() == [True, False, False]
    assert result.correct["acc_norm"].tolist() == [False, False, True]
    assert result.correct["acc_pmi"].tolist() == [False, True, False]


def test_pmi_scores_the_same_tokens_after_the_neutral_context():
    seen = []

    def spy(batch):
        seen.extend(
            t[m].tolist() + [g[m][-1]]
            for t, g, m in zip(batch["tokens"], batch["targets"], batch["mask"], strict=True)
            if m.any()
        )
        return bigram(batch)

    run(task_of("multiple_choice", ("q", ["ab", "cd"], 0), ("r", ["ab", "cd"], 1)), spy)
    texts = sorted(bytes(t[1:]).decode() for t in seen)
    assert texts == [" ab", " cd", "q ab", "q cd", "r ab", "r cd"]  # reference terms once, not once an item


def test_last_word_needs_every_token():
    score = forced(**{"a ": 0.9, " d": 0.6, "do": 0.6, "og": 0.6, " c": 0.3, "ca": 0.6})
    result = run(task_of("last_word", ("a", "dog", 0), ("a", "do", 0), ("a", "ca", 0), ("a", "dig", 0)), score)
    assert result.correct["acc"].tolist() == [True, True, False, False]  # c is not the best start
    log_space = math.log(0.9)  # the space that joins belongs to the target
    nll = [-log_space - 3 * math.log(0.6), -log_space - 2 * math.log(0.6)]
    nll += [-log_space - math.log(0.3) - math.log(0.6), -log_space - math.log(0.6) - 2 * math.log(1e-3)]
    ppl = value_of(result, "ppl")
    assert ppl["value"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    assert ppl["stderr"] == pytest.approx(ppl["value"] * np.std(nll, ddof=1) / 2, rel=1e-6)
    assert (value_of(result, "acc")["chance"], ppl["chance"]) == (0.0, None)


def test_winograd_scores_one_continuation_after_each_context():
    task = task_of("winograd", (["Ann met Bo and Ann", "Ann met Bo and Bo"], "left.", 1), (["x ", "y "], "z", 0))
    result = run(task)
    expected = [
        [by_hand(c, " left.") for c in task.items[0].contexts],
        [by_hand(c, "z") for c in ("x ", "y ")],
    ]
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-5)
    # The bigram sees only the last letter: the second item is a tie, which is wrong and counted.
    assert result.correct["acc"].tolist() == [expected[0][1] > expected[0][0], False]
    assert value_of(result, "acc")["ties"] == 1
    assert set(result.correct) == {"acc"}


def test_minimal_pairs_by_phenomenon_and_mean():
    score = forced(_a=0.5, _b=0.1)
    rows = [("", ["a", "b"], 0), ("", ["b", "a"], 0), ("", ["a", "b"], 0), ("", ["a", "b"], 0)]
    result = run(task_of("minimal_pairs", *rows, groups=["p", "p", "p", "q"]), score)
    assert result.correct["acc"].tolist() == [True, False, True, True]
    assert value_of(result, "acc")["value"] == pytest.approx(3 / 4)
    assert value_of(result, "acc", "t/p")["value"] == pytest.approx(2 / 3)
    assert value_of(result, "acc", "t/q")["n"] == 1
    mean = value_of(result, "acc_mean")
    assert mean["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert mean["stderr"] == pytest.approx(math.sqrt(2 / 9 / 3) / 2)
    assert {row["chance"] for row in result.rows} == {0.5}


def test_a_choice_with_the_text_of_the_gold_one_is_no_rival():
    score = forced(_a=0.5, _b=0.1)
    result = run(task_of("multiple_choice", ("", ["a", "b", "a"], 2), ("", ["b", "b"], 0)), score)
    assert result.correct["acc"].tolist() == [True, True]
    assert value_of(result, "acc")["ties"] == 0


def test_impossible_choices_are_wrong_not_nan():
    with np.errstate(divide="ignore"):
        score = forced(_a=0.5, _b=0.0)
        result = run(task_of("multiple_choice", ("", ["a", "b"], 1), ("", ["a", "b"], 0)), score)
    assert all(right.tolist() == [False, True] for right in result.correct.values())
