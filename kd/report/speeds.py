"""What each network costs: from the records where it was timed, else measured here, once and alone, and remembered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd import files, runs
from kd.report import names
from kd.report.rows import Gathered

COUNTED = ("parameters", "macs", "size_mib")
STORE = ".speeds.json"  # in runs_dir


def network_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a network's cost depends on."""
    student, data = record["config"]["student"], record["dataset"]
    spec = {k: student[k] for k in ("name", "args", "preprocess")}
    count = record.get("parameters")  # a student that ships its teacher's head (SimKD) is another network beside each
    return {**spec, "parameters": count, "image_size": data["image_size"], "classes": len(data["classes"])}


def collect(gathered: Gathered, measure: bool, trust: bool = False) -> dict[str, dict[str, float]]:
    """Network -> figures. With `measure` all are timed here, on one machine, so that they can be compared."""
    by_network: dict[str, list[runs.Run]] = {}
    for run in gathered.finished:
        if run.record.get("efficiency"):
            by_network.setdefault(names.key(network_of(run.record)), []).append(run)
    counted = {
        n: {k: v for k, v in group[0].record["efficiency"].items() if k in COUNTED} for n, group in by_network.items()
    }
    if not measure:
        return counted
    store = gathered.runs_dir / STORE
    timed = _timed(by_network, store, trust)
    return {n: {**counted[n], **timed.get(n, {})} for n in counted}


def _timed(by_network: dict[str, list[runs.Run]], store: Path, trust: bool) -> dict[str, dict[str, Any]]:
    import torch

    from kd.benchmark import speed
    from kd.sweep import read

    here = {"device_name": runs.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    kept = read(store) or {}
    known = kept.get("networks", {}) if kept.get("machine") == here else {}
    disturbed = speed.disturbed(speed.others_at_work())
    if disturbed:
        print(
            "warning: the machine is busy: what is timed now means little, and is not kept for the next report",
            flush=True,
        )
    passing = {}
    for number, (network, group) in enumerate(by_network.items(), 1):
        if network not in known and (figures := _measure(group, trust)):
            print(
                f"measuring network {number} of {len(by_network)}: {group[0].record['config']['student']['name']}",
                flush=True,
            )
            (passing if disturbed else known)[network] = {**figures, **here, "disturbed": disturbed}
    try:
        files.write_json(store, {"machine": here, "networks": known})
    except OSError as error:
        print(f"warning: {store} could not be written ({error.strerror}); the next report measures again", flush=True)
    return known | passing


def _measure(group: Sequence[runs.Run], trust: bool) -> dict[str, Any] | None:
    """Time the weights of the first run that still has them, float32 on the CPU."""
    from kd import models
    from kd.benchmark import speed

    for run in group:
        folder = run.folder / "checkpoints" / "best"
        if (folder / "config.json").is_file():
            try:
                classifier, record = models.load(folder, trust), run.record
            except ValueError as error:
                print(f"warning: {folder} is not timed: {error}", flush=True)
                return None
            size = record["dataset"]["image_size"]
            channels = classifier.built["in_channels"]
            figures = speed.measure(classifier, size, channels, "cpu")
            return {**figures, "activations_mib": activations_mib(classifier, size, channels), "precision": "fp32"}
    return None


def activations_mib(classifier: Any, size: int, channels: int, batch: int = 64) -> float:
    """Input and output of the largest layer at a batch of 64, MiB: the least that a pass needs beside the weights."""
    import torch

    largest = [0]

    def note(_: Any, inputs: Any, output: Any) -> None:
        tensors = [t for t in (*inputs, output) if isinstance(t, torch.Tensor)]
        largest[0] = max(largest[0], sum(t.numel() * t.element_size() for t in tensors))

    leaves = [m for m in classifier.modules() if not list(m.children())]
    hooks = [m.register_forward_hook(note) for m in leaves]
    try:
        with torch.inference_mode():
            classifier(torch.zeros(batch, channels, size, size, dtype=torch.uint8))
    finally:
        for hook in hooks:
            hook.remove()
    return largest[0] / 2**20
