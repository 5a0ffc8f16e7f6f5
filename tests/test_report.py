"""The report: complete, half-way and empty workdirs, several runs, escaping, size, and Markdown."""

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moejax.report import build_report, compare, results_markdown
from moejax.report.blocks import duration, fixed, percent, significant
from moejax.report.load import read_run, running_time, series
from moejax.results import ResultRow, append_rows
from moejax.verdicts import Arm, Contrast, judge

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("code", "docs", "prose")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects what the tests look at and holds that every element is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.ids, self.loads, self.labels, self.links, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == [], self.stack

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if "id" in named:
            self.ids.append(named["id"])
        self.loads += [value for name, value in attrs if name in ("src", "srcset", "data", "action", "xlink:href")]
        if "href" in named:
            self.links.append(named["href"])
        if tag == "svg":
            self.labels.append(named.get("aria-label", ""))
        assert tag not in ("script", "link", "iframe", "object", "embed"), tag
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, (tag, self.stack[-3:], self.getpos())
        self.stack.pop()

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def parse(path):
    """Parses a report and checks that it is one self-contained file."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == []
    assert all(link.startswith(("#", "data:text/csv")) for link in page.links), page.links
    assert not re.search(r"(?:url\(|@import|href=.)\s*['\"]?https?:", text)
    assert not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids)), "two elements of one id: one figure would draw another's clip path"
    targets = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets <= set(page.ids)
    assert all(page.labels), "a figure without its alternative text"
    return page


def write_lines(path, lines, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def train_line(step, name_seed=0, **fields):
    loss = 1.2 + 4.3 * math.exp(-step / 60) + 0.02 * math.sin(step + name_seed)
    line = {
        "kind": "train",
        "step": step,
        "tokens": step * 2048,
        "time": 1.7e9 + 0.5 * step,
        "loss": loss + 0.05,
        "ce": loss,
        "bits_per_byte": loss / math.log(2),
        "learning_rate": 3e-3,
        "grad_norm": 0.7,
        "tokens_per_s": 4096.0 + step,
        "mfu": 0.125,
        "load_max_over_mean": 1.4 + math.exp(-step / 40),
        "dropped_share": 0.02 * math.exp(-step / 90),
        "aux": {"balance": 1.03, "z": 2.5},
    }
    return line | fields


def load_line(step, layers=4, experts=8):
    grid = np.random.default_rng(layers * experts).gamma(3.0, 1 / 3, (layers, experts))
    grid[-1, 1] = 0.0
    grid /= grid.mean(1, keepdims=True)
    return {
        "kind": "load",
        "step": step,
        "layers": list(range(layers)),
        "utilisation": grid.round(4).tolist(),
        "max_over_mean": grid.max(1).tolist(),
        "cv": grid.std(1).tolist(),
        "entropy": [1.9] * layers,
        "dead": [0] * (layers - 1) + [1],
        "dropped_share": [0.0123] * layers,
    }


def table_rows():
    """A table as a run writes it: arms over factors, a baseline, contrasts; published are the paper's."""
    rng = np.random.default_rng(0)
    published = {
        2.0: (60.8, 60.8, 61.3, 64.0),
        1.5: (55.1, 56.0, 59.1, 63.1),
        1.0: (51.8, 52.0, 53.1, 61.1),
    }
    common: dict[str, Any] = {
        "paper": "capacity_aware",
        "table": "1",
        "scale": "tiny",
        "config_hash": "0123456789ab",
        "batch_shape": (16, 128),
        "device": "cpu",
        "device_count": 1,
        "commit": "0123456789abcdef0123",
        "dirty": False,
        "command": "python -m experiments.run --config=configs/papers/capacity_aware.py:tiny",
    }
    value: dict[str, Any] = {
        "metric": "bits_per_byte/mean",
        "unit": "bits/byte",
        "interval_kind": "95 %, bootstrap over batches, one model",
        "published_metric": "average accuracy of 8 tasks in %, OLMoE",
    }
    batches = rng.normal(1.9, 0.15, 24)
    rows = [
        ResultRow(
            kind="value",
            row="no limit",
            value=float(batches.mean()),
            values_by_seed={0: 1.9},
            interval=(1.84, 1.96),
            published=64.0,
            **value,
            **common,
        )
    ]
    arms = {}
    for factor in (2.0, 1.5, 1.0, 0.75, 0.5):
        for i, arm in enumerate(("order", "reverse", "random", "score")):
            worse = (0.30, 0.28, 0.2, 0.05)[i] * (2.2 - factor) ** 2 / 2
            values = batches + worse + rng.normal(0, 0.01, 24)
            share = max(0.0, 0.03 + 0.3 * (2 - factor) / 2)
            rows.append(
                ResultRow(
                    kind="value",
                    row=f"{arm} at {factor:g}",
                    value=float(values.mean()),
                    values_by_seed={0: float(values.mean())},
                    interval=(float(values.mean() - 0.06), float(values.mean() + 0.06)),
                    baseline_row="no limit",
                    published=published.get(factor, (None,) * 4)[i],
                    exercised_share=share,
                    extra={"arm": arm, "capacity_factor": factor},
                    **value,
                    **common,
                )
            )
            if factor == 1.0:
                arms[arm] = Arm({0: float(values.mean())}, batches=values, exercised_share=share)
    contrasts = [
        Contrast.on_metric(f"{a} > {b} at 1.0", "bits_per_byte/mean", a, b)
        for a, b in (("score", "random"), ("random", "order"), ("random", "reverse"))
    ]
    rows += [ResultRow(unit="bits/byte", **j.row_fields(), **common) for j in judge(contrasts, arms)]
    return rows


