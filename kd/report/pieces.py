"""What a report is put together from: sections of sentences, tables and figures; numbers as people read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kd.stats import Estimate


@dataclass
class Table:
    """Text cells under column titles; `greyed` are the rows not to be compared with the others."""

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    note: str = ""
    greyed: set[int] = field(default_factory=set)


@dataclass
class Figure:
    """A picture in two formats, with words for those who do not see it."""

    png: Path
    svg: Path
    caption: str


@dataclass
class Section:
    """One question: what the data say, then what it rests on."""

    title: str
    sentences: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, without the sign."""
    return "" if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None) -> str:
    """A difference of fractions in percentage points, signed."""
    return "" if value is None else f"{100 * value:+.1f}"


def interval(estimate: Estimate | None, signed: bool = False) -> str:
    """[low, high] in percent; empty where there is none."""
    if estimate is None or estimate.low is None:
        return ""
    form = points if signed else percent
    return f"[{form(estimate.low)}, {form(estimate.high)}]"


def spread(estimate: Estimate | None) -> str:
    """mean ± standard deviation in percent."""
    if estimate is None:
        return ""
    return percent(estimate.value) + (f" ± {percent(estimate.sd)}" if estimate.sd is not None else "")


def p_text(value: float | None) -> str:
    """A p-value."""
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """1 seed, 3 seeds."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def enumerate_words(words: list[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}" if words else ""
