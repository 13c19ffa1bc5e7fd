"""Terms on the relations between the images of a batch: similarities, distances, angles, correlations.

All but the embedded `SampleProducts` compare B x B (or B x B x B) numbers, so width and resolution of the two
networks are free: they cross architectures without a projection. Small sums with cancellation are taken in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.contracts import Batch, Output
from kd.losses.features import FeatureTerm
from kd.losses.numerics import full, unit, wide


class RelationTerm(FeatureTerm):
    """Base of the terms on flattened stages (B, D) of both networks; a subclass writes `compare`.

    The values of several `stages` are added. Class tokens in front of a grid of patches are left out.
    """

    def __init__(self, stages: str | Sequence[str] = "penultimate", **options):
        super().__init__(stages, **options)

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """`compare` of each stage."""
        pairs = zip(*self.maps(student, teacher), strict=True)
        return [self.compare(wide(s).flatten(1), wide(t).flatten(1)).to(full(s).dtype) for s, t in pairs]

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar from (B, D) and (B, E)."""
        raise NotImplementedError


class Similarities(RelationTerm):
    """SP of Tung and Mori 2019 (arXiv:1907.09682), eq. 4: |N(F_s F_s') - N(F_t F_t')|²_F / B², N = rows of unit length.

    A zero row is similar to nothing and gets no gradient (the reference's is of order 1e12). With one image the loss
    is 0.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared difference of the (B, B) similarities."""
        gram_s, gram_t = (unit(f @ f.T, floor=1e-12) for f in (student, teacher))
        return (gram_s - gram_t).square().mean()


class Distances(RelationTerm):
    """RKD of Park et al. 2019 (arXiv:1904.05068), eqs. 4-8: Huber losses on scaled distances and on angles.

    As in the reference code the means run over all B² pairs and B³ triples (the paper: distinct ones), and equal
    images have distance 1e-6. Distances come from the Gram matrix of the centred features, O(B² + B³) numbers
    whatever the width; pairs equal up to rounding have no direction, so no angle and no gradient. With one image (NaN
    in the reference) and with two the loss is 0.
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, eps: float = 1e-12, **options):
        super().__init__(**options)
        self.distance_weight, self.angle_weight, self.eps = distance_weight, angle_weight, eps

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """distance_weight mean_ij huber(d_s - d_t) + angle_weight mean_ijk huber(cos_s - cos_t)."""
        (d_s, cos_s), (d_t, cos_t) = self._relations(student), self._relations(teacher)
        return self.distance_weight * F.smooth_l1_loss(d_s, d_t) + self.angle_weight * F.smooth_l1_loss(cos_s, cos_t)

    def _relations(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Distances over their mean (B, B), and cosines of the angle at i between a and b (B, B, B)."""
        count = len(features)
        centred = features - features.mean(0)
        gram = centred @ centred.T  # (B, B)
        squares = gram.diagonal()
        squared = squares[:, None] + squares[None] - 2 * gram
        noise = 64 * torch.finfo(gram.dtype).eps * (squares[:, None] + squares[None])
        self_pair = torch.eye(count, dtype=torch.bool, device=gram.device)
        equal = (squared <= noise.clamp(min=self.eps)) | self_pair
        lengths = squared.masked_fill(equal, self.eps).sqrt()
        distances = lengths.masked_fill(self_pair, 0.0)
        mean = distances.sum() / max(count * (count - 1), 1)
        inverse = (1 / lengths).masked_fill(equal, 0.0)
        edges = gram[None] - gram[:, :, None] - gram[:, None] + squares[:, None, None]  # (i, a, b): (a - i)·(b - i)
        return distances / mean.clamp(min=self.eps), edges * inverse[:, :, None] * inverse[:, None]


