"""Where a step's time goes adds up, and the advice names what was found."""

from __future__ import annotations

import json
import types

import pytest
import torch

from kd import compose
from kd.benchmark import steptime


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    place, said = tmp_path_factory.mktemp("step"), []
    torch.set_num_threads(1)
    settings = ["teacher=resnet14", "student=resnet8", "student.args.width=4", "recipe.batch_size=16", "threads=1"]
    cfg = compose(
        *settings, "step=true", f"runs_dir={place / 'runs'}", f"out={place / 'f.json'}", config_name="benchmark"
    )
    found = steptime.report(cfg, said.append)
    assert json.loads((place / "f.json").read_text()) == found
    assert {p.name for p in (place / "runs").iterdir()} <= {".store"}  # no run, no cache
    return found, "\n".join(said)


def test_the_parts_make_up_the_step(figures):
    found, said = figures
    parts = [found[f"time/{p}_ms"] for p in steptime.PARTS]
    assert all(p > 0 for p in parts)
    assert sum(parts) == pytest.approx(found["time/step_ms"], rel=0.3)
    assert 0 < found["student_share_of_peak"] < 1
    assert all(p in said for p in steptime.PARTS)


def test_three_pieces_of_advice_the_largest_first(figures):
    saves = [a["saves_ms"] for a in figures[0]["advice"]]
    assert 1 <= len(saves) <= 3
    assert saves == sorted(saves, reverse=True)


@pytest.mark.parametrize(
    ("part", "word"),
    [("teacher", "teacher.cache"), ("data", "memory_gib"), ("view", "augment"), ("optimiser", "batch_size")],
)
def test_what_takes_the_time_is_what_is_named(part, word):
    training = types.SimpleNamespace(autocast=True, device="cpu")
    parts = {f"time/{p}_ms": 1.0 for p in steptime.PARTS} | {f"time/{part}_ms": 100.0, "time/step_ms": 107.0}
    assert word in steptime.advice(training, parts, compiled=True)[0]["what"]


def test_a_part_inside_another_is_taken_from_it():
    clock = steptime._Clock("cpu")
    clock.start()
    spin = torch.randn(400, 400)

    def outer():
        clock.within("inner", lambda: [spin @ spin for _ in range(20)])

    clock.within("outer", outer)
    assert clock.read()["outer"] < clock.read()["inner"]


def test_the_peak_is_a_number_of_this_machine():
    assert 0.1 < steptime.matrix_peak("cpu", torch.float32, seconds=0.1) < 1e6
