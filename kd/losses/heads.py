"""Terms that use the teacher's classifier on the student's features: SimKD and softmax regression."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.contracts import Batch, Output
from kd.graft import GraftedHead
from kd.losses.align import conv_norm, pick, pool_larger, reaches_below_zero, to_map, to_vector
from kd.losses.features import FeatureTerm
from kd.losses.numerics import full

TARGETS = ("auto", "map", "penultimate")


@torch.no_grad()
def linear_head(head: nn.Module | None, width: int) -> nn.Linear:
    """A frozen linear layer, in at least float32, that does what the head does to a penultimate vector (B, width).

    A head that is no `nn.Linear` (dropout before it, say) is read out in evaluation mode. Raises ValueError where the
    output has no head, where its width is another, or where it is not affine.
    """
    if head is None:
        raise ValueError("needs the teacher's classifier head, and this teacher gives none. Use fitnet or reviewkd")
    head = copy.deepcopy(head).eval()
    at = next(iter([*head.parameters(), *head.buffers()]), torch.zeros(()))
    head = head if at.dtype == torch.float64 else head.float()
    layer = head if isinstance(head, nn.Linear) else read_out(head, width, full(at))
    if layer.in_features != width:
        raise ValueError(f"the teacher's head takes {layer.in_features} features, the chosen stage has {width}")
    return layer.requires_grad_(False)


def read_out(head: nn.Module, width: int, like: Tensor) -> nn.Linear:
    """The linear layer of an affine head, from its answers to zero and to unit vectors; dtype and device of `like`."""
    zero = head(like.new_zeros(1, width))
    weight = (head(torch.eye(width, dtype=like.dtype, device=like.device)) - zero).T  # (K, D)
    probe = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)[None]
    if not torch.allclose(head(probe), probe @ weight.T + zero, rtol=1e-3, atol=1e-4):
        raise ValueError("the teacher's head is not linear in its penultimate features. Use fitnet or reviewkd")
    layer = nn.Linear(width, weight.shape[0], device=like.device, dtype=like.dtype)
    layer.weight.copy_(weight)
    layer.bias.copy_(zero[0])
    return layer


def pooled_is_penultimate(teacher: Output, stage: str) -> bool:
    """Whether the mean over positions of that stage is what the teacher's head is given (set-up only)."""
    if stage not in teacher.features:
        return False
    pooled, vector = to_vector(full(teacher.features[stage])), full(teacher.features["penultimate"])
    if pooled.shape != vector.shape:
        return False
    gap, length = (torch.linalg.vector_norm(x) for x in (pooled - vector, vector))
    return bool(gap <= 0.02 * length)  # a teacher in bfloat16 rounds by 0.004


