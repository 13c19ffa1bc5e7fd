"""Laws of the augmented view: counters only, equal to torchvision image by image, fast enough to be forgotten."""

import pytest
import torch

from kd.contracts import Batch
from kd.data import View, counters, geometry, mixing, policies

STRONG = {"crop_padding": 0.125, "flip": True, "color_jitter": 0.4, "trivial": True, "erasing": 0.5}
RESIZED = {"random_resized_crop": [0.2, 1.0], "flip": True, "randaugment": "m9-n2"}
MIXED = {"flip": True, "mixup": 0.8, "cutmix": 1.0}


def batch(n=32, size=16, *, channels=3, epoch=3.5, seed=1, start=0):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, channels, size, size), dtype=torch.uint8, generator=generator)
    index = torch.arange(start, start + n)
    return Batch(images[index], index % 10, index, epoch=epoch, seed=seed)


def select(b, rows):
    return Batch(b.images[rows], b.targets[rows], b.index[rows], b.epoch, b.seed)


def view(augment, size=16, mirror=True):
    return View(augment, image_size=size, mirror=mirror, num_classes=10)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [{}, STRONG, RESIZED, MIXED])
def test_gives_floats_in_range_and_keeps_the_shape(augment, channels):
    out = view(augment)(batch(channels=channels))
    assert out.images.dtype == torch.float32 and out.images.shape == (32, channels, 16, 16)
    assert out.images.min() >= 0 and out.images.max() <= 1
    assert out.images.is_contiguous() or out.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augment", [STRONG, RESIZED])
def test_an_image_is_augmented_the_same_in_any_company(augment):
    b, rows = batch(), torch.tensor([5, 31, 0, 7, 7])
    alone, together = view(augment)(select(b, rows)), view(augment)(b)
    assert torch.equal(alone.images, together.images[rows])


@pytest.mark.parametrize("augment", [STRONG, RESIZED, MIXED])
def test_depends_on_seed_and_whole_epoch_only(augment):
    v, first = view(augment), view(augment)(batch()).images
    assert torch.equal(first, v(batch(epoch=3.0)).images)
    assert torch.equal(first, view(augment)(batch(epoch=3.99)).images)
    assert not torch.equal(first, v(batch(epoch=4.0)).images)
    assert not torch.equal(first, v(batch(seed=2)).images)


@pytest.mark.parametrize("augment", [STRONG, MIXED])
def test_leaves_the_global_generators_and_the_batch_alone(augment):
    b, state = batch(), torch.random.get_rng_state()
    before = b.images.clone()
    view(augment)(b)
    assert torch.equal(state, torch.random.get_rng_state()) and torch.equal(b.images, before)
    assert b.targets.dtype == torch.int64


def test_a_second_stream_is_another_view_with_the_same_mixing():
    b, v = batch(), view({**STRONG, "mixup": 1.0})
    first, second = v(b), v(b, stream=1)
    assert not torch.equal(first.images, second.images)
    assert torch.equal(first.targets, second.targets)


def test_cycle_epochs_repeats_the_views():
    v = view({**STRONG, "cycle_epochs": 3})
    assert torch.equal(v(batch(epoch=1.2)).images, v(batch(epoch=7.9)).images)
    assert not torch.equal(v(batch(epoch=1.2)).images, v(batch(epoch=2)).images)


def test_clean_is_the_image_itself():
    b = batch()
    assert torch.equal(view(MIXED).clean(b).images, b.images / 255)
    assert torch.equal(view({})(b).images, b.images / 255)


def test_flip_only_where_a_mirrored_image_keeps_its_class():
    b = batch()
    assert torch.equal(view({"flip": True}, mirror=False)(b).images, b.images / 255)
    flipped = view({"flip": True})(b).images
    straight = (flipped == b.images / 255).flatten(1).all(1)
    mirrored = (flipped == b.images.flip(3) / 255).flatten(1).all(1)
    assert (straight | mirrored).all() and 4 < straight.sum() < 28


