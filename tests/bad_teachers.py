"""A small teacher of digits, its weights spoilt in the usual ways, and the digits as a folder of pictures."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kd import compose, run

TEACHER = ("teacher=resnet8", "teacher.args.width=8")
ALONE = (
    "teacher=none",
    "student=resnet8",
    "student.args.width=8",
    "recipe.steps=120",
    "recipe.lr=4e-3",
    "augment=none",
)
STUDENT = ("student=resnet8", "student.args.width=4", "recipe.steps=4", "recipe.batch_size=16", "baseline=off")
CLASSES = [str(digit) for digit in range(10)]


def train(runs_dir: Path):
    """The run of a good one: some 97 % of the validation images."""
    return run(compose(*ALONE, "tracker=none", "threads=1", f"runs_dir={runs_dir}"), say=lambda _: None)


def weights(good) -> dict[str, torch.Tensor]:
    """Its tensors."""
    return load_file(good.folder / "checkpoints" / "best" / "model.safetensors")


def spoil(good, folder: Path, **changed: torch.Tensor) -> Path:
    """The weights as a file from elsewhere, some tensors replaced (`fc_weight` is fc.weight)."""
    path = folder / "elsewhere.safetensors"
    save_file({**weights(good), **{n.replace("_", ".", 1): t for n, t in changed.items()}}, str(path))
    return path


def pictures(folder: Path, names: list[str] = CLASSES, count: int = 40) -> Path:
    """`count` digits of each class in folder/train/NAME, 16x16 gray PNG; names[d] is what digit d's folder is called."""
    from PIL import Image

    from kd import data

    spec = {"name": "digits", "_target_": "kd.data.sources.digits", "val_fraction": 0.0, "test_fraction": 0.2}
    split = data.load(spec, store_dir=folder / "store").train
    images = split.images
    for digit, name in enumerate(names):
        os.makedirs(folder / "train" / name)
        for place in (split.targets == digit).nonzero()[:count, 0].tolist():
            Image.fromarray(images[place, 0].numpy()).save(folder / "train" / name / f"{place:04}.png")
    return folder
