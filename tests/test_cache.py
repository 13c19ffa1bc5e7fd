"""The teacher's answers are asked once, and a run does not notice."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import time
import types

import pytest
import torch
from torch import nn

from kd import cache, compose, files, run
from kd.cache import HEADER, Layout, Records, Remembering
from kd.contracts import Batch, Output
from kd.hints import ConfigError

ROWS, CLASSES, STEPS = 4, 5, 3


def raw_batch(epoch: int, step: int) -> Batch:
    index = torch.arange(ROWS) + 10 * step
    return Batch(torch.zeros(ROWS, 1, 2, 2), index % CLASSES, index, epoch + step / STEPS, seed=0)


class Teacher:
    """Says something else of every (epoch, index), and counts how often it was asked."""

    def __init__(self, dtype=torch.float32, shift: float = 0.0):
        self.calls, self.dtype, self.shift = 0, dtype, shift

    def __call__(self, batch: Batch, raw: Batch) -> Output:
        self.calls += 1
        logits = torch.sin(raw.index[:, None] * 1.7 + torch.arange(CLASSES) + 3 * int(raw.epoch)) + self.shift
        penultimate = torch.cos(logits[:, :2])
        return Output(logits.to(self.dtype), {"penultimate": penultimate.to(self.dtype)})


class Lock:
    released = False

    def release(self) -> None:
        self.released = True


def remembering(
    folder, teacher, *, writer=True, dtype=torch.float32, features=(), cycle=None, said=None
) -> Remembering:
    widths = {"logits": CLASSES} | ({"penultimate": 2} if features else {})
    layout = Layout(ROWS, widths, dtype)
    return Remembering(
        teacher,
        Records(folder, layout.size),
        layout,
        steps_per_epoch=STEPS,
        cycle_epochs=cycle,
        features=features,
        lock=Lock() if writer else None,
        say=(said if said is not None else []).append,
    )


def all_answers(ask, epochs: int = 2) -> list[Output]:
    batches = [raw_batch(e, s) for e in range(epochs) for s in range(STEPS)]
    return [ask(b, b) for b in batches]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [(), ("penultimate",)])
def test_what_is_read_is_what_was_said_bit_for_bit(tmp_path, dtype, features):
    first = remembering(tmp_path, Teacher(dtype), dtype=dtype, features=features)
    said = all_answers(first)
    assert first.close()["cache"] == {"folder": tmp_path.name, "batches_read": 0, "batches_asked": 6}
    teacher = Teacher(dtype)
    second = remembering(tmp_path, teacher, dtype=dtype, features=features)
    read = all_answers(second)
    assert teacher.calls == cache.CHECKS  # those that are compared
    assert second.close()["cache"]["batches_read"] == 6
    for one, other in zip(said, read, strict=True):
        assert torch.equal(one.logits, other.logits)
        assert other.logits.dtype == dtype
        assert set(other.features) == set(features)
        assert all(torch.equal(one.features[n], other.features[n]) for n in features)


def test_the_answers_read_can_be_trained_on(tmp_path):
    all_answers(first := remembering(tmp_path, Teacher()))
    first.close()
    output = all_answers(remembering(tmp_path, Teacher()))[-1]
    student = torch.zeros(ROWS, CLASSES, requires_grad=True)
    ((student - output.logits) ** 2).sum().backward()
    assert torch.isfinite(student.grad).all()
    assert not output.logits.requires_grad


def test_epochs_of_a_cycle_share_their_answers(tmp_path):
    teacher = Teacher()
    ask = remembering(tmp_path, lambda b, r: teacher(b, dataclasses.replace(r, epoch=r.epoch % 2)), cycle=2)
    said = all_answers(ask, epochs=2)
    ask.flush()
    again = all_answers(ask, epochs=4)
    assert teacher.calls == 6 + cache.CHECKS
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(said + said, again, strict=True))


@pytest.mark.parametrize("harm", ["cut", "torn header", "flipped bit", "empty", "gone", "hole"])
def test_a_spoilt_record_is_asked_again_and_mended(tmp_path, harm):
    all_answers(first := remembering(tmp_path, Teacher()))
    first.close()
    path, size = tmp_path / "epoch_00001", HEADER.size + ROWS * CLASSES * 4
    whole = path.read_bytes()
    assert len(whole) == STEPS * size
    if harm == "gone":
        path.unlink()
    else:
        spoilt = {
            "cut": whole[: 2 * size + 11],
            "torn header": whole[: 2 * size + 3],
            "flipped bit": whole[: 2 * size + 20] + bytes([whole[2 * size + 20] ^ 4]) + whole[2 * size + 21 :],
            "empty": b"",
            "hole": whole[:size] + bytes(size) + whole[2 * size :],
        }[harm]
        path.write_bytes(spoilt)
    teacher, said = Teacher(), []
    read = all_answers(second := remembering(tmp_path, teacher, said=said))
    second.close()
    assert teacher.calls == cache.CHECKS + {"empty": 3, "gone": 3}.get(harm, 1)
    assert not said
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(read, all_answers(Teacher()), strict=True))
    assert path.read_bytes() == whole


def test_another_teachers_answers_are_dropped_with_a_word(tmp_path):
    all_answers(first := remembering(tmp_path, Teacher()))
    first.close()
    said, other = [], Teacher(shift=1.0)
    read = all_answers(second := remembering(tmp_path, other, said=said))
    second.close()
    assert "differs from what the teacher says" in said[0]
    assert len(said) == 1
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(read, all_answers(Teacher(shift=1.0)), strict=True))
    third = remembering(tmp_path, Teacher(shift=1.0))
    all_answers(third)
    assert third.read == 6


def test_a_reader_that_sees_a_difference_leaves_the_writers_file_alone(tmp_path):
    all_answers(first := remembering(tmp_path, Teacher()))
    first.close()
    before = (tmp_path / "epoch_00000").read_bytes()
    said = []
    reader = remembering(tmp_path, Teacher(shift=1.0), writer=False, said=said)
    read = all_answers(reader)
    assert reader.read == 0
    assert len(said) == 1
    assert torch.equal(read[0].logits, Teacher(shift=1.0)(None, raw_batch(0, 0)).logits)
    assert (tmp_path / "epoch_00000").read_bytes() == before


def test_a_reader_reads_what_the_writer_has_written_so_far(tmp_path):
    writer = remembering(tmp_path, Teacher())
    all_answers(writer, epochs=1)
    writer.flush()
    teacher = Teacher()
    reader = remembering(tmp_path, teacher, writer=False)
    all_answers(reader, epochs=2)
    reader.close()
    assert teacher.calls == cache.CHECKS + STEPS
    assert not (tmp_path / "epoch_00001").exists()


def test_a_full_disk_ends_the_writing_not_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Records, "write", full)
    said = []
    ask = remembering(tmp_path, Teacher(), said=said)
    lock = ask.lock
    read = all_answers(ask)
    ask.flush()
    assert "No space left" in said[0]
    assert lock.released
    assert len(read) == len(all_answers(ask))


def test_equal_up_to_rounding():
    logits = torch.randn(8, 10) * 5
    for dtype in (torch.bfloat16, torch.float32):
        assert cache.agree(logits, logits.to(dtype))
    assert not cache.agree(logits, (logits + 0.5).bfloat16())
    assert not cache.agree(logits.roll(1, 0), logits)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A trained teacher for every run of this file."""
    place = f"runs_dir={tmp_path_factory.mktemp('teacher')}"
    torch.set_num_threads(1)
    settings = [
        "teacher=none",
        "student=resnet8",
        "student.args.width=4",
        "recipe.steps=30",
        "tracker=none",
        "sweep_name=test",
    ]
    return run(compose(*settings, "threads=1", place)).folder


