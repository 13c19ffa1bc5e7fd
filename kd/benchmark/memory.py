"""Peak memory of inference, measured in a process of its own: resident on the CPU, allocated on CUDA.

python -m kd.benchmark.memory SAVED_MODEL_FOLDER --batch-sizes 1 64
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_mib(
    folder: Path, batch_sizes: list[int], device: str, threads: int, precision: str = "fp32"
) -> dict[int, float]:
    """{batch size: MiB} above what torch itself takes: weights, activations, work space; {} where it cannot be told."""
    if device == "cpu" and not STATUS.exists():
        return {}
    sizes = [str(b) for b in sorted(batch_sizes)]
    command = [sys.executable, "-m", "kd.benchmark.memory", str(folder), "--batch-sizes", *sizes]
    command += ["--device", device, "--threads", str(threads), "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {folder} failed: {done.stderr.strip().splitlines()[-1:]}")
    return {int(b): v for b, v in json.loads(done.stdout.splitlines()[-1]).items()}


def resident(word: str) -> float:
    """MiB of VmRSS (now) or VmHWM (peak) of this process."""
    line = next(x for x in STATUS.read_text(encoding="utf-8").splitlines() if x.startswith(word))
    return int(line.split()[1]) / 1024


def reset_peak() -> float:
    """Forget the peak so far; gives what is resident now, in MiB."""
    with suppress(OSError):  # where it is not allowed, what imports took for a moment may hide a small model
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def measure(folder: Path, batch_sizes: list[int], device: str, precision: str) -> dict[int, float]:
    """See `peak_mib`; for a fresh process."""
    import torch

    from kd import models

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "_target_" not in config.get("kd", {}).get("built", {}).get("args", {}):
        import timm  # noqa: F401 (its code is not the model's memory)
    with torch.inference_mode():
        torch.nn.Conv2d(3, 8, 3)(torch.rand(1, 3, 8, 8))  # nor are the kernels' libraries
        before = 0.0 if device.startswith("cuda") else reset_peak()
        classifier = models.load(folder, trust=True).to(device)  # the caller has loaded it too
        if precision == "bf16":
            classifier.network.to(torch.bfloat16)
        found = {}
        for size in batch_sizes:
            side = classifier.image_size
            images = torch.zeros(size, classifier.built["in_channels"], side, side, dtype=torch.uint8, device=device)
            for _ in range(2):
                classifier(images)
            found[size] = (
                torch.cuda.max_memory_allocated() / 2**20 if device.startswith("cuda") else resident("VmHWM") - before
            )
    return found


def main() -> None:
    """`python -m kd.benchmark.memory`, which `kd.benchmark` calls."""
    parser = argparse.ArgumentParser(prog="python -m kd.benchmark.memory", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    from kd.device import set_up

    set_up(options.device, options.threads)
    print(json.dumps(measure(options.folder, sorted(options.batch_sizes), options.device, options.precision)))


if __name__ == "__main__":
    main()
