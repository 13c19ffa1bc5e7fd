"""What a classifier costs: parameters, multiply-accumulates, size, latency, throughput."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from kd import models

SECONDS = 0.8  # for each of latency and throughput
BATCH = 64
BUSY = 0.25  # others at work, a core


@torch.inference_mode()
def measure(
    classifier: torch.nn.Module, image_size: int, channels: int, device: str, seconds: float = SECONDS
) -> dict[str, float]:
    """Median latency of one image and throughput of a batch, float32, eager, preprocessing counted in."""
    classifier = classifier.to(device).float().eval()
    one, many = (
        torch.randint(256, (n, channels, image_size, image_size), dtype=torch.uint8, device=device) for n in (1, BATCH)
    )
    return {
        "latency_ms": 1000 * _median_seconds(classifier, one, seconds),
        "images_per_s": BATCH / _median_seconds(classifier, many, seconds),
        "parameters": models.count_parameters(classifier),
        "macs": models.count_macs(classifier, image_size),
    }


def _median_seconds(classifier: torch.nn.Module, images: torch.Tensor, seconds: float) -> float:
    """Median time of a call; the first, or the first two where there is time, warm up."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        classifier(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:] if len(times) > 4 else times[1:])


def others_at_work(samples: int = 10, apart: float = 0.03) -> float | None:
    """How many other threads of this machine want a core just now, a mean of some looks; None where it cannot be told."""
    found = []
    for _ in range(samples):
        try:
            running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0]
        except OSError:
            return None
        found.append(int(running) - 1)  # this one
        time.sleep(apart)
    return sum(found) / samples


def disturbed(others: float | None) -> bool:
    """Whether so many others leave too few cores to time anything."""
    return others is not None and others > BUSY * (os.cpu_count() or 1)


def size_mib(weights: Path) -> float:
    """A weights file's size."""
    return weights.stat().st_size / 2**20


def summary(
    classifier: torch.nn.Module, weights: Path, dataset: Any, device: str, timed: bool = True
) -> dict[str, float]:
    """The efficiency figures of a run's record; without `timed` only those that need no clock."""
    if not timed:
        counted = {
            "parameters": models.count_parameters(classifier),
            "macs": models.count_macs(classifier, dataset.image_size),
        }
        return {**counted, "size_mib": size_mib(weights)}
    others = others_at_work()
    figures = measure(classifier, dataset.image_size, dataset.channels, device)
    return {
        **figures,
        "size_mib": size_mib(weights),
        "precision": "fp32",
        "batch_size": BATCH,
        "threads": torch.get_num_threads(),
        "disturbed": disturbed(others),
    }
