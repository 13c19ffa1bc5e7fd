"""What a classifier costs: parameters, and multiply-accumulates of one image."""

from __future__ import annotations

import torch
from torch import nn

from kd import late
from kd.models.classifier import Classifier


def count_parameters(model: nn.Module) -> int:
    """Parameters of a classifier (a grafted head included), or of any module; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, image_size: int | None = None, in_channels: int = 3) -> int:
    """Multiply-accumulates of one image through a network, by torch's own counter (which counts two for each).

    A classifier is counted as it is used, a grafted head included; `image_size` in pixels is by default that of its
    view. Attention's own products count too, on
    every device alike: the counter has no formula for the CPU's fused kernel, so the plain one runs here.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils import flop_counter

    late.unmarked(getattr(flop_counter, "_FlopCounterMode", flop_counter.FlopCounterMode))
    if isinstance(model, Classifier):
        in_channels, image_size = model.built["in_channels"], image_size or model.image_size
    parameter, training = next(model.parameters()), model.training
    images = torch.zeros(1, in_channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    detached = {n: p.detach() for n, p in model.named_parameters()}  # the counter hooks what could have a gradient
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH), flop_counter.FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, detached, images)
    finally:
        model.train(training)
    return counter.get_total_flops() // 2
