"""What a classifier does to images before its network sees them."""

import pytest
import torch

from kd.models import build
from kd.models.catalogue import preset
from kd.models.preprocess import Preprocess, fit


def test_uint8_and_fractions_are_the_same_image():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    wanted = (images / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    preprocess = Preprocess(8)
    assert torch.allclose(preprocess(images), wanted, atol=1e-6)
    assert torch.equal(preprocess(images), preprocess(images.float() / 255))


def test_other_sizes_become_the_view_first():
    images = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    preprocess = Preprocess(16)
    assert preprocess(images).shape == (2, 3, 16, 16)
    assert torch.equal(preprocess(images), preprocess(fit(images, 16)))
    assert torch.allclose(preprocess(images), preprocess(images.float() / 255), atol=0.02)


def test_the_view_is_the_data_sets():
    decode = pytest.importorskip("kd.data.decode")
    for height, width in ((20, 30), (9, 8), (64, 33)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        assert torch.equal(fit(image[None], 16)[0], decode.fit(image, 16))


def test_a_size_of_its_own_resizes_and_crops_only_larger_views():
    up, down = Preprocess(32, 64, crop_pct=0.5), Preprocess(64, 32, crop_pct=0.5)
    images = torch.zeros(1, 3, 64, 64)
    images[..., 16:48, 16:48] = 1  # the middle half
    assert up(images[..., ::2, ::2]).shape == (1, 3, 64, 64)
    seen = down(images)
    assert seen.shape == (1, 3, 32, 32) and (seen > 0).all()  # nothing but the middle
    assert (up(images[..., ::2, ::2]) < 0).any()


def test_bicubic_stays_within_pixel_values():
    images = (torch.rand(2, 3, 8, 8) > 0.5).float()
    out = Preprocess(8, 32, mean=[0.0] * 3, std=[1.0] * 3, interpolation="bicubic")(images)
    assert out.min() >= 0 and out.max() <= 1


def test_constants_are_not_weights_and_survive_a_cast():
    model = build(preset("resnet8"), 10, 8)
    assert not [k for k in model.state_dict() if k.startswith("preprocess")]
    before = model.preprocess.scale.clone()
    assert torch.equal(model.to(torch.bfloat16).preprocess.scale, before)


def test_the_networks_own_constants_are_used_unless_told_otherwise():
    assert build(preset("vit_micro"), 10, 16).preprocess.mean == (0.5, 0.5, 0.5)
    assert build(preset("resnet8"), 10, 16).preprocess.mean == (0.485, 0.456, 0.406)
    own = {**preset("resnet8"), "preprocess": {"mean": [0.1, 0.2, 0.3], "std": None, "size": None}}
    assert build(own, 10, 16).preprocess.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"std": [0, 1, 1]}, "positive std"),
        ({"mean": [0.5, 0.5]}, "2 values for 3 channels"),
        ({"interpolation": "lanczos"}, "bilinear, bicubic, nearest"),
        ({"crop_pct": 1.5}, "crop_pct"),
    ],
)
def test_constants_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        build({**preset("resnet8"), "preprocess": given}, 10, 16)


def test_the_wrong_number_of_channels_is_said():
    with pytest.raises(ValueError, match="5 channels, the network takes 3"):
        Preprocess(8)(torch.rand(1, 5, 8, 8))
