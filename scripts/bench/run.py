"""Our training step against the textbook's, in one process, in turns: medians of the ratios of neighbours.

    make bench                                            all pairs, eager, a table
    make bench OUT=bench.json                             and JSON
    make bench ARGS="compile=true seconds=120"            compiled too (a minute to compile each loop, the first time)
    make bench ARGS="pairs=resnet56/resnet20 memory=true"     one pair; peak memory of each loop in a process of its own

On a machine that others use too, `threads=1 clock=cpu` counts the processor's time instead of the wall's (the textbook's
worker processes are then not counted). CIFAR-10's shape, crop and flip, kd, SGD. Batch 64; `none/resnet20` is the student
alone at 128, which shows what the loop itself costs. A pair is TEACHER/STUDENT; `:KEY=VALUE` gives the student an argument.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from loops import Pair

PAIRS = (
    "none/resnet20",
    "resnet56/resnet20",
    "resnet32x4/resnet8x4",
    "vit_b/resnet18",
    "vit_b/resnet18:small_stem=false",
)
DEFAULTS = {
    "pairs": ",".join(PAIRS), "seconds": "60", "compile": "false", "memory": "false", "out": "", "threads": "",
    "device": "auto", "only": "", "rounds": "5", "clock": "wall",
    "workers": "2",
}  # fmt: skip
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RATIOS = (("ours", "textbook"), ("cached", "textbook"), ("ours", "bare"))


def main(arguments: list[str]) -> int:
    """Measure what the arguments say; 2 for an argument that there is none of."""
    options = dict(DEFAULTS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in DEFAULTS:
            print(f"{argument}: expected one of {', '.join(f'{k}=' for k in DEFAULTS)}", file=sys.stderr)
            return 2
        options[key] = value
    if options["clock"] not in CLOCKS:
        print(f"clock={options['clock']}: expected wall or cpu", file=sys.stderr)
        return 2
    if odd := [p for p in options["pairs"].split(",") if p.count("/") != 1]:
        print(f"pairs={odd[0]}: expected TEACHER/STUDENT, such as resnet56/resnet20 or none/resnet20", file=sys.stderr)
        return 2
    from kd.device import pick_device, set_up

    device = pick_device(options["device"])
    set_up(device, int(options["threads"]) if options["threads"] else None)
    if options["only"]:
        print(json.dumps(peak(options["pairs"], options["only"], device)))
        return 0
    found = {"device": about(device), "pairs": {}}
    for name in options["pairs"].split(","):
        found["pairs"][name] = measured = measure(name, options, device)
        print(table(name, measured), flush=True)
        if options["out"]:
            Path(options["out"]).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def loops_of(pair: Pair, compiling: bool, workers: int) -> dict[str, Iterator[Any]]:
    """The loops to compare, by name."""
    loops = {"textbook": pair.textbook(workers), "ours": pair.ours(), "bare": pair.bare()}
    if pair.teacher != "none":
        loops["cached"] = pair.ours(cached=True)
    if compiling:
        loops |= {"ours compiled": pair.ours(compiling=True), "bare compiled": pair.bare(compiling=True)}
        if pair.teacher != "none":
            loops["cached compiled"] = pair.ours(cached=True, compiling=True)
    return loops


def measure(name: str, options: dict[str, str], device: str) -> dict[str, Any]:
    """Seconds of a step of each loop, and ratios of images/s, from rounds in which every loop takes a turn."""
    batch_size = 128 if name.startswith("none/") else 64
    torch.compiler.reset()  # what another pair compiled counts towards Dynamo's limit
    with tempfile.TemporaryDirectory() as place:
        pair = Pair(name, batch_size, Path(place), device)
        loops = loops_of(pair, options["compile"] == "true", int(options["workers"]))
        for key, steps in loops.items():  # warm up; a cached loop writes its epoch
            for _ in range(26 if key.startswith("cached") else 3):
                next(steps)
        rounds: list[dict[str, float]] = []
        end = time.perf_counter() + float(options["seconds"])
        while len(rounds) < int(options["rounds"]) or time.perf_counter() < end:
            rounds.append({key: timed(steps, device, CLOCKS[options["clock"]]) for key, steps in loops.items()})
        for steps in loops.values():
            steps.close()
    found = {
        "batch_size": batch_size,
        "images": pair.source,
        "rounds": len(rounds),
        "images_per_s": {k: batch_size / statistics.median(r[k] for r in rounds) for k in loops},
        "ratios": ratios(rounds, list(loops)),
    }
    if options["memory"] == "true":
        found["peak_mib"] = {k: in_own_process(name, k, options) for k in ("textbook", "ours", "cached") if k in loops}
    return found


def timed(steps: Iterator[Any], device: str, clock: Callable[[], float], least: float = 0.3) -> float:
    """Seconds a step, over as many as fill `least` seconds; the first sets the caches right and does not count."""
    next(steps)
    wait(device)
    started, count = clock(), 0
    while not count or clock() - started < least:
        next(steps)
        count += 1
        if not device.startswith("cuda") or count % 10 == 0:
            wait(device)
    wait(device)
    return (clock() - started) / count


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratios(rounds: list[dict[str, float]], names: list[str]) -> dict[str, float]:
    """`a / b` in images/s: the median over the rounds of each round's own ratio."""
    found = {}
    for name in names:
        kind, _, mode = name.partition(" ")
        for one, other in RATIOS:
            other = f"{other} {mode}".strip() if other == "bare" else other  # noqa: PLW2901
            if kind == one and other in names:
                found[f"{name} / {other}"] = statistics.median(r[other] / r[name] for r in rounds)
    return found


def peak(name: str, which: str, device: str, steps: int = 30) -> float:
    """Highest resident memory of this process, MiB, during some steps of one loop."""
    from kd.benchmark import memory

    with tempfile.TemporaryDirectory() as place:
        pair = Pair(name, 128 if name.startswith("none/") else 64, Path(place), device)
        loop = pair.textbook() if which == "textbook" else pair.ours(cached=which == "cached")
        memory.reset_peak()  # unpacking the photographs took more than training does
        for _ in range(steps):
            next(loop)
        loop.close()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return memory.resident("VmHWM")


def in_own_process(name: str, which: str, options: dict[str, str]) -> float:
    """`peak` where nothing else has been."""
    command = [sys.executable, __file__, f"pairs={name}", f"only={which}", f"device={options['device']}"]
    command += [f"threads={options['threads']}"] if options["threads"] else []
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def about(device: str) -> dict[str, Any]:
    """What it was measured on."""
    from kd.runs import environment

    known = environment(device)
    return {k: known[k] for k in ("device_name", "threads", "cores", "torch", "commit")}


def table(name: str, found: dict[str, Any]) -> str:
    """Images/s and ratios, for people."""
    lines = [f"{name}, batch {found['batch_size']}, {found['images']}, {found['rounds']} rounds"]
    lines += [f"  {k:<18}{v:>9.1f} images/s" for k, v in found["images_per_s"].items()]
    lines += [f"  {k:<34}{v:>6.2f}" for k, v in found["ratios"].items()]
    lines += [f"  peak memory {k:<12}{v:>9.0f} MiB" for k, v in found.get("peak_mib", {}).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
