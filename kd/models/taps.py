"""Which maps inside a network are its four stages, and reading them beside the logits in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd.contracts import STAGES

NAMES = (*STAGES, "tokens", "penultimate", "logits")
PATH = "module:"  # features=["module:layer1.0.conv2"]: the output of one module, by its path


class MeanHead(nn.Module):
    """The mean of two linear heads, on one vector (B, D) or on two side by side (B, 2 D) -> (B, K)."""

    def __init__(self, heads: Sequence[nn.Module], split: bool):
        super().__init__()
        self.heads, self.split = nn.ModuleList(heads), split

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        parts = x.chunk(2, dim=1) if self.split else (x, x)
        return (self.heads[0](parts[0]) + self.heads[1](parts[1])) / 2


class ConvHead(nn.Module):
    """A 1x1 convolution that serves as the head, for vectors: (B, D) -> (B, K)."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.conv(x[:, :, None, None]).flatten(1)


@dataclass
class Taps:
    """Where a network's features are found: plain data and a head, no copy of the network's parameters."""

    indices: dict[str, int] = field(default_factory=dict)  # stage -> part number of forward_intermediates
    parts: dict[str, str] = field(default_factory=dict)  # stage -> the module it is the output of
    reasons: dict[str, str] = field(default_factory=dict)  # feature that the network does not have -> why
    head: nn.Module | None = None  # penultimate (B, D) -> logits (B, K), exact in eval mode
    split: bool = False  # the penultimate is two tokens side by side (DeiT with a distillation token)
    prefix: int = 0  # tokens before the patches' (class, register, distillation)

    @property
    def names(self) -> list[str]:
        """The features that can be asked for."""
        return [n for n in NAMES if n not in self.reasons]


