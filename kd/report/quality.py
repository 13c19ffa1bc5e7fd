"""Question 1: does a better teacher make a better student?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from kd import stats
from kd.report import pieces, plots
from kd.report.pieces import Figure, Section, Table
from kd.report.rows import Cell, Gathered

FEWEST = 5  # teachers of one student, method and budget that make a ladder


def sections(gathered: Gathered, folder: Path) -> list[Section]:
    """One for each ladder of teachers."""
    found = gathered.groups(lambda c: (c.first.budget, c.first.student, c.first.method), lambda c: not c.alone)
    ladders = [cells for _, cells in sorted(found.items()) if len(_known(cells)) >= FEWEST]
    return [_section(cells, folder, at) for at, cells in enumerate(ladders)]


def _known(cells: Sequence[Cell]) -> list[Cell]:
    """Cells whose teacher's accuracy is known, the poorest teacher first."""
    known = [c for c in cells if c.first.teacher_top1 is not None and c.by_seed()]
    return sorted(known, key=lambda c: (c.first.teacher_top1, c.first.teacher))


def _section(cells: Sequence[Cell], folder: Path, at: int) -> Section:
    known = _known(cells)
    row = known[0].first
    baseline = next((c.baseline for c in known if c.baseline is not None), None)
    section = Section(f"Teacher quality: {row.student} by {row.method}", _sentences(known, baseline), [_table(known)])
    section.sentences.insert(0, f"{row.budget}; {_seeds(known)}. Accuracies are top-1 on the test split.")
    name = f"teacher_quality{at or ''}"
    better = better_than(known, baseline)
    crowd = better if len(better) >= 2 else []  # drawn, and labelled, by themselves
    section.figures += draw(known, baseline, folder, name, "all teachers", [c for c in known if c not in crowd])
    if crowd:
        section.figures += draw(better, baseline, folder, f"{name}_better", "teachers better than the student alone")
    return section


