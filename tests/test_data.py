"""Laws of a loaded data set: splits, order, stores and streams, on tiny folders made on the spot."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest_data import make_folder, spec_of

from kd.data import load
from kd.data.partition import partition, stratified_order


def arrays(split, **kwargs):
    batches = list(split.epoch(2, 8, 5, **kwargs))
    return torch.cat([b.images for b in batches]), torch.cat([b.index for b in batches])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), per_class=20, size=(10, 10))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of several shapes and formats."""
    return make_folder(tmp_path_factory.mktemp("photos"), per_class=8, size=None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def digits(store, **kwargs):
    return load({"_target_": "kd.data.sources.digits", "name": "digits", "mirror": False, **kwargs}, store_dir=store)


def test_digits_as_documented(store):
    data = digits(store)
    assert [len(data.train), len(data.val), len(data.test)] == [1257, 180, 360]
    assert (data.image_size, data.channels, data.num_classes, data.num_samples, data.mirror) == (16, 1, 10, 1437, False)
    assert data.train.images.shape == (1257, 1, 16, 16) and data.train.images.max() == 255
    for split in (data.train, data.val, data.test):
        counts = torch.bincount(split.targets, minlength=10)
        assert counts.max() - counts.min() <= 0.08 * len(split) / 10 + 2


def test_digits_are_scikit_learns(store):
    from sklearn.datasets import load_digits

    bunch, data = load_digits(), digits(store, image_size=8)
    wanted = sorted((t, tuple(i.astype(int).ravel())) for i, t in zip(bunch.images, bunch.target, strict=True))
    parts = (data.train, data.val, data.test)
    images, targets = torch.cat([p.images for p in parts]), torch.cat([p.targets for p in parts])
    back = (images[:, 0].double() * 16 / 255).round().int().flatten(1)
    assert sorted((int(t), tuple(i.tolist())) for i, t in zip(back, targets, strict=True)) == wanted


def test_folder_as_documented(root, store):
    data = load(spec_of(root), store_dir=store)
    assert data.classes == ["cat", "dog", "owl"] and data.image_size == 10 and data.channels == 3
    assert (len(data.train), len(data.val), len(data.test), data.num_samples) == (54, 6, 9, 60)
    assert data.train.images.dtype == torch.uint8 and data.train.targets.dtype == torch.int64
    assert torch.bincount(data.val.targets).tolist() == [2, 2, 2]
    assert sorted(data.train.index.tolist() + data.val.index.tolist()) == list(range(60))


def test_pixels_are_the_files(root, store):
    from PIL import Image

    data, files = load(spec_of(root), store_dir=store), sorted((root / "train").rglob("*.png"))
    for image, index in zip(data.train.images, data.train.index.tolist(), strict=True):
        with Image.open(files[index]) as file:
            assert image.permute(1, 2, 0).flatten().tolist() == list(file.convert("RGB").tobytes())


def test_a_val_folder_is_the_validation_split(tmp_path, store):
    root = make_folder(tmp_path, per_class=4, val=True)
    data = load(spec_of(root), store_dir=store)
    assert (len(data.train), len(data.val)) == (12, 6)
    assert load(spec_of(root, val_fraction=0.0), store_dir=store).val is None


def test_a_folder_with_a_test_split_alone_can_be_evaluated(tmp_path, store):
    root = make_folder(tmp_path, per_class=4)
    shutil.rmtree(root / "train")
    data = load(spec_of(root), store_dir=store, need_train=False)
    assert data.train is None and data.val is None and len(data.test) == 9 and data.num_samples == 0


def test_image_size_auto(photos, root, store):
    assert load(spec_of(photos), store_dir=store).image_size == 224
    data = load(spec_of(root, image_size=7), store_dir=store)
    assert data.image_size == 7 and data.train.images.shape[1:] == (3, 7, 7)


def test_large_images_are_resized_and_cropped_in_the_middle(tmp_path, store):
    from PIL import Image

    picture = Image.new("RGB", (90, 30), (255, 0, 0))
    picture.paste((0, 0, 255), (30, 0, 60, 30))  # the middle third is blue
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            picture.save(tmp_path / split / name / "0.png")
    data = load(spec_of(tmp_path, image_size=15, val_fraction=0), store_dir=store)
    assert data.train.images[0, 2, :, 1:-1].min() > 250 and data.train.images[0, 0, :, 1:-1].max() < 5


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_train_fractions_are_nested_and_stratified(store, fraction):
    small, whole = digits(store, train_fraction=fraction), digits(store)
    larger = digits(store, train_fraction=min(1.0, fraction * 1.1))
    assert set(small.train.index.tolist()) <= set(larger.train.index.tolist()) <= set(whole.train.index.tolist())
    assert abs(len(small.train) - fraction * 1257) <= 1
    assert torch.equal(small.val.index, whole.val.index) and small.num_samples == whole.num_samples == 1437
    share = torch.bincount(small.train.targets, minlength=10) - fraction * torch.bincount(whole.train.targets)
    assert share.abs().max() <= 1


def test_validation_follows_from_split_seed_alone(store):
    first, again, other = digits(store), digits(store, train_fraction=0.2), digits(store, split_seed=1)
    assert torch.equal(first.val.index, again.val.index)
    assert not torch.equal(first.val.index, other.val.index)
    assert digits(store, val_fraction=0).val is None


def test_every_class_has_an_image_in_validation_and_in_training():
    labels = torch.tensor([0] * 500 + [1] * 2 + [2] * 3)
    train, val = partition(labels, ["a", "b", "c"], {"val_fraction": 0.01, "train_fraction": 0.01}, 505, False)
    assert labels[val].unique().tolist() == labels[train].unique().tolist() == [0, 1, 2]
    assert not set(train.tolist()) & set(val.tolist())


def test_stratified_order_is_in_proportion_from_any_beginning():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    order = stratified_order(labels, 0, "x")
    for n in range(3, 101):
        counts = torch.bincount(labels[order[:n]], minlength=3)
        assert (counts - n * torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 1.7
    assert order.sort().values.tolist() == list(range(100))


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_gives_every_image_once_in_an_order_of_its_own(root, store, epoch):
    split = load(spec_of(root), store_dir=store).train
    batches = list(split.epoch(epoch, 9, seed=3))
    index = torch.cat([b.index for b in batches])
    assert len(batches) == split.steps(9) == 6 and sorted(index.tolist()) == sorted(split.index.tolist())
    other = torch.cat([b.index for b in split.epoch(epoch + 1, 9, seed=3)])
    assert not torch.equal(index, other)
    assert [b.epoch for b in batches] == [epoch + i / 6 for i in range(6)] and {b.seed for b in batches} == {3}


def test_batches_carry_the_targets_of_their_images(root, store):
    split = load(spec_of(root), store_dir=store).train
    where = {int(i): p for p, i in enumerate(split.index)}
    for batch in split.epoch(0, 8, 0):
        rows = torch.tensor([where[int(i)] for i in batch.index])
        assert torch.equal(split.images[rows], batch.images) and torch.equal(split.targets[rows], batch.targets)


def test_an_epoch_can_be_entered_in_the_middle(root, store):
    split = load(spec_of(root), store_dir=store).train
    whole, rest = list(split.epoch(1, 8, 0)), list(split.epoch(1, 8, 0, start_step=4))
    assert len(rest) == len(whole) - 4 and [b.epoch for b in rest] == [b.epoch for b in whole[4:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[4:], strict=True))


def test_short_last_batches(root, store):
    data = load(spec_of(root), store_dir=store)
    assert [len(b.index) for b in data.train.epoch(0, 50, 0)] == [50]
    assert [len(b.index) for b in data.train.epoch(0, 500, 0)] == [54] and data.train.steps(500) == 1
    assert [len(b.index) for b in data.test.batches(4)] == [4, 4, 1]
    assert torch.cat([b.index for b in data.test.batches(4)]).tolist() == list(range(9))


def test_cycle_epochs_repeats_the_order(root, store):
    split = load(spec_of(root), store_dir=store).train
    one, two = list(split.epoch(1, 8, 0)), list(split.epoch(4, 8, 0, cycle_epochs=3))
    assert torch.equal(one[0].index, two[0].index) and two[0].epoch == 4


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streams_give_the_batches_of_the_store(photos, store, workers):
    kept = load(spec_of(photos, image_size=20), store_dir=store)
    spec = spec_of(photos, image_size=20, memory_gib=0, workers=workers)
    streamed, state = load(spec, store_dir=store), torch.random.get_rng_state()
    for one, two in zip(arrays(kept.train), arrays(streamed.train), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(streamed.train.images, kept.train.images) and torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(next(streamed.test.batches(3)).images, next(kept.test.batches(3)).images)
    assert streamed.digest == kept.digest


def test_batches_are_channels_last_in_memory(root, store):
    data = load(spec_of(root), store_dir=store)
    assert next(data.train.epoch(0, 8, 0)).images.is_contiguous(memory_format=torch.channels_last)


def test_an_own_source_by_dotted_path(tmp_path, store):
    (tmp_path / "my_source.py").write_text(
        "import torch\nfrom kd.data import Items, Source\n"
        "def noise(spec):\n"
        "    images = torch.arange(40 * 12 * 12).view(40, 12, 12).to(torch.uint8)\n"
        "    return Source(['a', 'b'], {'train': Items(images, [0, 1] * 20)}, channels=1)\n"
    )
    code = (
        "from kd.data import load\n"
        f"d = load({{'_target_': 'my_source.noise'}}, store_dir={str(store)!r})\n"
        "print(len(d.train), len(d.val), d.test, d.image_size, d.channels)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert out.stdout.strip() == "36 4 None 12 1", out.stderr