def make_workdir(path, name="tiny run", steps=300, layers=4, experts=8):
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "name": name,
        "scale": "tiny",
        "train": {"steps": steps},
        "model": {
            "num_layers": layers,
            "dim": 128,
            "moe": {
                "num_experts": experts,
                "expert_dim": 64,
                "capacity_factor": 0.0,
                "router": {"name": "topk_of_softmax", "k": 2},
            },
        },
    }
    env = {
        "command": "python -m experiments.run --config=configs/base.py:tiny --workdir=runs/tiny",
        "commit": "0123456789abcdef0123",
        "device": "TFRT_CPU",
        "device_count": 1,
        "versions": {"jax": "0.11.2", "flax": "0.12.12", "python": "3.12.1"},
        "grouped_matmul": {"implementation": "xla_tiles", "refused": {"mosaic_gpu": "needs a Hopper GPU"}},
        "parameters": {"total": 98_304_123, "active": 12_345},
        "data": {
            "hash": "feedbeef",
            "stats": {domain: {"train": {"bytes": 400_000, "tokens": 100_000, "documents": 37}} for domain in DOMAINS},
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "env.json").write_text(json.dumps(env))
    lines = [train_line(step, len(name)) for step in range(10, steps + 1, 10)]
    for step in range(100, steps + 1, 100):
        bits = {domain: 2.0 + 0.3 * i + 2 * math.exp(-step / 80) for i, domain in enumerate(DOMAINS)}
        mean = sum(bits.values()) / 3
        lines.append({"kind": "valid", "step": step, "bits_per_byte": bits, "mean_bits_per_byte": mean})
        lines.append(load_line(step, layers, experts))
    lines.append(
        {
            "kind": "final",
            "step": steps,
            "split": "test",
            "bits_per_byte": {"code": 1.2345, "docs": 2.3456, "prose": 2.1987},
            "perplexity": {"code": 2.353, "docs": 5.082, "prose": 4.59},
            "ngram": {
                "3": {"code": 2.9, "docs": 2.8, "prose": 2.7},
                "6": {"code": 1.9, "docs": 2.31, "prose": 2.4},
            },
        }
    )
    lines.append(
        {
            "kind": "tasks",
            "step": steps,
            "tasks": [
                {
                    "task": "continuation",
                    "metric": "accuracy",
                    "value": 0.512,
                    "stderr": 0.02,
                    "n": 600,
                    "chance": 0.25,
                },
                {
                    "task": "pairs",
                    "metric": "accuracy",
                    "value": 0.52,
                    "stderr": 0.03,
                    "n": 300,
                    "chance": 0.5,
                },
            ],
        }
    )
    write_lines(path / "metrics.jsonl", lines)
    append_rows(path / "results.jsonl", table_rows())
    return path


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("runs") / "complete")


@pytest.fixture(scope="module")
def page(complete):
    return parse(build_report([complete]))


# --- complete ----------------------------------------


