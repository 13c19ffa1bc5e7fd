"""A run is a directory, and run.json is its truth: identity, place, record and lock."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd import files, saved
from kd.config import Config
from kd.hints import UserError

FORMAT = 1  # of run.json
# Settings that change where or how fast a run goes, never what comes out of it
UNHASHED = (
    "runs_dir",
    "fresh",
    "dry",
    "device",
    "threads",
    "workers",
    "baseline",
    "objective",
    "give_up",
    "sweep_name",
    "tracker",
)
UNHASHED_DATASET = ("root", "download", "memory_gib")
TRAINING_OF_TEACHER = ("seed", "train_fraction", "recipe", "augment")


def identity(cfg: Config, data_digest: str) -> dict[str, Any]:
    """What makes this run this run: the resolved settings, inapplicable ones dropped, files by their content."""
    settings = asdict(cfg)
    for key in UNHASHED:
        settings.pop(key)
    for key in UNHASHED_DATASET:
        settings["dataset"].pop(key)
    settings["dataset"]["digest"] = data_digest
    settings["student"] = _model(settings["student"])
    settings["teacher"] = _teacher(settings["teacher"])
    settings["recipe"] = _recipe(settings["recipe"])
    if settings["teacher"]["name"] == "none":
        settings["augment"].pop("teacher_view")
    return settings


def _model(settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("checkpoint") not in (None, "auto", "hub"):
        settings["checkpoint"] = weights_digest(settings["checkpoint"])
    return settings


def _teacher(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["name"] == "none":
        return {"name": "none"}
    settings.pop("cache"), settings.pop("cache_gib")
    if not settings["classes"]:
        settings.pop("classes")
    if settings["name"] == "ensemble":
        settings["members"] = [_member(m) for m in settings["members"]]
    else:
        settings.pop("members"), settings.pop("average")
    if settings["checkpoint"] == "auto":
        settings["recipe"] = _recipe(settings["recipe"])
        settings["augment"].pop("teacher_view")
    else:
        for key in TRAINING_OF_TEACHER:
            settings.pop(key)
    return _model(settings)


def _member(member: str) -> str:
    """A member of an ensemble, paths replaced by what lies there."""
    name, _, path = member.partition(":")
    if Path(member).expanduser().exists():
        return weights_digest(member)
    return f"{name}:{weights_digest(path)}" if path else member


def _recipe(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["schedule"] != "multistep":
        settings.pop("milestones"), settings.pop("decay")
    return settings


def weights_digest(path: str) -> str:
    """The content of a weights file, or of the weights in a run directory or an artifact."""
    return files.digest(find_weights(Path(path)))


def find_weights(path: Path, epoch: int | None = None) -> Path:
    """The weights file behind a file, a checkpoint folder or a run directory; FileNotFoundError says what was looked for."""
    kept = f"epoch_{epoch:03d}" if epoch is not None else "best"
    path = saved.local(path)
    for candidate in (path, path / "model.safetensors", path / "checkpoints" / kept / "model.safetensors"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no weights at {path}: expected a .safetensors or .pt file, a checkpoint folder with model.safetensors, "
        f"or a run directory with checkpoints/{kept}/"
    )


def fingerprint(settings: dict[str, Any]) -> str:
    """sha256 of an identity, hexadecimal."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def run_name(cfg: Config, mark: str) -> str:
    """Readable names first, a short hash last: digits-resnet18-kd-vit_base_patch16_224-s0-1a2b3c4d."""
    terms = "+".join(n for n in cfg.loss if n != "ce") or "ce"
    how = ["alone"] if cfg.teacher.name == "none" else [terms, cfg.teacher.name]
    parts = [cfg.dataset.name, cfg.student.name, *how, f"s{cfg.seed}", mark[:8]]
    return "-".join(re.sub(r"[^\w.+]+", "_", p) for p in parts)


