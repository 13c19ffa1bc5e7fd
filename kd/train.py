"""The main job: fine-tune the teacher if need be, distil, evaluate, measure.

python -m kd.train teacher=vit_b student=resnet18       fine-tune the teacher if need be, distil, evaluate, benchmark
python -m kd.train teacher=none student=resnet18        the same student, without a teacher
python -m kd.train +experiment=NAME                     settings from conf/experiment/NAME.yaml, or --config-dir DIR
python -m kd.train -m seed=0,1,2                        several runs; +sweep=NAME and +search=NAME are ready ones
python -m kd.evaluate run=RUN_DIR out=FILE.json         score a finished run
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import cli
from kd.config import Config
from kd.hints import Interrupted

if TYPE_CHECKING:
    from kd.loop import Training
    from kd.runs import Run


def main() -> None:
    """`python -m kd.train` and `kd-train`."""
    cli.entry("train", job, __doc__)


def job(cfg: Config) -> Any:
    """One run; gives the value of `objective`, which a search looks at: of a trial stopped early, its value so far."""
    from kd import search
    from kd.loop import GaveUpError

    try:
        finished = run(cfg)
    except GaveUpError as error:
        print(f"{error.args[0]}: {cfg.objective} so far counts", flush=True)
        finished = error.run
    return search.objective(cfg, finished) if cfg.sweep_name and not cfg.dry else None


def run(cfg: Config, wait: bool = False, say: Callable[[str], None] = print) -> Run:
    """Train what `cfg` says, or go on with it, or find it done; gives the finished run.

    With `wait` a run that another process works on is waited for. Raises UserError for what the user can mend.
    """
    finished = _run(cfg, wait, say)
    if cfg.teacher.name != "none" and not cfg.dry:
        compare_with_baseline(cfg, finished, say)
    return finished


def _run(cfg: Config, wait: bool = False, say: Callable[[str], None] = print) -> Run:
    from kd import cache, device, losses, prepare, runs

    where = device.pick_device(cfg.device)
    device.set_up(where, cfg.threads)
    cache.cacheable(cfg.teacher.cache, losses.build(cfg.loss))  # a mistake in it shows before anything is loaded
    runs.prepare(Path(cfg.runs_dir))
    dataset = prepare.open_dataset(cfg)
    cfg = prepare.resolve(cfg, dataset)
    settings = runs.identity(cfg, dataset.digest)
    this = runs.place(cfg, runs.fingerprint(settings))
    if cfg.dry:
        say(f"{this.folder}: {this.status or 'new'}")
        if cfg.teacher.name != "none" and not this.done:
            from kd import check

            check.short(cfg, dataset, where, say)
        return this
    with runs.lock(this, wait, say):
        if this.done and not cfg.fresh:
            say(f"done already: {this.folder} ({headline(this.record)}). fresh=true repeats it")
            _tidy(this)
            return this
        if cfg.fresh and (old := this.set_aside()):
            say(f"the old run is now {old}")
        _carry_out(cfg, settings, this, dataset, where, say)
    return this


def _carry_out(cfg: Config, settings: dict, this: Run, dataset: Any, where: str, say: Callable[[str], None]) -> None:
    """A run from its record's first line to its last; whatever stops it is written into the record."""
    from kd import prepare, runs, tracking

    _open_folder(this, cfg, settings, dataset, where)
    try:
        with _phases(this) as phase:
            teacher = None
            if cfg.teacher.name != "none":
                with phase("teacher"):
                    teacher = ready_teacher(cfg, dataset, where, this, say)
            with phase("setup"):
                training = prepare.assemble(cfg, dataset, teacher, where, this, say)
            with tracking.open_tracker(this, cfg) as tracker:
                with phase("train"):
                    _train(cfg, training, dataset, this, tracker, say)
                with phase("evaluate"):
                    _evaluate(training, dataset, teacher, this)
                tracking.publish(tracker, this, teacher, lambda: _predictions(this, teacher, dataset, where))
        this.update(status="done", finished=runs.now(), tracker=tracker.where)
        _tidy(this)
        say(f"{this.folder}: {headline(this.record)}" + (f"\n{tracker.where}" if tracker.where else ""))
    except BaseException as error:
        _note_failure(this, error)
        error.run = this
        raise


