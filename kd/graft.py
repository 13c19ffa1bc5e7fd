"""A head taken from another network: what a student that was distilled by SimKD predicts with.

The term trains it, a saved classifier carries it; both know only this module.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.BatchNorm2d):
    """Batch norm that takes one value per channel too (batch 1, one position): by its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class GraftedHead(nn.Module):
    """A student's map (B, C, H, W) -> logits (B, K): a projector, the mean over positions, a teacher's classifier.

    The projector to the teacher's `width` is conv1x1 - BN - ReLU - conv3x3 - BN - ReLU - conv1x1 - BN (- ReLU) with
    `middle` channels between. A map higher than `size` is average-pooled to it first. The classifier is the
    teacher's and is never trained. `spec` holds the constructor's arguments, plain numbers that rebuild the module;
    its weights are its state dict.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        num_classes: int,
        *,
        middle: int,
        size: tuple[int, int] | None = None,
        relu: bool = True,
    ):
        super().__init__()
        self.spec = {"channels": channels, "width": width, "num_classes": num_classes, "middle": middle}
        self.spec |= {"size": list(size) if size else None, "relu": relu}
        self.size = tuple(size) if size else None
        steps = [nn.Conv2d(channels, middle, 1, bias=False), Norm(middle), nn.ReLU()]
        steps += [nn.Conv2d(middle, middle, 3, padding=1, bias=False), Norm(middle), nn.ReLU()]
        steps += [nn.Conv2d(middle, width, 1, bias=False), Norm(width), *([nn.ReLU()] if relu else [])]
        self.transfer = nn.Sequential(*steps)
        self.classifier = nn.Linear(width, num_classes).requires_grad_(False)

    def project(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, h, w), in the place of the teacher's map."""
        if self.size and tuple(feature.shape[-2:]) > self.size:
            feature = F.adaptive_avg_pool2d(feature, self.size)
        return self.transfer(feature)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return self.classifier(self.project(feature).mean(dim=(2, 3)))