class Probabilities(RelationTerm):
    """PKT of Passalis and Tefas 2018 (arXiv:1803.10837): divergence of the batch's row-normalised (1 + cosine) / 2.

    As in the reference code the diagonal counts and the mean runs over all B² entries (the paper excludes it and
    sums), so published weights are large. A zero row has cosine 0 with all and no gradient (NaN in the reference).
    """

    def __init__(self, eps: float = 1e-7, **options):
        super().__init__(**options)
        self.eps = eps

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """mean_ij P_t log((P_t + eps) / (P_s + eps))."""
        p_s, p_t = self._probabilities(student), self._probabilities(teacher)
        return (p_t * ((p_t + self.eps).log() - (p_s + self.eps).log())).mean()

    def _probabilities(self, features: Tensor) -> Tensor:
        rows = unit(features, eps=self.eps)
        similar = (rows @ rows.T + 1) / 2  # (B, B), in [0, 1]
        return similar / similar.sum(1, keepdim=True)


class Kernels(RelationTerm):
    """CCKD of Peng et al. 2019 (arXiv:1904.01802): |K_s - K_t|_F / B² with a Gaussian (Taylor) or bilinear kernel.

    The reference code takes the norm, the paper its square (`squared`). The Taylor form of the Gaussian kernel holds
    for rows of unit length, which the reference leaves to the user: `unit_length` makes them so. Where the kernels
    agree the gradient is 0.
    """

    def __init__(
        self,
        kernel: str = "gaussian",
        gamma: float = 0.4,
        order: int = 2,
        squared: bool = False,
        unit_length: bool = False,
        **options,
    ):
        """`order`: the last power of the Taylor series."""
        super().__init__(**options)
        if kernel not in ("gaussian", "bilinear"):
            raise ValueError(f"kernel '{kernel}' is not known; choose gaussian or bilinear")
        self.kernel, self.gamma, self.order = kernel, gamma, order
        self.squared, self.unit_length = squared, unit_length

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """|K_s - K_t|_F / B², K (B, B)."""
        difference = self._kernel(student) - self._kernel(teacher)
        size = difference.square().sum() if self.squared else torch.linalg.matrix_norm(difference)
        return size / len(student) ** 2

    def _kernel(self, features: Tensor) -> Tensor:
        rows = unit(features) if self.unit_length else features
        gram = rows @ rows.T
        if self.kernel == "bilinear":
            return gram
        scale = 2 * self.gamma
        powers = (scale**p / math.factorial(p) * gram**p for p in range(self.order + 1))
        return math.exp(-scale) * sum(powers)


class SampleProducts(RelationTerm):
    """CC as the reference codes have it: mean_i sum_d g[i, d] g[i + 1, d] over neighbours, g = |e_s - e_t|.

    Not the formula of Peng et al. 2019 (arXiv:1904.01802), which is `Kernels`: it depends on the order of the images.
    `embed` is the width of linear embeddings of both features, both trained; `embed: null` compares the features
    themselves, which must then be of one size. With one image (NaN in the reference) the loss is 0.
    """

    def __init__(self, embed: int | None = 128, **options):
        super().__init__(**options)
        self.embed, self.embed_s, self.embed_t = embed, nn.ModuleList(), nn.ModuleList()

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """Size the embeddings. Raises ValueError where raw features differ in size."""
        sizes = [(s[0].numel(), t[0].numel()) for s, t in zip(students, teachers, strict=True)]
        unlike = [pair for pair in sizes if pair[0] != pair[1]]
        if unlike and not self.embed:
            raise ValueError(f"the student's and teacher's features have {unlike[0]} numbers: set embed: 128")
        if self.embed:
            self.embed_s = nn.ModuleList(nn.Linear(s, self.embed) for s, _ in sizes)
            self.embed_t = nn.ModuleList(nn.Linear(t, self.embed) for _, t in sizes)

    def parts(self, student: Output, teacher: Output, batch: Batch) -> list[Tensor]:
        """`compare` of each stage's embeddings, or of the features themselves."""
        students, teachers = ([full(x).flatten(1) for x in side] for side in self.maps(student, teacher))
        if self.embed:
            students = [embed(x) for embed, x in zip(self.embed_s, students, strict=True)]
            teachers = [embed(x) for embed, x in zip(self.embed_t, teachers, strict=True)]
        return [self.compare(s, t) for s, t in zip(students, teachers, strict=True)]

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """From (B, D) and (B, D)."""
        gap = (student - teacher).abs()
        return (gap[:-1] * gap[1:]).sum() / max(len(gap) - 1, 1)
