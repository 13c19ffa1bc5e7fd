"""Ten students of one teacher: one sweep against ten commands of their own, in turns. `python scripts/sweep_cost.py [steps]`.

Both find the teacher trained. A command of its own pays for the process, the imports, the data and the teacher each time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

ROUNDS, STUDENTS = 2, 5
SHARED = "teacher=resnet20 teacher.recipe.epochs=5 student=resnet8 dataset.train_fraction=0.1 baseline=off tracker=none"


def seconds(folder: str, *arguments: str) -> float:
    """Wall time of a command."""
    started = time.perf_counter()
    call = [sys.executable, "-m", "kd.train", *arguments, *SHARED.split(), f"runs_dir={folder}"]
    subprocess.run(call, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Print the times of every round and their ratio."""
    steps = f"recipe.steps={sys.argv[1] if len(sys.argv) > 1 else 60}"
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for folder in (one, other):
            seconds(folder, "recipe.steps=1", "seed=99")
        swept = single = 0.0
        for at in range(ROUNDS):
            seeds = range(at * STUDENTS, (at + 1) * STUDENTS)
            took = seconds(one, "-m", steps, "sweep_name=cost", f"seed={','.join(map(str, seeds))}")
            alone = [seconds(other, steps, f"seed={s}") for s in seeds]
            swept, single = swept + took, single + sum(alone)
            print(f"round {at + 1}: {STUDENTS} students in a sweep {took:.1f} s, alone {sum(alone):.1f} s", flush=True)
        print(f"sweep / single commands: {swept:.1f} s / {single:.1f} s = {swept / single:.2f}")


if __name__ == "__main__":
    main()
