"""One-for-all: exits at every stage of the student against the teacher, in the logits, where all architectures meet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kd.contracts import Batch, Output
from kd.losses.align import Norm, pick, to_map, to_vector
from kd.losses.features import EVERY, FeatureTerm
from kd.losses.numerics import full, labels

DEEPEST = 3  # downsampling steps of an exit, at most


def adapted_soft_targets(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, exponent: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """mean_i sum_c -((p_t[c] + 1{c=y})^exponent - 1{c=y}) log p_s[c]; logits (B, K), targets (B,) or (B, K)."""
    true = F.one_hot(labels(targets), student_logits.shape[1]).to(student_logits)  # (B, K)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    probs = F.softmax(teacher_logits.detach() / temperature, dim=1)
    return -(((probs + true) ** exponent - true) * log_student).sum(dim=1).mean()


class Exit(nn.Module):
    """A map (B, C, H, W) -> logits (B, K): separable convolutions towards the last stage's size, mean, linear."""

    def __init__(self, channels: int, width: int, steps: int, num_classes: int):
        super().__init__()
        blocks = []
        for _ in range(max(steps, 0)):
            out = max(channels, min(2 * channels, width))
            blocks += [_separable(channels, out, stride=2)]
            channels = out
        self.body = nn.Sequential(*(blocks or [_separable(channels, channels, stride=1)]))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        return self.classifier(to_vector(self.body(x)))


def _separable(channels: int, out: int, stride: int) -> nn.Sequential:
    depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, out, 1, bias=False)
    return nn.Sequential(depthwise, Norm(channels), nn.ReLU(), pointwise, Norm(out), nn.ReLU())


class OneForAll(FeatureTerm):
    """Cross-architecture distillation of Hao et al. 2023 (arXiv:2310.19444), eq. 5, as its code.

    Over the student's exits and its own logits (`own_logits`), the sum of mean_i sum_c -((p_t[c] + 1{c=y})^e -
    1{c=y}) log p_s[c], p = softmax(z / T); e is `exponent`, one number or one for each exit and the logits. No T².
    The paper, e = γ, enhances the target class alone; the code also raises the other probabilities to e, and takes
    1 off the target because cross-entropy is a term of its own. Soft labels (mixup) count as their largest class,
    as in the code. log-softmax keeps it finite at logits where the reference's log(softmax) is not. Only the
    teacher's logits are used, so any teacher will do; an exit is sized for maps, tokens and vectors alike.
    """

    def __init__(
        self,
        stages: str | Sequence[str] = EVERY,
        *,
        exponent: float | Sequence[float] = 1.0,
        temperature: float = 1.0,
        own_logits: bool = True,
        **schedule,
    ):
        super().__init__(stages, **schedule)
        self.teacher_features = ()
        self.own_logits, self.temperature, self.exits = own_logits, temperature, nn.ModuleList()
        count = len(self.student_features) + own_logits
        self.exponents = [exponent] * count if isinstance(exponent, (int, float)) else list(exponent)
        if len(self.exponents) != count or min(self.exponents, default=1) <= 0 or temperature <= 0:
            raise ValueError(
                f"exponent is one positive number or {count} of them (stages, then the logits), temperature positive; "
                f"got {exponent} and {temperature}"
            )

    def features(self, student: Output) -> list[Tensor]:
        """The student's stages as maps."""
        return [to_map(pick(student, name, "student")) for name in self.student_features]

    def setup(self, student: Output, teacher: Output | None, num_classes: int, num_samples: int) -> None:
        """Size an exit for each stage."""
        maps = self.features(student)
        for x in maps:
            steps = min(DEEPEST, round(math.log2(x.shape[2] / maps[-1].shape[2])))
            self.exits.append(Exit(x.shape[1], maps[-1].shape[1], steps, num_classes))
        self.to(student.logits.device)

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """One distance for each exit, then that of the student's own logits."""
        logits = [exit_(x) for exit_, x in zip(self.exits, self.features(student), strict=True)]
        logits += [full(student.logits)] if self.own_logits else []
        wanted, temperature = full(teacher.logits), self.temperature
        return [
            adapted_soft_targets(x, wanted, batch.targets, exponent, temperature)
            for x, exponent in zip(logits, self.exponents, strict=True)
        ]
