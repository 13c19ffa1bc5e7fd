"""Factor transfer: a paraphraser shortens the teacher's map, a translator the student's, and the two are compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.contracts import Batch, Output
from kd.graft import Norm
from kd.losses.align import need_positions, pool_larger
from kd.losses.attention import attention_map, check_power
from kd.losses.features import FeatureTerm

SLOPE = 0.1  # of the leaky ReLUs, as in the paper's code


def _layers(widths: Sequence[int], norm: bool, transposed: bool = False) -> nn.Sequential:
    """3x3 convolutions from each width to the next, each with a leaky ReLU."""
    kind, layers = nn.ConvTranspose2d if transposed else nn.Conv2d, []
    for channels, out in pairwise(widths):
        layers += [kind(channels, out, 3, padding=1), *([Norm(out)] if norm else []), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's map (B, C, H, W) with `rate` times as many factor maps."""

    def __init__(self, channels: int, factors: int):
        super().__init__()
        self.encoder = _layers((channels, channels, factors, factors), norm=False)
        self.decoder = _layers((factors, factors, channels, channels), norm=False, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction, (B, C, H, W)."""
        return self.decoder(self.encoder(x))


class FactorTransfer(FeatureTerm):
    """Factor transfer of Kim et al. 2018 (arXiv:1802.04977), eq. 3: mean |N(F_s) - N(F_t)|^q.

    F are factors, N the channel mean of F^p, flattened, of length 1 (`factor_power` p = 2, `distance_power` q = 1).
    The paper normalises the whole factor with its channels and takes the L1 norm; this is the reference code. A map
    of zeros stays 0.

    Until `paraphraser_epochs` the scalar is the paraphraser's relative error over the term's `weight` (the
    student then learns from the other terms alone; published: 30 of 240 epochs); afterwards the paraphraser is
    fixed and the translator learns with the student. `paraphraser_epochs: 0` keeps the paraphraser at its random
    start, a fixed random projection. `rate: null` compares the features themselves, without either.
    """

    def __init__(
        self,
        stages: str | Sequence[str] = "stage4",
        teacher_stages: str | Sequence[str] | None = None,
        *,
        rate: float | None = 0.5,
        paraphraser_epochs: float = 0.0,
        factor_power: float = 2.0,
        distance_power: float = 1.0,
        **schedule,
    ):
        super().__init__(stages, teacher_stages, **schedule)
        self.rate, self.paraphraser_epochs = rate, paraphraser_epochs
        self.factor_power, self.distance_power = check_power(factor_power), check_power(distance_power)

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """A paraphraser and a translator for each stage."""
        need_positions(students, teachers)
        if self.rate is None:
            return
        students, teachers = ([x.shape[1] for x in maps] for maps in (students, teachers))
        counts = [max(1, int(width * self.rate)) for width in teachers]
        self.paraphrasers = nn.ModuleList(Paraphraser(t, n) for t, n in zip(teachers, counts, strict=True))
        self.translators = nn.ModuleList(
            _layers((s, s, n, n), norm=True) for s, n in zip(students, counts, strict=True)
        )

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """The factors' distance at each stage, or the paraphrasers' errors while they learn."""
        students, teachers = self.maps(student, teacher)
        if self.rate is not None:
            if batch.epoch < self.paraphraser_epochs:
                return [self.unlike(p(t), t) for p, t in zip(self.paraphrasers, teachers, strict=True)]
            students = [translate(s) for translate, s in zip(self.translators, students, strict=True)]
            with torch.no_grad():
                teachers = [p.encoder(t) for p, t in zip(self.paraphrasers, teachers, strict=True)]
        return [self.compare(*pool_larger(s, t)) for s, t in zip(students, teachers, strict=True)]

    def unlike(self, rebuilt: Tensor, teacher: Tensor) -> Tensor:
        """The squared error relative to the teacher's square, over `weight`: steps of any other size would diverge."""
        return F.mse_loss(rebuilt, teacher) / teacher.square().mean().clamp_min(1e-12) / (self.weight or 1.0)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """mean |N(F_s) - N(F_t)|^q."""
        gap = (attention_map(student, self.factor_power) - attention_map(teacher, self.factor_power)).abs()
        return gap.mean() if self.distance_power == 1 else gap.pow(self.distance_power).mean()