def test_report_lies_in_the_workdir_unless_told(complete, tmp_path):
    assert build_report([complete], tmp_path / "deep" / "r.html") == tmp_path / "deep" / "r.html"
    assert (tmp_path / "deep" / "r.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    "shown",
    [
        "98.3 M (98,304,123)",
        "12,345",
        "xla_tiles; refused: mosaic_gpu (needs a Hopper GPU)",
        "jax 0.11.2, flax 0.12.12, python 3.12.1",
        "0123456789abcdef0123",
        "feedbeef",
        "TFRT_CPU × 1",
        "python -m experiments.run --config=configs/base.py:tiny --workdir=runs/tiny",
        "614,400",  # tokens of the last step
        "12.5 %, median",  # model FLOP utilisation
        "2 min 25 s",  # (300 - 10) steps of half a second
        "balance 1.030, z 2.500",
        "1.2345 2.9000 1.9000 2.35",  # held-out code: model, 3-gram, 6-gram, perplexity
        "The model does not beat the 6-gram on docs.",
        "0.512 ± 0.020 0.250 600 above chance",
        "0.520 ± 0.030 0.500 300 not above chance",
        "1.23 %",  # dropped pairs of a layer
        "score < random by more than 0.005",
        "direction (one model)",
        "One trained model:",
        "The training text was read 2.0 times.",
        "finished",
    ],
)
def test_report_shows_what_was_measured(page, shown):
    assert shown in page.words


def test_table_rows_show_ours_interval_and_published(page):
    row = next(row for row in table_rows() if row.row == "score at 1.5")
    low, high = row.interval
    assert f"score at 1.5 {row.value:.4f} [{low:.4f}, {high:.4f}] 1 63.1 10.50 % –" in page.words


def test_speed_leaves_out_the_line_that_holds_the_compilation(tmp_path):
    lines = [train_line(10, tokens_per_s=1.0), train_line(20, tokens_per_s=500.0)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert "500 tokens/s, median" in parse(build_report([tmp_path])).words


def test_figures_say_in_words_what_they_show(page):
    assert any("Heat map of expert load over 4 layers and 8 experts at step 300" in a for a in page.labels)
    assert any("Training loss over steps" in a and "cross-entropy 1.2" in a for a in page.labels)
    assert any("score: " in a and "at 1.5" in a and a.startswith("Ours") for a in page.labels)
    assert any(a.startswith("Published: average accuracy") and "63.1 at 1.5" in a for a in page.labels)


def test_each_figures_data_is_on_the_page_as_csv(page):
    files = [
        base64.b64decode(link.split("base64,")[1]).decode() for link in page.links if link.startswith("data:text/csv")
    ]
    assert len(files) == len(page.labels)
    heat = next(file for file in files if file.startswith("layer,expert,load / ideal"))
    lines = heat.splitlines()[1:]
    assert len(lines) == 4 * 8
    assert lines[0] == f"0,0,{load_line(300)['utilisation'][0][0]}"


def test_report_is_light_and_dark_and_figures_take_the_pages_colours(page, complete):
    text = (complete / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert "var(--series-0)" in text and "var(--heat-0)" in text
    assert not re.search(r"#[12]000\d\d", text), "a placeholder colour is left"


def test_sixty_four_experts_in_sixteen_layers_stay_under_two_megabytes(tmp_path):
    path = build_report([make_workdir(tmp_path, "wide", steps=3000, layers=16, experts=64)])
    assert path.stat().st_size < 2_000_000
    assert "over 16 layers and 64 experts" in parse(path).words


def test_everything_is_escaped(tmp_path):
    name = "<script>alert(1)</script> & \"q\" 'a'"
    run = make_workdir(tmp_path, name)
    lines = [{"kind": "valid", "step": 10, "bits_per_byte": {"<b>d": 1.0, "</svg><i>": 2.0}}]
    write_lines(run / "metrics.jsonl", lines)
    (run / "results.jsonl").unlink()
    append_rows(run / "results.jsonl", [ResultRow(kind="value", paper="<p>", table="<t>", row="<r>", metric="m")])
    page = parse(build_report([run]))  # refuses elements that a report never has, and unclosed ones
    assert name in page.words and "<r>" in page.words and "<b>d 1.000" in page.words


# --- incomplete ----------------------------------------


def test_a_workdir_that_has_just_begun_names_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    page = parse(build_report([tmp_path]))
    assert page.labels == []
    for absent in (
        "No row has a verdict yet.",
        "No config.json, env.json or metrics.jsonl in the workdir yet.",
        "No results row has been written yet.",
        "No training or validation line has been logged yet.",
        "The final evaluation has not run yet.",
        "No expert load has been logged yet",
        "No task was scored in this run.",
        "Nothing has been measured yet.",
    ):
        assert absent in page.words


def test_half_way_with_a_truncated_last_line(complete, tmp_path):
    (tmp_path / "config.json").write_bytes((complete / "config.json").read_bytes())
    lines = (complete / "metrics.jsonl").read_text().split("\n")
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:12]) + "\n" + lines[12][:40])
    page = parse(build_report([tmp_path]))
    assert "at step 120 of 300" in page.words
    assert "cannot be read" not in page.words, "a writer at work is no problem"
    assert "The final evaluation has not run yet." in page.words
    assert any("at step 120" in label for label in page.labels)


