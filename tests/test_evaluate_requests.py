"""Requests: batching, truncation, token boundaries and refusals change no result, or say so."""

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.evaluate import Request, bucket_lengths, encode_request, evaluate_tasks, request_batches
from moejax.tasks import Task
from tests.evaluate_fakes import (
    BYTE,
    EOT,
    MergingTokenizer,
    bigram,
    by_hand,
    prefix_model,
    run,
    task_of,
    value_of,
)


def random_task(kind="multiple_choice", count=40, seed=4):
    rng = np.random.default_rng(seed)

    def word(low, high):
        return "".join(rng.choice(list("abcdé漢 "), rng.integers(low, high))).strip() + "."

    rows = [(word(0, 90), [word(1, 20) for _ in range(3)], int(rng.integers(3))) for _ in range(count)]
    return task_of(kind, *rows, groups=["even" if i % 2 else "odd" for i in range(count)])


def test_batch_size_changes_nothing():
    task = random_task()
    base = run(task, prefix_model, batch_size=1, seq_len=128)
    for batch_size in (3, 64):
        other = run(task, prefix_model, batch_size=batch_size, seq_len=128)
        for a, b in zip(base.logprobs, other.logprobs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
        assert all((base.correct[m] == other.correct[m]).all() for m in base.correct)
        assert [r["value"] for r in base.rows] == [r["value"] for r in other.rows]


def test_row_order_changes_nothing():
    task = random_task()
    order = np.random.default_rng(0).permutation(len(task.items))
    shuffled = Task(task.name, task.kind, tuple(task.items[i] for i in order))
    a, b = run(task, prefix_model, seq_len=128), run(shuffled, prefix_model, seq_len=128)
    assert b.ids == tuple(a.ids[i] for i in order)
    for j, i in enumerate(order):
        np.testing.assert_allclose(a.logprobs[i], b.logprobs[j], atol=1e-5, rtol=0)
    assert [r["value"] for r in a.rows] == pytest.approx([r["value"] for r in b.rows])


def test_two_runs_are_equal():
    a, b = run(random_task(), prefix_model), run(random_task(), prefix_model)
    assert a.rows == b.rows
    assert all((x == y).all() for x, y in zip(a.logprobs, b.logprobs, strict=True))


def test_padding_and_other_rows_are_never_read():
    def noisy(batch):
        logprob, greedy = bigram(batch)
        return np.where(batch["mask"], logprob, np.nan), greedy

    assert run(random_task(), noisy, batch_size=7).rows == run(random_task(), bigram, batch_size=7).rows


def test_batches_hold_each_request_once_in_few_shapes():
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, 256, n).astype(np.int32), 1) for n in rng.integers(2, 102, 300)]
    assert bucket_lengths(100) == (13, 25, 50, 100)
    seen, shapes = [], set()
    for batch, places in request_batches(requests, batch_size=2, seq_len=100):
        rows, size = batch["tokens"].shape
        shapes.add((rows, size))
        assert rows % 2 == 0 and rows * size <= 200
        assert {k: v.dtype.name for k, v in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), "int32"),
            "mask": "bool",
        }
        for index, row in places:
            n = len(requests[index].tokens) - 1
            assert batch["mask"][row].tolist() == [True] * n + [False] * (size - n)
            assert batch["tokens"][row, :n].tolist() == requests[index].tokens[:-1].tolist()
            assert batch["targets"][row, :n].tolist() == requests[index].tokens[1:].tolist()
            assert batch["positions"][row, :n].tolist() == list(range(n))
            seen.append(index)
        empty = [row for row in range(rows) if row not in {r for _, r in places}]
        assert not batch["mask"][empty].any() and not batch["tokens"][empty].any()
        assert (batch["segment_ids"] == batch["mask"]).all()
    assert sorted(seen) == list(range(300))
    assert shapes == {(14, 13), (8, 25), (4, 50), (2, 100)}
    # Too few for a batch of their own length: they wait for the next bucket, one shape instead of two.
    few = [Request(np.arange(n, dtype=np.int32), 1) for n in (5, 6, 40)]
    assert [b["tokens"].shape for b, _ in request_batches(few, batch_size=4, seq_len=100)] == [(4, 100)]


def test_a_bucket_that_short_requests_do_not_leave():
    """LongRoPE: a request of up to ``short`` tokens is as if it were alone, whatever is beside it."""
    lengths = (3, 20, 30, 31, 60, 100)
    requests = [Request(np.arange(n + 1, dtype=np.int32), 1) for n in lengths]
    width = {}
    for batch, places in request_batches(requests, batch_size=4, seq_len=100, short=30):
        width |= {lengths[index]: batch["tokens"].shape[1] for index, _ in places}
    assert width == {3: 30, 20: 30, 30: 30, 31: 100, 60: 100, 100: 100}
    seen = []

    def score(batch):
        seen.append(batch["tokens"].shape[1])
        return bigram(batch)

    task = task_of("last_word", ("a" * 70, ["b"], 0), ("a", ["b"], 0))
    for short, widths in ((0, [100]), (30, [30, 100])):
        seen.clear()
        evaluate_tasks(score, [task], BYTE, batch_size=4, seq_len=100, short=short)
        assert seen == widths


