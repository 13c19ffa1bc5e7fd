"""Identity: the same settings are the same run, however they were written and wherever the files lie."""

from __future__ import annotations

import pytest

from kd import runs
from kd.config import compose
from kd.hints import UserError


def mark(*overrides: str) -> str:
    return runs.fingerprint(runs.identity(compose(*overrides), "digest"))


@pytest.mark.parametrize(
    "same",
    [
        "runs_dir=x",
        "threads=2",
        "workers=0",
        "tracker=none",
        "fresh=true",
        "dry=true",
        "teacher.cache=off",
        "dataset.memory_gib=1",
        "baseline=off",
        "dataset.root=x",
    ],
)
def test_where_and_how_fast_does_not_count(same):
    assert mark("student=resnet8", same) == mark("student=resnet8")


@pytest.mark.parametrize(
    "other",
    [
        "seed=1",
        "recipe.lr=0.5",
        "recipe.epochs=3",
        "loss=[ce]",
        "loss.kd.temperature=2",
        "augment=none",
        "dataset.train_fraction=0.5",
        "teacher.seed=1",
        "teacher.recipe.lr=0.5",
    ],
)
def test_what_changes_the_result_counts(other):
    assert mark("student=resnet8", other) != mark("student=resnet8")


def test_a_teacher_that_is_not_there_does_not_count():
    settings = runs.identity(compose("teacher=none"), "digest")
    assert settings["teacher"] == {"name": "none"}
    assert "teacher_view" not in settings["augment"]


def test_weights_count_by_content(tmp_path):
    for name, text in (("a.pt", "one"), ("b.pt", "one"), ("c.pt", "two")):
        (tmp_path / name).write_text(text)
    marks = [mark("teacher=resnet8", f"teacher.checkpoint={tmp_path / n}") for n in ("a.pt", "b.pt", "c.pt")]
    assert marks[0] == marks[1] != marks[2]
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        mark("teacher=resnet8", f"teacher.checkpoint={tmp_path / 'nowhere'}")


def test_names_are_readable_and_safe():
    name = runs.run_name(
        compose("teacher=resnet20", "student=timm", "student.name=a/b c", "seed=3"), "0123456789abcdef"
    )
    assert name == "digits-a_b_c-kd-resnet20-s3-01234567"


def test_a_record_keeps_no_half_numbers(tmp_path):
    run = runs.Run(tmp_path)
    run.update(a=float("nan"), b={"c": [float("inf"), 1.5]})
    assert runs.read_record(tmp_path) == {"a": None, "b": {"c": [None, 1.5]}}


def test_opening_what_is_no_finished_run_says_what_is_there(tmp_path):
    (tmp_path / "one").mkdir()
    runs.Run(tmp_path / "one").update(status="running")
    with pytest.raises(FileNotFoundError, match="Runs beside it: one"):
        runs.open_run(tmp_path / "two")
    with pytest.raises(UserError, match="running, not done"):
        runs.open_run(tmp_path / "one")
