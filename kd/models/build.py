"""Building a classifier from what a model YAML says."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kd.models.classifier import Classifier
from kd.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, Preprocess

KEPT = ("name", "family", "args", "preprocess")


def build(
    spec: Mapping[str, Any],
    num_classes: int,
    image_size: int,
    in_channels: int = 3,
    classes: Sequence[str] | None = None,
    *,
    pretrained: bool = False,
) -> Classifier:
    """The classifier that a model YAML describes, for views of `image_size` pixels.

    `spec` has `name`, `args` (with `_target_`: a class of ours, else timm's arguments) and `preprocess`; `pretrained`
    asks for timm's hub weights. `spec.checkpoint` is the caller's to load. Gray images are expanded to three
    channels. Raises ValueError for a network that cannot be built so, FileNotFoundError for hub weights out of reach.
    """
    spec = {k: plain(spec[k]) for k in KEPT if spec.get(k) is not None}
    args, wishes = spec.setdefault("args", {}), spec.setdefault("preprocess", {})
    check_sizes(spec, num_classes, image_size)
    built = {
        "num_classes": int(num_classes),
        "image_size": int(image_size),
        "in_channels": 3 if in_channels == 1 else int(in_channels),
        "size": int(wishes.get("size") or image_size),
    }
    if "_target_" in args:
        network = build_own(spec, built, pretrained)
        built.update(args=dict(args), stem="own")
        origin = {"weights": "scratch"}
    else:
        network, origin = build_timm(spec, built, pretrained)
    classifier = Classifier(network, make_preprocess(network, wishes, built), spec, built, classes, origin=origin)
    classifier.dry_forward()
    return classifier


def plain(value: Any) -> Any:
    """Mappings and sequences of any kind as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value


def check_sizes(spec: Mapping, num_classes: int, image_size: int) -> None:
    """Raises ValueError for numbers that no network can have, and for a spec without a name."""
    if not spec.get("name"):
        raise ValueError("a model needs a name: a preset (python -m kd.models lists them) or one of timm's")
    if num_classes < 1 or image_size < 1:
        raise ValueError(
            f"{spec['name']}: num_classes={num_classes}, image_size={image_size}: expected numbers above 0"
        )


def build_own(spec: Mapping, built: Mapping, pretrained: bool) -> nn.Module:
    """A network of our own, by the class that `args._target_` names."""
    args = dict(spec["args"])
    target = args.pop("_target_")
    if pretrained:
        raise ValueError(
            f"there are no hub weights for {spec['name']}. Type pretrained=false, or give weights: checkpoint=PATH"
        )
    kind = locate(target)
    try:
        return kind(num_classes=built["num_classes"], in_channels=built["in_channels"], **args)
    except TypeError as error:
        takes = [p for p in inspect.signature(kind).parameters if p not in ("num_classes", "in_channels")]
        raise ValueError(f"{spec['name']} ({target}): {error}. It takes {', '.join(takes)}") from error


def locate(target: str) -> type[nn.Module]:
    """The network class behind a dotted path such as `kd.models.cifar.ResNet`; ValueError when there is none."""
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"args._target_={target}: there is no such class ({error})") from error
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise ValueError(f"args._target_={target} is not a network (a subclass of torch.nn.Module)")
    return found


def build_timm(spec: Mapping, built: dict, pretrained: bool) -> tuple[nn.Module, dict]:
    """(network, where its weights are from); fills `built` with the arguments and the stem that were settled on."""
    from kd.models import hub, sizing

    name = spec["name"]
    sizing.check_name(name)
    sizing.check_args(name, spec["args"])
    weights = hub.find_weights(name) if pretrained else None
    network, built["args"], built["stem"] = sizing.create_sized(
        name, spec["args"], built["num_classes"], built["in_channels"], built["size"], weights=weights
    )
    return finish_timm(network), origin_of(network, built, weights is not None)


def finish_timm(network: nn.Module) -> nn.Module:
    """Let a network with a distillation token give its second logits while it trains."""
    if hasattr(network, "set_distilled_training"):
        network.set_distilled_training(True)
    return network


def origin_of(network: nn.Module, built: Mapping, pretrained: bool) -> dict:
    """Where the weights are from, and whether the head is new: hub weights for other classes come without one."""
    if not pretrained:
        return {"weights": "scratch"}
    config = network.pretrained_cfg
    source, theirs = config.get("hf_hub_id") or config.get("url"), config.get("num_classes")
    new = theirs != built["num_classes"]
    return {
        "weights": "hub",
        "source": source,
        "head": f"new, {theirs} -> {built['num_classes']} classes" if new else "kept",
    }


def make_preprocess(network: nn.Module, wishes: Mapping, built: Mapping) -> Preprocess:
    """The network's own data config, with what the spec wants otherwise."""
    own = dict(getattr(network, "pretrained_cfg", None) or {})
    mean = wishes.get("mean") or own.get("mean") or IMAGENET_MEAN
    std = wishes.get("std") or own.get("std") or IMAGENET_STD
    interpolation = wishes.get("interpolation") or own.get("interpolation") or "bilinear"
    if interpolation not in INTERPOLATIONS and not wishes.get("interpolation"):
        interpolation = "bilinear"
    crop_pct = wishes.get("crop_pct") or own.get("crop_pct") or 1.0
    mean, std = per_channel(mean, built["in_channels"]), per_channel(std, built["in_channels"])
    return Preprocess(built["image_size"], built["size"], mean, std, interpolation=interpolation, crop_pct=crop_pct)


def per_channel(values: Sequence[float], channels: int) -> list[float]:
    """One value a channel: those of three channels are repeated in turn for more; ValueError when they cannot be."""
    values = list(values)
    if len(values) not in (1, 3, channels):
        raise ValueError(f"preprocess: {len(values)} values for {channels} channels; expected 1 or {channels}")
    return [values[i % len(values)] for i in range(channels)]
