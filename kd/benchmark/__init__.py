"""What distillation buys: teacher and student side by side in latency, throughput, memory and size.

    python -m kd.benchmark run=RUN_DIR                       a run's student beside its teacher
    python -m kd.benchmark run=[RUN_DIR,RUN_DIR]             several
    python -m kd.benchmark teacher=vit_b student=resnet18    networks, without training them
    python -m kd.benchmark run=RUN_DIR modes=[eager,compiled,onnx] precisions=[fp32,bf16,int8] threads=1
    python -m kd.benchmark run=RUN_DIR batch_sizes=[1,32] seconds=5 out=FILE.json
    python -m kd.benchmark step=true teacher=resnet56 student=resnet20     where a training step's time goes

Everything is measured in turns in one process. Preprocessing is counted in, and shown apart.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import cli
from kd.hints import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from kd.benchmark.timing import Times
    from kd.config import BenchmarkConfig


def main() -> None:
    """`python -m kd.benchmark` and `kd-benchmark`."""
    cli.entry("benchmark", benchmark, __doc__)


@dataclass
class Item:
    """A network to be measured: its saved folder and the part it plays."""

    label: str
    role: str  # teacher | student
    folder: Path
    runs: list[Path] = dataclasses.field(default_factory=list)  # whose records the figures go into


@dataclass
class Cell:
    """An item in one mode and precision, ready to run."""

    item: Item
    mode: str
    precision: str
    ask: Callable[[Tensor], Tensor]
    preprocess: Callable[[Tensor], Tensor] | None
    size_mib: float

    @property
    def name(self) -> str:
        """Unique in a session."""
        return f"{self.item.label}, {self.mode} {self.precision}"


def benchmark(cfg: BenchmarkConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure what `cfg` names; the figures, which also go to the runs' records, to `out` and onto the screen."""
    if cfg.step:
        from kd.benchmark import steptime

        return steptime.report(cfg, say)
    from kd import device
    from kd.benchmark import modes, table

    where = device.pick_device(cfg.device)
    device.set_up(where, cfg.threads)
    chosen = modes.pairs(cfg.modes, cfg.precisions, where)
    check(cfg)
    load = busy(say)
    with tempfile.TemporaryDirectory(prefix="kd-benchmark-") as scratch:
        items, dataset = collect(cfg, Path(scratch))
        calibration = None
        if "int8" in [p for _, p in chosen]:
            from kd import export

            calibration = export.calibration(dataset, cfg)
        cells = [
            make_cell(item, *pair, where, Path(scratch), dataset, calibration, cfg.trust)
            for item in items
            for pair in chosen
        ]
        timed = measure(cells, dataset, cfg, where, say)
        figures = {**summarise(cells, timed, items, cfg, where), "load": load}
    keep(figures, items, cfg, say)
    table.show(figures, say)
    return figures


def busy(say: Callable[[str], None]) -> float | None:
    """How many others want a core before measuring; said where they leave too few."""
    from kd.benchmark import speed

    others = speed.others_at_work()
    if speed.disturbed(others):
        say(
            f"warning: the machine is busy ({others:.1f} others at work). Long calls are interrupted more than short ones: "
            "ratios come out too large"
        )
    return others


def check(cfg: BenchmarkConfig) -> None:
    """ConfigError for sizes that cannot be measured."""
    if not cfg.batch_sizes or any(not isinstance(b, int) or b < 1 for b in cfg.batch_sizes):
        raise ConfigError(f"batch_sizes={cfg.batch_sizes}: expected numbers above 0, such as batch_sizes=[1,8,64]")
    if not cfg.interval > 0:
        raise ConfigError(f"interval={cfg.interval}: expected a fraction above 0, such as interval=0.03")


def collect(cfg: BenchmarkConfig, scratch: Path) -> tuple[list[Item], Any]:
    """What is to be measured, teachers first, and the dataset whose images it is measured on."""
    if not cfg.run:
        return untrained(cfg, scratch)
    from kd import evaluate, files, runs, saved

    found: dict[str, Item] = {}
    opened = [runs.open_run(saved.local(r)) for r in (cfg.run if isinstance(cfg.run, list) else [cfg.run])]
    for run in opened:
        mine = saved.find(run.folder)
        pair = [("teacher", saved.teacher_of(mine)), ("student", mine)]
        for role, one in pair:
            if one is None:
                continue
            name = run.record["config"][role]["name"]
            key = files.digest(one.folder / "model.safetensors")
            item = found.setdefault(key, Item(_free(f"{role} {name}", found), role, one.folder))
            item.runs.append(run.folder)
    items = sorted(found.values(), key=lambda i: i.role != "teacher")
    return items, evaluate.open_data_of(opened[0], cfg)


