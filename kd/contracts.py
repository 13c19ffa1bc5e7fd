"""The two values that data, models and losses hand each other: a batch and what a classifier says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGES = ("stage1", "stage2", "stage3", "stage4")


@dataclass
class Batch:
    """One augmented view of some training images, and where they came from."""

    images: Tensor  # float in [0, 1], (B, C, H, W); uint8 before the view
    targets: Tensor  # int64 (B,), or float (B, K) when labels are soft (mixup, cutmix, smoothing)
    index: Tensor  # int64 (B,): the image's place in the whole training pool, in [0, num_samples)
    epoch: float = 0.0  # epochs done, with fraction: 2.5 is the middle of the third
    seed: int = 0


@dataclass
class Output:
    """What a classifier says of a batch."""

    logits: Tensor  # (B, K)
    # stageN: map (B, C, H, W) · tokens: (B, N, C) · penultimate: (B, D); those that were asked for
    features: dict[str, Tensor] = field(default_factory=dict)
    head: nn.Module | None = None  # penultimate (B, D) -> logits (B, K)
    extra_logits: Tensor | None = None  # (B, K) of a distillation token or head, in training
    second: Output | None = None  # the same images under another view, for terms with views = 2
