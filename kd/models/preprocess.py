"""What turns images into one network's input: size, channels, normalisation; in batches, on the images' device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


def resize(images: Tensor, height: int, width: int, interpolation: str = "bilinear") -> Tensor:
    """(B, C, h, w) -> (B, C, height, width), antialiased; values stay in the range that pixels have."""
    if images.shape[-2:] == (height, width):
        return images
    if interpolation == "nearest":
        return F.interpolate(images, (height, width), mode="nearest-exact")
    images = F.interpolate(images, (height, width), mode=interpolation, antialias=True, align_corners=False)
    return images.clamp(0, 1) if interpolation == "bicubic" and images.is_floating_point() else images


def centre(images: Tensor, size: int) -> Tensor:
    """The middle (B, C, size, size) of images that are at least as large."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def fit(images: Tensor, size: int) -> Tensor:
    """Shorter side resized to `size`, then the centre, as a data set's view does: (B, C, size, size)."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    return centre(resize(images, max(size, round(height * scale)), max(size, round(width * scale))), size)


def as_fractions(images: Tensor, size: int) -> Tensor:
    """float32 in [0, 1], (B, C, size, size); uint8 is resized in its own kernels, as a data set's view is."""
    if images.dtype != torch.uint8:
        return fit(images.float(), size)
    if images.shape[-2:] != (size, size) and images.device.type != "cpu":  # uint8 kernels are the CPU's only
        return fit(images.float(), size).round_().div(255)
    return fit(images, size).float().div(255)


class Preprocess(nn.Module):
    """uint8 or float in [0, 1], (B, C, h, w) -> normalised float32 (B, channels, size, size).

    Images of another size than the data set's view (`image_size`) are first brought to it; then, where the network
    has a `size` of its own, to that. A view larger than `size` is resized to `size / crop_pct` and its centre taken.
    One gray channel serves a network of any number of channels. The constants are kept out of the state dict and
    exact under any cast of the network.
    """

    def __init__(
        self,
        image_size: int,
        size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        *,
        interpolation: str = "bilinear",
        crop_pct: float = 1.0,
    ):
        """Raises ValueError for constants that no image can be normalised with."""
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(
                f"preprocess: mean={list(mean)}, std={list(std)}: expected as many positive std as mean values"
            )
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"preprocess.interpolation={interpolation}: expected one of {', '.join(INTERPOLATIONS)}")
        if not 0 < crop_pct <= 1:
            raise ValueError(f"preprocess.crop_pct={crop_pct}: expected a fraction above 0, at most 1")
        self.image_size, self.size = int(image_size), int(size or image_size)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.interpolation, self.crop_pct = interpolation, float(crop_pct)
        self.register_buffer("scale", torch.empty(1, len(self.std), 1, 1), persistent=False)
        self.register_buffer("shift", torch.empty(1, len(self.mean), 1, 1), persistent=False)
        self._fill()

    def _fill(self) -> None:
        device = self.scale.device
        if device.type != "meta":
            std, mean = torch.tensor(self.std, dtype=torch.float64), torch.tensor(self.mean, dtype=torch.float64)
            self.scale = (1 / std).float().to(device).view(1, -1, 1, 1)
            self.shift = (-mean / std).float().to(device).view(1, -1, 1, 1)

    def _apply(self, fn, recurse: bool = True) -> Preprocess:
        super()._apply(fn, recurse)
        self._fill()  # a cast to bfloat16 would round the constants
        return self

    def settings(self) -> dict:
        """The constructor's arguments."""
        return {
            "image_size": self.image_size,
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        channels = self.scale.shape[1]
        if images.shape[1] not in (1, channels):
            raise ValueError(f"images have {images.shape[1]} channels, the network takes {channels} (or 1, gray)")
        x = as_fractions(images, self.image_size)
        if self.size != self.image_size:
            side = round(self.size / self.crop_pct) if self.image_size > self.size else self.size
            x = centre(resize(x, side, side, self.interpolation), self.size)
        return torch.addcmul(self.shift, x, self.scale)  # (B, channels, size, size)

    def extra_repr(self) -> str:
        """One line of the network's printed form."""
        return ", ".join(f"{k}={v}" for k, v in self.settings().items())
