"""The commands as a user types them, and their mistakes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["recipe.lrr=1"], "Did you mean recipe.lr", 2),
        (["+recipe.lrr=1"], "Did you mean recipe.lr", 2),
        (["teacher=vit_bb"], "Did you mean vit_b", 2),
        (["loss=[kdd]"], "Did you mean kd", 2),
        (["recipe.epochs=x"], "recipe.epochs", 2),
        (["recipe.epochs=1", "recipe.steps=2"], "one length", 2),
        (["recipe.lr=nan"], "finite number", 2),
        (["--config-dir", "nowhere"], "no such folder", 2),
        (["loss.at.weight=3"], "loss", 2),
        (["dataset=folder"], "dataset.root", 1),
        (["dataset=folder", "dataset.root=nowhere"], "nowhere", 1),
        (["teacher=resnet8", "teacher.checkpoint=nowhere.safetensors"], "nowhere.safetensors", 1),
        (["device=cuda:7"], "device", 2),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(command, tmp_path, arguments, words, code):
    found, _, err = command("train", *arguments, "tracker=none", f"runs_dir={tmp_path / 'runs'}")
    assert (found, "Traceback" in err) == (code, False), err
    assert words in err
    assert not list((tmp_path / "runs").glob("*/checkpoints"))


def test_an_unwritable_place_is_named(command, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command(
        "train", "teacher=none", "student=resnet8", "tracker=none", f"runs_dir={tmp_path / 'file' / 'runs'}"
    )
    assert code == 1
    assert "runs_dir" in err


def test_help_answers_without_torch():
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kd.train", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "teacher=" in run.stdout
    assert "resnet18" in run.stdout
    assert "torch" not in {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines()}


def test_composing_needs_no_torch_either():
    code = "import sys; from kd import compose; compose('student=resnet8'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_folder_of_ones_own_settings_may_stand_anywhere(command, tmp_path, at):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 17\n")
    arguments = ["+experiment=mine", "student=resnet8"]
    arguments[at:at] = ["--config-dir", str(tmp_path)]
    code, out, err = command("train", *arguments, "--cfg", "job")
    assert code == 0, err
    assert "seed: 17" in out
