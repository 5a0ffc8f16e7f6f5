"""The checkpoints of one run: saving, keeping the newest few and the best, and what to say when a save fails."""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from moejax.checkpoint.checksums import ITEM, Checksums
from moejax.checkpoint.reading import best_in, load, quieten, score_of, steps_in
from moejax.checkpoint.tree import flatten
from moejax.config import ConfigError

CheckpointPolicy = Callable[[int, np.ndarray], np.ndarray]
"""Seam 9: ``(step, loads[L, E]) -> bool[L, E]``, which experts this save holds."""

UNFINISHED, UNWANTED = ".orbax-checkpoint-tmp", ".deleted"
"""Ends of names of folders that do not count: a save under way, and one that is being deleted."""
_BESIDE = 1 << 20
"""Bytes of a step folder beside its arrays, at most."""


def all_experts(step: int, loads: np.ndarray) -> np.ndarray:
    """The default policy: every save is a full one."""
    del step
    return np.ones_like(loads, dtype=bool)


class Checkpoints:
    """Checkpoints of one run under ``directory``, a folder for each step.

    ``writer=False`` leaves the folder as it is: a run that is saving there at this moment is not disturbed. A writer
    removes what an earlier one left half-written or half-deleted.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 2, policy: CheckpointPolicy = all_experts, writer: bool = True
    ) -> None:
        self.directory, self.keep, self.policy = Path(directory).resolve(), keep, policy
        self._main = writer and jax.process_index() == 0
        self._saving: tuple[int, int, Any] | None = None  # step, bytes, Orbax's response
        quieten()
        if writer:
            self.directory.mkdir(parents=True, exist_ok=True)
        if self._main:
            for child in self.directory.iterdir():
                if UNFINISHED in child.name or child.name.endswith(UNWANTED):
                    shutil.rmtree(child, ignore_errors=True)

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        *,
        score: float | None,
        loads: np.ndarray | None = None,
    ) -> None:
        """Starts an asynchronous save; waits for the one before it. ``score``: validation, lower is better.

        Raises:
          ConfigError: the disk has no room for it, or the save before it failed.
        """
        if loads is not None and not self.policy(step, loads).all():
            raise ValueError(
                "this class writes full checkpoints: a partial policy needs a store that merges versions at restore"
            )
        self._settle()
        self.require_space(state, step)
        arrays, text, score = flatten(state), json.dumps(meta), None if score is None else float(score)
        items = {"arrays": arrays, "meta": {"json": text}, ITEM: Checksums(arrays, text, score)}
        try:
            response = ocp.save_checkpointables_async(str(self.directory / str(step)), items)
        except OSError as error:  # Orbax makes the folder at once
            raise self._failed(step, _size(state), error) from error
        self._saving = (step, _size(state), response)

    def require_space(self, state: Any, step: int | None = None) -> None:
        """Raises ConfigError unless a checkpoint of ``state`` (arrays, or their shapes) has room on the disk."""
        if shutil.disk_usage(self.directory).free < _size(state):
            raise self._failed(step, _size(state), None)

    def check(self) -> None:
        """Raises ConfigError if the save under way has failed by now; does not wait for it."""
        if self._saving is not None:
            self._settle(timeout=0.0)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint; waits for the save under way.

        Raises:
          ConfigError: that save failed.
        """
        self._settle()
        return steps_in(self.directory)

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> int | None:
        """Step with the best validation score; the newest where none was scored."""
        self._settle()
        return best_in(self.directory)

    def restore(self, like: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """State and meta of ``step``, placed as ``like`` is (arrays or ShapeDtypeStructs with shardings)."""
        return load(self.directory / str(step), like)

    def close(self) -> None:
        self._settle()

    def _settle(self, timeout: float | None = None) -> None:
        """Ends the save under way and deletes what is no longer wanted; at once where ``timeout`` is 0."""
        if self._saving is None:
            return
        step, size, response = self._saving
        try:
            response.result(timeout=timeout)
        except TimeoutError:
            if timeout is not None:
                return
            raise
        except Exception as error:
            self._saving = None
            raise self._failed(step, size, error) from error
        self._saving = None
        if self._main:
            self._delete_old()

    def _delete_old(self) -> None:
        """Keeps the newest, the best, and those whose score cannot be read: :meth:`best` says so, training goes on."""
        steps, scores, kept = steps_in(self.directory), {}, set[int]()
        for step in steps:
            try:
                scores[step] = score_of(self.directory / str(step))
            except Exception:
                kept.add(step)
        scored = [(score, step) for step, score in scores.items() if score is not None]
        kept |= {*steps[-self.keep :], *([min(scored)[1]] if scored else [])}
        for step in set(steps) - kept:
            folder = self.directory / str(step)
            unwanted = folder.with_name(f"{step}{UNWANTED}")
            with contextlib.suppress(OSError):  # one too many ends no training; the next save tries again
                os.rename(folder, unwanted)  # what is half-deleted must not look like a checkpoint
                shutil.rmtree(unwanted, ignore_errors=True)

    def _failed(self, step: int | None, size: int, error: BaseException | None) -> ConfigError:
        """The error to raise for a save that came to nothing; what it left is removed, it takes room too."""
        free = shutil.disk_usage(self.directory).free
        self._remove_unfinished(step)
        steps = steps_in(self.directory)
        good = f"step {steps[-1]}" if steps else "its beginning"
        what = "no checkpoint can" if step is None else f"the checkpoint of step {step} cannot"
        why = "the disk is full" if error is None else _reason(error)
        missing = f", {_readable(size - free)} too few" if size > free else ""
        last = f"The last good checkpoint is that of step {steps[-1]}" if steps else "There is no checkpoint yet"
        return ConfigError(
            f"{what} be saved in {self.directory}: {why}. It takes about {size:,} bytes "
            f"({_readable(size)}); {free:,} bytes ({_readable(free)}) were free{missing}. {last}. Training stops "
            f"rather than go on unsaved: make room, and the same command goes on from {good}"
        )

    def _remove_unfinished(self, step: int | None) -> None:
        """Removes the folder of a save that failed, again while Orbax's other writers still fill it.

        What is there after the last look (they are threads that nothing waits for), the next writer removes.
        """
        for wait in (0.0, 0.1, 0.2, 0.4, 0.8):
            time.sleep(wait)
            left = list(self.directory.glob(f"{step}{UNFINISHED}*"))
            if wait and not left:
                return
            for child in left:
                shutil.rmtree(child, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The system's words, as far as there are some: TensorStore puts long paths before them."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    system = re.search(r"([^:]+) \[os_error_code", text)
    return system[1].strip() if system else text[-200:]


def _size(state: Any) -> int:
    """Bytes of a checkpoint of ``state``; compression makes it smaller by a tenth or so."""
    leaves = jax.tree.leaves(state)
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves) + _BESIDE


def _readable(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
