"""The loop around the step: what it writes, and that stopping and resuming change nothing."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from moejax import metrics
from moejax.config import ConfigError, ExperimentConfig, config_hash, from_mapping
from moejax.data import Corpus, eval_batches, load_corpus
from moejax.evaluate import bits_per_byte
from moejax.loop import Outcome, Run, padded_byte_lengths, resolve_vocab
from moejax.sharding import make_mesh
from tests.small import flat, load_plain, write_workspace

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    plain = load_plain(write_workspace(tmp_path_factory.mktemp("texts")))
    return from_mapping(ExperimentConfig, plain)


@pytest.fixture(scope="module")
def corpus(config: ExperimentConfig) -> Corpus:
    return load_corpus(config.data)


@pytest.fixture(scope="module")
def make(config: ExperimentConfig, corpus: Corpus) -> Callable[..., Run]:
    def make(workdir: Path, init_from: str = "", **train: Any) -> Run:
        workdir.mkdir(parents=True, exist_ok=True)
        changed = dataclasses.replace(config, init_from=init_from, train=dataclasses.replace(config.train, **train))
        return Run(resolve_vocab(changed, corpus), corpus, make_mesh(config.mesh), workdir)

    return make


@pytest.fixture(scope="module")
def finished(make: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 6 steps that nothing disturbed."""
    run = make(tmp_path_factory.mktemp("finished"))
    assert run.train(say=lambda text: None) == Outcome(6, True, "finished")
    return run


def final_state(run: Run) -> dict[str, np.ndarray]:
    return flat(run.restore(6)[0])


def rows(run: Run, kind: str) -> list[dict[str, Any]]:
    return [row for row in metrics.read_metrics(run.workdir / "metrics.jsonl") if row["kind"] == kind]


def test_what_a_run_writes(finished: Run):
    train = rows(finished, "train")
    assert [row["step"] for row in train] == [2, 4, 6]
    assert train[-1]["tokens"] == 6 * 8 * 32
    assert all(math.isfinite(row["loss"]) and row["bits_per_byte"] > 0 and row["tokens_per_s"] > 0 for row in train)
    assert train[0]["learning_rate"] == pytest.approx(3e-3)  # of step index 1, after one step of warm-up
    assert train[-1]["loss"] < train[0]["loss"]
    valid = rows(finished, "valid")
    assert [row["step"] for row in valid] == [3, 6]
    for row in valid:
        assert set(row["bits_per_byte"]) == {"a", "b"}
        assert row["mean_bits_per_byte"] == pytest.approx(sum(row["bits_per_byte"].values()) / 2)
    (load, _) = rows(finished, "load")
    assert load["layers"] == [0, 1] and np.shape(load["utilisation"]) == (2, 4)
    assert load["dropped_share"] == [0.0, 0.0]


def test_checkpoints_hold_config_and_place_in_the_data(finished: Run):
    assert finished.checkpoints.steps() == [4, 6]  # the newest two; step 6 is also the best
    assert finished.checkpoints.best() == 6
    _, meta = finished.restore(4)
    assert meta["step"] == 4 and meta["config_hash"] == config_hash(finished.config)
    assert from_mapping(ExperimentConfig, meta["config"]) == finished.config
    assert {"tokenizer", "grain"} <= set(meta["data"])
    state, step = finished.best()
    assert step == 6 and int(state.step) == 6


def test_scores_do_not_depend_on_the_batch_size(finished: Run, corpus: Corpus):
    state, _ = finished.best()
    domain = corpus.domains[0]

    def bits(batch_size: int) -> float:
        batches = eval_batches(corpus, domain, "valid", batch_size=batch_size)
        return bits_per_byte(finished.scorer(state), batches, corpus.tokenizer).bits_per_byte

    # dropless, float32: only the order of sums inside a matmul may differ
    assert bits(1) == pytest.approx(bits(8), rel=1e-5)


def test_a_finished_run_returns_at_once(finished: Run):
    before = (finished.workdir / "metrics.jsonl").read_bytes()
    assert finished.train() == Outcome(6, True, "finished")
    assert (finished.workdir / "metrics.jsonl").read_bytes() == before


def test_stopping_and_resuming_changes_no_bit(make: Callable[..., Run], finished: Run, tmp_path: Path):
    heard: list[str] = []
    run = make(tmp_path)
    assert run.train(max_seconds=1e-6, say=heard.append) == Outcome(1, False, "time")
    assert run.checkpoints.steps() == [1]
    run.close()
    again = make(tmp_path)
    assert again.train(say=heard.append) == Outcome(6, True, "finished")
    assert "resuming at step 1" in heard
    chex.assert_trees_all_equal(final_state(again), final_state(finished))
    assert rows(again, "valid") == rows(finished, "valid")
    again.close()


def test_init_from_takes_parameters_only(make: Callable[..., Run], finished: Run, tmp_path: Path):
    run = make(tmp_path, init_from=str(finished.workdir))
    state, meta = run.start()
    assert meta is None and int(state.step) == 0
    chex.assert_trees_all_equal(flat(state.params), flat(finished.best()[0].params))
    assert all(not leaf.any() for leaf in flat(state.opt_state).values())
    run.close()


def test_init_from_refuses_another_tokenizer(
    make: Callable[..., Run], finished: Run, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make(tmp_path, init_from=str(finished.workdir))
    monkeypatch.setattr(corpus.tokenizer, "hash", "0123456789abcdef")
    with pytest.raises(ConfigError, match="another tokenizer"):
        run.start()
    run.close()


def test_what_a_run_must_not_go_on_with(
    make: Callable[..., Run], finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make(tmp_path)
    run.train(max_seconds=1e-6, say=lambda text: None)
    run.close()
    other = make(tmp_path, seed=1)
    with pytest.raises(ConfigError, match="seed=0 when it was saved, 1 now"):
        other.train()
    other.close()
    broken = make(tmp_path, log_every=6)  # the first save comes at step 2, the first log line at the end
    state, meta = broken.start()
    params = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), state.params)
    monkeypatch.setattr(broken, "start", lambda: (dataclasses.replace(state, params=params), meta))
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 2 .*last good checkpoint is step 1 in "):
        broken.train(say=lambda text: None)
    assert broken.checkpoints.steps() == [1]
    broken.close()


def test_best_needs_a_checkpoint(make: Callable[..., Run], tmp_path: Path):
    run = make(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint to evaluate; train first"):
        run.best()
    run.close()


def test_vocabulary(config: ExperimentConfig, corpus: Corpus):
    assert resolve_vocab(config, corpus).model.vocab_size == 320  # 257, in multiples of 64
    stated = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257))
    assert resolve_vocab(stated, corpus) == stated
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=256))
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size=256 is smaller than the tokenizer 'byte' with 257 tokens"
    ):
        resolve_vocab(small, corpus)
    np.testing.assert_array_equal(padded_byte_lengths(corpus, 320), [1] * 256 + [0] * 64)


def test_a_half_written_line_costs_one_line_only(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "a"}) + '\n{"kind": "b", "st')
    writer = metrics.JsonlWriter(path)
    writer.write({"kind": "c"})
    writer.write({"kind": "d"})
    writer.close()
    assert [row["kind"] for row in metrics.read_metrics(path)] == ["a", "c", "d"]
    assert metrics.JsonlWriter(tmp_path / "new.jsonl").path.read_bytes() == b""
