"""Held-out text and tasks, scored through one callable, without any model in sight.

A model comes in as a :data:`ScoreFn`. From it come bits per byte by domain (:func:`bits_per_byte`) and the
accuracy of tasks (:func:`evaluate_tasks`, forms in ``moejax.tasks``). Sums are float64 on the host. Results
do not depend on the batch size or on the order of rows, as far as the model's output for a sequence does not
depend on the rest of its batch: an MoE layer with limits drops pairs by the load of the whole batch, so there
the batch shape is part of the result.

Axis letters: B batch, S sequence, V vocabulary.
"""

from moejax.evaluate.requests import Request, bucket_lengths, encode_request, narrow_rows, prepare, request_batches
from moejax.evaluate.scoring import Batch, DomainScore, ScoreFn, Tokenizer, bits_per_byte
from moejax.evaluate.task_score import Progress, TaskScore, evaluate_tasks

__all__ = [
    "Batch",
    "DomainScore",
    "Progress",
    "Request",
    "ScoreFn",
    "TaskScore",
    "Tokenizer",
    "bits_per_byte",
    "bucket_lengths",
    "encode_request",
    "evaluate_tasks",
    "narrow_rows",
    "prepare",
    "request_batches",
]
