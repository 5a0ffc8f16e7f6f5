"""Results rows of a training run itself, made from what the run wrote into its workdir."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.metrics import read_metrics
from moejax.results import ResultRow

PAPER, TABLE = "training", "final"


def training_rows(workdir: Path) -> list[ResultRow]:
    """Held-out bits per byte by domain (with the byte n-grams' beside it), tasks, tokens/s, MFU and epochs of one run.

    Speed is the median over logged intervals; compilation, validation and saving are outside of them. Returns []
    while the run has no final evaluation.
    """
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    facts = json.loads((workdir / "env.json").read_text(encoding="utf-8"))
    metrics = read_metrics(workdir / "metrics.jsonl")
    finals = [row for row in metrics if row["kind"] == "final"]
    if not finals:
        return []
    final, seed = finals[-1], config["train"]["seed"]
    shared: dict[str, Any] = {
        "kind": "value",
        "paper": PAPER,
        "table": TABLE,
        "row": config["name"],
        "scale": config["scale"],
        "config": config["name"],
        "config_hash": final.get("config_hash", facts["config_hash"]),  # a later call may have another table or mesh
        "data_hash": facts["data"]["hash"],
        **{k: facts[k] for k in ("command", "commit", "dirty", "device", "device_count", "versions")},
    }

    def row(part: str, metric: str, unit: str, value: float, touched: float | None = None, **extra: Any) -> ResultRow:
        """``part``: the group of the config that says of how many sequences its batches are."""
        return ResultRow(
            **shared, metric=metric, unit=unit, value=value, values_by_seed={seed: value}, exercised_share=touched,
            batch_shape=(config[part]["batch_size"], config["data"]["seq_len"]), extra=extra,
        )  # fmt: skip

    rows = []
    touched = touched_shares(config, final, metrics)
    for domain, value in final["bits_per_byte"].items():
        grams = {f"byte_{n}_gram": by_domain[domain] for n, by_domain in final["ngram"].items() if domain in by_domain}
        more = {"split": final["split"], "ngram_max_train_bytes": final.get("ngram_max_train_bytes")}
        of_row = {"touched": touched.get(domain), "step": final["step"], **grams, **more}
        rows.append(row("eval", f"bits_per_byte/{domain}", "bits per byte", value, **of_row))
    scored = [r for r in metrics if r["kind"] == "tasks" and r["step"] == final["step"]]
    # Those of an earlier evaluation of this step are not of this one, if it asked for none.
    for tasks in scored[-1:] if final.get("asked", {}).get("tasks", True) else []:
        for t in tasks["tasks"]:
            if "/" not in t["task"]:
                more = {"stderr": t["stderr"], "n": t["n"], "chance": t["chance"]}
                rows.append(
                    row(
                        "eval",
                        f"{t['metric']}/{t['task']}",
                        "perplexity per target" if t["metric"] == "ppl" else "share",
                        t["value"],
                        **more,
                    )
                )
    trained = list({r["step"]: r for r in metrics if r["kind"] == "train"}.values())  # a resumed run repeats steps
    if any(r["tokens_per_s"] for r in trained):
        tokens = {"tokens": trained[-1]["tokens"], "seconds": trained[-1]["time"], "epochs": facts["data"]["epochs"]}
        rows.append(
            row(
                "train",
                "tokens_per_s",
                "tokens/s",
                float(np.median([r["tokens_per_s"] for r in trained if r["tokens_per_s"]])),
                **tokens,
            )
        )
        seconds = trained[-1]["time"]
        rows.append(row("train", "training_seconds", "s, with compilation and validation", seconds, **tokens))
        share = float(np.median([r["mfu"] for r in trained if r["mfu"]]))
        rows.append(row("train", "mfu", "share of peak", share, back_end=facts["grouped_matmul"]["implementation"]))
    return rows


def touched_shares(
    config: dict[str, Any], final: dict[str, Any], metrics: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """Share of pairs, by domain, that the config's limits touched in a final evaluation; {} where it has none."""
    moe = config["model"]["moe"]
    if moe["capacity_factor"] <= 0 and not moe.get("capacity_limits"):
        return {}
    loads = [row for row in metrics if row["kind"] == "final_load" and row["step"] == final["step"]]
    # a workdir's older rows do not have it
    return {d: part.get("touched_share") for d, part in loads[-1]["by_domain"].items()} if loads else {}