def _free(label: str, found: dict[str, Item]) -> str:
    """The label, numbered where it is taken."""
    taken = {i.label for i in found.values()}
    return next(x for x in (label, *(f"{label} ({n})" for n in range(2, 1000))) if x not in taken)


def untrained(cfg: BenchmarkConfig, scratch: Path) -> tuple[list[Item], Any]:
    """Teacher and student as the settings describe them, with random weights: the cost is the same."""
    from kd import models
    from kd.prepare import open_dataset

    dataset, items = open_dataset(cfg), []
    for role in ("teacher", "student"):
        model = getattr(cfg, role)
        if model.name == "none":
            continue
        spec = dataclasses.asdict(model)
        models.allow(model.args)
        classifier = models.build(
            spec, dataset.num_classes, dataset.image_size, dataset.channels, classes=dataset.classes
        )
        models.save(classifier, scratch / role)
        items.append(Item(f"{role} {model.name}", role, scratch / role))
    return items, dataset


def make_cell(
    item: Item,
    mode: str,
    precision: str,
    where: str,
    scratch: Path,
    dataset: Any,
    calibration: Tensor | None,
    trust: bool,
) -> Cell:
    """An item in one mode and precision."""
    from kd import models
    from kd.benchmark import modes, speed

    classifier = models.load(item.folder, trust)
    file = scratch / f"{abs(hash(item.label))}-{mode}-{precision}"
    ask = modes.ready(classifier, mode, precision, where, file, dataset.channels, calibration)
    written = list(scratch.glob(f"{file.name}.*"))
    size = speed.size_mib(written[0] if written else item.folder / "model.safetensors")
    alone = classifier.preprocess if mode not in modes.EXPORTED else None  # inside an exported file it cannot be timed
    return Cell(item, mode, precision, ask, alone, size / (2 if precision == "bf16" else 1))


def measure(
    cells: list[Cell], dataset: Any, cfg: BenchmarkConfig, where: str, say: Callable[[str], None]
) -> dict[int, dict[str, Times]]:
    """{batch size: {cell, or cell + " preprocess": times}}; all cells take turns at each batch size."""
    import torch

    from kd.benchmark import timing

    wait = torch.cuda.synchronize if where.startswith("cuda") else (lambda: None)
    found = {}
    with torch.inference_mode():
        for size in sorted({1, *cfg.batch_sizes}):
            say(f"batch size {size} ...")
            if any(c.mode == "compiled" for c in cells):
                torch.compiler.reset()  # past its limit of shapes Dynamo would run them eager and say nothing
            images = images_of(dataset, size, cfg.split).to(where)
            calls = {c.name: _bound(c.ask, images) for c in cells}
            apart = {f"{c.name} preprocess": _bound(c.preprocess, images) for c in cells if c.preprocess}
            found[size] = timing.take_turns(calls | apart, cfg.seconds, cfg.interval, wait, loose=apart)
    return found


def _bound(ask: Callable[[Tensor], Any], images: Tensor) -> Callable[[], Any]:
    return lambda: ask(images)


def images_of(dataset: Any, count: int, wanted: str = "test") -> Tensor:
    """uint8 (count, C, h, w): real images, of the split wanted if there is one, in turn where there are fewer."""
    import torch

    splits = (getattr(dataset, name) for name in (wanted, "test", "val", "train"))
    split = next(s for s in splits if s is not None and len(s))
    return next(split.subset(torch.arange(count) % len(split)).batches(count)).images.contiguous()


def summarise(
    cells: list[Cell], timed: dict[int, dict[str, Times]], items: list[Item], cfg: BenchmarkConfig, where: str
) -> dict[str, Any]:
    """Every figure, ready for JSON: `cells`, `ratios` to the first cell, and what they were measured on."""
    import torch

    from kd import models, runs

    costs = {}
    for item in items:
        classifier = models.load(item.folder, cfg.trust)
        costs[item.label] = {"parameters": models.count_parameters(classifier), "macs": models.count_macs(classifier)}
    memory = peaks(cells, cfg, where)
    rows = [{**describe(c, timed), **costs[c.item.label], **memory.get(c.name, {})} for c in cells]
    surroundings = runs.environment(where)
    kept = {k: surroundings[k] for k in ("device", "device_name", "threads", "torch", "kd", "commit")}
    return {
        "reference": rows[0]["name"],
        "cells": rows,
        "ratios": [against(c, cells[0], timed, rows[i], rows[0]) for i, c in enumerate(cells) if i],
        "environment": kept,
        "seconds": cfg.seconds,
        "cuda": torch.version.cuda if where.startswith("cuda") else None,
    }


