"""The mobile CIFAR networks of the distillation literature: MobileNetV2, ShuffleNet V1 and V2. Imports torch only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.models.staged import Staged, init_convolutions


def conv_bn(
    width_in: int, width_out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """A convolution, batch norm and, unless told otherwise, ReLU."""
    convolution = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width_out), *([nn.ReLU()] if relu else []))


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3), project (1x1, linear); a shortcut where the shape stays."""

    def __init__(self, width_in: int, width_out: int, stride: int, expansion: int):
        super().__init__()
        hidden = width_in * expansion
        self.conv = nn.Sequential(
            conv_bn(width_in, hidden),
            conv_bn(hidden, hidden, 3, stride, groups=hidden),
            conv_bn(hidden, width_out, relu=False),
        )
        self.shortcut = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H / stride, W / stride)."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(Staged):
    """Sandler et al. 2018 (arXiv:1801.04381) as the distillation literature runs it on CIFAR.

    The total stride is 16. `width` scales every width but that of the last 1x1 convolution.
    """

    blocks = ("layer1", "layer2", "layer3", "layer4")
    head_name = "classifier"
    # blocks (expand?, width, how many, stride) of each of the four layers
    layers = (
        ((False, 16, 1, 1), (True, 24, 2, 1)),
        ((True, 32, 3, 2),),
        ((True, 64, 4, 2), (True, 96, 3, 1)),
        ((True, 160, 3, 2), (True, 320, 1, 1)),
    )

    def __init__(self, num_classes: int, in_channels: int = 3, width: float = 0.5, expansion: int = 6):
        super().__init__()
        before = int(32 * width)
        self.conv1 = conv_bn(in_channels, before, 3, stride=2)
        for name, groups in zip(self.blocks, self.layers, strict=True):
            layer = []
            for expand, base, count, stride in groups:
                for i in range(count):
                    factor = expansion if expand else 1
                    layer.append(InvertedResidual(before, int(base * width), stride if i == 0 else 1, factor))
                    before = int(base * width)
            setattr(self, name, nn.Sequential(*layer))
        last = int(1280 * max(width, 1.0))
        self.conv2, self.classifier = conv_bn(before, last), nn.Linear(last, num_classes)
        init_convolutions(self)

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 32 width, H / 2, W / 2)."""
        return self.conv1(images)

    def forward_neck(self, x: Tensor) -> Tensor:
        """The last 1x1 convolution, (B, D, h, w)."""
        return self.conv2(x)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups, (B, C, H, W) -> the same shape."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


class GroupedBottleneck(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; at stride 2 the pooled input is appended, else it is added."""

    def __init__(self, width_in: int, width_out: int, stride: int, groups: int, first: bool):
        super().__init__()
        own = width_out - width_in if stride == 2 else width_out  # the pooled input brings the other channels
        hidden, self.groups, self.stride = own // 4, 1 if first else groups, stride
        self.conv1 = conv_bn(width_in, hidden, groups=self.groups)
        self.conv2 = conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.conv3 = conv_bn(hidden, own, groups=groups, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H / stride, W / stride)."""
        y = self.conv3(self.conv2(shuffle(self.conv1(x), self.groups)))
        if self.stride == 2:
            return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, padding=1)], dim=1))
        return F.relu(y + x)


class ShuffleNetV1(Staged):
    """Zhang et al. 2018 (arXiv:1707.01083), three groups; the 1x1 stem is the distillation literature's."""

    blocks = ("layer1", "layer2", "layer3")
    head_name = "linear"

    def __init__(self, num_classes: int, in_channels: int = 3, groups: int = 3, width: int = 240):
        super().__init__()
        self.conv1, before = conv_bn(in_channels, 24), 24
        for name, out, count in zip(self.blocks, (width, 2 * width, 4 * width), (4, 8, 4), strict=True):
            layer = [
                GroupedBottleneck(out if i else before, out, 1 if i else 2, groups, first=not i and before == 24)
                for i in range(count)
            ]
            setattr(self, name, nn.Sequential(*layer))
            before = out
        self.linear = nn.Linear(before, num_classes)
        init_convolutions(self)

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 24, H, W)."""
        return self.conv1(images)


class SplitUnit(nn.Module):
    """Half of the channels pass, the other half go 1x1, depthwise 3x3, 1x1; then both are shuffled."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn(half, half), conv_bn(half, half, 3, groups=half, relu=False), conv_bn(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> the same shape."""
        left, right = x.chunk(2, dim=1)
        return shuffle(torch.cat([left, self.branch(right)], dim=1), 2)


class DownUnit(nn.Module):
    """Two branches at stride 2, each giving half of the new channels, then shuffled."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        half = width_out // 2
        self.left = nn.Sequential(
            conv_bn(width_in, width_in, 3, 2, groups=width_in, relu=False), conv_bn(width_in, half)
        )
        self.right = nn.Sequential(
            conv_bn(width_in, half), conv_bn(half, half, 3, 2, groups=half, relu=False), conv_bn(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H / 2, W / 2)."""
        return shuffle(torch.cat([self.left(x), self.right(x)], dim=1), 2)


class ShuffleNetV2(Staged):
    """Ma et al. 2018 (arXiv:1807.11164) at width 1; the 1x1 stem is the distillation literature's."""

    blocks = ("layer1", "layer2", "layer3")
    head_name = "linear"

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 116, last: int = 1024):
        super().__init__()
        self.conv1, before = conv_bn(in_channels, 24), 24
        for name, out, count in zip(self.blocks, (width, 2 * width, 4 * width), (3, 7, 3), strict=True):
            setattr(self, name, nn.Sequential(DownUnit(before, out), *(SplitUnit(out) for _ in range(count))))
            before = out
        self.conv2, self.linear = conv_bn(before, last), nn.Linear(last, num_classes)
        init_convolutions(self)

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 24, H, W)."""
        return self.conv1(images)

    def forward_neck(self, x: Tensor) -> Tensor:
        """The last 1x1 convolution, (B, D, h, w)."""
        return self.conv2(x)
