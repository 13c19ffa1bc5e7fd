"""Random numbers as a pure function of (seed, epoch, index): the only randomness of the data path.

Integer hashing with the finaliser of splitmix64 (Steele, Lea, Flood 2014), in int64 tensors that wrap around. No
generator is read or advanced, so a number does not depend on what was drawn before it, on the batch, the process or the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ORDER = 0x6F72646572  # keeps the order of an epoch apart from every stream of draws


def uniform(seed: int, epoch: int, index: Tensor, draws: int, stream: int = 0) -> Tensor:
    """`draws` numbers in [0, 1) for each index, float32 (B, draws) on the index's device; streams are independent."""
    state = _mix(index.to(torch.int64) * _signed(_GOLDEN) + _signed(_key(seed, epoch, stream)))  # (B,)
    steps = torch.arange(1, draws + 1, device=index.device) * _signed(_GOLDEN)  # (draws,)
    bits = _mix(state[:, None] + steps)  # (B, draws)
    return _shift(bits, 40).to(torch.float32) * 2.0**-24  # 24 bits: every value is exact, and below 1


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of n things in an epoch, int64 (n,) on the CPU."""
    key = _signed(_key(seed, epoch, _ORDER))
    return _mix(torch.arange(n) * _signed(_GOLDEN) + key).argsort(stable=True)  # (n,)


def _key(*parts: int) -> int:
    state = 0
    for part in parts:
        state = _mix_int(((state ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return state


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX2)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
