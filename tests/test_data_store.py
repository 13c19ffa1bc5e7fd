"""Laws of the store: decoded once, shared, never half-written; the digest is the content's."""

import json
import multiprocessing
import os
import shutil

import pytest
import torch
from conftest_data import make_folder, spec_of

from kd.data import digest, load, store


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / "images", per_class=5, extension="jpg")


@pytest.fixture
def place(tmp_path):
    return tmp_path / "store"


def test_equal_content_elsewhere_has_an_equal_digest_and_the_same_store(root, place, tmp_path):
    first = load(spec_of(root), store_dir=place)
    shutil.copytree(root, tmp_path / "copy")
    second = load(spec_of(tmp_path / "copy"), store_dir=place)
    assert first.digest == second.digest and len(list(place.glob("*.u8"))) == 1
    assert torch.equal(first.train.images, second.train.images)


def test_another_pixel_name_order_or_class_is_another_digest(root, place):
    seen = {load(spec_of(root), store_dir=place).digest}
    image = root / "train" / "cat" / "0.jpg"
    (root / "train" / "cat" / "1.jpg").write_bytes(image.read_bytes())
    seen.add(load(spec_of(root), store_dir=place).digest)
    image.rename(image.with_name("9.jpg"))
    seen.add(load(spec_of(root), store_dir=place).digest)
    for split in ("train", "test"):
        (root / split / "owl").rename(root / split / "yak")
    seen.add(load(spec_of(root), store_dir=place).digest)
    assert len(seen) == 4


def test_a_rewritten_file_of_the_same_size_and_time_is_seen(root, place):
    first, image = load(spec_of(root), store_dir=place), root / "train" / "cat" / "0.jpg"
    before, data = image.stat(), bytearray(image.read_bytes())
    data[-20] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(spec_of(root), store_dir=place).digest != first.digest


def test_a_second_start_reads_no_image(root, place, monkeypatch):
    first = load(spec_of(root), store_dir=place)
    monkeypatch.setattr(digest, "_read", None)
    monkeypatch.setattr(store, "_build", None)
    again = load(spec_of(root, train_fraction=0.5), store_dir=place)
    assert again.digest == first.digest and len(again.train) == 6


def test_each_size_has_a_store_of_its_own_and_one_digest(root, place):
    sizes = [load(spec_of(root, image_size=size), store_dir=place) for size in (8, 9)]
    assert len(list(place.glob("*.u8"))) == 2 and sizes[0].digest == sizes[1].digest


def test_a_store_that_was_cut_off_is_built_again(root, place):
    whole = load(spec_of(root), store_dir=place).train.images.clone()
    file = next(place.glob("*.u8"))
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(load(spec_of(root), store_dir=place).train.images, whole)
    next(p for p in place.glob("*.json") if not p.name.startswith("content")).unlink()
    assert torch.equal(load(spec_of(root), store_dir=place).train.images, whole)


def test_a_failed_write_leaves_nothing_behind(root, place, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            load(spec_of(root), store_dir=place)
    assert not [f for f in place.iterdir() if f.suffix in (".u8", ".tmp")]
    assert load(spec_of(root), store_dir=place).num_samples == 15


def test_a_writer_cannot_spoil_the_file(root, place):
    images = load(spec_of(root), store_dir=place).train._pool.images
    before = images[0].clone()
    images[0] = 0
    assert torch.equal(load(spec_of(root), store_dir=place).train._pool.images[0], before)


def build_and_note(root, place, results):
    build = store._build

    def noted(*args):
        with open(place.parent / "built.log", "a") as file:
            file.write("x")
        build(*args)

    store._build = noted
    results.put(load(spec_of(root), store_dir=place).digest)


def test_many_processes_decode_once(root, place):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=build_and_note, args=(root, place, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join(60)
    assert (place.parent / "built.log").read_text() == "x"


def test_files_are_written_beside_their_place(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        store.os, "replace", lambda a, b: seen.append((a.parent == b.parent, json.loads(a.read_text())))
    )
    store.write_atomically(tmp_path / "a.json", b"[1]")
    assert seen == [(True, [1])] and not list(tmp_path.iterdir())
