"""Device, precision and compiling follow rules, not stopwatches."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from kd import compose, device, files, models, run
from kd.hints import ConfigError, UserError


def built(name: str, size: int = 32, *overrides: str):
    cfg = compose(f"student={name}", "teacher=none", *overrides)
    return models.build(dataclasses.asdict(cfg.student), 10, size, 3)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(device, "fast_bfloat16", lambda _: True)


@pytest.mark.parametrize(
    ("name", "size", "precision"),
    [
        ("resnet20", 32, "bf16"),
        ("resnet8x4", 32, "bf16"),
        ("resnet18", 32, "bf16"),
        ("resnet8", 16, "bf16"),
        ("vit_micro", 32, "fp32"),
        ("mobilenetv2_05_cifar", 32, "fp32"),
        ("shufflenetv2_cifar", 32, "fp32"),
        ("convnext_micro", 32, "fp32"),
    ],
)
def test_bfloat16_where_it_pays(fast, name, size, precision):
    network = built(name, size)
    training = network.training
    assert device.resolve_precision("auto", "cpu", network) == precision
    assert network.training == training
    assert device.resolve_precision("auto", "cuda", network) == "bf16"
    assert device.resolve_precision("fp32", "cpu", network) == "fp32"


def test_float32_where_the_device_is_slow_at_the_other(monkeypatch):
    monkeypatch.setattr(device, "fast_bfloat16", lambda _: False)
    assert device.resolve_precision("auto", "cpu", built("resnet20")) == "fp32"
    assert device.resolve_precision("bf16", "cpu") == "bf16"


def test_an_ensemble_counts_its_members():
    from kd.ensemble import Ensemble

    one, two = built("resnet8"), built("resnet14")
    low, high = sorted((device.density(one), device.density(two)))
    assert low <= device.density(Ensemble([one, two])) <= high


def test_compiling_has_to_pay_back(monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda _: "/usr/bin/g++")
    assert not device.resolve_compile("auto", "cpu", 164_000)
    assert device.resolve_compile("auto", "cpu", 166_000)
    assert device.resolve_compile("on", "cpu", 1)
    assert not device.resolve_compile("off", "cpu", 10**9)
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    assert not device.resolve_compile("auto", "cpu", 10**9)


def test_an_unknown_device_is_an_error():
    with pytest.raises(ConfigError, match="expected auto, cpu"):
        device.pick_device("gpu0")


def test_a_compiled_twin_shares_weights_and_leaves_the_network_as_it_was(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda *a, **k: (calls.append(options), f(*a, **k))[1])
    network = built("resnet8").eval()
    twin = device.compiled(network, "cpu")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(twin(images).logits, network(images).logits)
    assert calls == [{"dynamic": False}]
    assert next(twin.parameters()) is next(network.parameters())


@pytest.mark.slow
@pytest.mark.skipif(device.shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_run_learns_the_same_but_for_rounding_and_is_itself_again(tiny, tmp_path):
    settings = [*tiny, "teacher=resnet8", "teacher.recipe.steps=10", "teacher.min_top1=0", "baseline=off"]
    settings += ["recipe.steps=4", "sweep_name=test", "teacher.recipe.compile=off", "recipe.precision=fp32"]
    runs = [
        run(compose(*settings, f"recipe.compile={c}", *o)) for c, o in (("off", []), ("on", []), ("on", ["fresh=true"]))
    ]
    assert [r.record["compile"] for r in runs] == [False, True, True]
    losses = [[json.loads(line).get("train/loss") for line in (r.folder / "metrics.jsonl").open()] for r in runs]
    assert losses[1] == losses[2]
    assert [x for x in losses[0] if x] == pytest.approx([x for x in losses[1] if x], rel=1e-3)


def test_what_auto_meant_is_recorded_and_a_resume_keeps_to_it(tiny, monkeypatch):
    settings = [*tiny, "teacher=none", "recipe.steps=3", "sweep_name=test", "student.args.width=16"]
    monkeypatch.setattr(device, "fast_bfloat16", lambda _: True)
    finished = run(compose(*settings))
    assert finished.record["precision"] == "bf16"
    assert finished.record["compile"] is False
    files.write_json(finished.folder / "run.json", {**finished.record, "status": "interrupted"})
    monkeypatch.setattr(device, "fast_bfloat16", lambda _: False)
    with pytest.raises(UserError, match=r"begun with recipe.precision at bf16, here recipe.precision=auto means fp32"):
        run(compose(*settings))
    monkeypatch.setattr(device, "fast_bfloat16", lambda _: True)
    monkeypatch.setattr(device, "resolve_compile", lambda *_: True)
    with pytest.raises(UserError, match=r"begun with recipe.compile at False"):
        run(compose(*settings))
