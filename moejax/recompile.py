"""A compiled function that tells when it was compiled again, and what had changed.

JAX compiles a jitted function anew for every new combination of shapes, types and placements, without a word. In the
middle of a run that costs minutes and nearly always means a mistake in the data or in a setting.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

SHOWN = 4
"""Differences that a line names; it counts the others."""

Signature = dict[str, str]
"""Path of each array among the arguments -> its type, as far as compilation sees it."""


@dataclasses.dataclass(frozen=True)
class Recompilation:
    """One compilation after those that were expected."""

    name: str
    """What the function is, in a reader's words."""
    differences: tuple[str, ...]
    """``arguments before -> now``; or the one sentence that the arguments are the same, and which settings are not."""
    seconds: float
    """How long the compilation took."""

    def __str__(self) -> str:
        shown = "; ".join(self.differences[:SHOWN])
        more = f"; and {len(self.differences) - SHOWN} more" if len(self.differences) > SHOWN else ""
        return f"{self.name} was compiled again ({self.seconds:.1f} s): {shown}{more}"


class Watched:
    """Calls a jitted function and counts its programs. Other attributes (``lower``, ...) are the function's.

    It listens to JAX's own events, so a call that compiles nothing costs nothing. Only types of arguments are read, of
    donated ones too.

    Args:
      fn: from ``jax.jit``.
      name: what it is, for people: "the training step".
      arguments: names of the positional arguments, for messages.
      mesh: in force during each call.
      armed: whether a compilation is reported; the very first one never is. A caller that expects some (a table with
        other limits) switches it off meanwhile.
    """

    def __init__(
        self,
        fn: Callable,
        name: str,
        arguments: tuple[str, ...],
        mesh: jax.sharding.Mesh | None = None,
        armed: bool = True,
    ) -> None:
        self.fn, self.name, self.arguments, self.mesh, self.armed = fn, name, arguments, mesh, armed
        self.found: list[Recompilation] = []
        self._event = f"jit({getattr(fn, '__name__', '')})"
        self._seen: list[tuple[Signature, dict[str, Any]]] = []

    def __call__(self, *args: Any) -> Any:
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            with _compilations() as seconds:
                out = self.fn(*args)
            if self._event in seconds:
                self._compiled(args, seconds[self._event])
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fn, name)

    def take(self) -> list[Recompilation]:
        """What was found since the last call of this."""
        found, self.found = self.found, []
        return found

    def _compiled(self, args: tuple, seconds: float) -> None:
        now, settings = signature(args, self.arguments), _settings()
        if self._seen and self.armed:

            def distance(seen: tuple[Signature, dict[str, Any]]) -> tuple[int, int]:
                return len(_different(seen[0], now)), len(_changed(seen[1], settings))

            closest, then = min(reversed(self._seen), key=distance)
            found = differences(closest, now) or [_unexplained(then, settings)]
            self.found.append(Recompilation(self.name, tuple(found), seconds))
        self._seen.append((now, settings))


_COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for a compiled program, those out of the cache on disk included; it names the function."""
_listening: list[dict[str, float]] = []  # seconds by name, for each call that is watched now


@contextlib.contextmanager
def _compilations() -> Generator[dict[str, float]]:
    """Seconds of what JAX compiles meanwhile, by the name of the function."""
    _listen()
    seconds: dict[str, float] = {}
    _listening.append(seconds)
    try:
        yield seconds
    finally:
        _listening.pop()


@functools.cache
def _listen() -> None:  # once: JAX has no public way to take a listener off
    def heard(event: str, duration_secs: float, **facts: Any) -> None:
        if event == _COMPILED:
            for found in _listening:
                name = str(facts.get("fun_name"))
                found[name] = found.get(name, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(heard)


def signature(args: tuple, names: tuple[str, ...]) -> Signature:
    """Type of every array in ``args``: dtype and shape, weak type, and where it lies."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(dict(zip(names, args, strict=True)))
    types = {_path(path): _type(leaf) for path, leaf in leaves}
    return types | {"": str(tree)}  # the structure, for values that are part of it (static fields)


def differences(before: Signature, now: Signature) -> list[str]:
    """``paths before -> now`` for the arrays whose type differs, new and missing ones included; arrays that changed
    alike stand together."""
    alike: dict[tuple[str, str], list[str]] = {}
    for path in _different(before, now):
        alike.setdefault((before.get(path, "absent"), now.get(path, "absent")), []).append(path)
    found = [f"{', '.join(paths)} {old} -> {new}" for (old, new), paths in alike.items()]
    if not found and before[""] != now[""]:
        found.append("arguments that are no arrays differ (a static field of a config, limit or model)")
    return found


def _different(before: Signature, now: Signature) -> list[str]:
    return [path for path in {**before, **now} if path and before.get(path) != now.get(path)]


def _path(path: tuple) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _type(leaf: Any) -> str:
    aval = jax.typeof(leaf)
    text = aval.str_short(short_dtypes=False)
    if getattr(aval, "weak_type", False):
        text += ", weak type (a Python number)"
    if not isinstance(leaf, jax.Array):
        return f"{text} on the host" if isinstance(leaf, np.ndarray) else text
    sharding = leaf.sharding
    spec = getattr(sharding, "spec", None)
    where = ""
    if len(sharding.device_set) > 1:
        where = " replicated" if sharding.is_fully_replicated else f" split {spec}"
    return text + where + ("" if getattr(leaf, "committed", True) else ", uncommitted")


def _settings() -> dict[str, Any]:
    """What a program depends on beside its arguments: the mesh in force, and JAX's settings with their contexts."""
    values = {name: getattr(jax.config, name, value) for name, value in jax.config.values.items()}
    return {**values, "the mesh": str(jax.sharding.get_abstract_mesh())}


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]]


def _unexplained(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = _changed(before, now)
    if changed:
        return "its arguments are the same, but " + "; ".join(changed)
    return "its arguments and JAX's settings are the same; its cache was cleared, or what it closes over has changed"
