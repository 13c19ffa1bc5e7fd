"""Mixup and cutmix of the pairs 2k, 2k+1 of a batch: one coefficient a pair, from draws of its first image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kd.data.geometry import inside

DRAWS = 4  # which of the two, coefficient, x, y
_TABLE = 8192


class Mixer:
    """`mixup`, `cutmix`: the alpha of Beta(alpha, alpha), 0 for off; with both, each pair takes one or the other.

    Zhang et al., arXiv:1710.09412, and Yun et al., arXiv:1905.04899. The last image of an odd batch stays as it is.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int):
        self.mixup, self.cutmix, self.num_classes = mixup, cutmix, num_classes
        self._tables = {alpha: beta_quantiles(alpha) for alpha in (mixup, cutmix) if alpha}

    def __call__(self, images: Tensor, targets: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and soft targets (B, K); images float (B, C, H, W), draws (B // 2, 4) of the pairs."""
        pairs = 2 * len(draws)
        weights, share = self._weights(images.shape[-2], images.shape[-1], draws)
        soft = targets if targets.is_floating_point() else F.one_hot(targets, self.num_classes).to(torch.float32)
        return _blend(images, weights, pairs), _blend(soft, share, pairs)

    def _weights(self, h: int, w: int, draws: Tensor) -> tuple[Tensor, Tensor]:
        """How much of itself an image keeps, (P, 1, 1, 1) or by pixel (P, 1, H, W), and in all, (P, 1)."""
        which, draw = draws[:, 0], draws[:, 1]
        if not self.cutmix:
            share = self._quantile(self.mixup, draw)
            return share[:, None, None, None], share[:, None]
        cut = ~_box(h, w, self._quantile(self.cutmix, draw), draws[:, 2:])  # (P, H, W)
        cut, area = cut[:, None].float(), cut.float().mean((1, 2))
        if not self.mixup:
            return cut, area[:, None]
        share, first = self._quantile(self.mixup, draw), which < 0.5
        weights = torch.where(first[:, None, None, None], share[:, None, None, None], cut)
        return weights, torch.where(first, share, area)[:, None]

    def _quantile(self, alpha: float, draw: Tensor) -> Tensor:
        table = self._tables[alpha] = self._tables[alpha].to(draw.device)
        place = draw * (_TABLE - 1)
        low = place.long()
        return torch.lerp(table[low], table[(low + 1).clamp_max(_TABLE - 1)], place - low)


def beta_quantiles(alpha: float) -> Tensor:
    """The inverse distribution function of Beta(alpha, alpha) at 8192 even steps of [0, 1], float32.

    Integrated up to 1/2, for alpha below 1 over s = x^alpha, where the density has no pole; the rest mirrors it.
    """
    power = min(alpha, 1.0)
    s = torch.linspace(0, 0.5**power, 20 * _TABLE, dtype=torch.float64)
    x = s ** (1 / power)
    mass = torch.cat([s.new_zeros(1), torch.cumulative_trapezoid(x ** (alpha - power) * (1 - x) ** (alpha - 1), s)])
    mass = mass / mass[-1] / 2  # P(X <= x), ends at 1/2
    wanted = torch.linspace(0, 1, _TABLE, dtype=torch.float64)
    lower = wanted.minimum(1 - wanted)
    right = torch.searchsorted(mass, lower).clamp_(1, len(mass) - 1)
    step = (lower - mass[right - 1]) / (mass[right] - mass[right - 1])
    found = torch.lerp(s[right - 1], s[right], step) ** (1 / power)
    return torch.where(wanted <= 0.5, found, 1 - found).to(torch.float32)


def _blend(values: Tensor, keep: Tensor, pairs: int) -> Tensor:
    """Even rows keep their share of themselves and take the rest from the odd ones, and the other way round."""
    even, odd, out = values[0:pairs:2], values[1:pairs:2], values.clone()
    out[0:pairs:2] = even * keep + odd * (1 - keep)
    out[1:pairs:2] = odd * keep + even * (1 - keep)
    return out


def _box(h: int, w: int, share: Tensor, draws: Tensor) -> Tensor:
    """Where the partner shows: a box of 1 - share of the area around a drawn centre, clipped; (P, H, W)."""
    side = (1 - share).sqrt()
    height, width = (h * side).long(), (w * side).long()
    x, y = (draws[:, 0] * w).long(), (draws[:, 1] * h).long()
    top, left = (y - height // 2).clamp_min(0), (x - width // 2).clamp_min(0)
    bottom, right = (y + height // 2).clamp_max(h), (x + width // 2).clamp_max(w)
    return inside(h, w, (top, left, bottom - top, right - left))
