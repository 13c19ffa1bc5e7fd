"""The CIFAR networks of the distillation literature: ResNet, WideResNet, VGG. Imports torch only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kd.models.staged import Staged, init_convolutions


def conv3x3(width_in: int, width_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the map's size at stride 1."""
    return nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)


class ZeroPad(nn.Module):
    """He et al.'s option A: every second pixel, missing channels filled with zeros on both sides; no parameters."""

    def __init__(self, stride: int, channels: int):
        super().__init__()
        self.stride, self.channels = stride, channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + channels, H / stride, W / stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.channels // 2, self.channels - self.channels // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut around them."""

    def __init__(self, width_in: int, width_out: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(width_in, width_out, stride), nn.BatchNorm2d(width_out)
        self.conv2, self.bn2 = conv3x3(width_out, width_out), nn.BatchNorm2d(width_out)
        self.downsample = None
        if (stride != 1 or width_in != width_out) and shortcut == "projection":
            convolution = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(width_out))
        elif stride != 1 or width_in != width_out:
            self.downsample = ZeroPad(stride, width_out - width_in)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(Staged):
    """He et al. 2016 (arXiv:1512.03385), sec. 4.2: three layers of (depth - 2) / 6 blocks, widths `width` x 1, 2, 4.

    `shortcut` is `projection` (option B, as in the distillation literature) or `pad` (option A, He et al.'s own on
    CIFAR). The literature's resnet8x4 and resnet32x4 have `width=64` and a stem of 32.
    """

    blocks = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        depth: int = 20,
        width: int = 16,
        stem_width: int | None = None,
        shortcut: str = "projection",
    ):
        """Raises ValueError for a depth that is not 6 n + 2 or an unknown shortcut."""
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth}: a CIFAR ResNet's depth is 6 n + 2, such as 8, 14, 20, 32, 44, 56, 110")
        if shortcut not in ("projection", "pad"):
            raise ValueError(f"shortcut={shortcut}: expected projection or pad")
        before = stem_width or width
        self.conv1, self.bn1 = conv3x3(in_channels, before), nn.BatchNorm2d(before)
        for name, out, stride in zip(self.blocks, (width, 2 * width, 4 * width), (1, 2, 2), strict=True):
            strides = [stride] + [1] * ((depth - 2) // 6 - 1)
            widths = [before] + [out] * (len(strides) - 1)
            layer = [BasicBlock(w, out, s, shortcut) for w, s in zip(widths, strides, strict=True)]
            setattr(self, name, nn.Sequential(*layer))
            before = out
        self.fc = nn.Linear(before, num_classes)
        init_convolutions(self)

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, stem_width, H, W)."""
        return F.relu(self.bn1(self.conv1(images)))


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; a 1x1 shortcut where the width changes."""

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), conv3x3(width_in, width_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width_out), conv3x3(width_out, width_out)
        same = width_in == width_out
        self.shortcut = None if same else nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H / stride, W / stride)."""
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(Staged):
    """Zagoruyko, Komodakis 2016 (arXiv:1605.07146): three layers of (depth - 4) / 6 blocks, norms first."""

    blocks = ("layer1", "layer2", "layer3")

    def __init__(self, num_classes: int, in_channels: int = 3, depth: int = 16, width: int = 1):
        """Raises ValueError for a depth that is not 6 n + 4."""
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth}: a WideResNet's depth is 6 n + 4, such as 10, 16, 22, 28, 40")
        self.conv1, before = conv3x3(in_channels, 16), 16
        for name, out, stride in zip(self.blocks, (16 * width, 32 * width, 64 * width), (1, 2, 2), strict=True):
            count = (depth - 4) // 6
            layer = [WideBlock(before if i == 0 else out, out, stride if i == 0 else 1) for i in range(count)]
            setattr(self, name, nn.Sequential(*layer))
            before = out
        self.bn1, self.fc = nn.BatchNorm2d(before), nn.Linear(before, num_classes)
        init_convolutions(self)

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 16, H, W)."""
        return self.conv1(images)

    def forward_neck(self, x: Tensor) -> Tensor:
        """The last batch norm and ReLU, (B, D, h, w)."""
        return F.relu(self.bn1(x))


VGG_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(Staged):
    """Simonyan, Zisserman 2015 (arXiv:1409.1556) with batch norm: five blocks and one linear layer.

    Max-pooling lies between the first four; as in the distillation literature none follows the fourth below 64 pixels.
    """

    blocks = ("block1", "block2", "block3", "block4")
    head_name = "classifier"

    def __init__(self, num_classes: int, in_channels: int = 3, depth: int = 13, width: int = 64):
        """Raises ValueError for an unknown depth."""
        super().__init__()
        if depth not in VGG_CONVOLUTIONS:
            raise ValueError(f"depth={depth}: expected one of {', '.join(map(str, VGG_CONVOLUTIONS))}")
        before = in_channels
        for block, count in enumerate(VGG_CONVOLUTIONS[depth]):
            out = min(width * 2**block, 8 * width)
            layers = []
            for _ in range(count):
                layers += [nn.Conv2d(before, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
                before = out
            setattr(self, f"block{block}", nn.Sequential(*([PoolAbove(block)] if block else []), *layers))
        self.classifier = nn.Linear(before, num_classes)
        init_convolutions(self)

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H, W)."""
        return self.block0(images)


class PoolAbove(nn.Module):
    """Max-pooling before a VGG block; before the last one only for maps of 8 and above (images of 64 pixels)."""

    def __init__(self, block: int):
        super().__init__()
        self.smallest = 8 if block == 4 else 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2), or unchanged."""
        return F.max_pool2d(x, 2) if x.shape[-1] >= self.smallest else x
