"""The teacher: a run like any other, frozen, on the same view as its student."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from kd import compose, data, models, run, runs, teacher
from kd.contracts import Batch
from kd.hints import UserError

SPEC = {"name": "resnet8", "args": {"_target_": "kd.models.cifar.ResNet", "depth": 8, "width": 4}}


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return models.build(SPEC, 10, 8, classes=[str(i) for i in range(10)])


@pytest.fixture
def raw():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(6), torch.arange(6), epoch=1.5, seed=3)


def test_a_plain_run_of_the_same_network_is_the_teacher(tiny, capsys):
    plain = [o for o in tiny if not o.startswith("dataset.")]
    alone = run(compose(*plain, "teacher=none", "recipe.steps=6", "recipe.batch_size=64"))
    capsys.readouterr()
    settings = [
        *plain,
        "teacher=resnet8",
        "teacher.args.width=4",
        "teacher.recipe.steps=6",
        "recipe.steps=2",
        "teacher.min_top1=0",
        "baseline=off",
        "seed=1",
    ]
    taught = run(compose(*settings))
    assert f"done already: {alone.folder}" in capsys.readouterr().out
    assert taught.record["teacher"]["run"] == alone.name


def test_frozen_for_good_and_without_gradients(classifier, raw):
    frozen = teacher.freeze(classifier, "cpu", half=False)
    frozen.train()
    assert not any(p.requires_grad for p in frozen.parameters())
    view = data.View(dataclasses.asdict(compose().augment), 8, True, 10)
    before = {n: v.clone() for n, v in frozen.network.state_dict().items()}
    output = teacher.asker(frozen.eval(), view, "same", ["stage1"])(view(raw), raw)
    assert not output.logits.requires_grad
    student = torch.randn(6, 10, requires_grad=True)
    (student * output.logits).sum().backward()  # autograd may keep what the teacher said
    assert all(torch.equal(v, before[n]) for n, v in frozen.network.state_dict().items())


def test_folding_keeps_what_the_teacher_says(classifier, raw):
    classifier.train()
    for _ in range(3):
        classifier(raw.images)  # batch norm with statistics
    plain = classifier.eval()(raw.images).logits
    folded = teacher.freeze(classifier, "cpu", half=False)(raw.images).logits
    assert torch.allclose(plain, folded, atol=1e-4)


def test_lean_linear_layers_say_the_same_and_let_gradients_through():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 5)).bfloat16()
    lean = copy.deepcopy(plain)
    if not models.lean_linears(lean):
        pytest.skip("this processor or torch has no bfloat16 kernels of oneDNN")
    x = torch.randn(3, 7, 24)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = lean(x), plain(x)
    assert ours.dtype == theirs.dtype
    assert torch.allclose(ours.float(), theirs.float(), atol=0.02)
    assert list(lean.state_dict()) == list(plain.state_dict())
    x = x.bfloat16().requires_grad_()
    lean(x).sum().backward()  # as a student's graft asks of its teacher's head
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(("policy", "same"), [("same", True), ("clean", False), ("independent", False)])
def test_the_view_that_the_teacher_sees(policy, same, raw):
    seen = []

    def spy(images, features):
        from kd.contracts import Output

        seen.append(images)
        return Output(torch.zeros(len(images), 10))

    settings = {**dataclasses.asdict(compose().augment), "crop_padding": 0.5}
    view = data.View(settings, 8, True, 10)
    batch = view(raw)
    teacher.asker(spy, view, policy, [])(batch, raw)
    assert (seen[0] is batch.images) == same
    if policy == "clean":
        assert torch.equal(seen[0], raw.images / 255)
    assert torch.equal(view(raw).images, batch.images)  # a function of (seed, epoch, index)


def test_other_classes_or_another_order_stop_the_run(classifier):
    class Data:
        classes = tuple(str(i) for i in range(10))

    teacher.check_classes(classifier, Data, "the teacher")
    Data.classes = ("1", "0", *Data.classes[2:])
    with pytest.raises(UserError, match="order"):
        teacher.check_classes(classifier, Data, "the teacher")
    Data.classes = Data.classes[:7]
    with pytest.raises(UserError, match="10 classes, the dataset has 7"):
        teacher.check_classes(classifier, Data, "the teacher")


@pytest.mark.slow
def test_two_runs_that_ask_at_once_train_the_teacher_once(tiny, tmp_path):
    settings = [
        *tiny,
        "teacher=resnet8",
        "teacher.args.width=4",
        "teacher.recipe.epochs=3",
        "recipe.steps=2",
        "teacher.min_top1=0",
        "baseline=off",
    ]
    commands = [[sys.executable, "-m", "kd.train", *settings, f"seed={seed}"] for seed in (1, 2)]
    started = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
        for c in commands
    ]
    said = [p.communicate() for p in started]
    assert [p.returncode for p in started] == [0, 0], said
    trained = [out for out, _ in said if "resnet8 (0.01 M parameters, from scratch, seed 0)" in out]
    assert len(trained) == 1
    assert len(runs.records(tmp_path / "runs")) == 3


def test_code_in_weights_is_refused(tiny, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.system, ("touch exploded",)

    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises((UserError, ValueError)) as error:
        run(compose(*tiny, "teacher=resnet8", f"teacher.checkpoint={path}", "recipe.steps=1"))
    assert str(path.name) in str(error.value)
    assert not os.path.exists("exploded")


def test_weights_of_another_network_are_named(tiny, tmp_path, classifier):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({n: v.clone() for n, v in classifier.network.state_dict().items()}, path)
    with pytest.raises((UserError, ValueError), match=r"resnet14|expected|match"):
        run(compose(*tiny, "teacher=resnet14", f"teacher.checkpoint={path}", "recipe.steps=1"))


def test_a_resumed_run_wants_its_teacher_in_the_precision_that_it_began_in(tmp_path):
    from kd import prepare

    this = runs.Run(tmp_path)
    this.record = {"started_on": {"threads": 1}, "teacher": {"precision": "bf16"}}
    prepare.require_same_precision(this, half=True)
    with pytest.raises(UserError, match="begun with a teacher in bf16"):
        prepare.require_same_precision(this, half=False)


def test_a_broken_teacher_is_named(tiny):
    settings = [*tiny, "teacher=resnet8", "teacher.args.width=4", "teacher.recipe.steps=3", "recipe.steps=2"]
    cfg = compose(*settings, "teacher.min_top1=0", "baseline=off")
    taught = run(cfg)
    weights = taught.folder.parent / taught.record["teacher"]["run"] / "checkpoints" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(UserError, match=r"is broken: model\.safetensors"):
        run(compose(*settings, "teacher.min_top1=0", "baseline=off", "seed=1"))
