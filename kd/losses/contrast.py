"""Contrastive terms: student and teacher embeddings of one image attract, those of different images repel.

Negatives, and the first content of a memory, are drawn from counters: functions of (seed, epoch, index), never of a
generator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd.contracts import Batch, Output
from kd.losses.features import FeatureTerm
from kd.losses.numerics import counters, full, integers, labels, uniform, unit

ROWS = 65_536  # rows of a memory that are drawn at a time, to keep the temporaries small


def noise(rows: int, dim: int, salt: int) -> Tensor:
    """float32 (rows, dim), uniform in ±sqrt(3 / dim): rows of length about 1, as the reference's memory starts."""
    bound = math.sqrt(3 / dim)
    parts = [
        (2 * uniform(salt, torch.arange(start, min(start + ROWS, rows))[:, None], torch.arange(dim)) - 1).float()
        * bound
        for start in range(0, rows, ROWS)
    ]
    return torch.cat(parts)


class Embedded(FeatureTerm):
    """Base: a stage of each network (flattened), through a trained linear layer, to unit length, (B, dim).

    A zero embedding stays zero and gets no gradient (NaN in the reference).
    """

    def __init__(self, stage: str = "penultimate", dim: int = 128, temperature: float = 0.07, **options):
        super().__init__(stage, **options)
        self.dim, self.temperature = dim, temperature
        self.embed_s, self.embed_t = nn.Identity(), nn.Identity()

    def build(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        """Size the two embeddings."""
        self.embed_s, self.embed_t = (nn.Linear(x[0][0].numel(), self.dim) for x in (students, teachers))

    def embeddings(self, student: Output, teacher: Output) -> tuple[Tensor, Tensor]:
        """(B, dim) of the student and of the teacher."""
        (s,), (t,) = self.maps(student, teacher)
        return unit(self.embed_s(full(s).flatten(1))), unit(self.embed_t(full(t).flatten(1)))


class ContrastMemory(Embedded):
    """CRD of Tian et al. 2020 (arXiv:1910.10699), eqs. 17-19, with the memory bank of its reference code.

    Student embeddings are scored against the teacher's bank and the other way round, by noise-contrastive estimation:
    P = exp(v·m / T) / Z; -mean_i [log P_i0 / (P_i0 + K/n + eps) + sum_k log (K/n) / (P_ik + K/n + eps)]. Z is set
    from the first batch and has no gradient. All in logarithms, so small temperatures do not overflow. The banks,
    (num_samples, dim), are buffers; a batch is scored before it is written to them (momentum `momentum`), and only in
    training. Negatives are drawn anew in every epoch, with replacement, from the images of other classes as far as
    their labels have been seen, three draws each (the reference: without replacement, from the labels of the whole
    data set); images held out for validation stay noise. A step takes O(B num_samples) numbers, or O(B K dim) where
    that is less.
    """

    def __init__(
        self,
        stage: str = "penultimate",
        dim: int = 128,
        temperature: float = 0.07,
        *,
        negatives: int = 16384,
        momentum: float = 0.5,
        eps: float = 1e-7,
        **options,
    ):
        super().__init__(stage, dim, temperature, **options)
        self.negatives, self.momentum, self.eps = negatives, momentum, eps
        for name in ("memory_s", "memory_t", "classes"):
            self.register_buffer(name, None)
        for name in ("log_z_s", "log_z_t"):
            self.register_buffer(name, torch.tensor(float("nan")))  # NaN: not set yet

    def setup(self, student: Output, teacher: Output, num_classes: int, num_samples: int) -> None:
        """Size embeddings and banks. Raises ValueError below two images."""
        if num_samples < 2:
            raise ValueError(f"draws negatives from other images, and the training pool has {num_samples}")
        self.memory_s, self.memory_t = noise(num_samples, self.dim, 1), noise(num_samples, self.dim, 2)
        self.classes = torch.full((num_samples,), -1)  # of the images seen so far
        super().setup(student, teacher, num_classes, num_samples)

    def draw(self, batch: Batch) -> Tensor:
        """int64 (B, 1 + negatives) rows of the banks: the image, then others, of other classes as far as known."""
        index, others = batch.index[:, None], len(self.classes) - 1
        key, own = counters(batch.seed, math.floor(batch.epoch), index), labels(batch.targets)[:, None]  # (B, 1)
        drawn = integers(others, key, torch.arange(self.negatives, device=index.device))  # (B, K)
        for attempt in (1, 2):  # those of its own class move on by a step of the row's own, cheaper than a new draw
            same = self.classes[drawn + (drawn >= index)] == own
            drawn = torch.where(same, (drawn + integers(others, key, -attempt)) % others, drawn)
        chosen = drawn + (drawn >= index)  # every image but its own
        return torch.cat([index, chosen], dim=1)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """The student's and the teacher's noise-contrastive loss, added."""
        v_s, v_t = self.embeddings(student, teacher)  # (B, dim)
        rows = self.draw(batch)
        loss = self._side(v_s, self.memory_t, rows, "log_z_s") + self._side(v_t, self.memory_s, rows, "log_z_t")
        if self.training:
            self._remember(v_s.detach(), v_t.detach(), batch)
        return loss

    def _side(self, anchors: Tensor, memory: Tensor, rows: Tensor, log_z: str) -> Tensor:
        """One network's loss. Its gradient is taken here, as the bank changes in place before the backward pass."""
        with torch.enable_grad():
            free = anchors.detach().requires_grad_()
            value = self._nce(self._scores(free, memory.to(free.dtype), rows), log_z, len(memory))
            (slope,) = torch.autograd.grad(value, free)
        return value.detach() + ((anchors - anchors.detach()) * slope).sum()

    def _scores(self, anchors: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
        """v·m / T for the drawn rows, (B, 1 + K): all similarities at once where the bank is the smaller table."""
        if len(memory) <= rows.shape[1] * memory.shape[1]:
            return (anchors @ memory.T).gather(1, rows) / self.temperature
        return torch.einsum("bd,bkd->bk", anchors, memory[rows]) / self.temperature

    def _nce(self, scores: Tensor, log_z: str, total: int) -> Tensor:
        fresh = scores.detach().logsumexp((0, 1)) - math.log(scores.numel()) + math.log(total)
        constant = torch.where(getattr(self, log_z).isnan(), fresh, getattr(self, log_z))
        if self.training:
            getattr(self, log_z).copy_(constant)
        log_p = scores - constant.to(scores.dtype)  # (B, 1 + K)
        share = (scores.shape[1] - 1) / total  # K / n: how much noise one real pair is told from
        log_both = torch.logaddexp(log_p, scores.new_full((), math.log(share + self.eps)))
        kept = log_p[:, 0] - log_both[:, 0]
        refused = (math.log(share) - log_both[:, 1:]).sum(1)
        return -(kept + refused).mean()

    @torch.no_grad()
    def _remember(self, v_s: Tensor, v_t: Tensor, batch: Batch) -> None:
        for memory, new in ((self.memory_s, v_s), (self.memory_t, v_t)):
            old = memory[batch.index]
            memory[batch.index] = unit(self.momentum * old + (1 - self.momentum) * new.to(old.dtype))
        self.classes[batch.index] = labels(batch.targets)


class ContrastQueue(Embedded):
    """Contrast whose memory does not grow with the data set: with the rest of the batch and a queue of the last `size`.

    InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) with the queue of He et al. 2020 (arXiv:1911.05722), on
    student and teacher embeddings as in CRD (arXiv:1910.10699, which reports InfoNCE as an ablation). Both directions
    are added. Images of the anchor's class are no negatives. The logarithm of the number of keys is taken off, so
    that the value (not its gradient) is the same for a queue that fills: 0 for embeddings that tell nothing. `size:
    0` is the purely in-batch form; with one image and an empty queue the loss is 0. The queue only moves in training;
    soft labels count by their largest entry.
    """

    def __init__(
        self, stage: str = "penultimate", dim: int = 128, temperature: float = 0.07, size: int = 4096, **options
    ):
        super().__init__(stage, dim, temperature, **options)
        self.size = size
        self.register_buffer("queue_s", torch.zeros(size, dim))
        self.register_buffer("queue_t", torch.zeros(size, dim))
        self.register_buffer("classes", torch.full((size,), -1))  # -1: an empty place
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """mean_i log mean_k exp(v·m_k / T) - v·m_i / T over its own pair and other classes, both ways."""
        v_s, v_t = self.embeddings(student, teacher)
        own = labels(batch.targets)
        queues = self.queue_s.to(v_s.dtype, copy=True), self.queue_t.to(v_t.dtype, copy=True)  # written to below
        known = torch.cat([own, self.classes])  # (B + size,)
        usable = (known[None] != own[:, None]) & (known[None] >= 0)
        usable = usable | torch.eye(len(own), len(known), dtype=torch.bool, device=usable.device)
        loss = self._info_nce(v_s, torch.cat([v_t, queues[1]]), usable) + self._info_nce(
            v_t, torch.cat([v_s, queues[0]]), usable
        )
        if self.training and self.size:
            self._enqueue(v_s.detach(), v_t.detach(), own)
        return loss

    def _info_nce(self, anchors: Tensor, keys: Tensor, usable: Tensor) -> Tensor:
        scores = (anchors @ keys.T / self.temperature).masked_fill(~usable, float("-inf"))  # (B, B + size)
        return (scores.logsumexp(1) - scores.diagonal() - usable.sum(1).to(scores.dtype).log()).mean()

    @torch.no_grad()
    def _enqueue(self, v_s: Tensor, v_t: Tensor, own: Tensor) -> None:
        places = (self.next + torch.arange(len(own), device=own.device)) % self.size
        last = slice(-self.size, None)  # a batch longer than the queue leaves its end
        self.queue_s[places[last]] = v_s[last].to(self.queue_s.dtype)
        self.queue_t[places[last]] = v_t[last].to(self.queue_t.dtype)
        self.classes[places[last]] = own[last]
        self.next.copy_((self.next + len(own)) % self.size)
