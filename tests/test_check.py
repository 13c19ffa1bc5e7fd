"""The check: what is wrong with a teacher is named, and the run does not start; what is right costs little."""

from __future__ import annotations

import json
import math
import tarfile
import types

import bad_teachers
import pytest
import torch

from kd import check, compose, data, losses, models, runs
from kd.check import causes, cka, diagnose, suspects
from kd.models.preprocess import Preprocess


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return bad_teachers.train(tmp_path_factory.mktemp("good"))


@pytest.fixture
def settings(tmp_path):
    """Overrides of a distillation from a file of weights."""
    return [*bad_teachers.TEACHER, *bad_teachers.STUDENT, "tracker=none", "threads=1", f"runs_dir={tmp_path / 'runs'}"]


@pytest.fixture
def case(good):
    dataset = data.load({**runs_dataset(), "name": "digits"}, store_dir=good.folder.parent / ".store")
    network = models.load(good.folder / "checkpoints" / "best").eval()
    return causes.Case("the teacher", network, dataset.val, dataset.classes, "cpu", half=False)


def runs_dataset() -> dict:
    return {"_target_": "kd.data.sources.digits", "val_fraction": 0.2, "test_fraction": 0.2}


def refused(command, settings, *more):
    """What kd.train says as it does not start; no step is made, and kd.check says the same."""
    code, out, err = command("train", *settings, *more)
    assert code == 1, out + err
    folder = next(s.split("=", 1)[1] for s in settings if s.startswith("runs_dir="))
    assert not any((r.folder / "checkpoints").exists() for r in runs.records(folder))
    assert command("check", *settings, *more)[0] == 1
    return " ".join(err.split())


# The tests of weights, by themselves


def test_a_right_order_is_left_alone(case):
    assert suspects.other_order(case.logits, case.split.targets) is None
    assert causes.cause(case) is None


def test_guessing_has_no_better_order():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        logits, targets = torch.randn(300, 10, generator=generator), torch.arange(300) % 10
        assert suspects.other_order(logits, targets) is None


def test_two_classes_of_a_hundred_are_found():
    targets = torch.arange(3000) % 100
    logits = torch.nn.functional.one_hot(targets, 100) * 4.0 + torch.randn(3000, 100, generator=torch.manual_seed(0))
    logits[:, [7, 8]] = logits[:, [8, 7]]
    order, top1 = suspects.other_order(logits, targets)
    assert (order != torch.arange(100)).nonzero().flatten().tolist() == [7, 8]
    assert top1 > 0.8


def test_ties_keep_the_order():
    assert suspects.assign(torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long), 5).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0,) * 3, (1.0,) * 3), ((0.0,) * 3, (1 / 255,) * 3)], ids=["not normalised", "0 to 255"]
)
def test_another_preprocessing_is_found(case, mean, std):
    right = case.network.preprocess
    case.network.preprocess = Preprocess(**{**right.settings(), "mean": mean, "std": std})
    found = causes.cause(case)
    assert found.code == "preprocessing"
    assert "teacher.preprocess.mean=[0.485,0.456,0.406] teacher.preprocess.std=[0.229,0.224,0.225]" in found.fix


