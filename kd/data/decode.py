"""From one image item to uint8 pixels of the view's size: the decode policy, the same for stores and streams."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

POLICY = "exif, shorter side to size, bilinear with antialias, centre crop; 1"  # part of a data set's digest
SMALL = 64  # images of up to this size keep it under image_size=auto
PHOTO = 224
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"


class BrokenImage(ValueError):
    """An item that cannot be decoded; the message is the reason, without the file's name."""


def name_of(item: Any, place: str) -> str:
    """What to call an item in a message: its path, or where in its split it stands."""
    return item if isinstance(item, str) else place


def decode(item: Any, channels: int, size: int) -> Tensor:
    """Pixels of an item, uint8 (C, size, size). Raises BrokenImage."""
    return fit(_pixels(item, channels), size)


def fit(image: Tensor, size: int) -> Tensor:
    """Shorter side resized to `size`, then the centre: uint8 (C, H, W) -> (C, size, size)."""
    height, width = image.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        height, width = max(size, round(height * scale)), max(size, round(width * scale))
        image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    top, left = (height - size) // 2, (width - size) // 2
    return image[:, top : top + size, left : left + size]


class CommonSize:
    """What `image_size=auto` means for some images: their own size when all are square, alike and small, else 224."""

    def __init__(self):
        self.found, self.open = None, True

    def add(self, shapes: Iterable[tuple[int, int] | None]) -> None:
        """Let images (height, width) vote; broken ones, None, do not."""
        for shape in shapes:
            if shape is not None and self.open:
                self.found = self.found or shape
                self.open = shape == self.found and shape[0] == shape[1] and shape[0] <= SMALL

    def result(self) -> int:
        """The size, in pixels."""
        return self.found[0] if self.found and self.open else PHOTO


def shape(item: Any) -> tuple[int, int] | None:
    """(height, width) of an encoded file (bytes) or an array, from the header alone; None when it cannot be read."""
    if not isinstance(item, bytes):
        return tuple(item.shape[:2])
    if item.startswith(_PNG):
        return (int.from_bytes(item[20:24], "big"), int.from_bytes(item[16:20], "big"))
    return _jpeg_shape(item) if item.startswith(_JPEG) else _pillow_shape(item)


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Walks the segments to the frame header; ten times as fast as opening the file with Pillow."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[place + 5 : place + 7], "big"), int.from_bytes(
                data[place + 7 : place + 9], "big"
            )
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return _pillow_shape(data)


def _pillow_shape(data: bytes) -> tuple[int, int] | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _pixels(item: Any, channels: int) -> Tensor:
    if not isinstance(item, str | bytes):
        return _from_array(torch.as_tensor(item), channels)
    try:
        if isinstance(item, str):
            with open(item, "rb") as file:
                item = file.read()
        return _from_bytes(item, channels)
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:
        raise BrokenImage(_reason(item, error)) from error


def _reason(item: Any, error: Exception) -> str:
    if item == b"":
        return "the file is empty"
    last = (str(error).strip().splitlines() or [type(error).__name__])[0].rsplit(", ", 1)[-1]
    return "not an image that can be read" if "cannot identify" in last else f"broken image ({last})"


def _from_array(image: Tensor, channels: int) -> Tensor:
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)  # (C, H, W)
    return image.expand(channels, -1, -1) if image.shape[0] == 1 else image


def _from_bytes(data: bytes, channels: int) -> Tensor:
    """torchvision for JPEG and PNG (three times as fast), Pillow for the rest and for 16-bit and transposed files."""
    if not data.startswith((_JPEG, _PNG)):
        return _with_pillow(data, channels)
    from torchvision.io import ImageReadMode, decode_image

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode, apply_exif_orientation=True)
    return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)


def _with_pillow(data: bytes, channels: int) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as image:
        array = np.array(ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB"))
    return _from_array(torch.from_numpy(array), channels)
