"""Saved classifiers by what a user can name them with: a run directory, a checkpoint folder, a W&B artifact."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.hints import UserError

if TYPE_CHECKING:
    from kd.models import Classifier

PREFIX = "wandb:"  # wandb:ENTITY/PROJECT/NAME:ALIAS
RECORD = "run.json"


@dataclass
class Saved:
    """A folder with config.json and model.safetensors, and the record of the run that made it, where there is one."""

    folder: Path
    record: dict[str, Any]
    run: Path | None = None  # the run directory

    @property
    def name(self) -> str:
        """The run's name, else the folder's."""
        return self.run.name if self.run else self.folder.name

    @property
    def channels(self) -> int | None:
        """1 or 3: how the images were decoded that it learnt from; None where no record says so."""
        return self.record.get("dataset", {}).get("channels")

    def load(self, trust: bool = False) -> Classifier:
        """The classifier, in eval mode."""
        from kd import models

        return models.load(self.folder, trust=trust)


def find(reference: str | Path) -> Saved:
    """What a reference names: a run directory (its best checkpoint), a saved model's folder, or an artifact.

    Raises FileNotFoundError naming what was looked for, UserError where a run is not done.
    """
    from kd import runs

    path = local(reference)
    if (path / RECORD).is_file():
        run = runs.open_run(path)
        return Saved(run.folder / "checkpoints" / "best", run.record, run.folder)
    folder = path.parent if path.suffix == ".safetensors" else path
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{reference}: expected a run directory (with run.json), the folder of a saved model (with config.json "
                f"and model.safetensors), or wandb:ENTITY/PROJECT/NAME:ALIAS; {folder / name} is missing"
            )
    owner = folder.parent.parent if folder.parent.name == "checkpoints" else None
    record = runs.read_record(owner) if owner else None
    return Saved(folder, record or {}, owner if record else None)


def teacher_of(saved: Saved) -> Saved | None:
    """The teacher of a run, where it can be found: a run beside it, a folder of ours, or an artifact."""
    from kd import evaluate, runs

    facts = saved.record.get("teacher") or {}
    folder = evaluate.teacher_folder(runs.Run(saved.run)) if saved.run is not None and facts else None
    return find(folder) if folder else None


def is_artifact(reference: str | Path) -> bool:
    """Whether a reference names a W&B artifact."""
    return str(reference).startswith(PREFIX)


def local(reference: str | Path) -> Path:
    """The path that a reference means; an artifact is fetched, once a version, and laid out as a run directory."""
    return fetch(str(reference)) if is_artifact(reference) else Path(reference).expanduser()


def fetch(reference: str) -> Path:
    """Download a W&B artifact; gives its run directory (run.json and checkpoints/best/).

    Raises UserError for a reference that names none, or where W&B cannot be asked.
    """
    name = reference[len(PREFIX) :]
    if name.count("/") != 2 or ":" not in name:
        raise UserError(
            f"{reference}: expected wandb:ENTITY/PROJECT/NAME:ALIAS, such as wandb:me/kd/digits-resnet8:best"
        )
    import wandb

    from kd.tracking import has_key

    if not has_key():
        raise UserError(f"{reference}: W&B needs a key for this: type `wandb login`, or set WANDB_API_KEY")
    try:
        artifact = wandb.Api().artifact(name, type="model")
        return unpack(artifact, cache_dir() / "artifacts")
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError, OSError) as error:
        raise UserError(f"{reference} cannot be loaded: {str(error).splitlines()[0]}") from error


def cache_dir() -> Path:
    """Where downloads are kept: KD_CACHE, else ~/.cache/kd."""
    return Path(os.environ.get("KD_CACHE") or Path.home() / ".cache" / "kd")


def unpack(artifact: Any, cache: Path) -> Path:
    """The run directory of an artifact in the cache, by its name and digest; downloaded where it is not there yet."""
    from kd.files import write_json

    base = artifact.name.rpartition(":")[0] or artifact.name
    target = cache / f"{artifact.digest[:12]}" / base
    if (target / RECORD).is_file():
        return target
    part = target.with_name(f".{base}.{os.getpid()}")
    best = part / "checkpoints" / "best"
    best.mkdir(parents=True, exist_ok=True)
    try:
        artifact.download(root=str(best))
        inner = best / RECORD
        record = json.loads(inner.read_text(encoding="utf-8")) if inner.is_file() else bare_record(artifact, base)
        inner.unlink(missing_ok=True)
        write_json(part / RECORD, record)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def bare_record(artifact: Any, name: str) -> dict[str, Any]:
    """What can be said of an artifact that brought no record."""
    metrics = dict(artifact.metadata or {}).get("metrics", {})
    return {"name": name, "status": "done", "metrics": metrics, "config": {}, "places": {}, "teacher": None}
