"""Folding batch norm into the convolutions before it: the same function with fewer operations, for a frozen network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd.models.classifier import Classifier


def fold_batchnorm(classifier: Classifier) -> Classifier:
    """A copy in eval mode whose batch norms are folded wherever one follows a convolution directly, exact to rounding.

    Which do is seen in one forward, not read off names. The copy has `folded`, how many were; it is for inference, its state
    dict is not the original's.
    """
    folded = copy.deepcopy(classifier).eval()
    pairs = find_pairs(folded)
    names = {id(m): name for name, m in folded.network.named_modules()}
    for conv, norm in pairs:
        replace(folded.network, names[id(conv)], fuse_conv_bn_eval(conv, norm))
        replace(folded.network, names[id(norm)], after(norm))
    if pairs and not agrees(classifier, folded):
        folded, pairs = copy.deepcopy(classifier).eval(), []
    folded.dry_forward()
    folded.folded = len(pairs)
    return folded


@torch.no_grad()
def find_pairs(classifier: Classifier) -> list[tuple[nn.Module, nn.Module]]:
    """(convolution, batch norm) where the second's input is the first's output, both used once and alone."""
    calls: dict[nn.Module, int] = {}
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # id of an output -> who made it; holding it keeps the id its own
    pairs = []

    def leave(module: nn.Module, _inputs: tuple, out: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        made[id(out)] = (module, out)

    def enter(module: nn.Module, inputs: tuple) -> None:
        calls[module] = calls.get(module, 0) + 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    handles = []
    for module in classifier.network.modules():
        if (
            type(module).forward is not nn.Conv2d.forward
            and isinstance(module, nn.Conv2d)
            and type(module).__name__ != "Conv2dSame"
        ):
            continue  # a convolution that transforms its weight first (weight standardisation)
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(leave))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats and module.affine:
            handles.append(module.register_forward_pre_hook(enter))
    try:
        classifier.network(probe(classifier))
    finally:
        for handle in handles:
            handle.remove()
    return [(c, n) for c, n in pairs if calls[c] == 1 and calls[n] == 1]


def probe(classifier: Classifier) -> Tensor:
    """One image as the network sees it."""
    parameter = next(classifier.network.parameters())
    return classifier._probe(parameter.dtype, parameter.device)


@torch.no_grad()
def agrees(classifier: Classifier, folded: Classifier, tolerance: float = 1e-3) -> bool:
    """Whether both give the same logits and stages, to rounding: a convolution that something else reads too must not be folded."""
    training = classifier.training
    classifier.eval()
    stages = [n for n in classifier.taps.names if n.startswith("stage")]
    try:
        images = torch.rand(2, 3 if classifier.built["in_channels"] == 3 else 1, *(2 * [classifier.image_size]),
                            generator=torch.Generator().manual_seed(0)).to(next(classifier.parameters()).device)  # fmt: skip
        ours, theirs = classifier(images, stages), folded(images, stages)
    finally:
        classifier.train(training)
    pairs = [(ours.logits, theirs.logits), *((ours.features[n], theirs.features[n]) for n in stages)]
    return all((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-6) for a, b in pairs)


def replace(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put another module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def after(norm: nn.Module) -> nn.Module:
    """What is left of a batch norm that was folded: the activation that timm keeps inside it, or nothing."""
    parts = [getattr(norm, n, None) for n in ("drop", "act")]
    kept = [p for p in parts if isinstance(p, nn.Module) and not isinstance(p, nn.Identity)]
    return nn.Sequential(*kept) if kept else nn.Identity()
