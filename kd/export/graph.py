"""A classifier as a plain module with one tensor in and one out, and its graph by torch.export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd import models

LARGEST_BATCH = 65535


class Deployed(nn.Module):
    """uint8 images (B, C, h, w) -> logits (B, K) float32, batch norm folded, preprocessing inside."""

    def __init__(self, classifier: models.Classifier):
        super().__init__()
        self.classifier = models.fold_batchnorm(classifier.cpu().float())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.classifier(images).logits


def example(classifier: models.Classifier, channels: int, batch: int = 2) -> Tensor:
    """Images of the shape that the graph takes."""
    side = classifier.image_size
    ramp = torch.arange(batch * channels * side * side) % 256
    return ramp.to(torch.uint8).view(batch, channels, side, side)


def capture(module: nn.Module, images: Tensor, dynamic: bool = True) -> torch.export.ExportedProgram:
    """The graph of a module in eval mode, for any batch size if `dynamic`, else for that of `images`."""
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}} if dynamic else None
    with torch.no_grad():
        return torch.export.export(module, (images,), dynamic_shapes=shapes)
