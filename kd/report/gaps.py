"""Question 6: what is missing or failed, and the command that would fill it."""

from __future__ import annotations

import shlex

from kd.report.pieces import Section, Table
from kd.report.rows import Gathered


def sections(gathered: Gathered) -> list[Section]:
    """Cells of sweeps that are not done, other runs that are not, and baselines that are missing."""
    tables, commands = [], []
    for manifest in gathered.manifests:
        status = {r.name: r for r in gathered.unfinished}
        done = {r.name for r in gathered.finished}
        open_cells = [c for c in manifest["cells"] if c["run"] not in done]
        if open_cells:
            rows = [[c["label"], *_state(c, status)] for c in open_cells]
            title = f"sweep {manifest['name']}: {len(open_cells)} of {len(manifest['cells'])} cells not done"
            tables.append(Table(["cell", "state", "reason"], rows, title=title))
            commands.append(manifest["command"])
    listed = {c["run"] for m in gathered.manifests for c in m["cells"]}
    others = [r for r in gathered.unfinished if r.name not in listed]
    if others:
        rows = [[r.name, r.status or "", r.record.get("error") or ""] for r in others]
        tables.append(Table(["run", "state", "reason"], rows, title="other runs that are not done"))
        commands += [c for r in others if (c := r.record.get("command")) and c not in commands]
    alone = _without_baseline(gathered)
    if alone:
        tables.append(
            Table(
                ["student", "budget", "seeds", "command"],
                alone,
                title="students without themselves alone at the same budget",
            )
        )
    if not tables:
        return [Section("Missing or failed", ["Nothing: every run and every cell that was asked for is done."])]
    said = ["The commands below run what is missing again and skip what is done."] if commands else []
    return [Section("Missing or failed", said, tables, commands=commands)]


def _state(cell: dict, status: dict) -> list[str]:
    run = status.get(cell["run"])
    state = run.status if run is not None and not cell["error"] else cell["state"]
    return [state or "", cell["error"] or (run.record.get("error") if run is not None else "") or ""]


def alone(command: str) -> str:
    """The same command for the student alone: a setting of the teacher's would be refused there."""
    theirs = ("teacher=", "teacher.", "recipe@teacher.", "augment@teacher.")
    kept = [word for word in shlex.split(command) if not word.lstrip("+").startswith(theirs)]
    return shlex.join([*kept, "teacher=none"])


def _without_baseline(gathered: Gathered) -> list[list[str]]:
    found: dict[tuple[str, str], set[int]] = {}
    commands: dict[tuple[str, str], str] = {}
    for cell in gathered.cells:
        if not cell.alone:
            missing = cell.by_seed().keys() - (cell.baseline.by_seed().keys() if cell.baseline else set())
            if missing:
                key = (cell.first.student, cell.first.budget)
                found.setdefault(key, set()).update(missing)
                typed = cell.first.run.record.get("command")
                commands.setdefault(key, alone(typed) if typed else "the same command with teacher=none")
    return [[*key, ", ".join(map(str, sorted(seeds))), commands[key]] for key, seeds in sorted(found.items())]
