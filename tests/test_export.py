"""Exported files answer as the classifier they were made from."""

from __future__ import annotations

import json
import shutil

import pytest
import small_runs
import torch

from kd import compose, export, models, runs
from kd.config import ExportConfig
from kd.export import graph, parity
from kd.hints import UserError

MODELS = {
    "resnet8": {"name": "resnet8", "args": {"_target_": "kd.models.cifar.ResNet", "depth": 8, "width": 4}},
    "vit": {"name": "vit_tiny_patch16_224", "args": {"embed_dim": 24, "depth": 2, "num_heads": 3}},
    "mobilenet": {"name": "mobilenetv3_small_050"},
    "mixer": {"name": "mixer_s16_224", "args": {"embed_dim": 24, "num_blocks": 2}},
    "deit": {"name": "deit_tiny_distilled_patch16_224", "args": {"embed_dim": 24, "depth": 2, "num_heads": 3}},
    "resized": {
        "name": "resnet8",
        "args": {"_target_": "kd.models.cifar.ResNet", "depth": 8, "width": 4},
        "preprocess": {"size": 24},
    },
}
SLOW = pytest.mark.slow
CASES = [
    *(("torch_export", m) for m in MODELS),
    *(pytest.param("onnx", m, marks=() if m == "resnet8" else SLOW) for m in MODELS),
    *(pytest.param("executorch", m, marks=SLOW) for m in ("resnet8", "vit")),
]


def build(name: str, channels: int = 1) -> models.Classifier:
    torch.manual_seed(0)
    classifier = models.build(MODELS[name], 10, 16, channels, classes=[f"c{k}" for k in range(10)])
    for module in classifier.modules():  # batch norms that a training left
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    return classifier.eval()


def facts(classifier: models.Classifier, channels: int = 1) -> dict:
    size = classifier.image_size
    return {
        "classes": classifier.classes,
        "input": {"shape": ["batch", channels, size, size]},
        "output": {"shape": ["batch", 10]},
    }


def images(count: int, channels: int = 1) -> torch.Tensor:
    return torch.randint(
        256, (count, channels, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )


@pytest.mark.parametrize(("form", "name"), CASES)
def test_float32_logits_within_1e_4_at_any_batch_size(form, name, tmp_path):
    pytest.importorskip(form) if form != "torch_export" else None
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    classifier, file = build(name), tmp_path / f"m{export.SUFFIX[form]}"
    export.backend(form).write(classifier, file, facts(classifier))
    assert list(tmp_path.iterdir()) == [file]  # one file, no weights beside it
    ask = export.opened(file)
    for count in (1, 3, 32):
        with torch.no_grad():
            assert (classifier(images(count)).logits - ask(images(count))).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("onnx", "resnet8"),
        pytest.param("onnx", "vit", marks=SLOW),
        ("torch_export", "resnet8"),
        pytest.param("executorch", "resnet8", marks=SLOW),
    ],
)
def test_int8_is_near_and_smaller(form, name, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime", "torch_export": "torchao"}.get(form, form))
    classifier, file = build(name), tmp_path / f"m{export.SUFFIX[form]}"
    export.backend(form).write(classifier, file, {**facts(classifier), "precision": "int8"}, images(64))
    assert list(tmp_path.iterdir()) == [file]
    with torch.no_grad():
        before, after = classifier(images(20)).logits, export.opened(file)(images(20))
    assert 0 < (before - after).abs().max() <= 0.25 * before.abs().max()


def test_weights_of_int8_are_int8(tmp_path):
    onnx = pytest.importorskip("onnx")
    classifier, file = build("resnet8"), tmp_path / "m.onnx"
    export.backend("onnx").write(classifier, file, facts(classifier), images(64))
    kinds = [t.data_type for t in onnx.load(str(file)).graph.initializer if len(t.dims) == 4 and t.dims[0] > 1]
    assert kinds and set(kinds) == {onnx.TensorProto.INT8}


def test_the_graph_is_plain_and_takes_colour(tmp_path):
    classifier = build("resnet8", channels=3)
    program = graph.capture(graph.Deployed(classifier), graph.example(classifier, 3))
    with torch.no_grad():
        assert torch.allclose(program.module()(images(5, 3)), classifier(images(5, 3)).logits, atol=1e-4)
    names = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert not any("batch_norm" in str(n) for n in names)  # folded


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from kd import run as train

    settings = [s for s in small_runs.SETTINGS if not s.startswith("teacher")]
    return train(compose(*settings, "teacher=none", f"runs_dir={tmp_path_factory.mktemp('runs')}"), say=lambda _: None)


def test_the_command_checks_on_the_test_split_and_records(run, command, tmp_path):
    pytest.importorskip("onnxruntime")
    code, out, err = command("export", f"run={run.folder}", f"out={tmp_path / 'here.onnx'}", "threads=1")
    assert code == 0, err
    assert "top-1" in out and "0 predictions changed" in out
    beside = json.loads((tmp_path / "here.onnx.json").read_text())
    assert beside["classes"] == [str(k) for k in range(10)]
    assert beside["input"]["shape"] == ["batch", 1, 16, 16]
    assert beside["parity"]["images"] == run.record["dataset"]["test"]
    assert beside["parity"]["max_logit_difference"] <= 1e-4
    assert beside["sha256"] == runs.files.digest(tmp_path / "here.onnx")
    assert runs.Run(run.folder).record["exports"]["here.onnx"]["format"] == "onnx"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("here")) == ["here.onnx", "here.onnx.json"]


