"""The main job: fine-tune the teacher if need be, distil, evaluate, measure.

    python -m kd.train teacher=vit_b student=resnet18       fine-tune the teacher if need be, distil, evaluate, benchmark
    python -m kd.train teacher=none student=resnet18        the same student, without a teacher
    python -m kd.train +experiment=NAME                     settings from conf/experiment/NAME.yaml, or --config-dir DIR
    python -m kd.train -m seed=0,1,2                        several runs; +sweep=NAME and +search=NAME are ready ones
    python -m kd.evaluate run=RUN_DIR out=FILE.json         score a finished run
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import cli
from kd.config import Config
from kd.hints import ConfigError, Interrupted, UserError

if TYPE_CHECKING:
    from kd.loop import Training
    from kd.runs import Run


def main() -> None:
    """`python -m kd.train` and `kd-train`."""
    cli.entry("train", job, __doc__)


def job(cfg: Config) -> float | None:
    """One run; gives the value of `objective`, which a search maximises."""
    record = run(cfg).record
    return record.get("metrics", {}).get(cfg.objective)


def run(cfg: Config, wait: bool = False, say: Callable[[str], None] = print) -> Run:
    """Train what `cfg` says, or go on with it, or find it done; gives the finished run.

    With `wait` a run that another process works on is waited for. Raises UserError for what the user can mend.
    """
    finished = _run(cfg, wait, say)
    if cfg.teacher.name != "none" and not cfg.dry:
        compare_with_baseline(cfg, finished, say)
    return finished


def _run(cfg: Config, wait: bool = False, say: Callable[[str], None] = print) -> Run:
    from kd import device, losses, runs

    where = device.pick_device(cfg.device)
    device.set_up(where, cfg.threads)
    losses.build(cfg.loss)  # a mistake in it shows before anything is loaded
    runs.prepare(Path(cfg.runs_dir))
    dataset = open_dataset(cfg)
    cfg = resolve(cfg, dataset)
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
    from kd import runs, tracking

    _open_folder(this, cfg, settings, dataset, where)
    try:
        with _phases(this) as phase:
            teacher = None
            if cfg.teacher.name != "none":
                with phase("teacher"):
                    teacher = ready_teacher(cfg, dataset, where, this, say)
            with phase("setup"):
                training = assemble(cfg, dataset, teacher, where, this, say)
            with tracking.open_tracker(this, cfg) as tracker:
                with phase("train"):
                    _train(cfg, training, dataset, this, tracker, say)
                with phase("evaluate"):
                    _evaluate(training, dataset, teacher, this)
                tracking.publish(tracker, this, teacher)
        this.update(status="done", finished=runs.now(), tracker=tracker.where)
        _tidy(this)
        say(f"{this.folder}: {headline(this.record)}" + (f"\n{tracker.where}" if tracker.where else ""))
    except BaseException as error:
        _note_failure(this, error)
        raise


def open_dataset(cfg: Config) -> Any:
    """The dataset of a run; equal ones are opened once in a process."""
    from kd import data

    root = cfg.dataset.root
    spec = {**dataclasses.asdict(cfg.dataset), "workers": cfg.workers, "root": root and str(Path(root).expanduser())}
    key = repr(sorted(spec.items(), key=lambda item: item[0]))
    if key not in _DATASETS:
        _DATASETS[key] = data.load(spec, store_dir=Path(cfg.runs_dir) / ".store")
    return _DATASETS[key]


_DATASETS: dict[str, Any] = {}


def resolve(cfg: Config, dataset: Any) -> Config:
    """The settings with every `auto` that is a rule of the config made plain, and the loss of a run without a teacher."""
    cfg = copy.deepcopy(cfg)
    cfg.dataset.image_size = dataset.image_size
    for model in (cfg.student, cfg.teacher):
        size = model.preprocess.size or dataset.image_size
        if model.pretrained == "auto":
            model.pretrained = size >= 96 and "_target_" not in model.args and model.checkpoint in (None, "auto")
    if cfg.teacher.name == "none":
        cfg.loss = labels_only(cfg.loss)
    return cfg


def labels_only(terms: dict[str, Any]) -> dict[str, Any]:
    """The label terms of a loss, at weight 1: what `teacher=none` leaves."""
    from kd.losses.sum import locate

    kept = {n: {**t, "weight": 1.0} for n, t in terms.items() if "_target_" in t and not locate(t["_target_"]).needs_teacher}
    return kept or {"ce": {"_target_": "kd.losses.CrossEntropy", "weight": 1.0}}


def ready_teacher(cfg: Config, dataset: Any, where: str, this: Run, say: Callable[[str], None]) -> Any:
    """The frozen teacher, checked and scored through the path it teaches by."""
    from kd import check, device, diagnose, finding, teacher

    check.before_teacher(cfg, dataset)
    loaded = teacher.obtain(cfg, dataset, _run, say)
    teacher.check_classes(loaded.classifier, dataset, f"the teacher {cfg.teacher.name}")
    half = device.resolve_precision(cfg.recipe.precision, where) == "bf16"
    loaded.classifier = teacher.freeze(loaded.classifier, where, half)
    figures, findings = diagnose.diagnose(loaded, dataset, cfg, where, half)
    this.update(teacher={**loaded.source, "name": cfg.teacher.name, **figures})
    say(check.teacher_line(cfg, figures))
    finding.stop(findings, say)
    return loaded


def assemble(cfg: Config, dataset: Any, teacher: Any, where: str, this: Run, say: Callable[[str], None]) -> Training:
    """Student, loss, optimiser and view, ready for the first step."""
    import torch

    from kd import cache, data, device, models, pairs
    from kd import teacher as teachers
    from kd.loop import Training
    from kd.optim import make_optimizer

    recipe = cfg.recipe
    matched = match(cfg, dataset, teacher and teacher.classifier)
    student, loss, source = matched.student, matched.loss, matched.source
    student, loss = student.to(where, memory_format=torch.channels_last), loss.to(where)
    view = data.View(dataclasses.asdict(cfg.augment), dataset.image_size, dataset.mirror, dataset.num_classes)
    precision = device.resolve_precision(recipe.precision, where)
    half = precision == "bf16"
    ask = teachers.asker(teacher.classifier, view, cfg.augment.teacher_view, loss.teacher_features, half) if teacher else None
    per_epoch = dataset.train.steps(recipe.batch_size)
    training = Training(
        student=student,
        ask_teacher=ask,
        loss=loss,
        view=view,
        optimizer=make_optimizer(recipe, [student, loss]),
        recipe=recipe,
        seed=cfg.seed,
        steps=0,
        steps_per_epoch=per_epoch,
        device=where,
        autocast=half,
        cycle_epochs=cfg.augment.cycle_epochs,
        ema=_averaged(student, recipe.ema),
        forward=torch.compile(student, dynamic=False) if recipe.compile == "on" else student,
    )
    _require_same_ground(this, precision, say)
    training.steps = _steps(training, dataset, this)
    this.update(
        precision=precision, steps=training.steps, steps_per_epoch=per_epoch, initialised_from=source, loss=loss.describe(), parameters=models.count_parameters(student)
    )
    say(f"{cfg.student.name} ({this.record['parameters'] / 1e6:.2f} M parameters, {source}) on {cfg.dataset.name} at {dataset.image_size} px, "
        f"{len(dataset.train)} training images, {training.steps} steps of {recipe.batch_size}, {precision} on {where}")  # fmt: skip
    say(f"loss = {loss.describe()}")
    if teacher is not None:
        say(f"pairs: {'; '.join(map(str, pairs.pairs(loss, matched.outputs)))}")
        if cache.cacheable(cfg.teacher.cache, loss):
            layout = cache.layout_of(matched.outputs[1], min(recipe.batch_size, len(dataset.train)), half)
            training.ask_teacher = cache.open_cache(
                cfg, dataset, teacher.classifier, ask, layout=layout, features=loss.teacher_features, steps=training.steps, device=where, say=say
            )
    return training


@dataclasses.dataclass
class Match:
    """A student and a loss whose projections fit the two networks."""

    student: Any
    source: str  # what the student's weights were initialised from
    loss: Any
    outputs: list[Any]  # of the student and the teacher (None without one) on a few images


def match(cfg: Config, dataset: Any, teacher: Any) -> Match:
    """Student and loss, from `seed`; ValueError where a term is undefined for this pair of networks."""
    import torch

    from kd import losses

    torch.manual_seed(cfg.seed)
    student, source = make_student(cfg, dataset)
    loss = losses.build(cfg.loss)
    sample = next(dataset.train.batches(min(4, len(dataset.train)), device="cpu")).images
    outputs = [_dry(model, sample, wanted) for model, wanted in ((student, loss.student_features), (teacher, loss.teacher_features))]
    loss.setup(*outputs, dataset.num_classes, dataset.num_samples)
    return Match(student, source, loss, outputs)


def make_student(cfg: Config, dataset: Any) -> tuple[Any, str]:
    """The student's classifier and what its weights were initialised from."""
    from kd import models, runs

    checkpoint = cfg.student.checkpoint
    spec = dataclasses.asdict(cfg.student)
    student = models.build(
        spec, dataset.num_classes, dataset.image_size, dataset.channels, classes=dataset.classes, pretrained=bool(cfg.student.pretrained) and not checkpoint
    )
    if checkpoint:
        path = runs.find_weights(Path(checkpoint))
        models.load_weights(student, path)
        return student, f"weights {path.name} {runs.files.digest(path)[:8]}"
    return student, f"pretrained {cfg.student.name}" if cfg.student.pretrained else f"from scratch, seed {cfg.seed}"


