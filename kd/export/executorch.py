"""ExecuTorch with XNNPACK: a .pte file for phones and boards, one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor

from kd.export import graph, torch_export
from kd.export.quiet import quiet
from kd.models import Classifier


def write(classifier: Classifier, file: Path, facts: dict[str, Any], calibration: Tensor | None = None) -> None:
    """Write `file`; with calibration images (N, C, h, w) in int8."""
    deployed = graph.Deployed(classifier)
    images = graph.example(classifier, facts["input"]["shape"][1], batch=1)
    facts["input"]["shape"][0] = facts["output"]["shape"][0] = 1
    with quiet():
        program = graph.capture(deployed, images, dynamic=False)
        if calibration is not None:
            program = graph.capture(torch_export.calibrated(program, quantizer(), calibration), images, dynamic=False)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    file.write_bytes(lowered.buffer)


def quantizer() -> Any:
    """XNNPACK's: int8, weights per channel."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnn

    return xnn.XNNPACKQuantizer().set_global(xnn.get_symmetric_quantization_config(is_per_channel=True))


def read(file: Path) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, C, h, w) -> logits (B, K), one after the other in ExecuTorch's runtime."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(file)
    method = program.load_method("forward")

    def ask(images: Tensor) -> Tensor:
        return torch.cat([method.execute([image.contiguous()])[0].clone() for image in images.split(1)])

    ask.program = program  # the method points into it
    return ask
