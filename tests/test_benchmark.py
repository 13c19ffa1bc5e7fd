"""Teacher and student side by side: what is measured, where it goes, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import small_runs
import torch

from kd import benchmark, compose, models, runs
from kd.benchmark import memory, modes
from kd.hints import ConfigError

QUICK = ["seconds=0.01", "interval=10", "batch_sizes=[1,4]", "threads=1", "memory=false"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_runs.make(tmp_path_factory.mktemp("runs"))


def test_a_run_is_measured_beside_its_teacher(made, command, tmp_path):
    run, out_file = made["distilled"], tmp_path / "figures.json"
    code, out, err = command("benchmark", f"run={run.folder}", f"out={out_file}", *QUICK)
    assert code == 0, err
    figures = json.loads(out_file.read_text())
    assert [c["role"] for c in figures["cells"]] == ["teacher", "student"]
    teacher, student = figures["cells"]
    assert figures["reference"] == teacher["name"]
    assert teacher["parameters"] > student["parameters"] and teacher["macs"] > student["macs"]
    for cell in figures["cells"]:
        latency = cell["latency_ms"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        assert latency["low"] <= latency["median"] <= latency["high"]
        assert set(cell["images_per_s"]) == {"1", "4"} == set(cell["preprocess_ms"])
        assert 0 < cell["preprocess_ms"]["1"] < latency["p99"]
    ratio = figures["ratios"][0]
    assert ratio["latency"][1] <= ratio["latency"][0] <= ratio["latency"][2]
    assert ratio["parameters"] == pytest.approx(teacher["parameters"] / student["parameters"])
    assert runs.Run(run.folder).record["benchmark"] == figures
    assert (run.folder / "plots" / "benchmark.png").stat().st_size > 10_000
    assert out_file.with_suffix(".png").is_file()
    assert "latency" in out and "preprocessing counted in" in out


def test_the_record_keeps_all_else(made, command):
    before = {k: v for k, v in runs.Run(made["alone"].folder).record.items() if k != "benchmark"}
    assert command("benchmark", f"run={made['alone'].folder}", *QUICK)[0] == 0
    after = runs.Run(made["alone"].folder).record
    assert after.pop("benchmark")["cells"][0]["role"] == "student"
    assert after == before


def test_several_runs_share_their_teacher(made, command, tmp_path):
    several = f"run=[{made['distilled'].folder},{made['alone'].folder}]"
    assert command("benchmark", several, f"out={tmp_path / 'f.json'}", *QUICK)[0] == 0
    cells = json.loads((tmp_path / "f.json").read_text())["cells"]
    assert [c["model"] for c in cells] == ["teacher resnet14", "student resnet8", "student resnet8 (2)"]


def test_networks_without_a_run(command, tmp_path):
    given = ["teacher=resnet14", "student=resnet8", f"runs_dir={tmp_path}", f"out={tmp_path / 'f.json'}"]
    code, _, err = command("benchmark", *given, *QUICK)
    assert code == 0, err
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["ratios"][0]["macs"] > 1.5
    assert not list(tmp_path.glob("*/run.json"))


def test_exported_and_bfloat16_beside_eager(made, command, tmp_path):
    given = [
        f"run={made['alone'].folder}",
        "modes=[eager,torch_export]",
        "precisions=[fp32,bf16]",
        f"out={tmp_path / 'f.json'}",
    ]
    assert command("benchmark", *given, *QUICK)[0] == 0
    cells = json.loads((tmp_path / "f.json").read_text())["cells"]
    assert [(c["mode"], c["precision"]) for c in cells] == [
        ("eager", "fp32"),
        ("eager", "bf16"),
        ("torch_export", "fp32"),
    ]
    assert cells[1]["size_mib"] == pytest.approx(cells[0]["size_mib"] / 2)
    assert "preprocess_ms" not in cells[2]  # inside the file


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["modes=[eagre]"], "Did you mean eager"),
        (["precisions=[int4]"], "expected some of fp32, bf16, int8"),
        (["modes=[onnx]", "precisions=[bf16]"], "leaves nothing to measure"),
        (["batch_sizes=[0]"], "expected numbers above 0"),
        (["batch_sizes=[]"], "expected numbers above 0"),
        (["interval=0"], "expected a fraction above 0"),
        (["seconds=-1"], "above 0"),
    ],
)
def test_mistakes_are_told(command, tmp_path, arguments, said):
    code, _, err = command("benchmark", "teacher=resnet14", "student=resnet8", f"runs_dir={tmp_path}", *arguments)
    assert code == 2 and said in err


def test_what_there_is_on_cuda():
    assert modes.pairs(["eager", "onnx"], ["fp32", "bf16"], "cuda") == [("eager", "fp32"), ("eager", "bf16")]
    with pytest.raises(ConfigError, match="device=cpu"):
        modes.pairs(["onnx"], ["fp32"], "cuda")


def test_more_images_than_the_split_has(made):
    from kd import evaluate
    from kd.config import EvaluateConfig

    dataset = evaluate.open_data_of(made["alone"], EvaluateConfig())
    images = benchmark.images_of(dataset, 500)
    assert images.shape == (500, 1, 16, 16) and torch.equal(images[:140], images[360:])


@pytest.mark.slow
def test_peak_memory_grows_with_the_batch_and_the_model(tmp_path):
    def saved(name: str, width: int) -> object:
        spec = {"name": "r", "args": {"_target_": "kd.models.cifar.ResNet", "depth": 8, "width": width}}
        models.save(models.build(spec, 10, 16, 1), tmp_path / name)
        return tmp_path / name

    small = memory.peak_mib(saved("small", 4), [1, 256], "cpu", 1)
    if not small:
        pytest.skip("this system does not tell a process its memory")
    large = memory.peak_mib(saved("large", 128), [1, 256], "cpu", 1)
    assert 0 <= small[1] <= small[256] < large[256]
    weights = (tmp_path / "large" / "model.safetensors").stat().st_size / 2**20
    assert large[1] > 0.9 * weights


def test_speed_summary_is_short_and_complete(made):
    import time

    from kd import evaluate
    from kd.benchmark import speed
    from kd.config import EvaluateConfig

    folder = made["alone"].folder / "checkpoints" / "best"
    dataset, started = evaluate.open_data_of(made["alone"], EvaluateConfig()), time.perf_counter()
    figures = speed.summary(models.load(folder), folder / "model.safetensors", dataset, "cpu")
    assert time.perf_counter() - started < 10
    assert {"latency_ms", "images_per_s", "parameters", "macs", "size_mib", "precision", "threads"} <= set(figures)
    assert all(np.isfinite(v) for v in figures.values() if isinstance(v, float))


def test_composes():
    assert compose("run=x", config_name="benchmark").batch_sizes == [1, 8, 64, 256]


def test_others_at_work_are_counted():
    from kd.benchmark import speed

    if (before := speed.others_at_work()) is None:
        pytest.skip("needs /proc/loadavg")
    spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        time.sleep(0.5)
        assert speed.others_at_work() > before + 2
    finally:
        for process in spin:
            process.kill()
            process.wait()
    assert speed.disturbed(8.0 * 64) and not speed.disturbed(0.0) and not speed.disturbed(None)
