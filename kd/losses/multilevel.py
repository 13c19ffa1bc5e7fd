"""Multi-level logit distillation, on two views of the images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kd.contracts import Batch, Output
from kd.losses.logits import LogitTerm
from kd.losses.numerics import divergence, full, log_softmax, standardise


def instance_level(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² mean_b KL(teacher || student)."""
    log_student, log_teacher = log_softmax(student_logits, temperature), log_softmax(teacher_logits, temperature)
    return temperature**2 * divergence(log_student, log_teacher).mean()


def batch_level(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """|P_t P_t' - P_s P_s'|²_F / B, P = softmax(z / T), (B, K)."""
    p_s, p_t = (log_softmax(z, temperature).exp() for z in (student_logits, teacher_logits))
    return (p_t @ p_t.T - p_s @ p_s.T).square().sum() / len(p_s)


def class_level(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """|P_t' P_t - P_s' P_s|²_F / K; not divided by the batch, as in the reference code."""
    p_s, p_t = (log_softmax(z, temperature).exp() for z in (student_logits, teacher_logits))
    return (p_t.T @ p_t - p_s.T @ p_s).square().sum() / p_s.shape[1]


def lower_half(confidence: Tensor) -> Tensor:
    """The share of entries at or below their median (the mean of the middle two for an even number), a scalar."""
    return (confidence <= confidence.quantile(0.5)).to(confidence.dtype).mean()


class MultiLevel(LogitTerm):
    """Multi-level logit distillation of Jin et al. 2023 (CVPR), on a weak and a strong view.

    The student's and teacher's output is the weak view's, `second` the strong view's. What the reference code does
    beside the paper is the default here: its masks of unsure images and classes only scale a loss by their share; the
    strong view's terms at the `weak_temperatures` are taken on the weak view's logits (`paper_views: true` takes the
    strong view's); class and batch parts use the weak view alone; `standardise` applies to the instance part alone.
    Without labels: cross-entropy on both views is the term `ce` with `views: 2`.
    """

    views = 2

    def __init__(
        self,
        temperatures: Sequence[float] = (4.0, 3.0, 5.0),
        weak_temperatures: Sequence[float] = (2.0, 6.0),
        paper_views: bool = False,
        **options,
    ):
        super().__init__(**options)
        self.temperatures, self.weak_temperatures = tuple(temperatures), tuple(weak_temperatures)
        self.paper_views = paper_views

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Instance + class + batch parts, summed over the temperatures."""
        return sum(self.parts(student, teacher).values())

    def parts(self, student: Output, teacher: Output) -> dict[str, Tensor]:
        """The three parts by name: instance, class, batch."""
        if student.second is None or teacher.second is None:
            raise ValueError("needs a second view of the images (Output.second), and the batch came with one")
        weak = self._student(student), full(teacher.logits).detach()
        strong = self._student(student.second), full(teacher.second.logits).detach()
        confidence = weak[1].softmax(1)  # (B, K)
        images, classes = lower_half(confidence.amax(1)), lower_half(confidence.sum(0))
        every = (*self.temperatures, *self.weak_temperatures)
        return {
            "instance": self._instance(weak, strong, images),
            "class": classes * sum(class_level(*weak, t) for t in every),
            "batch": images * sum(batch_level(*weak, t) for t in every),
        }

    def _instance(self, weak: tuple[Tensor, Tensor], strong: tuple[Tensor, Tensor], images: Tensor) -> Tensor:
        if self.standardise:
            weak, strong = tuple(map(standardise, weak)), tuple(map(standardise, strong))
        every = (*self.temperatures, *self.weak_temperatures)
        first = images * sum(instance_level(*weak, t) for t in every)
        other = strong if self.paper_views else weak
        second = sum(instance_level(*strong, t) for t in self.temperatures)
        return first + second + sum(instance_level(*other, t) for t in self.weak_temperatures)
