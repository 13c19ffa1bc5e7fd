"""Write a run's student as one file that runs without kd, with the preprocessing inside: raw images in, logits out.

    python -m kd.export run=RUN_DIR format=onnx
    python -m kd.export run=RUN_DIR format=onnx quantize=int8
    python -m kd.export run=RUN_DIR format=torch_export|executorch out=FILE

The file is run on the test split before it gets its name; one that answers differently is not left behind.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import cli
from kd.hints import ConfigError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import Tensor

    from kd.config import ExportConfig
    from kd.runs import Run

SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2", "executorch": ".pte"}
EXTRA = {"onnx": "onnx", "executorch": "executorch"}
INT8_EXTRA = {**EXTRA, "torch_export": "int8"}


def main() -> None:
    """`python -m kd.export` and `kd-export`."""
    cli.entry("export", export, __doc__)


def export(cfg: ExportConfig, say: Callable[[str], None] = print) -> Path:
    """The exported file, checked; beside it FILE.json with classes, input, parity and digest."""
    from kd import device, evaluate, runs, saved
    from kd.export import parity

    if not cfg.run:
        raise ConfigError("nothing to export: type run=RUN_DIR, or run=wandb:ENTITY/PROJECT/NAME:ALIAS")
    device.set_up("cpu", cfg.threads)
    run = runs.open_run(saved.local(cfg.run))
    target = Path(cfg.out) if cfg.out else run.folder / "export" / f"{file_stem(cfg)}{SUFFIX[cfg.format]}"
    if target.suffix != SUFFIX[cfg.format]:
        raise ConfigError(f"out={cfg.out}: format={cfg.format} writes {SUFFIX[cfg.format]} files")
    dataset = evaluate.open_data_of(run, cfg)
    classifier = saved.find(run.folder).load(cfg.trust)
    part = target.with_name(f".{target.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    try:
        file = part / target.name
        facts = describe(run, classifier, dataset, cfg)
        images = calibration(dataset, cfg) if cfg.quantize == "int8" else None
        write = backend(cfg.format).write
        with packages(f"format={cfg.format} quantize={cfg.quantize}", INT8_EXTRA.get(cfg.format, cfg.format)):
            write(classifier, file, facts, images)
        found = parity.compare(classifier, opened(file), getattr(dataset, cfg.split) or dataset.val)
        say(
            f"{cfg.format} {cfg.quantize or 'float32'}, {file.stat().st_size / 2**20:.2f} MiB: {parity.in_words(found)}"
        )
        parity.require(found, cfg)
        return keep(run, file, target, {**facts, "parity": found}, say)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def file_stem(cfg: ExportConfig) -> str:
    """The file's name without its ending."""
    return "model-int8" if cfg.quantize == "int8" else "model"


def backend(name: str) -> ModuleType:
    """The module of a format, with `write(classifier, file, facts, calibration)` and `read(file)`."""
    from kd.export.quiet import quiet

    with packages(f"format={name}", EXTRA.get(name, name)), quiet():
        return importlib.import_module(f"kd.export.{name}")


@contextmanager
def packages(what: str, extra: str) -> Iterator[None]:
    """Packages that are missing become a UserError with the extra that brings them."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} needs packages that are missing ({error}). Type: pip install 'kd[{extra}]'") from error


def opened(file: Path) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, C, h, w) -> logits (B, K) by an exported file, in the runtime that its ending names."""
    for name, suffix in SUFFIX.items():
        if file.suffix == suffix:
            return backend(name).read(file)
    raise UserError(f"{file}: expected a file that ends in {', '.join(SUFFIX.values())}")


def calibration(dataset: Any, cfg: ExportConfig) -> Tensor:
    """uint8 images (N, C, h, w) spread over the training split, which set the ranges of int8."""
    import torch

    places = torch.linspace(0, len(dataset.train) - 1, min(cfg.calibration, len(dataset.train))).long()
    return torch.cat([b.images for b in dataset.train.subset(places).batches(64)]).contiguous()


def describe(run: Run, classifier: Any, dataset: Any, cfg: ExportConfig) -> dict[str, Any]:
    """What a user of the file needs to know, and where it is from."""
    size = classifier.image_size
    return {
        "classes": list(dataset.classes),
        "input": {"name": "images", "dtype": "uint8", "shape": ["batch", dataset.channels, size, size]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(dataset.classes)]},
        "preprocessing": "inside; decode, resize the shorter side (bilinear, antialiased), cut the centre",
        "precision": cfg.quantize or "float32",
        "format": cfg.format,
        "run": run.name,
        "fingerprint": run.record["fingerprint"],
    }


def keep(run: Run, file: Path, target: Path, facts: dict[str, Any], say: Callable[[str], None]) -> Path:
    """Move the checked file to its place, its facts beside it and into the run's record."""
    import os

    from kd import files, runs

    facts = {**facts, "bytes": file.stat().st_size, "sha256": files.digest(file)}
    files.flush(file)
    files.write_json(file.with_name(f"{file.name}.json"), facts)
    os.replace(file.with_name(f"{file.name}.json"), target.with_name(f"{target.name}.json"))
    os.replace(file, target)
    with runs.lock(run, wait=True):
        short = {k: facts[k] for k in ("format", "precision", "bytes", "sha256", "parity")}
        run.update(exports={**run.record.get("exports", {}), target.name: short})
    say(f"{target} (classes and input: {target.name}.json)")
    return target
