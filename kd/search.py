"""A search that resumes: Optuna through Hydra's plugin, with a total number of trials over all sittings.

Trials left running by a kill are closed first, failed ones are told as failed, hopeless ones end early (median rule,
Golovin et al. 2017, "Google Vizier", sec. 3.3), and no point comes twice after a restart.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.hints import ConfigError, UserError, did_you_mean

if TYPE_CHECKING:
    from kd.config import Config
    from kd.runs import Run

FORMAT = 1  # of search.json
LOWER_IS_BETTER = ("nll", "ece", "latency_ms", "loss", "parameters", "macs", "size_mib", "teacher_kl")
TIMED = ("latency_ms", "images_per_s")
KILLED = "killed"  # mark of a trial that a kill left running: it does not count
STARTUP = 4  # finished trials before the median rule speaks
WARMUP = 0.2  # of a trial's length before the median rule may end it


def objective(cfg: Config, run: Run) -> float | list[float]:
    """The value of every metric that `objective` names, finite; a list for a list. UserError names what was logged."""
    names = [cfg.objective] if isinstance(cfg.objective, str) else list(cfg.objective)
    figures = _figures(run)
    if any(n.rsplit("/", 1)[-1] in TIMED and n not in figures for n in names):
        _time(run)
        figures = _figures(run)
    values = []
    for name in names:
        if name not in figures:
            near = did_you_mean(name, figures)
            raise UserError(f"objective '{name}' was never logged.{near} Logged: {', '.join(sorted(figures))}")
        if figures[name] is None or not math.isfinite(figures[name]):
            raise UserError(f"objective '{name}' is not a finite number: {figures[name]}")
        values.append(float(figures[name]))
    return values[0] if isinstance(cfg.objective, str) else values


def _figures(run: Run) -> dict[str, Any]:
    cost = run.record.get("efficiency") or {}
    numbers = {f"efficiency/{n}": v for n, v in cost.items() if isinstance(v, (int, float))}
    return {**(run.record.get("metrics") or {}), **numbers}


def _time(run: Run) -> None:
    """Time the run's best weights, for an objective that asks for it."""
    from kd import models
    from kd.benchmark import speed

    folder, data = run.folder / "checkpoints" / "best", run.record["dataset"]
    classifier = models.load(folder)
    figures = speed.measure(classifier, data["image_size"], classifier.built["in_channels"], "cpu")
    run.update(efficiency={**(run.record.get("efficiency") or {}), **figures})


def give_up(cfg: Config) -> Callable[[dict[str, float]], bool]:
    """Whether a trial should end after an epoch with these metrics, by `give_up` and the finished trials' curves.

    The median rule: its best value so far is worse than the median of theirs at the same epoch. It needs four finished
    trials that came so far, and leaves the first fifth of the run alone.
    """
    name = cfg.objective
    if cfg.give_up == "off" or not cfg.sweep_name or not isinstance(name, str) or not name.startswith("val/"):
        return lambda _: False
    sign = -1 if lower_is_better(name) else 1
    others = [best_so_far(c, sign) for c in finished_curves(Path(cfg.runs_dir), cfg.sweep_name, name)]
    mine: dict[float, float] = {}

    def hopeless(row: dict[str, float]) -> bool:
        if name not in row:
            return False
        mine[row["epoch"]] = sign * row[name]
        reached = [c[row["epoch"]] for c in others if row["epoch"] in c]
        early = cfg.recipe.epochs is not None and row["epoch"] < WARMUP * cfg.recipe.epochs
        return len(reached) >= STARTUP and not early and max(mine.values()) < statistics.median(reached)

    return hopeless


def lower_is_better(name: str) -> bool:
    """Whether less of a metric is more."""
    return name.rsplit("/", 1)[-1] in LOWER_IS_BETTER


def finished_curves(runs_dir: Path, sweep_name: str, name: str) -> list[dict[float, float]]:
    """epoch -> metric of every finished run of a search."""
    from kd import runs

    mine = (r for r in runs.records(runs_dir) if r.done and r.record.get("sweep") == sweep_name)
    return [curve(r.folder, name) for r in mine]


def curve(folder: Path, name: str) -> dict[float, float]:
    """epoch -> metric from a run's metrics.jsonl; broken lines are passed over."""
    found = {}
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                row = json.loads(line)
                if "epoch" in row and row.get(name) is not None:
                    found[row["epoch"]] = row[name]
    return found