def test_a_token_that_spans_the_boundary_belongs_to_the_continuation():
    tokenizer = MergingTokenizer()
    request = encode_request(tokenizer, "xa", "bc")
    assert (request.tokens.tolist(), request.start) == ([EOT, ord("x"), 1, ord("c")], 2)
    request = encode_request(tokenizer, "x ", "abab")  # "x", " ", "ab", "ab": the merge of "ab" comes first
    assert (request.tokens.tolist(), request.start) == ([EOT, ord("x"), ord(" "), 1, 1], 3)
    request = encode_request(tokenizer, "x ", "a")
    assert (request.tokens.tolist(), request.start) == ([EOT, ord("x"), 2], 2)
    request = encode_request(tokenizer, "", "ab")
    assert (request.tokens.tolist(), request.start) == ([EOT, 1], 1)


def test_long_contexts_lose_the_same_left_end_for_all_options():
    context, choices = "abcdefghij ", ["long one", "tiny"]
    task = task_of("multiple_choice", (context, choices, 0), ("k ", ["l", "m"], 0))
    result = run(task, prefix_model, seq_len=12)
    # Inputs: eot, 11 of context, 7 of "long one": 19, 7 above 12. Both options lose eot and "abcdef".
    kept = np.frombuffer(b"ghij ", np.uint8)
    expected = []
    for choice in choices:
        tokens = np.concatenate([kept, np.frombuffer(choice.encode(), np.uint8)]).astype(np.int32)
        n = len(tokens) - 1
        batch = {"tokens": tokens[None, :-1], "targets": tokens[None, 1:], "positions": np.arange(n)[None]}
        logprob, _ = prefix_model({**batch, "mask": np.ones((1, n), bool)})
        expected.append(float(np.asarray(logprob)[0, len(kept) - 1 :].sum()))
    np.testing.assert_allclose(result.logprobs[0], expected, atol=1e-4)
    assert result.truncated.tolist() == [True, False]
    assert (result.truncated_requests, result.requests) == (2, 8)  # reference terms fit
    assert value_of(result, "acc")["truncated"] == 1


def test_an_option_as_long_as_a_row_still_has_one_token_before_it():
    result = run(task_of("multiple_choice", ("ab ", ["12345678", "1"], 0)), seq_len=8)
    expected = [by_hand(" ", "12345678"), by_hand(" ", "1")]
    assert result.logprobs[0] == pytest.approx(expected, abs=1e-5)
    assert result.truncated_requests == 2


def test_options_that_cannot_be_scored_are_refused_before_anything_runs():
    def never(batch):
        raise AssertionError("scored before all tasks were checked")

    good = task_of("multiple_choice", ("c", ["a", "b"], 0))
    cases = {
        r"t:1: option 1 has 9 tokens, more than seq_len=8": task_of("multiple_choice", ("ab ", ["1", "123456789"], 0)),
        r"t:1: option 0 is empty": task_of("multiple_choice", ("ab", ["", "b"], 1)),
        r"task 't' has no items": Task("t", "last_word", ()),
    }
    for message, task in cases.items():
        with pytest.raises(ConfigError, match=message):
            evaluate_tasks(never, [good, task], BYTE, batch_size=2, seq_len=8)
    with pytest.raises(ConfigError, match="adds no token"):
        encode_request(BYTE, "abc", "")
    with pytest.raises(ConfigError, match="batch_size=0"):
        evaluate_tasks(never, [good], BYTE, batch_size=0, seq_len=8)


def test_a_broken_model_is_an_error_that_names_the_item():
    def broken(batch):
        logprob, greedy = bigram(batch)
        return np.where(batch["targets"] == ord("z"), np.nan, logprob), greedy

    with pytest.raises(FloatingPointError, match=r"^t:2: "):
        run(task_of("multiple_choice", ("c", ["a", "b"], 0), ("c", ["a", "z"], 0)), broken)
    with pytest.raises(ValueError, match=r"shapes \(4,\)"):
        run(task_of("last_word", ("c", "a", 0)), lambda batch: (np.zeros(4), np.zeros(4, bool)))


def test_several_tasks_and_progress():
    calls = []
    tasks = [random_task(count=6), task_of("last_word", ("a", "b", 0), name="w")]
    results = evaluate_tasks(
        bigram, tasks, BYTE, batch_size=2, seq_len=128, progress=lambda *report: calls.append(report)
    )
    assert [r.task for r in results] == ["t", "w"]
    assert {row["task"] for row in results[0].rows} == {"t", "t/even", "t/odd"}
    for name in ("t", "w"):
        done = [d for task, d, total in calls if task == name]
        assert done == sorted(done) and done[-1] == next(total for task, _, total in calls if task == name)
