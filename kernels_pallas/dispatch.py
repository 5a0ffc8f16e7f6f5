"""Choice of a back end: `implementation=None | name | sequence of names`, with every refusal kept.

An `Operation` is one public function (say grouped matmul) with several back ends of the same signature. A
back end refuses by returning a sentence from `refuse`; it looks at shapes, dtypes and the platform only, so
a doctor script can ask the same question of `jax.ShapeDtypeStruct`s, without running anything.

- `None`: the platform's order is tried, the first back end that does not refuse runs;
- a name: that back end or a `BackendRefused` error, never a fallback;
- a sequence: tried in the order given; if all refuse, the error carries every reason.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Implementation = str | Sequence[str] | None


class BackendRefused(NotImplementedError):
    """No back end that the caller allowed can run; `refusals` maps each one's name to its reason."""

    def __init__(self, operation: str, refusals: Mapping[str, str], available: Sequence[str]):
        self.refusals = dict(refusals)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refusals.items())
        super().__init__(
            f"{operation}: no allowed back end can run ({reasons}). "
            f"Choose another of {sorted(available)}, or implementation=None for the platform's order."
        )


def _accept(*args: Any, **kwargs: Any) -> str | None:
    del args, kwargs
    return None


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        name: what callers pass as `implementation`.
        run: the function; same signature as the operation without `implementation`.
        refuse: called with the same arguments; None, or the reason why this back end cannot run them here.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = _accept

    @classmethod
    def missing(cls, name: str, reason: str) -> "Backend":
        """A back end that cannot be loaded (say an optional import failed): always refuses with `reason`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            raise BackendRefused(name, {name: reason}, ())

        return cls(name, run, lambda *args, **kwargs: reason)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What an operation would do: `chosen` (None if all refuse) and the reason of each back end that refuses.

    `order` holds the names tried, `refusals` covers the other known back ends too.
    """

    operation: str
    platform: str
    order: tuple[str, ...]
    chosen: str | None
    refusals: dict[str, str]
    available: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.operation} on {self.platform}: {self.chosen or 'nothing can run'}"]
        for name in dict.fromkeys((*self.order, *self.available)):
            if name == self.chosen:
                continue
            default = "could run, later in the order" if name in self.order else "could run, by name only"
            lines.append(f"  {name}: {self.refusals.get(name, default)}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A public function with several back ends.

    Attributes:
        name: used in messages.
        backends: by name; a later module registers one by building a new mapping, not by mutation.
        order: platform ("cpu", "gpu", "tpu") -> names tried for `implementation=None`; "*" is any other.
    """

    name: str
    backends: Mapping[str, Backend]
    order: Mapping[str, tuple[str, ...]]

    def names(self, implementation: Implementation, platform: str) -> tuple[str, ...]:
        """The back ends to try, in order. Raises ValueError for an unknown name or an empty sequence."""
        if implementation is None:
            return self.order.get(platform, self.order["*"])
        names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
        unknown = [name for name in names if name not in self.backends]
        if unknown or not names:
            raise ValueError(
                f"{self.name}: implementation={implementation!r} must name one or more of "
                f"{sorted(self.backends)} (or be None for the platform's order)"
            )
        return names

    def select(self, implementation: Implementation, *args: Any, **kwargs: Any) -> Backend:
        """The first allowed back end that does not refuse the arguments; raises BackendRefused if all do."""
        refusals = {}
        for name in self.names(implementation, default_platform()):
            reason = self.backends[name].refuse(*args, **kwargs)
            if reason is None:
                return self.backends[name]
            refusals[name] = reason
        raise BackendRefused(self.name, refusals, tuple(self.backends))

    def explain(self, *args: Any, implementation: Implementation = None, **kwargs: Any) -> Explanation:
        """Which back end would run and why the others would not; arguments may be ShapeDtypeStructs."""
        platform = default_platform()
        order = self.names(implementation, platform)
        answers = {name: backend.refuse(*args, **kwargs) for name, backend in self.backends.items()}
        refusals = {name: reason for name, reason in answers.items() if reason is not None}
        chosen = next((name for name in order if name not in refusals), None)
        return Explanation(self.name, platform, order, chosen, refusals, tuple(self.backends))


def default_platform() -> str:
    """The platform ("cpu", "gpu", "tpu") of `jax.default_device` if set, else of the default back end."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    platform = device if isinstance(device, str) else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform
