"""Knowledge review: the student's stages, fused from the deepest to the first, against the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.contracts import Batch, Output
from kd.losses.align import conv_norm, pool_larger
from kd.losses.features import EVERY, FeatureTerm

WIDEST = 512  # channels between the fusion modules, at most


def hierarchical_distance(student: Tensor, teacher: Tensor, levels: Sequence[int] = (4, 2, 1)) -> Tensor:
    """Mean squares of the maps and of their pooled forms at each size below their height, weighted 1, 1/2, 1/4, ...

    The weights are the authors' code's (the paper gives none); they halve over the levels in use and are divided by
    their sum.
    """
    distances = [F.mse_loss(student, teacher)]
    for level in levels:
        if level < student.shape[2]:
            pooled = (F.adaptive_avg_pool2d(x, (level, level)) for x in (student, teacher))
            distances.append(F.mse_loss(*pooled))
    weights = [0.5**n for n in range(len(distances))]
    return sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights)


class Fusion(nn.Module):
    """Attention-based fusion: a stage and the deeper ones, mixed by a learned map for each, then projected."""

    def __init__(self, channels: int, middle: int, out: int, fuse: bool):
        super().__init__()
        self.reduce = nn.Sequential(*conv_norm(channels, middle))
        self.expand = nn.Sequential(*conv_norm(middle, out, kernel_size=3))
        self.attention = nn.Conv2d(2 * middle, 2, 1) if fuse else None

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """(what compares with the teacher (B, C_t, *size), what goes on to the next stage (B, middle, *size))."""
        x = self.reduce(x)
        if self.attention is not None:
            deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            share = torch.sigmoid(self.attention(torch.cat([x, deeper], dim=1)))  # (B, 2, H, W)
            x = x * share[:, :1] + deeper * share[:, 1:]
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.expand(x), x


class ReviewKD(FeatureTerm):
    """Knowledge review of Chen et al. 2021 (arXiv:2104.09044), eq. 8: hierarchical context loss on fused stages.

    The student's stages are taken from the deepest (`penultimate`, a map of one position) to the first; each is
    mixed with the ones before it and compared with the teacher's stage of the same rank by `hierarchical_distance`.
    `fusion: false` compares the stages themselves and needs equal widths. Published weight 5 with a linear warm-up
    of 20 epochs (CIFAR-100).
    """

    def __init__(
        self,
        stages: str | Sequence[str] = (*EVERY, "penultimate"),
        teacher_stages: str | Sequence[str] | None = None,
        *,
        fusion: bool = True,
        levels: Sequence[int] = (4, 2, 1),
        **schedule,
    ):
        super().__init__(stages, teacher_stages, **schedule)
        self.fusion, self.levels = fusion, tuple(levels)

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """A fusion module for each stage."""
        widths = [(s.shape[1], t.shape[1]) for s, t in zip(students, teachers, strict=True)]
        if not self.fusion:
            if any(s != t for s, t in widths):
                raise ValueError(f"fusion: false needs equal widths, these are (student, teacher) {widths}")
            return
        middle, last = min(WIDEST, widths[-1][0]), len(widths) - 1
        self.fusions = nn.ModuleList(Fusion(s, middle, t, fuse=n < last) for n, (s, t) in enumerate(widths))

    def fused(self, students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
        """The student's stages, first to deepest, in the teacher's shapes."""
        results, deeper = [], None
        for fusion, s, t in reversed(list(zip(self.fusions, students, teachers, strict=True))):
            result, deeper = fusion(s, deeper, t.shape[-2:])
            results.insert(0, result)
        return results

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """The distance of each stage."""
        students, teachers = self.maps(student, teacher)
        if self.fusion:
            students = self.fused(students, teachers)
        return [self.compare(*pool_larger(s, t)) for s, t in zip(students, teachers, strict=True)]

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The hierarchical distance of one stage."""
        return hierarchical_distance(student, teacher, self.levels)
