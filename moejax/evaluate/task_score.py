"""Tasks scored by log-likelihood: accuracies, their errors and chances, and each item's result."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from moejax.config import ConfigError
from moejax.evaluate.requests import Plan, prepare, request_batches
from moejax.evaluate.scoring import Batch, ScoreFn, Tokenizer, call, exp
from moejax.tasks import Item, Task

Progress = Callable[[str, int, int], None]
"""Called with the task's name, the requests scored and the requests in all."""


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """The rows of one task, and what a paired comparison of two arms needs: the items that each got right."""

    task: str
    rows: list[dict[str, Any]]
    """``task`` (or ``task/group``), ``metric``, ``value``, ``stderr``, ``n``, ``chance``, ``truncated``,
    ``ties``. ``stderr`` is binomial for accuracies and by the delta method for ``ppl``; None where it cannot
    be had. ``chance`` is None for ``ppl``. ``truncated`` counts items with a context that was cut, ``ties``
    items whose gold option and best other one score equally."""
    ids: tuple[str, ...]
    correct: dict[str, Bool[np.ndarray, "n"]]
    """By metric, for each item in the order of ``ids``."""
    logprobs: tuple[Float[np.ndarray, "o"], ...]
    """For each item log p(continuation | context) of its options, in nats."""
    truncated: Bool[np.ndarray, "n"]
    """Items with at least one request whose context lost tokens on the left to fit ``seq_len``."""
    truncated_requests: int
    requests: int
    """Before equal requests are merged, so that it counts every option and every reference term."""


