"""What a check found wrong, and what to type about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kd.hints import UserError


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what was seen, with figures, and what to type. With `stops` a run does not start."""

    code: str  # pairs, classes, class_order, preprocessing, head, weak, path, temperature
    text: str
    fix: str
    stops: bool = True

    def __str__(self) -> str:
        """Two sentences."""
        return f"{self.text.rstrip('.')}. {self.fix}" if self.fix else self.text


def stop(findings: Sequence[Finding], say: Callable[[str], None]) -> None:
    """Say what only deserves a word; raise UserError with the others, each with what to type."""
    for found in findings:
        if not found.stops:
            say(f"warning: {found}")
    if stopping := [f for f in findings if f.stops]:
        raise UserError("\n    ".join(str(f) for f in stopping))