@pytest.fixture
def taught(tiny, teacher_run):
    """Trains a student; gives its run and what was said."""

    def train(*more, runs_dir=None):
        settings = [
            f"teacher.checkpoint={teacher_run}",
            "teacher=resnet8",
            "recipe.steps=20",
            "teacher.min_top1=0",
            "baseline=off",
        ]
        place = [f"runs_dir={runs_dir}"] if runs_dir else []
        said = []
        return run(compose(*tiny, *settings, "sweep_name=test", *more, *place), say=said.append), "\n".join(said)

    return train


def weights(one) -> str:
    return files.digest(one.folder / "checkpoints" / "last" / "model.safetensors")


PATIENT = ["augment=patient", "recipe.batch_size=15", "augment.cycle_epochs=1"]  # odd: an image without a partner
VARIANTS = [[], ["recipe.precision=fp32", "augment.teacher_view=independent"], PATIENT, ["loss=[kd,srrl]"]]


@pytest.mark.parametrize("more", VARIANTS, ids=lambda more: "+".join(more) or "plain")
def test_cached_and_live_runs_are_the_same_run(taught, tmp_path, more):
    live, _ = taught("teacher.cache=off", *more, runs_dir=tmp_path / "live")
    assert not list((tmp_path / "live").glob(".cache/*/epoch_*"))
    written, said = taught(*more)
    assert "written as this run asks" in said
    read, said = taught(*more, "fresh=true")
    assert "are there" in said
    assert read.record["teacher"]["cache"]["batches_asked"] == 0
    assert live.name == written.name == read.name
    assert weights(live) == weights(written) == weights(read)
    assert [losses(row) for row in rows(live)] == [losses(row) for row in rows(read)]


