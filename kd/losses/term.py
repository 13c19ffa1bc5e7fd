"""What every term of a loss is: a module that gives one scalar from the two outputs and the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.contracts import Batch, Output


class Term(nn.Module):
    """One named, weighted part of a loss.

    A subclass sets what it needs in its constructor, sizes its projections in `setup` and returns a scalar from
    `forward`. The factor `weight` is applied by the sum, not by the term. Autocast is off around `forward`: a term
    computes in float32 or better, whatever its inputs come in.
    """

    needs_teacher = True  # False: a term on labels alone, which `teacher=none` keeps
    views = 1  # 2: the sum needs `Output.second` as well

    def __init__(self, weight: float = 1.0, warmup_epochs: float = 0.0, first_epochs: float | None = None):
        """`warmup_epochs`: the weight grows linearly from 0; `first_epochs`: only this term counts then, not after."""
        super().__init__()
        self.weight, self.warmup_epochs, self.first_epochs = weight, warmup_epochs, first_epochs
        self.student_features: Sequence[str] = ()  # stages to ask of the student: stage1..4, tokens, penultimate
        self.teacher_features: Sequence[str] = ()

    def __call__(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        """`forward` without autocast."""
        with torch.autocast(student.logits.device.type, enabled=False):
            return super().__call__(student, teacher, batch)

    def setup(self, student: Output, teacher: Output | None, num_classes: int, num_samples: int) -> None:
        """Size the projections from one dry forward; raise ValueError where the method is undefined for this pair."""

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        """The mean over the batch, a scalar."""
        raise NotImplementedError
