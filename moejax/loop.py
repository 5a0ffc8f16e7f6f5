"""The loop around the training step: data, log lines, validation, checkpoints, stopping and resuming.

A workdir holds everything: ``metrics.jsonl`` and ``checkpoints/`` are written here. The same call on the same workdir
continues at the example after the last checkpoint; a finished run returns at once.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import checkpoint, count, metrics
from moejax.config import ConfigError, ExperimentConfig, config_hash, to_dict
from moejax.data import Corpus, eval_batches, train_iterator
from moejax.evaluate import DomainScore, bits_per_byte
from moejax.model import moe_layer_ids
from moejax.progress import TrainProgress
from moejax.sharding import TOKEN_AXES, put_batch
from moejax.train import Interrupt, Meter, Scorer, Trainer, TrainState, score_fn


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of :func:`train` ended."""

    step: int
    finished: bool
    reason: str
    """"finished", "interrupted" or "time"."""


def padded_byte_lengths(corpus: Corpus, vocab_size: int) -> np.ndarray:
    """Bytes of each token id of the model; 0 for ids that the tokenizer does not have."""
    lengths = np.zeros(vocab_size, np.int32)
    lengths[: corpus.tokenizer.vocab_size] = corpus.tokenizer.byte_lengths
    return lengths


def resolve_vocab(config: ExperimentConfig, corpus: Corpus) -> ExperimentConfig:
    """Fills ``model.vocab_size=0`` in: the tokenizer's size rounded up to a multiple of 64.

    Raises:
      ConfigError: a stated vocabulary smaller than the tokenizer's.
    """
    size, needed = config.model.vocab_size, corpus.tokenizer.vocab_size
    if size == 0:
        size = -(-needed // 64) * 64
    if size < needed:
        raise ConfigError(
            f"model.vocab_size={size} is smaller than the tokenizer {corpus.tokenizer.name!r} with {needed} "
            f"tokens: set it to {needed} or more, or to 0 to take the tokenizer's"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


class Run:
    """One training run in one workdir."""

    def __init__(self, config: ExperimentConfig, corpus: Corpus, mesh: jax.sharding.Mesh, workdir: Path) -> None:
        self.config, self.corpus, self.mesh, self.workdir = config, corpus, mesh, workdir
        self.main = jax.process_index() == 0
        self.trainer = Trainer(config, padded_byte_lengths(corpus, config.model.vocab_size), mesh)
        self._score = score_fn(self.trainer.graphdef, mesh)
        self._micro = NamedSharding(mesh, P(None, TOKEN_AXES))
        self.writer = metrics.JsonlWriter(workdir / "metrics.jsonl")
        self.checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints)

    def close(self) -> None:
        self.checkpoints.close()
        self.writer.close()

    def scorer(self, state: TrainState, **settings: Any) -> Scorer:
        """The model of ``state`` as evaluation sees it; settings are those of :class:`~moejax.train.Scorer`."""
        put = lambda batch: put_batch(batch, self.mesh)  # noqa: E731
        return Scorer(self._score, state.params, state.router_state, put, **settings)

    def restore(self, step: int) -> tuple[TrainState, dict[str, Any]]:
        return self.checkpoints.restore(self.trainer.abstract, step)

    def best(self) -> tuple[TrainState, int]:
        """The state with the best validation score.

        Raises:
          ConfigError: the workdir has no checkpoint.
        """
        step = self.checkpoints.best()
        if step is None:
            raise ConfigError(f"{self.workdir}: no checkpoint to evaluate; train first")
        return self.restore(step)[0], step

    def start(self) -> tuple[TrainState, dict[str, Any] | None]:
        """The newest checkpoint, or a fresh state (from ``init_from`` where that is set)."""
        latest = self.checkpoints.latest()
        if latest is not None:
            return self.restore(latest)
        state = self.trainer.init()
        if self.config.init_from:
            folder = checkpoint.locate(self.config.init_from)
            params, meta = checkpoint.load(folder, self.trainer.abstract.params, prefix="params/")
            theirs, ours = meta.get("data", {}).get("tokenizer"), self.corpus.tokenizer.hash
            if theirs is not None and theirs != ours:
                raise ConfigError(
                    f"init_from={self.config.init_from} was trained with another tokenizer ({theirs}, "
                    f"here {ours}): its embeddings would stand for other tokens; use the same data.tokenizer"
                )
            router_state, _ = checkpoint.load(folder, self.trainer.abstract.router_state, prefix="router_state/")
            state = dataclasses.replace(state, params=params, router_state=router_state)
        return state, None

    def validate(self, state: TrainState, step: int) -> float:
        """Writes validation and expert-load rows; returns mean bits per byte over domains."""
        scorer = self.scorer(state)
        config = self.config.eval
        scores: dict[str, DomainScore] = {}
        for domain in self.corpus.domains:
            if "valid" in self.corpus.splits(domain):
                batches = eval_batches(
                    self.corpus, domain, "valid", batch_size=config.batch_size, max_tokens=config.max_tokens
                )
                scores[domain] = bits_per_byte(scorer, batches, self.corpus.tokenizer)
        if not scores:
            raise ConfigError("no domain has a validation split: set data.domains.<name>.valid")
        mean = float(np.mean([s.bits_per_byte for s in scores.values()]))
        row = {"kind": "valid", "step": step, "mean_bits_per_byte": mean,
               "bits_per_byte": {d: s.bits_per_byte for d, s in scores.items()},
               "loss": {d: s.nll_nats / s.tokens for d, s in scores.items()}}  # fmt: skip
        self.writer.write(row)
        if scorer.metrics is not None:
            load = metrics.load_summary(scorer.metrics)
            self.writer.write({"kind": "load", "step": step, "layers": moe_layer_ids(self.config.model), **load})
        return mean

    def train(self, *, max_seconds: float = 0.0, say: Callable[[str], None] | None = None) -> Outcome:
        """Trains to ``train.steps``, or until Ctrl-C, SIGTERM or ``max_seconds``; then a checkpoint is saved.

        Raises:
          FloatingPointError: the loss is not finite; the message names the step and the last good checkpoint.
        """
        config, begin = self.config.train, time.monotonic()
        state, meta = self.start()
        step = int(state.step)
        if step >= config.steps:
            return Outcome(step, True, "finished")
        data = train_iterator(self.corpus, batch_size=config.batch_size, seed=config.seed)
        if meta is not None:
            data.set_state(meta["data"])
        peak, peak_source = metrics.peak_flops(self.mesh.size)
        meter = Meter(3 * count.forward_flops_per_token(self.config.model, self.config.data.seq_len), peak)
        tokens_per_step = config.batch_size * self.config.data.seq_len
        reason, fresh, saved = "finished", True, step if meta is not None else -1
        before = 0.0 if meta is None else float(meta.get("seconds", 0.0))  # of earlier calls
        with TrainProgress(config.steps, step, self.main) as progress, Interrupt() as interrupt:
            say = say or progress.note
            if step:
                say(f"resuming at step {step}")
            say(f"peak for MFU: {peak / 1e12:.2f} TFLOP/s ({peak_source}); compiling the training step ...")
            while step < config.steps:
                state, result = self.trainer.step(state, self._put(next(data)))
                step += 1
                meter.add(result)
                if fresh:  # the first step compiles: keep it out of every rate
                    jax.block_until_ready(result.loss)
                    say(f"compiled and ran the first step in {time.monotonic() - begin:.1f} s")
                    meter.leave_out()
                    fresh = False
                progress.step(step)
                if step % config.log_every == 0 or step == config.steps:
                    self._log(meter, progress, step, tokens_per_step, before + time.monotonic() - begin)
                asked = interrupt.asked
                out_of_time = bool(max_seconds) and time.monotonic() - begin > max_seconds
                stop = asked or out_of_time
                last = step == config.steps
                score = None
                saving = last or stop or step % config.eval_every == 0 or step % config.checkpoint_every == 0
                if saving:
                    meter.pause()
                    # a checkpoint that follows a broken step would be taken for a good one
                    self._require_finite(float(result.loss), float(result.grad_norm), step)
                if last or step % config.eval_every == 0:
                    score = self.validate(state, step)
                    say(f"step {step}: validation {score:.4f} bits per byte")
                if saving and step != saved:
                    self._save(state, step, data.get_state(), score, before + time.monotonic() - begin)
                    saved = step
                if saving:
                    meter.go_on()
                if stop and not last:
                    reason = "interrupted" if asked else "time"
                    break
            self.checkpoints.steps()  # waits for the save under way
        return Outcome(step, step >= config.steps, reason)

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        micros = self.config.train.accumulate
        keys = ("tokens", "targets", "positions", "segment_ids", "mask")
        return {k: jax.device_put(batch[k].reshape(micros, -1, *batch[k].shape[1:]), self._micro) for k in keys}

    def _log(self, meter: Meter, progress: TrainProgress, step: int, tokens_per_step: int, seconds: float) -> None:
        row: dict[str, Any] = {"kind": "train", "step": step, "tokens": step * tokens_per_step, "time": seconds,
               "learning_rate": float(np.asarray(self.trainer.schedule(step - 1))), **meter.row()}  # fmt: skip
        self.writer.write(row)
        progress.metrics(row)
        self._require_finite(row["loss"], row["grad_norm"], step)

    def _require_finite(self, loss: float, grad_norm: float, step: int) -> None:
        if np.isfinite(loss) and np.isfinite(grad_norm):
            return
        steps = self.checkpoints.steps()
        good = (
            f"the last good checkpoint is step {steps[-1]} in {self.workdir / 'checkpoints'}"
            if steps
            else "no checkpoint yet"
        )
        raise FloatingPointError(
            f"loss is {loss} at step {step} (gradient norm {grad_norm}); {good}. Lower train.learning_rate or "
            "lengthen train.warmup_steps in a new --workdir, from that step by --config.init_from."
        )

    def _save(
        self, state: TrainState, step: int, data_state: dict[str, Any], score: float | None, seconds: float
    ) -> None:
        meta = {
            "step": step,
            "seconds": seconds,
            "data": data_state,
            "config": to_dict(self.config),
            "config_hash": config_hash(self.config),
        }
        self.checkpoints.save(step, state, meta, score=score)
