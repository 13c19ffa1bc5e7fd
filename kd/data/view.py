"""The augmented view of a batch: a function of (seed, epoch, index) alone, in batches, on the batch's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kd.contracts import Batch
from kd.data import geometry
from kd.data.counters import uniform

_PLACE, _COLOUR, _ERASE, _MIX = 0, 1, 2, 3  # streams of draws; a view's own stream s adds 16 s
_DEFAULTS = {
    "crop_padding": 0.0,
    "random_resized_crop": None,
    "flip": False,
    "color_jitter": 0.0,
    "randaugment": None,
    "trivial": False,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "cycle_epochs": None,
    "teacher_view": "same",
}


class View:
    """uint8 batch -> the same images augmented, float in [0, 1], channels-last; targets soft if images are mixed.

    What is drawn for an image depends on (seed, whole epochs, index) and nothing else; a mixing pair is 2k, 2k+1 of the
    batch and draws by its first image. `teacher_view` is the loop's affair.
    """

    def __init__(self, augment: Mapping, image_size: int, mirror: bool, num_classes: int):
        """`mirror`: whether flips keep an image's class. Raises ValueError for settings out of range or at odds."""
        self.settings = {**_DEFAULTS, **augment}
        self._check()
        self.pad = round(self.settings["crop_padding"] * image_size)
        self.flip = bool(self.settings["flip"] and mirror)
        self.num_classes = num_classes

    def __call__(self, batch: Batch, stream: int = 0) -> Batch:
        """The view of a batch; another `stream` gives an independent view of the same images with the same mixing."""
        images = self._place(batch, stream)
        images = scaled(images)
        return replace(batch, images=images)

    def clean(self, batch: Batch) -> Batch:
        """The images as they are, float in [0, 1], never mixed."""
        return replace(batch, images=scaled(batch.images))

    def _draws(self, batch: Batch, count: int, stream: int, index: Tensor | None = None) -> Tensor:
        cycle, epoch = self.settings["cycle_epochs"], int(batch.epoch)
        index = batch.index if index is None else index
        return uniform(batch.seed, epoch % cycle if cycle else epoch, index, count, stream)

    def _place(self, batch: Batch, stream: int) -> Tensor:
        """Crop and flip, uint8 (B, C, H, W)."""
        images = batch.images
        if self.pad or self.flip:
            draws = self._draws(batch, geometry.CROP_DRAWS, 16 * stream + _PLACE)
            images = geometry.crop_flip(images, self.pad, self.flip, draws)
        return images

    def _check(self) -> None:
        unknown = sorted(set(self.settings) - set(_DEFAULTS))
        if unknown:
            raise ValueError(f"augment.{unknown[0]}: no such key. There are {', '.join(_DEFAULTS)}")


def scaled(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1] in the same memory layout; floats as they are."""
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images
