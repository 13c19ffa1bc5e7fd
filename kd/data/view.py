"""The augmented view of a batch: a function of (seed, epoch, index) alone, in batches, on the batch's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kd.contracts import Batch
from kd.data import geometry, mixing, policies
from kd.data.counters import uniform

_PLACE, _JITTER, _POLICY, _ERASE, _MIX = range(5)  # streams of draws; a view's own stream s adds 16 s
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

    In this order: crop and flip, colour jitter, RandAugment or TrivialAugment, erasing, mixup or cutmix. What is
    drawn for an image depends on (seed, whole epochs, index) and nothing else; a mixing pair is 2k, 2k+1 of the batch
    and draws by its first image. `teacher_view` is the loop's affair.
    """

    def __init__(self, augment: Mapping, image_size: int, mirror: bool, num_classes: int):
        """`mirror`: whether flips keep an image's class. Raises ValueError for settings out of range or at odds."""
        settings = {**_DEFAULTS, **augment}
        _check(settings)
        self.pad = round(float(settings["crop_padding"]) * image_size)
        self.scale = tuple(settings["random_resized_crop"] or ()) or None
        self.flip = bool(settings["flip"] and mirror)
        self.jitter, self.trivial = float(settings["color_jitter"]), bool(settings["trivial"])
        self.rand = policies.parse_randaugment(settings["randaugment"]) if settings["randaugment"] else None
        self.erasing, self.cycle = float(settings["erasing"]), settings["cycle_epochs"]
        mixes = settings["mixup"] or settings["cutmix"]
        self.mixer = mixing.Mixer(settings["mixup"], settings["cutmix"], num_classes) if mixes else None

    def __call__(self, batch: Batch, stream: int = 0) -> Batch:
        """The view of a batch; another `stream` gives an independent view of the same images, mixed alike."""
        images = self._colored(self._placed(batch, stream), batch, stream)
        images, targets = scaled(images), batch.targets
        if self.erasing:
            images = geometry.erase(images, self.erasing, self._draws(batch, 1 + geometry.BOX_DRAWS, stream, _ERASE))
        if self.mixer is not None:
            pairs = replace(batch, index=batch.index[0 : len(batch.index) // 2 * 2 : 2])
            images, targets = self.mixer(images, targets, self._draws(pairs, mixing.DRAWS, 0, _MIX))
        return replace(batch, images=images, targets=targets)

    def clean(self, batch: Batch) -> Batch:
        """The images as they are, float in [0, 1], never mixed."""
        return replace(batch, images=scaled(batch.images))

    def _draws(self, batch: Batch, count: int, stream: int, purpose: int) -> Tensor:
        epoch = int(batch.epoch) % self.cycle if self.cycle else int(batch.epoch)
        return uniform(batch.seed, epoch, batch.index, count, 16 * stream + purpose)

    def _placed(self, batch: Batch, stream: int) -> Tensor:
        """Cropped and flipped, uint8 (B, C, H, W)."""
        images, scale = batch.images, self.scale
        if not (self.pad or self.flip or scale):
            return images
        draws = self._draws(batch, geometry.CROP_DRAWS + (geometry.BOX_DRAWS if scale else 0), stream, _PLACE)
        if scale:
            images = geometry.resized_crop(images, scale, draws[:, geometry.CROP_DRAWS :])
        return geometry.crop_flip(images, self.pad, self.flip, draws) if self.pad or self.flip else images

    def _colored(self, images: Tensor, batch: Batch, stream: int) -> Tensor:
        """With changed colours and by the drawn policies, uint8 (B, C, H, W)."""
        if self.jitter:
            images = policies.color_jitter(images, self.jitter, self._draws(batch, 3, stream, _JITTER))
        if self.rand:
            draws = self._draws(batch, 2 * self.rand[1], stream, _POLICY)
            images = policies.rand_augment(images, *self.rand, draws)
        if self.trivial:
            images = policies.trivial_augment(images, self._draws(batch, 3, stream, _POLICY))
        return images


def scaled(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1] in the same memory layout; floats as they are."""
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images


def _check(settings: Mapping) -> None:
    for key in sorted(set(settings) - set(_DEFAULTS)):
        raise ValueError(f"augment.{key}: no such key. There are {', '.join(_DEFAULTS)}")
    for key, most in (("crop_padding", 1.0), ("color_jitter", 1.0), ("erasing", 1.0)):
        if not 0 <= float(settings[key]) <= most:
            raise ValueError(f"augment.{key}={settings[key]}: expected a share from 0 to {most:g}")
    for key in ("mixup", "cutmix"):
        if float(settings[key]) < 0:
            raise ValueError(f"augment.{key}={settings[key]}: expected 0 (off) or the alpha of Beta(alpha, alpha)")
    scale, cycle = settings["random_resized_crop"], settings["cycle_epochs"]
    if scale and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise ValueError(
            f"augment.random_resized_crop={list(scale)}: expected [smallest, largest] area, such as [0.08, 1]"
        )
    if cycle is not None and cycle < 1:
        raise ValueError(f"augment.cycle_epochs={cycle}: expected a number of epochs, or null for new views in each")
    _check_choices(settings)


def _check_choices(settings: Mapping) -> None:
    for one, other in (("crop_padding", "random_resized_crop"), ("trivial", "randaugment")):
        if settings[one] and settings[other]:
            raise ValueError(f"augment.{one} and augment.{other} do the same work: switch one of them off")
    if settings["teacher_view"] not in ("same", "independent", "clean"):
        raise ValueError(f"augment.teacher_view={settings['teacher_view']}: expected same, independent or clean")
