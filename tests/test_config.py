"""Settings: what composes, what is refused, and with which words."""

from __future__ import annotations

import math

import pytest

from kd.config import compose, conf_dir, setting_keys
from kd.hints import ConfigError, did_you_mean


def test_every_model_is_offered_in_both_roles():
    for path in (conf_dir() / "model").glob("*.yaml"):
        cfg = compose(f"teacher={path.stem}", f"student={path.stem}")
        assert cfg.teacher.name == cfg.student.name != "none"
        assert cfg.teacher.recipe.batch_size > 0


def test_yaml_command_line_and_python_give_the_same_settings(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /student: resnet8\nrecipe: {epochs: 3, lr: 0.01}\nseed: 5\n"
    )
    from_file = compose("+experiment=mine", config_dir=tmp_path)
    assert from_file == compose("student=resnet8", "recipe.epochs=3", "recipe.lr=0.01", "seed=5")
    assert compose("+experiment=mine", "recipe.lr=0.5", config_dir=tmp_path).recipe.lr == 0.5  # the command line wins


def test_a_model_in_ones_own_folder_is_a_teacher_and_a_student(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mynet.yaml").write_text("name: mynet\nargs: {_target_: kd.models.cifar.ResNet, depth: 8}\n")
    cfg = compose("teacher=mynet", "student=mynet", config_dir=tmp_path)
    assert cfg.teacher.args["depth"] == cfg.student.args["depth"] == 8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe.epochs=2", "recipe.steps=3"], "one length"),
        (["recipe.steps=3", "recipe.minutes=1"], "one length"),
        (["recipe.lr=nan"], "finite"),
        (["recipe.lr=-1"], "above 0"),
        (["recipe.batch_size=0"], "above 0"),
        (["dataset.val_fraction=1.5"], "0 to 1"),
        (["teacher=none", "teacher.seed=3"], "no effect"),
        (["teacher=none", "augment.teacher_view=clean"], "no effect"),
        (["teacher.checkpoint=x.pt", "teacher.recipe.epochs=3"], "no effect"),
        (["recipe.milestones=[3]"], "no effect"),
        (["+recipe.lrr=1"], "Did you mean recipe.lr"),
        (["teacher=timm"], "teacher.name is missing"),
        (["augment.teacher_view=sane"], "Did you mean same"),
    ],
)
def test_wrong_settings_say_what_to_type(overrides, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        compose(*overrides)


def test_a_typed_length_replaces_the_recipes():
    cfg = compose("recipe.steps=7")
    assert (cfg.recipe.steps, cfg.recipe.epochs, cfg.recipe.minutes) == (7, None, None)
    assert compose().recipe.epochs > 0


def test_an_overlay_gives_way_to_the_command_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "short.yaml").write_text("# @package _global_\nrecipe: {steps: 9}\n")
    assert compose("+experiment=short", config_dir=tmp_path).recipe.steps == 9
    cfg = compose("+experiment=short", "recipe.epochs=2", config_dir=tmp_path)
    assert (cfg.recipe.steps, cfg.recipe.epochs) == (None, 2)


def test_teacher_recipe_is_a_choice():
    cfg = compose("teacher=resnet20", "teacher.recipe=cifar", "teacher.recipe.lr=0.01")
    assert cfg.teacher.recipe.schedule == "multistep"
    assert math.isclose(cfg.teacher.recipe.lr, 0.01)


def test_near_misses():
    assert "recipe.lr" in did_you_mean("recipe.lrr", setting_keys())
    assert "dataset.train_fraction" in did_you_mean("train_fraction", setting_keys())
    assert did_you_mean("zzz", ["abc"]) == ""


def test_losses_compose_as_a_list():
    cfg = compose("loss=[kd,at]")
    assert {"ce", "kd", "at"} <= set(cfg.loss)


def test_a_bare_off_in_yaml_means_off(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nteacher: {cache: off}\nrecipe: {compile: on}\nbaseline: off\n"
    )
    cfg = compose("+experiment=mine", "teacher=resnet8", config_dir=tmp_path)
    assert (cfg.teacher.cache, cfg.recipe.compile, cfg.baseline) == ("off", "on", "off")


def test_composing_in_python_names_the_near_misses():
    with pytest.raises(ConfigError, match="Did you mean teacher"):
        compose("teachr=none")
    with pytest.raises(ConfigError, match="Did you mean resnet20"):
        compose("teacher=resnt20")
