"""What a search found: its best settings, every trial, those stopped early; history, importance and slices as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.report import pieces, plots
from kd.report.pieces import Figure, Section, Table
from kd.report.rows import Gathered

FINISHED = ("done", "stopped")


def sections(gathered: Gathered, folder: Path) -> list[Section]:
    """One for each search."""
    return [_section(s, folder) for s in gathered.searches if s["trials"]]


def _section(search: dict[str, Any], folder: Path) -> Section:
    finished = [t for t in search["trials"] if t["state"] in FINISHED]
    section = Section(f"Search: {search['name']}", _sentences(search, finished), [_table(search)])
    section.figures = draw(search, folder, plots.file_name(search["name"]) + "_")
    section.commands = [search["command"]]
    return section


def _sentences(search: dict[str, Any], finished: Sequence[dict[str, Any]]) -> list[str]:
    counts = {s: sum(t["state"] == s for t in search["trials"]) for s in ("stopped", "failed", "killed", "running")}
    said = f"{pieces.plural(len(finished), 'trial')} finished"
    said += f", {counts['stopped']} of them stopped early by the median rule (marked; their value so far counts)"
    said += f"; {counts['failed']} failed, {counts['killed'] + counts['running']} cut off by a kill."
    lines = [said, "A trial is one seed: the best of many is an optimistic pick. Run it again under several seeds."]
    if finished and len(search["objectives"]) == 1:
        best = _best(search, finished)
        lines.insert(1, f"Best {search['objectives'][0]}: {best['values'][0]:.4f} at {' '.join(best['overrides'])}.")
    return lines


def _sign(search: dict[str, Any], at: int = 0) -> int:
    return 1 if search["directions"][at] == "maximize" else -1


def _best(search: dict[str, Any], finished: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(finished, key=lambda t: _sign(search) * t["values"][0])


def _table(search: dict[str, Any]) -> Table:
    names = parameters(search["trials"])
    columns = ["trial", "state", *search["objectives"], *names, "run", "reason"]
    rows, greyed = [], set()
    for at, trial in enumerate(search["trials"]):
        values = [f"{v:.4f}" for v in trial.get("values", [])] or [""] * len(search["objectives"])
        state = "stopped early" if trial["state"] == "stopped" else trial["state"]
        why = trial.get("error") or trial.get("reason") or ""
        picked = settings(trial)
        rows.append([str(at + 1), state, *values, *(_short(picked.get(n, "")) for n in names), trial["run"] or "", why])
        if trial["state"] != "done":
            greyed.add(at)
    return Table(columns, rows, title="trials", greyed=greyed)


def settings(trial: dict[str, Any]) -> dict[str, str]:
    """Parameter -> value as it was typed."""
    return dict(o.lstrip("+").split("=", 1) for o in trial["overrides"])


def parameters(trials: Sequence[dict[str, Any]]) -> list[str]:
    """The parameters that the trials were given, in order."""
    return list(dict.fromkeys(n for t in trials for n in settings(t)))


def _short(value: str) -> str:
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def draw(search: dict[str, Any], folder: Path, prefix: str = "") -> list[Figure]:
    """History, importance and slices of one objective; the front of two."""
    finished = [t for t in search["trials"] if t["state"] in FINISHED]
    if not finished:
        return []
    if len(search["objectives"]) > 1:
        return _front(search, finished, folder, f"{prefix}front")
    found = _history(search, folder, f"{prefix}history")
    if search.get("importance"):
        found += _importance(search, folder, f"{prefix}importance")
    for name in parameters(finished):
        found += _slice(search, finished, name, folder, f"{prefix}slice_{plots.file_name(name)}")
    return found


def _scale(name: str) -> tuple[float, str]:
    rate = name.rsplit("/", 1)[-1] in ("top1", "top5", "ece", "agreement")
    return (100, f"{name} (%)") if rate else (1, name)


def _marks(axes: Any, xs: Sequence[float], ys: Sequence[float], trials: Sequence[dict[str, Any]]) -> None:
    for state, label, colour, marker in (
        ("done", "finished", plots.BLUE, "o"),
        ("stopped", "stopped early", plots.ORANGE, "x"),
    ):
        mine = [(x, y) for x, y, t in zip(xs, ys, trials, strict=True) if t["state"] == state]
        if mine:
            axes.plot(*zip(*mine, strict=True), marker, color=colour, label=label, markersize=6)


def _history(search: dict[str, Any], folder: Path, name: str) -> list[Figure]:
    factor, label = _scale(search["objectives"][0])
    numbered = [(at + 1, t) for at, t in enumerate(search["trials"]) if t["state"] in FINISHED]
    xs, ys = [n for n, _ in numbered], [factor * t["values"][0] for _, t in numbered]
    best, so_far = [], None
    for y in ys:
        so_far = y if so_far is None or _sign(search) * y > _sign(search) * so_far else so_far
        best.append(so_far)
    with plots.canvas(folder, name, f"History of the search: {label} of every trial", height=3.2) as (_, axes, saved):
        axes.step(xs, best, where="post", color=plots.GREEN, label="best so far")
        _marks(axes, xs, ys, [t for _, t in numbered])
        axes.set_xlabel("trial")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="best")
    return saved


def _importance(search: dict[str, Any], folder: Path, name: str) -> list[Figure]:
    shares = sorted(search["importance"].items(), key=lambda item: item[1])
    caption = "Importance: share of the objective's variance that a parameter explains (fANOVA)"
    with plots.canvas(folder, name, caption, height=1.1 + 0.35 * len(shares)) as (_, axes, saved):
        axes.barh([n for n, _ in shares], [100 * v for _, v in shares], color=plots.BLUE)
        for at, (_, value) in enumerate(shares):
            axes.text(100 * value, at, f" {100 * value:.0f}", va="center", fontsize=9)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of the variance (%)")
        axes.margins(x=0.12)
    return saved


def _slice(
    search: dict[str, Any], finished: Sequence[dict[str, Any]], name: str, folder: Path, file: str
) -> list[Figure]:
    factor, label = _scale(search["objectives"][0])
    picked = [(settings(t)[name], t) for t in finished if name in settings(t)]
    try:
        xs: list[Any] = [float(v) for v, _ in picked]
        spread = min(xs) > 0 and max(xs) / min(xs) > 8
    except ValueError:
        xs, spread = [v for v, _ in picked], False
    with plots.canvas(folder, file, f"{label} against {name}", height=2.9) as (_, axes, saved):
        _marks(axes, xs, [factor * t["values"][0] for _, t in picked], [t for _, t in picked])
        if spread:
            axes.set_xscale("log")
        axes.set_xlabel(name + (" (log scale)" if spread else ""))
        axes.set_ylabel(label)
        axes.legend(loc="best")
    return saved


def _front(search: dict[str, Any], finished: Sequence[dict[str, Any]], folder: Path, name: str) -> list[Figure]:
    from kd import stats

    (y_factor, y_label), (x_factor, x_label) = map(_scale, search["objectives"])
    points = [(x_factor * t["values"][1], y_factor * t["values"][0]) for t in finished]
    signed = [(-_sign(search, 1) * x, _sign(search, 0) * y) for x, y in points]
    front = sorted(p for p, on in zip(points, stats.pareto(signed), strict=True) if on)
    with plots.canvas(folder, name, f"{y_label} against {x_label}; the line is the Pareto front") as (_, axes, saved):
        axes.plot(*zip(*front, strict=True), color=plots.GREEN, label="Pareto front", zorder=1)
        _marks(axes, [x for x, _ in points], [y for _, y in points], finished)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(loc="best")
    return saved
