"""Saving a classifier as a folder of weights and settings that timm reads too, and loading it again bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd.graft import GraftedHead
from kd.models.build import IMAGENET_MEAN, IMAGENET_STD, build, finish_timm, locate
from kd.models.classifier import Classifier
from kd.models.preprocess import Preprocess

WEIGHTS, CONFIG = "model.safetensors", "config.json"
OWN = "kd.models."  # classes that a config from elsewhere may name
ALLOWED: set[str] = set()  # and those that this process's own settings name
CFG_KEYS = ("mean", "std", "interpolation", "crop_pct", "first_conv", "classifier", "pool_size", "fixed_input_size")


def save(classifier: Classifier, folder: str | Path) -> list[Path]:
    """Write `model.safetensors` and `config.json` into a folder; returns the two paths.

    The weights are the network's state dict, its keys unchanged; the config has timm's hub layout, and ours under
    `kd`. The same classifier gives the same bytes.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(classifier), str(folder / WEIGHTS), metadata={"format": "pt"})
    text = json.dumps(describe(classifier), indent=2, ensure_ascii=False, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return [folder / WEIGHTS, folder / CONFIG]


def tensors(classifier: Classifier) -> dict[str, torch.Tensor]:
    """The classifier's tensors on the CPU, contiguous, each tensor with memory of its own."""
    found, seen = {}, set()
    for name, tensor in sorted(classifier.tensors().items()):
        kept = tensor.detach().cpu().contiguous()
        found[name] = kept.clone() if kept.data_ptr() in seen else kept
        seen.add(kept.data_ptr())
    return found


def describe(classifier: Classifier) -> dict[str, Any]:
    """What `config.json` holds."""
    built, preprocess = classifier.built, classifier.preprocess
    theirs = dict(getattr(classifier.network, "pretrained_cfg", None) or {})
    config = {k: theirs[k] for k in CFG_KEYS if theirs.get(k) is not None}
    config.update(
        num_classes=built["num_classes"],
        input_size=[built["in_channels"], preprocess.size, preprocess.size],
        mean=list(preprocess.mean),
        std=list(preprocess.std),
        interpolation=preprocess.interpolation,
        crop_pct=preprocess.crop_pct,
        **({"label_names": classifier.classes} if classifier.classes else {}),
    )
    return {
        "architecture": classifier.name.partition(".")[0],
        "num_classes": built["num_classes"],
        "num_features": getattr(classifier.network, "num_features", None),
        "model_args": {k: v for k, v in built["args"].items() if k != "_target_"},
        "pretrained_cfg": config,
        "kd": {
            "spec": classifier.spec,
            "built": built,
            "classes": classifier.classes,
            "preprocess": preprocess.settings(),
            "origin": classifier.origin,
        },
    }


def load(path: str | Path, trust: bool = False) -> Classifier:
    """The classifier that `save` wrote into a folder, or beside a `model.safetensors`: the same logits, in eval mode.

    timm's own hub folders load too. `trust` lets the config name classes outside this package that no `allow` named.
    Raises FileNotFoundError for what is not there, ValueError for what does not fit or is not allowed.
    """
    folder = find_folder(path)
    config = read_config(folder / CONFIG)
    try:
        classifier = rebuild(config, trust) if "kd" in config else rebuild_foreign(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / CONFIG} does not describe a classifier: {type(error).__name__}: {error}"
        ) from error
    fill(classifier, folder / WEIGHTS)
    classifier.dry_forward()
    return classifier.eval()


def find_folder(path: str | Path) -> Path:
    """The folder of a saved classifier."""
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing: expected the folder of a saved classifier, {CONFIG} and {WEIGHTS}"
            )
    return folder


def read_config(file: Path) -> dict:
    """A JSON object; ValueError for anything else."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} does not describe a classifier: expected an object")
    return config


def rebuild(config: Mapping, trust: bool) -> Classifier:
    """An unfilled classifier with the very arguments that the saved one was built with."""
    section = config["kd"]
    spec, built = section["spec"], section["built"]
    check_trusted(spec, trust)
    check_trusted({"args": built["args"]}, trust)
    args = dict(built["args"])
    if "_target_" in args:
        kind = locate(args.pop("_target_"))
        network = kind(num_classes=built["num_classes"], in_channels=built["in_channels"], **args)
    else:
        network = rebuild_timm(spec["name"], args, built)
    preprocess = Preprocess(**section["preprocess"])
    classifier = Classifier(network, preprocess, spec, built, section.get("classes"), origin=section.get("origin"))
    if graft := built.get("graft"):
        classifier.graft(graft["stage"], GraftedHead(**graft["spec"]))
    return classifier


def rebuild_timm(name: str, args: Mapping, built: Mapping) -> nn.Module:
    """timm's network with the stem that it had."""
    from kd.models import sizing

    sizing.check_name(name)
    sizing.check_args(name, args)
    network = sizing.create(name, args, built["num_classes"], built["in_channels"])
    if built.get("stem") == "small":
        sizing.small_stem(network)
    return finish_timm(network)


def rebuild_foreign(config: Mapping) -> Classifier:
    """An unfilled classifier from a config in timm's hub layout alone."""
    theirs = config.get("pretrained_cfg") or {}
    shape = theirs.get("input_size") or [3, 224, 224]
    classes = int(config.get("num_classes") or theirs["num_classes"])
    name, args = config["architecture"], dict(config.get("model_args") or {})
    check_trusted({"args": args}, trust=False)
    built = {
        "num_classes": classes,
        "image_size": shape[-1],
        "size": shape[-1],
        "in_channels": shape[0],
        "args": args,
        "stem": "own",
    }
    network = rebuild_timm(name, args, built)
    mean, std = theirs.get("mean") or IMAGENET_MEAN, theirs.get("std") or IMAGENET_STD
    preprocess = Preprocess(
        shape[-1],
        shape[-1],
        mean,
        std,
        interpolation=theirs.get("interpolation") or "bilinear",
        crop_pct=theirs.get("crop_pct") or 1.0,
    )
    spec = {"name": name, "args": args, "preprocess": {}}
    return Classifier(network, preprocess, spec, built, theirs.get("label_names"), origin={"weights": "file"})


def allow(args: Mapping) -> None:
    """Let `load` make the class that a user's own settings name, `args._target_`: what runs it has been built by them."""
    if "_target_" in args:
        ALLOWED.add(str(args["_target_"]))


def check_trusted(value: Any, trust: bool) -> None:
    """Raises ValueError where a config names a class outside this package and was not trusted."""
    if isinstance(value, Mapping):
        target = value.get("_target_")
        known = trust or target is None or str(target).startswith(OWN) or str(target) in ALLOWED
        if not known:
            raise ValueError(
                f"the config names {target}, which is not part of kd: loading it would run code from elsewhere. "
                f"Where you know it, type trust=true (kd.predict: --trust)"
            )
        for inner in value.values():
            check_trusted(inner, trust)
    elif isinstance(value, list):
        for inner in value:
            check_trusted(inner, trust)


def fill(classifier: Classifier, file: Path) -> None:
    """Load weights that must fit exactly; ValueError for a broken file or other shapes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        classifier.load_tensors(load_file(str(file)))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors ({error}): the file is broken or was cut off"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"{file} does not fit the network that {CONFIG} beside it describes: {str(error)[:400]}"
        ) from error


__all__ = ["allow", "build", "load", "save"]
