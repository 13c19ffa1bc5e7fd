"""How alike two networks' stages are: linear CKA, and its map as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


def gram(features: Tensor) -> Tensor:
    """Inner products (N, N) of N images' features, diagonal zero, centred so that the estimate of HSIC has no bias.

    Song et al. 2012 (JMLR 13), as Nguyen et al. 2021 (arXiv:2010.15327) use it: without this, N images in many more
    dimensions look alike whatever they are.
    """
    x = features.flatten(1).double()
    k = (x @ x.T).fill_diagonal_(0)
    n = len(k)
    means = k.sum(1) / (n - 2)
    means = means - means.sum() / (2 * (n - 1))
    return (k - means[:, None] - means[None]).fill_diagonal_(0)


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA (Kornblith et al. 2019, arXiv:1905.00414) of features (N, ...) and (N, ...).

    1 for the same up to rotation and scale, about 0 for unrelated ones. Raises ValueError for fewer than 4 images.
    """
    if len(x) < 4:
        raise ValueError(f"CKA needs 4 images or more, got {len(x)}")
    a, b = gram(x), gram(y)
    scale = (a * a).sum().sqrt() * (b * b).sum().sqrt()
    return ((a * b).sum() / scale.clamp(min=1e-30)).item()


@torch.no_grad()
def stage_features(classifier: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Every stage that a classifier has, and its penultimate vector, on some images (N, C, H, W), on the CPU."""
    wanted = [n for n in classifier.taps.names if n.startswith("stage") or n == "penultimate"]
    was, device = classifier.training, next(classifier.parameters()).device
    found = classifier.eval()(images.to(device), wanted).features
    classifier.train(was)
    return {name: feature.float().cpu() for name, feature in found.items()}


def compare(student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[list[str], list[str], list[list[float]]]:
    """(the student's stages, the teacher's, CKA of each pair: one row for each of the student's)."""
    ours, theirs = stage_features(student, images), stage_features(teacher, images)
    return list(ours), list(theirs), [[cka(x, y) for y in theirs.values()] for x in ours.values()]


def draw(found: tuple[list[str], list[str], list[list[float]]], path: Path, title: str, labels: list[str]) -> Path:
    """The map as a picture; `labels` of the teacher and the student."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns, values = found
    figure, axes = plt.subplots(figsize=(1.9 + 0.9 * len(columns), 1.6 + 0.7 * len(rows)), layout="constrained")
    picture = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes.text(
                x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.55 else "black", fontsize=9
            )
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, fontsize=10)
    figure.colorbar(picture, ax=axes, label="linear CKA (1: the same, 0: unrelated)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