def test_blue_for_red_is_found():
    class Reddish(torch.nn.Module):
        """Class 0 is red, class 1 is blue."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3)[[0, 2]])
            self.preprocess = Preprocess(4, 4)

        def forward(self, images):
            return types.SimpleNamespace(logits=self.preprocess(images).mean((2, 3)) @ self.weight.T)

    images = torch.randint(60, (200, 3, 4, 4), dtype=torch.uint8, generator=torch.manual_seed(0))
    targets = torch.arange(200) % 2
    images[targets == 0, 2] += 150  # stored the other way round
    images[targets == 1, 0] += 150
    split = Pictures(images, targets)
    network = Reddish()

    def right(part):
        return network(part.images).logits.argmax(1) == part.targets

    reading, then, now = suspects.other_reading(network, split, right, right(split))
    assert (reading.swapped, then, now) == (True, 1.0, 0.0)


class Pictures:
    """A split of two tensors."""

    def __init__(self, images, targets):
        self.images, self.targets = images, targets

    def __len__(self):
        return len(self.targets)

    def subset(self, places):
        return Pictures(self.images[places], self.targets[places])


def test_a_reading_leaves_the_classifier_as_it_was(case):
    before = case.network.preprocess
    suspects.other_reading(case.network, case.split, lambda part: case.hear(part).argmax(1) == part.targets, case.right)
    assert case.network.preprocess is before


def test_a_probe_knows_what_features_know():
    targets = torch.arange(200) % 4
    noise = torch.randn(200, 32, generator=torch.manual_seed(0))
    assert suspects.probe(noise, targets, 4).float().mean() < 0.45
    assert suspects.probe(noise + 6 * torch.nn.functional.one_hot(targets, 32), targets, 4).float().mean() > 0.95


def test_entropy_of_the_extremes():
    assert causes.entropy(torch.zeros(3, 5)) == pytest.approx(1.0)
    assert causes.entropy(torch.eye(5) * 100) == pytest.approx(0.0, abs=1e-12)


def test_temperatures_are_those_of_softened_teachers():
    terms = compose("loss=[kd,lskd,crd]").loss
    assert diagnose.soft_temperatures(terms) == {"kd/4": (4.0, False), "lskd/2": (2.0, True)}
    assert len(diagnose.soft_temperatures(compose("loss=mlkd").loss)) == 5


def test_temperatures_that_say_nothing_get_a_word():
    found = diagnose.temperatures(
        {"entropy/1": 0.0, "entropy/kd/4": 0.999, "entropy/dkd/1": 0.001, "entropy/ofa/1": 0.4}
    )
    assert [f.fix for f in found] == ["Try loss.kd.temperature=2", "Try loss.dkd.temperature=2"]
    assert not any(f.stops for f in found)


def test_a_path_that_spoils_the_teacher_is_named(case):
    own = case.network
    loaded = types.SimpleNamespace(
        original=own, classifier=lambda x: types.SimpleNamespace(logits=own(x).logits.flip(1))
    )
    figures, findings = diagnose.compare_paths(loaded, case.split, "cpu", half=False)
    assert figures["own/top1"] > 0.9 > figures["path/top1"]
    assert [f.code for f in findings] == ["path"]


# As a user types it


def test_nothing_is_wrong_with_a_good_teacher(good, settings, tmp_path, command):
    path = bad_teachers.spoil(good, tmp_path)
    out_file = tmp_path / "check.json"
    code, out, err = command("check", *settings, f"teacher.checkpoint={path}", "loss=[kd,fitnet]", f"out={out_file}")
    assert code == 0, err
    assert "pair: fitnet stage3 8x8x8 -> stage3 16x8x8 (176 parameters)" in out
    assert "nothing is wrong" in out
    found = json.loads(out_file.read_text())
    assert found["starts"] and found["trained"] and not found["findings"]
    assert found["teacher"]["val/top1"] > 0.9 and found["teacher"]["path/distance"] < 0.05
    fitnet = next(p for p in found["pairs"] if p["term"] == "fitnet")
    assert (fitnet["student"], fitnet["teacher"]) == ({"stage3": [8, 8, 8]}, {"stage3": [16, 8, 8]})
    cost = found["cost"]
    assert 0 < cost["teacher"] + 2 * cost["student"] < cost["step"] < 1.3 * (cost["teacher"] + 3 * cost["student"])
    assert not list((tmp_path / "runs").glob("*/run.json"))


def test_the_same_head_in_another_order(good, settings, tmp_path, command):
    turned = [1, 0, *range(2, 10)]
    w = bad_teachers.weights(good)
    path = bad_teachers.spoil(good, tmp_path, fc_weight=w["fc.weight"][turned], fc_bias=w["fc.bias"][turned])
    said = refused(command, settings, f"teacher.checkpoint={path}")
    assert "'1' under '0', '0' under '1'" in said
    typed = "teacher.classes=[" + said.split("'teacher.classes=[")[1].split("]'")[0] + "]"
    code, _, err = command("train", *settings, f"teacher.checkpoint={path}", typed)
    assert code == 0, err
    code, _, err = command("train", *settings, f"teacher.checkpoint={path}", "teacher.classes=[a,b,c,d,e,f,g,h,i,j]")
    assert code == 2 and "classes, each once" in err


def test_class_folders_that_carry_each_others_names(good, settings, tmp_path, command):
    names = [str(digit) for digit in (0, 1, 2, 8, 4, 5, 6, 7, 3, 9)]
    folder = bad_teachers.pictures(tmp_path / "pictures", names)
    path = bad_teachers.spoil(good, tmp_path)
    folders = ["dataset=folder", f"dataset.root={folder}", "dataset.val_fraction=0.4", "dataset.mirror=false"]
    said = refused(command, settings, f"teacher.checkpoint={path}", *folders)
    assert "another order" in said and "'8' under '3', '3' under '8'" in said
    said = refused(
        command, settings, f"teacher.checkpoint={good.folder}", *folders
    )  # a run of ours has names: equal ones
    assert "'8' under '3', '3' under '8'" in said


def test_images_that_are_normalised_wrongly(good, settings, tmp_path, command):
    path = bad_teachers.spoil(good, tmp_path)
    wrong = ["teacher.preprocess.mean=[0.0,0.0,0.0]", "teacher.preprocess.std=[1.0,1.0,1.0]"]
    said = refused(command, settings, f"teacher.checkpoint={path}", *wrong)
    assert "Type teacher.preprocess.mean=[0.485,0.456,0.406] teacher.preprocess.std=[0.229,0.224,0.225]" in said
    said = refused(
        command, settings, f"teacher.checkpoint={good.folder}", *wrong
    )  # a run's own preprocessing can be overridden
    assert "Type teacher.preprocess.mean=[0.485,0.456,0.406]" in said


@pytest.mark.parametrize(
    ("scale", "named"), [(0.01, "its head is random"), (3.0, "another dataset, or its head is random")]
)
def test_a_random_head(good, settings, tmp_path, command, scale, named):
    head = torch.randn(10, 32, generator=torch.manual_seed(0)) * scale
    path = bad_teachers.spoil(good, tmp_path, fc_weight=head, fc_bias=torch.zeros(10))
    assert named in refused(command, settings, f"teacher.checkpoint={path}")


def test_a_teacher_of_another_dataset(good, settings, tmp_path, command):
    names = [f"class_{name}" for name in "jihgfedcba"]  # ours carries its classes' names
    folder = bad_teachers.pictures(tmp_path / "pictures", names)
    folders = ["dataset=folder", f"dataset.root={folder}", "dataset.val_fraction=0.4"]
    said = refused(command, settings, f"teacher.checkpoint={good.folder}", *folders)
    assert "learnt other classes, those of another dataset" in said and "'class_a'" in said


def test_other_counts_of_classes_are_refused(good, settings, tmp_path, command):
    folder = bad_teachers.pictures(tmp_path / "pictures")
    import shutil

    shutil.rmtree(folder / "train" / "9")
    said = refused(command, settings, f"teacher.checkpoint={good.folder}", "dataset=folder", f"dataset.root={folder}")
    assert "has 10 classes, the dataset has 9" in said


def test_one_that_must_teach_all_the_same_does(good, settings, tmp_path, command):
    path = bad_teachers.spoil(good, tmp_path, fc_weight=torch.zeros(10, 32), fc_bias=torch.zeros(10))
    code, out, err = command("train", *settings, f"teacher.checkpoint={path}", "teacher.min_top1=0")
    assert code == 0, err
    assert "warning: the teacher is right on" in out


def test_a_run_on_its_own_images_is_not_suspected(good, settings, monkeypatch, command):
    monkeypatch.setattr(diagnose, "cause", lambda case: pytest.fail("looked for causes"))
    runs_dir = f"runs_dir={good.folder.parent}"
    own = [*settings, runs_dir, *(f"teacher.{s}" for s in ("recipe.steps=120", "recipe.lr=4e-3", "augment=none"))]
    code, out, err = command("train", *own, "dry=true")
    assert code == 0, err
    assert "val/top1" in out


def test_what_a_loss_cannot_do_is_said_before_the_teacher_is_trained(settings, command, tmp_path):
    code, _, err = command("train", *settings, "loss=deit_hard")
    assert code == 1 and "distillation token" in err
    assert all(r.record["config"]["teacher"]["name"] != "none" for r in runs.records(tmp_path / "runs"))


def test_a_dry_run_shows_the_short_form(settings, command):
    code, out, _ = command("train", *settings, "loss=fitnet", "dry=true")
    assert code == 0
    assert "pairs: fitnet stage3 8x8x8 -> stage3 16x8x8" in out and "not trained yet" in out
    code, out, _ = command("train", "-m", *settings, "loss=kd,fitnet", "dry=true")
    assert code == 0
    assert out.count("check: resnet8 -> resnet8") == 2 and "pairs: fitnet stage3 8x8x8" in out


def test_without_a_teacher_there_is_nothing_to_check(command):
    code, _, err = command("check", "teacher=none")
    assert code == 2 and "nothing to check" in err


def test_a_picture_of_how_alike_the_stages_are(good, settings, tmp_path, command):
    code, out, _ = command(
        "check", *settings, f"teacher.checkpoint={good.folder}", "plot=true", f"out={tmp_path / 'a.json'}"
    )
    assert code == 0
    assert (tmp_path / "cka-digits-resnet8-resnet8.png").stat().st_size > 10_000 and "stages compared" in out


# How alike features are


def test_features_are_like_themselves_whatever_their_rotation_and_scale():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert cka.cka(x, x) == pytest.approx(1.0)
    assert cka.cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0, abs=1e-6)


def test_unrelated_features_are_not_alike_in_many_dimensions():
    found = [cka.cka(*torch.randn(2, 24, 4096, generator=torch.manual_seed(seed))) for seed in range(20)]
    assert abs(sum(found) / 20) < 0.02  # without the correction 0.99
    assert math.isfinite(cka.cka(torch.ones(8, 3), torch.randn(8, 3)))
    with pytest.raises(ValueError, match="4 images"):
        cka.cka(torch.ones(3, 2), torch.ones(3, 2))


# Pairs of families


@pytest.mark.parametrize("loss", ["kd", "fitnet", "at", "rkd", "ofa"])
def test_unlike_families_can_be_paired(loss, settings, command):
    other = [s for s in settings if "args" not in s]
    code, out, err = command("train", *other, "student=mixer_micro", "teacher=vit_micro", f"loss={loss}", "dry=true")
    assert code == 0, err
    assert f"pairs: {loss}" in out


def test_every_term_that_needs_a_teacher_has_a_pair():
    outputs = [
        types.SimpleNamespace(
            features={f"stage{i}": torch.ones(2, 3, 4, 4) for i in range(1, 5)}, logits=torch.ones(2, 10)
        )
        for _ in "st"
    ]
    from kd import pairs

    terms = losses.build(compose("loss=[kd,ofa]").loss)
    found = pairs.pairs(terms, outputs)
    assert [p.term for p in found] == ["kd", "ofa"] and str(found[0]) == "kd logits"


# Real weights, where there are some


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two thousand photographs of CIFAR-10, as a folder."""
    from pathlib import Path

    archive = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "cifar10_jpeg.tar.gz"
    if not archive.is_file():
        pytest.skip("needs ../shared, which is beside the checkout on some machines only")
    folder, kept = tmp_path_factory.mktemp("photographs"), {}
    with tarfile.open(archive) as tar:
        for member in tar:
            *_, split, name, _ = ["", "", *member.name.split("/")]
            if member.isfile() and split == "train" and kept.setdefault(name, 0) < 100:
                kept[name] += 1
                member.name = "/".join(member.name.split("/")[-3:])
                tar.extract(member, folder, filter="data")
    return folder


