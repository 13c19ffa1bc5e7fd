"""The loops that are compared, each as an endless generator of steps: textbook, ours, ours with a cached teacher, bare."""

from __future__ import annotations

import copy
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kd import compose, loop, models, prepare, teacher
from kd.data.pool import Stored
from kd.data.split import Split
from kd.device import resolve_precision
from kd.runs import Run
from kd.tracking import Tracker

STEPS = 12  # in an epoch: one epoch of answers fills the cache


def images(count: int, size: int = 32) -> tuple[np.ndarray, list[int], str]:
    """(uint8 (N, H, W, C), labels, where from): real photographs where they lie beside the checkout, else noise."""
    archive = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10_jpeg.tar.gz"
    if not archive.is_file():
        noise = np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)
        return noise, [i % 10 for i in range(count)], "random images"
    from PIL import Image

    found: list[tuple[np.ndarray, str]] = []
    with tarfile.open(archive, "r|gz") as tar:
        for place, member in enumerate(m for m in tar if m.isfile() and "/train/" in m.name):
            if place % (50_000 // count) == 0 and len(found) < count:
                pixels = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))
                found.append((pixels, member.name.split("/")[-2]))
    names = sorted({name for _, name in found})
    return np.stack([p for p, _ in found]), [names.index(name) for _, name in found], "cifar10_jpeg"


class Pair:
    """A teacher (or none) and a student at CIFAR's shape, and the loops over them."""

    def __init__(self, name: str, batch_size: int, place: Path, device: str = "cpu"):
        """`name` is TEACHER/STUDENT[:KEY=VALUE...], in the words of the configuration."""
        self.teacher, student = name.split("/")
        self.student, *self.arguments = student.split(":")
        self.batch_size, self.place, self.device = batch_size, place, device
        self.pixels, self.labels, self.source = images(batch_size * STEPS)
        self.data = self._dataset()
        cfg = self._config("off", False)
        self.frozen = None
        torch.manual_seed(0)
        if self.teacher != "none":
            self.original = self._build(cfg.teacher)
            half = resolve_precision("auto", device, self.original) == "bf16"
            self.frozen = teacher.freeze(self.original, device, half)

    def _dataset(self) -> Any:
        pixels, labels = torch.from_numpy(self.pixels), torch.tensor(self.labels)
        rows = torch.arange(len(labels))
        train = Split(Stored(pixels.permute(0, 3, 1, 2)), rows, labels, rows)
        shape = {"image_size": pixels.shape[1], "channels": 3, "mirror": True}
        names = [str(i) for i in range(10)]
        return SimpleNamespace(
            train=train, val=None, classes=names, num_classes=10, num_samples=len(labels), digest="bench", **shape
        )

    def _config(self, cache: str, compiling: bool) -> Any:
        settings = ["dataset=cifar10", "dataset.image_size=32", "augment=crop_flip", "recipe=cifar", "tracker=none"]
        settings += [f"teacher={self.teacher}", f"student={self.student}", f"recipe.batch_size={self.batch_size}"]
        settings += [f"recipe.compile={'on' if compiling else 'off'}", f"runs_dir={self.place}", "recipe.steps=100000"]
        settings += [f"student.args.{argument}" for argument in self.arguments]
        if self.teacher != "none":
            settings += ["teacher.pretrained=false", f"teacher.cache={cache}", "augment.cycle_epochs=1"]
        cfg = compose(*settings, "student.pretrained=false")
        cfg.recipe.epochs = None
        return prepare.resolve(cfg, self.data)

    def _build(self, spec: Any) -> Any:
        import dataclasses

        return models.build({**dataclasses.asdict(spec), "checkpoint": None}, 10, 32, 3, classes=self.data.classes)

    def textbook(self, workers: int = 2) -> Iterator[Any]:
        """What one finds in most places."""
        import textbook

        student = self._build(self._config("off", False).student).network
        original = copy.deepcopy(self.original.network) if self.frozen is not None else None
        data = textbook.Images(self.pixels, self.labels)
        return textbook.train(student, original, data, self.batch_size, workers, self.device)

    def ours(self, cached: bool = False, compiling: bool = False) -> Iterator[Any]:
        """kd's loop as `kd.train` assembles it, metrics and their log included; validation and checkpoints are not."""
        training = self._training("on" if cached else "off", compiling)
        folder = self.place / f"log-{cached}-{compiling}"
        folder.mkdir(parents=True, exist_ok=True)
        meter, tracker, quiet = loop.Meter(), Tracker(folder), SimpleNamespace(interval=lambda *_: None)
        training.student.train()
        for epoch in range(10**6):
            for raw in self.data.train.epoch(epoch, self.batch_size, 0, 0, self.device, training.cycle_epochs):
                loop.advance(training, raw, meter, tracker, quiet)
                yield None
            tracker.flush()
            if cached and epoch == 0:
                training.ask_teacher.flush()

    def bare(self, compiling: bool = False) -> Iterator[Any]:
        """Forward, backward, step of the same networks in the same precision on one batch that is there."""
        training = self._training("off", compiling)
        raw = next(self.data.train.epoch(0, self.batch_size, 0, device=self.device))
        batch = training.view(raw)
        training.student.train()
        while True:
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=training.autocast):
                output = training.forward(batch.images)
            said = training.ask_teacher(batch, raw) if training.ask_teacher is not None else None
            total, _ = training.loss(output, said, batch)
            total.backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
            yield None

    def _training(self, cache: str, compiling: bool) -> Any:
        """What `kd.train` would train with."""
        run = Run(self.place / "run")
        run.folder.mkdir(parents=True, exist_ok=True)
        run.record = {"environment": {"device": self.device}}
        loaded = teacher.Loaded(self.frozen, {}) if self.frozen is not None else None
        return prepare.assemble(self._config(cache, compiling), self.data, loaded, self.device, run, lambda _: None)