def test_class_names_are_in_the_file(run, command, tmp_path):
    onnx = pytest.importorskip("onnx")
    command("export", f"run={run.folder}", f"out={tmp_path / 'm.onnx'}")
    properties = {p.key: p.value for p in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert json.loads(properties["classes"]) == [str(k) for k in range(10)]
    assert properties["fingerprint"] == run.record["fingerprint"]


def test_a_file_that_answers_otherwise_is_not_left_behind(run, command, tmp_path, monkeypatch):
    read = export.backend("torch_export").read

    def worse(file):
        ask = read(file)
        return lambda batch: ask(batch).flip(1)

    monkeypatch.setattr("kd.export.torch_export.read", worse)
    code, _, err = command("export", f"run={run.folder}", "format=torch_export", f"out={tmp_path / 'bad.pt2'}")
    assert code == 1 and "not kept" in err
    assert not [p for p in tmp_path.iterdir() if "bad" in p.name]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("format=onx",), 2, "Did you mean onnx"),
        (("quantize=int4",), 2, "expected one of int8"),
        (("out=x.bin",), 2, "writes .onnx files"),
        (("run=null",), 2, "nothing to export"),
        (("run=/nowhere",), 1, "no run.json"),
        (("tolerence=1",), 2, "Did you mean tolerance"),
    ],
)
def test_mistakes_are_told(run, command, arguments, code, said):
    given = command("export", f"run={run.folder}", *arguments)
    assert given[0] == code and said in given[2]


def test_a_missing_package_is_named(monkeypatch):
    import importlib

    def fail(name):
        raise ImportError("No module named 'onnxruntime'")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UserError, match=r"pip install 'kd\[onnx\]'"):
        export.backend("onnx")


def test_int8_that_loses_too_much_is_refused():
    found = {"max_logit_difference": 3.0, "top1_drop": 0.05}
    with pytest.raises(UserError, match=r"loses 5.00 points.*max_drop=0.06"):
        parity.require(found, ExportConfig(quantize="int8"))
    parity.require({**found, "top1_drop": 0.01}, ExportConfig(quantize="int8"))


def test_not_a_number_is_refused():
    with pytest.raises(UserError, match="tolerance"):
        parity.require({"max_logit_difference": float("nan"), "top1_drop": 0.0}, ExportConfig())


def test_a_run_that_was_moved_exports_too(run, command, tmp_path):
    shutil.copytree(run.folder, tmp_path / "moved")
    code, _, err = command("export", f"run={tmp_path / 'moved'}", "format=torch_export")
    assert code == 0, err
    assert (tmp_path / "moved" / "export" / "model.pt2").is_file()
