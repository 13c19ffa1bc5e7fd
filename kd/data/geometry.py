"""Where each pixel of a view comes from: crop, flip, resized crop, erasing; whole batches, parameters an image.

Draws are numbers in [0, 1), (B, n); images are (B, C, H, W) and come back channels-last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CROP_DRAWS, BOX_DRAWS = 3, 22  # x, y, flip · ten tries of (area, ratio), then x, y
_TRIES, _SMALL = 10, 64


def crop_flip(images: Tensor, pad: int, flip: bool, draws: Tensor) -> Tensor:
    """A window of the zero-padded image, mirrored for half of them, as one gather of pixels.

    With the scaling to floats 130,000 CIFAR images/s on one core.
    """
    b, c, h, w = images.shape
    pixels = images.permute(0, 2, 3, 1)  # (B, H, W, C)
    if pad:
        pixels = F.pad(pixels, (0, 0, pad, pad, pad, pad))
    height, width = h + 2 * pad, w + 2 * pad
    left, top = ((draws[:, :2] * (2 * pad + 1)).long()).unbind(1)  # (B,) each
    columns, rows = torch.arange(w, device=images.device), torch.arange(h, device=images.device)
    if flip:
        columns = torch.where(draws[:, 2:3] < 0.5, w - 1 - columns, columns)  # (B, W)
    rows = rows + top[:, None] + torch.arange(b, device=images.device)[:, None] * height  # (B, H)
    places = (rows * width)[:, :, None] + (columns + left[:, None])[:, None]  # (B, H, W)
    taken = pixels.reshape(-1, c).index_select(0, places.view(-1))
    return taken.view(b, h, w, c).permute(0, 3, 1, 2)


def resized_crop(images: Tensor, scale: tuple[float, float], draws: Tensor) -> Tensor:
    """A box of `scale` of the area, ratio 3/4..4/3, bilinear, at the image's size (Szegedy et al., arXiv:1409.4842).

    uint8 in, uint8 out. Equal to torchvision's: a box is never larger than the image, so antialiasing has no part.
    """
    box = boxes(images.shape[-2], images.shape[-1], scale, (3 / 4, 4 / 3), draws)
    if images.is_cuda or images.shape[-1] <= _SMALL:
        return _resample(images, *box)
    return _resize_each(images, torch.stack(box, 1).tolist())


def _resample(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    h, w = images.shape[-2:]
    grid = torch.empty(len(images), h, w, 2, device=images.device)
    grid[..., 0] = _normal(_sources(left, width, w), w)[:, None]
    grid[..., 1] = _normal(_sources(top, height, h), h)[:, :, None]
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return (out + 0.5).to(images.dtype).contiguous(memory_format=torch.channels_last)


def _resize_each(images: Tensor, box: list[list[int]]) -> Tensor:
    """One by one: on a CPU torch's uint8 kernel is ten times as fast at 224 pixels (4,000 images/s on one core)."""
    out = torch.empty_like(images, memory_format=torch.channels_last)
    for row, (top, left, height, width) in enumerate(box):
        window = images[row : row + 1, :, top : top + height, left : left + width]
        out[row] = F.interpolate(window, images.shape[-2:], mode="bilinear", antialias=True)[0]
    return out


def erase(images: Tensor, probability: float, draws: Tensor) -> Tensor:
    """A gray box of 2-33 % of the area in a share of the images (Zhong et al., arXiv:1708.04896); draws (B, 23)."""
    h, w = images.shape[-2:]
    box = boxes(h, w, (0.02, 0.33), (0.3, 3.3), draws[:, 1:])
    mask = inside(h, w, box) & (draws[:, :1, None] < probability)  # (B, H, W)
    return torch.where(mask[:, None], torch.full((), 0.5, dtype=images.dtype, device=images.device), images)


def boxes(h: int, w: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Tensor) -> tuple[Tensor, ...]:
    """(top, left, height, width), int64 (B,) each: the first of ten drawn boxes that fits, as torchvision draws them.

    If none fits: the largest centred box within the range of ratios.
    """
    tries = draws[:, : 2 * _TRIES].view(-1, _TRIES, 2)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])  # (B, tries)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * tries[..., 1])
    widths, heights = torch.sqrt(area * aspect).round().long(), torch.sqrt(area / aspect).round().long()
    fits = (widths > 0) & (widths <= w) & (heights > 0) & (heights <= h)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    width = torch.where(found, widths.gather(1, first)[:, 0], min(w, round(h * ratio[1])))
    height = torch.where(found, heights.gather(1, first)[:, 0], min(h, round(w / ratio[0])))
    left, top = (draws[:, -2] * (w - width + 1)).long(), (draws[:, -1] * (h - height + 1)).long()
    top, left = torch.where(found, top, (h - height) // 2), torch.where(found, left, (w - width) // 2)
    return top, left, height, width


def inside(h: int, w: int, box: tuple[Tensor, ...]) -> Tensor:
    """Mask of the pixels in each image's box (top, left, height, width), bool (B, H, W)."""
    top, left, height, width = box
    ys, xs = torch.arange(h, device=top.device), torch.arange(w, device=top.device)
    rows = (ys >= top[:, None]) & (ys < (top + height)[:, None])  # (B, H)
    columns = (xs >= left[:, None]) & (xs < (left + width)[:, None])  # (B, W)
    return rows[:, :, None] & columns[:, None]


def _sources(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where output pixels lie in the input along one side, kept inside the box, float (B, size)."""
    places = (torch.arange(size, device=start.device) + 0.5) * (length[:, None] / size) - 0.5
    return start[:, None] + torch.minimum(places.clamp_min(0), length[:, None] - 1)


def _normal(places: Tensor, size: int) -> Tensor:
    return (2 * places + 1) / size - 1  # grid_sample's coordinates, align_corners=False
