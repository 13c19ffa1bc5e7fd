"""A run from its settings to its record."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kills import kill_amid
from safetensors.torch import load_file

from kd import compose, files, run, runs
from kd.hints import UserError


def weights(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): files.digest(p) for p in sorted(folder.glob("*/checkpoints/*/model.safetensors"))
    }


def test_distilling_trains_the_teacher_once_and_compares_with_the_student_alone(tiny, capsys):
    settings = [*tiny, "teacher=resnet8", "teacher.recipe.steps=30", "recipe.steps=12", "teacher.min_top1=0"]
    finished = run(compose(*settings))
    record = finished.record
    assert finished.done
    assert {"test/top1", "test/ece", "test/agreement", "test_last/top1", "val/top1"} <= set(record["metrics"])
    assert record["baseline"]["verdict"] in ("above", "below", "equal to")
    assert "same student alone" in capsys.readouterr().out.splitlines()[-1]
    assert len(runs.records(finished.folder.parent)) == 3  # teacher, student, baseline
    kept = {p.name for p in (finished.folder / "checkpoints" / "last").iterdir()}
    assert "training.pt" not in kept
    assert {p.name for p in (finished.folder / "checkpoints").iterdir()} == {"best", "last"}

    run(compose(*settings, "seed=1", "baseline=off"))
    out = capsys.readouterr().out
    assert "done already" in out  # the teacher: its seed does not follow the student's
    assert "done already" in (run(compose(*settings)), capsys.readouterr().out)[1]


def test_same_settings_same_place_and_same_weights(tiny, tmp_path):
    settings = [*tiny, "teacher=none", "recipe.steps=8"]
    first = run(compose(*settings))
    again = run(compose(*settings, f"runs_dir={tmp_path / 'other'}"))
    assert first.name == again.name
    assert weights(first.folder.parent) == weights(again.folder.parent)
    assert run(compose(*settings, "seed=1")).name != first.name


def test_fresh_repeats_the_student_and_keeps_the_old_one(tiny):
    first = run(compose(*tiny, "teacher=none", "recipe.steps=3"))
    digest = weights(first.folder.parent)
    run(compose(*tiny, "teacher=none", "recipe.steps=3", "fresh=true"))
    assert weights(first.folder.parent) == digest
    assert len(list((first.folder.parent / ".old").iterdir())) == 1


def test_teacher_settings_do_not_count_without_a_teacher(tiny):
    plain = run(compose(*tiny, "teacher=none", "recipe.steps=2"))
    assert plain.record["loss"] == "1 ce"
    assert plain.record["config"]["teacher"] == {"name": "none"}
    assert run(compose(*tiny, "teacher=none", "recipe.steps=2", "loss=[kd]")).name == plain.name


def test_kept_epochs_teach(tiny):
    settings = [
        *tiny,
        "teacher=resnet8",
        "teacher.recipe.epochs=2",
        "teacher.recipe.keep_epochs=[1]",
        "recipe.steps=2",
        "teacher.min_top1=0",
        "baseline=off",
    ]
    taught = run(compose(*settings, "teacher.epoch=1"))
    assert taught.record["teacher"]["checkpoint"] == "epoch_001"
    with pytest.raises(UserError, match=r"keep_epochs=\[7\]"):
        run(compose(*settings, "teacher.epoch=7"))


def test_a_poor_teacher_does_not_teach(tiny):
    settings = [
        *tiny,
        "teacher=resnet8",
        "teacher.recipe.steps=1",
        "recipe.steps=2",
        "baseline=off",
        "teacher.min_top1=0.9",
    ]
    with pytest.raises(UserError, match="min_top1"):
        run(compose(*settings))


def test_a_diverged_run_keeps_its_last_good_weights_and_says_where(tiny):
    settings = [*tiny, "teacher=none", "recipe.epochs=6", "recipe.optimizer=sgd", "recipe.lr=1e18", "recipe.warmup=0"]
    with pytest.raises(UserError, match=r"diverged at step \d+ with learning rate"):
        run(compose(*settings))
    found = runs.records(Path(compose(*settings).runs_dir))[0]
    assert found.status == "diverged"
    for path in found.folder.glob("checkpoints/*/model.safetensors"):
        assert all(torch.isfinite(v.float()).all() for v in load_file(path).values())


def test_a_network_from_outside_kd_is_trained_found_again_and_taught_by(tiny, tmp_path, command):
    own = ["student=timm", "student.name=own", "student.args._target_=own_net.Net", "recipe.steps=10"]
    plain = [o for o in tiny if not o.startswith(("student=", "student.args"))]
    finished = run(compose(*plain, *own, "teacher=none"))
    assert finished.done
    taught = run(compose(*plain, "student=resnet8", "recipe.steps=4", "teacher=timm", f"teacher.checkpoint={finished.folder}",
                         "teacher.name=own", "teacher.args._target_=own_net.Net", "teacher.min_top1=0", "baseline=off"))  # fmt: skip
    assert taught.record["teacher"]["run"] == finished.name
    fresh = [sys.executable, "-m", "kd.evaluate", f"run={finished.folder}", f"runs_dir={tmp_path / 'runs'}"]
    surroundings = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    refused = subprocess.run(fresh, capture_output=True, text=True, check=False, env=surroundings)
    assert (refused.returncode, "trust=true" in refused.stderr) == (1, True), refused.stderr
    trusted = subprocess.run([*fresh, "trust=true"], capture_output=True, text=True, check=False, env=surroundings)
    assert trusted.returncode == 0, trusted.stderr


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, tmp_path):
    settings = [*tiny, "teacher=none", "recipe.epochs=60", "recipe.ema=0.9", "dataset.train_fraction=0.3"]
    whole = run(compose(*settings))
    place = tmp_path / "killed"
    command = [sys.executable, "-m", "kd.train", *settings, f"runs_dir={place}"]
    generator = random.Random(0)
    for _ in range(10):
        kill_amid(command, place, generator.uniform(0.1, 0.7))
    end = subprocess.run(command, capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stderr
    assert weights(place) == weights(whole.folder.parent)
    rows = [json.loads(line) for line in (place / whole.name / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, whole.record["steps"] + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_checkpoints_and_the_same_command_goes_on(tiny, tmp_path, signum, code):
    settings = [*tiny, "teacher=none", "recipe.steps=4000"]
    command = [sys.executable, "-m", "kd.train", *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "runs").glob("*/metrics.jsonl")):
        time.sleep(0.02)
    process.send_signal(signum)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert "the same command goes on" in err
    found = runs.records(tmp_path / "runs")[0]
    assert found.status == "interrupted"
    assert (found.folder / "checkpoints" / "last" / "training.pt").exists()


def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(tiny, tmp_path, monkeypatch):
    from kd import loop

    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)  # every epoch
    settings = [*tiny, "teacher=none", "recipe.epochs=6"]
    whole = run(compose(*settings, f"runs_dir={tmp_path / 'whole'}"))
    seen = []

    def stop_after_four(console, training, row):
        seen.append(training.progress.step)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("kd.console.Console.epoch", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        run(compose(*settings))
    monkeypatch.undo()
    folder = tmp_path / "runs" / whole.name / "checkpoints"
    assert (folder / "previous").is_dir()
    (folder / "last" / "training.pt").write_bytes(b"torn")
    said = []
    again = run(compose(*settings), say=said.append)
    assert any("is broken" in s for s in said)
    assert weights(again.folder.parent) == weights(whole.folder.parent)


def test_a_second_process_on_a_live_run_is_sent_away(tiny, tmp_path):
    cfg = compose(*tiny, "teacher=none", "recipe.steps=2")
    finished = run(cfg)
    holder = (
        "import sys, time; from pathlib import Path; from kd import runs\n"
        f"with runs.lock(runs.Run(Path({str(finished.folder)!r}))): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    process.stdout.readline()
    try:
        with pytest.raises(UserError, match=f"process {process.pid}"):
            run(cfg)
    finally:
        process.kill()
        process.wait()
    assert run(cfg).done  # the lock died with its holder


def test_minutes_become_steps_once(tiny):
    finished = run(compose(*tiny, "teacher=none", "recipe.minutes=0.005"))
    assert finished.record["steps"] >= 1
    assert finished.record["config"]["recipe"]["minutes"] == 0.005


def test_a_folder_of_ones_own_images(tiny, tmp_path):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    settings = [o for o in tiny if not o.startswith("dataset.")]
    finished = run(
        compose(*settings, "teacher=none", "dataset=folder", f"dataset.root={tmp_path / 'data'}", "recipe.steps=2")
    )
    assert finished.record["dataset"]["classes"] == ["cat", "dog"]
    moved = tmp_path / "elsewhere"
    (tmp_path / "data").rename(moved)
    assert (
        run(compose(*settings, "teacher=none", "dataset=folder", f"dataset.root={moved}", "recipe.steps=2")).name
        == finished.name
    )


def test_a_grafted_head_is_trained_saved_and_resumed(tiny, tmp_path, monkeypatch):
    settings = [
        *tiny,
        "teacher=resnet8",
        "teacher.recipe.steps=20",
        "loss=[simkd]",
        "teacher.min_top1=0",
        "baseline=off",
    ]
    whole = run(compose(*settings, "recipe.epochs=4", f"runs_dir={tmp_path / 'whole'}"))
    from kd import models

    classifier = models.load(whole.folder / "checkpoints" / "best")
    assert classifier.grafted is not None
    assert classifier(torch.zeros(2, 1, 16, 16)).logits.shape == (2, 10)

    def stop_after_two(console, training, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("kd.loop.CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr("kd.console.Console.epoch", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(compose(*settings, "recipe.epochs=4"))
    monkeypatch.undo()
    again = run(compose(*settings, "recipe.epochs=4"))
    assert weights(again.folder.parent) == weights(whole.folder.parent)


def test_a_signal_inside_a_sum_of_batches_waits_for_its_end(tiny, tmp_path, monkeypatch):
    """Gradients are in no checkpoint: seven steps an epoch, three batches a sum."""
    settings = [*tiny, "teacher=none", "recipe.epochs=2", "recipe.accumulate=3"]
    whole = run(compose(*settings, f"runs_dir={tmp_path / 'whole'}"))
    from kd import loop
    from kd.hints import Interrupted

    plain = loop.train_step

    def interrupted_at_four(training, raw):
        if training.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(training, raw)

    monkeypatch.setattr(loop, "train_step", interrupted_at_four)
    with pytest.raises(Interrupted, match="step 6 of 14"):
        run(compose(*settings))
    monkeypatch.undo()
    assert weights(run(compose(*settings)).folder.parent) == weights(whole.folder.parent)


def test_epochs_that_are_not_reached_cannot_be_kept(tiny):
    with pytest.raises(UserError, match="epochs 1 to 2"):
        run(compose(*tiny, "teacher=none", "recipe.epochs=2", "recipe.keep_epochs=[3]"))
