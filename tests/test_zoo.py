"""The model zoo: every row beside what was published, the presets, and the page and command that show them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs import models
from experiments import session, zoo
from experiments.zoo_rows import ROWS, Reason, Row
from moejax import count
from moejax.config import ModelConfig
from tests.small import MODELS, execute, load

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {row.id: zoo.figures(row) for row in ROWS}
PUBLISHED = [(row, which) for row in ROWS for which in ("total", "active") if getattr(row, which)]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)


def named(value: Any) -> str:
    return value.id if isinstance(value, Row) else value


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "which"), PUBLISHED, ids=named)
def test_a_count_is_the_published_one_or_the_row_says_why_not(row: Row, which: str):
    made = FIGURES[row.id]
    counted, figure, reason = getattr(made, which), getattr(row, which), row.off.get(which)
    if zoo.within(counted, figure):
        assert reason is None, f"{row.id}: {counted:,} is within {figure}, so its reason explains nothing"
    else:
        assert reason is not None, f"{row.id}: {which} counts to {counted:,}, published {figure}: say why"
        assert zoo.holds(reason, made, which), f"{row.id}: {reason.text!r} is not so for {counted:,} and {figure}"


@every_row
def test_a_reason_is_for_a_published_figure(row: Row):
    assert set(row.off) <= {which for other, which in PUBLISHED if other is row}
    assert all(reason.text for reason in row.off.values())


@every_row
def test_parts_add_up(row: Row):
    made = FIGURES[row.id]
    assert sum(total for total, _ in made.parts.values()) == pytest.approx(made.total, abs=len(made.parts))
    assert sum(active for _, active in made.parts.values()) == pytest.approx(made.active, abs=len(made.parts))
    assert all(0 <= active <= total for total, active in made.parts.values())
    assert 0 < made.active < made.total and 0 < made.expert_share < 1


@every_row
def test_a_row_has_a_preset_or_says_what_is_missing(row: Row):
    runs = (ROOT / "configs" / "models" / f"{row.id}.py").exists()
    assert runs == (row.parts is None) == (not row.why)
    assert zoo.figures(row).router


def test_every_preset_is_a_row():
    assert {f"configs.models.{row.id}" for row in ROWS if row.parts is None} == set(MODELS)


@pytest.mark.parametrize(
    ("counted", "figure", "expected"),
    [
        (46.7e9, "46.7B", True),
        (47.1e9, "46.7B", True),  # within 1 %
        (47.3e9, "46.7B", False),
        (2.44e9, "2.4B", True),  # within the rounding, at 1.7 %
        (2.46e9, "2.4B", False),
        (145e6, "145M", True),
        (1.16e12, "1.2T", True),
    ],
)
def test_within(counted: float, figure: str, expected: bool):
    assert zoo.within(counted, figure) is expected


@pytest.mark.parametrize(
    ("reason", "figure", "expected"),
    [
        (Reason("cut", truncated=True), "1.5B", True),
        (Reason("cut", truncated=True), "1.6B", False),
        (Reason("less", without=("input embedding",)), "1.2B", True),
        (Reason("less", without=("input embedding",)), "1.4B", False),
        (Reason("less and cut", without=("input embedding",), truncated=True), "1.2B", True),
        (Reason("one is more", alone="routed experts"), "0.9B", True),
        (Reason("one is more", alone="routed experts"), "1.1B", False),
        (Reason("between", between="input embedding"), "1.4B", True),
        (Reason("between", between="input embedding"), "1.2B", False),
        (Reason("has more", missing=410_000_000), "2.0B", True),
        (Reason("has more", missing=410_000_000), "2.1B", False),
        (Reason("nobody knows"), "9B", True),
    ],
)
def test_reasons_are_checked(reason: Reason, figure: str, expected: bool):
    row = Row("x", "X", figure, "", "")
    parts = {"input embedding": (340_000_000, 340_000_000), "attention": (250_000_000, 250_000_000)}
    parts["routed experts"] = (1_000_000_000, 1)
    made = zoo.Figures(row, parts, 1_590_000_000, 590_000_001, None, None, "")
    assert zoo.holds(reason, made, "total") is expected


def test_the_counts_of_rows_without_a_preset_are_those_of_a_model_where_one_can_say_them():
    """Skywork-MoE: normalising the router's logits has no parameters."""
    sizes = {
        "vocab_size": 65_536, "num_layers": 52, "dim": 4608, "tie_embeddings": False, "attention.num_heads": 36,
        "attention.num_kv_heads": 36, "attention.head_dim": 128, "moe.num_experts": 16, "moe.expert_dim": 12_288,
        "moe.router.k": 2,
    }  # fmt: skip
    model, made = changed(ModelConfig(), sizes), FIGURES["skywork_moe"]
    p = count.parameters(model)
    assert (made.total, made.active) == (p.total, p.active)
    assert made.flops == count.forward_flops_per_token(model, zoo.CONTEXT)
    assert made.cache_bytes == count.cache_bytes_per_token(model)


