"""Quality over time in the report: what is joined, and which settings no other one beats."""

from pathlib import Path

import pytest

from moejax.report import build_report, pareto
from moejax.report.load import Run
from moejax.results import ResultRow, append_rows


def timed(row: str, speedup: float, method: str, factor: float | None = None, **extra) -> ResultRow:
    base, extra = "" if method == "no limit" else "olmoe, none", extra | {"method": method, "factor": factor}
    return ResultRow(
        "value", "capacity_aware", "limit_speed", f"olmoe, {row}", "speedup/layer", value=speedup, baseline_row=base,
        config="olmoe", extra=extra,
    )  # fmt: skip


def scored(row: str, bits: float, arm: str, factor: float | None = None, table: str = "sweep") -> ResultRow:
    extra = {"arm": arm, "factor_used": factor, "dropped_share": 0.2}
    return ResultRow(
        "value", "capacity_aware", table, row, "bits_per_byte", value=bits, config="lab", checkpoint_hash="abc",
        extra=extra,
    )  # fmt: skip


FAST = [
    timed("none", 1.0, "no limit"),
    timed("token drop, factor 1", 2.0, "token drop", 1.0, drop_rate=0.3),
    timed("token drop, factor 1.5", 1.25, "token drop", 1.5),
    timed("token drop, factor 7", 1.1, "token drop", 7.0),  # of which no quality is known
    timed("expanded drop, factor 1", 0.8, "expanded drop", 1.0),
    timed("measured budget", 1.25, "measured budget"),
    timed("top-6 of 8", 4.0, "lower top-k"),
    timed("replication", 1.6, "replication"),
]
GOOD = [
    scored("no limit", 1.0, "no limit"),
    scored("token drop, factor 1", 1.2, "token drop", 1.0),
    scored("token drop, factor 1.5", 1.1, "token drop", 1.5),
    scored("expanded drop, factor 1", 1.05, "expanded drop", 1.0),
    scored("measured budget", 1.02, "measured budget", table="latency"),
    scored("top-3 of 4", 1.3, "lower top-k", table="latency"),
    scored("order, factor 1", 1.5, "order", 1.0, table="1"),
]


def files(tmp_path: Path) -> list[Path]:
    for name, rows in (("fast", FAST), ("good", GOOD)):
        append_rows(tmp_path / f"{name}.jsonl", rows)
    return [tmp_path / "fast.jsonl", tmp_path / "good.jsonl"]


def test_settings_are_joined_by_arm_and_factor():
    fast, good = ({pareto.setting_of(row): row for row in rows} for rows in (FAST, GOOD))
    points = {(p.arm, p.strength): p for p in pareto.joined(fast, good)}
    assert {name: (p.time, p.quality) for name, p in points.items()} == {
        ("token drop", 1.0): (0.5, 1.2), ("token drop", 1.5): (0.8, 1.1), ("expanded drop", 1.0): (1.25, 1.05),
        ("measured budget", None): (0.8, 1.02),
        ("lower top-k", 0.75): (0.25, 1.3),  # by the share of the experts that a token keeps
        ("replication", None): (0.625, 1.0),  # exact: as good as the baseline
    }  # fmt: skip
    assert points["token drop", 1.0].dropped == (0.3, 0.2) and points["lower top-k", 0.75].dropped == (0.25, 0.25)
    assert {p.arm for p in pareto.front([*points.values()], 1.0)} == {"token drop", "lower top-k", "replication"}
    slow = [p._replace(time=1.1) for p in points.values()]
    assert pareto.front(slow, 1.0) == []  # the baseline beats them all
    del good[pareto.BASELINE, None]
    assert pareto.joined(fast, good) == []


def test_one_arm_and_copies_are_no_plot(tmp_path: Path):
    few = [row for row in FAST if pareto.setting_of(row)[0] in (pareto.BASELINE, pareto.EXACT, "token drop")]
    assert pareto.sections([Run(tmp_path, "a", rows=few), Run(tmp_path, "b", rows=GOOD)]) == []


@pytest.mark.parametrize(
    ("row", "extra", "setting"),
    [
        ("mixtral: token drop, factor 2", {"arm": "mixtral: token drop", "x": 2.0, "x_name": "capacity factor"},
         ("token drop", 2.0)),
        ("olmoe: top-7 of 8", {"arm": "olmoe: top-7 of 8"}, ("lower top-k", 0.875)),
        ("olmoe: replication, 1 spare slot a rank", {"arm": "olmoe: replication, 1 spare slot a rank"},
         ("replication", None)),
        ("token drop, equal latency", {"arm": "token drop", "x": 0.7, "x_name": "rows of the busiest rank",
                                       "factor_used": 1.2}, ("token drop", 1.2)),
        ("no arm", {}, None),
    ],
)  # fmt: skip
def test_rows_of_simulations_and_tables_say_their_setting(row: str, extra: dict, setting: tuple | None):
    assert pareto.setting_of(ResultRow("value", "p", "t", row, "m", extra=extra)) == setting


def test_the_report_draws_it_where_both_are_given(tmp_path: Path):
    fast, good = files(tmp_path)
    page = build_report([], tmp_path / "both.html", [fast, good]).read_text()
    assert "Quality over time: olmoe, an MoE layer" in page and "time, as a share of that without a limit" in page
    (section,) = pareto.sections([Run(tmp_path, "a", rows=FAST), Run(tmp_path, "b", rows=GOOD)])
    table = section.blocks[1]
    told = {line[0].text: (line[2].text, line[5].text) for line in table.rows}
    assert told["replication"] == ("62.5 %", "yes") and told["expanded drop"] == ("125.0 %", "no")
    assert pareto.sections([Run(tmp_path, "a", rows=FAST)]) == pareto.sections([Run(tmp_path, "b", rows=GOOD)]) == []
