"""Terms on logits alone. All are means over the batch; a factor T² of a temperature T lives inside the term."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.contracts import Batch, Output
from kd.losses.numerics import centre, cosine, divergence, full, labels, log_softmax, standardise
from kd.losses.term import Term


class CrossEntropy(Term):
    """Cross-entropy with the labels, hard (B,) or soft (B, K); `views: 2` adds that of the second view (mlkd)."""

    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0, views: int = 1, **schedule):
        super().__init__(**schedule)
        self.label_smoothing, self.views = label_smoothing, views

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        """-mean_b sum_k y_bk log p_bk."""
        outputs = [student, student.second][: self.views]
        return sum(self._one(full(output.logits), batch.targets) for output in outputs)

    def _one(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)


class LogitTerm(Term):
    """Base of the terms that compare two rows of logits; a subclass writes `compare`.

    `standardise` gives every such term the z-scored logits of Sun et al. 2024 (arXiv:2403.01427): each row minus its
    mean, over its standard deviation + 1e-7. The reference code's deviation has the divisor K - 1 (the paper's has
    K). A constant row becomes zeros, without gradient where the reference has one of order 1e7. `token` takes the
    logits of the student's distillation token or head (`Output.extra_logits`) instead of the main ones.
    """

    def __init__(self, standardise: bool = False, token: bool = False, **schedule):
        super().__init__(**schedule)
        self.standardise, self.token = standardise, token

    def setup(self, student: Output, teacher: Output | None, num_classes: int, num_samples: int) -> None:
        """Raises ValueError where the two networks do not have the same classes, or the student has no token."""
        if teacher is None:
            raise ValueError("compares with a teacher's logits, and there is none (teacher=none)")
        if student.logits.shape[1] != teacher.logits.shape[1]:
            raise ValueError(
                f"compares logits class by class, and the student has {student.logits.shape[1]} classes, the teacher "
                f"{teacher.logits.shape[1]}. Relation terms on features (sp, rkd, pkt) need no common classes."
            )
        if self.token and isinstance(student.head, nn.Linear):  # one head; a token's logits come in training alone
            self._student(student)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """`compare` on the logits in float32 or better."""
        pair = self._student(student), full(teacher.logits).detach()  # each (B, K)
        if self.standardise:
            pair = standardise(pair[0]), standardise(pair[1])
        return self.compare(*pair, batch.targets)

    def _student(self, student: Output) -> Tensor:
        if self.token and student.extra_logits is None:
            raise ValueError(
                "token: true needs a student with a distillation token or head (Output.extra_logits), such as "
                "deit_tiny_distilled_patch16_224; for other students use token: false"
            )
        return full(student.extra_logits if self.token else student.logits)

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """The scalar from logits (B, K) and (B, K) and targets (B,) or (B, K)."""
        raise NotImplementedError


class SoftTargets(LogitTerm):
    """Soft targets of Hinton et al. 2015 (arXiv:1503.02531), sec. 2: T² KL(teacher || student) at temperature T.

    The paper writes the cross-entropy to the teacher, which differs by the teacher's entropy (no gradient).
    `per_class` also divides by K, as the code of DeiT does (Touvron et al. 2021, arXiv:2012.12877); its paper does
    not.
    """

    def __init__(self, temperature: float = 4.0, per_class: bool = False, **options):
        super().__init__(**options)
        self.temperature, self.per_class = temperature, per_class

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """T² mean_b sum_k p_t (log p_t - log p_s)."""
        rows = divergence(log_softmax(student_logits, self.temperature), log_softmax(teacher_logits, self.temperature))
        return self.temperature**2 * rows.mean() / (student_logits.shape[1] if self.per_class else 1)


class HardTargets(LogitTerm):
    """Cross-entropy with the teacher's decision; with `token` that of DeiT, Touvron et al. 2021 (arXiv:2012.12877).

    A tie of the teacher goes to the lowest class.
    """

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """-mean_b log p_s[argmax z_t]."""
        return F.cross_entropy(student_logits, teacher_logits.argmax(1))


class DecoupledKD(LogitTerm):
    """DKD of Zhao et al. 2022 (arXiv:2203.08679), eq. 7: T² (alpha TCKD + beta NCKD).

    The weights `target_weight` and `nontarget_weight` are alpha and beta. TCKD is the KL between (target, not target)
    probabilities, NCKD that between the softmaxes over the other classes. Soft labels count by their largest entry.
    The reference takes the logarithm of summed probabilities (NaN once one of them underflows) and drops the target
    by subtracting 1000; here both come from logsumexp, and are finite for all logits. Undefined with 2 classes:
    nothing is left in NCKD.
    """

    def __init__(self, temperature: float = 4.0, target_weight: float = 1.0, nontarget_weight: float = 8.0, **options):
        super().__init__(**options)
        self.temperature, self.target_weight, self.nontarget_weight = temperature, target_weight, nontarget_weight

    def setup(self, student: Output, teacher: Output | None, num_classes: int, num_samples: int) -> None:
        """Raises ValueError below 3 classes."""
        super().setup(student, teacher, num_classes, num_samples)
        if num_classes < 3:
            raise ValueError(
                f"compares the non-target classes with each other, and {num_classes} classes leave one: use kd"
            )

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """T² mean_b (target_weight KL(b_t || b_s) + nontarget_weight KL(q_t || q_s))."""
        target = labels(targets)
        margin_s, rest_s = self._split(student_logits / self.temperature, target)
        margin_t, rest_t = self._split(teacher_logits / self.temperature, target)
        binary_s, binary_t = (
            torch.stack([F.logsigmoid(m), F.logsigmoid(-m)], 1) for m in (margin_s, margin_t)
        )  # (B, 2)
        nckd = (rest_t.exp() * (rest_t - rest_s)).sum(1)
        tckd = divergence(binary_s, binary_t)
        return self.temperature**2 * (self.target_weight * tckd + self.nontarget_weight * nckd).mean()

    @staticmethod
    def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(log-odds of the target (B,), log q over the others (B, K), 0 at the target)."""
        chosen = logits.gather(1, target[:, None])  # (B, 1)
        others = logits.scatter(1, target[:, None], float("-inf")).logsumexp(1, keepdim=True)
        return (chosen - others).squeeze(1), (logits - others).scatter(1, target[:, None], 0.0)


