"""Terms that compare intermediate features through a learned regressor: FitNets and variational information."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.contracts import Batch, Output
from kd.graft import Norm
from kd.losses.align import pick, pool_larger, project, reaches_below_zero, to_map
from kd.losses.term import Term

EVERY = ("stage1", "stage2", "stage3", "stage4")
LAST_THREE = EVERY[1:]  # of a CIFAR network, whose stage1 is the stem, all that are published with


def names(stages: str | Sequence[str]) -> tuple[str, ...]:
    """One stage or several as a tuple."""
    return (stages,) if isinstance(stages, str) else tuple(stages)


class FeatureTerm(Term):
    """A term that compares stages of the student with stages of the teacher, one by one, and adds them up.

    A subclass gives `parts`, one scalar for each stage, and sizes its modules in `build`. Maps, tokens and vectors
    are all brought to maps in at least float32.
    """

    def __init__(
        self, stages: str | Sequence[str] = LAST_THREE, teacher_stages: str | Sequence[str] | None = None, **schedule
    ):
        """`teacher_stages`: where they differ from the student's, as many names in the same order."""
        super().__init__(**schedule)
        self.student_features = names(stages)
        self.teacher_features = names(teacher_stages) if teacher_stages else self.student_features
        if len(self.student_features) != len(self.teacher_features):
            counts = f"{len(self.student_features)} names, teacher_stages {len(self.teacher_features)}"
            raise ValueError(f"stages has {counts}: give as many of both, in the same order")

    def maps(self, student: Output, teacher: Output) -> tuple[list[Tensor], list[Tensor]]:
        """The student's and the teacher's stages as maps (B, C, H, W); no gradient to the teacher."""
        students = [to_map(pick(student, name, "student")) for name in self.student_features]
        return students, [to_map(pick(teacher, name, "teacher")).detach() for name in self.teacher_features]

    def setup(self, student: Output, teacher: Output | None, num_classes: int, num_samples: int) -> None:
        """Size the regressors for these two networks."""
        self.build(*self.maps(student, teacher))
        self.to(student.logits.device)

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """Make the modules that the method needs; without any there is nothing to do."""

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """One scalar for each stage."""
        return [self.compare(*pool_larger(s, t)) for s, t in zip(*self.maps(student, teacher), strict=True)]

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar of one stage, from maps of one resolution."""
        raise NotImplementedError

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """The sum over stages."""
        return torch.stack(self.parts(student, teacher, batch)).sum()


def resizing_conv(student: torch.Size, teacher: torch.Size) -> nn.Module:
    """The convolution that takes a student's map (B, C, H, W) to a teacher's size, chosen from the two as in `ConvReg`.

    Half the size: 3x3 with stride 2. Twice: transposed 4x4 with stride 2. A smaller teacher: an unpadded kernel
    that covers the difference. Anything else: 1x1, and the larger map is pooled.
    """
    (channels, height, width), (out, high, wide) = student[1:], teacher[1:]
    if (height, width) == (2 * high, 2 * wide):
        return nn.Conv2d(channels, out, 3, stride=2, padding=1)
    if (2 * height, 2 * width) == (high, wide):
        return nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1)
    if height >= high and width >= wide:
        return nn.Conv2d(channels, out, (1 + height - high, 1 + width - wide))
    return nn.Conv2d(channels, out, 1)


class ConvRegressor(nn.Module):
    """Convolution to the teacher's width and size, batch norm, and a ReLU where the teacher's feature is one."""

    def __init__(self, student: torch.Size, teacher: torch.Size, relu: bool = True):
        super().__init__()
        self.conv = resizing_conv(student, teacher)
        self.bn = Norm(teacher[1])
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class FitNet(FeatureTerm):
    """Hints of Romero et al. 2015 (arXiv:1412.6550), eq. 3: mean over all elements of (r(F_s) - F_t)².

    `regressor: convreg` is the convolution, batch norm and ReLU of the reference codes, whose kernel bridges the
    two sizes; `linear` a 1x1 convolution, without bias (on vectors a linear layer), for weights of about 1.
    Differences: the paper has half the *sum* of squares and no batch norm; the codes have the mean. Where the ReLU
    cannot reach the teacher's values (`relu: null`, and they go below zero in the dry forward) it is left out. One
    value per channel (batch 1 and one position), where the reference raises: batch norm uses its running
    statistics. Maps of unlike sizes: the larger is pooled.
    """

    def __init__(
        self,
        stages: str | Sequence[str] = "stage3",
        teacher_stages: str | Sequence[str] | None = None,
        *,
        regressor: str = "convreg",
        bias: bool = False,
        relu: bool | None = None,
        **schedule,
    ):
        super().__init__(stages, teacher_stages, **schedule)
        if regressor not in ("linear", "convreg"):
            raise ValueError(f"regressor is 'linear' or 'convreg', not '{regressor}'")
        self.regressor, self.bias, self.relu = regressor, bias, relu

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """One regressor for each stage."""
        self.regressors = nn.ModuleList(self._regressor(s, t) for s, t in zip(students, teachers, strict=True))

    def _regressor(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if self.regressor == "linear":
            return project(student.shape[1], teacher.shape[1], self.bias)
        relu = not reaches_below_zero(teacher) if self.relu is None else self.relu
        return ConvRegressor(student.shape, teacher.shape, relu)

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """The mean square of each stage."""
        triples = zip(*self.maps(student, teacher), self.regressors, strict=True)
        return [F.mse_loss(*self._fit(s, t, regressor)) for s, t, regressor in triples]

    def _fit(self, student: Tensor, teacher: Tensor, regressor: nn.Module) -> tuple[Tensor, Tensor]:
        if self.regressor == "linear":  # pooling first is the same and cheaper
            student, teacher = pool_larger(student, teacher)
            return regressor(student), teacher
        return pool_larger(regressor(student), teacher)


class Variational(FeatureTerm):
    """Variational information of Ahn et al. 2019 (arXiv:1904.05835), eq. 5: a Gaussian likelihood of F_t.

    mean of ½ ((r(F_s) - F_t)² / v_c + log v_c), v_c = softplus(log_scale_c) + eps, r = three 1x1 convolutions with
    ReLUs between, without bias. The paper sums, the codes average. One code never trains `log_scale`; here it is
    trained, as in the other. The references write softplus as log(1 + exp), which overflows above 88: here it is
    exact at any value.
    """

    def __init__(
        self,
        stages: str | Sequence[str] = LAST_THREE,
        teacher_stages: str | Sequence[str] | None = None,
        *,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
        **schedule,
    ):
        super().__init__(stages, teacher_stages, **schedule)
        if initial_variance <= eps:
            raise ValueError(f"initial_variance {initial_variance:g} must be above eps {eps:g}")
        self.initial_variance, self.eps = initial_variance, eps

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """A regressor and a scale per channel for each stage."""
        widths = [(s.shape[1], t.shape[1]) for s, t in zip(students, teachers, strict=True)]
        start = _inverse_softplus(self.initial_variance - self.eps)
        self.regressors = nn.ModuleList(_perceptron(channels, out) for channels, out in widths)
        self.log_scales = nn.ParameterList(nn.Parameter(torch.full((out,), start)) for _, out in widths)

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """The mean negative log-likelihood of each stage, without its constant."""
        each = zip(*self.maps(student, teacher), self.regressors, self.log_scales, strict=True)
        return [self.likelihood(regressor, scale, *pool_larger(s, t)) for s, t, regressor, scale in each]

    def likelihood(self, regressor: nn.Module, log_scale: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        """mean ½ ((r(F_s) - F_t)² / v + log v)."""
        variance = (F.softplus(log_scale, threshold=40.0) + self.eps)[None, :, None, None]  # above 40: itself
        return 0.5 * ((regressor(student) - teacher).square() / variance + variance.log()).mean()


def _perceptron(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(project(channels, out), nn.ReLU(), project(out, out), nn.ReLU(), project(out, out))


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
