"""Several teachers as one: what they average, who they are, and what they cannot give."""

from __future__ import annotations

import pytest
import torch

from kd import compose, ensemble, models, run, runs, teacher
from kd.ensemble import Ensemble, member_config
from kd.hints import ConfigError

SPEC = {"name": "resnet8", "args": {"_target_": "kd.models.cifar.ResNet", "depth": 8, "width": 4}}


@pytest.fixture
def members():
    torch.manual_seed(0)
    return [models.build(SPEC, 10, 8, classes=[str(i) for i in range(10)]).eval() for _ in range(3)]


@pytest.fixture
def images():
    return torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_probabilities_are_averaged(members, images):
    said = Ensemble(members, "probs")(images).logits.softmax(1)
    assert torch.allclose(said, torch.stack([m(images).logits.softmax(1) for m in members]).mean(0), atol=1e-6)


def test_logits_are_averaged(members, images):
    said = Ensemble(members, "logits")(images).logits
    assert torch.allclose(said, torch.stack([m(images).logits for m in members]).mean(0), atol=1e-6)


def test_one_member_twice_says_what_it_says_alone(members, images):
    for average in ("probs", "logits"):
        said = Ensemble([members[0], members[0]], average)(images).logits
        assert torch.allclose(said.log_softmax(1), members[0](images).logits.log_softmax(1), atol=1e-5)


def test_extreme_logits_stay_finite():
    both = Ensemble([torch.nn.Identity()] * 2).combine(torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]]))
    assert both.isfinite().all() and both.softmax(1).tolist() == [[0.5, 0.5]]


def test_each_member_is_frozen_and_prepares_images_itself(members, images):
    members[1].preprocess = type(members[1].preprocess)(8, 8, (0.5,) * 3, (0.5,) * 3)
    plain = Ensemble(members)(images).logits
    frozen = teacher.freeze(Ensemble(members), "cpu", half=False)
    assert not any(p.requires_grad for p in frozen.parameters()) and not any(m.training for m in frozen.modules())
    assert torch.allclose(frozen(images).logits, plain, atol=1e-4)


def test_features_are_refused_with_a_reason(members, images):
    with pytest.raises(ValueError, match=r"no 'stage3'.*Choose terms on logits"):
        Ensemble(members)(images, ["stage3"])


def test_a_member_is_a_preset_a_seed_a_file_or_a_path(tmp_path):
    cfg = compose("teacher=ensemble", "teacher.members=[a,b]", "teacher.recipe.epochs=3")
    plain, seeded = member_config(cfg, "resnet20").teacher, member_config(cfg, "resnet20@2").teacher
    assert (plain.name, plain.seed, plain.checkpoint, plain.args["depth"]) == ("resnet20", 0, "auto", 20)
    assert (seeded.seed, seeded.recipe.epochs, seeded.members) == (2, 3, [])
    assert member_config(cfg, "resnet56_a:weights.pt").teacher.checkpoint == "weights.pt"
    assert member_config(cfg, str(tmp_path)).teacher.checkpoint == str(tmp_path)


def test_a_preset_is_the_run_that_it_is_as_a_teacher_alone():
    alone = teacher.teacher_config(compose("teacher=resnet20", "teacher.recipe.epochs=3", "teacher.pretrained=false"))
    settings = ["teacher=ensemble", "teacher.members=[resnet20,resnet8]", "teacher.recipe.epochs=3"]
    together = compose(*settings, "teacher.pretrained=false")
    member = teacher.teacher_config(member_config(together, "resnet20"))
    assert runs.identity(alone, "digest") == runs.identity(member, "digest")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["teacher.members=[resnet8]"], "two or more"),
        (["teacher.members=[resnet8,resnet8]"], "resnet8@1"),
        (["teacher.members=[resnet8,resnt20]"], "Did you mean resnet20"),
        (["teacher.members=[resnet8,resnet20@x]"], "whole number"),
        (["teacher.members=[resnet8,resnet20]", "teacher.checkpoint=somewhere"], "no meaning for an ensemble"),
    ],
)
def test_mistakes_say_what_to_type(typed, said):
    with pytest.raises(ConfigError, match=said):
        ensemble.gather(compose("teacher=ensemble", *typed), lambda cfg: pytest.fail("obtained") if not cfg else None)


def test_members_without_an_ensemble_are_idle():
    with pytest.raises(ConfigError, match="several are teacher=ensemble"):
        compose("teacher=resnet8", "teacher.members=[resnet8,resnet20]")


def test_members_are_trained_once_and_teach_together(tiny, capsys):
    settings = [*tiny, "teacher=ensemble", "teacher.members=[resnet8,resnet8@1]", "teacher.recipe.steps=40"]
    settings += ["teacher.min_top1=0", "recipe.steps=3", "baseline=off"]
    taught = run(compose(*settings))
    facts = taught.record["teacher"]
    assert [m["member"] for m in facts["members"]] == ["resnet8", "resnet8@1"] and facts["average"] == "probs"
    assert len({m["sha256"] for m in facts["members"]}) == 2
    assert 0 <= taught.record["metrics"]["test/agreement"] <= 1
    capsys.readouterr()
    path = taught.folder.parent / facts["members"][1]["run"]
    again = run(compose(*settings[:-5], f"teacher.members=[resnet8,{path}]", *settings[-4:], "teacher.average=logits"))
    assert again.name != taught.name
    assert "epoch" not in capsys.readouterr().out.split("teacher ensemble")[0]  # both were there


def test_features_of_an_ensemble_are_refused_before_its_members_are_trained(tiny, tmp_path, command):
    settings = [*tiny, "teacher=ensemble", "teacher.members=[resnet8,resnet8@1]", "loss=fitnet"]
    code, _, err = command("train", *settings)
    assert code == 1 and "an ensemble has no 'stage3'" in err
    assert len(runs.records(tmp_path / "runs")) == 1
