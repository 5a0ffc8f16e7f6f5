"""experiments.drop_simulation: loads and times by hand, water-filling's law on a trace, the command."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import drop_simulation as simulation
from experiments import ep_simulation, session
from moejax import trace
from moejax.config import RouterConfig
from moejax.results import read_rows
from tests import moe_fakes as fakes
from tests.small import quick_compilation, small_config, small_model

LAYERS, EXPERTS, K, TOKENS, BATCHES = 2, 8, 3, 40, 2
CONFIG = small_config(dataclasses.replace(
    small_model(RouterConfig(k=K), num_experts=EXPERTS, first_dense=1, every=1), num_layers=LAYERS + 1
))  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of random decisions, busy experts first; the second batch is half padding."""
    path, shape = tmp_path_factory.mktemp("trace") / "trace.npz", (4, TOKENS // 4)
    meta = trace.header(CONFIG, (), ranks=1, batch_shape=shape, logits=False)
    with trace.writing(path, meta) as writer:
        for seed in range(BATCHES):
            rng = np.random.default_rng(seed)
            masked = seed * TOKENS // 2
            layers = [fakes.random_table(rng, TOKENS, K, EXPERTS, skew=0.15, masked=masked) for _ in range(LAYERS)]
            made = jax.tree.map(lambda *leaves: np.stack(leaves)[:, None], *layers)
            tokens = {name: np.zeros((1, TOKENS), np.int32) for name in trace.TOKEN_ARRAYS}
            tokens["mask"] = (np.arange(TOKENS) < TOKENS - masked)[None]
            writer.add(trace.Chunk(made, made, tokens, None))
    return path


def run(*arguments: str) -> int:
    with quick_compilation():
        return session.call(simulation.define_flags, simulation.command, arguments)


def test_work_is_counted_by_rank():
    expert = np.asarray([[[0, 3], [1, 4], [7, 8]]])  # 8 is a zero-computation expert
    value = np.asarray([[[1.0, 0.5], [1.0, 1.0], [0.0, 9.0]]])
    np.testing.assert_array_equal(simulation.rank_sums(expert, value, 8, 4), [[2.0, 0.5, 1.0, 0.0]])


def test_a_batch_takes_as_long_as_its_slowest_rank():
    """Two batches, the second with half the tokens: its rows are worth twice as many, and it counts half."""
    times = ep_simulation.Times(fixed=10.0, exchange=1.0, experts=lambda rows: 2.0 * rows)
    pairs = np.asarray([[[3.0, 1.0]], [[1.0, 2.0]]])  # [batches, layers, ranks]
    work = np.asarray([[[1.0, 3.0]], [[1.0, 1.0]]])
    unit = np.asarray([1.0, 2.0])
    first, second = 10 + 5 + max(3 + 2, 1 + 6), 10 + 5 + max(2 + 4, 4 + 4)
    expected = (first * 1 + second * 0.5) / 1.5
    assert simulation.seconds(times, pairs, work, unit, 5.0) == pytest.approx(expected)


def by_loops(source: trace.Trace, threshold: float, gap: float | None, ranks: int) -> list[list[np.ndarray]]:
    """Work of each rank by batch and layer, with one threshold everywhere."""
    found = []
    for chunk in source:
        found.append([])
        for layer in range(LAYERS):
            made = jax.tree.map(lambda leaf, i=layer: np.asarray(leaf)[i, 0], chunk.made)
            work = np.zeros(ranks)
            for t, k in np.argwhere(made.valid):
                share = made.score[t, k] / made.score[t][made.valid[t]].sum()
                lower, upper = (threshold, threshold) if gap is None else (threshold - gap, threshold + gap)
                if share > lower:
                    work[made.expert[t, k] // (EXPERTS // ranks)] += 1.0 if share > upper else 0.5
            found[-1].append(work)
    return found


def test_arms_by_loops_and_the_law_of_water_filling(recorded: Path):
    """Never above the maximum without dropping, at that of T everywhere, and with less dropped."""
    threshold, gap, ranks = float(np.float32(0.3)), float(np.float32(0.03)), 8
    with quick_compilation(), trace.read(recorded) as source:
        made = simulation.collect(source, (threshold,) * LAYERS, gap, ranks)
        for arm in simulation.ARMS[:1] + tuple(a for a in simulation.ARMS[1:] if a.load_aware == "none"):
            t = 0.0 if arm is simulation.NONE else threshold
            expected = by_loops(source, t, gap if arm.form == "2T" else None, ranks)
            np.testing.assert_array_equal(np.stack(made.work[arm]), expected, err_msg=arm.name)
    none = np.stack(made.work[simulation.NONE])
    for form in ("1T", "2T"):
        everywhere, paper, water = (np.stack(made.work[simulation.Arm(form, rule)]) for rule in simulation.RULES)
        np.testing.assert_array_equal(water.max(axis=2), everywhere.max(axis=2))
        assert (water.max(axis=2) <= none.max(axis=2)).all() and (water.max() < none.max())
        assert (everywhere <= water).all() and (water <= none).all()
        assert (paper.max(axis=2) >= everywhere.max(axis=2)).all()
        assert everywhere.sum() < paper.sum() < none.sum() and everywhere.sum() < water.sum() < none.sum()
    # What is printed of them: sums over batches and layers.
    times = ep_simulation.Times(1.0, 0.0, lambda rows: rows)
    found = {o.arm: o for o in simulation.outcomes(made, CONFIG, times, tokens=TOKENS // ranks, spare=1)}
    plain, water = found["1T"], found["1T, load-aware: water"]
    most = np.stack(made.work[simulation.Arm("1T")]).max(axis=2).sum()
    assert plain.gain == water.gain == pytest.approx(none.max(axis=2).sum() / most)
    assert plain.busiest == pytest.approx(most / none.mean(axis=2).sum())
    assert plain.layer == water.layer and 1 < plain.layer < plain.gain
    assert (
        water.drop_rate
        < plain.drop_rate
        == pytest.approx(1 - np.stack(made.work[simulation.Arm("1T")]).sum() / none.sum())
    )
    copied = found["replication, 1 spare slot a rank"]
    assert copied.drop_rate == 0 and copied.gain > 1
    natural = simulation.by_layer(made, 1)
    assert natural[0][0] == pytest.approx(none[:, 0].max(axis=1).sum() / none[:, 0].mean(axis=1).sum())
    assert natural[0][1] < natural[0][0]


def test_the_command_prints_and_stores_rows(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "rows.jsonl"
    assert run(f"--trace={recorded}", "--drop_rate=0.25", "--ranks=8", f"--output={output}") == 0
    said = capsys.readouterr().out
    assert "simulation of 8 ranks" in said and "1T, load-aware: water" in said and "1.41x" in said
    rows = {row.extra["arm"]: row for row in read_rows(output)}
    assert set(rows) == {arm.name for arm in simulation.ARMS} | {"replication, 1 spare slot a rank"}
    assert rows["1T"].extra["drop_rate"] == pytest.approx(0.25, abs=0.01)
    assert [name for name, row in rows.items() if row.published] == ["2T, load-aware: paper"]
    for row in rows.values():
        assert (
            "simulation" in row.table and row.extra["simulation"] and "nothing was run on several" in row.verdict_note
        )
        assert row.config_hash and row.value == pytest.approx(row.value)
    assert rows["no drop"].value == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold=0.1", "--drop_rate=0.2"], "one of them"),
        ([], "one of them"),
        (["--threshold=0.1,0.2,0.3"], "3 thresholds for 2 MoE layers"),
        (["--threshold=much"], "give numbers"),
        (["--threshold=1.5"], "at least 0 and below 1"),
        (["--threshold=0.1", "--ranks=3"], r"--ranks=3 does not divide the 8 experts: choose one of [2, 4, 8]"),
        (["--threshold=0.1", "--spare=9"], "--spare=9: a rank of 8 has use for 7 copies at most"),
        (["--threshold=0.1", "--seconds_per_row=1"], "--seconds_fixed and --exchange_seconds_per_row are missing"),
    ],
)
def test_what_cannot_be_simulated_is_refused(recorded: Path, capsys, arguments: list[str], message: str):
    assert run(f"--trace={recorded}", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_or_broken_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 nothing")
    for path in (tmp_path / "none.npz", broken):
        assert run(f"--trace={path}", "--threshold=0.1") == 2
        assert str(path) in capsys.readouterr().err
    assert run("--threshold=0.1") == 2
