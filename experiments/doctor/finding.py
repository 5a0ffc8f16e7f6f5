"""What the doctor says: findings with a level, and the exit code that follows from them. Standard library only."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")
EXIT_CODES = {"ok": 0, "note": 0, "warning": 1, "error": 2}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    """"ok": as it should be. "note": worth knowing. "warning": slow or fragile. "error": will fail or be wrong."""
    topic: str
    what: str
    why: str = ""
    """Why it matters."""
    fix: str = ""
    """What to do."""
    source: str = ""
    """Who says so, where it is not plain."""


def exit_code(findings: Iterable[Finding]) -> int:
    """0: nothing or notes only; 1: warnings; 2: errors."""
    return max((EXIT_CODES[f.level] for f in findings), default=0)


def guarded[T](topic: str, found: list[Finding], check: Callable[..., T], *args: Any) -> T | None:
    """``check(*args)``; an exception becomes an error finding, as a doctor must not fall ill itself. None then."""
    try:
        return check(*args)
    except Exception as error:
        found.append(
            Finding(
                "error",
                topic,
                f"this check failed: {type(error).__name__}: {_first_lines(error)}",
                "what it would have said is unknown",
                "read the message; if it is no fault of this machine, it is one of the doctor: please report it",
            )
        )
        return None


def _first_lines(error: BaseException, count: int = 4) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) or "no message"
