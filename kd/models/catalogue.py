"""The presets in conf/model, and what each of them is at a given size: parameters, MACs, stages."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kd.models.build import build
from kd.models.cost import count_macs, count_parameters


def model_dir() -> Path:
    """The folder of presets: conf/model in an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    conf = package / "conf" if (package / "conf").is_dir() else package.parent / "conf"
    return conf / "model"


def presets() -> dict[str, dict]:
    """{preset: what its YAML says}, by name."""
    import yaml

    files = sorted((f for d in (model_dir(), *OWN) for f in d.glob("*.yaml")), key=lambda f: natural(f.stem))
    return {f.stem: yaml.safe_load(f.read_text(encoding="utf-8")) for f in files}


OWN: list[Path] = []  # folders of a user's presets


def also(config_dir: Path | None) -> None:
    """Count the presets in a user's `config_dir`/model too."""
    OWN[:] = [config_dir / "model"] if config_dir else []


def natural(name: str) -> tuple:
    """A sorting key that puts resnet8 before resnet14."""
    digits = "".join(c if c.isdigit() else " " for c in name).split()
    return (name.rstrip("0123456789_abx"), [int(d) for d in digits], name)


def preset(name: str) -> dict:
    """What one preset's YAML says; KeyError naming the nearest ones when there is no such preset."""
    import difflib

    found = presets()
    if name not in found:
        near = difflib.get_close_matches(name, found, 3)
        raise KeyError(f"there is no preset '{name}'.{f' Did you mean {chr(44).join(near)}?' if near else ''}")
    return found[name]


def survey(names: Iterable[str] | None = None, classes: int = 100, size: int = 32) -> Iterable[dict[str, Any]]:
    """One row a preset or timm name, all presets by default: what `describe` says of it."""
    known = presets()
    for name in known if names is None else names:
        yield describe(name, known.get(name, {"name": name, "family": ""}), classes, size)


def describe(name: str, spec: dict, classes: int, size: int) -> dict[str, Any]:
    """A row: name, family, network, pixels, parameters, macs, stages, and the reason for what is missing."""
    row = {"name": name, "family": spec.get("family", "other"), "network": spec["name"], "pixels": size}
    try:
        classifier = build_light(spec, classes, size)
    except ValueError as error:
        return {**row, "parameters": None, "macs": None, "stages": {}, "reason": str(error)}
    stages = {n: s["shape"] for n, s in classifier.stages().items()}
    missing = {k: v for k, v in classifier.taps.reasons.items() if k.startswith("stage")}
    return {
        **row,
        "parameters": count_parameters(classifier),
        "macs": count_macs(classifier),
        "stages": stages,
        "reason": "; ".join(
            f"{', '.join(k for k in missing if missing[k] == why)}: {why}" for why in dict.fromkeys(missing.values())
        ),
    }


def build_light(spec: dict, classes: int, size: int):
    """The classifier without memory for its weights where that can be done, else with."""
    try:
        with torch.device("meta"):
            light = build(spec, classes, size)
            count_macs(light)
            return light
    except (ValueError, RuntimeError, NotImplementedError, TypeError):
        return build(spec, classes, size)


def search(pattern: str) -> list[dict[str, Any]]:
    """timm's networks whose name matches a shell pattern, with the tags of their hub weights."""
    import timm

    pattern = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    tags: dict[str, list[str]] = {}
    for name in timm.list_pretrained():
        bare, _, tag = name.partition(".")
        tags.setdefault(bare, []).append(tag or "default")
    return [{"name": n, "weights": tags.get(n, [])} for n in timm.list_models() if fnmatch.fnmatch(n, pattern)]
