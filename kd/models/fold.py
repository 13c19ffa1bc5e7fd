"""Folding batch norm into the convolutions before it: the same function with fewer operations, for a frozen network."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kd.contracts import STAGES
from kd.models import taps
from kd.models.classifier import Classifier

GLANCES = {
    "__get__",
    "dim",
    "size",
    "stride",
    "numel",
    "is_floating_point",
    "is_contiguous",
    "__len__",
}  # read no pixel


def fold_batchnorm(classifier: Classifier) -> Classifier:
    """A copy in eval mode whose batch norms are folded wherever one follows a convolution directly, exact to rounding.

    Which do is seen in one forward, not read off names. The copy has `folded`, how many were; it is for inference,
    its state dict is not the original's.
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


class Uses(TorchFunctionMode):
    """Counts the operations that read each of the tensors in `watched` (id -> count)."""

    def __init__(self, watched: dict[int, int]):
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run `func`, after counting."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in GLANCES:
            for value in (v for v in tree_leaves((args, kwargs)) if id(v) in self.watched):
                self.watched[id(value)] += 1
        return func(*args, **kwargs)


@torch.no_grad()
def find_pairs(classifier: Classifier) -> list[tuple[nn.Module, nn.Module]]:
    """(convolution, batch norm) where the second alone reads what the first gives, and both run once.

    A convolution whose output is one of the stages keeps it as it is.
    """
    calls: Counter[nn.Module] = Counter()
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # id of an output -> who made it; holding it keeps the id its own
    uses: dict[int, int] = {}
    pairs = []

    def leave(module: nn.Module, _inputs: tuple, out: Tensor) -> None:
        calls[module] += 1
        made[id(out)], uses[id(out)] = (module, out), 0

    def enter(module: nn.Module, inputs: tuple) -> None:
        calls[module] += 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module, id(inputs[0])))

    handles = [m.register_forward_hook(leave) for m in classifier.network.modules() if plain_convolution(m)]
    handles += [m.register_forward_pre_hook(enter) for m in classifier.network.modules() if foldable_norm(m)]
    stages = [n for n in STAGES if n in classifier.stages()]
    try:
        with Uses(uses):
            _, _, maps = taps.read(classifier.network, classifier.taps, probe(classifier), tuple(stages))
    finally:
        for handle in handles:
            handle.remove()
    shown = {id(m) for m in maps.values()}
    return [(c, n) for c, n, out in pairs if calls[c] == calls[n] == uses[out] == 1 and out not in shown]


def plain_convolution(module: nn.Module) -> bool:
    """Whether a module convolves with its weight as it stands (weight standardisation does not)."""
    plain = type(module).forward is nn.Conv2d.forward or type(module).__name__ == "Conv2dSame"
    return isinstance(module, nn.Conv2d) and plain


def foldable_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics and factors of its own."""
    return isinstance(module, nn.BatchNorm2d) and module.track_running_stats and module.affine


def probe(classifier: Classifier) -> Tensor:
    """One image as the network sees it."""
    parameter = next(classifier.network.parameters())
    return classifier._probe(parameter.dtype, parameter.device)


@torch.no_grad()
def agrees(classifier: Classifier, folded: Classifier, tolerance: float = 1e-3) -> bool:
    """Whether both give the same logits and stages, to rounding: a last guard."""
    training = classifier.training
    classifier.eval()
    stages = [n for n in classifier.taps.names if n in STAGES]
    shape = (2, classifier.built["in_channels"], classifier.image_size, classifier.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(next(classifier.parameters()).device)
    try:
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
