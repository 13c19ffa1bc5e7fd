"""Where metrics go: metrics.jsonl always, Weights & Biases unless `tracker=none`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kd.config import Config
from kd.config import Tracker as TrackerConfig

INIT_TIMEOUT_SECONDS = 20  # W&B's own is 90: too long to wait for a dead server
FINISH_TIMEOUT_SECONDS = 60  # for what is still to be sent when a run ends; the rest can be synced later


class Tracker:
    """Writes each row of metrics to metrics.jsonl in the run directory. The loop never learns whether W&B listens."""

    where: str | None = None  # after closing: where things went, in a line
    rich = False  # whether pictures, tables and artifacts go anywhere

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

    def artifact(
        self, name: str, files: dict[str, Path | str], metadata: dict[str, Any], *, about: str = "", used: bool = False
    ) -> None:
        """A model as a versioned artifact, `files` by name: path or text. `used`: the run was made from it."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; uint8 tensors (C, h, w) in it are shown as images."""

    def image(self, name: str, path: Path) -> None:
        """A picture."""

    def page(self, name: str, path: Path) -> None:
        """A page of HTML."""

    def close(self, exit_code: int = 0) -> None:
        """Write what is left and finish."""
        self.flush()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a torn last line


class WandbTracker(Tracker):
    """The same rows to Weights & Biases: online with a key, offline in the run directory without one.

    Training never waits for W&B nor ends because of it: what fails is said once, and the rest goes to metrics.jsonl.
    """

    rich = True

    def __init__(
        self, folder: Path, settings: TrackerConfig, name: str, run_id: str, config: dict[str, Any], tags: list[str]
    ):
        super().__init__(folder)
        self.folder, self.mode, self.broken = folder, choose_mode(settings.mode), False
        os.environ.setdefault("WANDB_SILENT", "true")
        self._stage_here(folder / "wandb" / "data")
        arguments = {
            "project": settings.project,
            "entity": settings.entity,
            "group": settings.group,
            "tags": [*settings.tags, *dict.fromkeys(tags)],
            "name": name,
            "id": run_id,
            "resume": "allow",
            "dir": str(folder),
            "config": config,
            "reinit": "finish_previous",
        }
        self.run = self._start(arguments)

    def _stage_here(self, data: Path) -> None:
        """W&B keeps files it has not sent with the run, so that it can be synced later; unless the user says where."""
        self._before = os.environ.get("WANDB_DATA_DIR")
        if self._before is None:
            data.mkdir(parents=True, exist_ok=True)
            os.environ["WANDB_DATA_DIR"] = str(data.resolve())

    def _start(self, arguments: dict[str, Any]) -> Any:
        import wandb

        try:
            return wandb.init(mode=self.mode, settings=_settings(), **arguments)
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            if self.mode == "offline":
                raise
            print(f"warning: W&B does not answer ({_first_line(error)}); this run is logged offline", flush=True)
            self.mode = "offline"
            wandb.teardown()  # else the service holds on to the run's id
            return wandb.init(mode="offline", settings=_settings(), **arguments)

    def _safely(self, call: Callable[[], Any]) -> None:
        """Do something with W&B; the first failure is said and ends the conversation, never the training."""
        if self.broken:
            return
        try:
            call()
        except Exception as error:  # whatever W&B raises: the run matters more
            self.broken = True
            print(f"warning: W&B failed ({_first_line(error)}); metrics still go to {self.path}", flush=True)

    def log(self, values: dict[str, float], step: int) -> None:
        """One row of metrics at a step."""
        super().log(values, step)
        self._safely(lambda: self.run.log(values, step=step))

    def summary(self, values: dict[str, Any]) -> None:
        """Final figures of the run."""
        self._safely(lambda: self.run.summary.update(values))

    def artifact(
        self, name: str, files: dict[str, Path | str], metadata: dict[str, Any], *, about: str = "", used: bool = False
    ) -> None:
        """A model as a versioned artifact."""
        self._safely(lambda: self._log_artifact(name, files, metadata, about, used))

    def _log_artifact(
        self, name: str, files: dict[str, Path | str], metadata: dict[str, Any], about: str, used: bool
    ) -> None:
        import wandb

        artifact = wandb.Artifact(artifact_name(name), type="model", metadata=metadata, description=about or None)
        for inside, content in files.items():
            if isinstance(content, Path):
                artifact.add_file(str(content), name=inside)
            else:
                with artifact.new_file(inside, mode="w", encoding="utf-8") as file:
                    file.write(content)
        if not used:
            self.run.log_artifact(artifact, aliases=["best", "latest"])
        elif hasattr(self.run, "_log_artifact"):  # use_artifact is refused offline; equal content is the same version
            self.run._log_artifact(artifact, aliases=["latest"], is_user_created=True, use_after_commit=True)
        elif self.mode == "online":
            self.run.use_artifact(artifact, aliases=["latest"])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, with images."""
        self._safely(lambda: self.run.log({name: _as_table(columns, rows)}))

    def image(self, name: str, path: Path) -> None:
        """A picture."""
        import wandb

        self._safely(lambda: self.run.log({name: wandb.Image(str(path))}))

    def page(self, name: str, path: Path) -> None:
        """A page of HTML."""
        import wandb

        self._safely(lambda: self.run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)}))

    def close(self, exit_code: int = 0) -> None:
        """Send or write what is left, and say where it went."""
        super().close()
        complete = self._finish(exit_code)
        if self._before is None:
            os.environ.pop("WANDB_DATA_DIR", None)
        segments = sorted((self.folder / "wandb").glob("offline-run-*" if self.mode == "offline" else "run-*"))
        places = " ".join(str(s) for s in segments)
        if self.mode == "offline":
            self.where = f"W&B: logged offline; to send it: wandb sync {places}"
        elif complete:
            self.where = f"W&B: {self.run.url}"
        else:
            self.where = f"W&B: not everything could be sent; to send the rest: wandb sync --include-online {places}"

    def _finish(self, exit_code: int) -> bool:
        """Whether everything was sent, or written where the mode is offline."""
        try:
            self.run.finish(exit_code=exit_code)
        except Exception as error:  # a timeout, or whatever W&B raises: the run is done all the same
            print(f"warning: W&B: {_first_line(error) or type(error).__name__}", flush=True)
            return False
        return not self.broken


def _settings() -> Any:
    """W&B's, quiet, with an end to its patience where this version knows one."""
    import wandb

    wanted = {
        "init_timeout": INIT_TIMEOUT_SECONDS,
        "finish_timeout": float(os.environ.get("KD_WANDB_FINISH_SECONDS", FINISH_TIMEOUT_SECONDS)),
        "finish_timeout_raises": True,
        "console": "off",
        "silent": True,
    }
    known = getattr(wandb.Settings, "model_fields", wanted)
    return wandb.Settings(**{k: v for k, v in wanted.items() if k in known})


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _as_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb
    from torch import Tensor

    def shown(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return wandb.Image(value.permute(1, 2, 0).squeeze(-1).cpu().numpy())  # (h, w) or (h, w, C)

    return wandb.Table(columns=list(columns), data=[[shown(v) for v in row] for row in rows])


def choose_mode(wanted: str) -> str:
    """online or offline: what was asked for, else what WANDB_MODE says, else online where there is a key."""
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE") in ("online", "offline"):
        return os.environ["WANDB_MODE"]
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B would find an API key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    files = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]  # where `wandb login` writes
    for file in (Path(f) for f in files if f):
        try:
            if file.is_file():
                return netrc.netrc(file).authenticators(urlparse(server_address()).netloc) is not None
        except (netrc.NetrcParseError, OSError) as error:
            print(f"warning: {file} cannot be read ({error}); W&B is used offline", flush=True)
    return False


