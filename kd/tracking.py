"""Where metrics go: metrics.jsonl always, Weights & Biases unless `tracker=none`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from kd.config import Config
from kd.config import Tracker as TrackerConfig

INIT_TIMEOUT_SECONDS = 20  # W&B's own is 90: too long to wait for a dead server


class Tracker:
    """Writes each row of metrics to metrics.jsonl in the run directory. The loop never learns whether W&B listens."""

    where: str | None = None  # after closing: where things went, in a line

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self._lines: list[str] = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def resume(self, step: int) -> None:
        """Forget the rows after a step: the resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        from kd.files import write_text

        write_text(self.path, "".join(line + "\n" for line in kept))

    def log(self, values: dict[str, float], step: int) -> None:
        """One row of metrics at a step (the number of steps done)."""
        self._lines.append(json.dumps({"step": step, **values}))

    def flush(self) -> None:
        """Put the rows so far on the disk."""
        if self._lines:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in self._lines))
            self._lines.clear()

    def summary(self, values: dict[str, Any]) -> None:
        """Final figures of the run."""

    def artifact(self, name: str, kind: str, folder: Path, metadata: dict[str, Any], aliases: list[str]) -> None:
        """A folder of files as a versioned artifact."""

    def use(self, name: str) -> None:
        """An artifact that this run was made from."""

    def image(self, name: str, path: Path) -> None:
        """A picture."""

    def close(self, exit_code: int = 0) -> None:
        """Write what is left and finish."""
        self.flush()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a torn last line


class WandbTracker(Tracker):
    """The same rows to Weights & Biases: online with a key, offline in the run directory without one."""

    def __init__(self, folder: Path, settings: TrackerConfig, name: str, run_id: str, config: dict[str, Any], tags: list[str]):
        super().__init__(folder)
        import wandb

        self.folder = folder
        self.mode = settings.mode if settings.mode != "auto" else ("online" if has_key() else "offline")
        data = folder / "wandb" / "data"
        os.environ.setdefault("WANDB_SILENT", "true")
        data.mkdir(parents=True, exist_ok=True)
        self._own_data = "WANDB_DATA_DIR" not in os.environ or os.environ.get("KD_WANDB_DATA_DIR") == os.environ["WANDB_DATA_DIR"]
        if self._own_data:  # staged artifact files stay with the run, so that it can be synced later
            os.environ["WANDB_DATA_DIR"] = os.environ["KD_WANDB_DATA_DIR"] = str(data.resolve())
        arguments = {
            "project": settings.project,
            "entity": settings.entity,
            "group": settings.group,
            "tags": [*settings.tags, *tags],
            "name": name,
            "id": run_id,
            "resume": "allow",
            "dir": str(folder),
            "config": config,
            "reinit": "finish_previous",
        }
        self.run = self._start(wandb, arguments)

    def _start(self, wandb, arguments: dict[str, Any]):
        quiet = {"init_timeout": INIT_TIMEOUT_SECONDS, "console": "off", "silent": True}
        try:
            return wandb.init(mode=self.mode, settings=wandb.Settings(**quiet), **arguments)
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            if self.mode == "offline":
                raise
            print(f"warning: W&B does not answer ({str(error).splitlines()[0]}); this run is logged offline and can be synced later", flush=True)
            self.mode = "offline"
            return wandb.init(mode="offline", settings=wandb.Settings(**quiet), **arguments)

    def log(self, values: dict[str, float], step: int) -> None:
        super().log(values, step)
        self.run.log(values, step=step)

    def summary(self, values: dict[str, Any]) -> None:
        self.run.summary.update(values)

    def artifact(self, name: str, kind: str, folder: Path, metadata: dict[str, Any], aliases: list[str]) -> None:
        import wandb

        artifact = wandb.Artifact(name, type=kind, metadata=metadata)
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact, aliases=aliases)

    def use(self, name: str) -> None:
        if self.mode == "online":
            self.run.use_artifact(name)

    def image(self, name: str, path: Path) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def close(self, exit_code: int = 0) -> None:
        super().close()
        self.run.finish(exit_code=exit_code)
        if self.mode == "online":
            self.where = f"W&B: {self.run.url}"
        elif segments := sorted((self.folder / "wandb").glob("offline-run-*")):
            self.where = f"W&B: logged offline; to send it: wandb sync {segments[-1]}"


def has_key() -> bool:
    """Whether W&B would find an API key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    return bool(wandb.api.api_key)


def open_tracker(run: Any, cfg: Config) -> Tracker:
    """The tracker that `tracker=` names, for a run; every sitting of a run has the same W&B id."""
    if cfg.tracker.name == "none":
        return Tracker(run.folder)
    sitting = hashlib.sha256(f"{run.record['fingerprint']} {run.record['created']}".encode()).hexdigest()[:12]
    tags = [cfg.dataset.name, cfg.student.name, cfg.teacher.name]
    settings = dataclasses.replace(cfg.tracker, group=cfg.tracker.group or cfg.sweep_name)
    return WandbTracker(run.folder, settings, run.name, sitting, run.record["config"], tags)


def publish(tracker: Tracker, run: Any, teacher: Any) -> None:
    """Final figures, the best student as an artifact, and the teacher it came from."""
    record = run.record
    tracker.summary({**record["metrics"], **{f"efficiency/{n}": v for n, v in record["efficiency"].items()}})
    facts = {"fingerprint": record["fingerprint"], "metrics": record["metrics"], "classes": record["dataset"]["classes"]}
    if teacher is not None and teacher.weights is not None:
        name = artifact_name("teacher", record["teacher"].get("run") or record["teacher"]["file"])
        tracker.artifact(name, "model", teacher.weights.parent, {"role": "teacher", **teacher.source}, ["latest"])
        tracker.use(f"{name}:latest")
    tracker.artifact(artifact_name("student", run.name), "model", run.folder / "checkpoints" / "best", {"role": "student", **facts}, ["best", "latest"])


def artifact_name(role: str, name: str) -> str:
    """A name that W&B takes."""
    return re.sub(r"[^\w.-]+", "_", f"{role}-{name}")[:128]
