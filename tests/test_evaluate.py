"""Scores of finished runs and of teachers from elsewhere."""

from __future__ import annotations

import json
import tarfile

import pytest
import torch

from kd import compose, metrics, run


def test_figures_from_known_logits():
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 9, 0], [0, 0, 9]])
    targets = torch.tensor([0, 1, 2, 2])
    found = metrics.full(logits, targets, teacher_logits=logits.roll(1, 0))
    assert found["top1"] == 0.75
    assert found["top5"] == 1.0
    assert found["agreement"] == 0.25
    confidence = float(torch.softmax(logits[0], 0)[0])
    assert found["ece"] == pytest.approx(confidence - 0.75, abs=1e-6)
    assert metrics.confusion(logits, targets).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert metrics.per_class(metrics.confusion(logits, targets)) == [1.0, 1.0, 0.5]
    means = metrics.macro(logits, targets)
    assert means == {"balanced": pytest.approx(2.5 / 3), "f1": pytest.approx((1 + 2 / 3 + 2 / 3) / 3)}


def test_calibration_is_that_of_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    probs = (3 * torch.randn(500, 7, generator=generator)).softmax(1)
    targets = torch.randint(7, (500,), generator=generator)
    theirs = multiclass_calibration_error(probs, targets, 7, n_bins=15, norm="l1").item()
    assert metrics.calibration_error(probs, targets) == pytest.approx(theirs, abs=1e-5)


def test_a_run_is_scored_with_its_teacher_and_baseline(tiny, tmp_path, command):
    finished = run(compose(*tiny, "teacher=resnet8", "teacher.recipe.steps=20", "recipe.steps=5", "teacher.min_top1=0"))
    out = tmp_path / "scores" / "s.json"
    code, shown, err = command("evaluate", f"run={finished.folder}", f"out={out}", "threads=1")
    assert code == 0, err
    found = json.loads(out.read_text())
    assert next(iter(found)) == "test/top1"
    assert found["test/top1"] == finished.record["metrics"]["test/top1"]
    assert {
        "teacher/test/top1",
        "baseline/test/top1",
        "test/agreement",
        "baseline/test/agreement",
        "test/recall/3",
    } <= set(found)
    assert all(0 <= v <= 1 for n, v in found.items() if n.endswith(("top1", "top5", "ece", "agreement")))
    assert (finished.folder / "plots" / "confusion_test.png").stat().st_size > 5000
    assert "top-1 %" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teacher=none"], "run=RUN_DIR"),
        (["teacher=resnet8"], "teacher.checkpoint=PATH"),
        (["run=nowhere"], "no run.json"),
        (["run=nowhere", "split=tset"], "Did you mean test"),
    ],
)
def test_mistakes(command, tmp_path, arguments, words):
    code, _, err = command("evaluate", *arguments, f"runs_dir={tmp_path}")
    assert code in (1, 2)
    assert words in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_weights_from_elsewhere_have_their_published_accuracy(shared, tmp_path, command):
    """../shared/weights on the first images of each class of ../shared/data's test split."""
    archive = shared / "data" / "cifar10_jpeg.tar.gz"
    with tarfile.open(archive) as file:
        members = [
            m
            for m in file
            if m.isfile() and "/test/" in m.name and int(m.name.rsplit("/", 1)[1].split(".")[0]) % 10 == 0
        ]
        file.extractall(tmp_path / "data", members=members, filter="data")
    root = next((tmp_path / "data").rglob("test")).parent
    weights = shared / "weights" / "cifar10_resnet20.safetensors"
    out = tmp_path / "s.json"
    code, _, err = command(
        "evaluate",
        "teacher=resnet20_a",
        f"teacher.checkpoint={weights}",
        "dataset=folder",
        f"dataset.root={root}",
        f"out={out}",
        f"runs_dir={tmp_path}",
    )
    assert code == 0, err
    assert json.loads(out.read_text())["test/top1"] == pytest.approx(0.81, abs=0.04)  # 1,000 of 10,000 images


def test_a_record_from_elsewhere_runs_no_code_from_elsewhere(tiny, command):
    finished = run(compose(*tiny, "teacher=none", "recipe.steps=1"))
    record = json.loads((finished.folder / "run.json").read_text())
    record["config"]["dataset"]["_target_"] = "os.system"
    (finished.folder / "run.json").write_text(json.dumps(record))
    code, _, err = command("evaluate", f"run={finished.folder}")
    assert code == 1
    assert "trust=true" in err
