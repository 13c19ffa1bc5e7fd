"""torchvision's and Hugging Face's sets, in their formats on the disk, made on the spot; no network."""

import gzip
import pickle
import struct

import pytest
import torch

from kd.data import load


def spec(name, root, **changes):
    return {"name": name, "_target_": f"kd.data.vision.{name}", "root": str(root), "download": False, **changes}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()


def make_cifar(root, classes):
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir()
    names = [f"class {n}" for n in range(classes)]
    labels, key = [n % classes for n in range(2 * classes)], "labels" if classes == 10 else "fine_labels"
    parts = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    for part in parts:
        (folder / part).write_bytes(pickle.dumps({"data": pixels(2 * classes, 3072), key: labels}))
    meta, what = ("batches.meta", "label_names") if classes == 10 else ("meta", "fine_label_names")
    (folder / meta).write_bytes(pickle.dumps({what: names}))


@pytest.mark.parametrize(("classes", "train"), [(10, 100), (100, 200)])
def test_cifar(tmp_path, store, monkeypatch, classes, train):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    make_cifar(tmp_path, classes)
    data = load(spec(f"cifar{classes}", tmp_path), store_dir=store)
    assert (data.num_classes, data.image_size, data.channels, data.num_samples) == (classes, 32, 3, train)
    assert len(data.val) == max(train // 10, classes) and len(data.test) == 2 * classes
    wanted = torch.from_numpy(pixels(2 * classes, 3072)).view(-1, 3, 32, 32)
    assert torch.equal(data.test.images, wanted)


def test_fashion_mnist(tmp_path, store):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, count, 28, 28) + pixels(count, 28, 28).tobytes()
        )
        labels = bytes(n % 10 for n in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)
        with gzip.open(raw / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(labels)
    data = load(spec("fashion_mnist", tmp_path), store_dir=store)
    assert (data.num_classes, data.image_size, data.channels) == (10, 28, 1)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 20) and "Sneaker" in data.classes


def save_photo(path, size=(30, 20)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(*size, 3)).save(path)


def test_oxford_iiit_pet(tmp_path, store):
    base = tmp_path / "oxford-iiit-pet"
    names = [f"{breed}_{n}" for breed in ("Abyssinian", "beagle") for n in range(3)]
    for name in names:
        save_photo(base / "images" / f"{name}.jpg")
    (base / "annotations").mkdir()
    for split in ("trainval", "test"):
        lines = [f"{name} {1 + (n >= 3)} 1 1" for n, name in enumerate(names)]
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    data = load(spec("oxford_iiit_pet", tmp_path), store_dir=store)
    assert data.classes == ["Abyssinian", "Beagle"] and data.image_size == 224
    assert (len(data.train), len(data.val), len(data.test)) == (4, 2, 6)


def test_flowers102(tmp_path, store, monkeypatch):
    from scipy.io import savemat

    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5=None: True)
    base = tmp_path / "flowers-102"
    for number in range(1, 307):
        path = base / "jpg" / f"image_{number:05d}.jpg"
        save_photo(path) if number == 1 else path.write_bytes((base / "jpg" / "image_00001.jpg").read_bytes())
    savemat(base / "imagelabels.mat", {"labels": [n % 102 + 1 for n in range(306)]})
    parts = {name: list(range(1 + 102 * n, 103 + 102 * n)) for n, name in enumerate(("trnid", "valid", "tstid"))}
    savemat(base / "setid.mat", parts)
    data = load(spec("flowers102", tmp_path, image_size=16), store_dir=store)
    assert (data.num_classes, len(data.train), len(data.val), len(data.test)) == (102, 102, 102, 102)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "oxford_iiit_pet", "flowers102"])
def test_a_missing_network_names_the_ways_out(tmp_path, store, monkeypatch, name):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for download in (True, False):
        with pytest.raises(FileNotFoundError, match="Three ways out") as caught:
            load(spec(name, tmp_path / name, download=download), store_dir=store)
        assert "dataset.root=PATH" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Two Parquet files as on the hub: train with 12 images of two classes, test with 4."""
    datasets = pytest.importorskip("datasets")
    import io

    from PIL import Image

    def rows(count, start):
        for n in range(count):
            file = io.BytesIO()
            Image.fromarray(pixels(16, 16, 3) // (n + start + 1)).save(file, "PNG")
            yield {"img": {"bytes": file.getvalue(), "path": None}, "label": n % 2}

    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split, count, start in (("train", 12, 0), ("test", 4, 20)):
        part = datasets.Dataset.from_list(list(rows(count, start)), features=features)
        part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def hf(root, **changes):
    return {"name": "hf", "_target_": "kd.data.hf.hub", "root": str(root), **changes}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_a_folder_of_parquet(parquet, store):
    data = load(hf(parquet), store_dir=store)
    assert data.classes == ["no", "yes"] and data.image_size == 16 and data.channels == 3
    assert (len(data.train), len(data.val), len(data.test)) == (10, 2, 4)
    assert torch.equal(data.test.images[0], torch.from_numpy(pixels(16, 16, 3) // 21).permute(2, 0, 1))
    streamed = load(hf(parquet, memory_gib=0), store_dir=store)
    assert torch.equal(streamed.train.images, data.train.images) and streamed.digest == data.digest


def test_one_parquet_file_and_its_columns(parquet, store):
    file = parquet / "train-00000-of-00001.parquet"
    data = load(hf(file, args={"image": "img", "label": "label"}), store_dir=store)
    assert data.test is None and data.num_samples == 12
    with pytest.raises(ValueError, match=r"\+dataset.args.label=COLUMN"):
        load(hf(file, args={"label": "fine_label"}), store_dir=store)
    with pytest.raises(ValueError, match="There are train"):
        load(hf(file, args={"val": "dev"}), store_dir=store)


def test_hugging_face_errors(tmp_path, store, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(hf(tmp_path / "nowhere"), store_dir=store)
    with pytest.raises(ValueError, match="NAME_OR_PATH"):
        load({"_target_": "kd.data.hf.hub", "root": None}, store_dir=store)

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.create_connection", offline)
    with pytest.raises(FileNotFoundError, match="Three ways out"):
        load(hf("somebody/images"), store_dir=store)