def test_broken_lines_are_named_and_the_rest_is_shown(complete, tmp_path):
    text = (complete / "metrics.jsonl").read_text().split("\n")
    (tmp_path / "metrics.jsonl").write_text("\n".join([text[0], "{broken", '["no object"]', *text[1:5]]) + "\n")
    good = (complete / "results.jsonl").read_text().split("\n")
    (tmp_path / "results.jsonl").write_text(good[0] + "\n{broken\n" + good[1] + "\n")
    (tmp_path / "env.json").write_text("{")
    page = parse(build_report([tmp_path]))
    assert "metrics.jsonl: 2 lines cannot be read and are left out (line 2, 3)" in page.words
    assert "results.jsonl:2: broken line" in page.words
    assert "env.json: not JSON" in page.words
    assert "no limit" in page.words and "order at 2" in page.words


@pytest.mark.parametrize(
    "lines",
    [
        [{"kind": "train", "step": 10}],
        [{"kind": "train", "step": 10, "loss": float("nan"), "ce": None, "aux": None, "time": "yesterday"}],
        [{"kind": "load", "step": 10, "utilisation": [[1.0, None]]}],
        [{"kind": "load", "step": 10, "utilisation": []}],
        [{"kind": "load", "step": 10, "utilisation": [[1.0, 1.0], [2.0]], "layers": [1], "cv": [0.1]}],
        [{"kind": "final", "bits_per_byte": {"a": None}, "ngram": None}],
        [{"kind": "tasks", "tasks": [{"task": "t"}, "no task"]}],
        [{"kind": "tasks", "step": 1, "tasks": 7}],
        [{"kind": "something", "step": 1}],
    ],
)
def test_missing_or_odd_fields_never_cost_the_report(tmp_path, lines):
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert "What this does not show" in parse(build_report([tmp_path])).words


def test_what_is_unforeseen_costs_one_section_and_says_so(tmp_path):
    (tmp_path / "env.json").write_text('{"versions": ["jax"]}')
    write_lines(tmp_path / "metrics.jsonl", [train_line(10), train_line(20)])
    page = parse(build_report([tmp_path]))
    assert "Could not be drawn from what is in" in page.words and "AttributeError" in page.words
    assert any("Training loss" in label for label in page.labels)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--workdir=.*missing: no such folder"):
        build_report([tmp_path / "missing"])
    with pytest.raises(ValueError, match="at least one run"):
        build_report([])


# --- reading ----------------------------------------


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    before = [train_line(step, ce=9.0) for step in (10, 20, 30, 40)]
    after = [train_line(step, ce=1.0) for step in (30, 40, 50)]
    write_lines(tmp_path / "metrics.jsonl", before + after)
    assert series(read_run(tmp_path).lines("train"), "ce") == (
        [10, 20, 30, 40, 50],
        [9.0, 9.0, 1.0, 1.0, 1.0],
    )


def test_steps_that_a_resumed_run_has_not_reached_again_are_gone(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [train_line(step) for step in (10, 20, 30, 40, 20)])
    assert read_run(tmp_path).step == 20


def test_running_time_leaves_out_pauses():
    times = [0, 1, 2, 3, 5000, 5001, 5002]
    assert running_time([{"time": 1.7e9 + t} for t in times]) == pytest.approx(5)
    assert running_time([{"time": t} for t in (5, 6, 7, 2, 3)]) == pytest.approx(3)  # each process from its own 0
    assert running_time([{"time": f"2026-01-01T00:00:0{t}+00:00"} for t in (1, 4)]) == pytest.approx(3)
    assert running_time([{"time": 1.0}]) is None


def test_numbers():
    assert fixed(-1.23456, 3) == "\u22121.235" and fixed(None) == "–" and fixed(float("nan")) == "–"
    assert significant(1234567) == "1,234,567" and significant(0.00123456) == "0.001235"
    assert significant(1.5e-7) == "1.500e\u221207" and significant(12.3456) == "12.35" and significant(0.0) == "0"
    assert percent(0.0123) == "1.23 %"
    assert duration(3723) == "1 h 2 min 3 s" and duration(59.6) == "1 min 0 s" and duration(0.2) == "0 s"


