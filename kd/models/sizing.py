"""Building a timm network for the size that it will see: image and patch size, and a stem for small images."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kd import late

CLASH = re.compile(r"multiple values for keyword argument '(\w+)'")
SMALL = 96  # pixels; below it networks made for photographs would shrink their maps to nothing
FAILURES = (RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError, AttributeError, IndexError)
RESERVED = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes", "in_chans",
    "features_only", "model_name", "scriptable", "exportable", "no_jit",
}  # fmt: skip  # they belong to kd, or would fetch or load something


def check_name(name: str) -> None:
    """Raises ValueError for a name that timm does not know, with those nearest to it."""
    late.timm()
    import timm

    bare, _, tag = name.partition(".")
    if ":" in name or "/" in name or not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), 3)
        near = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"timm has no network '{name}'.{near} Search: python -m kd.models --search '*{bare[:6]}*'")
    tags = timm.list_pretrained(f"{bare}.*") if tag else []
    if tag and name not in tags:
        raise ValueError(f"timm has no weights '{name}'. It has {', '.join(tags) or bare + ' without hub weights'}")


def check_args(name: str, args: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that are not the network's own."""
    for key in args:
        if key in RESERVED:
            raise ValueError(
                f"args.{key} is not for {name}'s arguments: kd sets it (pretrained=..., checkpoint=..., dataset)"
            )


def reductions(network: nn.Module) -> list[int]:
    """How much smaller than the image each part's map is, by timm's `feature_info`; empty where it says nothing."""
    info = getattr(network, "feature_info", None) or []
    return [i["reduction"] for i in (info if isinstance(info, list) else info.info)]


def size_arguments(name: str, args: Mapping[str, Any], size: int, pretrained: bool) -> Iterator[dict[str, Any]]:
    """Arguments to try, best first: image and patch size where the network takes them.

    Below 96 pixels a network whose maps all have one size (ViT, Mixer) gets patches of 4 pixels, one that shrinks them
    step by step (Swin, ConvNeXt) a stem of stride 2, of stride 1 up to 16 pixels. Hub weights keep a shrinking
    network's own.
    """
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    usual = config.input_size[-1] if config is not None and config.input_size else 224
    sized = {"img_size": size} if size != usual and "img_size" not in args else {}
    patch = None if "patch_size" in args or size >= SMALL else small_patch(name, args, size, pretrained)
    patched = {"patch_size": patch} if patch else {}
    tried: list[dict[str, Any]] = []
    for choice in ({**sized, **patched}, patched, sized, {}):
        if choice not in tried:
            tried.append(choice)
            yield choice


def small_patch(name: str, args: Mapping[str, Any], size: int, pretrained: bool) -> int | None:
    """The patch or stem stride for a small image; None where the network's own is as small, or is not to be touched."""
    steps = probe_reductions(name, args)
    if not steps:
        return None
    if len(set(steps)) == 1:
        return 4 if steps[0] > 4 else None
    if pretrained:
        return None
    if size > 32:
        return 2
    finer = probe_reductions(name, {**args, "patch_size": 2})
    keeps = bool(finer) and finer[0] == steps[0]  # ConvNeXt makes up for a finer stem in its first stage
    return 1 if size <= 16 or keeps else 2


def probe_reductions(name: str, args: Mapping[str, Any]) -> list[int]:
    """What `reductions` says of a network, built without filling its memory; empty where that cannot be done."""
    try:
        with torch.random.fork_rng(devices=[]), Unfilled():
            return reductions(create(name, args, 10, 3))
    except FAILURES:
        return []


class Unfilled(TorchFunctionMode):
    """While this is on, what would fill a tensor in place does not (the meta device costs the compiler's import, 3 s)."""

    FILLING = frozenset(("normal_", "uniform_", "zero_", "fill_", "mul_", "add_", "erfinv_", "clamp_"))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """The tensor as it is, or what the function gives."""
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.FILLING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def create(
    name: str, args: Mapping[str, Any], num_classes: int, in_channels: int, weights: Path | None = None
) -> nn.Module:
    """timm's network with exactly these arguments; `weights` is a file of its hub weights."""
    import timm

    hub = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}} if weights else {}
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **hub, **args)
    except TypeError as error:
        clash = CLASH.search(str(error))
        if not clash or clash[1] not in args:
            raise
    with overriding(name, args):
        return timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **hub)