def ready_teacher(cfg: Config, dataset: Any, where: str, this: Run, say: Callable[[str], None]) -> Any:
    """The frozen teacher, checked and scored through the path it teaches by."""
    from kd import check, device, prepare, teacher
    from kd.check import diagnose, finding

    check.before_teacher(cfg, dataset)
    loaded = teacher.obtain(cfg, dataset, _run, say)
    teacher.check_classes(loaded.classifier, dataset, f"the teacher {cfg.teacher.name}")
    half = device.resolve_precision(cfg.recipe.precision, where, loaded.classifier) == "bf16"
    prepare.require_same_precision(this, half)
    loaded.classifier = teacher.freeze(loaded.classifier, where, half)
    figures, findings = diagnose.once(loaded, dataset, cfg, where, half)
    this.update(teacher={**loaded.source, "name": cfg.teacher.name, "precision": "bf16" if half else "fp32", **figures})
    say(check.teacher_line(cfg, figures))
    finding.stop(findings, say)
    return loaded


def _train(cfg: Config, training: Training, dataset: Any, this: Run, tracker: Any, say: Callable[[str], None]) -> None:
    """Fit from the last checkpoint on, with metrics to the tracker."""
    from kd import metrics, search, signals
    from kd.checkpoint import Checkpoints
    from kd.console import Console
    from kd.loop import fit

    checkpoints = Checkpoints(this.folder / "checkpoints")
    state = checkpoints.load_training(say)
    if state is not None:
        training.restore(state)
        say(f"going on from step {training.progress.step} of {training.steps}")
    split_name = cfg.dataset.select
    split = getattr(dataset, split_name)

    def validate(classifier: Any) -> dict[str, float]:
        classifier.eval()
        logits = metrics.logits_of(lambda images: classifier(images).logits, split, training.device, training.autocast)
        return metrics.named(split_name, metrics.quick(logits, split.targets))

    tracker.resume(training.progress.step)
    with Console(cfg.student.name) as console, signals.noted() as stop:
        try:
            fit(
                training,
                validate if split is not None and len(split) else None,
                dataset.train,
                checkpoints,
                tracker,
                console,
                stop,
                search.give_up(cfg),
            )
        finally:
            this.record.get("teacher", {}).update(training.close())
            this.record.update(best=training.progress.best, train_seconds=training.progress.seconds)


def _evaluate(training: Training, dataset: Any, teacher: Any, this: Run) -> None:
    """One pass over the test set for `best` and one for `last`, float32; what the student costs."""
    from kd import card, metrics, models
    from kd.benchmark import speed
    from kd.checkpoint import Checkpoints

    checkpoints = Checkpoints(this.folder / "checkpoints")
    if not (checkpoints.folder / "best").is_dir():
        checkpoints.save("best", training.kept)  # without a validation split the last is the best
    found = {n: v for n, v in training.progress.best.items() if "/" in n}
    teacher_logits, per_class = None, {}
    if dataset.test is not None:
        if teacher is not None:
            teacher_logits = _teachers_logits(teacher, this, dataset, training.device)
        for name, prefix in (("best", "test"), ("last", "test_last")):
            classifier = models.load(checkpoints.folder / name)
            logits = _test_logits(classifier, dataset, training.device)
            found |= metrics.named(prefix, metrics.full(logits, dataset.test.targets, teacher_logits))
            if name == "best":
                per_class["student"] = metrics.per_class(metrics.confusion(logits, dataset.test.targets))
                if teacher_logits is not None:
                    found |= metrics.named("test", metrics.mistakes(logits, teacher_logits, dataset.test.targets))
        if teacher_logits is not None:
            per_class["teacher"] = metrics.per_class(metrics.confusion(teacher_logits, dataset.test.targets))
            found |= metrics.named("teacher/test", metrics.full(teacher_logits, dataset.test.targets))
    weights = checkpoints.folder / "best" / "model.safetensors"
    alone = this.record["sweep"] is None  # side by side nothing can be timed: the report does it, once for each network
    figures = speed.summary(models.load(weights.parent), weights, dataset, training.device, timed=alone)
    this.update(metrics=found, per_class=per_class, efficiency=figures)
    card.write(this)


def _predictions(this: Run, teacher: Any, dataset: Any, where: str) -> Any:
    """The table of test images that the tracker shows; None without a test split."""
    from kd import gallery, models

    if dataset.test is None:
        return None
    student = models.load(this.folder / "checkpoints" / "best")
    return gallery.predictions(student, teacher.classifier if teacher is not None else None, dataset, where)


def _test_logits(classifier: Any, dataset: Any, where: str) -> Any:
    from kd import metrics

    classifier = classifier.to(where).eval()
    return metrics.logits_of(lambda images: classifier(images).logits, dataset.test, where)


