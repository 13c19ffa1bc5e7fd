"""A sweep: cells that are planned, run, survived and recorded. Behind `python -m kd.train -m ...`.

A sweep's YAML has parameters and cells in `hydra.sweeper`; the runs are the product of the parameters (Hydra's syntax:
`seed: 0,1,2`) with every cell (a set of overrides, values again in Hydra's syntax). What is typed wins over both.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from kd.hints import Interrupted, UserError

FORMAT = 1  # of runs_dir/sweeps/NAME.json
OURS = {
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper": "hydra_plugins.kd.CellSweeper",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper": "hydra_plugins.kd.TrialSweeper",
}


class Take(Callback):
    """Puts our sweepers in the place of Hydra's own, whose end at the first failure or restart we do not want."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Before the sweeper is made."""
        from omegaconf import flag_override

        from kd.sweep import sweepers

        sweepers.register()
        target = config.hydra.sweeper._target_
        if target in OURS:
            with flag_override(config.hydra, ["readonly", "struct"], [False, False]):
                config.hydra.sweeper._target_ = OURS[target]


class SweepError(UserError):
    """Some cells failed."""


def expand(params: dict[str, Any], cells: Sequence[dict[str, Any]], arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of every run: each cell times each combination of parameters; a typed key wins over both."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from kd.config import rewrite

    expanded = []
    for cell in cells:
        given = [rewrite(f"{k}={literal(v)}") for k, v in {**params, **cell}.items()]
        parsed = OverridesParser.create().parse_overrides([*given, *arguments])
        expanded += [tuple(o) for o in BasicSweeper.split_arguments(parsed, None)[0]]
    return expanded


def literal(value: Any) -> str:
    """A YAML value in Hydra's override syntax; a text is that already."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) or not isinstance(value, Sequence):
        return str(value)
    return "[" + ",".join(literal(v) for v in value) + "]"


def labels(expanded: Sequence[Sequence[str]]) -> list[str]:
    """For each run the overrides that tell it from the others, without those that follow from one before them."""
    holders: dict[str, set[int]] = {}
    for at, overrides in enumerate(expanded):
        for override in overrides:
            holders.setdefault(override, set()).add(at)

    def telling(overrides: Sequence[str]) -> list[str]:
        varied = [o for o in overrides if len(holders[o]) < len(expanded)]
        return [o for at, o in enumerate(varied) if not any(holders[p] <= holders[o] for p in varied[:at])]

    def plain(override: str) -> str:
        return override.lstrip("+").replace("recipe@teacher.recipe", "teacher.recipe")

    return [" ".join(plain(o) for o in telling(run)) for run in expanded]


def run(
    expanded: Sequence[tuple[str, ...]], arguments: Sequence[str], config: Any, launcher: Any, context: Any
) -> list[Any]:
    """Plan the runs, launch what is not done, write the manifest, and sum up; gives the cells.

    Raises SweepError at the end where a cell failed.
    """
    from kd.check.look import look_over
    from kd.sweep import plan

    at_once = jobs_at_once(config)
    name = config.sweep_name or "adhoc-" + hashlib.sha256(repr(sorted(arguments)).encode()).hexdigest()[:8]
    extra = extras(config, name, at_once)
    composer = Composer(context.config_loader, config)
    asked = [plan.Cell((*o, *extra), label) for o, label in zip(expanded, labels(expanded), strict=True)]
    cells = plan.ordered(plan.distinct([plan.look_up(c, composer, arguments) for c in asked]))
    seconds = plan.estimate(cells, at_once)
    plan.show(name, cells, len(asked), seconds, at_once)
    if config.dry:
        look_over(cells)
        return check(cells)
    manifest = Manifest(Path(config.runs_dir), name, command(arguments, config))
    manifest.write(cells)
    try:
        for finished in launch([c for c in cells if c.pending], launcher, context, composer):
            for cell, job in finished:
                note(cell, job)
            manifest.write(cells)
    except (Interrupted, KeyboardInterrupt, SystemExit):
        look_again(cells)
        done = sum(c.run is not None and c.run.done for c in cells)
        print(
            f"sweep {name}: {done} of {len(cells)} cells done. The same command goes on:\n  {manifest.command}",
            flush=True,
        )
        raise
    finally:
        look_again(cells)
        manifest.write(cells)
    sum_up(name, cells, manifest)
    return cells


def check(cells: Sequence[Any]) -> Sequence[Any]:
    """The cells again, or SweepError for those that cannot run."""
    broken = [c for c in cells if c.problem]
    if broken:
        raise SweepError(f"{len(broken)} of {len(cells)} cells cannot run:\n{listed(broken)}")
    return cells


def listed(cells: Sequence[Any]) -> str:
    """Each reason once, with the cells that it stopped."""
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        reasons.setdefault(cell.problem, []).append(cell.label or " ".join(cell.overrides))
    return "\n".join(f"  {', '.join(labels)}: {problem}" for problem, labels in reasons.items())


def jobs_at_once(config: Any) -> int:
    """How many runs the launcher has side by side on this machine."""
    n_jobs = config.hydra.launcher.get("n_jobs", 1)
    return n_jobs if n_jobs and n_jobs > 0 else cores()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def extras(config: Any, name: str, at_once: int) -> list[str]:
    """What every run is told beside its own overrides: the sweep's name, and its share of the cores."""
    share = [f"threads={max(1, cores() // at_once)}"] if at_once > 1 and config.threads is None else []
    return [*share, *([] if config.sweep_name else [f"sweep_name={name}"])]


class Composer:
    """Hydra's config loader, which composes every run of a sweep once only: a composition takes some 0.2 s."""

    def __init__(self, loader: Any, master: Any):
        self.loader, self.master, self.memory = loader, master, {}

    def __call__(self, overrides: Sequence[str]) -> Any:
        """The run's configuration."""
        return self.load_sweep_config(self.master, list(overrides))

    def load_sweep_config(self, master_config: Any, sweep_overrides: list[str]) -> Any:
        """As Hydra's loader has it."""
        key = tuple(sweep_overrides)
        if key not in self.memory:
            self.memory[key] = self.loader.load_sweep_config(master_config, sweep_overrides)
        return copy.deepcopy(self.memory[key])


def launch(pending: Sequence[Any], launcher: Any, context: Any, composer: Composer) -> Iterator[list[tuple[Any, Any]]]:
    """Run cells, one after the other in this process, or all at once where the launcher has processes of its own.

    Yields cells with what Hydra's launcher returned for them.
    """
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher
    from hydra.types import HydraContext

    batches = [list(pending)] if pending else []
    if isinstance(launcher, BasicLauncher):
        launcher.hydra_context = HydraContext(config_loader=composer, callbacks=context.callbacks)
        batches = [[c] for c in pending]
    started = 0
    for batch in batches:
        for at, cell in enumerate(batch, started + 1):
            print(f"[{at}/{len(pending)}] {cell.label}", flush=True)
        returns = launcher.launch([list(c.overrides) for c in batch], initial_job_idx=started)
        started += len(batch)
        yield list(zip(batch, returns, strict=True))


def look_again(cells: Sequence[Any]) -> None:
    """A cell that could not be run because another process was at it may be done by now."""
    for cell in cells:
        cell.refresh()
        if cell.problem and cell.run is not None and cell.run.done:
            cell.problem = None


def note(cell: Any, job: Any) -> None:
    """Keep what became of a cell."""
    from hydra.core.utils import JobStatus

    from kd import cli
    from kd.sweep import plan

    cell.refresh()
    if job.status == JobStatus.FAILED:
        error = job._return_value  # reading return_value would raise it
        cell.problem = plan.one_line(error)
        cli.report(error)
    elif not cell.run.done:
        cell.problem = cell.run.record.get("error") or f"it ended as {cell.run.status}"


class Manifest:
    """runs_dir/sweeps/NAME.json: which runs a sweep asked for, and why some are not there. Written whole."""

    def __init__(self, runs_dir: Path, name: str, command: str):
        self.path, self.name, self.command = runs_dir / "sweeps" / f"{name}.json", name, command
        self.earlier = (read(self.path) or {}).get("cells", [])

    def write(self, cells: Sequence[Any]) -> None:
        """The cells of this command, and done ones of earlier commands under this name."""
        from kd import files, runs

        rows = [_row(c) for c in cells]
        names = {r["run"] for r in rows}
        rows += [r for r in self.earlier if r["state"] == "done" and r["run"] not in names]
        value = {"format": FORMAT, "name": self.name, "command": self.command, "updated": runs.now(), "cells": rows}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(self.path, value)
        except OSError as error:
            place = f"cannot write to runs_dir={self.path.parents[1]}: {error.strerror}"
            raise UserError(f"{place}. Type runs_dir=ANOTHER_FOLDER") from error


def _row(cell: Any) -> dict[str, Any]:
    return {
        "label": cell.label,
        "run": cell.run.name if cell.run else None,
        "folder": str(cell.run.folder) if cell.run else None,
        "teacher": cell.teacher.name if cell.teacher else None,
        "fingerprint": cell.fingerprint,
        "overrides": list(cell.overrides),
        "state": cell.state,
        "error": cell.problem,
    }


def read(path: Path) -> dict[str, Any] | None:
    """A manifest, or None where there is none that can be read."""
    import json

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def command(arguments: Sequence[str], config: Any) -> str:
    """What the user typed, ready to be typed again."""
    hydra = [o for o in config.hydra.overrides.hydra if not o.startswith("hydra.mode=")]
    return shlex.join(["python", "-m", "kd.train", "-m", *hydra, *arguments])


def sum_up(name: str, cells: Sequence[Any], manifest: Manifest) -> None:
    """How it ended; SweepError where not every cell is done."""
    failed = [c for c in cells if c.problem]
    sys.stdout.flush()
    then = f"python -m kd.report sweep={name} runs_dir={manifest.path.parents[1]}"
    print(f"sweep {name}: {len(cells) - len(failed)} of {len(cells)} cells done. Report: {then}")
    if failed:
        reasons = listed(failed)
        raise SweepError(
            f"{len(failed)} of {len(cells)} cells failed:\n{reasons}\n"
            f"The same command runs these again and skips the others:\n  {manifest.command}"
        )
