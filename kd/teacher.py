"""The teacher: found or trained, frozen, scored through the very path it teaches by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd import models, runs
from kd.config import Config, Student, Teacher
from kd.contracts import Batch, Output
from kd.hints import UserError

LABELS_ALONE = {"ce": {"_target_": "kd.losses.CrossEntropy", "weight": 1.0}}


@dataclass
class Loaded:
    """A teacher's classifier and where it came from."""

    classifier: nn.Module
    source: dict[str, Any]  # for the record: run or file, sha256, its test metrics where known
    weights: Path | None = None


def teacher_config(cfg: Config) -> Config:
    """The run that a teacher is: `teacher=none student=<it> recipe=<teacher.recipe>`, its own seed and data, in the same runs_dir."""
    t = cfg.teacher
    model = {f.name: getattr(t, f.name) for f in dataclasses.fields(Student)}
    return dataclasses.replace(
        cfg,
        seed=t.seed,
        fresh=False,
        baseline="off",
        sweep_name=None,
        student=Student(**{**model, "checkpoint": None}),
        teacher=Teacher(name="none"),
        dataset=dataclasses.replace(cfg.dataset, train_fraction=t.train_fraction),
        loss={n: dict(v) for n, v in LABELS_ALONE.items()},
        augment=t.augment,
        recipe=t.recipe,
    )


def obtain(cfg: Config, dataset: Any, train: Callable[..., runs.Run], say: Callable[[str], None]) -> Loaded:
    """The teacher that `cfg` asks for. `train(config, wait=True)` trains it where there is no finished run yet, once."""
    if cfg.teacher.checkpoint == "auto":
        run = train(teacher_config(cfg), wait=True)
        return from_run(run, cfg)
    if not cfg.teacher.checkpoint:
        raise UserError("teacher.checkpoint is empty: type auto (fine-tune it by its recipe), or a path to weights")
    folder = Path(cfg.teacher.checkpoint)
    if (folder / "run.json").is_file():
        return from_run(runs.open_run(folder), cfg)
    return from_file(cfg, dataset, runs.find_weights(folder, cfg.teacher.epoch), say)


def from_run(run: runs.Run, cfg: Config) -> Loaded:
    """The best checkpoint of a finished run, or the one kept at `teacher.epoch`."""
    kept = f"epoch_{cfg.teacher.epoch:03d}" if cfg.teacher.epoch is not None else "best"
    folder = run.folder / "checkpoints" / kept
    if not folder.is_dir():
        there = sorted(p.name for p in folder.parent.iterdir())
        raise UserError(
            f"teacher.epoch={cfg.teacher.epoch}: {run.folder} kept {', '.join(there)}. "
            f"Type teacher.recipe.keep_epochs=[{cfg.teacher.epoch}] to train a teacher that keeps it"
        )
    weights = folder / "model.safetensors"
    metrics = run.record.get("metrics", {}) if kept == "best" else {}
    source = {
        "run": run.name,
        "checkpoint": kept,
        "sha256": runs.files.digest(weights),
        "metrics": {n: v for n, v in metrics.items() if n.startswith("test/")},
    }
    return Loaded(models.load(folder), source, weights)


def from_file(cfg: Config, dataset: Any, weights: Path, say: Callable[[str], None]) -> Loaded:
    """Weights from elsewhere: a checkpoint folder of ours, or a state dict for the network that `teacher=` names."""
    source = {"file": weights.name, "sha256": runs.files.digest(weights)}
    if (weights.parent / "config.json").is_file():
        return Loaded(models.load(weights.parent), source, weights)
    spec = dataclasses.asdict(cfg.teacher)
    classifier = models.build(spec, dataset.num_classes, dataset.image_size, dataset.channels, classes=dataset.classes)
    say(f"teacher weights: {models.load_weights(classifier, weights)}")
    return Loaded(classifier, source, weights)


def check_classes(classifier: nn.Module, dataset: Any, where: str) -> None:
    """The classifier's classes are the dataset's, in the same order."""
    names, wanted = list(classifier.classes or []), list(dataset.classes)
    if classifier.num_classes != len(wanted):
        raise UserError(
            f"{where} has {classifier.num_classes} classes, the dataset has {len(wanted)}: a new head would be random. "
            "Give weights trained on this dataset (teacher.checkpoint=PATH), or teacher.checkpoint=auto to fine-tune it first"
        )
    if names and names != wanted:
        at = next(i for i, (a, b) in enumerate(zip(names, wanted, strict=True)) if a != b)
        raise UserError(
            f"{where} learnt other classes or another order: its class {at} is '{names[at]}', the dataset's is '{wanted[at]}'. "
            "Give a teacher of this dataset: teacher.checkpoint=auto, or rename the class folders"
        )


def freeze(classifier: nn.Module, device: str, half: bool) -> nn.Module:
    """In eval for good, without gradients, batch norm folded into the convolutions, in bfloat16 where the run is."""
    classifier = models.fold_batchnorm(classifier.eval()).to(device).eval().requires_grad_(False)
    if half:
        classifier.network.to(torch.bfloat16)
    return classifier.to(memory_format=torch.channels_last)


def asker(classifier: nn.Module, view: Callable[..., Batch], policy: str, features: list[str]) -> Callable[[Batch, Batch], Output]:
    """(view, raw batch) -> the teacher's output on the view that `augment.teacher_view` says, without gradients."""

    def ask(batch: Batch, raw: Batch) -> Output:
        images = batch.images if policy == "same" else view.clean(raw).images if policy == "clean" else view(raw, stream=2).images
        with torch.inference_mode():
            output = classifier(images, features)
        return usable(output)

    return ask


def usable(output: Output) -> Output:
    """Copies that autograd may save: tensors of inference mode may not be."""
    features = {n: f.clone() for n, f in output.features.items()}
    extra = output.extra_logits.clone() if output.extra_logits is not None else None
    return Output(output.logits.clone(), features, output.head, extra)


def score(classifier: nn.Module, dataset: Any, device: str, autocast: bool) -> dict[str, float]:
    """top1 and nll on val (train where there is no val), as the students will hear it."""
    from kd import metrics

    split = dataset.val if dataset.val is not None and len(dataset.val) else dataset.train
    name = "val" if split is dataset.val else "train"

    def ask(images: Tensor) -> Tensor:
        return classifier(images).logits

    found = metrics.quick(metrics.logits_of(ask, split, device, autocast), split.targets)
    return metrics.named(name, found)


def require_quality(found: dict[str, float], cfg: Config, classes: int) -> None:
    """Stop where the teacher knows too little to teach."""
    floor = cfg.teacher.min_top1 if cfg.teacher.min_top1 is not None else min(2 / classes, 0.5 + 0.5 / classes)
    top1 = next(v for n, v in found.items() if n.endswith("/top1"))
    if top1 < floor:
        raise UserError(
            f"the teacher {cfg.teacher.name} has a top-1 of {100 * top1:.1f} % through the path it teaches by, below "
            f"{100 * floor:.1f} % (teacher.min_top1). Are these weights of this dataset, with this preprocessing "
            "(teacher.preprocess.mean=[...]) and class order? teacher.min_top1=0 lets it teach all the same"
        )