def evaluate_tasks(
    score: ScoreFn,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    short: int = 0,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """Scores each task; ``[row for s in result for row in s.rows]`` are all rows.

    Metrics:
      acc: log p(gold | context) exceeds that of every other option. For ``last_word``: every token of the
        target is the model's most likely one.
      acc_norm (multiple choice): the same with log p divided by the choice's UTF-8 bytes.
      acc_pmi (multiple choice): the same with log p(choice | context) - log p(choice | ``task.neutral``),
        pointwise mutual information (Holtzman et al., 2104.08315); the same choice tokens stand in both
        terms.
      acc_mean (minimal pairs): unweighted mean of acc over groups (BLiMP's phenomena).
      ppl (last word): exp of the mean over items of -log p(target | context), a perplexity per target.
    A tie is wrong, and counted, unless the tied options are the same text as the gold one.

    Args:
      batch_size: rows of a batch of full length; batches of shorter rows have proportionally more, always a
        multiple of it. At most four batch shapes occur, five with ``short``, so the model is compiled as often.
      seq_len: longest row. A longer request loses the left end of its context, all options of an item the
        same number of tokens.
      short: no request of up to so many tokens is scored in wider rows (``requests.narrow_rows``).

    Raises:
      ConfigError: an option longer than ``seq_len``; raised for all tasks before the first call of ``score``.
      FloatingPointError: the model gave NaN for a scored token.
    """
    for field, value in {"batch_size": batch_size, "seq_len": seq_len}.items():
        if value < 1:
            raise ConfigError(f"evaluate_tasks {field}={value}: must be at least 1")
    prepared = [prepare(task, tokenizer, seq_len) for task in tasks]
    return [
        _score_task(score, task, request_batches(plan.requests, batch_size, seq_len, short), plan, progress)
        for task, plan in zip(tasks, prepared, strict=True)
    ]


def _score_task(
    score: ScoreFn, task: Task, batches: Iterator[tuple[Batch, list]], plan: Plan, progress: Progress | None
) -> TaskScore:
    logprob, greedy = np.zeros(len(plan.requests)), np.zeros(len(plan.requests), bool)
    done = 0
    for batch, places in batches:
        token_logprob, token_greedy = call(score, batch)
        for index, row in places:
            request = plan.requests[index]
            scored = slice(request.start - 1, len(request.tokens) - 1)  # input i predicts token i + 1
            logprob[index] = np.sum(token_logprob[row, scored], dtype=np.float64)
            greedy[index] = bool(np.all(token_greedy[row, scored]))
        done += len(places)
        if progress is not None:
            progress(task.name, done, len(plan.requests))
    if np.isnan(logprob).any():
        bad = int(np.flatnonzero(np.isnan(logprob))[0])
        item = next(i for i, o, n in _owners(task, plan) if bad in o or bad in n)
        raise FloatingPointError(
            f"{item.id}: the model gave NaN for a scored token; its parameters or inputs are broken"
        )
    by_item = [logprob[o] for o in plan.options]
    scores = {"acc": by_item}
    if task.kind == "multiple_choice":
        sizes = [np.array([len(c.encode()) for c in item.choices]) for item in task.items]
        scores["acc_norm"] = [lp / size for lp, size in zip(by_item, sizes, strict=True)]
        scores["acc_pmi"] = [_minus(lp, logprob[n]) for lp, n in zip(by_item, plan.neutral, strict=True)]
    if task.kind == "last_word":
        correct = {"acc": np.array([greedy[o[0]] for o in plan.options], bool)}
        tied = {"acc": np.zeros(len(task.items), bool)}
    else:
        margins = {metric: _margins(task, values) for metric, values in scores.items()}
        correct = {metric: margin > 0 for metric, margin in margins.items()}
        tied = {metric: margin == 0 for metric, margin in margins.items()}
    cut = np.array([c > 0 for c in plan.cut], bool)
    count = sum(len(o) for o in plan.options) + sum(len(n) for n in plan.neutral)
    ids = tuple(item.id for item in task.items)
    rows = _rows(task, correct, tied, by_item, cut)
    return TaskScore(task.name, rows, ids, correct, tuple(by_item), cut, sum(plan.cut), count)


def _owners(task: Task, plan: Plan) -> Iterator[tuple[Item, list[int], list[int]]]:
    for i, item in enumerate(task.items):
        yield item, plan.options[i], plan.neutral[i] if plan.neutral else []


def _margins(task: Task, scores: list[np.ndarray]) -> Float[np.ndarray, "n"]:
    """By how much the gold option of each item beats the best option with another text; inf without such."""

    def margin(item: Item, values: np.ndarray) -> float:
        options = list(zip(item.contexts, item.choices, strict=True))
        others = [v for v, option in zip(values, options, strict=True) if option != options[item.gold]]
        best = max(others, default=-math.inf)
        if values[item.gold] == best:  # also where both are infinite
            return 0.0
        return float(values[item.gold] - best)

    return np.array([margin(item, values) for item, values in zip(task.items, scores, strict=True)])


def _rows(
    task: Task,
    correct: dict[str, np.ndarray],
    tied: dict[str, np.ndarray],
    logprobs: list[np.ndarray],
    cut: np.ndarray,
) -> list[dict[str, Any]]:
    groups = np.array([item.group for item in task.items])
    names = sorted(set(groups.tolist()) - {""})
    parts = [(task.name, np.ones(len(groups), bool))]
    if len(names) > 1:
        parts += [(f"{task.name}/{name}", groups == name) for name in names]
    odds = np.array([0.0 if task.kind == "last_word" else 1 / len(item.choices) for item in task.items])
    rows: list[dict[str, Any]] = []

    def add(name: str, metric: str, value: float, stderr: float | None, where: np.ndarray, **more: Any) -> None:
        row = {"task": name, "metric": metric, "value": value, "stderr": stderr, "n": int(where.sum())}
        rows.append(row | {"chance": None, "truncated": int(cut[where].sum()), "ties": 0} | more)

    for name, where in parts:
        for metric, right in correct.items():
            value, n = float(right[where].mean()), int(where.sum())
            stderr, ties = math.sqrt(value * (1 - value) / n), int(tied[metric][where].sum())
            add(name, metric, value, stderr, where, chance=float(odds[where].mean()), ties=ties)
        if task.kind == "last_word":
            nll = -np.array([lp[0] for lp, w in zip(logprobs, where, strict=True) if w])
            add(name, "ppl", *_perplexity(nll), where)
    if task.kind == "minimal_pairs" and len(names) > 1:
        by_group = [row for row in rows[1:] if row["metric"] == "acc"]
        mean = math.fsum(row["value"] for row in by_group) / len(by_group)
        stderr = math.sqrt(math.fsum(row["stderr"] ** 2 for row in by_group)) / len(by_group)
        ties = sum(row["ties"] for row in by_group)
        add(task.name, "acc_mean", mean, stderr, groups != "", chance=0.5, ties=ties)
    return rows


def _perplexity(nll: Float[np.ndarray, "n"]) -> tuple[float, float | None]:
    """``exp(mean nll)`` and its standard error by the delta method, ``exp(mean) * std / sqrt(n)``."""
    value = exp(float(nll.mean()))
    if len(nll) < 2 or not math.isfinite(value):
        return value, None
    return value, value * float(nll.std(ddof=1)) / math.sqrt(len(nll))


def _minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a - b`` where a choice that is impossible in its context (-inf) stays so, whatever ``b`` is."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(a), -np.inf, a - b)
