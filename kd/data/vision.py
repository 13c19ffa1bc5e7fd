"""Sources that torchvision downloads: CIFAR, Fashion-MNIST, Oxford-IIIT Pet, Flowers-102."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kd.data.source import Items, Source


def cifar10(spec: Mapping) -> Source:
    """60,000 photographs of 32x32 in 10 classes, 10,000 of them for the test (Krizhevsky 2009)."""
    return _arrays(spec, "cifar10", "CIFAR10")


def cifar100(spec: Mapping) -> Source:
    """60,000 photographs of 32x32 in 100 classes, 10,000 of them for the test (Krizhevsky 2009)."""
    return _arrays(spec, "cifar100", "CIFAR100")


def fashion_mnist(spec: Mapping) -> Source:
    """70,000 gray pictures of clothes, 28x28, 10 classes, 10,000 for the test (Xiao et al., arXiv:1708.07747)."""
    return _arrays(spec, "fashion_mnist", "FashionMNIST", channels=1)


def oxford_iiit_pet(spec: Mapping) -> Source:
    """7,349 photographs of cats and dogs in 37 breeds, 3,669 of them for the test (Parkhi et al. 2012)."""
    parts = _parts(spec, "oxford_iiit_pet", "OxfordIIITPet", {"train": "trainval", "test": "test"})
    return Source(parts["train"].classes, {n: Items(_paths(p._images), p._labels) for n, p in parts.items()})


def flowers102(spec: Mapping) -> Source:
    """8,189 photographs of 102 flowers; its own splits of 1,020, 1,020 and 6,149 (Nilsback, Zisserman 2008)."""
    parts = _parts(spec, "flowers102", "Flowers102", {"train": "train", "val": "val", "test": "test"})
    classes = getattr(parts["train"], "classes", None) or [str(number) for number in range(102)]
    return Source(list(classes), {n: Items(_paths(p._image_files), p._labels) for n, p in parts.items()})


def _arrays(spec: Mapping, name: str, kind: str, channels: int = 3) -> Source:
    parts = _parts(spec, name, kind, {"train": True, "test": False}, key="train")
    splits = {n: Items(torch.as_tensor(p.data), torch.as_tensor(p.targets).tolist()) for n, p in parts.items()}
    return Source(list(parts["train"].classes), splits, channels=channels)


def _paths(files: Any) -> list[str]:
    return [str(file) for file in files]


def _parts(spec: Mapping, name: str, kind: str, splits: Mapping[str, Any], key: str = "split") -> dict[str, Any]:
    """{our split: torchvision's data set}, from `root`, downloaded there if it is missing and `download` allows it."""
    from torchvision import datasets

    make, root = getattr(datasets, kind), _root(spec, name)
    try:
        return {ours: make(str(root), **{key: theirs}, download=False) for ours, theirs in splits.items()}
    except (RuntimeError, OSError) as error:
        if not spec.get("download", True):
            raise FileNotFoundError(_ways_out(name, root, "it is not there, and dataset.download=false")) from error
    _download(lambda theirs: make(str(root), **{key: theirs}, download=True), splits, name, root)
    return {ours: make(str(root), **{key: theirs}, download=False) for ours, theirs in splits.items()}


def _root(spec: Mapping, name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.path.expanduser(str(spec["root"]))) if spec.get("root") else cache / "kd" / "datasets" / name


def _download(make: Callable, splits: Mapping[str, Any], name: str, root: Path) -> None:
    """Once, however many runs ask at the same time. Raises FileNotFoundError where there is no network."""
    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / f".{name}.lock"), _impatient():
            for theirs in splits.values():
                make(theirs)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(_ways_out(name, root, f"no download ({' '.join(str(error).split())})")) from error


@contextmanager
def _impatient(seconds: float = 15.0) -> Iterator[None]:
    """A silent network is an error after seconds, not minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _ways_out(name: str, root: Path, what: str) -> str:
    return (
        f"dataset={name} in {root}: {what}. Three ways out: run it once where there is a network and copy that folder, "
        "then dataset.root=PATH; your own images, dataset=folder dataset.root=PATH; or dataset=digits: it needs neither"
    )
