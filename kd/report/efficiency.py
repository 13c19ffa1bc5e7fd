"""Question 3: what does distillation buy in latency, throughput, memory and size?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd import stats
from kd.report import names, pieces, plots, speeds
from kd.report.pieces import Figure, Section, Table
from kd.report.rows import Cell, Gathered

AXES = {  # figure: (column, axis, direction in which it is better)
    "latency_ms": ("latency ms (1 image)", "latency of one image (ms, log scale)", 1),
    "images_per_s": ("images/s (batch 64)", "throughput (images/s, batches of 64, log scale)", -1),
    "activations_mib": ("activations MiB (batch 64)", "activations of the largest layer (MiB, batch 64, log scale)", 1),
    "size_mib": ("weights MiB", "size of the weights file (MiB, log scale)", 1),
}
KINDS = {"teacher": (plots.ORANGE, "s"), "student alone": (plots.GRAY, "D"), "distilled": (plots.BLUE, "o")}


@dataclass
class Point:
    """A network in a role: what it costs, and the best mean accuracy that it had there."""

    name: str
    kind: str
    top1: stats.Estimate
    cost: dict[str, float]
    how: str
    images: int | None = None  # that it was trained on


def sections(gathered: Gathered, folder: Path, measure: bool, trust: bool = False) -> list[Section]:
    """One for each dataset of which there are at least two networks."""
    costs = speeds.collect(gathered, measure, trust)
    taught_by = {(r.run.record.get("teacher") or {}).get("run") for c in gathered.cells for r in c.rows}
    found = []
    for dataset, cells in sorted(gathered.groups(lambda c: c.first.dataset, lambda c: c.first.honest).items()):
        points = _points(cells, costs, taught_by)
        if len({p.name for p in points}) > 1:
            found.append(_section(dataset, points, folder, len(found)))
    return found + benchmarks(gathered)


def benchmarks(gathered: Gathered) -> list[Section]:
    """What `kd.benchmark` measured of these runs: teacher and student in turns, with intervals."""
    sessions: dict[str, dict[str, Any]] = {}
    for run in gathered.finished:
        if figures := run.record.get("benchmark"):
            sessions.setdefault(names.key(figures), figures)  # one session writes into all its runs
    tables = [_session(figures) for figures in sessions.values()]
    return [Section("Benchmarks: teacher and student in turns", [], tables)] if tables else []


def _session(figures: dict[str, Any]) -> Table:
    where, ratios = figures["environment"], {r["name"]: r for r in figures["ratios"]}
    size = next((r["throughput_batch_size"] for r in figures["ratios"]), None)
    columns = ["network", "mode", "latency ms p50 [95 %]", "p99", "images/s", "peak MiB"]
    columns += ["times less latency", f"times less time, batch {size}"]
    rows = []
    for cell in figures["cells"]:
        latency, ratio = cell["latency_ms"], ratios.get(cell["name"], {})
        best, rate = max(cell["images_per_s"].items(), key=lambda item: item[1]["images_per_s"])
        peak = (cell.get("peak_mib") or {}).get(best)
        rows.append(
            [
                cell["model"],
                f"{cell['mode']} {cell['precision']}",
                f"{latency['p50']:.3f} [{latency['low']:.3f}, {latency['high']:.3f}]",
                f"{latency['p99']:.3f}",
                f"{rate['images_per_s']:,.0f} (batch {best})",
                f"{peak:,.0f}" if peak else "",
                *(_ratio(ratio.get(k)) for k in ("latency", "throughput")),
            ]
        )
    machine = f"{where['device_name']}, {pieces.plural(int(where['threads']), 'thread')}, torch {where['torch']}"
    return Table(columns, rows, note=f"{machine}; preprocessing counted in. Ratios are to {figures['reference']}.")


def _ratio(values: Sequence[float] | None) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values) if values else ""


def _points(cells: Sequence[Cell], costs: dict[str, dict[str, float]], taught_by: set[str | None]) -> list[Point]:
    best: dict[tuple[str, str], Point] = {}
    for cell in cells:
        teaching = cell.alone and any(r.run.name in taught_by for r in cell.rows)
        kind = "teacher" if teaching else "student alone" if cell.alone else "distilled"
        cost, top1 = costs.get(names.key(speeds.network_of(cell.first.run.record))), cell.mean()
        if cost is None or top1 is None:
            continue
        at = (cell.first.student, kind)
        if at not in best or top1.value > best[at].top1.value:
            how = "" if cell.alone else f"{cell.first.method}, {cell.first.teacher}"
            best[at] = Point(cell.first.student, kind, top1, cost, how, cell.first.run.record["dataset"].get("train"))
    return list(best.values())


def _section(dataset: str, points: list[Point], folder: Path, at: int) -> Section:
    measured = [a for a in AXES if any(a in p.cost for p in points)]
    fronts = {a: front(points, a) for a in measured}  # a network that could not be timed is on none
    section = Section(f"Efficiency on {dataset}", _sentences(points), [_table(points, measured, fronts)])
    for axis in measured:
        shown = [(p, on) for p, on in zip(points, fronts[axis], strict=True) if axis in p.cost]
        section.figures += draw(*zip(*shown, strict=True), folder, f"efficiency{at or ''}_{axis}", axis)
    return section


def front(points: Sequence[Point], axis: str) -> list[bool]:
    """Which points no other beats in accuracy and this figure."""
    sign = AXES[axis][2]
    return stats.pareto([(sign * p.cost[axis] if axis in p.cost else math.inf, p.top1.value) for p in points])


def _sentences(points: Sequence[Point]) -> list[str]:
    said = []
    machine = next((p.cost for p in points if "threads" in p.cost), {})
    if machine:
        said.append(
            f"Measured one network at a time, {machine['precision']}, on {machine.get('device_name', 'this machine')}, "
            f"{pieces.plural(int(machine['threads']), 'thread')}; accuracies are the best mean over seeds that a "
            "network had in its role."
        )
    else:
        said.append("Not timed here: python -m kd.report speed=on measures every network once, alone.")
    if any(p.cost.get("disturbed") for p in points):
        said.append("The machine was busy with other things while some were timed: their times mean little.")
    images = {kind: sorted({p.images for p in points if p.kind == kind and p.images}) for kind in KINDS}
    if len({tuple(i) for i in images.values() if i}) > 1:
        shown = ", ".join(f"{kind} {' or '.join(map(str, i))}" for kind, i in images.items() if i)
        said.append(f"They were not trained on equally many labelled images: {shown}.")
    for student in (p for p in points if p.kind == "distilled"):
        larger = [p for p in points if p.kind == "teacher" and p.cost["parameters"] > student.cost["parameters"]]
        if larger:
            said.append(_against(max(larger, key=lambda p: p.top1.value), student))
    return said


def _against(teacher: Point, student: Point) -> str:
    ours, theirs = student.cost, teacher.cost
    parts = [_times(theirs["size_mib"] / ours["size_mib"], "smaller", "larger")]
    if "latency_ms" in ours and "latency_ms" in theirs and not (ours.get("disturbed") or theirs.get("disturbed")):
        parts.append(_times(theirs["latency_ms"] / ours["latency_ms"], "faster", "slower") + " on one image")
        parts.append(_times(ours["images_per_s"] / theirs["images_per_s"], "the throughput", "less throughput"))
    lost = pieces.points(student.top1.value - teacher.top1.value)
    pair = f"{student.name} ({student.how}) against {teacher.name}, the best of the larger teachers"
    return f"{pair}: {pieces.enumerate_words(parts)}, {lost} points of top-1."


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f} times {more}" if ratio >= 1 else f"{1 / ratio:.1f} times {less}"


def _table(points: Sequence[Point], measured: Sequence[str], fronts: dict[str, list[bool]]) -> Table:
    columns = ["network", "role", "how", "top-1 %", "parameters", "MACs (M)", *(AXES[a][0] for a in measured)]
    order = sorted(range(len(points)), key=lambda i: (list(KINDS).index(points[i].kind), points[i].name))
    rows = []
    for i in order:
        p = points[i]
        figures = [f"{_figure(p.cost[a])}{' *' if fronts[a][i] else ''}" if a in p.cost else "" for a in measured]
        rows.append(
            [
                p.name,
                p.kind,
                p.how,
                pieces.spread(p.top1),
                f"{p.cost['parameters']:,.0f}",
                f"{p.cost['macs'] / 1e6:,.1f}",
                *figures,
            ]
        )
    return Table(
        columns, rows, note="* on the Pareto front: no other network here is better in both accuracy and this figure."
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def draw(points: Sequence[Point], on_front: Sequence[bool], folder: Path, name: str, axis: str) -> list[Figure]:
    """Accuracy against one cost, the front as a line."""
    with plots.canvas(
        folder, name, f"Accuracy against {AXES[axis][1].split(' (')[0]}; the line is the Pareto front"
    ) as (_, axes, saved):
        chosen = sorted((p.cost[axis], 100 * p.top1.value) for p, on in zip(points, on_front, strict=True) if on)
        axes.plot(*zip(*chosen, strict=True), color=plots.GREEN, linewidth=1.4, zorder=1, label="Pareto front")
        for kind, (colour, marker) in KINDS.items():
            mine = [p for p in points if p.kind == kind]
            if mine:
                xs, ys = [p.cost[axis] for p in mine], [100 * p.top1.value for p in mine]
                axes.plot(xs, ys, marker, color=colour, label=kind, markersize=6)
        axes.set_xscale("log")
        _plain_ticks(axes)
        axes.set_xlabel(AXES[axis][1])
        axes.set_ylabel("test top-1 (%)")
        axes.margins(0.12)
        axes.legend(loc="best")
        plots.label_points(axes, [(p.cost[axis], 100 * p.top1.value, p.name) for p in points], size=7.5)
    return saved


def _plain_ticks(axes: Any) -> None:
    """1, 2, 5, 10 rather than powers, and no minor labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
