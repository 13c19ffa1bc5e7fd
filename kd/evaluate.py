"""Score a finished run, or a teacher on a dataset: top-1, top-5, balanced accuracy, F1, NLL, ECE, agreement, per class.

python -m kd.evaluate run=RUN_DIR out=FILE.json
python -m kd.evaluate teacher=resnet56_a teacher.checkpoint=PATH dataset=folder dataset.root=PATH out=FILE.json
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import cli, saved
from kd.config import Dataset, EvaluateConfig
from kd.hints import ConfigError, UserError

if TYPE_CHECKING:
    from kd.runs import Run


def main() -> None:
    """`python -m kd.evaluate` and `kd-evaluate`."""
    cli.entry("evaluate", evaluate, __doc__)


def evaluate(cfg: EvaluateConfig) -> dict[str, float]:
    """The figures of what `cfg` names, by flat names such as `test/top1` and `teacher/test/top1`; written to `out`."""
    from kd import device, files

    where = device.pick_device(cfg.device)
    device.set_up(where, cfg.threads)
    models, dataset, plots = _of_run(cfg) if cfg.run else _of_teacher(cfg)
    split = getattr(dataset, cfg.split)
    if split is None or not len(split):
        raise UserError(f"split={cfg.split}: the dataset has no such split. Type split=val or split=train")
    found, details = score_all(models, split, cfg.split, dataset.classes, where)
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        files.write_json(Path(cfg.out), found)
    picture = draw_confusion(
        details["matrix"], dataset.classes, (Path(cfg.out).parent if cfg.out and not plots else plots), cfg.split
    )
    show(models, found, details, cfg.split, dataset.classes, picture)
    return found


def _of_run(cfg: EvaluateConfig) -> tuple[dict[str, Any], Any, Path]:
    """The student of a run first, then its teacher and its baseline where they can be found."""
    from kd import models, runs

    run = runs.open_run(cfg.run)
    dataset = open_data_of(run, cfg)
    found = {"student": models.load(run.folder / "checkpoints" / "best", cfg.trust)}
    for name, folder in (("teacher", teacher_folder(run)), ("baseline", baseline_folder(run))):
        if folder is not None:
            found[name] = models.load(folder, cfg.trust)
    return found, dataset, run.folder / "plots"


def _of_teacher(cfg: EvaluateConfig) -> tuple[dict[str, Any], Any, None]:
    """The teacher that the settings name, on the dataset that they name."""
    from kd import data, models, teacher

    if cfg.teacher.name == "none":
        raise ConfigError("nothing to evaluate: type run=RUN_DIR, or teacher=NAME teacher.checkpoint=PATH")
    if cfg.teacher.checkpoint == "auto":
        raise ConfigError(
            "teacher.checkpoint=auto is what kd.train finds or trains; to evaluate, type teacher.checkpoint=PATH or run=RUN_DIR"
        )
    spec = {**dataclasses.asdict(cfg.dataset), "workers": cfg.workers}
    dataset = data.load(spec, store_dir=Path(cfg.runs_dir) / ".store", need_train=cfg.split != "test")
    models.allow(cfg.teacher.args)
    loaded = teacher.obtain(cfg, dataset, _untrained, print)
    teacher.check_classes(loaded.classifier, dataset, f"the teacher {cfg.teacher.name}")
    return {"teacher": loaded.classifier}, dataset, None


def _untrained(cfg: Any, **_: Any) -> Run:
    raise ConfigError(f"teacher {cfg.student.name} is still to be trained: kd.train does that")


def open_data_of(run: Run, cfg: EvaluateConfig) -> Any:
    """The dataset that a run was trained on, from where it was or from `dataset.root`; UserError where its content is another."""
    from kd.prepare import open_dataset

    settings = {k: v for k, v in run.record["config"]["dataset"].items() if k != "digest"}
    if not settings["_target_"].startswith("kd.") and not cfg.trust:
        raise UserError(
            f"{run.name} reads its images by {settings['_target_']}, code from outside kd. Where you know it, type trust=true"
        )
    root = cfg.dataset.root or run.record["places"].get("dataset.root")
    dataset = open_dataset(dataclasses.replace(cfg, dataset=Dataset(**settings, root=root)))
    if dataset.digest != run.record["dataset"]["digest"]:
        raise UserError(
            f"the images at {root or settings['name']} are not those that {run.name} was trained on. Type dataset.root=PATH of those"
        )
    return dataset


def teacher_folder(run: Run) -> Path | None:
    """The checkpoint folder of a run's teacher: a run beside it, a W&B artifact within reach, or a folder of ours."""
    facts = run.record.get("teacher") or {}
    if "artifact" in facts:
        try:
            folder = saved.local(facts["artifact"]) / "checkpoints" / facts["checkpoint"]
        except UserError:  # no key or no network: as if it were gone
            return None
    elif "run" in facts:
        folder = run.folder.parent / facts["run"] / "checkpoints" / facts["checkpoint"]
    else:
        place = run.record["places"].get("teacher.checkpoint")
        folder = Path(place) if place and Path(place).is_dir() else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def baseline_folder(run: Run) -> Path | None:
    """The best checkpoint of the same student alone, where that run is there."""
    name = (run.record.get("baseline") or {}).get("run")
    folder = run.folder.parent / name / "checkpoints" / "best" if name else None
    return folder if folder is not None and folder.is_dir() else None


