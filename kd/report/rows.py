"""Run records as rows, grouped into cells: the same student, teacher, method and budget under several seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd import runs, stats, sweep
from kd.hints import UserError, did_you_mean
from kd.report import names


@dataclass
class Row:
    """One finished run."""

    run: runs.Run
    seed: int
    student: str
    family: str
    teacher: str
    teacher_family: str | None
    method: str
    dataset: str
    budget: str
    honest: bool  # its epoch was not chosen on the test set

    @property
    def metrics(self) -> dict[str, float]:
        """Of the record."""
        return self.run.record.get("metrics") or {}

    def get(self, name: str) -> float | None:
        """A metric, or None."""
        return self.metrics.get(name)

    @property
    def teacher_top1(self) -> float | None:
        """The teacher's test accuracy: measured with the student's, or as its own run has it."""
        own = (self.run.record.get("teacher") or {}).get("metrics") or {}
        return self.metrics.get("teacher/test/top1", own.get("test/top1"))


@dataclass
class Cell:
    """Rows that differ in nothing but the seed."""

    rows: list[Row]
    baseline: Cell | None = None  # the same student alone, at the same budget
    p_value: float | None = field(default=None)  # paired against the baseline, corrected

    @property
    def first(self) -> Row:
        """Any of them."""
        return self.rows[0]

    @property
    def alone(self) -> bool:
        """Whether there is no teacher."""
        return self.first.teacher == "none"

    @property
    def title(self) -> str:
        """Student, method and teacher."""
        row = self.first
        return f"{row.student} alone" if self.alone else f"{row.student} from {row.teacher} by {row.method}"

    def by_seed(self, name: str = "test/top1") -> dict[int, float]:
        """A metric of every seed that has it."""
        return {r.seed: r.metrics[name] for r in self.rows if r.metrics.get(name) is not None}

    def mean(self, name: str = "test/top1") -> stats.Estimate | None:
        """A metric over the seeds."""
        values = list(self.by_seed(name).values())
        return stats.mean(values) if values else None

    @property
    def gain(self) -> stats.Estimate | None:
        """Test top-1 over the baseline's, paired over seeds; None without common seeds."""
        if self.baseline is None or not self.by_seed().keys() & self.baseline.by_seed().keys():
            return None
        return stats.paired(self.by_seed(), self.baseline.by_seed())[0]


@dataclass
class Gathered:
    """All that a report is made of."""

    runs_dir: Path
    sweep: str | None
    cells: list[Cell]
    unfinished: list[runs.Run]
    manifests: list[dict[str, Any]]
    searches: list[dict[str, Any]]
    finished: list[runs.Run]  # those behind the cells, and their teachers

    def groups(self, of: Callable[[Cell], Any], keep: Callable[[Cell], bool] = lambda _: True) -> dict[Any, list[Cell]]:
        """Cells by what `of` gives."""
        found: dict[Any, list[Cell]] = {}
        for cell in filter(keep, self.cells):
            found.setdefault(of(cell), []).append(cell)
        return found


def gather(runs_dir: Path, name: str | None = None) -> Gathered:
    """Read the records below `runs_dir`, or those of a sweep, with their teachers and baselines.

    Raises UserError where there is nothing to read.
    """
    if not runs_dir.is_dir():
        raise UserError(f"runs_dir={runs_dir}: there is no such folder. Train something first: make demo")
    manifests = [m for p in sorted(runs_dir.glob("sweeps/*.json")) if (m := sweep.read(p))]
    searches = [m for p in sorted(runs_dir.glob("searches/*/search.json")) if (m := sweep.read(p))]
    every = runs.records(runs_dir)
    if name is not None:
        known = [m["name"] for m in [*manifests, *searches]]
        if name not in known:
            near = did_you_mean(name, known) or (f" There are: {', '.join(known)}" if known else " There are none yet")
            raise UserError(f"sweep={name}: {runs_dir} has no such sweep.{near}")
        manifests, searches = ([m for m in found if m["name"] == name] for found in (manifests, searches))
        every = _chosen(every, [*manifests, *searches])
    if not every and not manifests:
        raise UserError(f"runs_dir={runs_dir}: there is no run. Train something first: make demo")
    trials = {t["run"] for m in searches for t in m["trials"]} - {c["run"] for m in manifests for c in m["cells"]}
    finished = [r for r in every if r.done and "config" in r.record]
    rows = to_rows([r for r in finished if r.name not in trials])
    unfinished = [r for r in every if not r.done and r.name not in trials]
    return Gathered(runs_dir, name, to_cells(rows), unfinished, manifests, searches, finished)