def _dry(model: Any, sample: Any, features: list[str]) -> Any:
    """One forward in eval mode without gradients, for the terms to size their projections."""
    import torch

    if model is None:
        return None
    training = model.training
    with torch.no_grad():
        output = model.eval()(sample.to(next(model.parameters()).device), features)
    model.train(training)
    for name, feature in output.features.items():
        output.features[name] = feature.float().cpu()
    output.logits = output.logits.float().cpu()
    return output


def _averaged(student: Any, decay: float | None) -> Any:
    if not decay:
        return None
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _require_same_ground(this: Run, precision: str, say: Callable[[str], None]) -> None:
    """A resume is exact on the same device and threads; under others it says so, and under another precision it stops."""
    from kd import runs

    before, now = this.record.get("started_on"), runs.environment(this.record["environment"]["device"])
    if before is None:
        this.update(started_on={k: now[k] for k in ("device_name", "threads", "torch")}, exact=True)
        return
    if this.record.get("precision", precision) != precision:
        raise UserError(
            f"{this.folder} was begun in {this.record['precision']}, here recipe.precision=auto means {precision}. "
            "Go on where it was begun, or type fresh=true to begin again"
        )
    changed = [k for k in before if before[k] != now[k]]
    if changed:
        say("warning: resumed under another " + ", ".join(f"{k} ({before[k]} -> {now[k]})" for k in changed) + ": not bit for bit the run it was")
        this.update(exact=False)