# --- several runs, command line, Markdown ----------------------------------------


def test_two_runs_after_each_other_with_a_common_figure(complete, tmp_path):
    other = make_workdir(tmp_path / "other", "second run")
    page = parse(build_report([complete, other], tmp_path / "both.html"))
    assert "2 runs" in page.words
    assert {"#run-1", "#run-2"} <= set(page.links)
    common = [a for a in page.labels if "tiny run" in a and "second run" in a]
    titles = ("Training cross-entropy", "Validation, mean of domains", "Busiest expert", "Speed")
    assert [a.partition(" over steps")[0] for a in common] == list(titles)
    assert page.words.count("Held-out text") == 2


def test_two_runs_of_one_name_stay_apart(complete):
    page = parse(build_report([complete, complete]))
    assert "tiny run (run-1)" in page.words and "tiny run (run-2)" in page.words


def test_runs_beside_each_other_show_the_fields_that_differ(complete, tmp_path):
    def fields(*folders):
        (section,) = [s for s in compare.overview([read_run(f, f"run-{i}") for i, f in enumerate(folders)])
                      if s.anchor == "fields"]  # fmt: skip
        return section.blocks

    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((complete / "config.json").read_text())
    config["name"], config["model"]["num_layers"], config["model"]["moe"]["losses"] = "second", 6, {"balance": 0.02}
    (other / "config.json").write_text(json.dumps(config))
    (table,) = fields(complete, other)
    assert table.columns == ["field", "tiny run", "second"] and table.caption == "3 of 11 fields differ."
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["name", "tiny run", "second"],
        ["model.num_layers", "4", "6"],
        ["model.moe.losses.balance", "–", "0.02"],
    ]
    (same,) = fields(complete, complete)
    assert same.items == ["The runs have the same config."]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "env.json").write_text("{}")
    assert fields(complete, tmp_path / "empty", other)[1].items == ["No config.json: empty."]


def test_a_run_keeps_its_colour_where_another_has_no_point(complete, tmp_path):
    make_workdir(tmp_path / "late", "late run")
    early = tmp_path / "early"
    early.mkdir()
    write_lines(early / "metrics.jsonl", [train_line(10)])
    text = Path(build_report([early, tmp_path / "late"], tmp_path / "both.html")).read_text()
    (figure,) = re.findall(r'<svg[^>]*aria-label="Validation, mean of domains over.*?</svg>', text, re.DOTALL)
    assert "var(--series-1)" in figure and "var(--series-0)" not in figure


def test_a_heat_map_has_a_scale_in_words(page, complete):
    assert "load / ideal; 1 is an even share under 0.01 0.01 to 0.25 0.25 to 0.5 0.5 to 0.8" in page.words
    assert "2 to 4 4 and more" in page.words
    text = (complete / "report.html").read_text()
    assert [f"--heat-{i}" in text for i in range(9)] == [True] * 8 + [False]


def test_numbers_in_figures_keep_their_digits(tmp_path):
    rows = [
        ResultRow(kind="value", paper="p", table="t", row=f"{x}", metric="loss", value=1 + x, extra={"x": x})
        for x in (0.001, 0.003, 0.01)
    ]
    append_rows(tmp_path / "results.jsonl", rows)
    text = Path(build_report([tmp_path])).read_text()
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert {"0.001", "0.003", "0.01", "x, logarithmic"} <= set(ticks)


def sweep_folder(path):
    """A sweep's folder as ``experiments.sweep`` leaves it: docs/sweeps.md."""
    path.mkdir()
    runs = {
        "k=1,seed=0-aa": {"status": "finished", "label": "k=1", "seed": 0, "seconds": 61.2},
        "k=2,seed=0-bb": {
            "status": "failed",
            "label": "k=2",
            "seed": 0,
            "why": "exit code 2",
            "error": "x\nerror: <no>",
        },
    }
    points = [*runs, "k=3,seed=0-cc"]
    command = "python -m experiments.sweep --config=a.py --sweep=b/ks.py --workdir=s"
    facts = {"sweep": "b/ks.py", "config": "a.py", "command": command, "points": points, "runs": runs}
    (path / "sweep.json").write_text(json.dumps(facts))
    rows = [
        ResultRow(
            kind="value", paper="sweep", table="ks", row=f"k={k}", metric="bits_per_byte/mean", unit="bits per byte",
            value=2.0 + k, values_by_seed=dict.fromkeys(range(3), 2.0 + k), interval=(1.9 + k, 2.1 + k),
            interval_kind="95 %, t over seeds", config="small", command=f"{command} '--only=k={k}, a=b'",
            extra={"arm": "k", "x": k, "x_name": "k"},
        )
        for k in (1, 2)
    ]  # fmt: skip
    append_rows(path / "results.jsonl", rows)
    return path