class SimKD(FeatureTerm):
    """The reused teacher classifier of Chen et al. 2022 (arXiv:2203.14001), eq. 4: mean of (transfer(F_s) - F_t)².

    The paper has the squared norm, its code the mean over elements. `target: map` compares last maps, the larger
    pooled first; `penultimate` compares with the vector that the teacher's head is given, for teachers whose head
    is not on the mean of that map (a class token, a convolution before the head); `auto` finds out which in the dry
    forward. The projector is `kd.graft.GraftedHead`, of width teacher's / `factor`; its last ReLU is left out
    (`relu: null`) where the target goes below 0.

    What is shipped: the student's own classifier is not trained. Predictions come from `student_logits(output)`,
    for which the student must be asked for `student_features`; `shipped()` gives the module (map -> logits) and the
    stage it reads, to be saved as the student's head. Published with no other term: cross-entropy 0.
    """

    replaces_head = True  # evaluate and ship `student_logits` in the place of the student's own logits

    def __init__(
        self,
        stages: str | Sequence[str] = "stage4",
        teacher_stages: str | Sequence[str] | None = None,
        *,
        factor: int = 2,
        target: str = "auto",
        relu: bool | None = None,
        **schedule,
    ):
        super().__init__(stages, teacher_stages, **schedule)
        if target not in TARGETS or len(self.student_features) != 1:
            raise ValueError(f"target is one of {', '.join(TARGETS)} and stages a single one; got {target}, {stages}")
        self.stage, self.factor, self.target, self.relu = self.teacher_features[0], factor, target, relu
        self.teacher_features = self._features(target)

    def _features(self, target: str) -> tuple[str, ...]:
        return {"map": (self.stage,), "penultimate": ("penultimate",), "auto": (self.stage, "penultimate")}[target]

    def wanted(self, teacher: Output) -> Tensor:
        """The teacher's feature that the projector is to give, as a map."""
        return to_map(pick(teacher, self.stage if self.target == "map" else "penultimate", "teacher")).detach()

    def setup(self, student: Output, teacher: Output | None, num_classes: int, num_samples: int) -> None:
        """Choose the target and make the projector with the teacher's classifier behind it."""
        if self.target == "auto":
            self.target = "map" if pooled_is_penultimate(teacher, self.stage) else "penultimate"
            self.teacher_features = self._features(self.target)
        feature, wanted = to_map(pick(student, self.student_features[0], "student")), self.wanted(teacher)
        width = wanted.shape[1]
        classifier = linear_head(teacher.head, width)
        relu = not reaches_below_zero(wanted) if self.relu is None else self.relu
        middle, size = max(1, width // self.factor), tuple(wanted.shape[-2:])
        self.head = GraftedHead(feature.shape[1], width, classifier.out_features, middle=middle, size=size, relu=relu)
        self.head.classifier = classifier
        self.to(student.logits.device)

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """The mean square."""
        projected = self.head.project(to_map(pick(student, self.student_features[0], "student")))
        return [F.mse_loss(*pool_larger(projected, self.wanted(teacher)))]

    def student_logits(self, student: Output) -> Tensor:
        """(B, K): what the distilled student predicts, from its feature `student_features[0]`."""
        with torch.autocast(student.logits.device.type, enabled=False):
            return self.head(to_map(pick(student, self.student_features[0], "student")))

    def shipped(self) -> tuple[str, GraftedHead]:
        """(the student's stage that it reads, the head to save with the student)."""
        return self.student_features[0], self.head


class SoftmaxRegression(FeatureTerm):
    """Softmax regression representation learning of Yang et al. 2021 (ICLR), as its reference code.

    feature_weight * mean (gap(A) - gap(F_t))² + logit_weight * mean (W gap(A) + b - z_t)², A =
    ReLU(BN(conv1x1(F_s))), gap = mean over positions, W, b = the teacher's classifier, fixed. The teacher's
    penultimate vector is its gap(F_t); with a ViT it is what its head is given. The ReLU is left out (`relu: null`)
    where that vector goes below zero in the dry forward. Another repository connects after pooling and weighs both
    parts 1.
    """

    def __init__(
        self,
        stages: str | Sequence[str] = "stage4",
        teacher_stages: str | Sequence[str] | None = "penultimate",
        *,
        feature_weight: float = 1.0,
        logit_weight: float = 5.0,
        relu: bool | None = None,
        **schedule,
    ):
        super().__init__(stages, teacher_stages, **schedule)
        if len(self.student_features) != 1:
            raise ValueError(f"stages must be a single one, got {list(self.student_features)}")
        self.feature_weight, self.logit_weight, self.relu = feature_weight, logit_weight, relu

    def setup(self, student: Output, teacher: Output | None, num_classes: int, num_samples: int) -> None:
        """Make the connector, and keep a frozen copy of the teacher's classifier."""
        (feature,), (wanted,) = self.maps(student, teacher)
        relu = not reaches_below_zero(wanted) if self.relu is None else self.relu
        steps = conv_norm(feature.shape[1], wanted.shape[1])
        self.connector = nn.Sequential(*steps, *([nn.ReLU()] if relu else []))
        self.classifier = linear_head(teacher.head, wanted.shape[1])
        self.to(student.logits.device)

    def pair(self, student: Output, teacher: Output) -> tuple[Tensor, Tensor]:
        """(feature part, logit part), unweighted."""
        (feature,), (wanted,) = self.maps(student, teacher)
        vector = to_vector(self.connector(feature))  # (B, C_t)
        logits = full(teacher.logits).detach()
        return F.mse_loss(vector, to_vector(wanted)), F.mse_loss(self.classifier(vector), logits)

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """Both parts with their weights."""
        features, logits = self.pair(student, teacher)
        return [self.feature_weight * features, self.logit_weight * logits]
