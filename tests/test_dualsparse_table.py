"""The tables of ``experiments.papers.dualsparse``: what they ask for, with a stand-in for the measuring; the models
that they make of a run; and, in the slow test, the whole way through the command."""

import dataclasses
import functools
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import dualsparse_settings as settings
from experiments.papers import arms, capacity_aware, dualsparse
from moejax import sharding
from moejax.config import ConfigError, ExperimentConfig, MoEConfig, RouterConfig, from_mapping
from moejax.data import load_corpus
from moejax.evaluate import DomainScore
from moejax.loop import resolve_vocab
from moejax.report import build_report
from moejax.results import append_rows, environment_facts, read_rows
from moejax.train import Trainer
from tests.small import execute, load, load_plain, start

CONFIG = load("configs.papers.dualsparse", "tiny")
LABS = {name: load("configs.papers.dualsparse", f"tiny,model={name}_like") for name in settings.MODELS}
ROOT = Path(__file__).resolve().parent.parent
VALUES = {"1": 9 + 2, "2": 9, "3": 10, "thresholds": 19, "importance": 7, "layers": 4 * 3}


class Score:
    """Bits per byte ``value`` in every one of ten batches, with a little noise."""

    def __init__(self, value: float) -> None:
        self.bits_per_byte = value
        noise = np.random.default_rng(0).normal(0, 1e-4, 10)
        self.per_batch = [((value + e) * math.log(2) * 100, 100) for e in noise]