@contextmanager
def overriding(name: str, args: Mapping[str, Any]) -> Iterator[None]:
    """Lets `args` win over arguments that a network's entry in timm has fixed (the Mixers' patch size)."""
    from timm.models import model_entrypoint

    module = importlib.import_module(model_entrypoint(name.partition(".")[0]).__module__)
    builder = module.build_model_with_cfg
    module.build_model_with_cfg = lambda *given, **fixed: builder(*given, **{**fixed, **args})
    try:
        yield
    finally:
        module.build_model_with_cfg = builder


def create_sized(
    name: str, args: Mapping[str, Any], num_classes: int, in_channels: int, size: int, *, weights: Path | None = None
) -> tuple[nn.Module, dict[str, Any], str]:
    """(network, the arguments it was built with, its stem: own or small).

    `args.small_stem` decides about the stem; by default one is made below 96 pixels for networks without hub weights.
    Raises ValueError when the network cannot be built at this size.
    """
    check_args(name, args)
    args = dict(args)
    wish = args.pop("small_stem", None)
    failures: list[Exception] = []
    for choice in size_arguments(name, args, size, weights is not None):
        small = size < SMALL and weights is None and "patch_size" not in choice
        for stem in (wish,) if wish is not None else (True, False) if small else (False,):
            try:
                network = create(name, {**args, **choice}, num_classes, in_channels, weights)
                changed = stem and small_stem(network)
                try_forward(network, in_channels, size)
                return network, {**args, **choice}, "small" if changed else "own"
            except FAILURES as error:
                failures.append(error)
    telling = [e for e in failures if "unexpected keyword" not in str(e)] or failures
    reason = str(telling[-1]).strip() or f"{type(telling[-1]).__name__} in its code"
    raise ValueError(
        f"{name} cannot be built for {size}x{size} pixels with {dict(args)}: {reason}. "
        f"Feed it larger images (preprocess.size=224), or give it other args."
    ) from telling[-1]


@torch.no_grad()
def try_forward(network: nn.Module, in_channels: int, size: int) -> None:
    """One image through the network in eval mode; raises what the network raises, ValueError when its maps vanish."""
    parameter, training = next(network.parameters()), network.training
    network.eval()
    logits = network(torch.zeros(1, in_channels, size, size, device=parameter.device))
    network.train(training)
    if parameter.device.type != "meta" and not logits.isfinite().all():
        raise ValueError("its maps shrink to nothing")


def small_stem(network: nn.Module) -> bool:
    """Let a CNN's first convolution keep the map's size, 3x3 for 7x7, and drop the max-pooling; False: it has none.

    Weights that were there stay: the middle of a larger kernel.
    """
    path = (getattr(network, "pretrained_cfg", None) or {}).get("first_conv")
    try:
        conv = network.get_submodule(path) if isinstance(path, str) else None
    except AttributeError:
        return False
    if not isinstance(conv, nn.Conv2d) or conv.stride != (2, 2) or conv.kernel_size[0] % 2 == 0:
        return False
    if conv.kernel_size[0] > 3:
        shrink_kernel(conv)
    conv.stride = (1, 1)
    if not hasattr(conv, "same_pad"):
        conv.padding = (conv.kernel_size[0] // 2,) * 2
    drop_pooling(network)
    return True


def shrink_kernel(conv: nn.Conv2d) -> None:
    """Keep the middle 3x3 of a larger kernel, scaled to the variance of He initialisation at that size."""
    side = conv.kernel_size[0]
    start = (side - 3) // 2
    middle = conv.weight.detach()[..., start : start + 3, start : start + 3].clone()
    conv.weight = nn.Parameter(middle * (side / 3))
    conv.kernel_size = (3, 3)


def drop_pooling(network: nn.Module) -> None:
    """Replace the max-pooling that follows the stem's convolution by nothing."""
    for path in ("maxpool", "pool", "features.pool0", "stem.pool", "stem_pool", "stem.maxpool"):
        parent, _, name = path.rpartition(".")
        try:
            module = getattr(network.get_submodule(parent), name)
        except AttributeError:
            continue
        if isinstance(module, nn.MaxPool2d | nn.Sequential) and any(
            isinstance(m, nn.MaxPool2d) for m in module.modules()
        ):
            setattr(network.get_submodule(parent), name, nn.Identity())
            return
