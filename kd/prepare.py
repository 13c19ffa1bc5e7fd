"""What a run needs before its first step: the dataset, the settings made plain, student, loss and optimiser."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.config import Config
from kd.hints import ConfigError, UserError

if TYPE_CHECKING:
    from kd.loop import Training
    from kd.runs import Run


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
    from kd import models

    cfg = copy.deepcopy(cfg)
    cfg.dataset.image_size = dataset.image_size
    for model in (cfg.student, cfg.teacher):
        models.allow(model.args)
        size = model.preprocess.size or dataset.image_size
        if model.pretrained == "auto":
            model.pretrained = size >= 96 and "_target_" not in model.args and model.checkpoint in (None, "auto")
    if cfg.teacher.name == "none":
        cfg.loss = labels_only(cfg.loss)
    return cfg


def labels_only(terms: dict[str, Any]) -> dict[str, Any]:
    """The label terms of a loss, at weight 1: what `teacher=none` leaves."""
    from kd.losses.sum import locate

    kept = {
        n: {**t, "weight": 1.0} for n, t in terms.items() if "_target_" in t and not locate(t["_target_"]).needs_teacher
    }
    return kept or {"ce": {"_target_": "kd.losses.CrossEntropy", "weight": 1.0}}


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
    outputs = [
        _dry(model, sample, wanted)
        for model, wanted in ((student, loss.student_features), (teacher, loss.teacher_features))
    ]
    loss.setup(*outputs, dataset.num_classes, dataset.num_samples)
    for term in loss.terms.values():
        if getattr(term, "replaces_head", False):
            student.graft(*term.shipped())
    return Match(student, source, loss, outputs)


def make_student(cfg: Config, dataset: Any) -> tuple[Any, str]:
    """The student's classifier and what its weights were initialised from."""
    from kd import models, runs

    checkpoint = cfg.student.checkpoint
    spec = dataclasses.asdict(cfg.student)
    student = models.build(
        spec,
        dataset.num_classes,
        dataset.image_size,
        dataset.channels,
        classes=dataset.classes,
        pretrained=bool(cfg.student.pretrained) and not checkpoint,
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
    precision = device.resolve_precision(recipe.precision, where, student)
    per_epoch = dataset.train.steps(recipe.batch_size)
    training = Training(
        student=student,
        ask_teacher=None,
        loss=loss,
        view=view,
        optimizer=make_optimizer(recipe, [student, loss]),
        recipe=recipe,
        seed=cfg.seed,
        steps=0,
        steps_per_epoch=per_epoch,
        device=where,
        autocast=precision == "bf16",
        cycle_epochs=cfg.augment.cycle_epochs,
        ema=_averaged(student, recipe.ema),
        forward=student,
    )
    if teacher is not None:
        ask = partial(teachers.asker, view=view, policy=cfg.augment.teacher_view, features=loss.teacher_features)
        training.ask_teacher = ask(teacher.classifier)
    training.steps = _steps(training, dataset, this)
    compiling = device.resolve_compile(recipe.compile, where, training.steps * recipe.batch_size)
    require_same_ground(this, {"precision": precision, "compile": compiling}, say)
    check_kept_epochs(training)
    this.update(
        precision=precision,
        compile=compiling,
        steps=training.steps,
        steps_per_epoch=per_epoch,
        initialised_from=source,
        loss=loss.describe(),
        parameters=models.count_parameters(student),
    )
    size = f"{this.record['parameters'] / 1e6:.2f} M parameters"
    data = f"{cfg.dataset.name} at {dataset.image_size} px, {len(dataset.train)} training images"
    how = f"{precision} on {where}{', compiled' * compiling}"
    say(f"{cfg.student.name} ({size}, {source}) on {data}, {training.steps} steps of {recipe.batch_size}, {how}")
    if compiling:
        device.begin_compiling(Path(cfg.runs_dir) / ".cache" / "compiled")
        graphs = recipe.accumulate == 1 and loss.views == 1
        training.forward = device.compiled(student, where, graphs)
    say(f"loss = {loss.describe()}")
    if teacher is not None:
        say(f"pairs: {'; '.join(map(str, pairs.pairs(loss, matched.outputs)))}")
        if compiling:
            training.ask_teacher = ask(device.compiled(teacher.classifier, where, loss.views == 1))
        if cache.cacheable(cfg.teacher.cache, loss):
            training.ask_teacher = cache.open_cache(
                cfg,
                dataset,
                teacher.classifier,
                training.ask_teacher,
                layout=cache.layout_of(
                    matched.outputs[1], min(recipe.batch_size, len(dataset.train)), teachers.is_half(teacher.classifier)
                ),
                features=loss.teacher_features,
                steps=training.steps,
                device=where,
                compiled=compiling,
                say=say,
            )
    return training


def _averaged(student: Any, decay: float | None) -> Any:
    if not decay:
        return None
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def require_same_ground(this: Run, resolved: dict[str, Any], say: Callable[[str], None]) -> None:
    """A resume is exact on the same device and threads; under others it says so.

    Where an `auto` that changes numbers (`resolved`: precision, compile) would mean something else now, it stops.
    """
    from kd import runs

    before, now = this.record.get("started_on"), runs.environment(this.record["environment"]["device"])
    if before is None:
        this.update(started_on={k: now[k] for k in ("device_name", "threads", "torch")}, exact=True)
        return
    for name, value in resolved.items():
        was = this.record.get(name, value)
        if was != value:
            raise UserError(
                f"{this.folder} was begun with recipe.{name} at {was}, here recipe.{name}=auto means {value}. "
                "Go on where it was begun, or type fresh=true to begin again"
            )
    if this.record["environment"]["device"].startswith("cuda"):
        say("warning: resumed on a GPU, where some kernels add in no fixed order: not bit for bit the run it was")
        this.update(exact=False)
    changed = [k for k in before if before[k] != now[k]]
    if changed:
        say(
            "warning: resumed under another "
            + ", ".join(f"{k} ({before[k]} -> {now[k]})" for k in changed)
            + ": not bit for bit the run it was"
        )
        this.update(exact=False)


def require_same_precision(this: Run, half: bool) -> None:
    """A resumed run's teacher speaks in the precision that it began in, or UserError."""
    was, now = (this.record.get("teacher") or {}).get("precision"), "bf16" if half else "fp32"
    if this.record.get("started_on") and was not in (None, now):
        raise UserError(
            f"{this.folder} was begun with a teacher in {was}, here recipe.precision=auto means {now} for it. "
            "Go on where it was begun, or type fresh=true to begin again"
        )


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


def check_kept_epochs(training: Training) -> None:
    """ConfigError for an epoch in `recipe.keep_epochs` that the run does not reach."""
    epochs = math.ceil(training.steps / training.steps_per_epoch)
    if beyond := [e for e in training.recipe.keep_epochs if not 1 <= e <= epochs]:
        raise ConfigError(f"keep_epochs={beyond}: the run has the epochs 1 to {epochs}")


def probe_steps(training: Training, dataset: Any, warm: int = 2, timed: int = 6) -> int:
    """How many steps fit into `recipe.minutes`, from a few steps on copies."""
    from kd.loop import timed_steps

    saved = copy.deepcopy((training.student.state_dict(), training.loss.state_dict(), training.optimizer.state_dict()))
    training.steps = warm + timed
    times = timed_steps(training, dataset.train, warm + timed)
    training.optimizer.zero_grad(set_to_none=True)
    training.student.load_state_dict(saved[0])
    training.loss.load_state_dict(saved[1])
    training.optimizer.load_state_dict(saved[2])
    if training.ema is not None:
        training.ema.module.load_state_dict(saved[0])
        training.ema.n_averaged.zero_()
    return max(1, int(60 * training.recipe.minutes / sorted(times[warm:])[timed // 2]))
