"""Why weights from elsewhere do worse than they could, in words: the order of classes, the preprocessing, the head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kd import metrics
from kd.check import suspects
from kd.check.finding import Finding
from kd.check.suspects import some, spread

GOOD = 0.95  # top-1 above which no preprocessing could be clearly better, and the head is the right one
EXPLAINED = 0.7  # renamed outputs must reach this share of what a linear probe does, or it is no matter of names
UNSURE = 0.7  # entropy over log K above which a head says nearly the same of every image, as at its initialisation


@dataclass
class Case:
    """One network on one split, heard the way its student will hear it."""

    who: str  # what to call it
    network: nn.Module  # frozen
    split: Any
    classes: list[str]
    device: str
    half: bool

    def hear(self, split: Any, feature: str | None = None) -> Tensor:
        """Logits, or a feature, of every image of a split: float32 (N, D) on the CPU."""

        def ask(images: Tensor) -> Tensor:
            return self.network(images).logits if feature is None else self.network(images, [feature]).features[feature]

        return metrics.logits_of(ask, split, self.device, self.half)

    @cached_property
    def logits(self) -> Tensor:
        """Of the whole split, (N, K)."""
        return self.hear(self.split)

    @cached_property
    def right(self) -> Tensor:
        """Whether each image of the split is classified rightly, bool (N,)."""
        return self.logits.argmax(1) == self.split.targets

    @property
    def top1(self) -> float:
        """The share that is right."""
        return self.right.double().mean().item()

    @cached_property
    def probed(self) -> Tensor:
        """What a linear layer on the penultimate features would get right, bool; all false where there are none."""
        few = spread(self.split, suspects.MOST)
        if self.network.head is None:
            return torch.zeros(len(few), dtype=torch.bool)
        return suspects.probe(self.hear(few, "penultimate"), few.targets, len(self.classes))

    @property
    def known(self) -> float:
        """The share of that."""
        return self.probed.double().mean().item()


def cause(case: Case) -> Finding | None:
    """The order of classes, else the preprocessing, else the head: the first that explains what is missing."""
    order = suspects.other_order(case.logits, case.split.targets)
    if order and order[1] >= EXPLAINED * case.known:
        return wrong_order(case, *order)
    if case.top1 >= GOOD:
        return None

    def right(part: Any) -> Tensor:
        return case.hear(part).argmax(1) == part.targets

    if reading := suspects.other_reading(case.network, case.split, right, case.right):
        return wrong_reading(case, *reading)
    same = case.right[suspects.places(len(case.right), len(case.probed))] if case.top1 < 0.5 else None
    if same is not None and case.known > 2 * case.top1 and suspects.surely_better(case.probed, same):
        return wrong_head(case)
    return None


def wrong_order(case: Case, order: Tensor, then: float) -> Finding:
    """Outputs that speak for other classes than their place says."""
    from kd.teacher import typed_classes

    names = list(case.classes)  # of the outputs, in their order
    for place, output in enumerate(order.tolist()):
        names[output] = case.classes[place]
    moved = [f"'{n}' under '{c}'" for n, c in zip(names, case.classes, strict=True) if n != c]
    return Finding(
        "class_order",
        f"{case.who} has its classes in another order than the data: {percent(case.top1)} right as it is, "
        f"{percent(then)} with its outputs renamed; it answers {some(moved, 4)}",
        "Where class folders carry each other's names, rename them; where the weights have another order, type "
        f"{typed_classes(names)}",
    )


def wrong_reading(case: Case, reading: suspects.Reading, then: float, now: float) -> Finding:
    """Weights that were trained on otherwise prepared images."""
    text = (
        f"{case.who} is not given images the way its weights were trained on: {percent(now)} right as it is, "
        f"{percent(then)} with {reading.name}"
    )
    if not reading.swapped:
        return Finding("preprocessing", text, f"Type {reading.typed()}")
    modules = case.network.network.named_modules()
    first = next((n for n, m in modules if isinstance(m, nn.Conv2d)), "conv1")
    return Finding(
        "preprocessing",
        text,
        "Turn the first layer's channels once: python -c \"from safetensors.torch import load_file, save_file; "
        f"w = load_file('PATH'); w['{first}.weight'] = w['{first}.weight'].flip(1).contiguous(); "
        "save_file(w, 'rgb.safetensors')\" and type teacher.checkpoint=rgb.safetensors",
    )


def wrong_head(case: Case) -> Finding:
    """Features that tell the classes apart under logits that do not: a head that never saw this data."""
    unsure = entropy(case.logits)
    if unsure > UNSURE:
        code, why = "random_head", f"its head is random: its answers are almost uniform ({percent(unsure)} of the most)"
    else:
        code = "other_dataset"
        why = f"it is a teacher of another dataset, or its head is random: sure of itself (entropy {percent(unsure)})"
    return Finding(
        code,
        f"{case.who} is right on {percent(case.top1)} of the images, chance is {percent(1 / len(case.classes))}, while "
        f"its penultimate features tell {percent(case.known)} of them apart; {why}",
        "Give weights that were trained on this dataset, head included (teacher.checkpoint=PATH), or "
        "teacher.checkpoint=auto to fine-tune it first",
    )


def entropy(logits: Tensor) -> float:
    """Mean entropy of softmax(logits) over log K, from 0 (one-hot) to 1 (uniform)."""
    log_p = logits.double().log_softmax(1)  # (N, K)
    return (-(log_p.exp() * log_p).sum(1).mean() / torch.tensor(float(max(2, logits.shape[1]))).log()).item()


def percent(fraction: float) -> str:
    """As people read it."""
    return f"{100 * fraction:.1f} %"