def test_a_sweeps_folder_has_a_report(tmp_path):
    path = build_report([sweep_folder(tmp_path / "s")])
    page = parse(path)
    assert page.words.startswith(
        "sweep ks · moejax report moejax report sweep ks 1 of 3 points finished, 1 failed, 1 w"
    )
    assert "k=2,seed=0-bb: exit code 2. error: <no>" in page.words
    assert "k=1 0 finished 1 min 1 s k=1,seed=0-aa" in page.words and "waiting" in page.words
    assert "row ours, bits per byte interval seeds k=1 3.0000 [2.9000, 3.1000] 3" in page.words
    assert page.words.count("--sweep=b/ks.py --workdir=s") == 2 and "--only" not in page.words
    assert any("mean over k" in label and "4 at 2" in label for label in page.labels)
    for absent in ("The final evaluation has not run yet", "No expert load", "judged by the contrasts"):
        assert absent not in page.words
    (tmp_path / "s" / "sweep.json").write_text("[")
    assert "Could not be drawn" in parse(build_report([tmp_path / "s"])).words


def test_results_files_have_a_report(complete, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text((complete / "results.jsonl").read_text() + "{broken\n")
    page = parse(build_report([], tmp_path / "r.html", [file]))
    assert "results only" in page.words and "score < random by more than 0.005" in page.words
    assert "rows.jsonl:25: broken line" in page.words and "has not run yet" not in page.words
    with pytest.raises(ValueError, match="--output"):
        build_report([], None, [file])
    with pytest.raises(FileNotFoundError, match="no such file"):
        build_report([], tmp_path / "r.html", [tmp_path / "none.jsonl"])


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_a_folder_that_is_no_workdir_is_refused(tmp_path, form):
    other, runs = tmp_path / "weights", tmp_path / "runs"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "olmoe", "hidden_size": 64}')  # of a Hugging Face folder
    make_workdir(runs / "one")
    for folder, below in ((other, ""), (runs, f"Below it are {runs / 'one'}")):
        done = command(f"--workdir={folder}", f"--format={form}")
        assert done.returncode == 1 and done.stdout == "" and not (folder / "report.html").exists()
        assert f"error: --workdir={folder}: is no workdir" in done.stderr and below in done.stderr
        assert "has no config.json, env.json, metrics.jsonl, results.jsonl or sweep.json of one" in done.stderr


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.report", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_command_line(complete, tmp_path):
    done = command(f"--workdir={complete}", f"--output={tmp_path / 'r.html'}")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "r.html"), done.stderr
    parse(tmp_path / "r.html")
    done = command(f"--results={complete / 'results.jsonl'}", "--format=markdown")
    assert done.returncode == 0 and done.stdout == results_markdown(table_rows()), done.stderr


def test_a_broken_line_is_named_and_costs_itself_only(complete, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{broken\n" + (complete / "results.jsonl").read_text())
    done = command(f"--results={file}", "--format=markdown")
    assert done.returncode == 1 and done.stdout == results_markdown(table_rows())
    assert f"error: {file}:1: broken line" in done.stderr


def test_markdown_tables():
    text = results_markdown(table_rows())
    lines = text.splitlines()
    assert "### Capacity-Aware Inference, arXiv 2503.05066: table 1 (:tiny)" in lines
    row = next(row for row in table_rows() if row.row == "score at 1.5")
    low, high = row.interval
    assert f"| score at 1.5 | {row.value:.4f} | [{low:.4f}, {high:.4f}] | 1 | 63.1 | 10.50 % | – |" in lines
    assert any(line.startswith("| score \\> random at 1.0 | **direction (one model)** |") for line in lines)
    assert "0 reproduced, 0 direction, 0 not reproduced" in text and "3 direction (one model)" in text
    assert "commit 0123456789ab" in text
    # Every table has as many cells in each line as in its head.
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_of_odd_names_and_of_nothing():
    row = ResultRow(kind="value", paper="p", table="t", row="a|b*\n<c>", metric="m", value=1.0)
    assert "| a\\|b\\* \\<c\\> | 1 |" in results_markdown([row])
    assert results_markdown([]) == ""
