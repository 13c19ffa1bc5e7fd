"""Question 2: does it matter that teacher and student differ in kind?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd import stats
from kd.report import pieces, plots
from kd.report.pieces import Figure, Section, Table
from kd.report.rows import Cell, Gathered


def sections(gathered: Gathered, folder: Path) -> list[Section]:
    """One for each budget under which two families of teachers taught two families of students."""
    found = gathered.groups(lambda c: c.first.budget, lambda c: not c.alone and c.gain is not None)
    crossed = [cells for _, cells in sorted(found.items()) if _crossed(cells)]
    return [_section(cells, folder, at) for at, cells in enumerate(crossed)]


def _crossed(cells: Sequence[Cell]) -> bool:
    students, teachers = {c.first.family for c in cells}, {c.first.teacher_family for c in cells}
    return len(students) > 1 and len(teachers) > 1


def _section(cells: Sequence[Cell], folder: Path, at: int) -> Section:
    methods = sorted({c.first.method for c in cells})
    section = Section(
        "Crossing architectures", [f"{cells[0].first.budget}; gains over the same student alone, paired by seed."]
    )
    for method in methods:
        mine = [c for c in cells if c.first.method == method]
        section.sentences += [_sentence(mine, method)]
        section.figures += draw(mine, folder, f"cross_architecture{at or ''}_{plots.file_name(method)}", method)
    section.tables = [_families_table(cells, methods), _table(cells)]
    return section


def same_against_cross(cells: Sequence[Cell]) -> stats.Estimate | None:
    """Gain from a teacher of the student's family less the mean gain from others; a student under a seed is a pair."""
    differences = []
    for student in sorted({c.first.student for c in cells}):
        mine = [c for c in cells if c.first.student == student]
        same = [c for c in mine if c.first.teacher_family == c.first.family]
        cross = [c for c in mine if c.first.teacher_family != c.first.family]
        seeds = set.intersection(*(set(c.by_seed()) for c in mine)) if same and cross else set()
        for seed in sorted(seeds):
            own, other = ([c.by_seed()[seed] for c in group] for group in (same, cross))
            differences.append(sum(own) / len(own) - sum(other) / len(other))
    return stats.mean(differences) if differences else None


def _sentence(cells: Sequence[Cell], method: str) -> str:
    found = same_against_cross(cells)
    every = stats.mean([c.gain.value for c in cells])
    gains = f"{method}: the mean gain over {len(cells)} pairs is {pieces.points(every.value)} points"
    if found is None:
        return f"{gains}; no student had teachers both of its own and of another family, so these are not compared."
    size = f"{pieces.points(found.value)} points, 95 % interval {pieces.interval(found, signed=True)}, {found.n} pairs"
    if not found.resolved:
        return f"{gains}. Whether a teacher of the student's own family helps more is not resolved ({size})."
    word = "more" if found.value > 0 else "less"
    return f"{gains}. A teacher of the student's own family helps {word} than one of another ({size})."


def _families_table(cells: Sequence[Cell], methods: Sequence[str]) -> Table:
    rows = []
    for method in methods:
        mine = [c for c in cells if c.first.method == method]
        row = [method]
        for same in (True, False):
            gains = [c.gain.value for c in mine if (c.first.teacher_family == c.first.family) is same]
            row.append(pieces.points(stats.mean(gains).value) if gains else "")
        found = same_against_cross(mine)
        rows.append([*row, pieces.points(found.value) if found else "", pieces.interval(found, signed=True)])
    columns = ["method", "same family, points", "other family, points", "difference", "95 % interval"]
    note = "A pair is one student under one seed. Pairs share seeds and teachers: the interval is, if anything, narrow."
    return Table(columns, rows, title="Mean gain by family", note=note)


def _table(cells: Sequence[Cell]) -> Table:
    columns = ["student", "family", "teacher", "family", "method", "seeds", "gain, points", "95 % interval", "p (Holm)"]
    ordered = sorted(cells, key=lambda c: (c.first.student, c.first.method, c.first.teacher))
    rows = [
        [
            *(c.first.student, c.first.family, c.first.teacher, c.first.teacher_family or "", c.first.method),
            *(str(c.gain.n), pieces.points(c.gain.value), pieces.interval(c.gain, signed=True)),
            pieces.p_text(c.p_value),
        ]
        for c in ordered
    ]
    return Table(columns, rows, title="Gain of every pair")


def draw(cells: Sequence[Cell], folder: Path, name: str, method: str) -> list[Figure]:
    """Students down, teachers across: gain in points, half its 95 % interval; framed: the same family."""
    import numpy as np

    students = sorted({(c.first.family, c.first.student) for c in cells})
    teachers = sorted({(c.first.teacher_family or "", c.first.teacher) for c in cells})
    grid, words = np.full((len(students), len(teachers)), np.nan), {}
    for cell in cells:
        at = (
            students.index((cell.first.family, cell.first.student)),
            teachers.index((cell.first.teacher_family or "", cell.first.teacher)),
        )
        grid[at] = 100 * cell.gain.value
        if cell.gain.low is not None:
            half = f"\n± {50 * (cell.gain.high - cell.gain.low):.1f}"
        else:
            half = "\none seed" if cell.gain.n == 1 else "\nequal seeds"
        words[at] = f"{100 * cell.gain.value:+.1f}{half}"
    caption = f"{method}: gain over the student alone, points, ± half the 95 % interval; framed: same family"
    height = 1.6 + 0.62 * len(students)
    with plots.canvas(folder, name, caption, height=height) as (figure, axes, saved):
        most = max(0.1, float(np.nanmax(np.abs(grid))))
        image = axes.imshow(grid, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
        for (y, x), text in words.items():
            dark = abs(grid[y, x]) > 0.6 * most
            axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "black")
            if students[y][0] == teachers[x][0]:
                axes.add_patch(_frame(x, y))
        axes.set_xticks(range(len(teachers)), [t.replace("_", "\n") for _, t in teachers], fontsize=8.5)
        axes.set_yticks(range(len(students)), [s.replace("_", "\n") for _, s in students], fontsize=8.5)
        axes.grid(False)
        axes.set_xlabel("teacher")
        axes.set_ylabel("student")
        figure.colorbar(image, label=f"gain by {method} (points)", shrink=0.9)
    return saved


def _frame(x: int, y: int):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, edgecolor="black", linewidth=1.6)
