"""What a classifier costs: parameters, and multiply-accumulates of one image."""

from __future__ import annotations

import torch
from torch import nn

from kd import late
from kd.models.classifier import Classifier


def count_parameters(model: nn.Module) -> int:
    """Parameters of a classifier's network, or of any module; shared ones count once."""
    network = model.network if isinstance(model, Classifier) else model
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, image_size: int | None = None, in_channels: int = 3) -> int:
    """Multiply-accumulates of one image through the network, by torch's own counter (which counts two for each).

    `image_size` is in pixels; a classifier's default is what its network sees. Attention's own products count too, on
    every device alike: the counter has no formula for the CPU's fused kernel, so the plain one runs here.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils import flop_counter

    late.unmarked(getattr(flop_counter, "_FlopCounterMode", flop_counter.FlopCounterMode))
    network = model
    if isinstance(model, Classifier):
        network, in_channels = model.network, model.built["in_channels"]
        image_size = image_size or model.preprocess.size
    parameter, training = next(network.parameters()), network.training
    images = torch.zeros(1, in_channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    detached = {
        n: p.detach() for n, p in network.named_parameters()
    }  # the counter hooks whatever could have a gradient
    network.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH), flop_counter.FlopCounterMode(display=False) as counter:
            torch.func.functional_call(network, detached, images)
    finally:
        network.train(training)
    return counter.get_total_flops() // 2
