"""How good a classifier is, from its logits on a whole split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BATCH = 256


@torch.inference_mode()
def logits_of(
    ask: Callable[[Tensor], Tensor], split: Any, device: str, autocast: bool = False, batch_size: int = BATCH
) -> Tensor:
    """Logits (N, K) float32 on the CPU of every image of a split, in its order; `ask` maps uint8 images to logits."""
    found = []
    for batch in split.batches(batch_size, device=device):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            found.append(ask(batch.images).float())
    return torch.cat(found).cpu()


def quick(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """top1 and nll, which choose the best epoch."""
    return {
        "top1": (logits.argmax(1) == targets).double().mean().item(),
        "nll": F.cross_entropy(logits.double(), targets).item(),
    }


def full(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> dict[str, float]:
    """top1, top5, nll, ece (15 bins, Guo et al. 2017, arXiv:1706.04599) and, with a teacher, agreement and KL from it."""
    classes = logits.shape[1]
    found = quick(logits, targets)
    found["top5"] = (logits.topk(min(5, classes), dim=1).indices == targets[:, None]).any(1).double().mean().item()
    found["ece"] = calibration_error(logits.softmax(1), targets)
    if teacher_logits is not None:
        found["agreement"] = (logits.argmax(1) == teacher_logits.argmax(1)).double().mean().item()
        log_student, log_teacher = logits.double().log_softmax(1), teacher_logits.double().log_softmax(1)
        found["teacher_kl"] = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True).item()
    return found


def macro(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Means over classes, for sets whose classes differ in size: balanced accuracy and F1, by torchmetrics."""
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    guess, classes = logits.argmax(1), logits.shape[1]
    return {
        "balanced": multiclass_accuracy(guess, targets, classes, average="macro").item(),
        "f1": multiclass_f1_score(guess, targets, classes, average="macro").item(),
    }


def calibration_error(probs: Tensor, targets: Tensor, bins: int = 15) -> float:
    """Expected calibration error as torchmetrics has it, whose import takes 6 s: the gap of confidence and accuracy."""
    confidence, guess = probs.double().max(1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, confidence - (guess == targets).double())
    return (gap.abs().sum() / len(targets)).item()


def mistakes(logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Of the teacher's mistakes, the shares that the student copies (the same wrong class) and mends; empty where there are none."""
    student, teacher = logits.argmax(1), teacher_logits.argmax(1)
    wrong = teacher != targets
    if not wrong.any():
        return {}
    copied, mended = student[wrong] == teacher[wrong], student[wrong] == targets[wrong]
    return {"mistakes_copied": copied.double().mean().item(), "mistakes_mended": mended.double().mean().item()}


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """Counts (K, K): rows are true classes, columns predictions."""
    classes = logits.shape[1]
    return torch.bincount(targets * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def per_class(matrix: Tensor) -> list[float]:
    """Recall of each class from a confusion matrix; 0 where a class has no image."""
    return (matrix.diag().double() / matrix.sum(1).clamp(min=1)).tolist()


def named(split: str, values: dict[str, float]) -> dict[str, float]:
    """The same values as `split/name`."""
    return {f"{split}/{n}": v for n, v in values.items()}
