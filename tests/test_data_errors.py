"""What a user's mistakes and broken files say: one error that names the file or the key, and what to type."""

import pytest
import torch
from conftest_data import make_folder, spec_of

from kd.data import load


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / "images", per_class=6, extension="jpg")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def truncate(root):
    file = root / "train" / "dog" / "2.jpg"
    file.write_bytes(file.read_bytes()[:-60])
    return file


def fails(spec, store, *words, error=ValueError):
    with pytest.raises(error) as caught:
        load(spec, store_dir=store)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["truncated", "text", "empty", "dangling"])
def test_a_broken_image_is_named(root, store, content):
    file = truncate(root)
    if content == "text":
        file.write_text("hello")
    if content == "empty":
        file.write_bytes(b"")
    if content == "dangling":
        file.unlink()
        file.symlink_to("nowhere.jpg")
    for _ in range(2):  # the second time from the store's notes
        fails(spec_of(root), store, str(file), "dataset.on_error=skip")


def test_several_broken_images_are_counted(root, store):
    truncate(root)
    (root / "test" / "owl" / "0.jpg").write_bytes(b"x")
    fails(spec_of(root), store, "(and 1 more)")


@pytest.mark.parametrize("memory_gib", [8, 0])
def test_skip_leaves_broken_images_out_and_lists_them(root, store, memory_gib):
    file = truncate(root)
    (root / "train" / "cat" / "notes.txt").write_text("hello")
    data = load(spec_of(root, on_error="skip", memory_gib=memory_gib), store_dir=store)
    assert data.num_samples == 17 and len(data.train) + len(data.val) == 17
    assert len(data.skipped) == 2 and data.skipped[0].startswith(f"{file}: broken image")
    assert data.skipped[1].endswith("notes.txt: not an image")
    assert torch.cat([b.images for b in data.train.batches(4)]).flatten(1).any(1).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_names_a_broken_image_when_its_turn_comes(root, store, workers):
    file = truncate(root)
    data = load(spec_of(root, memory_gib=0, workers=workers, val_fraction=0), store_dir=store)
    with pytest.raises(ValueError, match=r"on_error=skip") as caught:
        list(data.train.epoch(0, 4, 0))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_file_among_the_images_is_named(root, store):
    (root / "train" / "cat" / "notes.txt").write_text("hello")
    fails(spec_of(root), store, "notes.txt", "not an image", "dataset.on_error=skip")


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"])
def test_litter_is_ignored(root, store, name):
    (root / "train" / "cat" / name).write_text("x")
    assert load(spec_of(root), store_dir=store).num_samples == 18


def test_a_class_without_images_is_named(root, store):
    (root / "train" / "emu").mkdir()
    fails(spec_of(root), store, "emu", "no images")
    fails(spec_of(root, on_error="skip"), store, "emu", "no images")


def test_a_missing_folder(root, store):
    fails(spec_of(root / "nowhere"), store, "nowhere", "dataset.root=PATH", error=FileNotFoundError)
    fails(spec_of(None), store, "dataset.root=PATH")


def test_a_folder_without_train(root, store):
    fails(spec_of(root / "train"), store, "no train/", "cat, dog, owl", "dataset.root=PATH", error=FileNotFoundError)


def test_a_test_class_that_training_does_not_have(root, store):
    (root / "test" / "emu").mkdir()
    fails(spec_of(root), store, "emu", "train/ does not have")


def test_a_class_of_one_image_cannot_be_divided(root, store):
    for file in sorted((root / "train" / "cat").iterdir())[1:]:
        file.unlink()
    fails(spec_of(root), store, "'cat'", "dataset.val_fraction=0")
    assert len(load(spec_of(root, val_fraction=0), store_dir=store).train) == 13


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_fraction", 0),
        ("train_fraction", 1.2),
        ("val_fraction", 1.0),
        ("image_size", "big"),
        ("on_error", "ignore"),
    ],
)
def test_values_out_of_range_are_named(root, store, key, value):
    fails(spec_of(root, **{key: value}), store, f"dataset.{key}=", "expected")


@pytest.mark.parametrize("target", ["kd.data.sources.nope", "nowhere.images", "nope"])
def test_an_unknown_source_is_named(store, target):
    fails({"_target_": target}, store, target, "source(spec)")
