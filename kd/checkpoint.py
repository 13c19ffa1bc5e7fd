"""Checkpoints of a run: whole or not there, verified when read, the one before kept until the run is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd import files, models

TRAINING = "training.pt"  # optimiser, terms, position: what a resume needs and a finished run does not keep


class Checkpoints:
    """checkpoints/{last,best,epoch_NNN}: model.safetensors and config.json each; `last` also the training state."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def save(self, name: str, classifier: nn.Module, training: dict[str, Any] | None = None) -> None:
        """Write checkpoints/<name>; with a training state the one before stays as `previous`."""

        def fill(part: Path) -> None:
            models.save(classifier, part)
            if training is not None:
                torch.save(training, part / TRAINING)

        previous = self.folder / "previous" if training is not None else None
        files.write_folder(self.folder / name, fill, previous)

    def load_training(self, say=print) -> dict[str, Any] | None:
        """The newest training state that is whole, or None. A broken one is named, and the one before is used."""
        for name in ("last", "previous"):
            folder = self.folder / name
            if not folder.is_dir():
                continue
            broken = files.broken_files(folder)
            if not broken:
                return self._read(folder)
            say(f"warning: {folder} is broken ({', '.join(broken)}); going back to the checkpoint before it")
        return None

    def _read(self, folder: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        state = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        state["model"] = load_file(folder / "model.safetensors")
        return state

    def finish(self) -> None:
        """Drop what only a resume needs."""
        last = self.folder / "last"
        shutil.rmtree(self.folder / "previous", ignore_errors=True)
        if (last / TRAINING).exists():
            kept = [p for p in sorted(last.iterdir()) if p.name not in ("sha256.json", TRAINING)]
            files.write_json(last / "sha256.json", {p.name: files.digest(p) for p in kept})
            (last / TRAINING).unlink()
        for part in self.folder.glob(".*"):
            shutil.rmtree(part, ignore_errors=True)
