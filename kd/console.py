"""What a person sees of a training: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_SECONDS = 10  # between two plain lines


class Console:
    """Epoch, steps, images/s, losses, val top-1 and time left."""

    def __init__(self, title: str):
        self.title, self.live, self.task, self.said = title, None, None, 0.0
        self.val = ""

    def __enter__(self) -> Console:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            ]
            self.live = Progress(*columns, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def interval(self, training: Any, values: dict[str, float]) -> None:
        """Show a reading of the step metrics."""
        p = training.progress
        terms = " ".join(f"{n.rsplit('/', 1)[1]} {v:.3f}" for n, v in values.items() if n.startswith("train/loss/"))
        text = f"step {p.step}/{training.steps}  {values['images_per_s']:.0f} images/s  loss {values['train/loss']:.3f} ({terms}) {self.val}"
        epoch = f"epoch {1 + (p.step - 1) // training.steps_per_epoch}"
        if self.live:
            if self.task is None:
                self.task = self.live.add_task(self.title, total=training.steps, text="")
            self.live.update(self.task, completed=p.step, text=f"{epoch}  {text}")
        elif time.monotonic() - self.said > PLAIN_SECONDS:
            self.said = time.monotonic()
            left = (training.steps - p.step) * values["time/step_ms"] / 1000
            print(f"{self.title}  {epoch}  {text} {_minutes(left)} left", flush=True)

    def epoch(self, training: Any, row: dict[str, float]) -> None:
        """Remember the validation's figures for the next line."""
        found = [f"{n} {100 * v:.1f} %" for n, v in row.items() if n.endswith("/top1") and not n.startswith("epoch/")]
        self.val = " ".join(found) or self.val


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
