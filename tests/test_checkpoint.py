"""Checkpoints: what comes back is what went in, or it is named as broken."""

from __future__ import annotations

import pytest
import torch

from kd import files, models
from kd.checkpoint import TRAINING, Checkpoints


@pytest.fixture
def classifier():
    return models.build(
        {"name": "resnet8", "args": {"_target_": "kd.models.cifar.ResNet", "depth": 8, "width": 4}}, 10, 8
    )


def test_training_state_comes_back(tmp_path, classifier):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_training() is None
    checkpoints.save("last", classifier, {"progress": {"step": 7}, "x": torch.arange(3)})
    state = checkpoints.load_training()
    assert state["progress"] == {"step": 7}
    assert torch.equal(state["x"], torch.arange(3))
    assert all(torch.equal(v, classifier.network.state_dict()[n]) for n, v in state["model"].items())


@pytest.mark.parametrize("damage", [TRAINING, "model.safetensors", "sha256.json"])
def test_a_damaged_file_sends_back_to_the_one_before(tmp_path, classifier, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save("last", classifier, {"step": step})
    (tmp_path / "last" / damage).write_bytes(b"{")
    said = []
    assert checkpoints.load_training(said.append)["step"] == 1
    assert damage in said[0]
    (tmp_path / "previous" / damage).unlink()
    assert checkpoints.load_training(said.append) is None


def test_finishing_keeps_weights_only_and_can_be_repeated(tmp_path, classifier):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save("last", classifier, {"step": step})
    checkpoints.save("best", classifier)
    (tmp_path / ".last.part").mkdir()
    for _ in range(2):
        checkpoints.finish()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last"]
        assert not files.broken_files(tmp_path / "last")
        assert models.load(tmp_path / "last").network.state_dict().keys() == classifier.network.state_dict().keys()
    assert not (tmp_path / "last" / TRAINING).exists()


def test_saved_bytes_have_no_clock(tmp_path, classifier):
    for name in ("a", "b"):
        Checkpoints(tmp_path).save(name, classifier)
    assert (tmp_path / "a" / "sha256.json").read_text() == (tmp_path / "b" / "sha256.json").read_text()
