"""torch.export: a .pt2 file that torch loads without kd and without timm; any batch size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.export import graph
from kd.export.quiet import quiet
from kd.models import Classifier


def write(classifier: Classifier, file: Path, facts: dict[str, Any], calibration: Tensor | None = None) -> None:
    """Write `file`; with calibration images (N, C, h, w) as an int8 graph for x86, to be compiled by inductor."""
    deployed = graph.Deployed(classifier)
    images = graph.example(classifier, facts["input"]["shape"][1])
    with quiet():
        program = graph.capture(deployed, images)
        if calibration is not None:
            program = quantize(program, images, calibration)
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(facts, ensure_ascii=False)})


def quantize(
    program: torch.export.ExportedProgram, images: Tensor, calibration: Tensor
) -> torch.export.ExportedProgram:
    """The same graph in int8, by torchao's post-training quantisation."""
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    return graph.capture(calibrated(program, quantizer, calibration), images)


def calibrated(program: torch.export.ExportedProgram, quantizer: Any, calibration: Tensor) -> torch.fx.GraphModule:
    """A quantised module: observers in, calibration images through, observers out."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(program.module(), quantizer)
    batch = program.example_inputs[0][0].shape[0]
    with torch.no_grad():
        for chunk in calibration.split(batch):
            if len(chunk) == batch:
                prepared(chunk)
    return prune(convert_pt2e(prepared))


def prune(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Drop the float32 weights that stay behind beside their int8 versions."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in [*module.named_parameters(), *module.named_buffers()] if n not in used]:
        owner, _, last = name.rpartition(".")
        delattr(module.get_submodule(owner), last)
    return module


def read(file: Path) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, C, h, w) -> logits (B, K)."""
    if _is_int8(file):
        import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401 (registers the int8 operators)
    module = torch.export.load(file).module()

    def ask(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return ask


def _is_int8(file: Path) -> bool:
    import zipfile

    with zipfile.ZipFile(file) as archive:
        name = next((n for n in archive.namelist() if n.endswith("metadata.json")), None)
        extra = json.loads(archive.read(name)) if name else {}
    return extra.get("precision") == "int8"
