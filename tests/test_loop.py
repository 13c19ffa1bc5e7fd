"""The loop: what must not change a result does not, and no step waits for the device."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd import compose, files, loop, run, runs
from kd.hints import Interrupted
from kd.loop import Meter, smooth


def digest(one) -> str:
    return files.digest(one.folder / "checkpoints" / "last" / "model.safetensors")


def rows(one) -> list[dict]:
    return [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (20, 16, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.jpg")
    return ["dataset=folder", f"dataset.root={tmp_path / 'photos'}", "dataset.image_size=16"]


def test_workers_store_and_streaming_give_the_same_weights(tiny, photos, tmp_path):
    settings = [o for o in tiny if not o.startswith(("dataset.", "runs_dir"))]
    settings += [*photos, "teacher=none", "recipe.steps=5", "recipe.batch_size=8", "sweep_name=test"]
    found = {}
    for gib, workers in ((8, 0), (0, 0), (0, 1), (0, 2)):
        place = f"runs_dir={tmp_path / f'{gib}-{workers}'}"
        done = run(compose(*settings, f"dataset.memory_gib={gib}", f"workers={workers}", place))
        found[gib, workers] = (done.name, digest(done))
    assert len(set(found.values())) == 1, found


def test_metrics_are_those_of_every_step_and_none_is_lost(tiny):
    done = run(compose(*tiny, "teacher=none", "recipe.steps=45", "sweep_name=test"))
    steps = [row["step"] for row in rows(done) if "train/loss" in row]
    assert steps == list(range(1, 46))
    assert all("train/lr" in row for row in rows(done) if "train/loss" in row)


def test_a_cycle_repeats_the_order_and_the_views(tiny, monkeypatch):
    seen, plain = [], loop.train_step

    def watch(training, raw):
        seen.append((float(raw.epoch), raw.index.tolist(), training.view(raw).images.sum().item()))
        return plain(training, raw)

    monkeypatch.setattr(loop, "train_step", watch)
    run(compose(*tiny, "teacher=none", "recipe.steps=21", "augment.cycle_epochs=2", "sweep_name=test"))  # 7 an epoch
    assert [s[1:] for s in seen[:7]] == [s[1:] for s in seen[14:21]]
    assert [s[1:] for s in seen[:7]] != [s[1:] for s in seen[7:14]]
    assert seen[14][0] == 2.0


@pytest.mark.parametrize("step", [7, 14])  # the last of an epoch of seven, and of the run
def test_a_signal_at_the_end_of_an_epoch_leaves_nothing_out(tiny, tmp_path, monkeypatch, step):
    settings = [*tiny, "teacher=none", "recipe.epochs=2", "recipe.keep_epochs=[1]", "recipe.val_every=1"]
    whole = run(compose(*settings))
    plain = loop.train_step

    def struck(training, raw):
        if training.progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(training, raw)

    again = compose(*settings, f"runs_dir={tmp_path / 'again'}")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", struck)
        with pytest.raises(Interrupted, match=f"step {step} of 14"):
            run(again)
    resumed = run(again)
    strip = [{k: v for k, v in row.items() if not k.startswith(("time/", "images_per_s"))} for row in rows(whole)]
    assert [
        {k: v for k, v in row.items() if not k.startswith(("time/", "images_per_s"))} for row in rows(resumed)
    ] == strip
    for name in ("best", "last", "epoch_001"):
        one, other = (r.folder / "checkpoints" / name / "model.safetensors" for r in (whole, resumed))
        assert files.digest(one) == files.digest(other), name
    assert resumed.record["metrics"] == whole.record["metrics"]


def test_a_diverged_run_keeps_the_best_of_the_epochs_before(tiny, monkeypatch):
    plain = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda t, raw: plain(t, raw) * (float("nan") if t.progress.step > 9 else 1.0)
    )
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 0.0)  # nothing is written before it
    cfg = compose(*tiny, "teacher=none", "recipe.epochs=3", "recipe.val_every=1")
    with pytest.raises(loop.DivergedError):
        run(cfg)
    (found,) = runs.records(Path(cfg.runs_dir))
    assert found.status == "diverged"
    kept = load_file(found.folder / "checkpoints" / "best" / "model.safetensors")
    assert all(torch.isfinite(v.float()).all() for v in kept.values())


def test_the_meter_reads_what_was_added_with_changing_names():
    meter = Meter()
    meter.add(0, 0.1, ("a", "b"), torch.tensor([1.0, 2.0]))
    meter.add(1, 0.2, ("a", "b"), torch.tensor([3.0, 4.0]))
    meter.add(2, 0.3, ("a",), torch.tensor([5.0]))
    read = meter.read()
    assert [step for step, _ in read] == [0, 1, 2]
    assert [v["a"] for _, v in read] == [1.0, 3.0, 5.0]
    assert "b" not in read[2][1]
    assert read[1][1]["train/lr"] == 0.2
    assert meter.read() == []


def test_smoothing_spreads_a_share_over_all_classes():
    soft = smooth(torch.tensor([1, 0]), 4, 0.2)
    assert torch.allclose(soft, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    assert torch.allclose(smooth(soft, 4, 0.0), soft)
