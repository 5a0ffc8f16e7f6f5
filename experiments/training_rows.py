"""Results rows of a training run itself, made from what the run wrote into its workdir."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.metrics import read_metrics
from moejax.results import ResultRow

PAPER, TABLE = "training", "final"
CALL = ("command", "commit", "dirty", "device", "device_count", "versions")
"""Facts of a call."""


def training_rows(workdir: Path) -> list[ResultRow]:
    """Held-out bits per byte by domain (with the byte n-grams' beside it), tasks, tokens/s, MFU and epochs of one run.

    Speed is the median over logged intervals of the last call that trained, since an earlier one may have had other
    devices; compilation, validation and saving are outside of them. Returns [] while the run has no final evaluation.
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
        **{k: facts[k] for k in CALL},
    }

    def row(
        part: str,
        metric: str,
        unit: str,
        value: float,
        touched: float | None = None,
        of_call: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> ResultRow:
        """``part``: the group of the config that says of how many sequences its batches are; ``of_call``: facts of
        another call than the last."""
        return ResultRow(
            **{**shared, **(of_call or {})}, metric=metric, unit=unit, value=value, values_by_seed={seed: value},
            exercised_share=touched, batch_shape=(config[part]["batch_size"], config["data"]["seq_len"]), extra=extra,
        )  # fmt: skip

    rows = []
    loads = [r for r in metrics if r["kind"] == "final_load" and r["step"] == final["step"]]
    load = loads[-1] if loads else {}
    touched, lost = touched_shares(config, load), overflow(load.get("overflow_share", []))
    for domain, value in final["bits_per_byte"].items():
        grams = {f"byte_{n}_gram": by_domain[domain] for n, by_domain in final["ngram"].items() if domain in by_domain}
        more = {"split": final["split"], "ngram_max_train_bytes": final.get("ngram_max_train_bytes")}
        of_row = {"step": final["step"], **grams, **more, **lost}
        rows.append(row("eval", f"bits_per_byte/{domain}", "bits per byte", value, touched.get(domain), None, **of_row))
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
        of_call, timed = last_that_trained(facts.get("sessions", []), trained)
        more = {"steps": [timed[0]["step"], timed[-1]["step"]]} | overflow([r.get("overflow_share") for r in timed])
        speeds, shares = ([r[name] for r in timed if r[name]] for name in ("tokens_per_s", "mfu"))
        if speeds:
            speed = float(np.median(speeds))
            rows.append(row("train", "tokens_per_s", "tokens/s", speed, None, of_call, **tokens, **more))
        seconds = trained[-1]["time"]
        rows.append(row("train", "training_seconds", "s, with compilation and validation", seconds, **tokens))
        if shares:
            more["back_end"] = facts["grouped_matmul"]["implementation"]
            rows.append(row("train", "mfu", "share of peak", float(np.median(shares)), None, of_call, **more))
    return rows


def overflow(shares: Sequence[float | None]) -> dict[str, float]:
    """The mean share of pairs for which a static buffer had no place, to stand in a row; nothing where it had."""
    mean = sum(share or 0.0 for share in shares) / max(len(shares), 1)
    return {"overflow_share": mean} if mean else {}


def last_that_trained(
    sessions: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts of the last call that logged a training step, and its rows; ({}, all) where ``sessions`` does not say."""
    end = float("inf")
    for session in reversed(sessions):
        if "from_step" not in session:
            break
        if rows := [row for row in trained if session["from_step"] < row["step"] <= end]:
            return {name: session[name] for name in CALL if name in session}, rows
        end = min(end, session["from_step"])
    return {}, list(trained)


def touched_shares(config: Mapping[str, Any], load: Mapping[str, Any]) -> dict[str, float | None]:
    """Share of pairs, by domain, that the config's limits touched in the final evaluation with this row of loads; {}
    where it has none."""
    moe = config["model"]["moe"]
    if moe["capacity_factor"] <= 0 and not moe.get("capacity_limits"):
        return {}
    # a workdir's older rows do not have it
    return {d: part.get("touched_share") for d, part in load.get("by_domain", {}).items()}
