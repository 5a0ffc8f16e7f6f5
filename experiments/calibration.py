"""Calibration text: what thresholds and the like are found on. Results are never reported on it."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import session
from experiments.trace import in_turn, mesh_of
from moejax import sharding, thresholds
from moejax.config import ConfigError, ExperimentConfig, MeshConfig
from moejax.data import Batch, Corpus, eval_batches
from moejax.evaluate import DomainScore, bits_per_byte
from moejax.model import Decoder
from moejax.thresholds import ScoreTable
from moejax.train import Scorer, score_fn, split
from moejax.types import Limit, MoEMetrics
from moejax.verdicts import MIN_BATCHES, BatchBootstrap

SAY_EVERY = 10.0
"""Seconds between lines of progress."""


def define_flags(values: flags.FlagValues, argv: list[str] | None, split: str = "valid") -> None:
    """Flags that say which text is read, how much, and in which batches; ``split`` is the default."""
    session.define_config_flag(values, argv, "Config file whose data is calibrated on. Default: the checkpoint's own.")
    add: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_enum("split", None, ["train", "valid", "test"], f"Calibration text. Default: {split}.", **add)
    flags.DEFINE_list("domains", [], "Domains to read, with commas. Default: all that have the split.", **add)
    flags.DEFINE_integer("tokens", 1 << 17, "First tokens of each domain of calibration text; 0: all.", 0, **add)
    flags.DEFINE_integer("batch_size", 0, "Sequences of a batch; 0: eval.batch_size.", lower_bound=0, **add)
    flags.DEFINE_integer("devices", 0, "Devices to spread a batch over; 0: the config's mesh.", lower_bound=0, **add)


def with_text(config: ExperimentConfig, values: flags.FlagValues) -> ExperimentConfig:
    """A checkpoint's config with the texts, batch and devices that the flags ask for; its tokenizer stays.

    Raises:
      ConfigError: ``--config`` is not one.
    """
    if values.config is not None:
        other = session.read_config(values.config)
        ours = {"tokenizer": config.data.tokenizer}
        if config.data.tokenizer.startswith("bpe:"):
            ours["root"] = config.data.root
        config = dataclasses.replace(config, data=dataclasses.replace(other.data, **ours), eval=other.eval)
    if values.batch_size:
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=values.batch_size))
    mesh = MeshConfig(data=values.devices) if values.devices else config.mesh
    return dataclasses.replace(config, mesh=mesh)


def calibration_split(config: ExperimentConfig, asked: str | None) -> str:
    """The split that thresholds are found on.

    Raises:
      ConfigError: it is one that results are reported on.
    """
    text = asked or "valid"
    if text == "test" or text == config.eval.final_split:
        other = "train" if config.eval.final_split == "valid" else "valid"
        raise ConfigError(
            f"--split={text}: results are reported on that text (eval.final_split={config.eval.final_split!r}), so "
            f"nothing may be tuned on it: use --split={other}"
        )
    return text


@dataclasses.dataclass(frozen=True)
class Scored:
    """One evaluation."""

    by_domain: dict[str, DomainScore]
    metrics: MoEMetrics

    @property
    def mean(self) -> float:
        """Bits per byte, the mean over domains."""
        return float(np.mean([score.bits_per_byte for score in self.by_domain.values()]))

    def against(self, base: "Scored") -> dict[str, Any]:
        """Loss against ``base``, on the same batches: the difference of bits per byte and its 95 % interval."""
        pieces = [
            (domain, (mine - theirs) / math.log(2) / size, size)
            for domain, score in self.by_domain.items()
            for (mine, size), (theirs, _) in zip(score.per_batch, base.by_domain[domain].per_batch, strict=True)
            if size
        ]
        fewest = min(sum(domain == name for domain, *_ in pieces) for name in self.by_domain)
        interval = None
        if fewest >= MIN_BATCHES:
            names, differences, sizes = zip(*pieces, strict=True)
            interval = BatchBootstrap(differences, sizes, names).interval()
        return {
            "bits_per_byte": self.mean,
            "baseline": base.mean,
            "loss": self.mean - base.mean,
            "interval": interval,
            "interval_kind": BatchBootstrap.kind if interval else f"none: {fewest} batches of {MIN_BATCHES} needed",
        }


class Calibration:
    """A checkpoint's model on texts: the scores of its routers, and bits per byte under limits."""

    def __init__(self, model: Decoder, config: ExperimentConfig, corpus: Corpus) -> None:
        self.config, self.corpus, self.mesh = config, corpus, mesh_of(config)
        self.definition, *states = split(model)
        self.params, self.router_state = (
            jax.device_put(state, sharding.tree_shardings(state, self.mesh)) for state in states
        )
        self.program = score_fn(self.definition, self.mesh)
        self.collecting = thresholds.collect_fn(self.definition, self.mesh)

    def batches(self, domain: str, text: str, tokens: int) -> Iterator[Batch]:
        return eval_batches(self.corpus, domain, text, batch_size=self.config.eval.batch_size, max_tokens=tokens)

    def put(self, batch: dict) -> dict:
        return sharding.put_batch(batch, self.mesh)

    def collect(self, text: str, domains: Sequence[str], tokens: int, in_force: tuple[Limit, ...] = ()) -> ScoreTable:
        """One pass, with these limits in force."""
        begin = said = time.monotonic()

        def each(table: ScoreTable) -> None:
            nonlocal said
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                session.say(f"  {table.tokens:,} tokens, {table.tokens / (said - begin):,.0f} tokens/s")

        run = self.collecting
        streams = in_turn([self.batches(domain, text, tokens) for domain in domains])
        return thresholds.collect(run, self.params, self.router_state, streams, self.put, in_force=in_force, each=each)

    def score(self, in_force: tuple[Limit, ...], text: str, domains: Sequence[str], tokens: int) -> Scored:
        scorer = Scorer(self.program, self.params, self.router_state, self.put, limits=in_force)
        scores = {
            domain: bits_per_byte(scorer, self.batches(domain, text, tokens), self.corpus.tokenizer)
            for domain in domains
        }
        assert scorer.metrics is not None  # a model without experts was refused
        return Scored(scores, jax.device_get(scorer.metrics))

    def expect_one_program(self) -> None:
        """From here on only thresholds change: what compiles anew is told (:meth:`recompiled`)."""
        self.program.armed = True

    def recompiled(self) -> list[str]:
        return [str(found) for found in self.program.take()]