def _teachers_logits(teacher: Any, this: Run, dataset: Any, where: str) -> Any:
    """A teacher's answers on the test set, remembered in this process: a sweep has many students for one teacher."""
    key = (repr(teacher.source), repr(this.record["config"]["teacher"]), dataset.digest, where)
    if key in _HEARD:
        return _HEARD[key]
    logits = _test_logits(teacher.original, dataset, where)
    if logits.numel() < 10**7:
        _HEARD[key] = logits
    return logits


_HEARD: dict[tuple, Any] = {}


def compare_with_baseline(cfg: Config, finished: Run, say: Callable[[str], None]) -> None:
    """Say whether the student is better than the same student alone, which is found or trained first."""
    from kd import card, runs
    from kd.config import Teacher

    if cfg.baseline == "off" or "test/top1" not in finished.record.get("metrics", {}):
        return
    alone = dataclasses.replace(
        cfg, teacher=Teacher(name="none"), fresh=False, baseline="off", dry=cfg.baseline == "find"
    )
    found = _run(alone, wait=True, say=say if cfg.baseline == "train" else _silent)
    mine = finished.record["metrics"]["test/top1"]
    if not found.done:
        say(f"student {100 * mine:.1f} % on test. Not compared with the same student alone: baseline=train trains it")
        return
    other = found.record["metrics"]["test/top1"]
    word = "above" if mine > other else "below" if mine < other else "equal to"
    with runs.lock(finished, wait=True):
        finished.update(baseline={"run": found.name, "test/top1": other, "gain": mine - other, "verdict": word})
        card.write(finished)
    say(
        f"student {100 * mine:.1f} % on test, {word} the same student alone ({100 * other:.1f} %): {100 * (mine - other):+.1f} points, one seed"
    )


def _silent(_: str) -> None:
    """Say nothing."""


def headline(record: dict[str, Any]) -> str:
    """The figure that a run is known by."""
    metrics = record.get("metrics", {})
    for name in ("test/top1", "val/top1"):
        if name in metrics:
            return f"{name} {100 * metrics[name]:.1f} %"
    return record.get("status", "new")


def _open_folder(this: Run, cfg: Config, settings: dict, dataset: Any, where: str) -> None:
    """The run directory with its record, as running."""
    from kd import runs

    runs.prepare(this.folder)
    shape = {"image_size": dataset.image_size, "channels": dataset.channels}
    data = {"classes": dataset.classes, "digest": dataset.digest, **shape, "skipped": dataset.skipped}
    sizes = {n: len(s) for n in ("train", "val", "test") if (s := getattr(dataset, n)) is not None}
    this.update(
        format=runs.FORMAT,
        name=this.name,
        status="running",
        fingerprint=runs.fingerprint(settings),
        config=settings,
        places={
            "dataset.root": cfg.dataset.root,
            "teacher.checkpoint": cfg.teacher.checkpoint,
            "runs_dir": cfg.runs_dir,
        },
        sweep=cfg.sweep_name,
        command=_typed(),
        created=this.record.get("created", runs.now()),
        environment=runs.environment(where),
        dataset={**data, **sizes},
        seconds=this.record.get("seconds", {}),
    )
    this.record.pop("error", None)
    from omegaconf import OmegaConf

    from kd import files

    (this.folder / ".hydra").mkdir(exist_ok=True)
    files.write_text(
        this.folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(cfg)))
    )


def _typed() -> str | None:
    """The command that this process was started with, where it was kd.train: a report shows it for what is missing."""
    program = Path(sys.argv[0])
    ours = program.name == "kd-train" or program.parts[-2:] == ("kd", "train.py")
    return shlex.join(["python", "-m", "kd.train", *sys.argv[1:]]) if ours else None


@contextmanager
def _phases(this: Run):
    """Wall time by phase, added up over sittings."""

    @contextmanager
    def phase(name: str):
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = this.record.setdefault("seconds", {})
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    yield phase


def _note_failure(this: Run, error: BaseException) -> None:
    from kd.loop import DivergedError, GaveUpError

    kinds = {
        DivergedError: "diverged",
        GaveUpError: "stopped",
        (Interrupted, KeyboardInterrupt, SystemExit): "interrupted",
    }
    status = next((s for kind, s in kinds.items() if isinstance(error, kind)), "failed")
    if status == "stopped":
        this.record["metrics"] = {n: v for n, v in this.record["best"].items() if "/" in n}
    try:
        this.update(status=status, error=f"{type(error).__name__}: {error}")
    except OSError:
        print(f"warning: {this.folder}/run.json could not be written", flush=True)


def _tidy(this: Run) -> None:
    """Drop what only a resume needs; harmless when done twice."""
    from kd.checkpoint import Checkpoints

    Checkpoints(this.folder / "checkpoints").finish()


if __name__ == "__main__":
    main()
