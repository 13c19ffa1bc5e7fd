"""Class names for image files."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import small_runs
import torch
from PIL import Image

from kd import evaluate, models, predict, saved
from kd.config import EvaluateConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_runs.make(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pictures(made, tmp_path_factory):
    """The test split's images as files, in its order."""
    folder = tmp_path_factory.mktemp("pictures")
    dataset = evaluate.open_data_of(made["distilled"], EvaluateConfig())
    for i, image in enumerate(dataset.test.images[:40]):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def ask(capsys):
    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            predict.main([str(a) for a in arguments])
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    return call


def test_answers_are_those_of_the_test_split(made, pictures, ask):
    code, out, _ = ask(made["distilled"].folder, pictures, "--json")
    dataset = evaluate.open_data_of(made["distilled"], EvaluateConfig())
    classifier = models.load(made["distilled"].folder / "checkpoints" / "best")
    with torch.inference_mode():
        probs = classifier(dataset.test.images[:40]).logits.softmax(1)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["class"] for line in lines] == [dataset.classes[k] for k in probs.argmax(1)]
    assert np.allclose([line["probability"] for line in lines], probs.max(1).values, atol=1e-5)


def test_top_k_and_teacher(made, pictures, ask):
    code, out, _ = ask(made["distilled"].folder, pictures / "000.png", "--top", "3", "--teacher", "--json")
    line = json.loads(out)
    assert code == 0
    assert len(line["top"]) == len(line["teacher"]["top"]) == 3
    assert line["top"][0]["probability"] >= line["top"][1]["probability"]
    by_itself = json.loads(ask(made["teacher"].folder, pictures / "000.png", "--json")[1])
    assert line["teacher"]["class"] == by_itself["class"]
    text = ask(made["distilled"].folder, pictures / "000.png", "--teacher")[1]
    assert text.count("\t") == 2 and "teacher: " in text and " %" in text


def test_more_classes_than_there_are(made, pictures, ask):
    assert len(json.loads(ask(made["alone"].folder, pictures / "000.png", "--top", "99", "--json")[1])["top"]) == 10


BROKEN = {
    "empty.png": b"",
    "text.png": b"not an image",
    "torn.png": b"\x89PNG\r\n\x1a\n",
    "torn.jpg": b"\xff\xd8\xff\xe0",
    "head.gif": b"GIF89a",
}


def test_broken_images_are_named_and_stop_nothing(made, pictures, ask, tmp_path):
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    whole = sorted(pictures.iterdir())[:7]
    code, out, err = ask(
        made["alone"].folder, *whole[:3], tmp_path, *whole[3:], tmp_path / "gone.png", "--batch-size", "4"
    )
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(p) for p in whole]
    for name in (*BROKEN, "gone.png"):
        assert sum(f"{tmp_path / name}: " in line for line in err.splitlines()) == 1
    assert "no such file" in err and "Traceback" not in err


def test_a_thousand_images_with_five_broken_ones(made, pictures, ask, tmp_path):
    whole = sorted(pictures.iterdir())
    for number in range(1000):
        place = tmp_path / f"{number:04}.png"
        broken = number % 200 == 7
        place.write_bytes(b"\x89PNG\r\n\x1a\n" if broken else whole[number % len(whole)].read_bytes())
    code, out, err = ask(made["alone"].folder, tmp_path, "--json")
    assert (code, len(out.splitlines())) == (1, 995)
    assert sum(".png: " in line for line in err.splitlines()) == 5


def test_an_empty_folder_is_an_error(made, ask, tmp_path):
    code, out, err = ask(made["alone"].folder, tmp_path)
    assert (code, out) == (1, "") and str(tmp_path) in err


def test_paths_from_standard_input(made, pictures, ask, monkeypatch):
    paths = [str(p) for p in sorted(pictures.iterdir())[:3]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(paths) + "\n\n"))
    code, out, _ = ask(made["alone"].folder, "-")
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == paths


def test_colour_and_other_sizes_are_decoded_as_in_training(made, ask, tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(np.stack([gray] * 3, axis=2)).save(tmp_path / "colour.png")
    lines = [json.loads(x) for x in ask(made["alone"].folder, tmp_path, "--json")[1].splitlines()]
    assert lines[0]["probability"] == pytest.approx(lines[1]["probability"], abs=1e-3)


def test_a_checkpoint_folder_serves_as_run(made, pictures, ask):
    run = made["distilled"].folder
    image = pictures / "005.png"
    assert ask(run / "checkpoints" / "best", image)[1] == ask(run, image)[1]
    assert ask(run / "checkpoints" / "last", image)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("GONE", "x.png"), "expected a run directory"),
        (("ALONE", "x.png", "--teacher"), "has no teacher"),
        (("ALONE", "x.png", "--top", "0"), "--top 0: expected a number above 0"),
        (("wandb:nonsense", "x.png"), "expected wandb:ENTITY/PROJECT/NAME:ALIAS"),
        (("wandb:me/kd/x:best", "x.png"), "W&B needs a key"),
        (("ALONE", "x.png", "--device", "cuda"), "sees no CUDA device"),
    ],
)
def test_mistakes_are_told(made, ask, arguments, said, monkeypatch):
    monkeypatch.setattr("kd.tracking.has_key", lambda: False)
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    name, *rest = arguments
    folder = {"ALONE": str(made["alone"].folder), "GONE": str(made["alone"].folder / "gone")}.get(name, name)
    code, out, err = ask(folder, *rest)
    assert code != 0 and not out
    assert said in err and "Traceback" not in err


def test_an_artifact_is_laid_out_as_a_run(made, tmp_path):
    class Artifact:
        name, digest, metadata = "digits-x:v3", "0123456789abcdef", {"metrics": {"test/top1": 0.5}}
        downloads = 0

        def download(self, root):
            import shutil

            Artifact.downloads += 1
            shutil.copytree(made["alone"].folder / "checkpoints" / "best", root, dirs_exist_ok=True)

    found = saved.unpack(Artifact(), tmp_path)
    assert saved.find(found).record["metrics"] == {"test/top1": 0.5}
    assert saved.find(found).load().num_classes == 10
    assert saved.unpack(Artifact(), tmp_path) == found and Artifact.downloads == 1