WRONG = {
    "right": [],
    "preprocessing": ["teacher.preprocess.mean=[0.5,0.5,0.5]", "teacher.preprocess.std=[0.5,0.5,0.5]"],
    "class_order": ["teacher.classes=[airplane,automobile,bird,dog,deer,cat,frog,horse,ship,truck]"],
}


@pytest.mark.parametrize("name", WRONG)
def test_published_weights(name, photographs, shared, tmp_path, command):
    settings = ["teacher=resnet20_a", f"teacher.checkpoint={shared}/weights/cifar10_resnet20.safetensors", *WRONG[name]]
    folders = ["dataset=folder", f"dataset.root={photographs}", "dataset.val_fraction=0.6", "dataset.on_error=skip"]
    out_file = tmp_path / "check.json"
    code, _, err = command("check", *settings, *folders, "student=resnet8", f"runs_dir={tmp_path}", f"out={out_file}")
    found = json.loads(out_file.read_text())
    assert code == (name != "right"), err
    assert [f["code"] for f in found["findings"]] == ([] if name == "right" else [name])


def test_the_entry_point_is_a_module():
    assert callable(check.main)


# Hub weights


def test_hub_weights_teach_with_their_own_head_or_not_at_all(settings, monkeypatch, command):
    built = models.build

    def from_hub(spec, *sizes, pretrained=False, **more):
        classifier = built(spec, *sizes, **more)
        classifier.origin = {"weights": "hub", "source": "timm/it", "head": head} if pretrained else classifier.origin
        return classifier

    monkeypatch.setattr(models, "build", from_hub)
    head = "new, 1000 -> 10 classes"
    assert "its head would be random (new, 1000 -> 10 classes)" in refused(command, settings, "teacher.checkpoint=hub")
    head = "kept"
    code, _, err = command("train", *settings, "teacher.checkpoint=hub", "teacher.min_top1=0")
    assert code == 0, err
