"""What reaches metrics.jsonl and W&B, offline and online, whole and interrupted."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
import wandb_file
import wandb_server

from kd import files, runs, tracking
from kd.config import Tracker as TrackerConfig
from kd.hints import UserError

KEY = "0" * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Teacher, student alone and distilled student, logged offline."""
    home = tmp_path_factory.mktemp("wandb_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_DATA_DIR", raising=False)
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(home))
        yield small_runs.make(tmp_path_factory.mktemp("runs"), "tracker=wandb", "tracker.mode=offline")
        assert "WANDB_DATA_DIR" not in os.environ


def logged(run: runs.Run) -> wandb_file.Logged:
    return wandb_file.read(*sorted(run.folder.glob("wandb/offline-run-*/*.wandb")))


def rows_of(run: runs.Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("role", ["teacher", "alone", "distilled"])
def test_every_metric_of_metrics_jsonl_is_in_the_offline_run(made, role):
    by_step: dict[int, dict] = {}
    for row in logged(made[role]).history:
        by_step.setdefault(row["_step"], {}).update(row)
    rows = rows_of(made[role])
    assert len(rows) >= 40
    for row in rows:
        for name, value in row.items():
            if name != "step":
                assert by_step[row["step"]][name] == pytest.approx(value, rel=1e-12), (name, row["step"])
    names = {n for row in rows for n in row}
    assert {"train/loss", "train/loss/ce", "train/lr", "val/top1", "images_per_s", "time/step_ms"} <= names


def test_config_name_tags_and_exit_code(made):
    run, found = made["distilled"], logged(made["distilled"])
    config = found.config
    for key, value in run.record["config"].items():
        assert config[key] == value
    assert config["fingerprint"] == run.record["fingerprint"]
    assert found.run.display_name == run.name and found.run.project == "kd"
    assert {"digits", "resnet8", "resnet14"} <= set(found.run.tags)
    assert found.exit_code == 0


def test_final_figures_are_the_records(made):
    summary, record = logged(made["distilled"]).summary, made["distilled"].record
    for name, value in record["metrics"].items():
        assert summary[name] == pytest.approx(value)
    assert summary["efficiency/parameters"] == record["efficiency"]["parameters"]


def contents(artifact) -> dict[str, tuple[str, int]]:
    return {c.path: (c.digest, c.size) for c in artifact.manifest.contents}


def md5(path: Path) -> str:
    return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()


def test_the_student_is_an_artifact_with_its_files_digests_and_metadata(made):
    run, best = made["distilled"], made["distilled"].folder / "checkpoints" / "best"
    artifact = logged(run).artifact(run.name)
    found = contents(artifact)
    assert set(found) == {"config.json", "model.safetensors", "run.json"}
    for name in ("config.json", "model.safetensors"):
        assert found[name] == (md5(best / name), (best / name).stat().st_size)
    metadata = json.loads(artifact.metadata)
    assert artifact.type == "model" and set(artifact.aliases) == {"best", "latest"}
    assert metadata["fingerprint"] == run.record["fingerprint"]
    assert metadata["metrics"]["test/top1"] == run.record["metrics"]["test/top1"]
    assert metadata["classes"] == run.record["dataset"]["classes"]
    assert metadata["preprocess"]["image_size"] == 16 and metadata["role"] == "student"
    assert artifact.description.startswith("---\nlibrary_name: kd")
    assert not artifact.use_after_commit


def test_the_student_was_made_from_the_very_version_that_the_teachers_run_logged(made):
    theirs = logged(made["teacher"]).artifact(made["teacher"].name)
    ours = logged(made["distilled"]).artifact(made["teacher"].name)
    assert ours.digest == theirs.digest
    assert ours.use_after_commit and not theirs.use_after_commit
    assert json.loads(ours.metadata)["role"] == "teacher"


def test_staged_files_lie_with_the_run_so_that_it_can_be_synced(made):
    run = made["distilled"]
    artifact = logged(run).artifact(run.name)
    for content in artifact.manifest.contents:
        assert Path(content.local_path).is_file()
        assert run.folder.resolve() in Path(content.local_path).resolve().parents


def test_the_record_says_how_to_send_it(made):
    where = made["distilled"].record["tracker"]
    assert "wandb sync" in where
    assert Path(where.split()[-1]).is_dir()


def test_predictions_are_a_table_with_images(made):
    run = made["distilled"]
    path = next(row["test/predictions.path"] for row in logged(run).history if "test/predictions.path" in row)
    file = next(run.folder.glob(f"wandb/offline-run-*/files/{path}"))
    content = json.loads(file.read_text())
    assert content["columns"] == ["image", "class", "student", "student_probability", "teacher", "teacher_probability"]
    assert len(content["data"]) == 100
    wrong = [row[1] != row[2] for row in content["data"]]
    assert wrong == sorted(wrong, reverse=True)  # the mistakes first
    (inside,) = [a for a in logged(run).artifacts.values() if "predictions" in a.name]
    pictures = {c.path: c.local_path for c in inside.manifest.contents if c.path.endswith(".png")}
    whole = next(c.local_path for c in inside.manifest.contents if c.path.endswith(".table.json"))
    assert {row[0]["path"] for row in json.loads(Path(whole).read_text())["data"]} == set(pictures)
    assert all(Path(p).is_file() for p in pictures.values())


def test_a_resumed_run_has_one_id_and_no_row_twice(tmp_path):
    settings = TrackerConfig(mode="offline")
    for sitting in ((1, 2, 3, 4), (3, 4, 5)):
        with tracking.WandbTracker(tmp_path, settings, "n", "abc123", {}, []) as tracker:
            tracker.resume(sitting[0] - 1)
            for step in sitting:
                tracker.log({"train/loss": 1 / step}, step)
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    segments = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({s.name for s in segments}) == 1
    assert tracker.where.count("offline-run-") == len({s.parent for s in segments})


def test_a_torn_last_line_is_forgotten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 2}\n{"step": 2, "x"')
    tracking.Tracker(tmp_path).resume(9)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": 2}\n'


@pytest.mark.parametrize(
    ("wanted", "environment", "key", "mode"),
    [
        ("auto", None, False, "offline"),
        ("auto", None, True, "online"),
        ("auto", "offline", True, "offline"),
        ("online", "offline", False, "online"),
        ("offline", "online", True, "offline"),
    ],
)
def test_which_mode(monkeypatch, wanted, environment, key, mode):
    monkeypatch.setattr(tracking, "has_key", lambda: key)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert tracking.choose_mode(wanted) == mode


@pytest.mark.parametrize(
    ("host", "content", "found"),
    [
        (None, "machine api.wandb.ai login user password " + KEY, True),
        (None, "machine elsewhere login user password " + KEY, False),
        ("https://wandb.example.org", "machine wandb.example.org login user password " + KEY, True),
        ("https://wandb.example.org", "machine api.wandb.ai login user password " + KEY, False),
        (None, None, False),
        (None, "machine ((", False),
    ],
)
def test_the_key_that_wandb_login_left(monkeypatch, tmp_path, host, content, found):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    if content:
        (tmp_path / "keys").write_text(content)
        (tmp_path / "keys").chmod(0o600)
    if host:
        (tmp_path / "settings").write_text(f"[default]\nbase_url = {host}\n")
    assert tracking.has_key() is found
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert tracking.has_key()


def test_no_tracker_writes_metrics_and_nothing_else(tmp_path):
    with tracking.Tracker(tmp_path) as tracker:
        tracker.log({"x": 1.0}, 1)
        tracker.table("t", ["a"], [[1]])
        tracker.artifact("a", {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert tracker.where is None and not tracker.rich


def test_names_that_wandb_takes():
    assert tracking.artifact_name("a/b c:d" + "x" * 200) == ("a_b_c_d" + "x" * 200)[:128]


# ------------------------------------------------------------------------------------------- with a server


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own: W&B reads its environment once."""
    there = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**there, **environment}, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


ONLINE = """
import sys
from pathlib import Path
from kd import tracking
from kd.config import Tracker
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
with tracking.WandbTracker(folder, Tracker(mode="online"), "name", "abc123", {"lr": 0.5}, ["digits"]) as tracker:
    for step in range(1, 31):
        tracker.log({"train/loss": 1 / step}, step)
        if step == 10 and len(sys.argv) > 2:
            import urllib.request, time
            time.sleep(float(sys.argv[2]))
            urllib.request.urlopen(sys.argv[3])
    tracker.flush()
    tracker.summary({"test/top1": 0.75})
print("where:", tracker.where)
"""


def environment(server: wandb_server.Server, tmp_path: Path) -> dict[str, str]:
    home = {n: str(tmp_path / "home") for n in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME")}
    return {**home, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_SILENT": "true", "NO_PROXY": "127.0.0.1"}


def test_online_every_row_arrives(tmp_path):
    with wandb_server.running() as server:
        done = python(ONLINE, tmp_path / "run", **environment(server, tmp_path))
        assert done.returncode == 0, done.stderr
        rows = {row["_step"]: row["train/loss"] for row in server.rows}
    assert rows == pytest.approx({step: 1 / step for step in range(1, 31)})
    assert server.summary["test/top1"] == 0.75 and server.complete == [True]
    assert server.config["lr"]["value"] == 0.5
    assert f"where: W&B: {server.url}" in done.stdout


@pytest.mark.slow
def test_a_server_that_dies_in_mid_run_costs_no_training(tmp_path):
    with wandb_server.running() as server:
        original = wandb_server.Handler.do_GET

        def die(handler):
            handler.server.dead = handler.server.dead or handler.path == "/die"
            original(handler)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wandb_server.Handler, "do_GET", die)
            extra = {"KD_WANDB_FINISH_SECONDS": "3"}
            done = python(ONLINE, tmp_path / "run", 1, f"{server.url}/die", **environment(server, tmp_path), **extra)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))
        assert "to send the rest: wandb sync --include-online" in done.stdout
        sync(server, done.stdout.split("wandb sync ")[1].split(), tmp_path)
        assert {row["_step"] for row in server.rows} == set(range(1, 31))


def sync(server: wandb_server.Server, segments: list[str], tmp_path: Path) -> None:
    """What the run's last line says to type."""
    server.dead = False
    command = [str(Path(sys.executable).parent / "wandb"), "sync", *segments]
    there = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | environment(server, tmp_path)
    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.slow
def test_no_server_means_offline_and_a_warning(tmp_path, monkeypatch):
    with wandb_server.running() as server:
        gone = environment(server, tmp_path)
    code = ONLINE.replace("from kd import tracking", "from kd import tracking; tracking.INIT_TIMEOUT_SECONDS = 2")
    done = python(code, tmp_path / "run", **gone)
    assert done.returncode == 0, done.stderr
    assert "warning: W&B does not answer" in done.stdout and "logged offline" in done.stdout
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert len(wandb_file.read(file).history) == 30


@pytest.mark.slow
def test_an_offline_run_syncs(tmp_path):
    with wandb_server.running() as server:
        code = ONLINE.replace('mode="online"', 'mode="offline"')
        done = python(code, tmp_path / "run", **environment(server, tmp_path))
        assert not server.rows
        sync(server, done.stdout.split("wandb sync ")[1].split(), tmp_path)
        rows = {row["_step"]: row["train/loss"] for row in server.rows}
    assert rows == pytest.approx({step: 1 / step for step in range(1, 31)})


def test_what_wandb_raises_is_said_once_and_training_goes_on(tmp_path, capsys):
    with tracking.WandbTracker(tmp_path, TrackerConfig(mode="offline"), "n", "abc124", {}, []) as tracker:
        tracker.log({"x": 1.0}, 1)

        def fail(*_, **__):
            raise RuntimeError("the service is gone")

        tracker.run.log = fail
        for step in range(2, 6):
            tracker.log({"x": float(step)}, step)
        tracker.table("t", ["a"], [[math.pi]])
    assert capsys.readouterr().out.count("warning: W&B failed (the service is gone)") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


# ------------------------------------------------------------------------------------- loading an artifact


class Artifact:
    """A version as W&B's public API gives it."""

    def __init__(self, run: runs.Run):
        self.run, self.name, self.digest, self.metadata = run, f"{run.name}:v0", files.digest(weights(run)), {}

    def download(self, root: str) -> str:
        for name, content in tracking.model_files(weights(self.run).parent, self.run.record).items():
            data = content.read_bytes() if isinstance(content, Path) else content.encode()
            (Path(root) / name).write_bytes(data)
        return root


def weights(run: runs.Run) -> Path:
    return run.folder / "checkpoints" / "best" / "model.safetensors"


@pytest.fixture
def hub(made, monkeypatch, tmp_path):
    """W&B's API with the runs as artifacts; every name that was asked for."""
    import wandb

    asked = []

    class Api:
        def artifact(self, name, type):
            asked.append((name, type))
            return Artifact(next(r for r in made.values() if r.name in name))

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(tracking, "has_key", lambda: True)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    return asked


def test_an_artifact_serves_as_run(made, hub, command, tmp_path):
    run = made["distilled"]
    name = f"me/kd/{run.name}:best"
    code, _, err = command("evaluate", f"run='wandb:{name}'", f"out={tmp_path / 'f.json'}")
    assert code == 0, err
    assert hub[0] == (name, "model")
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["test/top1"] == run.record["metrics"]["test/top1"]


def test_an_artifact_serves_as_teacher(made, hub, tmp_path):
    from kd import compose, run

    teacher = made["teacher"]
    settings = [s for s in small_runs.SETTINGS if not s.startswith("teacher.recipe")]
    reference = f"wandb:me/kd/{teacher.name}:latest"
    more = [f"teacher.checkpoint='{reference}'", f"runs_dir={tmp_path / 'runs'}", "baseline=off", "recipe.steps=3"]
    finished = run(compose(*settings, *more), say=lambda _: None)
    facts = finished.record["teacher"]
    assert facts["sha256"] == files.digest(weights(teacher)) and facts["artifact"] == reference
    assert finished.record["metrics"]["test/agreement"] <= 1
    from kd import saved

    assert saved.teacher_of(saved.find(finished.folder)).record["name"] == teacher.name
    again = compose(*settings, *more[1:], f"teacher.checkpoint={teacher.folder}", "dry=true")
    assert run(again, say=lambda _: None).name == finished.name  # weights count by content, not by where they came from


def test_a_reference_that_fails_is_told(monkeypatch):
    import wandb

    from kd import saved

    class Api:
        def artifact(self, name, type):
            raise wandb.errors.CommError("artifact not found")

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(tracking, "has_key", lambda: True)
    with pytest.raises(UserError, match="artifact not found"):
        saved.find("wandb:me/kd/x:best")
