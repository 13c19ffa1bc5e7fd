"""Terms on which side of zero a neuron is: activation boundaries and the overhaul's margin ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.contracts import Batch, Output
from kd.losses.align import conv_norm, pool_larger
from kd.losses.features import LAST_THREE, ConvRegressor, FeatureTerm

RARE = 0.001  # below this probability of a negative value the margin is three deviations


class ActivationBoundary(FeatureTerm):
    """Activation boundaries of Heo et al. 2019 (arXiv:1811.03233), eq. 6, the differentiable form.

    Sum over stages l of L of 0.003 / B * 2^(l-L+1) * sum of (s + m)² where s > -m and the teacher is inactive (t <=
    0), and (s - m)² where s <= m and it is active; 0.003 is the reference code's constant, `scale`. A stage of
    another width or size gets the regressor of `FitNet` without its ReLU; equal ones are compared as they are (a
    student's map after a ReLU cannot go below zero there: `connect: true` gives it a regressor all the same;
    `false` refuses unlike ones). Published as a first stage alone (`first_epochs: 30` of 240), then cross-entropy
    alone.
    """

    def __init__(
        self,
        stages: str | Sequence[str] = LAST_THREE,
        teacher_stages: str | Sequence[str] | None = None,
        *,
        margin: float = 1.0,
        scale: float = 0.003,
        connect: bool | None = None,
        **schedule,
    ):
        super().__init__(stages, teacher_stages, **schedule)
        self.margin, self.scale, self.connect = margin, scale, connect

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """A regressor for each stage that needs one."""
        self.regressors = nn.ModuleList(self._regressor(s, t) for s, t in zip(students, teachers, strict=True))

    def _regressor(self, student: Tensor, teacher: Tensor) -> nn.Module:
        same = student.shape[1:] == teacher.shape[1:]
        if not same and self.connect is False:
            shapes = f"{tuple(student.shape[1:])} and {tuple(teacher.shape[1:])}"
            raise ValueError(f"connect: false compares stages as they are, but these have shapes {shapes}")
        return nn.Identity() if same and not self.connect else ConvRegressor(student.shape, teacher.shape, relu=False)

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """Each stage's penalty with its weight; the last stage's is 1, halving towards the input."""
        students, teachers = self.maps(student, teacher)
        students = [regressor(s) for regressor, s in zip(self.regressors, students, strict=True)]
        count = len(students)
        return [
            2.0 ** (level - count + 1) * self.compare(*pool_larger(s, t))
            for level, (s, t) in enumerate(zip(students, teachers, strict=True))
        ]

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """scale / B times the sum over elements."""
        zero, margin = student.new_zeros(()), self.margin
        inactive = torch.where((student > -margin) & (teacher <= 0), student + margin, zero)
        active = torch.where((student <= margin) & (teacher > 0), student - margin, zero)
        return self.scale * (inactive.square() + active.square()).sum() / len(student)


def normal_margin(mean: Tensor, deviation: Tensor) -> Tensor:
    """(C,): the mean of the negative part of normal(mean, |deviation|), computed in float64 and rounded to float32.

    Where negative values are rarer than 0.001 it is -3 |deviation|, as in the reference code, which rounds too.
    """
    mean, deviation = mean.double(), deviation.double().abs().clamp_min(1e-300)
    ratio = (mean / deviation).clamp(-1e6, 1e6)
    negative = 0.5 * torch.erfc(ratio / math.sqrt(2))
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    expected = mean - deviation * density / negative.clamp_min(1e-300)
    return torch.where(negative > RARE, expected, -3 * deviation).float()


class Overhaul(FeatureTerm):
    """Feature distillation overhaul of Heo et al. 2019 (arXiv:1904.01866), eq. 2 and 3: margin ReLU and partial L2.

    Sum over stages l of L of 2^-(L-1-l) times the batch mean of sum over channels and positions of d: (s - m)²
    where s > m >= t; (s - t)² where m < t <= 0 and s > t; (s - t)² where t > 0; else 0. s = batch norm(conv(F_s));
    t is pooled (or stretched) to s. m is a channel's mean negative response. The reference takes it from the
    teacher's batch norm (the normal with its bias and weight); `set_margins` does that. Without it m comes from a
    running mean and deviation of the teacher's feature, which for the output of a batch norm is the same and needs
    no such layer. The training weight 0.001 is the term's `weight`.
    """

    def __init__(
        self,
        stages: str | Sequence[str] = LAST_THREE,
        teacher_stages: str | Sequence[str] | None = None,
        *,
        kernel_size: int = 1,
        **schedule,
    ):
        super().__init__(stages, teacher_stages, **schedule)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep the resolution, not {kernel_size}")
        self.kernel_size = kernel_size

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """A connector and the running moments of the teacher for each stage."""
        pairs = list(zip(students, teachers, strict=True))
        self.connectors = nn.ModuleList(
            nn.Sequential(*conv_norm(s.shape[1], t.shape[1], self.kernel_size)) for s, t in pairs
        )
        self.moments = nn.ModuleList(Moments(t.shape[1]) for t in teachers)

    def set_margins(self, batch_norms: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fix the margins from the (weight, bias) of the teacher's batch norm before each stage's ReLU."""
        for moments, (weight, bias) in zip(self.moments, batch_norms, strict=True):
            moments.fix(bias.detach(), weight.detach())

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """Each stage's distance with its weight; the last stage's is 1, halving towards the input."""
        students, teachers = self.maps(student, teacher)
        count, parts = len(students), []
        for level, (s, t) in enumerate(zip(students, teachers, strict=True)):
            margin = self.moments[level](t).to(s.dtype)[:, None, None]  # (C, 1, 1)
            connected = self.connectors[level](s)
            target = nn.functional.adaptive_avg_pool2d(t, connected.shape[-2:])
            parts.append(2.0 ** (level - count + 1) * partial_distance(connected, target, margin))
        return parts


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """The mean over the batch of the sum of d, see `Overhaul`."""
    to_margin = torch.where((student > margin) & (teacher <= margin), student - margin, 0.0)
    counts = (teacher > 0) | ((student > teacher) & (teacher > margin) & (teacher <= 0))
    to_teacher = torch.where(counts, student - teacher, 0.0)
    return (to_margin.square() + to_teacher.square()).sum() / len(student)


class Moments(nn.Module):
    """The running mean and deviation of a map's channels, and the margin that follows from them.

    The average over all batches seen, of at most the last hundred or so; in evaluation it stands still.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("fixed", torch.zeros(()))  # 1: set from outside

    def fix(self, mean: Tensor, deviation: Tensor) -> None:
        """Set both for good."""
        self.mean, self.deviation = mean.clone(), deviation.abs().clone()
        self.fixed.fill_(1.0)

    @torch.no_grad()
    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> the margins (C,), float32."""
        if self.training:
            deviation, mean = torch.std_mean(feature, dim=(0, 2, 3), correction=0)
            self.seen += 1
            share = torch.clamp(1.0 / self.seen, min=0.01) * (1.0 - self.fixed)  # a tensor: no wait for the device
            share = share.to(self.mean)
            self.mean.lerp_(mean.to(self.mean), share)
            self.deviation.lerp_(deviation.to(self.deviation), share)
        return normal_margin(self.mean, self.deviation)
