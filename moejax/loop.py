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
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import checkpoint, count, metrics, pretrained, watch
from moejax.config import ConfigError, ExperimentConfig, config_hash, to_dict
from moejax.data import TOKEN_CLASSES, Corpus, TokenClassifier, eval_batches, train_iterator
from moejax.evaluate import DomainScore, bits_per_byte
from moejax.interrupt import Interrupt
from moejax.meter import Meter
from moejax.model import moe_layer_ids
from moejax.progress import TrainProgress, show_load
from moejax.recompile import Watched
from moejax.sharding import TOKEN_AXES, put_batch
from moejax.train import Scorer, Trainer, TrainState, score_fn
from moejax.types import MoEMetrics


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


def check_origin(origin: dict[str, Any], config: ExperimentConfig, corpus: Corpus) -> None:
    """Whether the weights that :func:`moejax.pretrained.origin` told of are still there and fit; reads no array.

    Raises:
      ConfigError: they are gone, or of another tokenizer or model.
    """
    pretrained.still(origin)
    theirs, ours = pretrained.tokenizer_hash(origin), corpus.tokenizer.hash
    if theirs is not None and theirs != ours:
        raise ConfigError(
            f"init_from={config.init_from} was trained with another tokenizer ({theirs}, "
            f"here {ours}): its embeddings would stand for other tokens; use the same data.tokenizer, or 'init_from'"
        )
    pretrained.check_fit(origin, config.model)


