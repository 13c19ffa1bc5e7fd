"""A report to Weights & Biases: its plots, its results as a table, and the page itself, as a run of its own."""

from __future__ import annotations

import csv
import secrets
from collections.abc import Sequence
from pathlib import Path

PLOT = "report/{}"


def send(folder: Path, plots: Sequence[Path], project: str, sweep: str | None) -> str:
    """Log the report in `folder` to [ENTITY/]PROJECT, offline beside it without a key; gives the line that says where."""
    from kd.config import Tracker as Settings
    from kd.tracking import WandbTracker

    entity, _, name = project.rpartition("/")
    settings = Settings(project=name, entity=entity or None, group=sweep)
    title = f"report {sweep or ''}".strip()
    tracker = WandbTracker(folder, settings, title, secrets.token_hex(6), {"sweep": sweep}, ["report"])
    with tracker:
        for picture in plots:
            tracker.image(PLOT.format(picture.stem), picture)
        with open(folder / "results.csv", newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        tracker.table(PLOT.format("results"), columns, rows)
        tracker.page(PLOT.format("page"), folder / "report.html")
    return tracker.where
