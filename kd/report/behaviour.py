"""Question 4: how alike are student and teacher: agreement, calibration, mistakes copied and mended, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd.report import pieces, plots
from kd.report.pieces import Figure, Section, Table
from kd.report.rows import Cell, Gathered

MOST_CELLS, MOST_CLASSES = 40, 20  # that a picture of recalls has room for


def sections(gathered: Gathered, folder: Path) -> list[Section]:
    """One table over all students that had a teacher; a picture of the recalls for each budget."""
    taught = [c for c in gathered.cells if not c.alone and c.by_seed("test/agreement")]
    if not taught:
        return []
    section = Section("Students and their teachers", _sentences(taught), [_table(taught)])
    budgets = {c.first.budget for c in taught}
    for at, budget in enumerate(sorted(budgets)):
        mine = [c for c in gathered.cells if c.first.budget == budget and c.first.run.record.get("per_class")]
        if mine and len(mine[0].first.run.record["dataset"]["classes"]) <= MOST_CLASSES:
            section.figures += draw(mine[:MOST_CELLS], folder, f"per_class{at or ''}", budget)
    return [section]


def _sentences(cells: Sequence[Cell]) -> list[str]:
    said = [
        "Agreement: the share of test images on which student and teacher answer the same. ECE: expected calibration "
        "error, 15 bins. Copied and mended: of the teacher's mistakes, those that the student makes too (the same "
        "wrong class), and those that it gets right. Means over seeds."
    ]
    most = max(cells, key=lambda c: c.mean("test/agreement").value)
    found = most.mean("test/agreement")
    return [*said, f"The closest to its teacher: {most.title}, agreement {pieces.percent(found.value)} %."]


def _table(cells: Sequence[Cell]) -> Table:
    columns = ["student", "teacher", "method", "agreement %", "ECE % student", "ECE % teacher"]
    columns += ["NLL student", "NLL teacher", "copied %", "mended %"]
    rows = []
    for cell in cells:
        row = [cell.first.student, cell.first.teacher, cell.first.method, _percent(cell, "test/agreement")]
        row += [_percent(cell, "test/ece"), _percent(cell, "teacher/test/ece")]
        row += [_plain(cell, "test/nll"), _plain(cell, "teacher/test/nll")]
        rows.append([*row, _percent(cell, "test/mistakes_copied"), _percent(cell, "test/mistakes_mended")])
    return Table(columns, rows, note="Copied and mended are empty where the teacher made no mistake.")


def _percent(cell: Cell, name: str) -> str:
    found = cell.mean(name)
    return pieces.percent(found.value) if found else ""


def _plain(cell: Cell, name: str) -> str:
    found = cell.mean(name)
    return f"{found.value:.3f}" if found else ""


def draw(cells: Sequence[Cell], folder: Path, name: str, budget: str) -> list[Figure]:
    """Recall of each class (columns) by each student (rows), mean over seeds, percent."""
    import numpy as np

    classes = cells[0].first.run.record["dataset"]["classes"]
    grid = np.array([np.mean([r.run.record["per_class"]["student"] for r in c.rows], axis=0) for c in cells])
    titles = [_wrap("alone" if c.alone else f"{c.first.teacher}, {c.first.method}", c.first.student) for c in cells]
    with plots.canvas(folder, name, f"Recall of each class; {budget}", height=1.2 + 0.5 * len(cells)) as (
        _,
        axes,
        saved,
    ):
        image = axes.imshow(100 * grid, cmap="viridis", aspect="auto", vmin=min(80.0, 100 * grid.min()), vmax=100)
        for (y, x), value in np.ndenumerate(100 * grid):
            middle = (image.norm.vmin + 100) / 2
            axes.text(
                x,
                y,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if value < middle else "black",
            )
        axes.set_xticks(range(len(classes)), classes, fontsize=8, rotation=0 if max(map(len, classes)) < 4 else 60)
        axes.set_yticks(range(len(cells)), titles, fontsize=7)
        axes.grid(False)
        axes.set_xlabel("class; numbers are recall (%)")
    return saved


def _wrap(how: str, student: str) -> str:
    """Two or three lines at most: a picture's labels may not push its axes aside."""
    import textwrap

    return "\n".join([student[:48], *textwrap.wrap(how, 48, max_lines=2, placeholder=" ...")])