def _steps(training: Training, dataset: Any, this: Run) -> int:
    """The run's length in optimiser steps; `minutes` are turned into steps by a probe, once, and recorded."""
    recipe = training.recipe
    if this.record.get("steps"):
        return this.record["steps"]
    if recipe.steps:
        return recipe.steps
    if recipe.minutes:
        return probe_steps(training, dataset)
    if recipe.epochs is None:
        raise ConfigError("the recipe has no length: type recipe.epochs=, recipe.steps= or recipe.minutes=")
    return max(1, math.ceil(recipe.epochs * training.steps_per_epoch))


def probe_steps(training: Training, dataset: Any, warm: int = 2, timed: int = 6) -> int:
    """How many steps fit into `recipe.minutes`, from a few steps on copies."""
    from kd.loop import apply_step, train_step

    saved = copy.deepcopy((training.student.state_dict(), training.loss.state_dict(), training.optimizer.state_dict()))
    training.steps, times = warm + timed, []
    while len(times) < warm + timed:
        for raw in dataset.train.epoch(0, training.recipe.batch_size, training.seed, device=training.device):
            started = time.perf_counter()
            train_step(training, raw).sum().item()
            apply_step(training)
            times.append(time.perf_counter() - started)
            if len(times) == warm + timed:
                break
    training.optimizer.zero_grad(set_to_none=True)
    training.student.load_state_dict(saved[0])
    training.loss.load_state_dict(saved[1])
    training.optimizer.load_state_dict(saved[2])
    if training.ema is not None:
        training.ema.module.load_state_dict(saved[0])
        training.ema.n_averaged.zero_()
    return max(1, int(60 * training.recipe.minutes / sorted(times[warm:])[timed // 2]))


def _train(cfg: Config, training: Training, dataset: Any, this: Run, tracker: Any, say: Callable[[str], None]) -> None:
    """Fit from the last checkpoint on, with metrics to the tracker."""
    from kd import metrics, signals
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
            fit(training, validate if split is not None and len(split) else None, dataset.train, checkpoints, tracker, console, stop)
        finally:
            this.record.get("teacher", {}).update(training.close())
    this.update(best=training.progress.best, train_seconds=training.progress.seconds)


def _evaluate(training: Training, dataset: Any, teacher: Any, this: Run) -> None:
    """One pass over the test set for `best` and one for `last`, float32; what the student costs."""
    from kd import card, metrics, models, speed
    from kd.checkpoint import Checkpoints

    checkpoints = Checkpoints(this.folder / "checkpoints")
    if not (checkpoints.folder / "best").is_dir():
        checkpoints.save("best", training.kept)  # without a validation split the last is the best
    found = {n: v for n, v in training.progress.best.items() if "/" in n}
    teacher_logits, per_class = None, {}
    if dataset.test is not None:
        if teacher is not None:
            teacher_logits = _test_logits(teacher.original, dataset, training.device)
        for name, prefix in (("best", "test"), ("last", "test_last")):
            classifier = models.load(checkpoints.folder / name)
            logits = _test_logits(classifier, dataset, training.device)
            found |= metrics.named(prefix, metrics.full(logits, dataset.test.targets, teacher_logits))
            if name == "best":
                per_class["student"] = metrics.recalls(logits, dataset.test.targets)
                if teacher_logits is not None:
                    found |= metrics.named("test", metrics.mistakes(logits, teacher_logits, dataset.test.targets))
        if teacher_logits is not None:
            per_class["teacher"] = metrics.recalls(teacher_logits, dataset.test.targets)
            found |= metrics.named("teacher/test", metrics.full(teacher_logits, dataset.test.targets))
    weights = checkpoints.folder / "best" / "model.safetensors"
    alone = this.record["sweep"] is None  # side by side nothing can be timed: the report does it, once for each network
    figures = speed.summary(models.load(weights.parent), weights, dataset, training.device, timed=alone)
    this.update(metrics=found, per_class=per_class, efficiency=figures)
    card.write(this)


def _test_logits(classifier: Any, dataset: Any, where: str) -> Any:
    from kd import metrics

    classifier = classifier.to(where).eval()
    return metrics.logits_of(lambda images: classifier(images).logits, dataset.test, where)


def compare_with_baseline(cfg: Config, finished: Run, say: Callable[[str], None]) -> None:
    """Say whether the student is better than the same student alone, which is found or trained first."""
    from kd import card, runs
    from kd.config import Teacher

    if cfg.baseline == "off" or "test/top1" not in finished.record.get("metrics", {}):
        return
    alone = dataclasses.replace(cfg, teacher=Teacher(name="none"), fresh=False, baseline="off", dry=cfg.baseline == "find")
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
    say(f"student {100 * mine:.1f} % on test, {word} the same student alone ({100 * other:.1f} %): {100 * (mine - other):+.1f} points, one seed")


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
        places={"dataset.root": cfg.dataset.root, "teacher.checkpoint": cfg.teacher.checkpoint, "runs_dir": cfg.runs_dir},
        sweep=cfg.sweep_name,
        created=this.record.get("created", runs.now()),
        environment=runs.environment(where),
        dataset={**data, **sizes},
        seconds=this.record.get("seconds", {}),
    )
    this.record.pop("error", None)
    from omegaconf import OmegaConf

    from kd import files

    (this.folder / ".hydra").mkdir(exist_ok=True)
    files.write_text(this.folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(cfg))))


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
    from kd.loop import DivergedError

    interrupted = isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit))
    status = "diverged" if isinstance(error, DivergedError) else "interrupted" if interrupted else "failed"
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