def server_address() -> str:
    """W&B's, or the one that the environment or `wandb login --host` set."""
    import configparser

    settings = configparser.ConfigParser()
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    settings.read(folder / "settings")
    found = settings.get("default", "base_url", fallback=None)
    return os.environ.get("WANDB_BASE_URL") or found or "https://api.wandb.ai"


def open_tracker(run: Any, cfg: Config) -> Tracker:
    """The tracker that `tracker=` names, for a run; every sitting of a run has the same W&B id."""
    if cfg.tracker.name == "none":
        return Tracker(run.folder)
    sitting = hashlib.sha256(f"{run.record['fingerprint']} {run.record['created']}".encode()).hexdigest()[:12]
    tags = [cfg.dataset.name, cfg.student.name, cfg.teacher.name]
    settings = dataclasses.replace(cfg.tracker, group=cfg.tracker.group or cfg.sweep_name)
    config = {
        **run.record["config"],
        "environment": run.record["environment"],
        "fingerprint": run.record["fingerprint"],
    }
    return WandbTracker(run.folder, settings, run.name, sitting, config, tags)


def publish(tracker: Tracker, run: Any, teacher: Any, predictions: Callable[[], Any] | None = None) -> None:
    """Final figures, teacher and best student as artifacts, and predictions.

    `predictions` gives (columns, rows) of the table of test images; it is asked only where a table goes anywhere.
    """
    record, best = run.record, run.folder / "checkpoints" / "best"
    tracker.summary({**record["metrics"], **{f"efficiency/{n}": v for n, v in record["efficiency"].items()}})
    if not tracker.rich:
        return
    if teacher is not None and teacher.weights is not None:
        publish_teacher(tracker, run, teacher)
    metadata = {"role": "student", **facts_of(record, best)}
    tracker.artifact(run.name, model_files(best, record), metadata, about=read_card(best))
    if predictions is not None and (found := predictions()):
        tracker.table("test/predictions", *found)


