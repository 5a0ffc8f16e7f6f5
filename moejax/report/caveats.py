"""What a reader must not conclude from a report: made from what the run did and did not do."""

from moejax.report.blocks import Notes, Section, is_number
from moejax.report.load import Run, dig
from moejax.verdicts import DIRECTION, ONE_MODEL

_TIMES = ("seconds", "ms", "tokens_per_s", "speedup")


def caveats(run: Run) -> Section:
    """Notes on seeds, scale, published values, splits, n-grams, epochs and the state of the code."""
    notes = [note for note in [*_of_rows(run), *_of_training(run), *_of_code(run)] if note]
    if not (run.rows or any(run.metrics.values())):
        return Section("limits", "What this does not show", absent="Nothing has been measured yet.")
    return Section("limits", "What this does not show", [Notes(notes)])


def _of_rows(run: Run) -> list[str]:
    rows, notes = run.rows, []
    if any(ONE_MODEL.strip() in (row.verdict or "") or "one model" in row.interval_kind for row in rows):
        notes.append(
            "One trained model: its intervals hold what other evaluation batches would change, "
            "not what another training seed would."
        )
    if any((row.verdict or "").startswith(DIRECTION) for row in rows):
        notes.append(
            "“direction” means that the claimed order holds here by more than the margin. It does not "
            "confirm the published size of the effect, which was measured on another model and other data."
        )
    if any(row.published is not None and row.published_metric for row in rows):
        notes.append("Published values stand beside ours for orientation: another metric on another model.")
    if rows and not any(row.metric.split("/")[0] in _TIMES for row in rows):
        notes.append("The tables measure quality; whether the method saves time is not measured here.")
    return notes


def _of_training(run: Run) -> list[str]:
    notes = []
    if run.status.startswith("at step"):
        notes.append(f"The run is {run.status}: figures will change, and what comes after is not measured.")
    if run.config.get("scale") in ("tiny", "h100"):
        notes.append(
            f"Scale :{run.config['scale']}: a small model, trained briefly. "
            "An effect may be larger, smaller or absent in a large one."
        )
    final = run.last("final")
    if final.get("split") == "valid":
        notes.append("Held-out figures are of the split that chose the checkpoint: slightly optimistic.")
    if final.get("ngram"):
        notes.append("The byte n-grams are a floor: beating them shows that more than counts was learned.")
    if run.lines("load"):
        notes.append("The heat map is one moment of the run, over all domains and token classes together.")
    trained, available = run.last("train").get("tokens"), _train_tokens(run)
    if is_number(trained) and available and trained / available > 1.05:
        notes.append(f"The training text was read {trained / available:.1f} times.")
    return notes


def _of_code(run: Run) -> list[str]:
    if run.env.get("dirty") or any(row.dirty for row in run.rows):
        return ["The code had uncommitted changes: the commit alone does not give back these figures."]
    if run.env and not run.env.get("commit"):
        return ["The commit of the code is not known."]
    return []


def _train_tokens(run: Run) -> float:
    stats = dig(run.env, "data", "stats")
    if not isinstance(stats, dict):
        return 0.0
    return sum(size for splits in stats.values() if is_number(size := dig(splits, "train", "tokens")))
