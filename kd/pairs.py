"""What a loss compares in two networks, what it adds to them, and what one training step costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kd.models import count_parameters

PROBE_BATCH = 8  # images in the step that is counted


@dataclass
class Pair:
    """One term's stages in the student and the teacher, with shapes, and its own modules."""

    term: str
    student: dict[str, tuple[int, ...]]  # feature -> shape without the batch
    teacher: dict[str, tuple[int, ...]]
    modules: dict[str, int]  # projection -> parameters

    @property
    def parameters(self) -> int:
        """Of all its projections."""
        return sum(self.modules.values())

    def __str__(self) -> str:
        """One line: fitnet stage3 64x4x4 -> stage3 64x4x4 (37,120 parameters)."""
        shapes = [f"{name} {shown(shape)}" for name, shape in self.student.items()]
        others = [f"{name} {shown(shape)}" for name, shape in self.teacher.items()]
        if len(shapes) == len(others):
            text = ", ".join(f"{s} -> {t}" for s, t in zip(shapes, others, strict=True))
        else:
            text = ", ".join(shapes) + (f" -> {', '.join(others)}" if others else "")
        return f"{self.term} {text or 'logits'}" + (f" ({self.parameters:,} parameters)" if self.parameters else "")


def shown(shape: tuple[int, ...]) -> str:
    """64x8x8."""
    return "x".join(str(n) for n in shape)


def pairs(loss: nn.Module, outputs: list[Any]) -> list[Pair]:
    """Of every term that needs a teacher; `outputs` of the student and the teacher, as the loss was set up with."""
    student, teacher = outputs
    found = []
    for name, term in loss.terms.items():
        if not term.needs_teacher:
            continue
        found.append(
            Pair(
                name,
                {f: tuple(student.features[f].shape[1:]) for f in term.student_features},
                {f: tuple(teacher.features[f].shape[1:]) for f in term.teacher_features} if teacher else {},
                {n: count for n, module in term.named_children() if (count := count_parameters(module))},
            )
        )
    return found


@dataclass
class Cost:
    """Of one training step: multiply-accumulates of one image, and memory of the whole batch."""

    student: int  # one forward
    teacher: int
    step: int  # student forward and backward, teacher forward, loss
    activations_mib: float  # kept for the backward pass
    states_mib: float  # weights, gradients and optimiser states, and the teacher's weights

    @property
    def memory_mib(self) -> float:
        """Both together; the allocator's own overhead is not in it."""
        return self.activations_mib + self.states_mib


def cost(training: Any, teacher: nn.Module | None, dataset: Any) -> Cost:
    """Measured on one real step of a few images; the training is one step further afterwards."""
    from torch.autograd.graph import saved_tensors_hooks

    from kd.loop import apply_step, train_step

    size = min(PROBE_BATCH, training.recipe.batch_size, len(dataset.train))
    raw = next(dataset.train.epoch(0, size, training.seed, device=training.device))
    kept = Kept([training.student, training.loss])
    training.steps = max(training.steps, 1)
    training.student.train(), training.loss.train()
    with saved_tensors_hooks(kept.pack, lambda x: x), counter_of_steps() as counter:
        train_step(training, raw)
    flops = counter.get_total_flops()
    apply_step(training)
    scale = training.recipe.batch_size / len(raw.index)
    return Cost(
        student=macs(training.student),
        teacher=macs(teacher) if teacher is not None else 0,
        step=flops // 2 // len(raw.index),
        activations_mib=kept.total * scale / 2**20,
        states_mib=states(training, teacher) / 2**20,
    )


def counter_of_steps() -> Any:
    """torch's counter, with a convolution's backward at twice its forward: its own counts grouped ones as dense."""
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

    def backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
        transposed, wanted = rest[4], rest[7]  # after bias sizes, stride, padding, dilation; before the result's shape
        return sum(wanted[:2]) * conv_flop_count(x, weight, grad, transposed=transposed)

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward})


class Kept:
    """Bytes that autograd holds on to, each storage once, weights left out."""

    def __init__(self, modules: list[nn.Module]):
        self.seen = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
        self.total = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor as it is saved."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def macs(classifier: nn.Module) -> int:
    """Of one image, of a classifier or of all members of an ensemble."""
    from kd.models import count_macs

    return sum(count_macs(m) for m in getattr(classifier, "members", [classifier]))


def states(training: Any, teacher: nn.Module | None) -> int:
    """Bytes of weights, gradients and optimiser states after a step."""
    total = sum(t.nbytes for state in training.optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    for module, times in ((training.student, 2), (training.loss, 2), (teacher, 1)):
        if module is not None:
            total += times * sum(p.nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())
    return total
