"""A split: images with labels, given out in batches whose order is a function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kd.contracts import Batch
from kd.data.counters import permutation
from kd.data.pool import Stored, Streamed


class Split:
    """`targets` and `index` (place in the whole training pool) are int64 (N,), on the CPU."""

    def __init__(self, pool: Stored | Streamed, rows: Tensor, targets: Tensor, index: Tensor):
        """`rows` (N,) are places in the pool; targets and index belong to them."""
        self._pool, self._rows, self.targets, self.index = pool, rows, targets, index

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, places: Tensor) -> Split:
        """The images at these places (M,) of this split; each keeps its index."""
        return Split(self._pool, self._rows[places], self.targets[places], self.index[places])

    @property
    def images(self) -> Tensor:
        """All images, uint8 (N, C, H, W): a view of the store where they lie in one piece, else a copy."""
        if isinstance(self._pool, Stored) and len(self) and len(self) == int(self._rows[-1] - self._rows[0]) + 1:
            return self._pool.images[int(self._rows[0]) : int(self._rows[-1]) + 1]
        return self._pool.gather(self._rows)

    def steps(self, batch_size: int) -> int:
        """Full batches in an epoch, at least one."""
        return max(1, len(self) // batch_size)

    def batches(self, batch_size: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """Every image once in fixed order, uint8, the short last batch included: for evaluation."""
        return self._run(list(torch.arange(len(self)).split(batch_size)), torch.device(device))

    def epoch(
        self,
        epoch: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        device: str | torch.device = "cpu",
        cycle_epochs: int | None = None,
    ) -> Iterator[Batch]:
        """The batches of an epoch, uint8, in the order drawn for (seed, epoch), from `start_step` on.

        A short last batch is dropped; a split smaller than a batch is one batch. `batch.epoch` is epoch + step/steps.
        `cycle_epochs` repeats the order too: with mixup the partner, and so a cached teacher's answer, follows from it.
        """
        steps, drawn = self.steps(batch_size), epoch % cycle_epochs if cycle_epochs else epoch
        order = permutation(seed, drawn, len(self))  # (N,)
        chunks = list(order[: steps * batch_size].split(batch_size))[start_step:]
        for step, batch in enumerate(self._run(chunks, torch.device(device)), start_step):
            batch.epoch, batch.seed = epoch + step / steps, seed
            yield batch

    def _run(self, chunks: list[Tensor], device: torch.device) -> Iterator[Batch]:
        images = self._pool.stream([self._rows[chunk] for chunk in chunks], device)
        for chunk, pixels in zip(chunks, images, strict=True):
            targets, index = self.targets[chunk], self.index[chunk]
            yield Batch(pixels, targets.to(device, non_blocking=True), index.to(device, non_blocking=True))
