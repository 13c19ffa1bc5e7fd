"""ONNX, run by onnxruntime: one file, any batch size; int8 as quantize-dequantize pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from kd.export import graph
from kd.export.quiet import quiet
from kd.models import Classifier

OPSET = 20
QUANTIZED = ["Conv", "MatMul", "Gemm"]  # normalisations and attention's softmax stay in float
ONE_FILE = 1900 * 2**20  # bytes of weights that protobuf still takes into the file itself


def write(classifier: Classifier, file: Path, facts: dict[str, Any], calibration: Tensor | None = None) -> None:
    """Write `file`; with calibration images (N, C, h, w) in int8."""
    deployed = graph.Deployed(classifier)
    images = graph.example(classifier, facts["input"]["shape"][1])
    if sum(p.nbytes for p in deployed.parameters()) > ONE_FILE:
        raise ValueError("format=onnx: weights above 1.9 GiB do not fit into one ONNX file. Type format=torch_export")
    with quiet():
        program = torch.onnx.export(
            graph.capture(deployed, images),
            (),
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
        program.save(str(file), external_data=False)
        if calibration is not None:
            quantize(file, calibration)
    model = onnx.load(str(file))
    onnx.helper.set_model_props(model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()})
    onnx.checker.check_model(model)
    onnx.save(model, str(file))


def quantize(file: Path, images: Tensor) -> None:
    """Replace a float32 file by its static int8 version: weights per channel, activations by the ranges of `images`."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, result = file.with_name("prepared.onnx"), file.with_name("int8.onnx")
    quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
    q.quantize_static(
        str(prepared),
        str(result),
        reader(images),
        quant_format=q.QuantFormat.QDQ,
        op_types_to_quantize=QUANTIZED,
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        calibrate_method=q.CalibrationMethod.MinMax,
    )
    prepared.unlink()
    result.replace(file)


def reader(images: Tensor, batch: int = 32) -> Any:
    """The images in onnxruntime's form for calibration."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """Batches of images, once."""

        def __init__(self):
            self.batches = iter(images.split(batch))

        def get_next(self) -> dict[str, Any] | None:
            """The next batch by the input's name, None at the end."""
            found = next(self.batches, None)
            return None if found is None else {"images": found.numpy()}

    return Reader()


def read(file: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, C, h, w) -> logits (B, K), by onnxruntime on the CPU with torch's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])