def test_crop_and_flip_equal_a_loop_over_images():
    b = batch(size=32)
    draws = counters.uniform(7, 2, b.index, 3)
    out = geometry.crop_flip(b.images, 4, True, draws)
    for image, got, (x, y, flip) in zip(b.images, out, draws.tolist(), strict=True):
        window = torch.nn.functional.pad(image, (4, 4, 4, 4))[:, int(9 * y) :, int(9 * x) :][:, :32, :32]
        assert torch.equal(got, window.flip(2) if flip < 0.5 else window)


def test_crop_offsets_are_uniform():
    draws = counters.uniform(0, 0, torch.arange(20_000), 3)
    counts = torch.bincount((draws[:, 0] * 9).long(), minlength=9)
    assert counts.shape == (9,) and (counts - 20_000 / 9).abs().max() < 250


@pytest.mark.parametrize("size", [16, 32, 96])
def test_resized_crop_equals_torchvisions(size):
    from torchvision.transforms.v2 import functional as tv

    b = batch(size=size)
    draws = counters.uniform(3, 0, b.index, geometry.BOX_DRAWS)
    out = geometry.resized_crop(b.images, (0.08, 1.0), draws)
    boxes = torch.stack(geometry.boxes(size, size, (0.08, 1.0), (3 / 4, 4 / 3), draws), 1)
    for image, got, box in zip(b.images, out, boxes.tolist(), strict=True):
        wanted = tv.resized_crop(image, *box, size=[size, size], antialias=True)
        assert (got.int() - wanted.int()).abs().max() <= 1


def test_boxes_fit_and_have_the_wanted_area():
    draws = counters.uniform(0, 0, torch.arange(5000), geometry.BOX_DRAWS)
    top, left, height, width = geometry.boxes(32, 32, (0.08, 1.0), (3 / 4, 4 / 3), draws)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    assert 0.45 < (height * width / 1024).mean() < 0.54  # large boxes of another ratio do not fit


def reference(name, image, amount):
    from torchvision.transforms.v2 import RandAugment

    camel = {"autocontrast": "AutoContrast"}.get(name) or "".join(part.capitalize() for part in name.split("_"))
    apply = RandAugment()._apply_image_or_video_transform
    return apply(image, camel, amount, interpolation="nearest", fill={})


def photo(n=24, size=24, channels=3):
    """Smooth images: nearest-neighbour ties are rare, and all gray levels occur."""
    noise = torch.rand(n, channels, 5, 5, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [n for n in policies._TRIVIAL if n != "identity"])
