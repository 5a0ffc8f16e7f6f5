"""Checkpoints: Orbax behind one small class, checksums of every array, and which experts a save holds (seam 9).

Arrays are stored flat, by their path in the training state (``params/groups/0/blocks/0/moe/store/up``), as global
arrays with the expert axis whole: a checkpoint does not depend on the mesh that wrote it. Beside them lie one JSON
text with the step, the config, the position in the data and what else the caller hands in, and a record of checksums.

Saves are asynchronous and atomic: a folder counts once it has its final name, a number. What users need to know:
``docs/checkpoints.md``.
"""

from moejax.checkpoint.reading import (
    check_fit,
    fingerprint,
    load,
    load_model,
    locate,
    origin,
    read_all,
    read_meta,
    score_of,
    steps_in,
    still,
)
from moejax.checkpoint.store import CheckpointPolicy, Checkpoints, all_experts
from moejax.checkpoint.tree import flatten

__all__ = [
    "CheckpointPolicy",
    "Checkpoints",
    "all_experts",
    "check_fit",
    "fingerprint",
    "flatten",
    "load",
    "load_model",
    "locate",
    "origin",
    "read_all",
    "read_meta",
    "score_of",
    "steps_in",
    "still",
]
