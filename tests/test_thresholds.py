"""From a target to thresholds: quantiles against loops over pairs, the search, and the command as a user runs it."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import calibration, session
from experiments import thresholds as command
from moejax import limits, pretrained, thresholds
from moejax.checkpoint import Checkpoints
from moejax.config import ConfigError, ExperimentConfig, MeshConfig, from_mapping, to_dict
from moejax.data import load_corpus
from moejax.results import read_rows
from moejax.sharding import make_mesh, put_batch
from moejax.thresholds import BINS, Rule, ScoreTable
from moejax.train import Scorer, Trainer, score_fn, split
from moejax.types import RouteContext, Routing
from tests import moe_fakes as fakes
from tests.small import load_plain, start
from tests.trace_fakes import batches, mesh_of, model_of

pytestmark = pytest.mark.usefixtures("compiled_once")

RULES = {
    "1T": Rule(None),
    "2T": Rule(0.03),
    "2T, wide": Rule(0.1, major=2, expert_dim=8),
    "2T, no gap": Rule(0.0),
}


# --- scores and rates ---------------------------------------------------------------------------------------------


def tables(seed: int = 0, layers: int = 3, tokens: int = 40, decimals: int | None = None) -> list[Routing]:
    """One Routing for each layer, of different sharpness, with padding; ``decimals`` makes ties."""
    rng = np.random.default_rng(seed)
    made = []
    for layer in range(layers):
        table = fakes.random_table(rng, tokens, 4, 8, masked=3)
        score = np.asarray(table.score) ** (1 + layer)
        score = score if decimals is None else np.maximum(score.round(decimals), 0.1)
        made.append(dataclasses.replace(table, score=jnp.asarray(score, jnp.float32)))
    return made


def counted(made: list[Routing]) -> ScoreTable:
    table = ScoreTable(len(made))
    shares = [np.where(layer.valid, limits.normalised(layer), -1.0) for layer in made]
    table.add(np.stack(shares), np.stack([layer.weight for layer in made]), 37)
    return table


def work_gone(layer: Routing, at: float, rule: Rule) -> tuple[float, float]:
    """``(work, gate weight)`` that the limit itself drops, in pairs, and the weight of those."""
    kept = rule.limit([at])[0]
    kept = dataclasses.replace(kept, threshold=jnp.float32(at))(layer, RouteContext())
    gone = np.asarray(layer.valid & ~kept.valid).astype(float)
    if kept.level is not None:
        gone += rule.skip * np.asarray(kept.valid & (kept.level == 1))
    return gone.sum(), (gone * np.asarray(layer.weight)).sum()


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_rates_are_those_of_the_limit_itself(rule: Rule):
    made = tables()
    table = counted(made)
    pairs = sum(float(np.sum(layer.valid)) for layer in made)
    assert table.routed.sum() == pairs
    for at in (0.0, 1 / BINS, 0.05, 0.2, 0.4, 0.7):
        loop = [work_gone(layer, at, rule) for layer in made]
        np.testing.assert_allclose(
            table.rates(at, rule), [work / np.sum(layer.valid) for (work, _), layer in zip(loop, made, strict=True)]
        )
        assert table.rate(at, rule) == pytest.approx(sum(work for work, _ in loop) / pairs)
        weight = sum(float(np.sum(np.where(layer.valid, layer.weight, 0))) for layer in made)
        assert table.lost_weight(at, rule) == pytest.approx(sum(lost for _, lost in loop) / weight, abs=1e-6)


@pytest.mark.parametrize("decimals", [None, 1], ids=["", "ties"])
@pytest.mark.parametrize("rule", [RULES["1T"], RULES["2T"]], ids=["1T", "2T"])
def test_thresholds_of_layers_are_the_nearest_there_are(rule: Rule, decimals: int | None):
    made = tables(1, decimals=decimals)
    table = counted(made)
    gap = rule.gap or 0.0
    solved = {rate: thresholds.solve(table, rate, rule) for rate in (0.0, 0.1, 0.25, 0.5, 0.77)}
    for i, layer in enumerate(made):
        shares = np.asarray(limits.normalised(layer))[np.asarray(layer.valid)].astype(float)
        # The drop rate changes only where a threshold passes a share: just above each of these, every rate there is.
        edges = np.unique(np.concatenate([shares + gap, shares - gap])) + 2 / BINS
        tried = np.r_[0.0, 1 / BINS, edges[(edges > 0) & (edges < 1)]]
        lower, upper = ((shares <= t[:, None]).sum(axis=1) for t in (tried - gap, tried + gap))
        rates = np.where(tried > 0, (1 - rule.skip) * lower + rule.skip * upper, 0) / len(shares)
        for rate, at in solved.items():
            found = float(at[i])
            best = np.abs(rates - rate).min()
            assert abs(work_gone(layer, found, rule)[0] / len(shares) - rate) <= best + 1e-9
            if decimals is None and rule.gap is None:
                assert best <= 0.5 / len(shares)  # within one pair's share


def test_one_threshold_for_all_layers_gives_the_rate_of_the_total():
    made = tables(2, tokens=60)
    table = counted(made)
    for rule, rate in itertools.product((RULES["1T"], RULES["2T"]), (0.1, 0.3)):
        at = thresholds.solve(table, rate, rule, "global")
        assert len(set(at.tolist())) == 1
        assert table.rate(at, rule) == pytest.approx(rate, abs=1 / table.routed.sum())


@pytest.mark.parametrize("rule", [RULES["1T"], RULES["2T"]], ids=["1T", "2T"])
def test_least_weight_loses_no_more_than_any_other_choice(rule: Rule):
    made = tables(3, layers=2, tokens=50)
    # The second layer's weights are a fifth: as many of its pairs as can be go first.
    made[1] = dataclasses.replace(made[1], weight=made[1].weight / 5)
    table, rate = counted(made), 0.2
    at = thresholds.solve(table, rate, rule, "weight")
    assert table.rate(at, rule) == pytest.approx(rate, abs=1 / table.routed.sum())
    lost = table.lost_weight(at, rule)
    assert lost < min(table.lost_weight(thresholds.solve(table, rate, rule, how), rule) for how in ("layer", "global"))
    grid = np.arange(0, 0.7, 0.004)
    choices = np.array(list(itertools.product(grid, grid)))
    work = sum(thresholds.dropped(row, choices[:, i], rule) for i, row in enumerate(table.pairs))
    weight = sum(thresholds.dropped(row, choices[:, i], rule) for i, row in enumerate(table.weight))
    enough = weight[work >= rate * table.routed.sum()] / table.weight.sum()
    assert lost <= enough.min() + 2 * table.weight.max() / table.weight.sum()  # of whole pairs, one may be missed


def test_weights_that_are_the_scores_lose_least_with_one_threshold():
    made = [dataclasses.replace(layer, weight=limits.normalised(layer)) for layer in tables(4, tokens=200)]
    table = counted(made)
    at = thresholds.solve(table, 0.3, RULES["1T"], "weight")
    one = thresholds.solve(table, 0.3, RULES["1T"], "global")
    np.testing.assert_allclose(at, one, atol=0.02)


def test_what_cannot_be_asked():
    table = counted(tables())
    with pytest.raises(ConfigError, match=r"drop_rate=1\.5"):
        thresholds.solve(table, 1.5, RULES["1T"])
    with pytest.raises(ConfigError, match="spread='all'"):
        thresholds.solve(table, 0.5, RULES["1T"], "all")  # ty: ignore[invalid-argument-type]
    with pytest.raises(FloatingPointError, match="layer 2 of 2"):
        ScoreTable(2).add(np.array([[0.5], [np.nan]]), np.ones((2, 1)), 1)
    with pytest.raises(ConfigError, match="there is none"):
        thresholds.collect(lambda *a: (), None, None, [], put_batch)  # ty: ignore[invalid-argument-type]


def test_a_rule_says_what_is_parsed_again():
    for rule in (*RULES.values(), Rule(0.012345, major=6)):
        for at in ([0.1, 0.1], [1 / 3, 0.0], [12345 / BINS, 0.25]):
            text = limits.parse(rule.text(at))
            assert isinstance(text, limits.ThresholdDrop)
            given = rule.limit(at)[0]
            for name in ("gap", "major", "form", "load_aware"):
                assert getattr(text, name) == getattr(given, name)
            np.testing.assert_array_equal(np.broadcast_to(text.threshold, 2), given.threshold)


def test_risky_layers_are_those_whose_tokens_may_lose_all():
    at = np.array([0.2, 0.25, 0.26, 0.3])
    assert thresholds.risky(at, Rule(None), 4) == [1, 2, 3]
    assert thresholds.risky(at, Rule(0.03125), 4) == [3]


def test_later_rounds_see_what_the_first_thresholds_leave():
    """Fit on a fake whose second layer has other scores once the first drops."""
    free, limited = tables(5, layers=2), tables(6, layers=2)
    asked: list[tuple] = []

    def collected(in_force: tuple) -> ScoreTable:
        asked.append(in_force)
        return counted([free[0], limited[1] if in_force else free[1]])

    rule = Rule(None)
    once, _ = thresholds.fit(collected, 0.4, rule, rounds=1)
    twice, seen = thresholds.fit(collected, 0.4, rule)
    assert [len(limit) for limit in asked] == [0, 0, 1]
    np.testing.assert_allclose(asked[2][0].threshold, once)
    assert twice[0] == once[0] and twice[1] != once[1]
    np.testing.assert_allclose(seen.rates(twice, rule), 0.4, atol=0.5 / seen.routed.min())


# --- bisection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.0, 0.004, 0.03, 2.0])
def test_bisection_finds_the_largest_rate_within_the_bound(bound: float):
    tried: dict[float, float] = {}

    def loss(rate: float) -> float:
        return tried.setdefault(rate, max(rate - 0.1, 0) ** 2)

    found = thresholds.largest_rate(loss, bound, resolution=1 / 256)
    assert len(tried) == 8
    assert found == max(rate for rate, lost in tried.items() if lost <= bound)
    assert min(0.1 + bound**0.5, 1.0) - 1 / 256 <= found <= 0.1 + bound**0.5


def test_bisection_refuses_and_gives_up():
    assert thresholds.largest_rate(lambda rate: 1.0, 0.5) == 0.0
    for bound, resolution in ((-0.1, 0.1), (float("nan"), 0.1), (0.1, 0.0), (0.1, 1.0)):
        with pytest.raises(ConfigError):
            thresholds.largest_rate(lambda rate: 0.0, bound, resolution=resolution)


# --- a model ------------------------------------------------------------------------------------------------------


def test_a_pass_counts_what_evaluation_drops_and_thresholds_never_recompile():
    """Scores of real tokens only, on devices that share a batch; a layer's rate in force is the predicted one where no
    layer before it drops."""
    model = model_of(fakes.router_config(k=2), capacity_factor=0.5)  # the config's own limit takes no part
    mesh = mesh_of(2)
    definition, params, router_state = split(model)
    run, score = thresholds.collect_fn(definition, mesh), score_fn(definition, mesh)
    data = batches()

    def put(batch: dict) -> dict:
        return put_batch(batch, mesh)

    table = thresholds.collect(run, params, router_state, data, put)
    assert table.tokens == sum(batch["mask"].sum() for batch in data)
    assert table.routed.tolist() == [2 * table.tokens] * 2
    hidden = [batch | {"tokens": np.where(batch["mask"], batch["tokens"], 1)} for batch in data]
    again = thresholds.collect(run, params, router_state, hidden, put)
    np.testing.assert_array_equal(again.pairs, table.pairs)  # what stands in padding counts nowhere

    def measured(at: Any, rule: Rule) -> np.ndarray:
        scorer = Scorer(score, params, router_state, put, limits=rule.limit(at))
        for batch in data:
            scorer(batch)
        assert scorer.metrics is not None
        return thresholds.drop_rates(scorer.metrics)

    rule = Rule(0.01, expert_dim=model.config.moe.expert_dim)
    measured([0.1, 0.1], rule)
    score.armed = True
    for spread in ("layer", "global"):
        at = thresholds.solve(table, 0.3, rule, spread)
        np.testing.assert_allclose(measured(at, rule)[0], table.rates(at, rule)[0])
    assert score.take() == []


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, a checkpoint of random weights with a shared expert."""
    root = tmp_path_factory.mktemp("thresholds")
    raw = load_plain(workspace / "small_config.py")
    raw.model.moe.shared_experts = 1
    config = from_mapping(ExperimentConfig, raw)
    corpus = load_corpus(config.data)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=320))
    made = Trainer(config, np.ones(320), make_mesh(MeshConfig(), jax.devices()[:1]))
    checkpoints = Checkpoints(root / "run" / "checkpoints")
    meta = {"step": 7, "config": to_dict(config), "data": {"tokenizer": corpus.tokenizer.hash}}
    checkpoints.save(7, start(made), meta, score=1.0)
    checkpoints.close()
    return root


