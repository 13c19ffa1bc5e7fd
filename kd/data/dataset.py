"""A data set, ready to be used: classes, size, and the splits for training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kd.data import digest, store
from kd.data.partition import partition
from kd.data.pool import Stored, Streamed
from kd.data.source import Source, locate
from kd.data.split import Split


@dataclass
class Dataset:
    """What `load` gives; `val` and `test` are None where there is none, `train` if it is missing and was not needed."""

    classes: list[str]
    image_size: int  # height and width of every image
    channels: int  # 1 or 3
    mirror: bool  # whether a mirrored image keeps its class
    digest: str  # of the content of the files and the decode policy
    num_samples: int  # of the whole training pool, in which `index` counts
    train: Split | None
    val: Split | None
    test: Split | None
    skipped: list[str] = field(default_factory=list)  # broken files that were left out, with the reason

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def load(spec: Mapping, *, store_dir: Path, need_train: bool = True) -> Dataset:
    """The data set of a resolved `conf/dataset` mapping; decoded into `store_dir` at first use if it fits memory_gib.

    Raises ValueError or FileNotFoundError that names the file or the key, and what to type instead.
    """
    spec, store_dir = {**spec, "need_train": need_train}, Path(store_dir)
    _check_keys(spec)
    source = locate(spec["_target_"])(spec)
    found = digest.content(source, store_dir)
    size = found["image_size"] if spec.get("image_size", "auto") == "auto" else int(spec["image_size"])
    pools, broken = _pools(source, found["digest"], size, store_dir, spec)
    skipped = _skipped(source, broken, spec.get("on_error", "raise"))
    splits, num_samples = _splits(source, pools, broken, spec)
    return Dataset(
        classes=source.classes,
        image_size=size,
        channels=source.channels,
        mirror=bool(spec.get("mirror", True)),
        digest=found["digest"],
        num_samples=num_samples,
        skipped=skipped,
        **splits,
    )


def _check_keys(spec: Mapping) -> None:
    size, on_error = spec.get("image_size", "auto"), spec.get("on_error", "raise")
    if size != "auto" and not (str(size).isdigit() and int(size) > 0):
        raise ValueError(f"dataset.image_size={size}: expected auto or a number of pixels, such as 32")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"dataset.on_error={on_error}: expected raise or skip")


def _pools(source: Source, content: str, size: int, store_dir: Path, spec: Mapping) -> tuple[dict, dict]:
    """Each split's pixels, and its broken images: {split: {position: reason}}."""
    total = sum(len(items) for items in source.splits.values()) * size * size * source.channels
    if total <= float(spec.get("memory_gib", 8.0)) * 2**30:
        images, broken = store.open_store(source, content, size, store_dir)
        return {name: Stored(part) for name, part in images.items()}, broken
    skip = spec.get("on_error", "raise") == "skip"  # otherwise a broken file stops the run when its turn comes
    broken = store.scan(source, size, content, store_dir) if skip else {name: {} for name in source.splits}
    workers = int(spec.get("workers") or 0)
    return {n: Streamed(i.images, source.channels, size, workers, n) for n, i in source.splits.items()}, broken


def _skipped(source: Source, broken: dict[str, dict[int, str]], on_error: str) -> list[str]:
    lost = store.describe(source, broken)
    if lost and on_error == "raise":
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise ValueError(f"{lost[0]}{more}. Repair or remove it, or leave broken files out with dataset.on_error=skip")
    return lost + [f"{name}: not an image" for items in source.splits.values() for name in items.skipped]


def _splits(source: Source, pools: dict, broken: dict, spec: Mapping) -> tuple[dict[str, Split | None], int]:
    whole = {name: _whole(source, name, pool, broken[name]) for name, pool in pools.items()}
    test, own_val, pool = whole.get("test"), whole.get("val"), whole.get("train")
    use_val = float(spec.get("val_fraction", 0.1)) > 0
    if pool is None:
        return {"train": None, "val": own_val if use_val else None, "test": test}, 0
    train, val = partition(pool.targets, source.classes, spec, source.total or len(pool), own_val is not None)
    cut = pool.subset(val) if len(val) else None
    return {"train": pool.subset(train), "val": (own_val or cut) if use_val else None, "test": test}, len(pool)


def _whole(source: Source, name: str, pool: Any, broken: dict[int, str]) -> Split | None:
    labels = torch.tensor([int(label) for label in source.splits[name].labels], dtype=torch.int64)
    rows = torch.tensor([row for row in range(len(labels)) if row not in broken], dtype=torch.int64)
    return Split(pool, rows, labels[rows], torch.arange(len(rows))) if len(rows) else None
