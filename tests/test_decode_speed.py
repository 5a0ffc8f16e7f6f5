"""The decoding benchmark: figures only where the two programs computed the same."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import decode_speed, session
from moejax.config import AttentionConfig, ExperimentConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.results import read_rows

pytestmark = pytest.mark.usefixtures("compiled_once")

MODEL = ModelConfig(
    vocab_size=40, num_layers=1, dim=16, tie_embeddings=False, scale_embeddings=False,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8, qk_norm=True, qk_norm_over="projection"),
    moe=MoEConfig(num_experts=4, expert_dim=8, router=RouterConfig(k=2, renormalise=False), losses=()),
)  # fmt: skip


def values(output: Path, **changes: Any) -> argparse.Namespace:
    given = {"batches": ["1", "3"], "context": 6, "new_tokens": 2, "prefill_batch": 2, "repeats": 2, "rival": "none"}
    return argparse.Namespace(**(given | changes), output=str(output))


def measure(output: Path, said: list[str], **changes: Any) -> int:
    config = ExperimentConfig(model=dataclasses.replace(MODEL, compute_dtype="float32"))
    return decode_speed.measure(config, values(output, **changes), said.append)  # ty: ignore[invalid-argument-type]


def test_rows_of_both_programs_and_none_where_logits_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[Any] = []
    write = decode_speed.importers.write
    monkeypatch.setattr(
        decode_speed.importers, "write", lambda model, *a, **k: kept.append(model) or write(model, *a, **k)
    )
    wrong = 0.0

    def rival(folder: Path, asked: dict[str, Any]) -> tuple:
        assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
        logits, _ = decode_speed.filled(kept[-1], decode_speed.prompts(MODEL, 1, asked["context"]), 1, 1)
        exact = np.asarray(logits)
        told = {"times": {name: [2.0, 2.0] for name in ("prefill/1", "decode/1")}, "version": "5.0"}
        return told | {"failed": {"decode/3": "no memory"}}, {"exact": exact + wrong, "asked": exact + wrong + 1e-3}

    monkeypatch.setattr(decode_speed, "time_rival", rival)
    said: list[str] = []
    assert measure(tmp_path / "rows.jsonl", said, rival="transformers") == 0
    rows = {(row.row, row.metric): row for row in read_rows(tmp_path / "rows.jsonl")}
    assert len(rows) == 6  # three passes of two programs: a prompt of three rows is filled in slices
    assert rows["transformers", "tokens_per_s/prefill/1"].value == pytest.approx(6 / 2)
    assert rows["transformers", "tokens_per_s/decode/1"].value == pytest.approx(2 / 2)
    extra = rows["transformers", "tokens_per_s/decode/1"].extra
    assert extra["mean_error"] < 1e-6 < extra["transformers_mean_error"]
    without = rows["transformers", "tokens_per_s/decode/3"]
    assert without.value is None and without.extra["not_run"] == "no memory"
    ours = rows["moejax", "tokens_per_s/decode/3"]
    assert ours.value and ours.extra["repeats"] == 2 and ours.extra["implementation"]
    wrong = 2e-3  # twice the other's own error
    assert measure(tmp_path / "none.jsonl", said, rival="transformers", batches=["1"]) == 1
    assert not (tmp_path / "none.jsonl").exists() and any(line.startswith("WRONG") for line in said)


def test_a_rival_that_is_not_installed_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_speed.importlib.util, "find_spec", lambda name: None)
    assert measure(tmp_path / "rows.jsonl", [], rival="transformers", batches=["1"]) == 0
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row.row == "transformers"]
    assert len(rows) == 2 and all(row.value is None and "not installed" in row.extra["not_run"] for row in rows)


def test_a_cache_filled_in_slices_is_that_of_the_whole_batch():
    model = decode_speed.random_model(dataclasses.replace(MODEL, compute_dtype="float32"))
    tokens = decode_speed.prompts(MODEL, 3, 6)
    (whole, cache), (parts, joined) = (decode_speed.filled(model, tokens, 2, size) for size in (3, 2))
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(joined.length, cache.length)


def test_a_random_model_has_the_types_of_an_imported_one():
    model = decode_speed.random_model(MODEL)
    (block,) = model.groups[0].blocks
    assert block.moe.store.up[...].dtype == model.embed[...].dtype == "bfloat16"
    kernel = block.moe.router.arrays["kernel"][...]
    assert kernel.dtype == block.ffn_norm.scale[...].dtype == "float32"
    np.testing.assert_array_equal(kernel, kernel.astype("bfloat16"))  # the rival keeps no more of it


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--batches=1,x", "whole numbers of 1 or more"), ("--output=/nowhere/rows.jsonl", "there is no folder /nowhere")],
)
def test_flags_that_cannot_work(flag: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = ["--config=configs/models/olmoe_1b_7b.py:tiny", f"--output={tmp_path / 'rows.jsonl'}", flag]
    assert session.call(decode_speed.define_flags, decode_speed.command, given) == 2
    assert message in capsys.readouterr().err


def test_the_page_shows_the_committed_rows():
    root = Path(__file__).parent.parent
    page = (root / "docs/bring_your_checkpoint.md").read_text(encoding="utf-8")
    rows = {(row.config, row.metric, row.row): row for row in read_rows(root / "experiments/results/decode_h100.jsonl")}
    passes = ("prefill/1", "prefill/16", "decode/1", "decode/16", "decode/128")
    for config in ("olmoe_1b_7b:full", "qwen3_30b_a3b:full"):
        found = [
            [rows[config, f"tokens_per_s/{what}", name].value for name in ("moejax", "transformers")] for what in passes
        ]
        assert all(ours > theirs for ours, theirs in found)
        assert "| " + " | ".join(f"{ours:,.0f} ({theirs:,.0f})" for ours, theirs in found) + " |" in page
