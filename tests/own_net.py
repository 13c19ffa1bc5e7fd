"""A network of a user's own, outside kd."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """Two convolutions and a head."""

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 8):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU())
        self.fc = nn.Linear(2 * width, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))
