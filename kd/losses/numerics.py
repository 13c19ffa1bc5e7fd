"""The few numerical tools that the terms share: precision, safe norms, hard labels, random numbers from counters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: splitmix64's step (Steele, Lea and Flood 2014)
MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def full(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def wide(x: Tensor) -> Tensor:
    """The tensor in float64 where the device has it, for small sums with cancellation (B x B distances, kernels)."""
    return full(x) if x.device.type == "mps" else x.double()


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over classes, (B, K), in float32 or better."""
    return F.log_softmax(full(logits) / temperature, dim=1)


def divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row, (B,), from log-probabilities (B, K)."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(1)


def labels(targets: Tensor) -> Tensor:
    """int64 (B,): the targets, or the largest entry of soft ones (B, K)."""
    return targets.argmax(1) if targets.is_floating_point() else targets


def standardise(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Each row minus its mean, over its standard deviation (divisor K - 1) plus eps; a constant row gives zeros."""
    centred = full(logits) - full(logits).mean(1, keepdim=True)
    std = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / max(logits.shape[1] - 1, 1) ** 0.5
    return centred / (std + eps)


def unit(x: Tensor, eps: float = 0.0, floor: float = 0.0) -> Tensor:
    """Rows over max(their length, floor) + eps; a zero row stays zero, without a gradient of 1/0 or 1/eps."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    zero = length == 0
    return (x / (length.masked_fill(zero, 1.0).clamp(min=floor) + eps)).masked_fill(zero, 0.0)


def cosine(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Row-wise x·y / (|x||y| + eps), (B,): 0 for a zero row."""
    lengths = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
    return (x * y).sum(1) / (lengths + eps)


def centre(x: Tensor) -> Tensor:
    """Rows minus their mean."""
    return x - x.mean(1, keepdim=True)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: int64 to int64, every bit depending on every bit; wraps around."""
    x = (x ^ _shift(x, 30)) * MIX1
    x = (x ^ _shift(x, 27)) * MIX2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64's own shift would drag the sign along


def counters(*parts: int | Tensor) -> Tensor:
    """One int64 hash of all parts, broadcast together: a pure function of them, on the device of the tensors."""
    where = next((p.device for p in parts if isinstance(p, Tensor)), None)
    state = torch.zeros((), dtype=torch.int64, device=where)  # made there: a copy would make the host wait
    for part in parts:
        state = mix(state + part + GOLDEN)
    return state


def integers(below: int, *parts: int | Tensor) -> Tensor:
    """Integers in [0, below), int64, drawn from `counters`; the modulo's bias is below / 2**63."""
    return (counters(*parts) & 0x7FFFFFFFFFFFFFFF) % below


def uniform(*parts: int | Tensor) -> Tensor:
    """Numbers in [0, 1), float64, drawn from `counters`."""
    return _shift(counters(*parts), 11).double() * 2.0**-53
