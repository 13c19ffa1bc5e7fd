"""Where a split's pixels come from: a store in memory, or files decoded by workers. Same batches, same order."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kd.data.decode import BrokenImage, decode, name_of


class Stored:
    """All images as one tensor; on CUDA a copy lives on the device if it takes less than half of what is free there."""

    def __init__(self, images: Tensor):
        self.images, self._resident = images, {}

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: Tensor) -> Tensor:
        """uint8 (B, C, H, W), channels-last."""
        return _gather(self.images, rows)

    def stream(self, chunks: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The images of one chunk of rows after the other, on the device."""
        images = self._on(device)
        for rows in chunks:
            if images is not None:
                yield _gather(images, rows.to(device, non_blocking=True))
            else:
                yield _gather(self.images, rows).pin_memory().to(device, non_blocking=True)

    def _on(self, device: torch.device) -> Tensor | None:
        if device.type == "cpu":
            return self.images
        if device not in self._resident:
            fits = device.type != "cuda" or 2 * self.images.nbytes < torch.cuda.mem_get_info(device)[0]
            self._resident[device] = self.images.to(device) if fits else None
        return self._resident[device]


def _gather(images: Tensor, rows: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)  # whole images, as they lie in memory


class Streamed:
    """Files decoded on demand: in this process with `workers=0`, else ahead of use by that many worker processes."""

    def __init__(self, images: Sequence[Any], channels: int, size: int, workers: int = 0, name: str = "train"):
        self._reader, self.workers = _Reader(images, channels, size, name), workers

    def __len__(self) -> int:
        return len(self._reader.images)

    def gather(self, rows: Tensor) -> Tensor:
        """uint8 (B, C, H, W), channels-last. Raises ValueError naming a broken file."""
        return _checked(self._reader.__getitems__(rows.tolist()))

    def stream(self, chunks: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The images of one chunk of rows after the other, on the device."""
        from torch.utils.data import DataLoader

        loader = DataLoader(
            self._reader,
            batch_sampler=[rows.tolist() for rows in chunks],
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            collate_fn=_identity,
            worker_init_fn=_plain_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a base seed: from here, not from the global generator
        )
        for images in loader:
            yield _checked(images).to(device, non_blocking=True)


class _Reader:
    """A map-style data set whose items are whole batches; an error is a value, to show no worker's traceback."""

    def __init__(self, images: Sequence[Any], channels: int, size: int, name: str):
        self.images, self.channels, self.size, self.name = images, channels, size, name

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> Tensor | str:
        out = torch.empty(len(rows), self.size, self.size, self.channels, dtype=torch.uint8)
        for place, row in enumerate(rows):
            try:
                out[place] = decode(self.images[row], self.channels, self.size).permute(1, 2, 0)
            except BrokenImage as error:
                return f"{name_of(self.images[row], f'{self.name} image {row}')}: {error}"
        return out.permute(0, 3, 1, 2)


def _plain_signals(_: int) -> None:
    """Ctrl-C goes to the whole group: the parent decides what becomes of the run, with its own handlers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _identity(batch: Any) -> Any:
    return batch


def _checked(images: Tensor | str) -> Tensor:
    if isinstance(images, str):
        raise ValueError(f"{images}. Repair or remove it, or leave broken files out with dataset.on_error=skip")
    return images