@pytest.mark.parametrize("space", ["_RAND", "_TRIVIAL"])
def test_each_operation_equals_torchvisions(space, name, channels):
    op, strengths, signed = getattr(policies, space)[name]
    images = photo(channels=channels)
    amount = strengths(24)[torch.arange(len(images)) * 30 // (len(images) - 1)]
    amount = torch.where(torch.arange(len(images)) % 2 == 0, -amount, amount) if signed else amount
    out = op(images, amount[:, None, None, None])
    for image, got, value in zip(images, out, amount.tolist(), strict=True):
        wanted = reference(name, image, value)
        geometric = name.split("_")[0] in ("shear", "translate", "rotate")
        if geometric:  # a tie between two neighbours may be rounded the other way
            assert (got != wanted).float().mean() < 0.02
        else:
            assert (got.int() - wanted.int()).abs().max() <= 1


def test_magnitudes_are_torchvisions():
    from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide

    for ours, theirs in ((policies._RAND, RandAugment), (policies._TRIVIAL, TrivialAugmentWide)):
        table = theirs._AUGMENTATION_SPACE
        assert [name.replace("_", "") for name in ours] == [name.lower() for name in table]
        for (_, strengths, signed), (wanted, wanted_signed) in zip(ours.values(), table.values(), strict=True):
            values = wanted(31, 32, 32)
            assert signed == wanted_signed
            assert values is None or torch.allclose(strengths(32), values.float())


def test_every_operation_is_drawn():
    draws = counters.uniform(0, 0, torch.arange(2800), 3)
    counts = torch.bincount((draws[:, 0] * 14).long(), minlength=14)
    assert counts.min() > 140 and counts.max() < 270


@pytest.mark.parametrize("text", ["m9", "m31-n2", "9-2", "m9-n0"])
def test_randaugment_must_be_spelt_right(text):
    with pytest.raises(ValueError, match="such as m9-n2"):
        view({"randaugment": text})


def test_jitter_of_zero_strength_changes_nothing():
    images = photo()
    assert torch.equal(policies.color_jitter(images, 0.0, torch.rand(len(images), 3)), images)


def test_erasing_takes_boxes_of_its_share_of_the_images():
    b = batch(64)
    out = view({"erasing": 0.25})(b).images
    changed = (out != b.images / 255).any(1)
    assert 6 <= changed.flatten(1).any(1).sum() <= 28
    assert (out[changed[:, None].expand_as(out)] == 0.5).all()


@pytest.mark.parametrize("augment", [{"mixup": 1.0}, {"cutmix": 1.0}, MIXED])
@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_mixing_pairs_are_the_same_for_every_even_batch_size(augment, size):
    v, whole = view(augment), view(augment)(batch(32))
    parts = [v(batch(size, start=start)) for start in range(0, 32, size)]
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
    assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)


def test_the_last_image_of_an_odd_batch_is_not_mixed():
    b = batch(7)
    out = view({"mixup": 1.0})(b)
    assert torch.equal(out.images[6], b.images[6] / 255) and out.targets[6].max() == 1
    assert out.targets[:6].max() < 1


@pytest.mark.parametrize("augment", [{"mixup": 0.4}, {"cutmix": 1.0}, MIXED])
def test_targets_say_what_is_in_the_image(augment):
    b = batch(32)
    b.images = (b.targets * 25).to(torch.uint8)[:, None, None, None].expand(32, 3, 16, 16).contiguous()
    out = view(augment)(b)
    assert torch.allclose(out.targets.sum(1), torch.ones(32))
    expected = (out.targets * torch.arange(10) * 25 / 255).sum(1)
    assert torch.allclose(out.images.mean((1, 2, 3)), expected, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 2.0, 8.0])
def test_mixing_coefficients_follow_the_beta_distribution(alpha):
    beta = pytest.importorskip("scipy.stats").beta
    p = torch.linspace(0, 1, 8192, dtype=torch.float64)
    wanted = torch.from_numpy(beta.ppf(p.numpy(), alpha, alpha))
    assert (mixing.beta_quantiles(alpha) - wanted).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ({"crop_pading": 0.1}, "crop_pading"),
        ({"crop_padding": 4}, "from 0 to 1"),
        ({"mixup": -1.0}, "mixup"),
        ({"random_resized_crop": [1.0, 0.5]}, "random_resized_crop"),
        ({"crop_padding": 0.1, "random_resized_crop": [0.5, 1.0]}, "the same work"),
        ({"trivial": True, "randaugment": "m9-n2"}, "the same work"),
        ({"teacher_view": "sane"}, "same, independent or clean"),
        ({"cycle_epochs": 0}, "cycle_epochs"),
    ],
)
def test_settings_that_make_no_sense_are_named(augment, words):
    with pytest.raises(ValueError, match=words):
        view(augment)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("augment", [STRONG, RESIZED, MIXED])
def test_cuda_draws_what_the_cpu_draws(augment):
    b = batch()
    there = view(augment)(Batch(b.images.cuda(), b.targets.cuda(), b.index.cuda(), b.epoch, b.seed))
    here = view(augment)(b)
    assert ((there.images.cpu() - here.images).abs() > 2 / 255).float().mean() < 0.02
