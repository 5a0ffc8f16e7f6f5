"""Tokenizers, models in closed form and tasks for the tests of evaluation."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.evaluate import evaluate_tasks
from moejax.tasks import Item, Task

EOT = 256


class ByteTokenizer:
    """One token a byte, and 256 for the end of text."""

    name, vocab_size, eot_id, stop_ids = "byte", 257, EOT, (EOT,)
    byte_lengths = np.append(np.ones(256, np.int32), 0).astype(np.int32)

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


class MergingTokenizer:
    """Bytes, but greedily one token (1) for "ab" and one (2) for " a": tokens that may span a boundary."""

    vocab_size, eot_id = 257, EOT
    byte_lengths = np.array([1, 2, 2] + [1] * 253 + [0], np.int32)

    def encode(self, text):
        return np.frombuffer(text.encode().replace(b"ab", b"\1").replace(b" a", b"\2"), np.uint8).astype(np.int32)


BYTE = ByteTokenizer()
LOGITS = np.random.default_rng(0).normal(0, 2, (257, 257))
BIGRAM = (LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))).astype(np.float32)


def bigram(batch):
    logp = BIGRAM[batch["tokens"]]
    return np.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0], logp.argmax(-1) == batch["targets"]


def by_hand(context, continuation):
    """log p(continuation | eot, context) of the bigram, byte by byte in float64."""
    tokens = [EOT, *context.encode(), *continuation.encode()]
    start = 1 + len(context.encode())
    return sum(float(BIGRAM[tokens[i - 1], tokens[i]]) for i in range(start, len(tokens)))


@jax.jit
def _prefix_model(tokens, targets, positions, mask):
    rng = np.random.default_rng(1)
    embed = jnp.asarray(rng.normal(size=(257, 16)), jnp.float32)
    out = jnp.asarray(rng.normal(size=(16, 257)) * 0.3, jnp.float32)
    seen = jnp.cumsum(embed[tokens] * mask[..., None], axis=1) / (positions[..., None] + 1)
    logp = jax.nn.log_softmax((seen + embed[tokens] * jnp.cos(positions)[..., None]) @ out)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], logp.argmax(-1) == targets


def prefix_model(batch):
    """A causal model whose prediction depends on every real token before it and on the position."""
    return _prefix_model(batch["tokens"], batch["targets"], batch["positions"], batch["mask"])


def task_of(kind, *rows, name="t", neutral="", groups=None):
    """Rows are ``(contexts, choices, gold)``; a single string stands for the same one in every option."""
    items = []
    for i, (contexts, choices, gold) in enumerate(rows):
        count = 1 if isinstance(contexts, str) and isinstance(choices, str) else 0
        count = count or len(contexts if isinstance(choices, str) else choices)
        contexts, choices = ((x,) * count if isinstance(x, str) else tuple(x) for x in (contexts, choices))
        items.append(Item(f"{name}:{i + 1}", contexts, choices, gold, groups[i] if groups else ""))
    return Task(name, kind, tuple(items), neutral)


def run(task, score=bigram, tokenizer=BYTE, batch_size=4, seq_len=64, **more):
    return evaluate_tasks(score, [task], tokenizer, batch_size=batch_size, seq_len=seq_len, **more)[0]


def value_of(result, metric, task="t"):
    (row,) = (r for r in result.rows if (r["task"], r["metric"]) == (task, metric))
    return row
