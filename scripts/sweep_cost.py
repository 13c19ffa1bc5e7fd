"""Ten students of one teacher: one sweep against ten commands of their own, in turns. `python scripts/sweep_cost.py [steps]`.

Both find the teacher trained. A command of its own pays for the process, the imports, the data and the teacher each time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

STUDENTS = 10
SHARED = "teacher=resnet20 teacher.recipe.epochs=5 student=resnet8 dataset.train_fraction=0.1 baseline=off tracker=none"


def seconds(folder: str, *arguments: str) -> float:
    """Wall time of a command."""
    started = time.perf_counter()
    call = [sys.executable, "-m", "kd.train", *arguments, *SHARED.split(), f"runs_dir={folder}"]
    subprocess.run(call, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Print the times and their ratio; half of the single commands run before the sweep, half after it."""
    steps = f"recipe.steps={sys.argv[1] if len(sys.argv) > 1 else 60}"
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for folder in (one, other):
            seconds(folder, "recipe.steps=1", "seed=99")

        def alone(seeds: range) -> float:
            return sum(seconds(other, steps, f"seed={s}") for s in seeds)

        single = alone(range(STUDENTS // 2))
        swept = seconds(one, "-m", steps, "sweep_name=cost", f"seed={','.join(map(str, range(STUDENTS)))}")
        single += alone(range(STUDENTS // 2, STUDENTS))
        print(f"{STUDENTS} students, sweep / single commands: {swept:.1f} s / {single:.1f} s = {swept / single:.2f}")


if __name__ == "__main__":
    main()
