"""scripts/bench: the loops run, and the ratios are those of neighbours."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kd.contracts import Batch, Output
from kd.losses import SoftTargets

FOLDER = Path(__file__).resolve().parent.parent / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of scripts/bench, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("run", "loops", "textbook"):
        sys.modules.pop(name, None)


@pytest.fixture
def noise(bench, monkeypatch):
    def images(count, size=32):
        pixels = np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)
        return pixels, [i % 10 for i in range(count)], "noise"

    monkeypatch.setattr(bench("loops"), "images", images)


def test_every_loop_takes_steps_and_a_cached_one_stops_asking(bench, noise, tmp_path, monkeypatch):
    loops = bench("loops")
    pair, asked = loops.Pair("resnet14/resnet8:width=4", 4, tmp_path), []
    pair.frozen.register_forward_hook(lambda *_: asked.append(1))
    cached = pair.ours(cached=True)
    for _ in range(loops.STEPS + 3):
        next(cached)
    before = len(asked)
    for _ in range(loops.STEPS):
        next(cached)
    assert len(asked) == before
    for loop in (cached, pair.textbook(workers=0), pair.ours(), pair.bare()):
        next(loop)
        loop.close()


def test_the_textbook_s_loss_is_ours(bench):
    student, teacher = torch.randn(6, 10), torch.randn(6, 10)
    batch = Batch(torch.rand(6, 3, 2, 2), torch.arange(6), torch.arange(6))
    ours = SoftTargets(temperature=4.0)(Output(student), Output(teacher), batch)
    assert bench("textbook").soft_targets(student, teacher, 4.0).item() == pytest.approx(ours.item(), rel=1e-4)


def test_ratios_are_medians_of_the_rounds_own(bench):
    seconds = ((4.0, 2.0, 1.0, 1.0), (40.0, 10.0, 9.0, 8.0), (9.0, 3.0, 3.0, 1.0))
    rounds = [dict(zip(("textbook", "ours", "bare", "cached"), row, strict=True)) for row in seconds]
    found = bench("run").ratios(rounds, list(rounds[0]))
    assert found == {"ours / textbook": 3.0, "ours / bare": 0.9, "cached / textbook": 5.0}


def test_a_table_and_json_come_out(bench, noise, tmp_path, capsys):
    run, out = bench("run"), tmp_path / "bench.json"
    arguments = ["pairs=none/resnet8:width=4", "seconds=0", "rounds=1", "device=cpu", "threads=1", "workers=0"]
    assert run.main([f"out={out}", *arguments]) == 0
    found = json.loads(out.read_text())["pairs"]["none/resnet8:width=4"]
    assert set(found["ratios"]) == {"ours / textbook", "ours / bare"}
    assert "images/s" in capsys.readouterr().out
    assert run.main(["secnds=3"]) == run.main(["pairs=resnet56->resnet20"]) == 2
    assert "TEACHER/STUDENT" in capsys.readouterr().err
