"""Drawn image operations for whole batches: RandAugment, TrivialAugment, colour jitter.

Each operation takes uint8 images (B, C, H, W) and a magnitude for each, and gives what torchvision's function of the
same name gives image by image (to one grey level: factors are float32 here). Images are grouped by the operation drawn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 31  # magnitudes 0..30 in both policies, as in the papers
Op = Callable[[Tensor, Tensor], Tensor]


def rand_augment(images: Tensor, magnitude: int, rounds: int, draws: Tensor) -> Tensor:
    """`rounds` operations of a fixed magnitude (Cubuk et al., arXiv:1909.13719); draws (B, 2 rounds)."""
    bins = torch.full((len(images),), magnitude, device=images.device)
    for pair in draws.split(2, 1)[:rounds]:
        images = _apply(images, _RAND, pair[:, 0], bins, pair[:, 1])
    return images


def trivial_augment(images: Tensor, draws: Tensor) -> Tensor:
    """One operation of random strength (Müller, Hutter, arXiv:2103.10158, "wide"); draws (B, 3)."""
    choice, strength, sign = draws.unbind(1)
    return _apply(images, _TRIVIAL, choice, (strength * BINS).long(), sign)


def color_jitter(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """Brightness, contrast and saturation, in this order, by factors in 1 ± strength; draws (B, 3)."""
    for op, draw in zip((_brightness, _contrast, _color), draws.unbind(1), strict=True):
        images = op(images, (strength * (2 * draw - 1))[:, None, None, None])
    return images


def parse_randaugment(text: str) -> tuple[int, int]:
    """`m9-n2` -> (magnitude 9, 2 operations). Raises ValueError."""
    match = re.fullmatch(r"m(\d+)-n(\d+)", str(text))
    if match is None or int(match[1]) >= BINS or int(match[2]) < 1:
        raise ValueError(f"augment.randaugment={text}: expected mM-nN (M from 0 to 30, N operations), such as m9-n2")
    return int(match[1]), int(match[2])


def _apply(images: Tensor, space: dict, choice: Tensor, bins: Tensor, sign: Tensor) -> Tensor:
    """Operation floor(choice x number of operations) on each image; `choice` and `sign` (B,) in [0, 1), `bins` (B,)."""
    chosen = (choice * len(space)).long()  # (B,)
    for number, (op, strengths, signed) in enumerate(space.values()):
        if op is None:
            continue
        amount = _on(images.device, strengths, images.shape[-1])[bins]  # (B,)
        amount = torch.where(sign < 0.5, -amount, amount) if signed else amount
        images = _where(chosen == number, op, images, amount[:, None, None, None])
    return images


@functools.lru_cache(maxsize=128)
def _on(device: torch.device, strengths: Callable[[int], Tensor], width: int) -> Tensor:
    """A table of strengths on a device, copied once: a copy in each step would make the host wait."""
    return strengths(width).to(device)


def _where(mask: Tensor, op: Op, images: Tensor, amount: Tensor) -> Tensor:
    """`op` on the images of the mask. On CUDA on all of them: asking the device which would make the host wait."""
    if images.is_cuda:
        return torch.where(mask[:, None, None, None], op(images, amount), images)
    rows = mask.nonzero()[:, 0]
    return images.index_copy(0, rows, op(images[rows], amount[rows])) if len(rows) else images


def _blend(images: Tensor, other: Tensor, amount: Tensor) -> Tensor:
    """other + (1 + amount)(images - other): amount 0 leaves the images alone, -1 gives `other`."""
    return (images.float() * (1 + amount) - other * amount).clamp_(0, 255).to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().unbind(1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()[:, None]  # (B, 1, H, W)


def _brightness(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, torch.zeros((), device=images.device), amount)


def _contrast(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, _gray(images).mean((1, 2, 3), keepdim=True), amount)


def _color(images: Tensor, amount: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else _blend(images, _gray(images), amount)


def _sharpness(images: Tensor, amount: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import adjust_sharpness

    blurred = adjust_sharpness(images, 0.0).float()
    return (images.float() + amount * (images.float() - blurred)).clamp_(0, 255).to(torch.uint8)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images >= 255 * threshold, 255 - images, images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import autocontrast

    return autocontrast(images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import equalize

    return equalize(images)


def _shear_x(images: Tensor, amount: Tensor) -> Tensor:
    return _affine(images, xy=amount, x0=amount * images.shape[-2] / 2)


def _shear_y(images: Tensor, amount: Tensor) -> Tensor:
    return _affine(images, yx=amount, y0=amount * images.shape[-1] / 2)


def _translate_x(images: Tensor, pixels: Tensor) -> Tensor:
    return _affine(images, x0=-pixels.trunc())


def _translate_y(images: Tensor, pixels: Tensor) -> Tensor:
    return _affine(images, y0=-pixels.trunc())


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    angle = torch.deg2rad(degrees)
    return _affine(images, xx=angle.cos(), xy=-angle.sin(), yx=angle.sin(), yy=angle.cos())


def _affine(images: Tensor, *, xx=1.0, xy=0.0, x0=0.0, yx=0.0, yy=1.0, y0=0.0) -> Tensor:
    """The pixel at (x, y) from the centre comes from (xx x + xy y + x0, yx x + yy y + y0); nearest, black outside.

    Coefficients are numbers or (B, 1, 1, 1).
    """
    h, w = images.shape[-2:]
    x = (torch.arange(w, device=images.device) - (w - 1) / 2)[None, None, :, None]  # (1, 1, W, 1)
    y = (torch.arange(h, device=images.device) - (h - 1) / 2)[None, :, None, None]  # (1, H, 1, 1)
    grid_x = ((xx * x + xy * y + x0) / (w / 2)).expand(len(images), h, w, 1)
    grid_y = ((yx * x + yy * y + y0) / (h / 2)).expand(len(images), h, w, 1)
    grid = torch.cat([grid_x, grid_y], -1)  # (B, H, W, 2)
    moved = F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.to(torch.uint8)


def _upto(limit: float) -> Callable[[int], Tensor]:
    return lambda _: torch.linspace(0, limit, BINS)


def _bits(lost: int) -> Callable[[int], Tensor]:
    return lambda _: (8 - torch.arange(BINS) / ((BINS - 1) / lost)).round()


def _space(shear: float, shift: Callable, rotate: float, color: float, bits: int) -> dict:
    """{operation: (function, strengths by bin given the image's width, signed)} in torchvision's order."""
    return {
        "identity": (None, None, False),
        "shear_x": (_shear_x, _upto(shear), True),
        "shear_y": (_shear_y, _upto(shear), True),
        "translate_x": (_translate_x, shift, True),
        "translate_y": (_translate_y, shift, True),
        "rotate": (_rotate, _upto(rotate), True),
        "brightness": (_brightness, _upto(color), True),
        "color": (_color, _upto(color), True),
        "contrast": (_contrast, _upto(color), True),
        "sharpness": (_sharpness, _upto(color), True),
        "posterize": (_posterize, _bits(bits), False),
        "solarize": (_solarize, lambda _: torch.linspace(1, 0, BINS), False),
        "autocontrast": (_autocontrast, _upto(0), False),
        "equalize": (_equalize, _upto(0), False),
    }


_RAND = _space(0.3, lambda width: torch.linspace(0, 150 / 331 * width, BINS), 30, 0.9, 4)
_TRIVIAL = _space(0.99, _upto(32), 135, 0.99, 6)