def _seeds(cells: Sequence[Cell]) -> str:
    counts = sorted({len(c.by_seed()) for c in cells})
    return pieces.plural(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def better_than(cells: Sequence[Cell], baseline: Cell | None) -> list[Cell]:
    """Those whose teacher beats the mean of the student alone."""
    return [c for c in cells if baseline and c.first.teacher_top1 > baseline.mean().value]


def _sentences(cells: Sequence[Cell], baseline: Cell | None) -> list[str]:
    said = [verdict(cells, "all teachers")]
    if baseline is None:
        return [*said, "The student alone at this budget is missing, so no gain can be stated."]
    alone = baseline.mean()
    level = f"the student alone ({pieces.percent(alone.value)} %{_bracket(alone)})"
    better = better_than(cells, baseline)
    said.append(verdict(better, f"the teachers better than {level}"))
    best = max(cells, key=lambda c: c.mean().value)
    said.append(_gain_sentence(best))
    worse = [c for c in cells if c not in better]
    hurt = [c for c in worse if c.gain is not None and c.gain.value < 0]
    if worse:
        sure = [c for c in hurt if sure_gain(c)]
        many = "1 teacher that is" if len(worse) == 1 else f"{len(worse)} teachers that are"
        said.append(f"Of {many} no better than the student alone, {len(hurt)} made it worse ({len(sure)} resolved).")
    return said


def sure_gain(cell: Cell) -> bool:
    """Whether a gain or a loss stands: its interval leaves out zero, and so does the test corrected for all comparisons."""
    corrected = cell.p_value is None or cell.p_value < 1 - stats.LEVEL
    return cell.gain is not None and cell.gain.resolved and corrected


def verdict(cells: Sequence[Cell], whom: str) -> str:
    """What the data support about the order of teachers and students."""
    if len(cells) < 3:
        return f"Over {whom}: {pieces.plural(len(cells), 'teacher')}, too few for a rank correlation. Not resolved."
    found = stats.spearman([(c.first.teacher_top1, list(c.by_seed().values())) for c in cells])
    if math.isnan(found.value):
        return f"Over {whom}: no variation to correlate. Not resolved."
    rest = f"rank correlation {found.value:.2f}"
    rest += f", 95 % interval [{found.low:.2f}, {found.high:.2f}], {found.n} teachers" if found.low is not None else ""
    if max(len(c.by_seed()) for c in cells) == 1:
        rest += "; one seed, so the interval knows nothing of seed noise"
    if not found.resolved:
        return f"Over {whom}: not resolved whether a better teacher makes a better student ({rest})."
    word = "a better teacher makes a better student" if found.value > 0 else "a better teacher makes a worse student"
    return f"Over {whom}: {word} ({rest})."


def _gain_sentence(cell: Cell) -> str:
    gain = cell.gain
    if gain is None:
        return f"The best student had {cell.first.teacher} as teacher; no seed in common with the student alone."
    text = (
        f"The best student, taught by {cell.first.teacher}, gains {pieces.points(gain.value)} points over itself alone"
    )
    if gain.low is None:
        return f"{text}; {'one seed' if gain.n == 1 else 'all seeds equal'}, so not resolved."
    word = "resolved" if sure_gain(cell) else "not resolved"
    if gain.resolved and word != "resolved":
        word += " (the interval alone leaves out zero, but there are many comparisons)"
    chosen = "; the best of several, so its gain is an optimistic pick"
    p = f", p = {pieces.p_text(cell.p_value)} after Holm" if cell.p_value is not None else ""
    return f"{text}, 95 % interval {pieces.interval(gain, signed=True)}{p}: {word}{chosen}."


def _bracket(estimate: stats.Estimate) -> str:
    return f", {pieces.interval(estimate)}" if estimate.low is not None else ""


def _table(cells: Sequence[Cell]) -> Table:
    columns = ["teacher", "teacher top-1 %", "seeds", "student top-1 %", "95 % interval"]
    columns += ["gain, points", "95 % interval", "p (Holm)"]
    rows = []
    for cell in cells:
        found, gain = cell.mean(), cell.gain
        rows.append(
            [
                cell.first.teacher,
                pieces.percent(cell.first.teacher_top1),
                str(found.n),
                pieces.spread(found),
                pieces.interval(found),
                pieces.points(gain.value) if gain else "",
                pieces.interval(gain, signed=True),
                pieces.p_text(cell.p_value),
            ]
        )
    return Table(columns, rows, note="Kept epochs are points inside one run's schedule, not runs of that length.")


def draw(
    cells: Sequence[Cell],
    baseline: Cell | None,
    folder: Path,
    name: str,
    whom: str,
    labelled: Sequence[Cell] | None = None,
) -> list[Figure]:
    """Student against teacher: means with intervals, seeds as dots, the student alone as a band; `labelled` get names."""
    row = cells[0].first
    caption = (
        f"{row.student} by {row.method} against its teacher's accuracy, {whom}; bars are 95 % intervals of the mean"
    )
    with plots.canvas(folder, name, caption) as (_, axes, saved):
        if baseline is not None:
            _band(axes, baseline)
        for road, colour, marker in (("training budget", plots.BLUE, "o"), ("capacity", plots.ORANGE, "s")):
            mine = [c for c in cells if road == _road(c)]
            if mine:
                _series(axes, mine, road, colour, marker)
        axes.set_xlabel("teacher, test top-1 (%)")
        axes.set_ylabel("student, test top-1 (%)")
        axes.legend(loc="best")
        named = cells if labelled is None else labelled
        points = [(100 * c.first.teacher_top1, 100 * c.mean().value, _short(c)) for c in named]
        axes.margins(0.08)
        plots.label_points(axes, points)
    return saved


def _road(cell: Cell) -> str:
    kept = cell.first.run.record["config"]["teacher"].get("epoch") is not None
    return "training budget" if kept else "capacity"


def _short(cell: Cell) -> str:
    """What tells this teacher from the others: its last words."""
    return " ".join(cell.first.teacher.split(" (")[0].split()[-2:])


def _band(axes, baseline: Cell) -> None:
    alone = baseline.mean()
    axes.axhline(100 * alone.value, color=plots.GRAY, linewidth=1, label="student alone")
    if alone.low is not None:
        axes.axhspan(100 * alone.low, 100 * min(1.0, alone.high), color=plots.GRAY, alpha=0.15, linewidth=0)


def _series(axes, cells: Sequence[Cell], label: str, colour: str, marker: str) -> None:
    for cell in cells:
        x = 100 * cell.first.teacher_top1
        axes.plot(
            [x] * cell.mean().n, [100 * v for v in cell.by_seed().values()], ".", color=colour, alpha=0.45, markersize=4
        )
        found = cell.mean()
        if found.low is not None:
            axes.plot([x, x], [100 * max(0.0, found.low), 100 * min(1.0, found.high)], color=colour, linewidth=1.2)
    xs, ys = [100 * c.first.teacher_top1 for c in cells], [100 * c.mean().value for c in cells]
    axes.plot(xs, ys, marker, color=colour, label=f"teachers by {label}", markersize=6)