def rows(one) -> list[dict]:
    return [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]


def losses(row: dict) -> dict:
    return {n: v for n, v in row.items() if "train/" in n or n == "step"}


class Split:
    index = torch.arange(40)

    def steps(self, batch_size: int) -> int:
        return 40 // batch_size


def key(*overrides, classifier=None, batch=16, **changes):
    cfg = compose("teacher=resnet8", "student=resnet8", *overrides)
    data = {"digest": "d", "mirror": False, "image_size": 16, "channels": 1, "train": Split()}
    dataset = types.SimpleNamespace(**{**data, **changes})
    layout = Layout(batch, {"logits": 10}, torch.bfloat16)
    classifier = classifier if classifier is not None else nn.Linear(1, 1).requires_grad_(False)
    return cache.identity(cfg, dataset, classifier, layout, device="cpu", compiled=False)


def test_the_key_holds_what_an_answer_depends_on():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    base = key(classifier=network)
    for same in (
        "loss=[dkd]",
        "recipe.lr=0.01",
        "student.args.width=6",
        "recipe.steps=10",
        "augment.cycle_epochs=2",
        "teacher.cache=on",
        "workers=0",
    ):
        assert key(same, classifier=network) == base, same
    for other in ("seed=1", "augment=none", "augment.teacher_view=clean", "augment.mixup=0.1"):
        assert key(other, classifier=network) != base, other
    half = types.SimpleNamespace(index=torch.arange(20))
    for change in (
        {"digest": "e"},
        {"mirror": True},
        {"image_size": 8},
        {"channels": 3},
        {"train": half},
        {"batch": 14},
    ):
        assert key(classifier=network, **change) != base, change


def test_the_key_knows_weights_structure_precision_and_threads():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    base = key(classifier=network)
    assert key(classifier=copy.deepcopy(network)) == base
    assert key(classifier=nn.Sequential(network[0], nn.GELU())) != base
    assert key(classifier=copy.deepcopy(network).bfloat16()) != base
    with torch.no_grad():
        network[0].weight[0, 0] += 1e-6
    changed = key(classifier=network)
    assert changed != base
    torch.set_num_threads(2)
    assert key(classifier=network) != changed


def test_feature_maps_are_not_kept(taught, tmp_path):
    taught("loss=fitnet")
    assert not (tmp_path / "runs" / ".cache").exists()
    with pytest.raises(ConfigError, match=r"teacher.cache=on: the loss needs the teacher's stage\d"):
        taught("loss=fitnet", "teacher.cache=on", "seed=1")


def test_a_limit_is_kept_and_said(taught, tmp_path):
    _, said = taught("teacher.cache_gib=1e-6")
    assert "teacher cache: none" in said
    assert not list((tmp_path / "runs").glob(".cache/*/epoch_*"))
    with pytest.raises(ConfigError, match=r"teacher.cache_gib.*Raise it"):
        taught("teacher.cache_gib=1e-6", "teacher.cache=on", "seed=1")


@pytest.mark.slow
def test_killed_in_the_middle_the_cache_goes_on_and_the_weights_are_the_same(tiny, teacher_run, taught, tmp_path):
    more = ["recipe.steps=300", "recipe.ema=0.9"]
    whole, _ = taught("teacher.cache=off", *more, runs_dir=tmp_path / "whole")
    place = tmp_path / "killed"
    settings = [
        f"teacher.checkpoint={teacher_run}",
        "teacher=resnet8",
        "teacher.min_top1=0",
        "baseline=off",
        f"runs_dir={place}",
    ]
    command = [sys.executable, "-m", "kd.train", *tiny, *settings, *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(place.glob(".cache/*/epoch_00010")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = sorted(place.glob(".cache/*/epoch_*"))
    with open(kept[0], "r+b") as file:  # as a machine that lost its power might leave it
        file.truncate(kept[0].stat().st_size - 7)
    end = subprocess.run(command, capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stderr
    assert "are there" in end.stdout
    resumed = type(whole)(place / whole.name)
    assert weights(whole) == weights(resumed)
    assert [losses(row) for row in rows(whole)] == [losses(row) for row in rows(resumed)]
