"""Sweeps: what they run, what they skip, what they survive and what they write down."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from kills import kill_amid

from kd import files, runs, sweep
from kd.sweep import plan

SHORT = ["recipe.steps=4", "baseline=off"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs"


def manifest(folder: Path, name: str) -> dict:
    return json.loads((folder / "sweeps" / f"{name}.json").read_text(encoding="utf-8"))


def test_cells_times_parameters():
    found = sweep.expand({"seed": "0,1"}, [{"teacher": "none"}, {"teacher": "a", "teacher.epoch": "1,2"}], ["loss=kd"])
    assert len(found) == 2 + 4
    assert found[0] == ("seed=0", "teacher=none", "loss=kd")
    assert found[-1] == ("seed=1", "teacher=a", "teacher.epoch=2", "loss=kd")


def test_typed_wins_over_cells_and_parameters():
    found = sweep.expand({"seed": "0,1"}, [{"teacher.epoch": "1,2"}], ["seed=7", "teacher.epoch=5,6"])
    assert found == [("seed=7", "teacher.epoch=5"), ("seed=7", "teacher.epoch=6")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (0.5, "0.5"), ("0,1", "0,1"), ([2, 3], "[2,3]"), ({"a": None}, "{a:null}")],
)
def test_yaml_values_in_hydras_syntax(value, text):
    assert sweep.literal(value) == text


def test_labels_leave_out_what_is_shared_or_follows():
    found = sweep.labels(
        [
            (f"seed={seed}", *teacher, "loss=kd")
            for seed in (0, 1)
            for teacher in (("teacher=none",), ("teacher=a", "teacher.recipe.epochs=2"))
        ]
    )
    assert found == ["seed=0 teacher=none", "seed=0 teacher=a", "seed=1 teacher=none", "seed=1 teacher=a"]


def test_a_plain_multirun_is_planned_run_recorded_and_skipped_the_second_time(command, tiny, folder):
    arguments = ["-m", *tiny, *SHORT, "teacher=none", "seed=0,1", "sweep_name=pair"]
    code, out, _ = command("train", *arguments)
    assert code == 0
    assert "2 cells: 0 done, 2 to run; about" in out
    assert "sweep pair: 2 of 2 cells done" in out
    written = manifest(folder, "pair")
    assert [c["state"] for c in written["cells"]] == ["done", "done"]
    assert written["command"].startswith("python -m kd.train -m student=resnet8")
    assert {r.record["sweep"] for r in runs.records(folder)} == {"pair"}
    before = {r.name: files.digest(r.folder / "run.json") for r in runs.records(folder)}
    code, out, _ = command("train", *arguments)
    assert (code, "2 cells: 2 done, 0 to run" in out) == (0, True)
    assert before == {r.name: files.digest(r.folder / "run.json") for r in runs.records(folder)}


def test_equal_cells_run_once(command, tiny, folder):
    code, out, _ = command("train", "-m", *tiny, *SHORT, "teacher=none", "loss=kd,ofa", "sweep_name=s")
    assert code == 0
    assert "1 cells (2 asked for, equal ones run once)" in out
    assert len(runs.records(folder)) == 1


def test_the_teacher_is_trained_once(command, tiny, folder):
    teacher = ["teacher=resnet8", "teacher.args.width=2", "teacher.recipe.steps=3", "teacher.min_top1=0"]
    code, out, _ = command("train", "-m", *tiny, *SHORT, *teacher, "seed=0,1", "sweep_name=s")
    assert code == 0
    assert "2 to run, 1 teacher to train first" in out
    assert len(runs.records(folder)) == 3


def test_dry_looks_and_runs_nothing(command, tiny, folder):
    code, out, _ = command("train", "-m", *tiny, *SHORT, "teacher=none", "seed=0,1", "dry=true")
    assert code == 0
    assert "2 cells: 0 done, 2 to run" in out
    assert not list(folder.glob("*/run.json"))
    assert not (folder / "sweeps").exists()


def test_three_broken_cells_are_told_and_the_others_go_on(command, tiny, folder, tmp_path):
    own = tmp_path / "conf" / "sweep"
    own.mkdir(parents=True)
    (own / "broken.yaml").write_text(
        "# @package _global_\n"
        "defaults: [{override /hydra/sweeper: cells}, {override /teacher: none}, _self_]\n"
        "sweep_name: broken\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    cells:\n"
        "      - {seed: '0,1'}\n"
        "      - {seed: 2, recipe.lr: 1e30, recipe.optimizer: sgd}\n"
        f"      - {{seed: 3, student.checkpoint: {tmp_path / 'nothing.safetensors'}}}\n"
        "      - {seed: 4}\n"
    )
    arguments = [f"--config-dir={tmp_path / 'conf'}", "+sweep=broken", *tiny, *SHORT]
    planned: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "show", lambda _, cells, *__: planned.update({c.label: c.run.name for c in cells if c.run}))
        code, _, err = command("train", *arguments, "dry=true")
    assert (code, "1 of 5 cells cannot run" in err) == (1, True)
    folder.mkdir(exist_ok=True)
    (folder / planned["seed=4"]).write_text("in the way")

    code, out, err = command("train", *arguments)
    assert code == 1
    assert "Traceback" not in err
    assert "3 of 5 cells failed" in err
    states = {c["label"].split()[0]: (c["state"], c["error"]) for c in manifest(folder, "broken")["cells"]}
    assert states["seed=0"][0] == states["seed=1"][0] == "done"
    assert states["seed=2"][0] == "diverged"
    assert "learning rate" in states["seed=2"][1]
    assert "nothing.safetensors" in states["seed=3"][1]
    assert "cannot write" in states["seed=4"][1] or "not a" in states["seed=4"][1].lower()

    (folder / planned["seed=4"]).unlink()
    code, out, _ = command("train", *arguments)
    assert code == 1
    assert "2 done, 2 to run" in out
    assert "3 of 5 cells done" in out


def test_a_cell_that_does_not_compose_is_a_failure_with_its_reason(command, tiny, folder):
    code, _, err = command("train", "-m", *tiny, *SHORT, "teacher=none", "student.preprocess.size=16,x", "sweep_name=s")
    assert code == 1
    assert "could not be converted to Integer" in err
    assert sorted(c["state"] for c in manifest(folder, "s")["cells"]) == ["done", "failed"]


def test_the_manifest_keeps_done_cells_of_an_earlier_command(command, tiny, folder):
    for seeds in ("0", "1,2"):
        command("train", "-m", *tiny, *SHORT, "teacher=none", f"seed={seeds}", "sweep_name=s")
    assert len(manifest(folder, "s")["cells"]) == 3


def test_order_baselines_first_then_every_teacher_once():
    class Named:
        def __init__(self, name):
            self.name = name

    def cell(label, teacher):
        config = type("C", (), {"teacher": Named(teacher or "none")})()
        return plan.Cell((), label, config=config, teacher=Named(teacher) if teacher else None)

    cells = [cell("a0", "a"), cell("a1", "a"), cell("b0", "b"), cell("n", None)]
    assert [c.label for c in plan.ordered(cells)] == ["n", "a0", "b0", "a1"]


def test_a_cell_that_another_process_finished_is_done(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "done"}')
    cell = plan.Cell((), run=runs.Run(tmp_path), problem="is being worked on by process 1")
    lost = plan.Cell((), run=runs.Run(tmp_path / "nowhere"), problem="is being worked on by process 1")
    sweep.look_again([cell, lost])
    assert (cell.state, cell.problem, lost.state) == ("done", None, "failed")


def outcome(folder: Path) -> dict[str, object]:
    """What may not depend on kills: final weights and metrics of every run."""
    return {
        r.name: (
            r.status,
            r.record.get("metrics"),
            files.digest(r.folder / "checkpoints" / "best" / "model.safetensors"),
        )
        for r in runs.records(folder)
    }


@pytest.mark.slow
def test_killed_at_five_random_moments_it_ends_as_if_never_killed(tiny, tmp_path):
    shared = [a for a in tiny if not a.startswith("runs_dir=")]
    arguments = ["-m", *shared, "recipe.steps=120", "teacher.recipe.steps=80", "teacher.min_top1=0", "baseline=off"]
    arguments += ["teacher=none,resnet8", "teacher.args.width=2", "seed=0,1", "sweep_name=s"]
    arguments[arguments.index("teacher.args.width=2")] = "+teacher.args.width=2"
    call = [sys.executable, "-m", "kd.train", *arguments]
    subprocess.run([*call, f"runs_dir={tmp_path / 'whole'}"], check=True, capture_output=True)
    killed, generator = [*call, f"runs_dir={tmp_path / 'killed'}"], random.Random(0)
    side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    for more in ([], [], [], side, side):
        kill_amid([*killed, *more], tmp_path / "killed", generator.uniform(0, 1))
    subprocess.run(killed, check=True, capture_output=True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_side_by_side_the_cores_are_divided(tiny, folder):
    side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    arguments = [a for a in tiny if not a.startswith("threads")]
    call = [
        sys.executable,
        "-m",
        "kd.train",
        "-m",
        *arguments,
        *SHORT,
        *side,
        "teacher=none",
        "seed=0,1",
        "sweep_name=s",
    ]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 at once" in done.stdout
    share = max(1, sweep.cores() // 2)
    assert {r.record["environment"]["threads"] for r in runs.records(folder)} == {share}
    assert [c["state"] for c in manifest(folder, "s")["cells"]] == ["done", "done"]
