"""Every term against the golden numbers of its published reference; `KD_VECTORS=DIR pytest tests/test_vectors.py`.

Float64 cases agree within 1e-9 of each tensor's largest absolute value; float32 reruns within 1e-4 of float64 (wider
where the reference itself is further off, `float32_reference`); under bfloat16 autocast everything is finite. Probes
must be finite, and agree too where the reference is finite, unless the adapter says why not.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from pathlib import Path

import pytest
import torch
import vectors_adapters
from safetensors.torch import load_file
from vectors_adapters import ADAPTERS

FOLDER = Path(os.environ.get("KD_VECTORS", Path(__file__).parent / "vectors"))
METHODS = json.loads((FOLDER / "index.json").read_text())["methods"]
NOISE = 1e-13  # losses and gradients that are 0 in theory hold rounding noise

for found in pkgutil.iter_modules(vectors_adapters.__path__):
    importlib.import_module(f"{vectors_adapters.__name__}.{found.name}")


def cases(*statuses: str, probes: bool | None = None):
    """Pytest parameters (method, case name, its metadata) with ids such as `kd-case0`; no status means any."""
    return [
        pytest.param(method, name, case, id=f"{method}-{name}")
        for method, entry in METHODS.items()
        for name, case in entry["cases"].items()
        if (not statuses or case["status"] in statuses) and probes in (None, name.startswith("probe"))
    ]


def tensors(method: str, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one case, by bare name."""
    stored = load_file(FOLDER / METHODS[method]["file"])
    return {key.removeprefix(f"{name}/"): value for key, value in stored.items() if key.startswith(f"{name}/")}


def evaluate(method: str, name: str, case: dict, dtype: torch.dtype, autocast: bool = False) -> dict[str, torch.Tensor]:
    """The term's outputs and gradients on a case, under the golden names."""
    if method not in ADAPTERS:
        pytest.fail(f"no adapter for {method}: add one to tests/vectors_adapters")
    stored = tensors(method, name)
    inputs = {key: stored[key] for key in case["inputs"]}
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    for key in case["differentiated_inputs"]:
        inputs[key] = inputs[key].detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = dict(ADAPTERS[method].make(inputs, case["hyperparameters"], dtype))
    wanted = [key for key in out if key.startswith("loss")]
    return {key: value.detach() for key, value in out.items()} | gradients(out, wanted, inputs, case)


def gradients(out, wanted, inputs, case) -> dict[str, torch.Tensor]:
    """`grad.<input>` of `loss`, `grad_<part>.<input>` of each `loss_<part>`; 0 for an input that is not used."""
    leaves = {key: inputs[key] for key in case["differentiated_inputs"]}
    found = {}
    for key in wanted:
        if not out[key].requires_grad:
            continue
        grads = torch.autograd.grad(out[key], list(leaves.values()), retain_graph=True, allow_unused=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            found[f"grad{key.removeprefix('loss')}.{leaf}"] = torch.zeros_like(leaves[leaf]) if grad is None else grad
    return found


def given(method: str, case: dict) -> list[str]:
    """The golden outputs that the term is to give."""
    without = ADAPTERS[method].without
    skipped = {*without, *(f"grad{name.removeprefix('loss')}" for name in without)}
    return [key for key in case["golden_outputs"] if key not in skipped and key.split(".")[0] not in skipped]


def compare(ours: dict, golden: dict, names: list[str], tolerance: float, noise: float = NOISE) -> None:
    """Fail on the first tensor whose largest error is beyond `tolerance` times its largest value."""
    for key in names:
        assert key in ours, f"{key} is golden, the adapter does not give it"
        assert ours[key].shape == golden[key].shape, key
        want = golden[key].double()
        error = (ours[key].double() - want).abs().max().item() if want.numel() else 0.0
        bound = max(tolerance * want.abs().max().item() if want.numel() else 0.0, noise)
        assert error <= bound, f"{key}: error {error:.3g} beyond {bound:.3g}"  # also false for NaN


def finite(ours: dict) -> None:
    """Fail on a loss or gradient that is not finite."""
    assert "loss" in ours
    for key, value in ours.items():
        assert value.isfinite().all(), f"{key} is not finite"


def float32_tolerance(method: str, case: dict) -> float:
    """1e-4, or ten times what the reference itself loses in float32 where that is more."""
    lost = case.get("float32_reference", {})
    return max(ADAPTERS[method].float32, *(10 * (lost.get(key) or 0.0) for key in ("loss_rel_err", "grad_max_rel_err")))


@pytest.mark.parametrize(("method", "name", "case"), cases())
def test_golden(method, name, case):
    """The case in its own precision: finite, and the golden numbers where there are any."""
    dtype = getattr(torch, case["dtype"])
    ours = evaluate(method, name, case, dtype)
    finite(ours)
    if name.startswith("probe") and ADAPTERS[method].chosen:
        return
    if case["status"] == "ok":
        tolerance = 1e-9 if dtype == torch.float64 else float32_tolerance(method, case)
        noise = NOISE if dtype == torch.float64 else 1e-6
        compare(ours, tensors(method, name), given(method, case), tolerance, noise)


@pytest.mark.parametrize(("method", "name", "case"), cases("ok", probes=False))
def test_float32_stays_near_float64(method, name, case):
    """The same inputs in float32 (they are exactly representable)."""
    ours = evaluate(method, name, case, torch.float32)
    finite(ours)
    compare(ours, tensors(method, name), given(method, case), float32_tolerance(method, case), noise=1e-6)


@pytest.mark.parametrize(("method", "name", "case"), cases())
def test_autocast_is_finite(method, name, case):
    """float32 inputs under bfloat16 autocast."""
    finite(evaluate(method, name, case, torch.float32, autocast=True))


@pytest.mark.parametrize(("method", "name", "case"), cases("ok", probes=False))
def test_bfloat16_is_finite(method, name, case):
    """Logits and features that come in bfloat16; projections, banks and heads stay float32."""
    stored = tensors(method, name)
    inputs = {key: stored[key] for key in case["inputs"]}
    for key, value in inputs.items():
        if value.is_floating_point():
            half = key.startswith(("student_logits", "teacher_logits", "student_features", "teacher_features"))
            inputs[key] = value.to(torch.bfloat16 if half else torch.float32)
    for key in case["differentiated_inputs"]:
        inputs[key] = inputs[key].detach().requires_grad_()
    out = ADAPTERS[method].make(inputs, case["hyperparameters"], torch.float32)
    finite({key: value.detach() for key, value in out.items()} | gradients(out, ["loss"], inputs, case))