def measured(setting: settings.Setting) -> dualsparse.Measured:
    """Quality falls with the drop rate, less where neurons are sorted; a partition changes nothing."""
    value = 1.0 + 0.2 * setting.rate * (0.5 if setting.model.startswith("order:") else 1.0)
    value += 0.1 if setting.model.startswith("kept:") else 0.0
    value -= 0.01 * int(setting.model[6:]) if setting.model.startswith("tuned:") else 0.0
    halved = 0.04 if setting.rule == "2T" else 0.0
    facts = {"threshold": 0.3} if setting.rule in ("1T", "2T") else {}
    return dualsparse.Measured({"a": Score(value)}, setting.rate, halved, setting.rate, setting.rate, 0.0, facts)  # ty: ignore


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``(config) -> (settings that were measured, lines)`` of a call of make_table in one workdir."""

    def table(config: ExperimentConfig = CONFIG) -> tuple[list[settings.Setting], list[str]]:
        asked: list[settings.Setting] = []
        lines: list[str] = []

        def measure(self: Any, setting: settings.Setting) -> Any:
            asked.append(setting)
            return measured(setting)

        def scores(self: Any, key: str) -> Any:  # of four layers; all is dropped from T = 1/8 on
            return types.SimpleNamespace(rates=lambda at, rule: np.full(4, min(8 * at, 1)),
                                         rate=lambda at, rule: min(8 * at, 1.0))  # fmt: skip

        monkeypatch.setattr(dualsparse.Models, "measure", measure)
        monkeypatch.setattr(dualsparse.Models, "scores", scores)
        monkeypatch.setattr(capacity_aware, "weights_hash", lambda states: "0" * 12)
        monkeypatch.setattr(dualsparse, "token_shards", lambda mesh: 1)
        state = types.SimpleNamespace(params=None, router_state=None)
        run: Any = types.SimpleNamespace(best=lambda: (state, 0), mesh=None, config=config)
        facts = {"data": {"hash": "d"}, "command": "python -m experiments.run"} | environment_facts()
        dualsparse.make_table(config, {0: run}, tmp_path, facts, lines.append)
        return asked, lines

    return table


def test_rows_and_contrasts_of_all_tables_and_none_is_made_twice(make, tmp_path: Path):
    make()
    rows = read_rows(tmp_path / "results.jsonl")
    by_name = {(r.table, r.row): r for r in rows}
    for table in settings.TABLES:
        values = [r for r in rows if r.table == table and r.kind == "value"]
        claims = [r for r in rows if r.table == table and r.kind == "contrast"]
        assert [c.row for c in claims] == [c.name for c in settings.contrasts(table, CONFIG)]
        assert all(c.verdict and c.verdict != "not run" for c in claims)
        assert len(values) == (VALUES[table] if table != "layers" else 5 * 3), table  # T = 0, 1/16, 1/8; four and all
    assert by_name["1", "no training, P=1"].baseline_row == "" and by_name["2", "1T"].baseline_row == "no drop"
    assert by_name["1", "exactness, P=2"].verdict == "reproduced" and by_name["1", "exactness, P=2"].value == 0
    assert by_name["1", "fine-tuned + 1T, P=4"].published == 70.88
    assert by_name["2", "2T reconstruct"].published == 71.04
    assert by_name["3", "EEP, 6 of 8 experts"].published == -8.0
    assert by_name["3", "EEP, 4 of 8 experts + EES"].published == -36.4
    assert by_name["2", "2T reconstruct loses less than 1T"].verdict == "direction (one model)"
    assert by_name["2", "2T reconstruct loses less than 1T"].exercised_share == 0.04  # what is halved, not the 25 %
    assert by_name["thresholds", "1T, 30% dropped"].extra["x"] == 0.3
    before = (tmp_path / "results.jsonl").read_bytes()
    again, lines = make()
    assert again == [] and [line.endswith("done before") for line in lines] == [True] * 6
    assert (tmp_path / "results.jsonl").read_bytes() == before
    (tmp_path / "results.jsonl").unlink()
    append_rows(tmp_path / "results.jsonl", [r for r in rows if r.table in ("1", "layers")])
    again, _ = make()  # as if it had been stopped after the first
    assert {s.name for s in again}.isdisjoint({r.row for r in rows if r.table == "1"})
    build_report([tmp_path])


@pytest.mark.parametrize("name", LABS)
def test_contrasts_name_rows_and_at_most_three_are_primary(name: str):
    config = LABS[name]
    dualsparse.check(config)
    for table in settings.TABLES:
        asked = settings.settings(table, config)
        names = [s.name for s in asked]
        claims = settings.contrasts(table, config)
        assert len(set(names)) == len(names) and {c.arm_a for c in claims} | {c.arm_b for c in claims} <= set(names)
        assert sum(c.primary for c in claims) <= 3 and (claims == [] or any(c.primary for c in claims))
        assert all(0 <= s.rate < 1 and s.gap < 1 / config.model.moe.router.k for s in asked)
    assert settings.published_model(config) == name
    # EEP is for few experts: of 16 a half is too many sets, of 8 it is not
    assert settings.kept_of(config) == ([6, 4] if name == "mixtral" else [12])


def test_fewer_experts_per_token_as_the_family_allows():
    def rows(router: RouterConfig) -> dict[str, settings.Setting]:
        moe = MoEConfig(num_experts=8, expert_dim=64, router=router)
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, moe=moe))
        return {s.name: s for s in settings.settings("3", config) if s.name.startswith("top-")}

    assert rows(RouterConfig("softmax_of_topk", k=2))["top-1 of 2"].rule == "best"  # its family has no k = 1
    assert rows(RouterConfig("topk_of_softmax", k=4))["top-3 of 4"].model == "top:3"
    assert rows(RouterConfig("sparsemixer", k=2)) == {}


def test_what_a_table_cannot_be_is_refused_before_training():
    def changed(table: dict | None = None, moe: dict | None = None, **fields: Any) -> ExperimentConfig:
        model = dataclasses.replace(CONFIG.model, moe=dataclasses.replace(CONFIG.model.moe, **(moe or {})))
        return dataclasses.replace(
            CONFIG, model=model, table=dataclasses.replace(CONFIG.table, **(table or {})), **fields
        )

    for config, why in (
        (changed({"tables": ("4",)}), "'4' is none of 1, 2, 3"),
        (changed({"tables": ("1", "1")}), "each once"),
        (changed({"tune_steps": -1}), "0 or more"),
        (changed(train=dataclasses.replace(CONFIG.train, steps=0)), "with train.steps=0"),
        (changed(moe={"router": RouterConfig("switch", k=1)}), "two or more"),
        (changed(moe={"router": RouterConfig("expert_choice", noncausal="allow")}), "its rows are pairs"),
        (changed(moe={"router": RouterConfig("sparsemixer", k=2)}), "has no complete form"),
        (changed(moe={"parts": 2}), "merge them first"),
        (changed(moe={"first_dense": 4}), "needs a model with experts"),
        (changed(eval=dataclasses.replace(CONFIG.eval, final_split="valid")), "calibrate on that text"),
    ):
        with pytest.raises(ConfigError, match=why):
            dualsparse.check(config)


def test_names_of_variants():
    from configs.papers.dualsparse import get_config

    for text in ("huge", "tiny,model=gpt", "tiny,seeds=3", "paper,model=olmoe_like"):
        with pytest.raises(ValueError, match="tiny, lab, paper or paper=FOLDER"):
            get_config(text)
    lab = load("configs.papers.dualsparse", "lab")
    assert lab.table.seeds == (0, 1, 2) and lab.model.moe.num_experts == 8


# --- models of a run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(workspace: Path, compiled_once) -> dualsparse.Models:
    """Of a model that nobody trained, on text."""
    given = load_plain(workspace / "small_config.py")
    given.model.num_layers = 2
    given.table.batch_size, given.table.max_tokens, given.table.tune_steps = 8, 512, 2
    given.eval.batch_size = 8
    config = from_mapping(ExperimentConfig, given)
    corpus = load_corpus(config.data)
    config = resolve_vocab(config, corpus)
    mesh = sharding.make_mesh(config.mesh)
    trainer = Trainer(config, np.ones(config.model.vocab_size, np.int32), mesh)
    run: Any = types.SimpleNamespace(config=config, corpus=corpus, mesh=mesh, trainer=trainer)
    return dualsparse.Models(run, start(trainer))


def test_an_arm_does_the_work_that_it_says(models: dualsparse.Models):
    """Thresholds come from validation text, the rate is counted on test text: other text, so a little off."""
    sorted_ = "order:gate_up_abs"
    two = models.measure(settings.Setting("two", "two", sorted_, "2T", 0.25, 0.04))
    assert two.rate == pytest.approx(two.dropped + two.halved / 2, abs=1e-6) and two.halved > 0.01
    assert two.rate == pytest.approx(0.25, abs=0.03) and two.facts["limit"].startswith("threshold_drop:threshold=")
    assert models.measure(settings.Setting("another name", "two", sorted_, "2T", 0.25, 0.04)) is two
    assert set(models._importance.sums) == {"gate", "gate_abs", "gate_up", "gate_up_abs", "output"}  # ty: ignore


@pytest.mark.slow  # fast: the test above, and the stand-in for all settings
def test_tables_through_the_command(workspace: Path, tmp_path: Path, compiled_once):
    config = [f"--config={workspace / 'small_config.py'}", f"--workdir={tmp_path / 'run'}"]
    config += ["--config.table.name=dualsparse", "--config.table.tune_steps=2", "--config.model.moe.expert_dim=6",
               "--config.table.tables=('1','3','layers')"]  # fmt: skip
    assert execute(*config) == 0
    rows = {(r.table, r.row): r for r in read_rows(tmp_path / "run" / "results.jsonl") if r.paper == "dualsparse"}
    base = rows["3", settings.BASELINE]
    assert rows["1", "no training, P=1"].value == base.value and rows["1", "exactness, P=2"].verdict == "reproduced"
    assert rows["1", "fine-tuned, P=2"].value != base.value
    for name in ("2T partition", "2T reconstruct"):
        assert rows["3", name].extra["drop_rate"] == pytest.approx(0.25, abs=0.03)
    skip = rows["3", "EES"].extra
    assert skip["drop_rate"] == pytest.approx(0.25, abs=0.03) and len(skip["calibrated"]["0"]["beta"]) == 2
    pruned = rows["3", "EEP, 3 of 4 experts"]
    assert pruned.extra["drop_rate"] == 0 and len(pruned.extra["calibrated"]["0"]["kept"]) == 2
    assert rows["3", "top-1 of 2"].extra["drop_rate"] == pytest.approx(0.5)
    assert rows["3", "top-1 of 2"].extra["tokens_without_expert_share"] == 0
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert execute(*config) == 0
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before
    build_report([tmp_path / "run"])


SHARED = {
    "paper": "dualsparse", "config_hash": "c", "checkpoint_hash": "w", "data_hash": "d", "batch_shape": (8, 32),
    "commit": "abc", "dirty": False, "device": "cpu", "device_count": 1, "versions": {"jax": "0.11.2"},
}  # fmt: skip


def test_a_table_that_was_stopped_goes_on_with_the_next_arm(
    models: dualsparse.Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = [
        settings.Setting("none", "none", "base"),
        settings.Setting("two", "two", "order:gate_up_abs", "2T", 0.3, 0.05),
    ]
    measure, lines, counted = dualsparse.Models._measure, [], []

    def counting(self: dualsparse.Models, setting: settings.Setting) -> dualsparse.Measured:
        counted.append(setting.rule)
        if len(counted) == 2:
            raise KeyboardInterrupt
        return measure(self, setting)

    def call(**other: Any) -> list[dualsparse.Measured]:
        kept = arms.Arms(tmp_path, SHARED | other, lines.append)
        again = dualsparse.Models(models.run, models.base, functools.partial(kept.measured, dualsparse.Measured, 0))
        return [again.measure(setting) for setting in asked]

    monkeypatch.setattr(dualsparse.Models, "_measure", counting)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert counted == ["", "2T"] and lines == []
    one, two = call()
    assert counted == ["", "2T", "2T"] and len(lines) == 1 and "arms.jsonl" in lines[0]
    monkeypatch.setattr(dualsparse.Models, "_measure", measure)
    assert [one, two] == [models.measure(setting) for setting in asked]  # as if nobody had stopped it, to the last bit
    assert two.facts["limit"] and two.halved > 0


def test_arms_of_one_fine_tuning_are_kept_together(models: dualsparse.Models, monkeypatch: pytest.MonkeyPatch):
    """Another fine-tuning may end elsewhere: its arms are never of two."""
    plain, dropped = (s for s in settings.settings("1", models.config) if s.model == "tuned:2")
    asked: list[list[settings.Setting]] = []

    def kept(together: Any, measure: Any) -> list[dualsparse.Measured]:
        asked.append(list(together))
        return [measured(setting) for setting in together]

    again = dualsparse.Models(models.run, models.base, kept)  # ty: ignore
    assert again.measure(plain).rate == 0 and again.measure(dropped).rate > 0
    assert [[s.rule for s in together] for together in asked] == [["", "1T"]]
    again.measure(settings.Setting("none", "none", "base"))
    assert len(asked) == 2 and len(asked[1]) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"commit": "def"},
        {"checkpoint_hash": "v"},
        {"data_hash": "e"},
        {"dirty": True},
        {"commit": ""},
        {"device": "gpu"},
    ],
)
def test_arms_of_other_code_or_on_other_things_are_measured_again(tmp_path: Path, other: dict):
    setting, lines = settings.Setting("none", "none", "base"), []
    first = dualsparse.Measured({"a": DomainScore(1.5, 2, 3, 0.1 + 0.2, 5.0, ((1.5, 2),))}, 0.1, 0.2, 0.3, 0.4, 0.5, {})

    def call(measured: dualsparse.Measured, **other: Any) -> dualsparse.Measured:
        kept = arms.Arms(tmp_path, SHARED | other, lines.append)
        return kept.measured(dualsparse.Measured, 0, [setting], lambda _: measured)[0]

    second = dataclasses.replace(first, rate=0.9)
    assert call(first) == first == call(second)
    assert call(second, **other) == second
    assert call(second, **other) == second
    (tmp_path / "arms.jsonl").write_text('{"of": {}}\n{"arm"')
    assert call(second) == second and "is damaged" in lines[-1]
    arms.Arms(tmp_path, SHARED, lines.append).done()
    assert not list(tmp_path.iterdir())


def test_the_page_says_what_the_rows_say():
    rows = read_rows(ROOT / "experiments" / "results" / "dualsparse_tiny.jsonl")
    page = (ROOT / "docs" / "dualsparse.md").read_text()
    simulated = {row.extra["arm"]: row.extra for row in rows if row.table == "figure 11, simulation"}
    one, paper, water = (simulated[f"1T{rule}"] for rule in ("", ", load-aware: paper", ", load-aware: water"))
    rates = [100 * arm["drop_rate"] for arm in (one, paper, water)]
    assert f"1T drops {rates[0]:.1f} % of the work for a load gain of {one['load_gain']:.2f}" in page
    assert f"`paper` {rates[1]:.1f} % and `water` {rates[2]:.1f} % for the same gain" in page
    assert round(paper["load_gain"], 2) == round(water["load_gain"], 2) == round(one["load_gain"], 2)
    judged = {(row.table, row.row): row for row in rows if row.kind == "contrast"}
    at_60 = judged["thresholds", "2T reconstruct loses less than 1T at 60%"]
    assert at_60.verdict == "direction" and f"loses {-at_60.value:.3f} less than 1T" in page
    assert f"costs about {judged['2', '2T reconstruct loses nothing'].value:.3f} bits per byte" in page
    ees = judged["3", "2T reconstruct beats EES"]
    assert ees.verdict == "inconclusive" and f"EES by {-ees.value:.4f}" in page
    for name in ("2T reconstruct loses less than 1T", "reconstruct beats partition"):
        assert judged["2", name].verdict == "not reproduced"
    for name in ("1T: 5 % lose nothing", "2T reconstruct: 10 % lose nothing"):
        assert judged["thresholds", name].verdict == "direction"


def test_the_page_says_what_the_rows_of_the_gpu_say():
    rows = {(row.row, row.metric): row for row in read_rows(ROOT / "experiments" / "results" / "dualsparse_h100.jsonl")}
    page = " ".join((ROOT / "docs" / "dualsparse.md").read_text().split())
    arms = ("1T", "2T 0.01", "2T half")
    for rate in ("10%", "25%", "40%", "50%"):
        cells = [
            f"{row.value:.2f} ({row.extra['share_of_proportional_limit']:.0%})".replace("%", " %")
            for model in ("olmoe", "mixtral")
            for row in (rows[f"{model}, {arm}, {rate}", "speedup/layer"] for arm in arms)
        ]  # fmt: skip
        cells += [f"{rows[f'olmoe, {arm}, {rate}', 'speedup/prefill'].value:.2f}" for arm in arms[:2]]
        assert f"| {rate} | {' | '.join(cells)} |" in page
    at = lambda name, metric: rows[name, metric]  # noqa: E731
    experts = [at(f"{model}, 1T, 25%", "speedup/experts") for model in ("olmoe", "mixtral")]
    assert "gain {:.2f} (OLMoE) and {:.2f} (Mixtral) at a quarter".format(*(row.value for row in experts)) in page
    shares = [100 * row.extra["share_of_proportional_limit"] for row in experts]
    assert "{:.0f} % and {:.0f} % of the proportional limit".format(*shares) in page
    over = {
        m: tuple(at(f"{m}, {a}, 25%", "speedup/layer").extra["speed_over_1t"] for a in arms[:0:-1])
        for m in ("olmoe", "mixtral")
    }
    of_experts = [at(f"olmoe, {arm}, 25%", "speedup/experts").extra["speed_over_1t"] for arm in arms[:0:-1]]
    told = (
        "at a quarter {:.2f} and {:.2f} of its speed for OLMoE's layer (half, 0.01); OLMoE's experts alone have {:.2f} "
    )
    assert (told + "and {:.2f}.").format(*over["olmoe"], *of_experts) in page
    assert "For Mixtral's layer it is {:.2f} and {:.2f}; the two".format(*over["mixtral"]) in page
    same = [at("mixtral, 1T, 0%", f"speedup/{part}") for part in ("layer", "experts")]  # the same work as no limit
    assert "{:.2f} of the speed without a limit ({:.2f} for the experts)".format(*(row.value for row in same)) in page
    split = {arm: at(f"olmoe, {arm}, 25%", "speedup/layer").extra["split_ms"] for arm in ("2T half", "1T")}
    moves = [of["permute"] + of["combine"] for of in split.values()]
    assert "permute and combine take {:.2f} ms instead of {:.2f} ms".format(*moves) in page
    whole = at("olmoe, none", "speedup/layer")
    assert whole.commit[:7] == "2ce59cf" and f"without a limit takes {whole.extra['median_ms']:.2f} ms" in page
    one, sixteen = ([at(f"{m}, 1T, 25%", f"speedup/decode/{b}").value for m in ("olmoe", "mixtral")] for b in (1, 16))
    assert "gains {:.2f} (OLMoE) and {:.2f} (Mixtral) for one token".format(*one) in page
    assert "{:.2f} and {:.2f} for 16".format(*sixteen) in page
    kept = (
        at("olmoe, opportunistic, keep=2", "speedup/decode/16"),
        at("mixtral, opportunistic, keep=1", "speedup/decode/1"),
    )
    assert f"16 tokens gains {kept[0].value:.2f}" in page and f"one token {kept[1].value:.2f}" in page
    gone = [100 * row.extra["drop_rate"] for row in kept]
    assert "drop more, {:.0f} % and {:.0f} % of the pairs".format(*gone) in page
    four = at("olmoe, opportunistic, keep=4", "speedup/decode/16")
    text = (
        f"`keep=4` drops {100 * four.extra['drop_rate']:.0f} % of OLMoE's 16 tokens' pairs and gains {four.value:.2f}"
    )
    assert text in page
    assert "({:.2f} and {:.2f} there)".format(*(row.extra["bound_by_bytes"] for row in kept)) in page


def test_the_page_says_what_the_rows_of_two_gpus_say():
    results, docs = ROOT / "experiments" / "results", ROOT / "docs"
    page, other = (" ".join((docs / name).read_text().split()) for name in ("dualsparse.md", "partition.md"))
    rows = read_rows(results / "dualsparse_h200x2.jsonl")
    by_load = {row.row: row for row in rows if row.table == "load_aware_speed"}
    for arm in ("1T", "2T"):
        cells = [
            f"{row.value:.2f} of {row.extra['predicted']:.2f}, {100 * row.extra['drop_rate']:.1f} %"
            for model in ("olmoe", "mixtral")
            for row in (by_load[f"{model}, {arm}{rule}"] for rule in ("", ", paper", ", water"))
        ]
        assert f"| {arm} | {' | '.join(cells)} |" in page

    def shares(good: bool) -> tuple[str, str]:
        some = [r for name, r in by_load.items() if "none" not in name and ("olmoe, 2T" not in name) is good]
        found = [r.extra["share_of_predicted"] for r in some]
        gained = [(r.value - 1) / (r.extra["predicted"] - 1) for r in some]
        return tuple(f"{100 * min(of):.0f} to {100 * max(of):.0f} %" for of in (found, gained))

    (most, gain), (least, small) = shares(True), shares(False)
    assert f"reached to {most} with 1T-Drop and for Mixtral, to {least} with OLMoE's 2T-Drop" in page
    assert f"above 1 that is {gain}, and {small}" in page
    skews = [by_load[f"{model}, none"].extra["max_over_mean"] for model in ("olmoe", "mixtral")]
    assert "(busiest over mean {:.2f} and {:.2f};".format(*skews) in page
    s_etp = {(row.row, row.metric): row.extra["times_as_fast"] for row in rows if row.table == "s-etp"}
    for way, metric, text in (
        ("S-ETP", "collectives", "are {:.2f} times as fast as ETP's with 4 MiB of tokens on a device and {:.2f} times"),
        ("S-ETP", "trip", "not: {:.2f} and {:.2f} times as fast"),
        ("ETP, tokens first", "collectives", "whatever its k, is {:.2f} and {:.2f} times as fast"),
        ("ETP, tokens first", "trip", "(trip {:.2f} and {:.2f})"),
    ):
        found = [s_etp[f"{way}, 1 x 2 devices, {size} MiB", f"bandwidth/{metric}"] for size in (4, 64)]
        assert text.format(*found) in other
    later = {row.row: row for row in read_rows(results / "dualsparse_tokens_h200x2.jsonl")}
    assert {row.commit[:7] for row in later.values()} == {"870caf4"} and "(`870caf4`, `dualsparse_tokens" in page
    before, after = (of["olmoe, none"].extra["median_ms"] for of in (by_load, later))
    assert f"takes {after:.2f} ms instead of {before:.2f} ms" in page
    arms = [[later[f"olmoe, {arm}{rule}"] for rule in ("", ", paper", ", water")] for arm in ("1T", "2T")]
    reached = [sorted(100 * row.extra["share_of_predicted"] for row in of) for of in arms]
    text = "1T {:.2f} of {predicted:.2f}, `paper` {:.2f}, `water` {:.2f} ({least:.0f} to {most:.0f} % of"
    shown = {"predicted": arms[0][0].extra["predicted"], "least": reached[0][0], "most": reached[0][-1]}
    assert text.format(*(row.value for row in arms[0]), **shown) in page
    assert "2T {:.2f}, {:.2f} and {:.2f}".format(*(row.value for row in arms[1])) in page
    assert f"({reached[1][0]:.0f} to {reached[1][-1]:.0f} %)" in page
    assert all(later[name].extra["median_ms"] < by_load[name].extra["median_ms"] for name in later if "olmoe" in name)
    tokens, pairs = (later[f"{way}, 1 x 2 devices, 64 MiB"].extra for way in ("S-ETP, tokens", "S-ETP"))
    assert f"its whole trip with 64 MiB is {tokens['times_as_fast']:.2f} times as fast as ETP's" in other
    assert f"{pairs['median_ms'] / tokens['median_ms']:.2f} times as fast as S-ETP with pairs" in other
    first = {(row.row, row.metric): row.value for row in read_rows(results / "dualsparse_h100.jsonl")}
    later = {(row.row, row.metric): row.value for row in read_rows(results / "dualsparse_decode_h200.jsonl")}
    for (name, metric), value in first.items():  # of decoding, each form of 2T-Drop beside 1T-Drop
        model, arm, *_ = name.split(", ")
        if metric.startswith("speedup/decode/") and arm.startswith("2T"):
            assert value < first[f"{model}, 1T, 25%", metric]
    tokens = [first["olmoe, 2T half, 25%", f"speedup/decode/{b}"] for b in (1, 16, 512)]
    text = "OLMoE's layer has {:.2f} of the speed without a limit for one token, {:.2f} for 16 and {:.2f} for 512"
    assert text.format(*tokens) in page
    every = read_rows(results / "dualsparse_h100.jsonl")
    took = {row.metric: row.extra["median_ms"] for row in every if row.row == "olmoe, none"}
    text = "takes {:.3f} ms a token where it took 0.085 (`d42e5f1`, rows in the file's history), and {:.3f} ms for 512 "
    text += "tokens where it took 0.399; for 16 it takes {:.3f} ms, as before (0.285)"
    assert text.format(*(took[f"speedup/decode/{b}"] for b in (1, 512, 16))) in page
    tokens = [first["mixtral, 2T half, 25%", f"speedup/decode/{b}"] for b in (1, 16, 512)]
    assert "Mixtral's {:.2f}, {:.2f} and {:.2f}. Since then,".format(*tokens) in page
    assert f"Mixtral then loses: {first['mixtral, 1T, 25%', 'speedup/decode/512']:.2f} for 512" in page
    ones, twos = ([later[f"olmoe, {arm}", f"speedup/decode/{b}"] for b in (1, 16, 512)]
                  for arm in ("1T, 25%", "opportunistic, keep=2"))  # fmt: skip
    text = "1T-Drop has {:.2f}, {:.2f} and {:.2f} there, and `keep=2` {:.2f}, {:.2f} and {:.2f}."
    assert text.format(*ones, *twos) in page
    tokens = [later["olmoe, 2T half, 25%", f"speedup/decode/{b}"] for b in (1, 16, 512)]
    assert "{:.2f} of the speed without a limit for one token, {:.2f} for 16 and {:.2f} for 512".format(*tokens) in page


def test_the_page_says_what_the_rows_of_lab_models_say():
    page = " ".join((ROOT / "docs" / "dualsparse.md").read_text().split())
    rows = read_rows(ROOT / "experiments" / "results" / "dualsparse_lab.jsonl")
    judged = {(row.config.rpartition("=")[2], row.table, row.row): row for row in rows if row.kind == "contrast"}
    models = ("mixtral_like", "olmoe_like", "deepseek_like")
    one = lambda name: [judged[model, "2", name] for model in models]  # noqa: E731
    lost = one("2T reconstruct loses nothing")
    assert "{:.4f} bits per byte for the Mixtral-like".format(lost[0].value) in page  # noqa: UP032
    assert (
        "{:.4f} for the OLMoE-like one, {:.4f} for the DeepSeek-like one".format(*(r.value for r in lost[1:])) in page
    )
    assert [row.verdict for row in lost] == ["inconclusive", "not reproduced", "not reproduced"]
    against, order = one("2T reconstruct loses less than 1T"), one("reconstruct beats partition")
    for i, name in enumerate(("Mixtral-like model", "OLMoE-like one", "DeepSeek-like one")):
        assert f"{against[i].value:.4f} and {order[i].value:.4f} for the {name}" in page
    assert {row.verdict for row in against + order} == {"not reproduced"}
    wide = [-row.value for row in one("wide: reconstruct beats partition")]
    text = "reconstruction is worth {:.4f} (Mixtral-like), {:.4f} (OLMoE-like) and {:.4f} (DeepSeek-like)"
    assert text.format(*wide) in page
    share = {(row.config.rpartition("=")[2], row.row): row.extra["halved_share"]
             for row in rows if row.table == "2" and row.kind == "value"}  # fmt: skip
    more = [share[model, "2T reconstruct, wide"] / share[model, "2T reconstruct"] for model in models]
    assert f'"wide": {min(more):.1f} to {max(more):.1f} times as many pairs are halved' in page
    assert all(row.value > 0 for row in one("wide: 2T reconstruct loses less than 1T"))
    rates = {model: {name: row for (m, t, name), row in judged.items() if (m, t) == (model, "thresholds")}
             for model in models[:2]}  # fmt: skip
    few = [rates[model][name] for model in models[:2] for name in ("1T: 5 % lose nothing",
                                                                  "2T reconstruct: 10 % lose nothing")]  # fmt: skip
    text = "{:.4f} and {:.4f} (Mixtral-like), {:.4f} and {:.4f} (OLMoE-like), *direction* all four"
    assert text.format(*(row.value for row in few)) in page and {row.verdict for row in few} == {"direction"}
    fall = [-rates[model]["1T: quality falls from 25 to 50 %"].value for model in models[:2]]
    assert "1T loses {:.4f} and {:.4f} more".format(*fall) in page
    most = [rates[model]["2T reconstruct loses less than 1T at 60%"] for model in models[:2]]
    assert [row.verdict for row in most] == ["direction", "inconclusive"]
    assert "{:.4f} less than 1T (Mixtral-like, *direction*) and {:.4f} less".format(*(-r.value for r in most)) in page
    from_20 = [rates[model][f"2T reconstruct loses less than 1T at {rate}%"].value
               for model in models[:2] for rate in (20, 25, 30, 40, 50, 60)]  # fmt: skip
    assert max(from_20) < 0
    names = ("2T reconstruct beats EES", "2T reconstruct beats lower top-k at equal work")
    ees, less = ([judged[model, "3", name] for model in models[:2]] for name in names)
    assert [row.verdict for row in ees] == ["inconclusive", "direction"]
    assert [row.verdict for row in less] == ["inconclusive", "not reproduced"]
    assert f"is {-ees[1].value:.3f} better than EES" in page and f"and {-ees[0].value:.4f} on the Mixtral-like" in page
    assert f"{-less[1].value:.4f} better than one expert less" in page
    assert f"and {-less[0].value:.4f} on the Mixtral-like one (*inconclusive*)" in page
    pruned = [judged["mixtral_like", "3", f"2T reconstruct beats EEP, {n} of 8 experts"] for n in (6, 4)]
    assert "6 of 8 experts ({:.4f}) or 4 ({:.4f}), both *direction*".format(*(-row.value for row in pruned)) in page
    texts = (
        "which gains {:.4f}, 1T-Drop at the published rates costs {:.4f} (P = 1) and {:.4f} (P = 2), *{}*, and "
        "{:.4f} (P = 4), *{}*. That fine-tuning gains more in parts is *not reproduced* ({:.4f} the other way)",
        "gains {:.4f}, and less in 4 parts (by {more:.4f}, *not reproduced*); 1T-Drop after it costs {:.4f} (P = 1) "
        "and {:.4f} (P = 2), *{}* both, and {:.4f} (P = 4), *{}*",
    )
    for model, text, limit in zip(models[:2], texts, ("{:.4f}, rounding of bfloat16)", "{:.4f})"), strict=True):
        parts = {name: row for (m, t, name), row in judged.items() if (m, t) == (model, "1")}
        exact = [
            row.value for row in rows if row.table == "1" and row.row.startswith("exactness") and model in row.config
        ]
        assert all(abs(parts[f"partition without training equal, P={p}"].value) < 5e-5 for p in (2, 4))
        assert f"(no batch by more than {limit.format(max(exact))}" in page
        whole, two, four = (parts[f"1T loses nothing after fine-tuning, P={p}"] for p in (1, 2, 4))
        more = parts["fine-tuning gains more in parts"]
        gain, said = -parts["fine-tuning gains"].value, (whole.verdict, four.verdict)
        assert whole.verdict == two.verdict and more.verdict == "not reproduced"
        figures = (gain, whole.value, two.value, said[0], four.value, said[1], more.value)
        assert text.format(*figures, more=more.value) in page
    loss = {(row.config.rpartition("=")[2], row.row): row.value
            for row in rows if row.table == "importance" and row.kind == "value"}  # fmt: skip
    for model in models[:2]:
        best = sorted((value, name) for (m, name), value in loss.items() if m == model and name != "no drop")
        assert {name for _, name in best[:2]} == {"|gate-up|", "our metric"}
    assert loss["mixtral_like", "gate-up"] > loss["mixtral_like", "as stored"]
    ours = [judged[model, "importance", "our metric beats |gate-up|"] for model in models[:2]]
    assert "(*not reproduced*: {:.4f} and {:.4f} worse)".format(*(row.value for row in ours)) in page
    assert {row.verdict for row in ours} == {"not reproduced"}
    trained = {row.checkpoint_hash for row in rows if row.config.endswith("olmoe_like") and row.commit[:7] == "9e51db4"
               and row.table in ("thresholds", "importance")}  # fmt: skip
    assert len(trained) == 2 and "tables `thresholds` and `importance`" in page
    assert abs(loss["olmoe_like", "gate-up"] - loss["olmoe_like", "as stored"]) < 5e-4


def test_the_page_says_what_the_rows_of_tiny_models_say():
    page = " ".join((ROOT / "docs" / "dualsparse.md").read_text().split())
    results = ROOT / "experiments" / "results"
    rows = [read_rows(results / f"dualsparse_tiny_{name}.jsonl") for name in ("olmoe", "deepseek")]
    judged = [{(row.table, row.row): row for row in of if row.kind == "contrast"} for of in rows]

    def both(table: str, name: str, *verdicts: str) -> list[float]:
        found = [of[table, name] for of in judged]
        assert [row.verdict for row in found] == list(verdicts * (2 // len(verdicts)))
        return [abs(row.value) for row in found]

    less = "2T reconstruct loses less than 1T"
    for text, values in (
        ("a quarter costs {:.4f} and {:.4f}", both("2", "2T reconstruct loses nothing", "inconclusive")),
        ("loses {:.4f} and {:.4f} less than 1T", both("2", less, "not reproduced")),
        ("60 % {:.4f} (*not reproduced*) and {:.4f} (*inconclusive*)",
         both("thresholds", f"{less} at 60%", "not reproduced", "inconclusive")),
        ("beats EES by {:.4f} and {:.4f}", both("3", "2T reconstruct beats EES", "direction")),
        ("12 of 16 experts by {:.4f} and {:.4f}", both("3", "2T reconstruct beats EEP, 12 of 16 experts", "direction")),
        ("less by {:.4f} (*not reproduced*) and {:.4f} (*inconclusive*)",
         both("3", "2T reconstruct beats lower top-k at equal work", "not reproduced", "inconclusive")),
    ):  # fmt: skip
        assert text.format(*values) in page, text
    for of in judged:
        assert of["2", less].value < 0 and of["thresholds", f"{less} at 60%"].value < 0
    both("thresholds", "1T: 5 % lose nothing", "direction")
    both("thresholds", "2T reconstruct: 10 % lose nothing", "direction")
    both("1", "fine-tuning gains more in parts", "not reproduced")
    exact = [{row.row: row for row in of if row.row.startswith("exactness")} for of in rows]
    beyond = exact[0].pop("exactness, P=4")
    assert beyond.verdict == "not reproduced" and f"in 4 parts by {beyond.value:.4f}, beyond" in page
    assert {row.verdict for of in exact for row in of.values()} == {"reproduced"}