class Run:
    """A run's directory and its record, which is written through to run.json."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.record: dict[str, Any] = read_record(folder) or {}

    def __repr__(self) -> str:
        top1 = self.record.get("metrics", {}).get("test/top1")
        return f"Run({str(self.folder)!r}, {self.status}" + (f", test/top1={top1:.4f})" if top1 is not None else ")")

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.folder.name

    @property
    def status(self) -> str | None:
        """running, done, failed, diverged or interrupted; None before the first line of its record."""
        return self.record.get("status")

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return self.status == "done"

    def update(self, **values: Any) -> None:
        """Merge values into the record and write it."""
        self.record.update(values)
        files.write_json(self.folder / "run.json", finite(self.record))

    def set_aside(self) -> Path | None:
        """Move the directory out of the way, to runs_dir/.old/NAME-N; None where there was nothing."""
        if not self.folder.exists():
            return None
        old = self.folder.parent / ".old"
        old.mkdir(exist_ok=True)
        target = next(t for n in itertools.count(1) if not (t := old / f"{self.name}-{n}").exists())
        shutil.move(self.folder, target)
        self.record = {}
        return target


def finite(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder, or None where there is none that can be read."""
    try:
        return json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def open_run(path: str | Path) -> Run:
    """A finished run's directory, or a W&B artifact's; errors say what is there instead."""
    run = Run(saved.local(path))
    if not run.record:
        near = (
            sorted(p.parent.name for p in Path(path).parent.glob("*/run.json"))[:5]
            if Path(path).parent.is_dir()
            else []
        )
        raise FileNotFoundError(
            f"run={path}: there is no run.json." + (f" Runs beside it: {', '.join(near)}" if near else "")
        )
    if not run.done:
        raise UserError(f"run={path} is {run.status}, not done. The same kd.train command goes on with it.")
    return run


def records(runs_dir: str | Path) -> list[Run]:
    """Every run below a runs_dir, in the order of their names."""
    return [Run(p.parent) for p in sorted(Path(runs_dir).glob("*/run.json"))]


def place(cfg: Config, mark: str) -> Run:
    """The run's directory under runs_dir."""
    return Run(Path(cfg.runs_dir) / run_name(cfg, mark))


def prepare(folder: Path) -> None:
    """Make a folder that can be written to; UserError names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Type runs_dir=ANOTHER_FOLDER") from error


@contextmanager
def lock(run: Run, wait: bool = False, say=print) -> Iterator[None]:
    """Hold the run, so that no second process works on it; an OS lock, which dies with its process.

    With `wait` a second process stands by until the first is done; otherwise UserError names the first.
    """
    from filelock import FileLock, Timeout

    folder = run.folder.parent / ".locks"
    prepare(folder)
    holder, guard = folder / f"{run.name}.json", FileLock(folder / f"{run.name}.lock", timeout=0)
    try:
        guard.acquire()
    except Timeout:
        owner = _holder(holder)
        if not wait:
            raise UserError(f"{run.folder} is being worked on by {owner}. Wait for it, or stop it first.") from None
        say(f"waiting for {owner}, which is training {run.name}")
        guard.acquire(timeout=-1)
    try:
        files.write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": now()})
        run.record = read_record(run.folder) or {}
        yield
    finally:
        holder.unlink(missing_ok=True)
        guard.release()


def _holder(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError):
        return "another process"


def now() -> str:
    """The time, ISO 8601 with zone, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def environment(device: str) -> dict[str, Any]:
    """Versions, machine and code that a run had; recorded, never hashed."""
    import torch

    from kd import __version__

    return {
        "kd": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {n: v for n, v in _loaded_versions().items() if v},
        "device": device,
        "device_name": torch.cuda.get_device_name() if device.startswith("cuda") else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }


def _loaded_versions() -> dict[str, str | None]:
    names = ("timm", "torchvision", "numpy", "wandb", "hydra", "omegaconf", "torchmetrics")
    return {n: getattr(sys.modules.get(n), "__version__", None) for n in names}


def processor() -> str:
    """The CPU's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"model name\s*:\s*(.+)", text).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or None
