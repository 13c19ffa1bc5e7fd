"""The sources that need no library of their own: scikit-learn's digits, and a folder of images."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kd.data.partition import stratified_order, take
from kd.data.source import Items, Source

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LITTER = {"thumbs.db", "desktop.ini", "ehthumbs.db"}  # what operating systems leave; files with a leading dot too


def digits(spec: Mapping) -> Source:
    """1797 handwritten digits, 8x8 gray, values 0..16 scaled to 0..255, shown at 16x16 (Alpaydin, Kaynak 1998)."""
    images, labels = _digits_arrays(spec.get("root"))
    test = take(
        stratified_order(labels, spec.get("split_seed", 0), "test"), spec.get("test_fraction", 0.2), len(labels)
    )
    train = torch.ones(len(labels), dtype=torch.bool)
    train[test] = False
    splits = {name: Items(images[rows], labels[rows].tolist()) for name, rows in (("train", train), ("test", test))}
    return Source([str(digit) for digit in range(10)], splits, channels=1, image_size=16, total=len(labels))


def _digits_arrays(root: str | None) -> tuple[Tensor, Tensor]:
    """Images uint8 (1797, 8, 8) and labels; the file is read without importing scikit-learn (two seconds)."""
    import numpy as np

    home = Path(importlib.util.find_spec("sklearn").origin).parent if root is None else Path(root)
    file = home / ("datasets/data/digits.csv.gz" if root is None else "digits.csv.gz")
    if file.is_file():
        table = np.loadtxt(file, delimiter=",")
        values, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    elif root is not None:
        raise FileNotFoundError(
            f"dataset.root={root}: no digits.csv.gz there. Leave dataset.root out: it is not needed"
        )
    else:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        values, labels = bunch.images, bunch.target
    return torch.from_numpy((values * 255 / 16).round().astype("uint8")), torch.from_numpy(labels.astype("int64"))


def folder(spec: Mapping) -> Source:
    """Images in `root/{train,val,test}/<class>/...`; val/ and test/ may be absent, sub-folders of a class count.

    `args.channels` is 3 unless set to 1. Raises FileNotFoundError and ValueError for a folder of another shape,
    for files that are no images and for classes without images, each named.
    """
    root = _root(spec)
    need = spec.get("need_train", True)
    train = root / "train"
    if not train.is_dir() and (need or not (root / "test").is_dir()):
        raise FileNotFoundError(_no_train(root))
    classes = _classes(train if train.is_dir() else root / "test")
    skip = spec.get("on_error", "raise") == "skip"
    splits = {n: _split(root / n, classes, skip) for n in ("train", "val", "test") if (root / n).is_dir()}
    return Source(classes, splits, channels=int((spec.get("args") or {}).get("channels", 3)))


def _root(spec: Mapping) -> Path:
    if not spec.get("root"):
        raise ValueError("dataset=folder needs the folder that holds train/: type dataset.root=PATH")
    root = Path(os.path.expanduser(str(spec["root"]))).absolute()
    if not root.is_dir():
        raise FileNotFoundError(
            f"dataset.root={spec['root']}: no such folder (from {Path.cwd()}). Type dataset.root=PATH"
        )
    return root


def _no_train(root: Path) -> str:
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "no folders"
    return (
        f"dataset.root={root}: no train/ in it (found: {shown}). Expected train/CLASS/IMAGE, and perhaps val/ "
        "and test/ alike: type dataset.root=PATH of the folder that holds train/"
    )


def _classes(split: Path) -> list[str]:
    classes = sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{split}: no class folders in it. Expected {split.name}/CLASS/IMAGE: type dataset.root=PATH")
    return classes


def _split(split: Path, classes: list[str], skip: bool) -> Items:
    unknown = sorted(set(_classes(split)) - set(classes))
    if unknown:
        raise ValueError(
            f"{split}: class folders that train/ does not have: {', '.join(unknown[:8])}. Rename or remove them"
        )
    images, labels, strange = [], [], []
    for label, name in enumerate(classes):
        found = _files(split / name, strange)
        if not found and split.name == "train":
            raise ValueError(f"{split / name}: this class has no images. Add some, or remove the folder")
        images += found
        labels += [label] * len(found)
    if strange and not skip:
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise ValueError(
            f"{strange[0]}: not an image{more}. Remove it, or leave such files out with dataset.on_error=skip; "
            f"images end in {' '.join(sorted(IMAGES))}"
        )
    return Items(images, labels, strange)


def _files(folder: Path, strange: list[str]) -> list[str]:
    """Image files below a folder, in an order that is the same everywhere; others are added to `strange`."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or name.lower() in LITTER:
                continue
            ok = os.path.splitext(name)[1].lower() in IMAGES
            (found if ok else strange).append(os.path.join(place, name))
    return found
