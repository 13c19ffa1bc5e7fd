"""What a sweep is about to do: its cells, what is done already, and how long the rest will take."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kd.config import Config, settle
from kd.runs import Run

PROBE_SECONDS = 15.0  # for all probes of a plan; pairs beyond that are given the mean of the probed ones
OVERHEAD_SECONDS = 2.0  # of a run beside its steps: opening, validation, test, tracker
ERRORS = (ValueError, KeyError, OSError, NotImplementedError)


@dataclass
class Cell:
    """One run of a sweep: the overrides that make it, and what runs_dir says about it."""

    overrides: tuple[str, ...]
    label: str = ""
    config: Config | None = None  # resolved
    dataset: Any = None
    run: Run | None = None
    fingerprint: str | None = None
    teacher: Run | None = None  # where the teacher is a run of this runs_dir
    problem: str | None = None  # why it cannot run, or why it failed
    seconds: float | None = None  # estimated

    @property
    def state(self) -> str:
        """done, failed, diverged, interrupted, running or new; failed too where it cannot even be looked up."""
        if self.problem:
            return self.run.status if self.run and self.run.status == "diverged" else "failed"
        return (self.run.status if self.run else None) or "new"

    @property
    def pending(self) -> bool:
        """Whether it is to be run."""
        return self.run is not None and (not self.run.done or self.config.fresh)

    def refresh(self) -> None:
        """Read the record again."""
        if self.run is not None:
            self.run = Run(self.run.folder)


def look_up(cell: Cell, compose: Callable[[Sequence[str]], Any], typed: Sequence[str]) -> Cell:
    """Fill in the cell's settings, fingerprint, place and teacher; what stands against it becomes its `problem`."""
    from kd import prepare, runs
    from kd.hints import UserError

    try:
        cfg = settle(without_hydra(compose(cell.overrides)), typed, strict=False)
        cell.dataset = prepare.open_dataset(cfg)
        cell.config = cfg = prepare.resolve(cfg, cell.dataset)
        cell.fingerprint = runs.fingerprint(runs.identity(cfg, cell.dataset.digest))
        cell.run = runs.place(cfg, cell.fingerprint)
        cell.teacher = teacher_run(cfg)
    except (UserError, *ERRORS) as error:
        cell.problem = one_line(error)
    except Exception as error:
        from kd.cli import explain

        if not type(error).__module__.startswith(("hydra", "omegaconf")):
            raise
        cell.problem = explain(error)
    return cell


def without_hydra(composed: Any) -> Any:
    """The job's part of a configuration."""
    from omegaconf import flag_override

    with flag_override(composed, ["readonly", "struct"], [False, False]):
        del composed["hydra"]
    return composed


def teacher_run(cfg: Config) -> Run | None:
    """The run that a cell's teacher is, whether or not it is there yet; None for no teacher, files and ensembles."""
    from kd import prepare, runs, teacher

    if cfg.teacher.name == "none" or cfg.teacher.checkpoint != "auto" or cfg.teacher.members:
        return None
    alone = teacher.teacher_config(cfg)
    dataset = prepare.open_dataset(alone)
    alone = prepare.resolve(alone, dataset)
    return runs.place(alone, runs.fingerprint(runs.identity(alone, dataset.digest)))


def one_line(error: BaseException) -> str:
    """An error's text without its type, on one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def distinct(cells: Sequence[Cell]) -> list[Cell]:
    """One cell for each run; cells that could not be looked up all stay."""
    seen: set[str] = set()
    kept = []
    for cell in cells:
        if cell.run is None or cell.run.name not in seen:
            kept.append(cell)
        if cell.run is not None:
            seen.add(cell.run.name)
    return kept


def ordered(cells: Sequence[Cell]) -> list[Cell]:
    """Baselines first, then one cell for each teacher so that all of them get trained, then the rest."""
    seen: set[str] = set()

    def rank(cell: Cell) -> int:
        if cell.config is None or cell.config.teacher.name == "none":
            return 0
        name = cell.teacher.name if cell.teacher else ""
        first = bool(name) and name not in seen
        seen.add(name)
        return 1 if first else 2

    return sorted(cells, key=rank)


def estimate(cells: Sequence[Cell], at_once: int = 1) -> float:
    """Seconds for the cells that are to be run and the teachers that they need, `at_once` of them side by side."""
    from kd import prepare, teacher

    rates: dict[str, float] = {}
    teachers, total = set(), 0.0
    jobs: list[tuple[Cell | None, Config, Any]] = []
    for cell in (c for c in cells if c.pending):
        jobs.append((cell, cell.config, cell.dataset))
        if cell.teacher is not None and not cell.teacher.done and cell.teacher.name not in teachers:
            teachers.add(cell.teacher.name)
            alone = teacher.teacher_config(cell.config)
            dataset = prepare.open_dataset(alone)
            jobs.append((None, prepare.resolve(alone, dataset), dataset))
    started = time.perf_counter()
    for cell, cfg, dataset in jobs:
        key = _pair(cfg)
        if not rates or (key not in rates and time.perf_counter() - started < PROBE_SECONDS):
            rates[key] = probe(cfg, dataset)
        rate = rates[key] if key in rates else sum(rates.values()) / len(rates)
        seconds = _length(cfg, dataset, rate)
        total += seconds
        if cell is not None:
            cell.seconds = seconds
    return total / max(1, at_once)


def _pair(cfg: Config) -> str:
    """What a step's time depends on."""
    teacher = replace(cfg.teacher, epoch=None, seed=0)
    data = (cfg.dataset.name, cfg.dataset.image_size)
    return repr((cfg.student, teacher, cfg.loss, cfg.recipe.batch_size, cfg.augment, data))


