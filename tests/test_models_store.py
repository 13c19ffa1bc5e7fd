"""Saving, loading, and weights from elsewhere."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd.models import build, hub, load, load_weights, save
from kd.models.catalogue import preset

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "weights"
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def micro(name="resnet8", classes=10, **options):
    names = [f"c{i}" for i in range(classes)]
    return build(preset(name), classes, 16, classes=names, **options)


@pytest.mark.parametrize(
    "name", ["resnet8", "deit_micro", "mixer_micro", "convnext_micro", "swin_micro", "mobilenet_micro"]
)
def test_a_loaded_classifier_gives_the_same_bits(name, tmp_path):
    model = micro(name).eval()
    weights, config = save(model, tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(IMAGES).logits, model(IMAGES).logits) and not again.training
    assert again.classes == model.classes and again.stages() == model.stages()
    assert again.preprocess.settings() == model.preprocess.settings()
    assert torch.equal(load(weights)(IMAGES).logits, model(IMAGES).logits)
    assert config.name == "config.json"


def test_a_small_stem_survives(tmp_path):
    model = build({"name": "test_resnet"}, 10, 32).eval()
    assert model.built["stem"] == "small"
    save(model, tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load(tmp_path)(images).logits, model(images).logits)


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    model = micro().eval()
    save(model, tmp_path / "model")
    torch.save(IMAGES, tmp_path / "images.pt")
    code = (
        "import sys, torch; from kd.models import load; "
        "m = load(sys.argv[1] + '/model'); x = torch.load(sys.argv[1] + '/images.pt'); "
        "torch.save(m(x).logits.detach(), sys.argv[1] + '/logits.pt')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IMAGES).logits)


def test_the_same_classifier_gives_the_same_bytes(tmp_path):
    model = micro()
    first, second = save(model, tmp_path / "a"), save(load(tmp_path / "a"), tmp_path / "b")
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_timm_reads_what_was_saved(tmp_path):
    import timm

    model = micro("vit_micro").eval()
    save(model, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(theirs(model.preprocess(IMAGES)), model(IMAGES).logits)


def test_a_folder_of_timms_own_loads(tmp_path):
    import timm

    network = timm.create_model("test_resnet", num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "test_resnet",
        "num_classes": 7,
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, images = load(tmp_path), torch.rand(2, 3, 64, 64)
    assert torch.allclose(model(images).logits, network((images - 0.5) / 0.5), atol=1e-5)


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_config_may_not_name_code_from_elsewhere(tmp_path):
    save(micro(), tmp_path)
    edit(tmp_path, lambda c: c["kd"]["built"]["args"].update(_target_="subprocess.Popen"))
    with pytest.raises(ValueError, match=r"subprocess.Popen, which is not part of kd.*trust=true"):
        load(tmp_path)
    edit(tmp_path, lambda c: c["kd"]["built"]["args"].update(_target_="kd.models.store.save"))
    with pytest.raises(ValueError, match="not a network"):
        load(tmp_path)


def test_a_config_may_not_fetch_anything(tmp_path):
    save(micro("vit_micro"), tmp_path)
    edit(tmp_path, lambda c: c["kd"]["built"]["args"].update(checkpoint_path="/etc/passwd"))
    with pytest.raises(ValueError, match="checkpoint_path"):
        load(tmp_path)
    edit(tmp_path, lambda c: c["kd"]["built"]["args"].pop("checkpoint_path"))
    edit(tmp_path, lambda c: c["kd"]["spec"].update(name="hf-hub:someone/else"))
    with pytest.raises(ValueError, match="no network"):
        load(tmp_path)


def test_what_is_broken_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        load(tmp_path / "nowhere")
    weights, config = save(micro(), tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut off"):
        load(tmp_path)
    weights.write_bytes(whole)
    for text, message in (("{", "not JSON"), ("[]", "does not describe"), ('{"kd": {}}', "does not describe")):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def states(model):
    return {k: v.clone() for k, v in model.network.state_dict().items()}


@pytest.mark.parametrize("head", ["fc", "linear", "head", "classifier", "head.fc"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_foreign_names_load(head, prefix, tmp_path):
    model, other = micro().eval(), micro().eval()
    renamed = {f"{prefix}{k.replace('fc.', head + '.')}": v for k, v in states(model).items()}
    torch.save({"state_dict": renamed, "epoch": 3}, tmp_path / "w.pth")
    report = load_weights(other, tmp_path / "w.pth")
    assert report.exact and report.loaded == len(states(model)) and "".join(report.prefixes) == prefix
    assert torch.equal(other(IMAGES).logits, model(IMAGES).logits)


@pytest.mark.parametrize("name", ["vit_micro", "mobilenet_micro", "shufflenetv1_cifar", "vgg8"])
def test_heads_of_other_networks_are_found(name, tmp_path):
    model, other = micro(name).eval(), micro(name).eval()
    own = next(n for n, m in model.network.named_modules() if m is model.network.get_classifier())
    foreign = "last_linear" if own != "last_linear" else "fc"
    save_file({k.replace(f"{own}.", f"{foreign}."): v for k, v in states(model).items()}, tmp_path / "w.safetensors")
    assert load_weights(other, tmp_path / "w.safetensors").exact
    assert torch.equal(other(IMAGES).logits, model(IMAGES).logits)


def test_weights_of_a_saved_folder_load(tmp_path):
    model, other = micro().eval(), micro().eval()
    save(model, tmp_path)
    assert load_weights(other, tmp_path).exact and torch.equal(other(IMAGES).logits, model(IMAGES).logits)


def test_counters_may_be_missing(tmp_path):
    kept = {k: v for k, v in states(micro()).items() if "num_batches" not in k} | {"total_ops": torch.zeros(1)}
    save_file(kept, tmp_path / "w.safetensors")
    assert load_weights(micro(), tmp_path / "w.safetensors").ignored == ["total_ops"]


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("resnet14", 10, r"not a resnet8: it has layer1.1"),
        ("vgg8", 10, r"not a resnet8: it lacks conv1.weight"),
        ("resnet8", 7, "has 7 classes, the data set has 10"),
        ("wrn_16_1", 10, "not a resnet8"),
    ],
)
def test_other_weights_are_refused(name, classes, message, tmp_path):
    model = micro()
    before = states(model)
    save_file(states(micro(name, classes)), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in states(model).items())


def test_without_strict_what_fits_is_loaded(tmp_path):
    save_file(states(micro(classes=7)), tmp_path / "w.safetensors")
    report = load_weights(micro(), tmp_path / "w.safetensors", strict=False)
    assert (
        len(report.mismatched) == 2 and "fc.weight: (7, 64) in the file, (10, 64) in the network" in report.mismatched
    )
    assert "mismatched" in str(report)


class Shell:
    def __reduce__(self):
        return os.system, ("echo never",)


def test_code_is_refused_and_broken_files_are_named(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Shell()}))
    torch.save({"model": Shell()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match="would run code"):
            load_weights(micro(), tmp_path / name)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("text.pth", "empty.bin", "text.safetensors"):
        with pytest.raises(ValueError, match="cut off"):
            load_weights(micro(), tmp_path / name)
    torch.save({"note": "nothing here"}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(micro(), tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(micro(), tmp_path / "nowhere.pt")


@pytest.mark.parametrize("depth", [20, 56])
def test_weights_trained_elsewhere_load(depth):
    file = WEIGHTS / f"cifar10_resnet{depth}.safetensors"
    if not file.is_file():
        pytest.skip(f"{file.name} is not there")
    model = build(preset(f"resnet{depth}_a"), 10, 32)
    report = load_weights(model, file)
    assert report.exact and report.renamed == {"linear": "fc"} and len(load_file(file)) == report.loaded
    with pytest.raises(ValueError, match="has 10 classes, the data set has 100"):
        load_weights(build(preset(f"resnet{depth}_a"), 100, 32), file)
    with pytest.raises(ValueError, match=f"not a resnet{depth}:"):
        load_weights(build(preset(f"resnet{depth}"), 10, 32), file)


def test_hub_weights_out_of_reach_are_an_error_at_once(monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda _address: False)
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"checkpoint=PATH.*pretrained=false.*cache"):
        build({"name": "test_resnet"}, 10, 96, pretrained=True)
    assert time.monotonic() - started < 5
    with pytest.raises(ValueError, match="no hub weights for resnet8"):
        build(preset("resnet8"), 10, 32, pretrained=True)


def test_hub_weights_of_a_cache_are_used(monkeypatch, tmp_path):
    import timm

    theirs = timm.create_model("test_resnet", num_classes=1000)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_args: str(tmp_path / "model.safetensors"))
    model = build({"name": "test_resnet"}, 10, 32, pretrained=True)
    assert model.origin["weights"] == "hub" and "1000 -> 10" in model.origin["head"]
    assert model.built["stem"] == "own"  # weights that were learnt with it
    assert torch.equal(model.network.conv1[0].weight, theirs.conv1[0].weight)
