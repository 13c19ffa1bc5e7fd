"""A saved classifier made ready to run: eager, compiled or exported; float32, bfloat16 or int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.hints import ConfigError, did_you_mean

PRECISIONS = {
    "eager": ("fp32", "bf16"),
    "compiled": ("fp32", "bf16"),
    "onnx": ("fp32", "int8"),
    "torch_export": ("fp32",),
    "executorch": ("fp32", "int8"),
}
EXPORTED = ("onnx", "torch_export", "executorch")


def pairs(modes: list[str], precisions: list[str], device: str) -> list[tuple[str, str]]:
    """Every (mode, precision) that there is among those asked for; ConfigError for words unknown and for none left."""
    for key, given, known in (("modes", modes, list(PRECISIONS)), ("precisions", precisions, ["fp32", "bf16", "int8"])):
        for word in given:
            if word not in known:
                raise ConfigError(f"{key}={word}: expected some of {', '.join(known)}.{did_you_mean(str(word), known)}")
    found = [(m, p) for m in modes for p in precisions if p in PRECISIONS[m] and (device == "cpu" or m not in EXPORTED)]
    if not found:
        offer = "; ".join(f"{m}: {', '.join(p)}" for m, p in PRECISIONS.items())
        raise ConfigError(
            f"modes={','.join(modes)} with precisions={','.join(precisions)} on {device} leaves nothing to measure. "
            f"There are {offer}. Exported files are measured on device=cpu"
        )
    return found


def ready(
    classifier: nn.Module, mode: str, precision: str, device: str, file: Path, channels: int, calibration: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, C, h, w) -> logits (B, K) in that mode; an exported mode writes `file` with its ending."""
    if mode in EXPORTED:
        return exported(classifier, mode, precision, file, channels, calibration)
    classifier = classifier.to(device).eval()
    if precision == "bf16":
        classifier.network.to(torch.bfloat16)
    if mode == "compiled":
        classifier.compile(dynamic=False)

    def ask(images: Tensor) -> Tensor:
        return classifier(images).logits

    return ask


def exported(
    classifier: nn.Module, mode: str, precision: str, file: Path, channels: int, calibration: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The same through a file of its own."""
    from kd import export

    side = classifier.image_size
    facts: dict[str, Any] = {
        "precision": precision,
        "input": {"shape": ["batch", channels, side, side]},
        "output": {"shape": ["batch", classifier.num_classes]},
    }
    file = file.with_suffix(export.SUFFIX[mode])
    export.backend(mode).write(classifier, file, facts, calibration if precision == "int8" else None)
    return export.opened(file)