def score_all(
    models: dict[str, Any], split: Any, name: str, classes: list[str], where: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Flat figures of every model, the first one's unprefixed; and the first one's confusion matrix and logits."""
    from kd import metrics

    logits = {role: _logits(model, split, where) for role, model in models.items()}
    found: dict[str, float] = {}
    first = next(iter(models))
    for role, values in logits.items():
        teacher = logits.get("teacher") if role != "teacher" else None
        scored = metrics.full(values, split.targets, teacher) | metrics.macro(values, split.targets)
        scored = metrics.named(name, scored)
        found |= {n if role == first else f"{role}/{n}": v for n, v in scored.items()}
    matrix = metrics.confusion(logits[first], split.targets)
    recalls = metrics.per_class(matrix)
    found |= {f"{name}/recall/{label}": value for label, value in zip(classes, recalls, strict=True)}
    return found, {"matrix": matrix, "logits": logits}


def _logits(classifier: Any, split: Any, where: str) -> Any:
    from kd import metrics

    classifier = classifier.to(where).eval()
    return metrics.logits_of(lambda images: classifier(images).logits, split, where)


def show(
    models: dict[str, Any],
    found: dict[str, float],
    details: dict[str, Any],
    split: str,
    classes: list[str],
    picture: Path | None,
) -> None:
    """The figures as tables on the screen."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{split} split")
    for column in ("", "top-1 %", "top-5 %", "balanced %", "F1 %", "NLL", "ECE %", "agreement with teacher %"):
        table.add_column(column, justify="left" if not column else "right")
    for at, role in enumerate(models):
        prefix = f"{split}/" if at == 0 else f"{role}/{split}/"
        shown = [
            _percent(found, prefix + n) if n != "nll" else f"{found[prefix + n]:.3f}"
            for n in ("top1", "top5", "balanced", "f1", "nll", "ece", "agreement")
        ]
        table.add_row(role, *shown)
    Console().print(table)
    if len(classes) <= 20:
        recall = Table(title="per class")
        recall.add_column("class")
        recall.add_column("recall %", justify="right")
        for label in classes:
            recall.add_row(label, _percent(found, f"{split}/recall/{label}"))
        Console().print(recall)
    if picture:
        print(f"confusion matrix: {picture}")


def _percent(found: dict[str, float], name: str) -> str:
    return f"{100 * found[name]:.2f}" if name in found else ""


def draw_confusion(matrix: Any, classes: list[str], folder: Path | None, split: str) -> Path | None:
    """The confusion matrix as a picture, rows normalised to percent; None without a folder to put it in."""
    if folder is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    shares = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    side = min(14.0, 3 + 0.35 * len(classes))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    if len(classes) <= 30:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for row in range(len(classes)):
            for column in range(len(classes)):
                if count := int(matrix[row, column]):
                    axes.text(
                        column,
                        row,
                        count,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if shares[row, column] > 50 else "black",
                    )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{split}: images by true and predicted class")
    figure.colorbar(picture, ax=axes, label="% of the true class", shrink=0.7)
    path = folder / f"confusion_{split}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