def publish_teacher(tracker: Tracker, run: Any, teacher: Any) -> None:
    """The teacher's weights as an artifact that the run used: its own run's, else one named by its digest."""
    from kd import runs

    folder, facts = teacher.weights.parent, {k: v for k, v in teacher.source.items() if k != "metrics"}
    owner = run.folder.parent / teacher.source["run"] if teacher.source.get("run") else None
    record = runs.read_record(owner) if owner and folder.name == "best" else None
    if record and record.get("metrics"):
        files = model_files(folder, record)
        metadata = {"role": "teacher", **facts, **facts_of(record, folder)}
        tracker.artifact(owner.name, files, metadata, about=read_card(folder), used=True)
        return
    sha = teacher.source.get("sha256") or runs.files.digest(teacher.weights)
    kept = [teacher.weights] if not (folder / "config.json").is_file() else [teacher.weights, folder / "config.json"]
    name = f"teacher-{run.record['teacher'].get('name', 'model')}-{sha[:8]}"
    tracker.artifact(name, {p.name: p for p in kept}, {"role": "teacher", **facts, "sha256": sha}, used=True)


def model_files(folder: Path, record: dict[str, Any]) -> dict[str, Path | str]:
    """What an artifact holds: weights, settings, and the record as it stays after the run's end."""
    files: dict[str, Path | str] = {n: folder / n for n in ("config.json", "model.safetensors")}
    return {**files, "run.json": json.dumps(portable(record), indent=2, ensure_ascii=False, sort_keys=True) + "\n"}


PORTABLE = (
    *("format", "name", "fingerprint", "config", "dataset", "metrics", "teacher", "loss", "initialised_from"),
    *("precision", "steps", "parameters", "environment", "efficiency"),
)


def portable(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it travels with the weights: the same whenever it is made after the run's end."""
    from kd.runs import finite

    kept = {k: record[k] for k in PORTABLE if k in record}
    return finite({**kept, "status": "done", "places": {}})


def facts_of(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An artifact's metadata."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "fingerprint": record["fingerprint"],
        "metrics": record["metrics"],
        "model": record["config"]["student"]["name"],
        "dataset": record["config"]["dataset"]["name"],
        "classes": record["dataset"]["classes"],
        "preprocess": config["kd"]["preprocess"],
        "teacher": (record.get("teacher") or {}).get("run"),
    }


def read_card(folder: Path) -> str:
    """The model card beside the weights, or nothing."""
    card = folder / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def artifact_name(name: str) -> str:
    """A name that W&B takes."""
    return re.sub(r"[^\w.-]+", "_", name)[:128]
