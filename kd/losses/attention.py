"""Terms without parameters on maps: attention, neuron selectivity, and the flow between stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.contracts import Batch, Output
from kd.losses.align import need_positions, pick, pool_larger, project
from kd.losses.features import EVERY, LAST_THREE, FeatureTerm


def check_power(value: float) -> float:
    """The power, if a gradient exists at 0. Raises ValueError below 1."""
    if value < 1:
        raise ValueError(f"the power {value:g} has no finite gradient at 0: give one of at least 1")
    return value


def attention_map(feature: Tensor, power: float = 2.0, total: bool = False) -> Tensor:
    """(B, H * W): the channel mean (or `total`) of F^power, of length 1; 0 stays 0.

    An odd power keeps the sign, as in the reference codes; one that is no integer takes |F|, where they give NaN.
    """
    raised = feature.pow(power) if float(power).is_integer() else feature.abs().pow(power)
    pooled = raised.sum(1) if total else raised.mean(1)  # (B, H, W)
    return F.normalize(pooled.flatten(1), dim=1)


class AttentionTransfer(FeatureTerm):
    """Attention of Zagoruyko & Komodakis 2017 (arXiv:1612.03928): Q = F^p over channels, of length 1.

    `form: code` (authors' and reference codes): mean over batch and positions of (Q_s - Q_t)², summed over stages.
    `form: paper` (eq. 2 without its factor β/2): mean over the batch of |Q_s - Q_t|, the norm not squared; where
    the two are equal its gradient is 0. Maps of unlike heights: the larger is pooled, before the power.
    """

    def __init__(
        self,
        stages: str | Sequence[str] = LAST_THREE,
        teacher_stages: str | Sequence[str] | None = None,
        *,
        power: float = 2.0,
        form: str = "code",
        **schedule,
    ):
        super().__init__(stages, teacher_stages, **schedule)
        if form not in ("code", "paper"):
            raise ValueError(f"form is 'code' or 'paper', not '{form}'")
        self.power, self.form = check_power(power), form

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """Nothing; vectors are refused."""
        need_positions(students, teachers)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of one stage's attention maps."""
        paper = self.form == "paper"
        gap = attention_map(student, self.power, paper) - attention_map(teacher, self.power, paper)  # (B, H * W)
        return torch.linalg.vector_norm(gap, dim=1).mean() if paper else gap.square().mean()


class NeuronSelectivity(FeatureTerm):
    """Neuron selectivity of Huang & Wang 2017 (arXiv:1707.01219), eq. 6 with the polynomial kernel (d=2, c=0).

    mean k(T, T) + mean k(S, S) - 2 mean k(S, T), k(a, b) = (a·b)² over channel maps of length 1, summed over
    stages. Where a map has fewer positions than channels it is computed as |SᵀS/C_s - TᵀT/C_t|², the same number
    from (B, P, P). A channel that is 0 everywhere stays 0.
    """

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """Nothing; vectors are refused."""
        need_positions(students, teachers)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The squared mean discrepancy of one stage."""
        s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))  # (B, C, P)
        if s.shape[2] <= max(s.shape[1], t.shape[1]):
            return (_positions(t) - _positions(s)).square().sum(dim=(1, 2)).mean()
        return _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)


def _positions(x: Tensor) -> Tensor:
    return x.transpose(1, 2) @ x / x.shape[1]  # (B, P, P)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.transpose(1, 2)).square().mean()  # of (B, C_a, C_b)


def flow(bottom: Tensor, top: Tensor) -> Tensor:
    """(B, C_top, C_bottom): the mean over positions of top times bottom, the larger map pooled to the other."""
    bottom, top = pool_larger(bottom, top)
    return top.flatten(2) @ bottom.flatten(2).transpose(1, 2) / bottom[0, 0].numel()


class Flow(FeatureTerm):
    """Flow of the solution procedure, Yim et al. 2017 (CVPR): Gram matrices of neighbouring stages.

    Sum over neighbouring pairs of the mean of (G_s - G_t)². The paper takes the squared Frobenius norm (a sum) and
    max pooling, the reference code the mean and average pooling. Both networks' widths must be the same there; here
    a student of another width gets a trained 1x1 convolution. It needs two stages with positions: vectors are
    refused.
    """

    def __init__(
        self, stages: str | Sequence[str] = EVERY, teacher_stages: str | Sequence[str] | None = None, **schedule
    ):
        super().__init__(stages, teacher_stages, **schedule)

    def setup(self, student: Output, teacher: Output | None, num_classes: int, num_samples: int) -> None:
        """Refuse what has no flow, then make a projection for each stage whose widths differ."""
        if len(self.student_features) < 2:
            raise ValueError("flow lies between two stages: give at least two, such as stages: [stage2, stage3]")
        chosen = ((student, "student", self.student_features), (teacher, "teacher", self.teacher_features))
        for output, owner, stages in chosen:
            for name in stages:
                if pick(output, name, owner).dim() == 2:
                    raise ValueError(
                        f"a flow is a mean over positions, but '{name}' of the {owner} is a vector without any. Choose "
                        "stages that are maps or tokens, or a term on vectors or logits: fitnet, sp, rkd, crd, ofa"
                    )
        super().setup(student, teacher, num_classes, num_samples)

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """1x1 convolutions, trained with the student."""
        widths = [(s.shape[1], t.shape[1]) for s, t in zip(students, teachers, strict=True)]
        self.projections = nn.ModuleList(nn.Identity() if s == t else project(s, t) for s, t in widths)

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """The mean square of each neighbouring pair."""
        students, teachers = self.maps(student, teacher)
        students = [projection(s) for projection, s in zip(self.projections, students, strict=True)]
        pairs = zip(pairwise(students), pairwise(teachers), strict=True)
        return [F.mse_loss(flow(*s), flow(*t)) for s, t in pairs]
