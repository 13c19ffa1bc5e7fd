"""Networks: what the papers count, what every family answers, and what is refused."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from kd.models import build, count_macs, count_parameters, fold_batchnorm
from kd.models.catalogue import preset, presets
from kd.models.taps import pick_parts

# 100 classes at 32 pixels, as the distillation literature counts them
PARAMETERS = {
    "resnet8": 83_892, "resnet14": 181_108, "resnet20": 278_324, "resnet32": 472_756, "resnet44": 667_188,
    "resnet56": 861_620, "resnet110": 1_736_564, "resnet8x4": 1_233_540, "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916, "wrn_16_2": 703_284, "wrn_40_1": 569_780, "wrn_40_2": 2_255_156, "vgg8": 3_965_028,
    "vgg11": 9_277_284, "vgg13": 9_462_180, "vgg16": 14_774_436, "vgg19": 20_086_692,
    "mobilenetv2_05_cifar": 812_836, "shufflenetv1_cifar": 949_258, "shufflenetv2_cifar": 1_355_528,
    "resnet50_cifar": 23_705_252, "resnet18_cifar": 11_220_132,
}  # fmt: skip
MMACS = {
    "resnet8x4": 177.1, "resnet32x4": 1083.0, "wrn_40_2": 327.6, "vgg13": 284.9, "shufflenetv1_cifar": 38.7,
    "mobilenetv2_05_cifar": 6.5, "resnet56": 125.8, "resnet20": 40.8,
}  # fmt: skip
FAMILIES = ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2_05_cifar", "shufflenetv1_cifar", "shufflenetv2_cifar",
            "vit_micro", "deit_micro", "mixer_micro", "convnext_micro", "swin_micro", "mobilenet_micro"]  # fmt: skip
OURS = FAMILIES[:6]
ALL = ["stage1", "stage2", "stage3", "stage4", "tokens", "penultimate", "logits"]


def micro(name: str = "resnet8", size: int = 16, **options):
    return build(preset(name), 10, size, **options)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_papers(name):
    with torch.device("meta"):
        assert count_parameters(build(preset(name), 100, 32)) == PARAMETERS[name]


@pytest.mark.parametrize("name", MMACS)
def test_macs_are_the_papers(name):
    with torch.device("meta"):
        assert round(count_macs(build(preset(name), 100, 32)) / 1e6, 1) == MMACS[name]


def test_macs_without_memory_equal_those_with():
    with torch.device("meta"):
        light = micro("vit_micro")
    assert count_macs(light) == count_macs(micro("vit_micro"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_same_words(name):
    model = micro(name).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    out = model(images, ALL)
    assert set(out.features) == set(ALL) and torch.equal(out.features["logits"], out.logits)
    assert torch.allclose(model(images).logits, out.logits, atol=1e-5)
    assert out.logits.shape == (3, 10) and out.extra_logits is None
    for stage in ALL[:4]:
        assert list(out.features[stage].shape[1:]) == model.stages()[stage]["shape"]
    sides = [model.stages()[s]["shape"][1] for s in ALL[:4]]
    assert sides == sorted(sides, reverse=True) and sides[-1] >= 1
    batch, count, width = out.features["tokens"].shape
    assert (batch, count) == (3, out.features["stage4"][0, 0].numel()) and width == out.features["stage4"].shape[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_makes_logits_of_the_penultimate(name):
    model = micro(name).eval()
    out = model(torch.rand(2, 3, 16, 16), ["penultimate"])
    assert out.features["penultimate"].ndim == 2
    assert torch.allclose(out.head(out.features["penultimate"]), out.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet8", "vit_micro", "deit_micro", "mobilenet_micro"])
def test_stages_do_not_change_training(name):
    model, images = micro(name), torch.rand(4, 3, 16, 16)
    twin = copy.deepcopy(model)
    plain, tapped = model(images).logits, twin(images, ["stage2", "stage4"])
    assert torch.allclose(plain, tapped.logits, atol=1e-5)
    plain.sum().backward()
    (tapped.logits.sum() + 0 * tapped.features["stage2"].sum()).backward()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is None or torch.allclose(mine.grad, its.grad, atol=1e-4)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    model = micro().eval()

    def fail(*_args):
        raise AssertionError("computed")

    monkeypatch.setattr(model.network, "forward_intermediates", fail)
    monkeypatch.setattr(model.network, "forward", lambda x: x.new_zeros(len(x), 10))
    model(torch.rand(1, 3, 16, 16))


def test_a_distillation_token_gives_logits_of_its_own_in_training():
    model, images = micro("deit_micro"), torch.rand(2, 3, 16, 16)
    out = model(images, ["stage4"])
    assert out.extra_logits.shape == (2, 10) and not torch.equal(out.extra_logits, out.logits)
    assert model.eval()(images).extra_logits is None
    mean = (out.logits + out.extra_logits) / 2
    assert torch.allclose(model(images).logits, mean, atol=1e-5)


def test_any_module_can_be_read_by_its_path():
    out = micro().eval()(torch.rand(2, 3, 16, 16), ["module:layer1.0.conv2", "stage2"])
    assert out.features["module:layer1.0.conv2"].shape == (2, 16, 16, 16)
    with pytest.raises(ValueError, match=r"no module 'layer1.0.conv9'.*layer1.0.conv"):
        micro()(torch.rand(1, 3, 16, 16), ["module:layer1.0.conv9"])


def test_a_feature_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"no feature 'stage5'.*stage1, stage2, stage3, stage4"):
        micro()(torch.rand(1, 3, 16, 16), ["stage5"])
    model = build({"name": "levit_128s"}, 10, 32)
    with pytest.raises(ValueError, match="only 3 stages"):
        model(torch.rand(1, 3, 32, 32), ["stage1"])


@pytest.mark.parametrize(
    ("reductions", "parts"),
    [
        ([2, 4, 8, 16, 32], [1, 2, 3, 4]),
        ([4, 8, 16, 32], [0, 1, 2, 3]),
        ([16] * 12, [2, 5, 8, 11]),
        ([16] * 6, [1, 2, 3, 5]),
        ([8, 16, 32], [0, 1, 2]),
        ([4, 4, 8, 8, 16, 16, 32], [1, 3, 5, 6]),
    ],
)
def test_stages_are_where_maps_shrink_or_quarters_of_the_depth(reductions, parts):
    assert pick_parts(reductions) == parts


def test_networks_are_built_for_small_images():
    vit = build(preset("vit_ti"), 10, 16)
    assert vit.built["args"] == {"img_size": 16, "patch_size": 4} and vit.network.pos_embed.shape[1] == 17
    small, large = build(preset("resnet18"), 10, 32), build(preset("resnet18"), 10, 96)
    assert small.built["stem"] == "small" and small.network.conv1.kernel_size == (3, 3)
    assert large.built["stem"] == "own" and large.network.conv1.kernel_size == (7, 7)
    resized = build({**preset("resnet18"), "preprocess": {"size": 96}}, 10, 32)
    assert (
        resized.built["stem"] == "own"
        and resized(torch.rand(1, 3, 32, 32), ["stage4"]).features["stage4"].shape[-1] == 3
    )


def test_width_and_depth_are_arguments():
    spec = preset("resnet20")
    narrow = build({**spec, "args": {**spec["args"], "width": 4}}, 10, 8)
    assert narrow.stages()["stage4"]["shape"][0] == 16


def test_gray_images_serve_a_colour_network():
    model = micro(in_channels=1).eval()
    gray = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(model(gray).logits, model(gray.expand(-1, 3, -1, -1)).logits)
    assert build(preset("resnet8"), 10, 16, in_channels=4)(torch.rand(2, 4, 16, 16)).logits.shape == (2, 10)


class Bare(nn.Module):
    """A network that knows nothing of kd."""

    def __init__(self, num_classes, in_channels, width=4):
        super().__init__()
        self.body, self.top = nn.Conv2d(in_channels, width, 3), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.top(self.body(x).mean((2, 3)))


def test_a_class_from_elsewhere_needs_only_a_forward():
    model = build({"name": "bare", "args": {"_target_": f"{__name__}.Bare", "width": 6}}, 10, 8)
    assert model(torch.rand(2, 3, 8, 8)).logits.shape == (2, 10) and model.stages() == {}
    with pytest.raises(ValueError, match=r"no intermediate maps.*module:PATH"):
        model(torch.rand(2, 3, 8, 8), ["stage1"])
    assert model(torch.rand(2, 3, 8, 8), ["module:body"]).features["module:body"].shape == (2, 6, 6, 6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "resnet1800"}, "no network 'resnet1800'.*resnet"),
        ({"name": "hf-hub:someone/else"}, "no network"),
        ({"name": "resnet18.nope"}, "no weights 'resnet18.nope'"),
        ({"name": "x", "args": {"_target_": "kd.models.cifar.ResNet", "depth": 21}}, "6 n [+] 2"),
        ({"name": "x", "args": {"_target_": "kd.models.cifar.ResNet", "dept": 20}}, "It takes depth, width"),
        ({"name": "x", "args": {"_target_": "kd.models.cifar.Nope"}}, "there is no such class"),
        ({"name": "x", "args": {"_target_": "os.system"}}, "not a network"),
        ({"name": "resnet18", "args": {"checkpoint_path": "a.pth"}}, "args.checkpoint_path"),
        ({"name": "resnet18", "args": {"nonsense": 1}}, "nonsense"),
        ({}, "needs a name"),
    ],
)
def test_what_cannot_be_built_is_said(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec, 10, 32)


def test_a_network_that_needs_more_pixels_says_what_to_type():
    with pytest.raises(ValueError, match=r"vgg11_bn cannot be built for 8x8.*preprocess.size=224"):
        build({"name": "vgg11_bn"}, 10, 8)


def test_folding_keeps_logits_and_stages():
    for name in (*OURS, "mobilenet_micro"):
        model = micro(name)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5), nn.init.uniform_(module.running_var, 0.5, 2)
        images = torch.rand(2, 3, 16, 16)
        folded = fold_batchnorm(model)
        assert folded.folded > 0 and model.training and not folded.training
        ours, theirs = model.eval()(images, ALL[:4]), folded(images, ALL[:4])
        for a, b in [(ours.logits, theirs.logits), *((ours.features[s], theirs.features[s]) for s in ALL[:4])]:
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.detach().abs().max())), name


def test_folding_leaves_networks_without_batch_norm_alone():
    assert fold_batchnorm(micro("vit_micro")).folded == 0


def test_a_branching_convolution_is_not_folded():
    class Branching(Bare):
        def __init__(self, num_classes, in_channels):
            super().__init__(num_classes, in_channels)
            self.norm = nn.BatchNorm2d(4)
            nn.init.constant_(self.norm.running_mean, 2.0)

        def forward(self, x):
            x = self.body(x)
            return self.top((x + self.norm(x)).mean((2, 3)))

    from kd.models import Classifier
    from kd.models.preprocess import Preprocess

    built = {"num_classes": 3, "image_size": 8, "in_channels": 3, "size": 8, "args": {}}
    model = Classifier(Branching(3, 3), Preprocess(8), {"name": "branching"}, built)
    folded, images = fold_batchnorm(model), torch.rand(2, 3, 8, 8)
    assert folded.folded == 0 and torch.equal(folded(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize("name", ["resnet8", "vit_micro"])
def test_export_takes_any_batch(name):
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images).logits

    model = micro(name).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    program = torch.export.export(Logits(model), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.allclose(program.module()(images[:2]), model(images[:2]).logits, atol=1e-5)


def test_compiled_gives_the_same_and_copies_start_uncompiled():
    model, images = micro().eval(), torch.rand(2, 3, 16, 16)
    before = model(images, ["stage3", "penultimate"])
    model.compile(backend="eager", fullgraph=True)
    after = model(images, ["stage3", "penultimate"])
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.features["stage3"], after.features["stage3"])
    assert copy.deepcopy(model)._read is not model._read


def test_a_copy_shares_nothing():
    model = micro("deit_micro")
    twin = copy.deepcopy(model)
    ours = {id(p) for p in model.parameters()}
    assert not any(id(p) in ours for p in (*twin.parameters(), *twin.head.parameters()))
    assert {id(p) for p in twin.head.parameters()} <= {id(p) for p in twin.parameters()}


def test_networks_in_bfloat16_are_fed_so():
    model = micro().eval()
    model.network.to(torch.bfloat16)
    assert model(torch.rand(2, 3, 16, 16)).logits.dtype == torch.bfloat16


def test_own_networks_do_not_import_timm():
    code = (
        "import sys; from kd.models import build; "
        "build({'name': 'resnet8', 'args': {'_target_': 'kd.models.cifar.ResNet', 'depth': 8}}, 10, 8); "
        "print([m for m in ('timm', 'torchvision', 'yaml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_presets_say_what_they_are():
    found = presets()
    assert set(PARAMETERS) <= set(found)
    for name, spec in found.items():
        assert spec["family"] in ("cnn", "vit", "mlp", "hybrid", "mobile"), name
    timm_names = [s["name"] for s in found.values() if "_target_" not in s.get("args", {})]
    import timm

    assert [n for n in timm_names if not timm.is_model(n)] == []