def best_so_far(values: dict[float, float], sign: int = 1) -> dict[float, float]:
    """The running maximum of `sign` times a curve."""
    best, found = -math.inf, {}
    for epoch in sorted(values):
        best = max(best, sign * values[epoch])
        found[epoch] = best
    return found


def run(sweeper: Any, config: Any, arguments: Sequence[str]) -> None:
    """Go on with the study to its total number of trials, and write what it found."""
    from kd import sweep

    search = Search(sweeper, config, arguments)
    total = search.total
    with search.alone() as alone:
        study = search.open_study()
        if alone:
            close_running(study)
        print(
            f"search {search.name}: {len(counted(study))} of {total} trials there, storage {search.shown}", flush=True
        )
        if config.dry:
            return
        search.prepare(study, alone)
        try:
            while (left := total - len(counted(study))) > 0:
                sweeper.n_trials = min(left, sweeper.n_jobs)
                search.batch()
        finally:
            if alone:
                close_running(study)
            search.write(study, alone)
    search.conclude(study)
    failed = [t for t in search.rows() if t["state"] == "failed"]
    if not search.finished(study):
        raise sweep.SweepError(
            f"search {search.name}: no trial finished:\n  " + "\n  ".join(t["error"] for t in failed)
        )


def counted(study: Any) -> list[Any]:
    """The trials that count towards the total: all but those that a kill ended."""
    return [t for t in study.get_trials(deepcopy=False) if KILLED not in t.user_attrs]


