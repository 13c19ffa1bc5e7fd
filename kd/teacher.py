"""The teacher: found or trained, frozen, scored through the very path it teaches by."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd import models, runs, saved
from kd.cache import KEPT
from kd.config import Config, Student, Teacher
from kd.contracts import Batch, Output
from kd.ensemble import Ensemble
from kd.hints import ConfigError, UserError
from kd.models.build import per_channel

LABELS_ALONE = {"ce": {"_target_": "kd.losses.CrossEntropy", "weight": 1.0}}


@dataclass
class Loaded:
    """A teacher's classifier and where it came from."""

    classifier: nn.Module
    source: dict[str, Any]  # for the record: run or file, sha256, its test metrics where known
    weights: Path | None = None
    original: nn.Module | None = None  # float32, batch norm as it is: what `classifier` was before it was frozen
    digest: str | None = None  # of the data that it was trained on, where that is known
    members: list[Loaded] = field(default_factory=list)  # of an ensemble


def teacher_config(cfg: Config) -> Config:
    """The run that a teacher is: `teacher=none student=<it> recipe=<teacher.recipe>`, its own seed and data, same runs_dir."""
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
    """The teacher that `cfg` asks for, in eval mode; `train(config, wait=True)` trains it where there is no finished run."""
    if cfg.teacher.name == "ensemble":
        from kd import ensemble

        together, source, members = ensemble.gather(cfg, lambda member: obtain(member, dataset, train, say))
        for member, one in zip(cfg.teacher.members, members, strict=True):
            check_classes(one.classifier, dataset, f"the teacher {member}")
        return Loaded(together, source, original=together, members=members)
    loaded = find(cfg, dataset, train, say)
    if reread(loaded.classifier, cfg.teacher):
        loaded.digest = None  # not as it was trained any more: to be looked at like one from elsewhere
    if cfg.teacher.classes:
        reorder(loaded.classifier, cfg.teacher.classes, dataset.classes)
        loaded.digest = None
    loaded.original = loaded.classifier.eval()
    return loaded


def find(cfg: Config, dataset: Any, train: Callable[..., runs.Run], say: Callable[[str], None]) -> Loaded:
    """One teacher's classifier as it was saved."""
    if cfg.teacher.checkpoint == "auto":
        run = train(teacher_config(cfg), wait=True)
        return from_run(run, cfg)
    if not cfg.teacher.checkpoint:
        raise UserError(
            "teacher.checkpoint is empty: type auto (fine-tune it by its recipe), hub (as the hub has it), or a path to weights"
        )
    if cfg.teacher.checkpoint == "hub":
        return from_hub(cfg, dataset)
    folder = saved.local(cfg.teacher.checkpoint)
    if (folder / "run.json").is_file():
        loaded = from_run(runs.open_run(folder), cfg)
        if saved.is_artifact(cfg.teacher.checkpoint):
            loaded.source["artifact"] = cfg.teacher.checkpoint
        return loaded
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
    written = (folder / "sha256.json").is_file()  # an artifact brings none: W&B checks its own
    if written and (broken := runs.files.broken_files(folder)):
        raise UserError(
            f"{folder} is broken: {', '.join(broken)} differ from its sha256.json. fresh=true trains it again"
        )
    weights = folder / "model.safetensors"
    metrics = run.record.get("metrics", {}) if kept == "best" else {}
    source = {
        "run": run.name,
        "checkpoint": kept,
        "sha256": runs.files.digest(weights),
        "metrics": {n: v for n, v in metrics.items() if n.startswith("test/")},
    }
    return Loaded(models.load(folder), source, weights, digest=run.record.get("dataset", {}).get("digest"))


def from_hub(cfg: Config, dataset: Any) -> Loaded:
    """Hub weights as they are, head included; UserError where the hub's classes are another number."""
    spec, sizes = dataclasses.asdict(cfg.teacher), (dataset.num_classes, dataset.image_size, dataset.channels)
    classifier = models.build(spec, *sizes, pretrained=True)
    if classifier.origin.get("head") != "kept":
        raise UserError(
            f"teacher {cfg.teacher.name}: its head would be random ({classifier.origin.get('head', 'no hub weights')}). "
            "Type teacher.checkpoint=auto to fine-tune it on this dataset first, or give weights that were: "
            "teacher.checkpoint=PATH"
        )
    return Loaded(classifier, dict(classifier.origin))


def from_file(cfg: Config, dataset: Any, weights: Path, say: Callable[[str], None]) -> Loaded:
    """Weights from elsewhere: a checkpoint folder of ours, or a state dict for the network that `teacher=` names."""
    source = {"file": weights.name, "sha256": runs.files.digest(weights)}
    if (weights.parent / "config.json").is_file():
        return Loaded(models.load(weights.parent), source, weights)
    spec = dataclasses.asdict(cfg.teacher)
    classifier = models.build(spec, dataset.num_classes, dataset.image_size, dataset.channels, classes=dataset.classes)
    say(f"teacher weights: {models.load_weights(classifier, weights)}")
    return Loaded(classifier, source, weights)


def reread(classifier: nn.Module, wanted: Teacher) -> bool:
    """Give a saved classifier the preprocessing that was typed (but for `size`); whether that changed anything."""
    typed = {k: v for k, v in dataclasses.asdict(wanted.preprocess).items() if v is not None and k != "size"}
    now = classifier.preprocess.settings()
    for key in ("mean", "std"):
        if key in typed:
            typed[key] = per_channel(typed[key], len(now[key]))
    changed = any(now[k] != v for k, v in typed.items())
    if changed:
        classifier.preprocess = type(classifier.preprocess)(**{**now, **typed})
    return changed


