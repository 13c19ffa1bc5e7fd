"""What our own networks share: a stem, a few stages, pooling and a linear head, spoken to as timm's networks are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Staged(nn.Module):
    """A network in parts, so that the maps between them can be asked for.

    A subclass defines `blocks` (the modules after the stem, in order) and `forward_stem`; where something follows the
    last block, `forward_neck`. The part numbers of `forward_intermediates` are 0 for the stem, then the blocks.
    """

    blocks: tuple[str, ...] = ()  # names of the modules that follow the stem
    head_name = "fc"

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the first map."""
        raise NotImplementedError

    def forward_neck(self, x: Tensor) -> Tensor:
        """What lies between the last block and the pooling; nothing by default."""
        return x

    @property
    def parts(self) -> tuple[str, ...]:
        """Module names of the maps that can be asked for, the stem first."""
        return ("stem", *self.blocks)

    def get_classifier(self) -> nn.Linear:
        """The head, penultimate (B, D) -> logits (B, K)."""
        return getattr(self, self.head_name)

    def forward_intermediates(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The last map and those of the parts in `indices`, in order of depth."""
        x, maps = self.forward_stem(images), []
        if 0 in indices:
            maps.append(x)
        for part, name in enumerate(self.blocks, start=1):
            x = getattr(self, name)(x)
            if part in indices:
                maps.append(x)
        return self.forward_neck(x), maps

    def forward_features(self, images: Tensor) -> Tensor:
        """The last map (B, D, h, w)."""
        return self.forward_intermediates(images, ())[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map (B, D, h, w) -> logits (B, K), or the penultimate (B, D)."""
        x = x.mean((2, 3))  # (B, D)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return self.forward_head(self.forward_features(images))


def init_convolutions(network: nn.Module) -> None:
    """He initialisation (arXiv:1502.01852), fan out, for every convolution."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
