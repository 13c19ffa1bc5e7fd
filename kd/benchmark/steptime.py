"""Where a training step's time goes, how near it comes to the device's peak, and what would help most.

    python -m kd.benchmark step=true teacher=resnet56 student=resnet20 dataset=cifar10 recipe.batch_size=64

The networks have random weights: a step takes as long with them. On a GPU the parts are waited for one by one, which a
real step does not do: their sum is an upper bound of `step`.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kd.config import Config
    from kd.loop import Training

PARTS = ("data", "view", "teacher", "student", "loss", "backward", "optimiser", "logging")
WARM, STEPS = 3, 17  # together an interval between two readings of the metrics
COMPILE_GAIN = 0.2  # of the student's forward and backward, on 2 CPU cores (docs/performance.md)


def report(cfg: Config, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The figures of `cfg`'s training step, which also go to `out` and onto the screen."""
    from kd import device, files

    where = device.pick_device(cfg.device)
    device.set_up(where, cfg.threads)
    with tempfile.TemporaryDirectory(prefix="kd-steptime-") as place:
        training, dataset = ready(cfg, where, Path(place))
        compiled = training.forward is not training.student
        figures = measure(training, dataset, Path(place))
        figures |= against_peak(training, figures)
        figures["memory/peak_mib"] = peak_mib(where)
        figures["advice"] = advice(training, figures, compiled)
    show(figures, cfg, say)
    if getattr(cfg, "out", None):
        files.write_json(Path(cfg.out), figures)
    return figures


def ready(cfg: Config, where: str, place: Path) -> tuple[Training, Any]:
    """What `kd.train` would train with, the teacher as far as it is trained, nothing written into runs_dir but the image store."""
    from kd import device, prepare, runs, teacher
    from kd.check.look import present

    dataset = prepare.open_dataset(cfg)
    cfg = prepare.resolve(cfg, dataset)
    loaded = None
    cfg.student.pretrained = False
    if cfg.teacher.name != "none":
        loaded, _ = present(cfg, dataset, lambda _: None)
        half = device.resolve_precision(cfg.recipe.precision, where, loaded.classifier) == "bf16"
        loaded.classifier = teacher.freeze(loaded.classifier, where, half)
        cfg.teacher.cache = "off"
    run = runs.Run(place / "run")
    run.folder.mkdir()
    run.record = {"environment": {"device": where}}
    return prepare.assemble(cfg, dataset, loaded, where, run, lambda _: None), dataset


def measure(training: Training, dataset: Any, place: Path, steps: int = STEPS) -> dict[str, Any]:
    """Median milliseconds of each part and of the whole step, by `time/<part>_ms`."""
    from kd import loop
    from kd.tracking import Tracker

    clock = _Clock(training.device)
    _watch(training, clock)
    meter, tracker, quiet = loop.Meter(), Tracker(place), SimpleNamespace(interval=lambda *_: None)
    training.student.train()
    source = _endless(training, dataset)
    rows = []
    for _ in range(WARM + steps):
        clock.start()
        raw = clock.within("data", next, source)
        values = clock.within("backward", loop.train_step, training, raw)
        clock.within("optimiser", _apply, loop, training, meter, values)
        rows.append(clock.read())
    rows = rows[WARM:]
    clock.start()
    clock.within(
        "logging", loop._flush, training, meter, tracker, quiet
    )  # once an interval, so a share of it is a step's
    clock.within("logging", tracker.flush)
    for row in rows:
        row |= {"logging": clock.read()["logging"] / (WARM + steps)}
    found = {f"time/{p}_ms": 1000 * statistics.median(r.get(p, 0.0) for r in rows) for p in PARTS}
    return {**found, "time/step_ms": 1000 * statistics.median(sum(r.values()) for r in rows)}


class _Clock:
    """Seconds by part; a part inside another is taken from it."""

    def __init__(self, device: str):
        self.device, self.parts, self.stack = device, {}, []

    def start(self) -> None:
        self.parts = {}

    def within(self, part: str, call: Callable, *args: Any, **kwargs: Any) -> Any:
        self.stack.append(0.0)
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds, inner = time.perf_counter() - started, self.stack.pop()
            self.parts[part] = self.parts.get(part, 0.0) + seconds - inner
            if self.stack:
                self.stack[-1] += seconds

    def read(self) -> dict[str, float]:
        return dict(self.parts)


def _watch(training: Training, clock: _Clock) -> None:
    """Let the clock see the parts of `train_step`; what is left of it is the backward pass."""

    def seen(part: str, call: Callable) -> Callable:
        return lambda *args, **kwargs: clock.within(part, call, *args, **kwargs)

    training.view = seen("view", training.view)
    training.forward = seen("student", training.forward)
    training.loss.forward = seen("loss", training.loss.forward)
    if training.ask_teacher is not None:
        training.ask_teacher = seen("teacher", training.ask_teacher)


