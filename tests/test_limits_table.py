"""The tables of ``experiments.papers.capacity_aware`` beyond the first, with a stand-in for the scoring; and the
simulation of eight ranks. The whole way, with a trained model: the slow test below (Table 1: tests/test_run.py)."""

import dataclasses
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import capacity_settings as settings
from experiments import ep_simulation, session
from experiments.papers import capacity_aware
from moejax.config import ConfigError, ExperimentConfig
from moejax.replication import rank_loads, replicate
from moejax.report import build_report
from moejax.results import append_rows, environment_facts, read_rows
from tests.small import execute, load

CONFIG = load("configs.papers.capacity_aware", "tiny")
VALUES = {"sweep": 34, "2": 8, "3": 8, "latency": 9 + 2 * 7 + 3 * 5}
"""Rows with a value; in the last one those of the sweep from factor 0.5 on stand again, over latency."""


class Score:
    """Stands in for a domain's score: bits per byte ``value`` in every one of ten batches, with a little noise."""

    def __init__(self, value: float) -> None:
        self.bits_per_byte = value
        noise = np.random.default_rng(0).normal(0, 1e-4, 10)
        self.per_batch = [((value + e) * math.log(2) * 100, 100) for e in noise]


def measured(setting: settings.Setting) -> Any:
    """Token Drop loses quality as it loses pairs; the busiest rank has 2 at no limit and the factor otherwise."""
    factor = setting.factor if setting.factor is not None else 2.0
    dropped = max(0.0, 1 - factor / 2) if setting.arm != settings.BASELINE else 0.0
    added = 0.1 if setting.arm.startswith("expanded") else 0.0
    value = 1.0 + 0.5 * dropped - added
    return types.SimpleNamespace(
        by_domain={"a": Score(value)}, mean=value, dropped=dropped, added=added, busiest=1.0, lost_share=0.0,
        critical=2000.0 if setting.arm == settings.BASELINE else 1000.0 * factor,
    )  # fmt: skip


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``(config) -> (settings that were measured, lines)`` of a call of make_table in one workdir."""

    def table(config: ExperimentConfig = CONFIG) -> tuple[list[settings.Setting], list[str]]:
        asked: list[settings.Setting] = []
        lines: list[str] = []

        def measure(self: Any, seed: int, setting: settings.Setting) -> Any:
            asked.append(setting)
            return measured(setting)

        monkeypatch.setattr(capacity_aware._Scoring, "measure", measure)
        monkeypatch.setattr(capacity_aware, "weights_hash", lambda states: "0" * 12)
        monkeypatch.setattr(capacity_aware, "token_shards", lambda mesh: 1)
        run: Any = types.SimpleNamespace(best=lambda: (None, 0), mesh=None)
        facts = {"data": {"hash": "d"}, "command": "python -m experiments.run"} | environment_facts()
        capacity_aware.make_table(config, {0: run}, tmp_path, facts, lines.append)
        return asked, lines

    return table


def test_tables_are_made_from_one_another_and_not_twice(make, tmp_path: Path):
    asked, _ = make()
    rows = read_rows(tmp_path / "results.jsonl")
    for table, count in VALUES.items():
        mine = [r for r in rows if r.table == table and r.kind == "value"]
        assert len(mine) == count and mine[0].row == settings.BASELINE
        assert {s.ranks for s in asked if s.name in {r.row for r in mine} - {settings.BASELINE}} == {4}
        claims = [r for r in rows if r.table == table and r.kind == "contrast"]
        assert [c.row for c in claims] == [c.name for c in settings.contrasts(table, CONFIG)]
        assert all(c.verdict and c.verdict != "not run" for c in claims)
    by_name = {(r.table, r.row): r for r in rows}
    # 12 % dropped: the stand-in drops 1 - factor / 2; the sweep's points bracket it
    assert by_name["2", "token drop, 12 % dropped"].extra["factor_used"] == pytest.approx(1.76)
    # the latency of token drop at 1 is half that without a limit, and so is that of every other arm
    for arm in settings.ARMS:
        row = by_name["latency", f"{arm}, equal latency"]
        assert row.extra["x"] == pytest.approx(0.5) and row.extra["x_name"] == settings.LATENCY
    assert by_name["2", "expanded drop, the paper's factor"].published == 63.2
    assert by_name["3", "expanded drop, device level, factor 1"].published == 74.8
    assert by_name["latency", "top-3 of 4"].extra["arm"] == "lower top-k"
    point, swept = by_name["latency", "device budget, factor 1"], by_name["sweep", "device budget, factor 1"]
    assert point.value == swept.value and point.id != swept.id and point.extra["x"] == swept.extra["latency"]
    again, lines = make()
    assert again == [] and [line.endswith("done before") for line in lines] == [True] * 5
    few = [r for r in rows if r.table in ("1", "sweep", "3")]  # as if it had been stopped before the others
    (tmp_path / "results.jsonl").unlink()
    append_rows(tmp_path / "results.jsonl", few)
    again, _ = make()
    left = {r.row for r in rows if r.kind == "value" and r.table in ("2", "latency")} - {r.row for r in few}
    assert {s.name for s in again} == left | {settings.BASELINE, "measured budget"}  # which stands in table 3 too
    config = dataclasses.replace(CONFIG, table=dataclasses.replace(CONFIG.table, tables=("1",)))
    assert make(config)[0] == []
    # Factors by layer: one row more, in that table alone, which is made again.
    factors = (0.5, 1.5, *[1.0] * (CONFIG.model.num_layers - 2))
    config = dataclasses.replace(CONFIG, table=dataclasses.replace(CONFIG.table, layer_factors=factors))
    asked, lines = make(config)
    name = f"token drop, factors {'/'.join(f'{f:g}' for f in factors)}"
    assert name in {s.name for s in asked} and sum(line.endswith("done before") for line in lines) == 4
    (row,) = (r for r in read_rows(tmp_path / "results.jsonl") if r.row == name)
    assert row.table == "latency" and row.extra["x"] == 0.5 and row.config_hash == rows[0].config_hash


def test_no_more_than_three_primary_contrasts_a_table_and_each_names_its_rows():
    curve = settings.Curve((0.0, 1.0, 3.0), (1.0, 0.3, 0.0), (0.0, 0.6, 1.0))
    for table in settings.TABLES:
        names = {s.name for s in settings.settings(table, CONFIG, 4, dict.fromkeys(settings.ARMS, curve))}
        claims = settings.contrasts(table, CONFIG)
        assert {c.arm_a for c in claims} | {c.arm_b for c in claims} <= names
        assert 1 <= sum(c.primary for c in claims) <= 3


def test_what_a_table_cannot_be_is_refused_before_training():
    for change, why in (
        ({"tables": ("4",)}, "'4' is none of 1, sweep"),
        ({"tables": ()}, "name at least one"),
        ({"tables": ("1", "2")}, "add 'sweep'"),
        ({"tables": ("1", "1")}, "each once"),
        ({"factors": (-1.0,)}, "multiple of the mean load"),
        ({"layer_factors": (1.0,)}, r"table\.layer_factors=\(1\.0,\): TokenDrop: 1 factors for"),
        ({"layer_factors": (1.0,), "tables": ("1",)}, "a row of the table 'latency': add it"),
    ):
        with pytest.raises(ConfigError, match=why):
            settings.check(dataclasses.replace(CONFIG, table=dataclasses.replace(CONFIG.table, **change)))


def test_a_share_is_found_on_a_falling_curve_and_a_latency_on_a_rising_one():
    curve = settings.Curve((0.0, 1.0, 3.0), (1.0, 0.3, 0.0), (0.0, 0.6, 1.0))
    assert curve.factor_at(curve.dropped, 0.12) == pytest.approx(3 - 2 * 0.12 / 0.3)
    assert curve.factor_at(curve.latency, 0.6) == pytest.approx(1.0)
    assert curve.factor_at(curve.latency, 2.0) == 3.0


def test_ranks_divide_experts_and_sequences():
    assert (
        settings.ranks_of(CONFIG, 1) == 4 and settings.ranks_of(CONFIG, 3) == 4 and settings.ranks_of(CONFIG, 12) == 1
    )
    assert settings.ranks_of(load("configs.papers.capacity_aware", "h100"), 1) == 8
    assert settings.published_model(dataclasses.replace(CONFIG, init_from="Mixtral-8x7B")) == "mixtral"


@pytest.mark.slow
def test_all_tables_on_a_trained_model(workspace: Path, tmp_path: Path, compiled_once):
    """The real command: virtual ranks, other k, per-batch loads, resume, report."""
    config = [f"--config={workspace / 'small_config.py'}", f"--workdir={tmp_path / 'run'}"]
    tables = "--config.table.tables=('1','sweep','2','3','latency')"
    assert execute(*config, tables) == 0
    rows = {(r.table, r.row): r for r in read_rows(tmp_path / "run" / "results.jsonl")}
    drop, none = rows["sweep", "token drop, factor 3"], rows["sweep", settings.BASELINE]
    assert drop.value == none.value == rows["1", settings.BASELINE].value and drop.extra["latency"] == 1.0
    assert rows["sweep", "token drop, factor 1"].extra["latency"] < 1
    assert rows["sweep", "expanded drop, factor 1"].extra["added_share"] > 0
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert execute(*config, tables) == 0
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before
    build_report([tmp_path / "run"])


# --- the simulation -----------------------------------------------------------------------------------------


def test_loads_have_the_skew_that_was_observed():
    for model in ep_simulation.MODELS.values():
        loads = ep_simulation.loads_of(model.experts, model.skew)
        assert loads.mean() == pytest.approx(1) and loads[0] == loads.max() == pytest.approx(model.skew)
        assert (np.diff(loads) <= 0).all() and loads[0] <= model.experts / model.k  # a token chooses an expert once
    with pytest.raises(ConfigError, match=r"skew=9: max/mean over 8 experts"):
        ep_simulation.loads_of(8, 9)


def test_rows_of_each_rank():
    loads = np.asarray([4.0, 1.0, 0.5, 0.5, 1.0, 0.5, 0.3, 0.2])
    rank = rank_loads(loads, 4)
    np.testing.assert_allclose(ep_simulation.token_drop(loads, 4, 1.5), [2.5, 1.0, 1.5, 0.5])
    np.testing.assert_allclose(ep_simulation.token_drop(loads, 4, 9), rank)
    wide = ep_simulation.expanded_drop(
        loads, 4, 1.5, 4
    )  # a quarter of each capacity is filled by the rank's own tokens
    np.testing.assert_allclose(wide, 0.75 * np.asarray([2.5, 1.0, 1.5, 0.5]) + 0.25 * 3.0)
    np.testing.assert_allclose(ep_simulation.device_budget(loads, 4, 1.0), [2, 1, 1.5, 0.5])
    np.testing.assert_allclose(ep_simulation.measured_budget(loads, 4), [1.5, 1, 1.5, 0.5])
    for spare in (1, 2, 3):
        copied = rank_loads(loads, 4, replicate(loads, 4, spare))
        assert copied.sum() == pytest.approx(loads.sum()) and copied.max() < rank.max()  # exact: no pair is lost


def test_the_simulation_is_a_law_of_its_times_and_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def command(*arguments: str) -> int:
        return session.call(ep_simulation.define_flags, ep_simulation.command, arguments)

    out = tmp_path / "rows.jsonl"
    assert command("--models=mixtral", "--seconds_per_row=1e-6", "--seconds_fixed=0", "--exchange_seconds_per_row=0",
                   f"--output={out}") == 0  # fmt: skip
    assert "simulation of 8 ranks" in capsys.readouterr().out
    rows = {(r.table, r.row): r for r in read_rows(out)}
    assert all(
        r.extra["simulation"] and "simulation" in r.verdict_note and "simulated" in r.unit for r in rows.values()
    )
    four = rows["figure 4, simulation", "mixtral: token drop, factor 1"]
    assert four.extra["experts_timed"] == "olmoe, by size"  # no times of Mixtral's were given
    assert four.value == pytest.approx(3.0) and four.published == 2.55  # one expert a rank: time is the busiest's load
    assert rows["figure 5, simulation", "mixtral: token drop, factor 1.5"].published == 1.87
    times = tmp_path / "times.csv"
    times.write_text("rows,seconds\n0,1e-3\n1000,2e-3\n")
    assert ep_simulation.read_times(times)(500) == pytest.approx(1.5e-3)
    assert ep_simulation.read_times(times)(3000) == pytest.approx(4e-3)
    # A model's own times as they are, another's by the size of its experts: one Mixtral expert is 28 of OLMoE.
    measured = ep_simulation.Times(0.0, 0.0, lambda rows: 2 * rows, {"mixtral": lambda rows: 5 * rows})
    assert [measured.layer(name, 3) for name in ("olmoe", "mixtral")] == [6, 15]
    assert ep_simulation.Times(0.0, 0.0, lambda rows: 2 * rows).layer("mixtral", 3) == 28 * 6
    given = ("--seconds_fixed=0", "--exchange_seconds_per_row=0", f"--output={out}")
    assert command("--models=mixtral", f"--times=mixtral={times}", *given) == 0
    four = {(r.table, r.row): r for r in read_rows(out)}["figure 4, simulation", "mixtral: token drop, factor 1"]
    assert four.value == pytest.approx(3.0, rel=0.02)  # far beyond the last point: linear on, but for what 0 rows cost
    for arguments, why in (
        (("--models=gpt",), "choose among olmoe"),
        (("--seconds_per_row=1",), "--seconds_fixed and --exchange_seconds_per_row are missing"),
        ((f"--times={times}", "--seconds_per_row=1"), "give one of them"),
        (("--times=nowhere.csv", "--seconds_fixed=0", "--exchange_seconds_per_row=0"), "cannot be read"),
        ((f"--output={tmp_path}/no/rows.jsonl",), "there is no folder"),
        ((f"--times=gpt={times}",), "MODEL=FILE, each once; models are olmoe"),
        ((f"--times=mixtral={times}", "--seconds_fixed=0", "--exchange_seconds_per_row=0"), "says nothing of olmoe"),
    ):
        assert command(*arguments) == 2 and why in capsys.readouterr().err
    times.write_text("1000\n")
    with pytest.raises(ConfigError, match="a line is not rows,seconds"):
        ep_simulation.read_times(times)


def test_the_papers_own_bar_is_the_default_baseline():
    times = ep_simulation.default_times(20)
    none = ep_simulation.simulate("olmoe", times, 20)[0]
    rows = none.busiest * 8 * ep_simulation.rows_of_mean(ep_simulation.MODELS["olmoe"])
    assert times.layer("olmoe", rows) == pytest.approx(6.9e-3)


def test_the_quickstart_makes_table_1_alone():
    """The others take longer than all the rest of it."""
    assert [load("configs.quickstart", name).table.tables for name in ("full", "short")] == [("1",)] * 2
