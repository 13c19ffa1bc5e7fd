"""Question 5: every cell with honest numbers: both epochs, seeds, spread, interval, a corrected paired test."""

from __future__ import annotations

from collections.abc import Sequence

from kd.report import pieces
from kd.report.pieces import Section, Table
from kd.report.rows import Cell, Gathered

GREY = "its epoch was picked on the test set: only for comparison with published tables"


def sections(gathered: Gathered) -> list[Section]:
    """A table for each budget."""
    budgets = sorted(gathered.groups(lambda c: c.first.budget).items())
    if not budgets:
        return []
    section = Section("All results", _sentences(gathered))
    section.tables = [_table(cells, budget) for budget, cells in budgets]
    return [section]


def _sentences(gathered: Gathered) -> list[str]:
    said = [
        "Test top-1. 'best' is the epoch with the best validation accuracy, 'last' the end of training. Intervals are "
        "Student's t over seeds, 95 %; they do not cover the choice of test images. The gain is over the same student "
        "alone at the same budget, paired by seed; p is of the paired t-test, corrected by Holm's method over the "
        "comparisons at that budget. There is neither for one seed, nor where all differences are equal."
    ]
    sizes = {(c.first.dataset, c.first.run.record["dataset"].get("test")) for c in gathered.cells}
    said += [f"{d}: one of {n} test images is {100 / n:.2f} points." for d, n in sorted(sizes, key=str) if n]
    if not all(c.first.honest for c in gathered.cells):
        said.append(f"Greyed rows: {GREY}.")
    return said + mixes(gathered.finished)


def mixes(finished: Sequence) -> list[str]:
    """What differs between the machines and codes that the runs had."""
    said = []
    for key, what in (
        ("device_name", "devices"),
        ("threads", "thread counts"),
        ("torch", "torch versions"),
        ("commit", "commits of the code"),
    ):
        found = sorted({str(r.record["environment"].get(key)) for r in finished if "environment" in r.record})
        if len(found) > 1:
            shown = ", ".join(f[:12] if key == "commit" else f for f in found[:6]) + (", ..." if len(found) > 6 else "")
            said.append(f"These runs mix {what}: {shown}.")
    precisions = sorted({r.record["precision"] for r in finished if r.record.get("precision")})
    if len(precisions) > 1:
        said.append(f"These runs mix precisions: {', '.join(precisions)}.")
    inexact = [r.name for r in finished if r.record.get("exact") is False]
    if inexact:
        said.append(
            f"Resumed on another machine or thread count, so not repeatable to the last digit: {', '.join(inexact)}."
        )
    return said


def _table(cells: Sequence[Cell], budget: str) -> Table:
    columns = ["student", "teacher", "method", "seeds", "best % ± sd", "95 % interval", "last %"]
    columns += ["gain, points", "95 % interval", "p (Holm)"]
    rows, greyed = [], set()
    for at, cell in enumerate(
        sorted(cells, key=lambda c: (c.first.student, not c.alone, c.first.method, c.first.teacher))
    ):
        best, last, gain = cell.mean(), cell.mean("test_last/top1"), cell.gain
        mark = "" if cell.first.honest else " (epoch picked on test)"
        if mark:
            greyed.add(at)
        rows.append(
            [
                cell.first.student + mark,
                "" if cell.alone else cell.first.teacher,
                "alone" if cell.alone else cell.first.method,
                str(best.n) if best else "0",
                pieces.spread(best),
                pieces.interval(best),
                pieces.percent(last.value) if last else "",
                pieces.points(gain.value) if gain else "",
                pieces.interval(gain, signed=True),
                pieces.p_text(cell.p_value),
            ]
        )
    return Table(columns, rows, title=budget, greyed=greyed)