def _apply(loop: Any, training: Training, meter: Any, values: Any) -> None:
    meter.add(training.progress.step, loop.apply_step(training), training.names, values)
    training.progress.step += 1


def _endless(training: Training, dataset: Any):
    epoch = 0
    while True:
        yield from dataset.train.epoch(epoch, training.recipe.batch_size, training.seed, device=training.device)
        epoch += 1


def against_peak(training: Training, figures: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of the student (forward and backward: three forwards) beside the device's largest matrix product's."""
    from kd import models

    batch, size = training.recipe.batch_size, training.student.image_size
    flops = 3 * 2 * batch * models.count_macs(training.student, size)
    seconds = (figures["time/student_ms"] + figures["time/backward_ms"]) / 1000
    dtype = torch.bfloat16 if training.autocast else torch.float32
    peak = matrix_peak(training.device, dtype)
    return {
        "precision": "bf16" if training.autocast else "fp32",
        "peak_gflops": peak,
        "student_gflops": flops / seconds / 1e9,
        "student_share_of_peak": flops / seconds / 1e9 / peak,
        "images_per_s": 1000 * batch / figures["time/step_ms"],
    }


def matrix_peak(device: str, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """GFLOP/s of a large square matrix product: the best of several."""
    side = 8192 if device.startswith("cuda") else 1536
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end:
            started = time.perf_counter()
            one @ other
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e9


def peak_mib(device: str) -> float:
    """Highest memory so far: the device's allocations, or this process's resident set."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def advice(training: Training, figures: dict[str, Any], compiled: bool) -> list[dict[str, Any]]:
    """The three things that would save most of a step, with an estimate of the milliseconds."""
    ms = {p: figures[f"time/{p}_ms"] for p in PARTS}
    network, whole = ms["student"] + ms["backward"], figures["time/step_ms"]
    found = [
        (ms["teacher"], "the teacher's answers are the same for every student: teacher.cache=auto keeps them, and later runs read"),
        (_from_precision(training, network), "recipe.precision=bf16: the device multiplies it several times faster"),
        (0.0 if compiled else COMPILE_GAIN * network, "recipe.compile=on, for runs of some 165,000 images or more"),
        (ms["data"] - 0.01 * whole, "the data path waits: raise dataset.memory_gib so that the set is decoded once, or workers"),
        (ms["view"] - 0.02 * whole, "the augmentation: a cheaper augment, such as crop_flip"),
        (ms["optimiser"] / 2, "the optimiser works once a batch: recipe.batch_size twice as large halves its share"),
        (_from_threads(training, network + ms["teacher"]), "threads: more of this machine's cores"),
    ]  # fmt: skip
    best = sorted((f for f in found if f[0] > 0.01 * whole), key=lambda f: -f[0])[:3]
    return [{"saves_ms": round(saves, 3), "what": what} for saves, what in best]


def _from_precision(training: Training, network_ms: float) -> float:
    from kd import device

    gains = not training.autocast and device.fast_bfloat16(training.device)
    return 0.5 * network_ms if gains and device.density(training.student) >= device.DENSE else 0.0


def _from_threads(training: Training, network_ms: float) -> float:
    import os

    idle = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ) - torch.get_num_threads()
    return 0.3 * network_ms if idle > 0 and not training.device.startswith("cuda") else 0.0


def show(figures: dict[str, Any], cfg: Config, say: Callable[[str], None]) -> None:
    """The figures for people."""
    whole = figures["time/step_ms"]
    say(f"{cfg.teacher.name} -> {cfg.student.name}, batch {cfg.recipe.batch_size}, {figures['precision']}: "
        f"{whole:.1f} ms a step, {figures['images_per_s']:.0f} images/s, {figures['memory/peak_mib']:.0f} MiB at most")  # fmt: skip
    for part in PARTS:
        ms = figures[f"time/{part}_ms"]
        say(f"  {part:<10}{ms:9.2f} ms {100 * ms / whole:5.1f} %")
    say(f"  the student runs at {figures['student_gflops']:.0f} GFLOP/s, {100 * figures['student_share_of_peak']:.0f} % of "
        f"the {figures['peak_gflops']:.0f} of a large matrix product here")  # fmt: skip
    for place, item in enumerate(figures["advice"], 1):
        say(f"  {place}. {item['what']} (about {item['saves_ms']:.1f} ms, {100 * item['saves_ms'] / whole:.0f} %)")
