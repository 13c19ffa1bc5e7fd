"""Test images with what student and teacher take them for: the mistakes first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LOOKED_AT = 2000  # test images
SHOWN = 100
COLUMNS = ("image", "class", "student", "student_probability")
WITH_TEACHER = (*COLUMNS, "teacher", "teacher_probability")


@torch.inference_mode()
def predictions(
    student: nn.Module, teacher: nn.Module | None, dataset: Any, device: str
) -> tuple[tuple[str, ...], list]:
    """(columns, rows) of at most 100 test images: wrong ones first, then those on which both differ."""
    from kd.metrics import logits_of

    split = dataset.test.subset(torch.arange(min(LOOKED_AT, len(dataset.test))))
    models = [m.to(device).eval() for m in (student, teacher) if m is not None]
    probs = [logits_of(lambda images, m=m: m(images).logits, split, device).softmax(1) for m in models]
    order = interesting(probs, split.targets)[:SHOWN]
    images = torch.cat([b.images for b in split.subset(order).batches(SHOWN)]).cpu()
    rows = [
        row(image, at, probs, split.targets, dataset.classes) for image, at in zip(images, order.tolist(), strict=True)
    ]
    return (WITH_TEACHER if teacher is not None else COLUMNS), rows


def interesting(probs: list[Tensor], targets: Tensor) -> Tensor:
    """Places (N,): the student's mistakes, surest first, then disagreements, then the rest."""
    said = [p.argmax(1) for p in probs]
    differ = (said[0] != said[-1]).double()
    wrong = (said[0] != targets).double()
    sureness = probs[0].amax(1).double()
    return (4 * wrong + 2 * differ + sureness).argsort(descending=True, stable=True)


def row(image: Tensor, at: int, probs: list[Tensor], targets: Tensor, classes: list[str]) -> list[Any]:
    """One image with its class and every model's answer."""
    found: list[Any] = [image, classes[int(targets[at])]]
    for p in probs:
        best = int(p[at].argmax())
        found += [classes[best], round(float(p[at, best]), 6)]
    return found
