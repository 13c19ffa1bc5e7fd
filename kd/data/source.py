"""Where images come from: class names, and for each split the images with their labels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Items:
    """The images of one split, not decoded yet, and their labels."""

    images: Sequence[Any]  # each a path (str), an encoded file (bytes), or a uint8 array (H, W) or (H, W, C)
    labels: Sequence[int]
    skipped: list[str] = field(default_factory=list)  # broken files that were left out already

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Source:
    """What a source function gives: `splits` has "train", and "val" and "test" where the set comes with them."""

    classes: list[str]
    splits: dict[str, Items]
    channels: int = 3
    image_size: int | None = None  # what `image_size=auto` means here; None: looked up in the images
    stamp: str | None = None  # changes when the content does; files need none, their size and times are looked at
    total: int | None = None  # what `val_fraction` is a share of, where the test split was cut from the same images


def locate(path: str) -> Callable[[Mapping], Source]:
    """The source function behind a dotted path such as `kd.data.sources.folder`.

    Raises ValueError when it cannot be found.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"dataset._target_={path}: cannot find it ({error}). Expected the dotted path of a function "
            "source(spec) -> kd.data.Source, importable from here (PYTHONPATH)."
        ) from error
