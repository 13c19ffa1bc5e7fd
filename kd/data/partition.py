"""Which images are for training and which for validation: stratified, nested, from a seed of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kd.data.counters import permutation


def stratified_order(labels: Tensor, seed: int, purpose: str) -> Tensor:
    """An order of which every beginning holds all classes in proportion (within one image), int64 (N,).

    One image of each class comes first; the rest is interleaved by the share of its class that has been dealt.
    So the first n for every n are a stratified subset, and smaller subsets are part of larger ones.
    """
    shuffled = permutation(seed, int.from_bytes(purpose.encode(), "big"), len(labels))  # (N,)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # (N,), class after class, random within
    counts = torch.bincount(labels)  # (K,)
    starts = counts.cumsum(0) - counts
    ranks = torch.arange(len(labels)) - starts[labels[by_class]]  # place within its class
    dealt = (ranks + 0.5) / counts[labels[by_class]]
    return by_class[torch.where(ranks == 0, 0.0, dealt).argsort(stable=True)]


def take(order: Tensor, fraction: float, total: int, least: int = 0) -> Tensor:
    """The first `fraction` of `total` of an order (rounded up, at least `least`), sorted."""
    return order[: max(math.ceil(fraction * total - 1e-9), least)].sort().values


def partition(labels: Tensor, classes: list[str], spec: Mapping, total: int, own_val: bool) -> tuple[Tensor, Tensor]:
    """Places in the training pool (train, val), each sorted int64.

    `total`: what val_fraction is a share of; `own_val`: the set has a validation split, so none is cut.
    Raises ValueError for fractions outside their range and for classes too small to be divided.
    """
    train_fraction, val_fraction = _fractions(spec)
    seed, everything = int(spec.get("split_seed", 0)), torch.arange(len(labels))
    val = everything[:0]
    if val_fraction and not own_val:
        _check_classes(labels, classes)
        val = take(stratified_order(labels, seed, "val"), val_fraction, total, least=len(classes))
    left = torch.ones(len(labels), dtype=torch.bool)
    left[val] = False
    rest = everything[left]
    if len(rest) == 0 or (torch.bincount(labels[rest], minlength=len(classes)) == 0).any():
        raise ValueError(
            f"dataset.val_fraction={val_fraction} leaves a class without training images: type a smaller one"
        )
    chosen = stratified_order(labels[rest], seed, "train")
    return rest[take(chosen, train_fraction, len(rest), least=len(classes))], val


def _fractions(spec: Mapping) -> tuple[float, float]:
    train, val = float(spec.get("train_fraction", 1.0)), float(spec.get("val_fraction", 0.1))
    if not 0 < train <= 1:
        raise ValueError(f"dataset.train_fraction={train}: expected a share above 0 and up to 1, such as 0.1")
    if not 0 <= val < 1:
        raise ValueError(f"dataset.val_fraction={val}: expected a share from 0 to below 1, such as 0.1")
    return train, val


def _check_classes(labels: Tensor, classes: list[str]) -> None:
    counts = torch.bincount(labels, minlength=len(classes))
    single = [name for name, count in zip(classes, counts.tolist(), strict=True) if count < 2]
    if single:
        raise ValueError(
            f"class '{single[0]}' has one training image, and validation needs one too. Add images, put a val/ folder "
            "beside train/, or type dataset.val_fraction=0"
        )