def changed(config: Any, sizes: dict[str, Any]) -> Any:
    """A dataclass with fields set by dotted name."""
    for name, value in sizes.items():
        head, _, rest = name.partition(".")
        value = changed(getattr(config, head), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: value})
    return config


# --- presets ----------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size", "num_layers", "dim", "ffn_dim", "attention.num_heads", "attention.num_kv_heads", "attention.head_dim",
    "attention.query_rank", "attention.latent_rank", "attention.rope_head_dim", "attention.value_head_dim",
    "attention.window", "attention.window_layers", "attention.rope.original_length", "moe.first_dense",
    "attention.no_rope_layers", "attention.temperature_length", "attention.rope.short_factor",
    "attention.rope.long_factor", "moe.num_experts", "moe.expert_dim", "moe.zero_experts", "moe.router.k",
    "moe.router.groups", "moe.router.groups_kept", "compute_dtype", "remat",
}  # fmt: skip
"""Fields in which ``:tiny`` may differ from ``:full``; none of them may become or cease to be 0."""


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    if not dataclasses.is_dataclass(config):
        return {prefix[:-1]: config}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        found |= leaves(getattr(config, field.name), f"{prefix}{field.name}.")
    return found


@pytest.mark.parametrize("module", MODELS)
def test_tiny_is_the_same_architecture(module: str):
    full, tiny = (leaves(load(module, variant).model) for variant in ("full", "tiny"))
    different = {name for name in full if full[name] != tiny[name]}
    assert different <= SIZES
    assert {n for n in different if bool(full[n]) != bool(tiny[n])} <= {"vocab_size"}  # the tokenizer's
    assert count.parameters(dataclasses.replace(load(module, "tiny").model, vocab_size=320)).total < 400_000


def test_a_preset_takes_settings_from_the_command_line_and_refuses_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["run", *arguments])
        code = execute(*arguments)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    preset = "--config=configs/models/deepseek_v3.py"
    code, out, _ = run(preset, "--dry_run", "--mesh=data=2,expert=8", "--config.model.attention.query_rank=0",
                       "--config.model.moe.zero_experts=0")  # fmt: skip
    assert code == 0 and "= 16 devices (gpu)" in out
    assert "671,026,404,352 total" not in out and "moe.zero_experts" not in out
    for arguments, said in (
        ((f"{preset}:tny",), r"variant 'tny' of configs/models/deepseek_v3.py: choose full or tiny"),
        ((f"{preset}:tiny", "--config.model.attention.latent_rnk=4"), r"no field 'latent_rnk'.*latent_rank"),
        (
            ("--config=configs/models/deepsek_v3.py",),
            r"no such file; did you mean configs/models/deepseek_v3.py\?",
        ),
        ((preset, "--config.model.moe.router.groups=7"), r"groups=7"),
    ):
        code, out, err = run(*arguments, "--dry_run")
        assert (code, out) == (2, "") and err.count("\n") == 1, err
        assert re.search(said, err), err


def test_shrunk_sets_nothing_that_the_model_does_not():
    model = {"moe.num_experts": 4, "moe.router.k": 1, "attention.num_heads": 2, "attention.num_kv_heads": 1, "dim": 8}
    assert models.shrunk(model).keys() == model.keys()


# --- page and command -------------------------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    return session.call(zoo.define_flags, zoo.command, arguments)


def test_the_page_is_what_the_command_writes(tmp_path: Path):
    page = tmp_path / "zoo.md"
    assert call("--format=markdown", f"--output={page}") == 0
    assert page.read_text() == (ROOT / "docs" / "zoo.md").read_text(), "run the command that the page names"


def test_all_formats_show_every_row(capsys: pytest.CaptureFixture[str]):
    assert call() == 0
    text = capsys.readouterr().out
    assert all(row.name in text for row in ROWS)
    assert call("--format=json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == [row.id for row in ROWS]
    (jamba,) = [row for row in rows if row["id"] == "jamba"]
    assert jamba["preset"] is False and "Mamba layers" in jamba["remarks"][0]


def test_one_row_with_its_parts(capsys: pytest.CaptureFixture[str]):
    assert call("--model=deepseek_v3") == 0
    out = capsys.readouterr().out
    assert "653,908,770,816" in out and "best 4 of 8 groups by their best two" in out
    assert "--config=configs/models/deepseek_v3.py" in out


def test_wrong_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, said in (
        (("--model=deepseek_v4",), "did you mean 'deepseek_v3'?"),
        (("--model=xyz",), "choose one of mixtral_8x7b"),
        (("--format=html",), "format"),
        ((f"--output={tmp_path}/none/zoo.md",), "in a folder that is there"),
        ((f"--output={tmp_path}",), "must be a file"),
    ):
        assert call(*arguments) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
