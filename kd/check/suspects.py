"""What may be wrong between a teacher's weights and these images: the order of classes, the preprocessing, the head.

Each test compares a teacher with what it would be under another reading, image by image, and believes the other reading
only where it is better by more than luck (McNemar 1947). Images are spread evenly over the split, which lies class
after class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

SURE = 3.0  # standard deviations that make a difference more than luck
CLEAR = (
    0.03  # gain in top-1 that is worth stopping for: CIFAR's own mean and std in place of ImageNet's change one point
)
FIRST, MOST = 64, 1000  # images for a first look at each alternative; images at most
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def spread(split: Any, most: int) -> Any:
    """At most so many images of a split, evenly spaced: all of its classes, the same ones every time."""
    return split if len(split) <= most else split.subset(places(len(split), most))


def places(total: int, most: int) -> Tensor:
    """At most so many numbers from 0 to total - 1, evenly spaced, int64."""
    return torch.linspace(0, total - 1, min(total, most)).round().long()


def halves(targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two (places, other places), each with half of every class: every second image of it, whatever their order."""
    by_class = targets.argsort(stable=True)
    one, two = by_class[::2], by_class[1::2]
    return [(one, two), (two, one)]


def surely_better(new: Tensor, old: Tensor) -> bool:
    """Whether `new` is right on more images than `old` beyond luck; both bool (N,)."""
    gained, lost = int((new & ~old).sum()), int((old & ~new).sum())
    return gained - lost > SURE * (gained + lost) ** 0.5


def assign(guesses: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """order (K,): order[c] is the output that speaks for class c under the best one-to-one naming of the outputs."""
    from scipy.optimize import linear_sum_assignment

    pairs = torch.bincount(targets * num_classes + guesses, minlength=num_classes**2)
    counts = pairs.view(num_classes, num_classes).double() + 1e-6 * torch.eye(
        num_classes, dtype=torch.float64
    )  # ties: as is
    return torch.as_tensor(linear_sum_assignment(counts.numpy(), maximize=True)[1])


def other_order(logits: Tensor, targets: Tensor) -> tuple[Tensor, float] | None:
    """(order, top-1 under it) where another naming of the outputs is surely better, else None.

    The naming is found on one half of the images and judged on the other, both ways round: any naming fits the images
    that it was made from.
    """
    guesses, classes = logits.argmax(1), logits.shape[1]
    right, named = guesses == targets, torch.zeros(len(targets), dtype=torch.bool)
    for seen, judged in halves(targets):
        order = assign(guesses[seen], targets[seen], classes)
        named[judged] = guesses[judged] == order[targets[judged]]
    if not surely_better(named, right):
        return None
    return assign(guesses, targets, classes), named.double().mean().item()


@dataclass(frozen=True)
class Reading:
    """A way to prepare images that weights may have been trained with."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    swapped: bool = False  # blue, green, red

    def typed(self) -> str:
        """The overrides that choose it."""
        mean, std = (",".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"teacher.preprocess.mean=[{mean}] teacher.preprocess.std=[{std}]"


def readings(now: Preprocess, images: Tensor) -> list[Reading]:
    """The likely ways other than the present one; `images` uint8 (N, C, h, w) give the data's own mean and std."""
    channels = len(now.mean)
    own = images.permute(1, 0, 2, 3).flatten(1).double() / 255  # (C, N h w)
    mean, std = ((v.repeat(channels) if len(v) == 1 else v) for v in (own.mean(1), own.std(1).clamp(min=1e-3)))
    found = [
        Reading("pixels in [-1, 1]", (0.5,) * channels, (0.5,) * channels),
        Reading("pixels in [0, 1], not normalised", (0.0,) * channels, (1.0,) * channels),
        Reading("pixels in [0, 255]", (0.0,) * channels, (1 / 255,) * channels),
        Reading("the data's own mean and std", _rounded(mean), _rounded(std)),
    ]
    if channels == 3:
        found.insert(0, Reading("CIFAR-10's mean and std", CIFAR_MEAN, CIFAR_STD))
        found.insert(0, Reading("ImageNet's mean and std", IMAGENET_MEAN, IMAGENET_STD))
    if images.shape[1] == 3:
        found.append(
            Reading("blue, green and red in the place of red, green and blue", now.mean, now.std, swapped=True)
        )
    return [r for r in found if r.swapped or (r.mean, r.std) != (now.mean, now.std)]


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(v, 4) for v in values.tolist())


Right = Callable[[Any], Tensor]  # split -> whether each of its images is classified rightly, bool (N,)


def other_reading(classifier: nn.Module, split: Any, right: Right, now: Tensor) -> tuple[Reading, float, float] | None:
    """(the best other reading, top-1 under it, top-1 now) where one is clearly and surely better, else None.

    `now` is `right(split)` as it is, bool (N,). What looks better on a few images is looked at on more.
    """
    few, many, found = spread(split, FIRST), spread(split, MOST), None
    now_few, now_many = now[places(len(now), FIRST)], now[places(len(now), MOST)]
    for reading in readings(classifier.preprocess, few.images):
        gain = (read_as(classifier, few, right, reading).sum() - now_few.sum()).item()
        if gain < 2:
            continue
        then = read_as(classifier, many, right, reading)
        top1, before = then.double().mean().item(), now_many.double().mean().item()
        if top1 - before > CLEAR and surely_better(then, now_many) and (found is None or top1 > found[1]):
            found = (reading, top1, before)
    return found


def read_as(classifier: nn.Module, split: Any, right: Right, reading: Reading) -> Tensor:
    """`right(split)` with another preprocessing for the moment."""
    before = classifier.preprocess
    settings = {**before.settings(), "mean": reading.mean, "std": reading.std}
    device = next(classifier.parameters()).device
    classifier.preprocess = nn.Sequential(Preprocess(**settings), Swap()) if reading.swapped else Preprocess(**settings)
    try:
        classifier.preprocess.to(device)
        return right(split)
    finally:
        classifier.preprocess = before


class Swap(nn.Module):
    """Red and blue change places."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W)."""
        return images.flip(1)


def probe(features: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Whether a linear layer trained on the other half of the features (N, D) would be right, bool (N,).

    Ridge regression on standardised features: what the network knows about these classes, whatever its head says.
    """
    x = features.double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    right = torch.zeros(len(x), dtype=torch.bool)
    for seen, judged in halves(targets):
        train, test = x[seen], x[judged]
        wanted = nn.functional.one_hot(targets[seen], num_classes).double() - 1 / num_classes  # (n, K)
        kernel = train @ train.T
        ridge = 0.1 * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype)
        guesses = (test @ train.T @ torch.linalg.solve(kernel + ridge, wanted)).argmax(1)
        right[judged] = guesses == targets[judged]
    return right


def some(words: Sequence[str], count: int = 3) -> str:
    """The first few."""
    return ", ".join(words[:count]) + (f" and {len(words) - count} more" if len(words) > count else "")