def call(*arguments: str) -> int:
    return session.call(command.define_flags, command.command, arguments)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that are evaluated, in order."""
    seen: list[str] = []
    score = calibration.Calibration.score

    def noted(self: Any, in_force: tuple, text: str, *rest: Any) -> Any:
        seen.append(text)
        return score(self, in_force, text, *rest)

    monkeypatch.setattr(calibration.Calibration, "score", noted)
    return seen


def test_from_a_rate_to_a_checkpoint(runs: Path, capsys: pytest.CaptureFixture[str], scored: list[str]):
    out, source = runs / "fast", runs / "run"
    assert call(f"--checkpoint={source}", "--drop_rate=0.25", f"--output={out}", f"--curve={runs}/curve.jsonl") == 0
    said = capsys.readouterr()
    facts = json.loads((out / "thresholds.json").read_text())
    assert said.out == f"--limit={facts['limit']}\n"
    assert {"major/minor", "total", "shared"} <= set(said.err.split()) and "WARNING" not in said.err
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "env.json", "thresholds.json"]
    assert facts["drop_rate"] == pytest.approx(0.25, abs=1e-3)
    assert facts["drop_rate_in_force"] == pytest.approx(0.25, abs=1e-3)  # the second round saw the first layer drop
    # top-2 of experts as wide as the one that is shared: a third of the work is not routed
    assert facts["drop_rate_with_shared_experts"] == pytest.approx(facts["drop_rate"] * 2 / 3)
    assert facts["calibration"]["loss"] == facts["calibration"]["bits_per_byte"] - facts["calibration"]["baseline"]
    assert facts["checkpoint"]["folder"] == str(source / "checkpoints" / "7")
    assert set(scored) == {"valid"}

    model, config, _ = pretrained.open_model(out)
    assert config.model.moe.capacity_limits == (facts["limit"],) and config.train.steps == 0
    theirs, _, _ = pretrained.open_model(source)
    for mine, other in zip(*(jax.tree.leaves(split(m)[1:]) for m in (model, theirs)), strict=True):
        np.testing.assert_array_equal(mine, other)

    rows = read_rows(runs / "curve.jsonl")
    total = [row for row in rows if row.extra["arm"].endswith("total")]
    values = [row.value for row in total if row.value is not None]
    assert values == sorted(values) and values[0] == 0 and values[-1] >= command.CURVE_END
    assert len(rows) == 3 * len(total) and {row.extra["x"] for row in rows} == {row.extra["x"] for row in total}

    before = (out / "config.json").read_bytes()
    assert call(f"--checkpoint={source}", "--drop_rate=0.1", f"--output={out}") == 2
    assert "nothing is overwritten" in capsys.readouterr().err and (out / "config.json").read_bytes() == before
    assert call(f"--checkpoint={out}", "--drop_rate=0.1") == 2
    assert re.search("has limits .*--replace", capsys.readouterr().err)


def test_a_bound_on_the_loss_is_checked_once_on_held_out_text(
    runs: Path, capsys: pytest.CaptureFixture[str], scored: list[str]
):
    out = runs / "bounded"
    arguments = (f"--checkpoint={runs / 'run'}", "--resolution=0.2", "--tokens=512", "--one_threshold")
    assert call(*arguments, "--quality=0.02", f"--output={out}") == 0
    assert "WARNING" not in capsys.readouterr().err
    facts = json.loads((out / "thresholds.json").read_text())
    tries = {float(rate): loss for rate, loss in facts["target"]["tries"].items()}
    assert len(tries) == 3 and scored == ["valid"] * 4 + ["test"] * 2
    within = [rate for rate, loss in tries.items() if loss <= 0.02]
    assert facts["target"]["rate_found"] == max(within, default=0.0)
    assert facts["calibration"]["loss"] == pytest.approx(tries.get(facts["target"]["rate_found"], 0.0))
    held = facts["held_out"]
    assert held["split"] == "test" and held["within"] == (held["loss"] <= 0.02)
    assert held["interval"] is None or held["interval"][0] <= held["loss"] <= held["interval"][1]

    assert call(f"--checkpoint={out}", "--replace", "--threshold=0.3", "--nocheck") == 0
    assert len(scored) == 6


def test_where_nothing_is_dropped_nothing_is_lost(
    runs: Path, capsys: pytest.CaptureFixture[str], scored: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Halves of experts that are summed round otherwise than whole ones: a bound of 0 would be beyond reach."""
    found = calibration.Calibration.score

    def rounded(self: Any, in_force: tuple, *rest: Any) -> Any:
        made = found(self, in_force, *rest)
        more = {d: dataclasses.replace(s, bits_per_byte=s.bits_per_byte + 1e-7) for d, s in made.by_domain.items()}
        return dataclasses.replace(made, by_domain=more) if in_force else made

    monkeypatch.setattr(calibration.Calibration, "score", rounded)
    monkeypatch.setattr(command.thresholds, "largest_rate", lambda *args, **more: 0.0)
    out = runs / "nothing"
    assert call(f"--checkpoint={runs / 'run'}", "--quality=0", "--tokens=512", f"--output={out}") == 0
    said, held = capsys.readouterr().err, json.loads((out / "thresholds.json").read_text())["held_out"]
    assert "nothing is dropped" in said and "loss is above" not in said
    assert held["within"] and held["loss"] == 0 and set(scored) == {"valid", "test"}