def peaks(cells: list[Cell], cfg: BenchmarkConfig, where: str) -> dict[str, dict[str, Any]]:
    """{cell: peak memory of batch 1 and of the largest batch}, of eager ones."""
    import torch

    from kd.benchmark import memory

    if not cfg.memory:
        return {}
    sizes = sorted({1, max(cfg.batch_sizes)})
    found = {}
    for cell in cells:
        if cell.mode == "eager":
            values = memory.peak_mib(cell.item.folder, sizes, where, torch.get_num_threads(), cell.precision)
            found[cell.name] = {"peak_mib": {str(k): v for k, v in values.items()}}
    return found


def describe(cell: Cell, timed: dict[int, dict[str, Times]]) -> dict[str, Any]:
    """A cell's own figures."""
    import numpy as np

    one = timed[1][cell.name]
    p50, p95, p99 = (float(q) for q in np.quantile(one.calls(), (0.5, 0.95, 0.99)))
    middle, low, high = one.median()
    curve = {}
    for size, times in timed.items():
        seconds, fast, slow = times[cell.name].median()
        curve[str(size)] = {"images_per_s": size / seconds, "low": size / slow, "high": size / fast}
    found = {
        "name": cell.name,
        "model": cell.item.label,
        "role": cell.item.role,
        "mode": cell.mode,
        "precision": cell.precision,
        "latency_ms": {
            "median": 1e3 * middle,
            "low": 1e3 * low,
            "high": 1e3 * high,
            "p50": 1e3 * p50,
            "p95": 1e3 * p95,
            "p99": 1e3 * p99,
        },
        "images_per_s": curve,
        "best_images_per_s": max(c["images_per_s"] for c in curve.values()),
        "size_mib": cell.size_mib,
        "calls": len(one.calls()),
    }
    if cell.preprocess:
        apart = {str(s): 1e3 * t[f"{cell.name} preprocess"].median()[0] for s, t in timed.items()}
        found["preprocess_ms"] = apart
    return found


def against(
    cell: Cell, reference: Cell, timed: dict[int, dict[str, Times]], row: dict[str, Any], first: dict[str, Any]
) -> dict[str, Any]:
    """How many times less a cell takes than the reference: [ratio, low, high] where it was timed, else a number."""
    from kd.benchmark import timing

    by_size = {str(s): list(timing.ratio(t[reference.name], t[cell.name])) for s, t in timed.items()}
    largest = str(max(timed))
    found = {
        "name": cell.name,
        "latency": by_size["1"],
        "throughput": by_size[largest],
        "throughput_batch_size": int(largest),
        "by_batch_size": by_size,
        **{k: first[k] / row[k] for k in ("parameters", "macs", "size_mib")},
    }
    mine, theirs = row.get("peak_mib") or {}, first.get("peak_mib") or {}
    if mine.get(largest) and theirs.get(largest):
        found["peak_mib"] = theirs[largest] / mine[largest]
    return found


def keep(figures: dict[str, Any], items: list[Item], cfg: BenchmarkConfig, say: Callable[[str], None]) -> None:
    """Into the records of the runs, with a picture beside them; and to `out`."""
    from kd import files, runs
    from kd.benchmark.plot import draw

    folders = sorted({folder for item in items for folder in item.runs})
    for folder in folders:
        run = runs.Run(folder)
        with runs.lock(run, wait=True):
            run.update(benchmark=figures)
        say(f"picture: {draw(figures, folder / 'plots' / 'benchmark.png')}")
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        files.write_json(Path(cfg.out), runs.finite(figures))
        say(f"picture: {draw(figures, Path(cfg.out).with_suffix('.png'))}")
    elif not folders:
        names = "-".join(i.label.split(" ", 1)[1] for i in items)
        say(f"picture: {draw(figures, Path(cfg.runs_dir) / 'plots' / f'benchmark-{names}.png')}")