def pick_parts(reductions: Sequence[int]) -> list[int]:
    """The part that ends each stage, the last four: a part's reduction is how much smaller its map is than the image.

    Where the reduction never changes, or fewer than four times, a stage is a quarter of the depth.
    """
    ends = [i for i, r in enumerate(reductions) if i + 1 == len(reductions) or reductions[i + 1] != r]
    if len(ends) >= len(STAGES):
        return ends[-len(STAGES) :]
    if len(reductions) >= len(STAGES):
        return [round(len(reductions) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
    return list(range(len(reductions)))


def find_taps(network: nn.Module) -> Taps:
    """The stages of a network that speaks timm's `forward_intermediates`; the head is found by its type."""
    taps = Taps(prefix=int(getattr(network, "num_prefix_tokens", 0) or 0))
    info = feature_info(network)
    if not info or not hasattr(network, "forward_intermediates"):
        why = "the network offers no intermediate maps; a module's output can be had as features=[module:PATH]"
        taps.reasons.update(dict.fromkeys((*STAGES, "tokens"), why))
    else:
        chosen = pick_parts([part["reduction"] for part in info])
        for name, index in zip(STAGES[len(STAGES) - len(chosen) :], chosen, strict=True):
            taps.indices[name], taps.parts[name] = index, info[index]["module"]
        missing = STAGES[: len(STAGES) - len(chosen)]
        taps.reasons.update(dict.fromkeys(missing, f"the network has only {len(chosen)} stages, the last is stage4"))
    taps.head = head_by_type(network)
    if taps.head is None or not hasattr(network, "forward_head"):
        taps.head = None
        taps.reasons["penultimate"] = "the network's head is not one layer on one vector"
    return taps


def feature_info(network: nn.Module) -> list[dict]:
    """`module` and `reduction` of each part that `forward_intermediates` can give, in order of depth."""
    if hasattr(network, "parts"):  # ours: no number is typed, so the depth decides
        return [{"module": name, "reduction": part} for part, name in enumerate(network.parts)]
    info = getattr(network, "feature_info", None) or []
    return [
        {"module": i.get("module", ""), "reduction": i["reduction"]}
        for i in (info if isinstance(info, list) else info.info)
    ]


def head_by_type(network: nn.Module) -> nn.Module | None:
    """The layer or layers that make logits, as one module on the penultimate vector."""
    head = network.get_classifier() if hasattr(network, "get_classifier") else None
    if isinstance(head, tuple | list):
        return MeanHead(head, split=False)
    head = getattr(head, "fc", head)  # pooling and layer in one module
    if isinstance(head, nn.Conv2d):
        return ConvHead(head)
    return None if isinstance(head, nn.Identity) else head


@torch.no_grad()
def settle_head(network: nn.Module, taps: Taps, final: Tensor) -> None:
    """Make sure that head(penultimate) equals the logits in eval mode, else say that there is no penultimate.

    `final` (the last features of any image) is sent both ways; heads that start at zero are filled for the moment.
    """
    head = taps.head
    if head is None:
        return
    candidates = [(head, False)] + ([(MeanHead(head.heads, split=True), True)] if isinstance(head, MeanHead) else [])
    kept = [(p, p.detach().clone()) for p in head.parameters()]
    try:
        for k, (p, _) in enumerate(kept):  # no two alike
            p.copy_((torch.arange(p.numel(), dtype=torch.float32, device=p.device) + k).sin().view_as(p))
        taps.head = None
        logits = network.forward_head(final)
        for candidate, split in candidates:
            taps.split = split
            try:
                same = torch.allclose(candidate(penultimate(network, taps, final)), logits, rtol=1e-4, atol=1e-4)
            except (RuntimeError, TypeError, IndexError, AttributeError):
                same = False
            if same:
                taps.head = candidate
                return
    finally:
        for p, value in kept:
            p.copy_(value)
    taps.split = False
    taps.reasons["penultimate"] = "the network's head is not one layer on one vector"


def penultimate(network: nn.Module, taps: Taps, final: Tensor) -> Tensor:
    """The vector (B, D) that the head makes logits of."""
    if taps.split:
        return final[:, :2].flatten(1)  # class and distillation token
    return network.forward_head(final, pre_logits=True).flatten(1)


def read(
    network: nn.Module, taps: Taps, x: Tensor, wanted: tuple[str, ...]
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """(logits, those of a distillation head in training or None, {feature: tensor}); computes no more than that."""
    stages = tuple(n for n in STAGES if n in wanted or (n == "stage4" and "tokens" in wanted))
    if not stages and "penultimate" not in wanted:
        logits, extra = both(network(x))
        return logits, extra, {"logits": logits} if "logits" in wanted else {}
    final, found = features(network, taps, x, stages)
    if "penultimate" in wanted:
        found["penultimate"] = penultimate(network, taps, final)
    if "penultimate" in wanted and not isinstance(taps.head, MeanHead):
        logits, extra = taps.head(found["penultimate"]), None
    else:
        logits, extra = both(network.forward_head(final))
    found["logits"] = logits
    if "tokens" in wanted:
        found["tokens"] = tokens(final, found["stage4"], taps.prefix)
    return logits, extra, {n: found[n] for n in wanted}


def both(out: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Logits, and those of a distillation head where the network gives two."""
    return out if isinstance(out, tuple) else (out, None)


def features(network: nn.Module, taps: Taps, x: Tensor, stages: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The last features, and the maps (B, C, H, W) of `stages`."""
    if not stages:
        return network.forward_features(x), {}
    final, maps = network.forward_intermediates(x, indices=[taps.indices[s] for s in stages])
    return final, dict(zip(stages, maps, strict=True))


def tokens(final: Tensor, last_map: Tensor, prefix: int) -> Tensor:
    """(B, N, C): a transformer's last patch tokens, normalised; of another network the positions of its last map."""
    count = last_map.shape[2] * last_map.shape[3]
    if torch.is_tensor(final) and final.ndim == 3 and final.shape[1] == count + prefix:
        return final[:, prefix:]
    return last_map.flatten(2).transpose(1, 2)


@contextmanager
def hooked(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of the modules at `paths` (`module:layer1.0.conv2`) while it is open."""
    found: dict[str, Tensor] = {}
    modules = dict(network.named_modules())
    handles = [
        modules[path[len(PATH) :]].register_forward_hook(lambda _m, _i, out, path=path: found.__setitem__(path, out))
        for path in paths
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