def test_one_threshold_is_told_and_warned_of(runs: Path, capsys: pytest.CaptureFixture[str]):
    arguments = (f"--checkpoint={runs / 'run'}", "--tokens=256", "--nocheck")
    assert call(*arguments, "--threshold=0.6", "--gap=0.02") == 0
    said = capsys.readouterr()
    # With the number that half of 8 is, so that the thresholds keep their meaning wherever half is another one.
    assert said.out == "--limit=threshold_drop:threshold=0.6,gap=0.02,major=4\n"
    assert "a token may lose all its experts" in said.err and "in force" not in said.err
    assert call(*arguments, "--threshold=0.3") == 0
    assert "may lose" not in capsys.readouterr().err


BAD = {
    ("--drop_rate=0.2", "--split=test"): r"--split=test: results are reported on that text.*--split=valid",
    ("--drop_rate=0.2", "--quality=0.1"): "give one of",
    (): "no target: give one of",
    ("--drop_rate=nan",): "drop_rate=nan: a share of the routed work",
    ("--output=x",): "no target",
    ("--curve=curve.jsonl", "--output=x"): "--output needs a target",
    ("--drop_rate=0.2", "--one_threshold", "--gap=0.02"): "leave --gap and --major out",
    ("--drop_rate=1.2",): "drop_rate=1.2",
    ("--drop_rate=0.2", "--gap=1"): "gap=1.0",
    ("--drop_rate=0.2", "--major=9"): "major",
    ("--threshold=1",): "threshold=1.0",
    ("--quality=0.1", "--nocheck"): "leave --nocheck out",
    ("--quality=0.1", "--resolution=0"): "resolution=0.0",
    ("--drop_rate=0.2", "--output=no/where"): "there is no folder .*/no; make it first",
    ("--drop_rate=0.2", "--domains=a,z"): "--domains=z",
    ("--drop_rate=0.2", "--spread=all"): "spread",
    ("--drop_rate=0.2", "--batch_size=8", "--devices=3"): "3 devices",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_requests_are_one_sentence(runs: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]):
    assert call(f"--checkpoint={runs / 'run'}", *arguments) == 2
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("error: ") and re.search(BAD[arguments], last), said


def test_final_text_that_is_valid_is_refused_too(runs: Path):
    config = pretrained.stored_config(runs / "run")
    evaluation = dataclasses.replace(config.eval, final_split="valid")
    with pytest.raises(ConfigError, match="--split=train"):
        calibration.calibration_split(dataclasses.replace(config, eval=evaluation), None)
    assert calibration.calibration_split(config, None) == "valid"


def test_an_interrupted_search_leaves_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = sorted(runs.iterdir())

    def interrupted(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    for owner, name in ((calibration.Calibration, "score"), (command, "write_atomically")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            arguments = ("--threshold=0.2", "--tokens=256", f"--output={runs / 'gone'}")
            assert call(f"--checkpoint={runs / 'run'}", *arguments) == 130
        assert "interrupted: nothing was written" in capsys.readouterr().err
        assert sorted(runs.iterdir()) == before