class NormalisedKD(LogitTerm):
    """NKD of Yang et al. 2023 (arXiv:2303.13005), eq. 6; `nontarget_weight` is gamma there.

    A cross-entropy, not a divergence: it is not 0 at student = teacher. The target term has no temperature. Soft
    labels count by their largest entry, as in the reference code.
    """

    def __init__(self, temperature: float = 1.0, nontarget_weight: float = 1.5, **options):
        super().__init__(**options)
        self.temperature, self.nontarget_weight = temperature, nontarget_weight

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """-mean_b p_t[y] log p_s[y] - nontarget_weight T² mean_b sum_{c != y} q_t[c] log q_s[c]."""
        target = labels(targets)[:, None]  # (B, 1)
        log_s, log_t = (log_softmax(z).gather(1, target) for z in (student_logits, teacher_logits))
        rest_s, rest_t = (self._others(z, target) for z in (student_logits, teacher_logits))
        nontarget = (rest_t.exp() * rest_s).sum(1)
        return -(log_t.exp() * log_s).mean() - self.nontarget_weight * self.temperature**2 * nontarget.mean()

    def _others(self, logits: Tensor, target: Tensor) -> Tensor:
        scaled = logits / self.temperature
        total = scaled.scatter(1, target, float("-inf")).logsumexp(1, keepdim=True)
        return (scaled - total).scatter(1, target, 0.0)  # (B, K), 0 at the target


class TransformedTeacher(LogitTerm):
    """TTM and, `weighted`, WTTM of Zheng and Yang 2024 (arXiv:2402.11148): a temperature on the teacher alone, no T².

    The power transform p^(1/T) of the paper is the softmax of z/T; it is taken in logarithms here, so that no
    probability underflows. WTTM weighs each image by U = sum_c p_t[c]^(1/T), large where the teacher is unsure.
    """

    def __init__(self, temperature: float = 4.0, weighted: bool = False, **options):
        super().__init__(**options)
        self.temperature, self.weighted = temperature, weighted

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """mean_b U_b KL(softmax(z_t / T) || softmax(z_s)), U = 1 where not weighted."""
        rows = divergence(log_softmax(student_logits), log_softmax(teacher_logits, self.temperature))  # (B,)
        if self.weighted:
            rows = rows * (log_softmax(teacher_logits) / self.temperature).logsumexp(1).exp()
        return rows.mean()


class MSELogits(LogitTerm):
    """Logit regression of Ba and Caruana 2014 (arXiv:1312.6184), mean over images and classes (paper: half a sum)."""

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """mean_bk (z_s - z_t)²."""
        return (student_logits - teacher_logits).square().mean()


class CosineLogits(LogitTerm):
    """1 - cosine of the two rows of logits, or, `centred`, 1 - their Pearson correlation; a building block.

    eps is added to the product of the lengths: a zero (or constant) row counts as uncorrelated.
    """

    def __init__(self, centred: bool = False, eps: float = 1e-8, **options):
        super().__init__(**options)
        self.centred, self.eps = centred, eps

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """1 - mean_b z_s·z_t / (|z_s||z_t| + eps)."""
        pair = student_logits, teacher_logits
        return 1 - cosine(*(centre(z) if self.centred else z for z in pair), self.eps).mean()


class Correlations(LogitTerm):
    """DIST of Huang et al. 2022 (arXiv:2205.10536): Pearson between rows (inter-class) and columns (intra-class).

    On probabilities at temperature T, times T² (the authors' own code has T = 1 and no factor). eps is added to the
    product of the centred lengths, so classes that are hardly ever predicted count as uncorrelated, even in an
    identical student. With one image the intra-class part is the constant T².
    """

    def __init__(
        self,
        temperature: float = 4.0,
        inter_weight: float = 2.0,
        intra_weight: float = 2.0,
        eps: float = 1e-8,
        **options,
    ):
        super().__init__(**options)
        self.temperature, self.inter_weight, self.intra_weight, self.eps = temperature, inter_weight, intra_weight, eps

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """T² (inter_weight (1 - mean_b pearson of rows) + intra_weight (1 - mean_k pearson of columns))."""
        probs_s, probs_t = (log_softmax(z, self.temperature).exp() for z in (student_logits, teacher_logits))  # (B, K)
        inter = 1 - cosine(centre(probs_s), centre(probs_t), self.eps).mean()
        intra = 1 - cosine(centre(probs_s.T), centre(probs_t.T), self.eps).mean()
        return self.temperature**2 * (self.inter_weight * inter + self.intra_weight * intra)