def reorder(classifier: nn.Module, names: list[str], wanted: list[str]) -> None:
    """Make the outputs, `names` in their order, the data set's classes in theirs. Raises ConfigError for other names."""
    if sorted(names) != sorted(wanted):
        strange = sorted(set(names) ^ set(wanted))
        raise ConfigError(
            f"teacher.classes: expected the data set's {len(wanted)} classes, each once; look at {', '.join(strange[:5])}"
        )
    take = torch.tensor([names.index(name) for name in wanted])
    heads = classifier.network.get_classifier()
    for head in heads if isinstance(heads, (tuple, list)) else (heads,):
        last = [
            m for m in head.modules() if getattr(m, "weight", None) is not None and m.weight.shape[0] == len(names)
        ][-1]
        for parameter in last.parameters(recurse=False):
            parameter.data = parameter.data[take.to(parameter.device)]
    classifier.classes = list(wanted)


def check_classes(classifier: nn.Module, dataset: Any, where: str) -> None:
    """The classifier's classes are the dataset's, in the same order, or UserError."""
    names, wanted = list(classifier.classes or []), list(dataset.classes)
    if classifier.num_classes != len(wanted):
        raise UserError(
            f"{where} has {classifier.num_classes} classes, the dataset has {len(wanted)}: a new head would be random. "
            "Give weights trained on this dataset (teacher.checkpoint=PATH), or teacher.checkpoint=auto to fine-tune it"
        )
    if not names or names == wanted:
        return
    at = next(i for i, (a, b) in enumerate(zip(names, wanted, strict=True)) if a != b)
    if sorted(names) == sorted(wanted):
        raise UserError(
            f"{where} has the dataset's classes in another order: its class {at} is '{names[at]}', the dataset's is "
            f"'{wanted[at]}'. Type {typed_classes(names)}, or teacher.checkpoint=auto to train one on this dataset"
        )
    raise UserError(
        f"{where} learnt other classes, those of another dataset: its class {at} is '{names[at]}', the dataset's is "
        f"'{wanted[at]}'. Give a teacher of this dataset: teacher.checkpoint=auto, or rename the class folders"
    )


def typed_classes(names: list[str]) -> str:
    """`teacher.classes=[...]` as a shell takes it."""
    quoted = [n if re.fullmatch(r"[A-Za-z_][\w.+-]*", n) else '"' + n.replace('"', r"\"") + '"' for n in names]
    return f"'teacher.classes=[{','.join(quoted)}]'"


def freeze(classifier: nn.Module, device: str, half: bool) -> nn.Module:
    """A copy in eval for good, without gradients, batch norm folded into the convolutions, in bfloat16 if `half`."""
    if isinstance(classifier, Ensemble):
        return Ensemble([freeze(member, device, half) for member in classifier.members], classifier.average).eval()
    classifier = models.fold_batchnorm(classifier.eval()).to(device).eval().requires_grad_(False)
    if half:
        classifier.network.to(torch.bfloat16)
        if device == "cpu":
            models.lean_linears(classifier.network)
    return classifier.to(memory_format=torch.channels_last)


def asker(
    classifier: nn.Module, view: Callable[..., Batch], policy: str, features: list[str]
) -> Callable[[Batch, Batch], Output]:
    """(view, raw batch) -> the teacher's output on the view that `augment.teacher_view` says, without gradients.

    Its precision is its own, not the student's. What a cache can keep comes in that precision, kept or not.
    """
    half = is_half(classifier)

    def ask(batch: Batch, raw: Batch) -> Output:
        images = (
            batch.images
            if policy == "same"
            else view.clean(raw).images
            if policy == "clean"
            else view(raw, stream=2).images
        )
        # on CUDA no_grad: a compiled teacher's graph, captured in inference mode, would spoil the student's (pytorch #135892)
        without_gradients = torch.no_grad if images.is_cuda else torch.inference_mode
        with without_gradients(), torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            output = classifier(images, features)
        return usable(output, torch.bfloat16 if half else torch.float32)

    return ask


def is_half(classifier: nn.Module) -> bool:
    """Whether `freeze` cast it."""
    weights = classifier.parameters() if isinstance(classifier, nn.Module) else ()
    return any(w.dtype == torch.bfloat16 for w in weights)


def usable(output: Output, dtype: torch.dtype) -> Output:
    """Copies that autograd may save (tensors of inference mode may not be); logits and penultimate features in `dtype`."""
    features = {n: f.to(dtype if n in KEPT else f.dtype, copy=True) for n, f in output.features.items()}
    extra = output.extra_logits.clone() if output.extra_logits is not None else None
    return Output(output.logits.to(dtype, copy=True), features, output.head, extra)


def hear(classifier: nn.Module, dataset: Any, device: str, autocast: bool) -> tuple[str, Any, Tensor]:
    """(name, split, logits) on val, or on train where there is no val, as the students will hear it."""
    from kd import metrics

    split = dataset.val if dataset.val is not None and len(dataset.val) else dataset.train
    return (
        "val" if split is dataset.val else "train",
        split,
        metrics.logits_of(lambda x: classifier(x).logits, split, device, autocast),
    )


def floor(cfg: Config, num_classes: int) -> float:
    """The least top-1 that a teacher must have: `teacher.min_top1`, else twice chance."""
    return cfg.teacher.min_top1 if cfg.teacher.min_top1 is not None else min(2 / num_classes, 0.5 + 0.5 / num_classes)
