"""Arms of tables that are measured and have no row yet: a table that was stopped goes on with the next arm.

A table's rows are written when all of its arms are there, since contrasts need them all. Until then each arm, on each
training seed, is kept in ``arms.jsonl`` of the workdir, with what it was measured on and by which commit: what was
measured by other code, or on other weights, text or devices, is measured again. A commit that ``MOEJAX_COMMIT`` tells
is taken at its word.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.evaluate import DomainScore
from moejax.results import write_atomically

SAME = (
    "paper", "config_hash", "checkpoint_hash", "data_hash", "batch_shape", "commit", "device", "device_count",
    "versions",
)  # fmt: skip
"""What must be the same in ``experiments.papers.capacity_aware.row_facts`` for an arm to be taken again."""


class Arms:
    """What ``arms.jsonl`` of a workdir holds of the tables that are made now.

    Code that is not committed, or of no known commit, is not known to be the same: nothing is kept of it.

    Args:
      workdir: of the run.
      shared: facts of all rows, with the keys of :data:`SAME` and "dirty".
      say: told once if something is taken again.
    """

    def __init__(self, workdir: Path, shared: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._path, self._say = workdir / "arms.jsonl", say
        self._of = json.loads(json.dumps({name: shared[name] for name in SAME}))
        self._keeps = bool(shared["commit"]) and not shared["dirty"]
        self._found = self._read() if self._keeps else {}
        self._told = False

    def measured[Arm, Setting](
        self, make: type[Arm], seed: int, together: Sequence[Setting], measure: Callable[[Setting], Arm]
    ) -> list[Arm]:
        """The arms of settings on a training seed: as they were kept, or as ``measure`` gives them, to be kept then.

        All of them are kept at once, and taken again only if all are there: what one of them is made of may not be
        made again to the same bits. ``make`` is their dataclass, of values that JSON has, with
        :class:`~moejax.evaluate.DomainScore` by domain in a field ``by_domain``.
        """
        keys = [f"{seed}: {setting!r}" for setting in together]
        if all(key in self._found for key in keys):
            if not self._told:
                self._say("  arms that an interrupted call of the same commit measured are taken from arms.jsonl")
            self._told = True
            return [make(**_with_scores(self._found[key])) for key in keys]
        made = [measure(setting) for setting in together]
        if self._keeps:
            kept: list[Any] = [dataclasses.asdict(arm) for arm in made]  # ty: ignore[invalid-argument-type]
            self._found |= dict(zip(keys, kept, strict=True))
            lines = [json.dumps({"of": self._of}), *(json.dumps({"arm": k, "is": v}) for k, v in self._found.items())]
            write_atomically(self._path, "\n".join(lines) + "\n")
        return made

    def done(self) -> None:
        """The tables that were asked for have their rows."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._path.exists():
            return {}
        try:
            first, *rest = (json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines())
            return {line["arm"]: line["is"] for line in rest} if first["of"] == self._of else {}
        except (ValueError, KeyError, TypeError) as error:
            self._say(f"  {self._path} is damaged ({error!r}): its arms are measured again")
            return {}


def _with_scores(kept: dict[str, Any]) -> dict[str, Any]:
    by_domain = {
        domain: DomainScore(**(score | {"per_batch": tuple((nll, size) for nll, size in score["per_batch"])}))
        for domain, score in kept["by_domain"].items()
    }
    return kept | {"by_domain": by_domain}