def close_running(study: Any) -> int:
    """Tell Optuna that trials which nobody works on have failed, so that they do not stay running for ever."""
    from optuna.trial import TrialState

    left = [t for t in study.get_trials(deepcopy=False) if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    for trial in left:
        study._storage.set_trial_user_attr(trial._trial_id, KILLED, True)
        study.tell(trial.number, state=TrialState.FAIL)
    return len(left)


class Search:
    """One sitting of a study: the plugin's sweeper, its storage, and search.json with a row for every trial."""

    def __init__(self, sweeper: Any, config: Any, arguments: Sequence[str]):
        from kd import sweep

        self.sweeper, self.config, self.typed = sweeper, config, list(arguments)
        self.name = sweeper.study_name or config.sweep_name or "search"
        self.folder = Path(config.runs_dir) / "searches" / self.name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            place = f"cannot write to runs_dir={config.runs_dir}: {error.strerror}"
            raise UserError(f"{place}. Type runs_dir=ANOTHER_FOLDER") from error
        self.path = self.folder / "search.json"
        self.sitting, self.mine, self.total = secrets.token_hex(4), [], sweeper.n_trials
        self.command = sweep.command(arguments, config)
        self._settle(sweep)

    def _settle(self, sweep: Any) -> None:
        """The plugin's settings, made those that a search survives with."""
        s, config = self.sweeper, self.config
        s.study_name = self.name
        s.storage = s.storage or f"sqlite:///{self.folder.resolve() / 'study.db'}"
        self.shown = s.storage if isinstance(s.storage, str) else type(s.storage).__name__
        at_once = sweep.jobs_at_once(config)
        s.n_jobs = 1 if at_once == 1 else s.n_jobs
        s.max_failure_rate = 1.0
        s.config.hydra.sweep.dir = str(self.folder)
        self.directions = s._get_directions()
        self.objectives = [config.objective] if isinstance(config.objective, str) else list(config.objective)
        self._check_directions()
        s.params = {self._spelt(k): v for k, v in (s.params or {}).items()}
        self.arguments = [*self.typed, *sweep.extras(config, self.name, at_once)]
        self.plain_launcher, s.launcher = s.launcher, self

    def _spelt(self, key: str) -> str:
        """A parameter's key as Hydra takes it: with ++ where the configuration has no such argument yet."""
        from omegaconf import OmegaConf

        from kd.config import rewrite

        there = OmegaConf.select(self.config, key, throw_on_missing=False) is not None
        return key if there else rewrite(f"{key}=x").removesuffix("=x")

    def _check_directions(self) -> None:
        if len(self.directions) != len(self.objectives):
            raise ConfigError(
                f"objective has {len(self.objectives)} metrics, hydra.sweeper.direction {len(self.directions)}: "
                "expected one direction for each"
            )
        for name, direction in zip(self.objectives, self.directions, strict=True):
            if name.startswith("test"):
                raise ConfigError(
                    f"objective={name}: a search that looks at the test set spoils it. Type objective=val/top1"
                )
            wanted = "minimize" if lower_is_better(name) else "maximize"
            if direction != wanted:
                raise ConfigError(
                    f"direction={direction} would look for the worst {name}. Type hydra.sweeper.direction={wanted}"
                )

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no other process of this machine works on the search; holds it while inside."""
        from filelock import FileLock, Timeout

        guard = FileLock(self.folder / ".lock", timeout=0)
        try:
            guard.acquire()
        except Timeout:
            print("another process works on this search: both go on to the total together", flush=True)
            yield False
            return
        try:
            yield True
        finally:
            guard.release()

    def open_study(self) -> Any:
        """The study, new or as it was left."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        s = self.sweeper
        try:
            return optuna.create_study(
                study_name=s.study_name, storage=s.storage, directions=self.directions, load_if_exists=True
            )
        except ValueError as error:
            raise UserError(
                f"search {self.name}: {error}. Type sweep_name=ANOTHER_NAME to begin another study"
            ) from error

    def prepare(self, study: Any, alone: bool) -> None:
        """Another sampler seed after a restart, and beside others: with the same one Optuna proposes its first points again."""
        from hydra.utils import instantiate

        node = self.config.hydra.sweeper.sampler
        there = len(study.get_trials(deepcopy=False))
        salt = 0 if alone else int(self.sitting, 16)
        if (there or salt) and node.get("seed") is not None:
            self.sweeper.sampler = instantiate(node, seed=(int(node.seed) + 7919 * there + salt) % 2**32)

    def batch(self) -> None:
        """Some trials, through the plugin."""
        try:
            self.sweeper.sweep(self.arguments)
        except ValueError as error:
            if "Record does not exist" not in str(error):  # Optuna's way to say that no trial finished yet
                raise

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """What the plugin calls to run trials: they are noted before and after."""
        from hydra.core.utils import JobStatus

        from kd import cli, sweep
        from kd.sweep import plan

        composer = sweep.Composer(self.sweeper.hydra_context.config_loader, self.config)
        rows, before = [], len(self.rows())
        for overrides in job_overrides:
            cell = plan.look_up(plan.Cell(tuple(overrides)), composer, self.typed)
            picked = [o.lstrip("+") for o in overrides if o not in self.arguments]
            print(f"[trial {before + len(rows) + 1}] {' '.join(picked)}", flush=True)
            run = cell.run.name if cell.run else None
            rows.append({"overrides": picked, "run": run, "state": "running", "sitting": self.sitting})
        self.mine += rows
        self.write()
        returns = self.plain_launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        for row, job in zip(rows, returns, strict=True):
            if job.status == JobStatus.FAILED:
                cli.report(job._return_value)
                row.update(state="failed", error=plan.one_line(job._return_value))
            else:
                value = job.return_value
                run = self._record(row["run"])
                row.update(values=value if isinstance(value, list) else [value])
                row.update(state="stopped" if run.get("status") == "stopped" else "done")
                if row["state"] == "stopped":
                    row["reason"] = run.get("error")
        self.write()
        return returns

    def _record(self, name: str | None) -> dict[str, Any]:
        from kd import runs

        return (runs.read_record(Path(self.config.runs_dir) / name) if name else None) or {}

    def rows(self) -> list[dict[str, Any]]:
        """Those of search.json by other processes and earlier sittings, then this one's."""
        from kd import sweep

        there = (sweep.read(self.path) or {}).get("trials", [])
        return [r for r in there if r.get("sitting") != self.sitting] + self.mine

    def write(self, study: Any = None, alone: bool = False) -> None:
        """search.json; with the study also what it says of the parameters, and that nothing runs any more."""
        from filelock import FileLock

        with FileLock(self.folder / ".rows.lock"):
            self._write(study, alone)

    def _write(self, study: Any, alone: bool) -> None:
        from kd import files, runs

        trials = self.rows()
        for row in trials if alone else self.mine:
            if row["state"] == "running" and study is not None:
                row.update(state="killed")
        value = {
            "format": FORMAT,
            "name": self.name,
            "command": self.command,
            "updated": runs.now(),
            "objectives": self.objectives,
            "directions": self.directions,
            "total": self.total,
            "importance": importance(study, len(self.objectives)) if study is not None else {},
            "trials": trials,
        }
        files.write_json(self.path, runs.finite(value))

    def finished(self, study: Any) -> list[Any]:
        """Trials with a value."""
        from optuna.trial import TrialState

        return [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]

    def conclude(self, study: Any) -> None:
        """Say what was best, write it as an experiment, draw the plots."""
        from kd.report import trials

        finished = self.finished(study)
        if not finished:
            return
        best = [study.best_trial] if len(self.directions) == 1 else study.best_trials
        for at, trial in enumerate(best):
            name = f"{self.name}_best" + (f"_{at}" if len(best) > 1 else "")
            place = self.folder / "experiment" / f"{name}.yaml"
            write_experiment(place, trial, self)
            values = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.objectives, trial.values, strict=True))
            print(f"best: {values} at {', '.join(k.lstrip('+') + '=' + _short(v) for k, v in trial.params.items())}")
            print(f"  {place}: python -m kd.train --config-dir {self.folder} +experiment={name}")
        drawn = trials.draw(json.loads(self.path.read_text(encoding="utf-8")), self.folder / "plots")
        print(f"{len(finished)} trials finished; plots: {', '.join(str(f.png) for f in drawn)}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def importance(study: Any, objectives: int) -> dict[str, float]:
    """Share of the first objective's variance that each parameter explains (fANOVA, Hutter et al. 2014); may be empty."""
    import optuna
    from optuna.trial import TrialState

    done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if len(done) < 4 or len({t.values[0] for t in done}) < 2:
        return {}
    target = (lambda t: t.values[0]) if objectives > 1 else None
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
    except (ValueError, RuntimeError, ImportError, ZeroDivisionError):
        return {}
    return {k: float(v) for k, v in found.items() if math.isfinite(v)}


RESTING = ("runs_dir", "fresh", "dry", "device", "threads", "workers", "sweep_name", "give_up", "objective", "baseline", "tracker")  # fmt: skip


def write_experiment(place: Path, trial: Any, search: Search) -> None:
    """A trial's settings as an experiment: the choices of every group, and the values that differ from those."""
    import yaml
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from kd import files, sweep
    from kd.config import GROUPS

    loader, master = search.sweeper.hydra_context.config_loader, search.config
    picked = [f"{k}={v}" for k, v in trial.params.items()]
    kept = [o for o in search.arguments if o.partition("=")[0] not in trial.params]
    composer = sweep.Composer(loader, master)
    whole = composer([*kept, *picked])
    chosen = {g: c for g, c in whole.hydra.runtime.choices.items() if _of_ours(g, GROUPS) and c is not None}
    choices = [f"{g}={_choice(c)}" for g, c in chosen.items()]
    plain = loader.load_configuration(master.hydra.job.config_name, choices, RunMode.RUN)
    parts = []
    for composed in (whole, plain):
        tree = OmegaConf.to_container(composed, resolve=True)
        parts.append({k: v for k, v in tree.items() if k not in (*RESTING, "hydra")})
    body = {"defaults": [{f"override /{g}": c} for g, c in chosen.items()] + ["_self_"], **difference(*parts)}
    values = ", ".join(f"{n} {v:.4f}" for n, v in zip(search.objectives, trial.values, strict=True))
    head = f"# @package _global_\n# {search.name}: {values} (trial {trial.number})\n"
    place.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(place, head + yaml.safe_dump(body, sort_keys=False, allow_unicode=True))


def _of_ours(group: str, groups: Sequence[str]) -> bool:
    return group.split("@", maxsplit=1)[0] in groups and group.split("@", maxsplit=1)[0] not in (
        "experiment",
        "sweep",
        "search",
        "tracker",
    )


def _choice(choice: Any) -> str:
    return choice if isinstance(choice, str) else "[" + ",".join(map(str, choice)) + "]"


def difference(whole: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The part of a tree that another does not have, or has otherwise."""
    found: dict[str, Any] = {}
    for key, value in whole.items():
        if isinstance(value, dict) and isinstance(plain.get(key), dict):
            if below := difference(value, plain[key]):
                found[key] = below
        elif key not in plain or plain[key] != value:
            found[key] = value
    return found
