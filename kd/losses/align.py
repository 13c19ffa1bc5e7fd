"""Features of two networks brought to one layout and one resolution.

A feature is a map (B, C, H, W), tokens (B, N, C) or a vector (B, D); a term asks here for the layout that it needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.contracts import Output
from kd.graft import Norm
from kd.losses.numerics import full

PREFIX_TOKENS = 5  # at most: a class token, a distillation token, or one with four registers


def grid(tokens: int) -> tuple[int, int]:
    """(side, prefix tokens) of a square grid with that many tokens in all.

    Raises ValueError where they are neither a square nor a square after up to five prefix tokens.
    """
    side = math.isqrt(tokens)
    if tokens - side * side > PREFIX_TOKENS:
        raise ValueError(
            f"{tokens} tokens are no square grid (the nearest below is {side}x{side}): ask the network for its "
            "stage maps (stages: [stage4]) instead of tokens"
        )
    return side, tokens - side * side


def to_map(feature: Tensor) -> Tensor:
    """(B, C, H, W): tokens on their square grid, class tokens in front left out; a vector as a map of one position."""
    if feature.dim() == 4:
        return feature
    if feature.dim() == 2:
        return feature[:, :, None, None]  # (B, D, 1, 1)
    if feature.dim() != 3:
        shape = tuple(feature.shape)
        raise ValueError(f"a feature has 2 (vector), 3 (tokens) or 4 (map) dimensions, this one is {shape}")
    side, prefix = grid(feature.shape[1])
    return feature[:, prefix:].transpose(1, 2).unflatten(2, (side, side))  # (B, C, S, S)


def to_tokens(feature: Tensor) -> Tensor:
    """(B, N, C): a map's positions in reading order; a vector as one token."""
    if feature.dim() == 3:
        return feature
    return to_map(feature).flatten(2).transpose(1, 2)  # (B, H * W, C)


def to_vector(feature: Tensor) -> Tensor:
    """(B, C): the mean over positions; class tokens in front count only where there is nothing else."""
    return feature if feature.dim() == 2 else to_map(feature).mean(dim=(2, 3))


def pool_larger(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps of one resolution: the higher one is average-pooled to the other's, as the reference codes do."""
    small, large = student.shape[-2:], teacher.shape[-2:]
    if small == large:
        return student, teacher
    if small > large:  # by height; by width where the heights are equal
        return F.adaptive_avg_pool2d(student, large), teacher
    return student, F.adaptive_avg_pool2d(teacher, small)


def need_positions(students: list[Tensor], teachers: list[Tensor]) -> None:
    """Raise ValueError where every pair of maps comes down to one position, where a pattern over them is constant."""
    if all(min(s.shape[2] * s.shape[3], t.shape[2] * t.shape[3]) == 1 for s, t in zip(students, teachers, strict=True)):
        raise ValueError(
            "compares patterns over positions, and every chosen stage has a single one (a vector, or a map of 1x1) in "
            "the student or the teacher. Choose stages with positions, or a term on vectors or logits: fitnet, sp, "
            "rkd, crd, ofa"
        )


def pick(output: Output, name: str, owner: str) -> Tensor:
    """The feature of that name in at least float32. Raises ValueError, naming those there are, where it is missing."""
    if name not in output.features:
        raise ValueError(f"needs the {owner}'s feature '{name}'; the {owner} gives {sorted(output.features) or 'none'}")
    return full(output.features[name])


def project(channels: int, out_channels: int, bias: bool = False) -> nn.Conv2d:
    """A 1x1 convolution from one width to the other (on a vector's map: a linear layer)."""
    return nn.Conv2d(channels, out_channels, 1, bias=bias)


def conv_norm(channels: int, out_channels: int, kernel_size: int = 1) -> list[nn.Module]:
    """Convolution without bias at the same resolution, and its batch norm."""
    conv = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return [conv, Norm(out_channels)]


def reaches_below_zero(feature: Tensor) -> bool:
    """Whether a ReLU could not reach some of these values; for set-up only (it waits for the device)."""
    return bool(torch.any(feature < 0))