def _length(cfg: Config, dataset: Any, step_seconds: float) -> float:
    recipe = cfg.recipe
    if recipe.minutes:
        return 60 * recipe.minutes + OVERHEAD_SECONDS
    steps = recipe.steps or math.ceil((recipe.epochs or 1) * dataset.train.steps(recipe.batch_size))
    return steps * step_seconds + OVERHEAD_SECONDS


class Scratch(Run):
    """A run that leaves no trace."""

    def __init__(self):
        self.folder, self.record = None, {}

    def update(self, **values: Any) -> None:
        """Keep the values in memory."""
        self.record.update(values)


def probe(cfg: Config, dataset: Any, warm: int = 1, timed: int = 3) -> float:
    """Seconds of a training step: the fastest of a few, with a teacher of random weights in the teacher's place."""
    from kd import device, prepare, runs
    from kd.loop import timed_steps

    where = device.pick_device(cfg.device)
    device.set_up(where, cfg.threads)
    cfg = replace(cfg, teacher=replace(cfg.teacher, cache="off"), recipe=replace(cfg.recipe, compile="off"))
    scratch = Scratch()
    scratch.record["environment"] = {**runs.environment(where)}
    try:
        training = prepare.assemble(cfg, dataset, _stand_in(cfg, dataset, where), where, scratch, lambda _: None)
        return min(timed_steps(training, dataset.train, warm + timed)[warm:])
    except (RuntimeError, TypeError, AttributeError, *ERRORS):
        return 0.05  # the cell itself will say what is wrong with it


def _stand_in(cfg: Config, dataset: Any, where: str) -> Any:
    """An untrained teacher of the same build."""
    from dataclasses import asdict

    from kd import device, models, teacher

    if cfg.teacher.name == "none":
        return None
    spec = {**asdict(cfg.teacher), "pretrained": False}
    classifier = models.build(spec, dataset.num_classes, dataset.image_size, dataset.channels, classes=dataset.classes)
    half = device.resolve_precision(cfg.recipe.precision, where, classifier) == "bf16"
    return teacher.Loaded(teacher.freeze(classifier, where, half), {})


def show(name: str, cells: Sequence[Cell], asked: int, seconds: float | None, at_once: int) -> None:
    """The table of cells, what is done, what is not, and the time it will take."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"sweep {name}", title_justify="left")
    for column in ("cell", "run", "state", "about"):
        table.add_column(column, justify="right" if column == "about" else "left", overflow="fold")
    for cell in cells:
        about = f"{cell.seconds:.0f} s" if cell.seconds else ""
        state = f"failed: {cell.problem}" if cell.problem else cell.state
        table.add_row(cell.label, cell.run.name if cell.run else "", state, about)
    Console(width=None if os.isatty(1) else 150).print(table)
    todo = [c for c in cells if c.pending]
    teachers = {c.teacher.name for c in todo if c.teacher is not None and not c.teacher.done}
    equal = f" ({asked} asked for, equal ones run once)" if asked != len(cells) else ""
    done = sum(not c.pending and not c.problem for c in cells)
    first = f", {len(teachers)} teacher{'s' * (len(teachers) > 1)} to train first" if teachers else ""
    beside = f", {at_once} at once" if at_once > 1 else ""
    span = f"; about {_span(seconds)}{beside}" if seconds is not None and todo else ""
    print(f"{len(cells)} cells{equal}: {done} done, {len(todo)} to run{first}{span}", flush=True)


def _span(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds > 90 else f"{seconds:.0f} s"