class Run:
    """One training run in one workdir.

    ``origin``: what :func:`moejax.pretrained.origin` said of ``init_from`` when the workdir was begun. The parameters
    are taken from that step folder, and must still be the same; None: from what ``init_from`` means now.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        corpus: Corpus,
        mesh: jax.sharding.Mesh,
        workdir: Path,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.corpus, self.mesh, self.workdir, self.origin = config, corpus, mesh, workdir, origin
        self.main = jax.process_index() == 0
        self.trainer = Trainer(config, padded_byte_lengths(corpus, config.model.vocab_size), mesh)
        self._score = score_fn(self.trainer.graphdef, mesh, len(TOKEN_CLASSES))
        self._classify = TokenClassifier(corpus.tokenizer)
        self.moe_layers = moe_layer_ids(config.model)
        moe, warm = config.model.moe, config.train.warmup_steps
        self.health = watch.LoadWatch(config.watch, moe.num_experts, self.moe_layers, warm, moe.zero_experts)
        self._warn: Callable[[str], None] = lambda text: None
        self._validated = False
        self._load: dict[str, Any] | None = None  # of the newest validation
        self._started: tuple[TrainState, dict[str, Any] | None] | None = None
        self._given: TrainState | None = None  # without training: the weights of init_from
        self._micro = NamedSharding(mesh, P(None, TOKEN_AXES))
        self.writer = metrics.JsonlWriter(workdir / "metrics.jsonl")
        self.checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints)

    def close(self) -> None:
        self.checkpoints.close()
        self.writer.close()

    def scorer(self, state: TrainState, **settings: Any) -> Scorer:
        """The model of ``state`` as evaluation sees it; settings are those of :class:`~moejax.train.Scorer`."""
        put = lambda batch: put_batch(batch, self.mesh)  # noqa: E731
        settings = {"classify": self._classify, **settings}
        return Scorer(self._score, state.params, state.router_state, put, **settings)

    def restore(self, step: int) -> tuple[TrainState, dict[str, Any]]:
        return self.checkpoints.restore(self.trainer.abstract, step)

    def best(self) -> tuple[TrainState, int]:
        """The state with the best validation score; without training, the weights that the run begins from.

        Raises:
          ConfigError: the workdir has no checkpoint.
        """
        if self.config.train.steps == 0:
            return self.start()[0], 0
        step = self.checkpoints.best()
        if step is None:
            raise ConfigError(f"{self.workdir}: no checkpoint to evaluate; train first")
        return self.restore(step)[0], step

    def prepare(self) -> None:
        """Reads what :meth:`train` goes on from, so that damage is found before anything is written.

        Raises:
          ConfigError: a checkpoint cannot be read, or does not fit.
        """
        self._started = self.start()

    def start(self) -> tuple[TrainState, dict[str, Any] | None]:
        """The newest checkpoint, or a fresh state (from ``init_from`` where that is set)."""
        if self.config.train.steps == 0:
            self._given = self._given or self._as_given()
            return self._given, None
        latest = self.checkpoints.latest()
        if latest is not None:
            state, meta = self.restore(latest)
            self.origin = meta.get("init_from", self.origin)
            return state, meta
        state = self.trainer.init()
        if self.config.init_from:
            params, router_state = self._pretrained("float32")
            state = dataclasses.replace(state, params=params, router_state=router_state)
        return state, None

    def _as_given(self) -> TrainState:
        """A state without an optimizer; matrices of a Hugging Face folder in the type of the computation."""
        params, router_state = self._pretrained(self.config.model.compute_dtype)
        return TrainState(step=jnp.int32(0), params=params, router_state=router_state, opt_state=())

    def _pretrained(self, dtype: pretrained.Dtype) -> tuple:
        self.origin = self.origin or pretrained.origin(self.config.init_from)
        check_origin(self.origin, self.config, self.corpus)
        abstract = self.trainer.abstract
        return pretrained.parameters(self.origin, abstract.params, abstract.router_state, mesh=self.mesh, dtype=dtype)

    def validate(self, state: TrainState, step: int) -> float:
        """Writes validation and expert-load rows; returns mean bits per byte over domains."""
        self._score.armed = self._validated  # a later validation finds its program; a table's scoring need not
        scores, loads = self.score_domains(self.scorer(state), "valid", self.config.eval.max_tokens)
        self._score.armed, self._validated = False, True
        if not scores:
            raise ConfigError("no domain has a validation split: set data.domains.<name>.valid")
        self._report_compilations(self._score, step)
        mean = float(np.mean([s.bits_per_byte for s in scores.values()]))
        row = {"kind": "valid", "step": step, "mean_bits_per_byte": mean,
               "bits_per_byte": {d: s.bits_per_byte for d, s in scores.items()},
               "loss": {d: s.nll_nats / s.tokens for d, s in scores.items()}}  # fmt: skip
        self.writer.write(row)
        if loads:
            self._load = self.load_row("load", step, loads)
            self.writer.write(self._load)
        return mean

    def score_domains(
        self, scorer: Scorer, split: str, max_tokens: int
    ) -> tuple[dict[str, DomainScore], dict[str, MoEMetrics]]:
        """Scores of each domain that has the split, and the sums of its expert loads (none without experts)."""
        scores: dict[str, DomainScore] = {}
        loads: dict[str, MoEMetrics] = {}
        for domain in self.corpus.domains:
            if split not in self.corpus.splits(domain):
                continue
            batches = eval_batches(
                self.corpus, domain, split, batch_size=self.config.eval.batch_size, max_tokens=max_tokens
            )
            scorer.metrics = None
            scores[domain] = bits_per_byte(scorer, batches, self.corpus.tokenizer)
            if scorer.metrics is not None:
                loads[domain] = scorer.metrics
        return scores, loads

    def load_row(self, kind: str, step: int, loads: dict[str, MoEMetrics]) -> dict[str, Any]:
        """The row of expert loads by layer, domain and token class (:func:`moejax.metrics.load_row`)."""
        return {"kind": kind, "step": step, "layers": self.moe_layers, **metrics.load_row(loads, TOKEN_CLASSES)}

    def train(self, *, max_seconds: float = 0.0, say: Callable[[str], None] | None = None) -> Outcome:
        """Trains to ``train.steps``, or until Ctrl-C, SIGTERM or ``max_seconds``; then a checkpoint is saved.

        Raises:
          FloatingPointError: loss, gradients or parameters are not finite; the message names the first such step, the
            layers' statistics, and the last good checkpoint.
        """
        config, begin = self.config.train, time.monotonic()
        state, meta = self._started or self.start()
        self._started = None  # the step function takes the state's memory
        step = int(state.step)
        if self.main:
            self.writer.forget_after(step)  # this call writes them again
        if step >= config.steps:
            return Outcome(step, True, "finished")
        self.checkpoints.require_space(state)
        data = train_iterator(self.corpus, batch_size=config.batch_size, seed=config.seed)
        if meta is not None:
            data.set_state(meta["data"])
        peak, peak_source = metrics.peak_flops(self.mesh.size)
        meter = Meter(3 * count.forward_flops_per_token(self.config.model, self.config.data.seq_len), peak)
        meter.restore(meta.get("since_log", []) if meta is not None else [])
        tokens_per_step = config.batch_size * self.config.data.seq_len
        reason, fresh, saved = "finished", True, step if meta is not None else -1
        before = 0.0 if meta is None else float(meta.get("seconds", 0.0))  # of earlier calls
        with (
            TrainProgress(config.steps, step, self.main) as progress,
            Interrupt(say or progress.note) as interrupt,
        ):
            self._warn = say or progress.warn
            told, say = say, say or progress.note
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
                self.checkpoints.check()
                if self._report_compilations(self.trainer.step_fn, step):
                    jax.block_until_ready(result.loss)
                    meter.leave_out()
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
                    self._require_finite(meter, step)
                if last or step % config.eval_every == 0:
                    score = self.validate(state, step)
                    say(f"step {step}: validation {score:.4f} bits per byte")
                if saving and step != saved:
                    self._save(state, step, data.get_state(), score, before + time.monotonic() - begin, meter.state())
                    saved = step
                if saving:
                    meter.go_on()
                if stop and not last:
                    reason = "interrupted" if asked else "time"
                    break
            self.checkpoints.steps()  # waits for the save under way
            if interrupt.asked:  # also in the last step: what comes after the training must not begin
                reason = "interrupted"
        if self.main:
            self._summarise(step, told)
        return Outcome(step, step >= config.steps, reason)

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        micros = self.config.train.accumulate
        keys = ("tokens", "targets", "positions", "segment_ids", "mask")
        return {k: jax.device_put(batch[k].reshape(micros, -1, *batch[k].shape[1:]), self._micro) for k in keys}

    def _log(self, meter: Meter, progress: TrainProgress, step: int, tokens_per_step: int, seconds: float) -> None:
        self._require_finite(meter, step)
        means, window = meter.row()
        row: dict[str, Any] = {"kind": "train", "step": step, "tokens": step * tokens_per_step, "time": seconds,
               "learning_rate": float(np.asarray(self.trainer.schedule(step - 1))), **means}  # fmt: skip
        self.writer.write(row)
        progress.metrics(row)
        for alarm in self.health.look(step, window):
            self._warning(step, alarm.text, alarm.row())

    def _warning(self, step: int, text: str, row: dict[str, Any]) -> None:
        self.writer.write({"kind": "warning", "step": step, "text": text, **row})
        self._warn(f"{'step' if row.get('state') == 'recovered' else 'WARNING at step'} {step}: {text}")

    def _report_compilations(self, fn: Watched, step: int) -> bool:
        """Says what was compiled again although its first program was there; whether there was something."""
        recompilations = fn.take()
        for found in recompilations:
            row = {"rule": "recompilation", "differences": list(found.differences), "seconds": found.seconds}
            self._warning(step, str(found), row)
        return bool(recompilations)

    def _summarise(self, step: int, say: Callable[[str], None] | None) -> None:
        """What stays on the screen at the end: expert loads of the last validation, and what was warned of."""
        if self._load is not None and self._load["step"] == step:
            show_load(self._load, f"expert load at step {step}, validation text (docs/healthy.md):", say)
        for line in self.health.summary():
            self._warn(f"WARNING {line}")

    def _require_finite(self, meter: Meter, step: int) -> None:
        """Raises FloatingPointError for the first step since the last log line that is not finite."""
        broken = meter.broken(step)
        if broken is None:
            return
        steps = self.checkpoints.steps()
        good = (
            f"the last good checkpoint is step {steps[-1]} in {self.workdir / 'checkpoints'}"
            if steps
            else "no checkpoint yet"
        )
        self.writer.write(watch.failure_row(broken, self.moe_layers))
        raise FloatingPointError(watch.failure_text(broken, self.moe_layers, good))

    def _save(
        self,
        state: TrainState,
        step: int,
        data_state: dict[str, Any],
        score: float | None,
        seconds: float,
        since_log: list[dict[str, Any]],
    ) -> None:
        meta = {
            "step": step,
            "seconds": seconds,
            "data": data_state,
            "config": to_dict(self.config),
            "config_hash": config_hash(self.config),
            "since_log": since_log,  # so that a row whose steps two calls made is that of an undisturbed run
        }
        if self.origin is not None:
            meta["init_from"] = self.origin
        self.checkpoints.save(step, state, meta, score=score)