def _chosen(every: Sequence[runs.Run], manifests: Sequence[dict[str, Any]]) -> list[runs.Run]:
    """The runs that manifests name, and the teachers and baselines of those."""
    wanted = {c["run"] for m in manifests for c in m.get("cells", m.get("trials", []))}
    by_name = {r.name: r for r in every}
    for name in list(wanted):
        record = by_name[name].record if name in by_name else {}
        wanted |= {(record.get("teacher") or {}).get("run"), (record.get("baseline") or {}).get("run")}
    return [r for r in every if r.name in wanted]


def to_rows(finished: Iterable[runs.Run]) -> list[Row]:
    """A row for each run, with names that tell them apart."""
    finished = list(finished)
    parts = {r.name: _parts(r.record) for r in finished}
    named = {
        "student": names.distinct((names.network(p["student"]), p["student"]) for p in parts.values()),
        "teacher": names.distinct((names.teacher(p["teacher"]), p["teacher"]) for p in parts.values()),
        "method": names.distinct((names.loss(p["method"]["loss"]), p["method"]) for p in parts.values()),
        "budget": names.distinct((_budget(p["budget"], p["images"]), p["budget"]) for p in parts.values()),
    }
    return [_row(r, parts[r.name], named) for r in finished]


def _parts(record: dict[str, Any]) -> dict[str, Any]:
    config = record["config"]
    augment = {k: v for k, v in config["augment"].items() if k != "teacher_view"}
    recipe = {k: v for k, v in config["recipe"].items() if k != "keep_epochs"}
    teacher = {k: v for k, v in config["teacher"].items() if k != "min_top1"}
    return {
        "student": {k: v for k, v in config["student"].items() if k != "family"},
        "teacher": teacher,
        "method": {"loss": config["loss"], "teacher_view": config["augment"].get("teacher_view", "same")},
        "budget": {"dataset": config["dataset"], "augment": augment, "recipe": recipe},
        "images": record.get("dataset", {}).get("train"),
    }


def _budget(budget: dict[str, Any], images: int | None) -> str:
    dataset, recipe = budget["dataset"], budget["recipe"]
    seen = f"{images} training images, " if images else ""
    return f"{dataset['name']}, {seen}{names.length(recipe)} of batch {recipe['batch_size']}"


def _row(run: runs.Run, parts: dict[str, Any], named: dict[str, dict[str, str]]) -> Row:
    config = run.record["config"]
    name = {role: table[names.key(parts[role])] for role, table in named.items()}
    return Row(
        run=run,
        seed=config["seed"],
        student=name["student"],
        family=config["student"].get("family", "other"),
        teacher=name["teacher"],
        teacher_family=config["teacher"].get("family"),
        method=name["method"] if config["teacher"]["name"] != "none" else "ce",
        dataset=config["dataset"]["name"],
        budget=name["budget"],
        honest=config["dataset"].get("select", "val") == "val",
    )


def to_cells(rows: Iterable[Row]) -> list[Cell]:
    """Cells in a stable order, each with its baseline and the p-value of the comparison with it.

    It is corrected for the comparisons of its study: those at one budget (data, augmentation and recipe).
    """
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.budget, row.student, row.teacher, row.method), []).append(row)
    cells = [Cell(sorted(g, key=lambda r: r.seed)) for _, g in sorted(grouped.items())]
    alone = {(c.first.budget, c.first.student): c for c in cells if c.alone}
    studies: dict[str, list[Cell]] = {}
    for cell in cells:
        if not cell.alone:
            cell.baseline = alone.get((cell.first.budget, cell.first.student))
            if cell.gain is not None:
                studies.setdefault(cell.first.budget, []).append(cell)
    for tested in studies.values():
        found = [stats.paired(c.by_seed(), c.baseline.by_seed())[1] for c in tested]
        for cell, p in zip(tested, stats.holm(found), strict=True):
            cell.p_value = p
    return cells
