"""Every YAML of conf/ composes, and every class that it names is there."""

from __future__ import annotations

import importlib

import pytest
from omegaconf import OmegaConf

from kd.config import compose, conf_dir
from kd.losses import build

CHOICES = ("teacher", "student", "dataset", "augment", "recipe", "tracker")
NAMED = {"teacher=timm": ["teacher.name=resnet18"], "student=timm": ["student.name=resnet18"]}


def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))


def targets(node) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if isinstance(node.get("_target_"), str) else []
        return own + [t for v in node.values() for t in targets(v)]
    return [t for v in node for t in targets(v)] if isinstance(node, list) else []


@pytest.mark.parametrize("choice", [f"{g}={c}" for g in CHOICES for c in choices(g)])
def test_choice_composes(choice):
    compose(choice, *NAMED.get(choice, []))


@pytest.mark.parametrize("name", choices("experiment"))
def test_experiment_composes(name):
    compose(f"+experiment={name}")


@pytest.mark.parametrize("name", choices("loss"))
def test_loss_is_built(name):
    assert build(compose(f"loss=[{name}]").loss).terms


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_yaml_is_short_opens_with_a_comment_and_names_what_exists(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#"), "its first comment says what it is and whence"
    for target in targets(OmegaConf.to_container(OmegaConf.create(text) or OmegaConf.create({}), resolve=False)):
        module, _, name = target.rpartition(".")
        assert hasattr(importlib.import_module(module), name), target


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("experiment"))
def test_one_step_of_every_experiment(name, tiny):
    """On digits, with small networks: the settings of the experiment itself, its data and sizes aside."""
    from kd import run

    short = [
        "dataset=digits",
        "student=resnet8",
        "teacher=resnet8",
        "recipe.steps=1",
        "teacher.recipe.steps=1",
        "recipe.keep_epochs=[]",
    ]
    assert run(compose(f"+experiment={name}", *short, *tiny, "teacher.min_top1=0", "baseline=off")).done
