"""`make demo`: a teacher, a student alone and the same student distilled, on real handwritten digits, in minutes on a laptop.

The student sees a tenth of the labels, the teacher all of them: with every label even the small network is as good as the large one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kd import cli, compose, run, runs

TEACHER, STUDENT = "resnet20", "resnet8"


def main() -> None:
    """Three runs, a table and a picture."""
    settings = ["+experiment=demo", *sys.argv[1:]]
    student = run(compose(*settings))
    folder = student.folder.parent
    rows = [
        (f"teacher {TEACHER}", runs.Run(folder / student.record["teacher"]["run"]).record),
        (f"student {STUDENT} alone", runs.Run(folder / student.record["baseline"]["run"]).record),
        (f"student {STUDENT} distilled", student.record),
    ]
    show(rows)
    print(f"picture: {draw(rows, folder / 'demo.png')}")


def show(rows: list[tuple[str, dict]]) -> None:
    """The table on the screen."""
    from rich.console import Console
    from rich.table import Table

    environment = rows[-1][1]["environment"]
    table = Table(
        title=f"digits, test split; float32, {environment['device_name']}, {environment['threads']} threads, torch {environment['torch']}"
    )
    for column in (
        "model",
        "training images",
        "top-1 %",
        "parameters",
        "size MiB",
        "latency ms (1 image)",
        "images/s (batch 64)",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, record in rows:
        cost = record["efficiency"]
        table.add_row(
            name,
            str(record["dataset"]["train"]),
            f"{100 * record['metrics']['test/top1']:.1f}",
            f"{cost['parameters']:,.0f}",
            f"{cost['size_mib']:.2f}",
            f"{cost['latency_ms']:.2f}",
            f"{cost['images_per_s']:,.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if any(record["efficiency"].get("disturbed") for _, record in rows):
        print("The machine was busy with other things while these were timed: latency and images/s mean little.")


def draw(rows: list[tuple[str, dict]], path: Path) -> Path:
    """Test accuracies, and the validation curves of the two students beside it."""
    import json

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#4d4d4d", "#e69f00", "#0072b2"]
    figure, (dots, curves) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for at, (name, record) in enumerate(rows):
        top1 = 100 * record["metrics"]["test/top1"]
        dots.plot(top1, at, "o", color=colours[at], markersize=11)
        size = f"{record['efficiency']['parameters'] / 1e3:,.0f} k parameters"
        dots.annotate(f"{top1:.1f} %, {size}", (top1, at), (0, 12), textcoords="offset points", ha="center")
        lines = (path.parent / record["name"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [(r["epoch"], 100 * r["val/top1"]) for r in map(json.loads, lines) if "val/top1" in r]
        if at:
            curves.plot(*zip(*found, strict=True), color=colours[at], label=name)
    dots.set_yticks(range(len(rows)), [name for name, _ in rows])
    dots.set_ylim(len(rows) - 0.5, -0.7)
    dots.set_xlabel("test top-1 (%)")
    dots.margins(x=0.7)
    dots.grid(axis="x", alpha=0.3)
    curves.set_xlabel("epoch")
    curves.set_ylabel("validation top-1 (%)")
    curves.legend(loc="lower right")
    figure.suptitle("Distillation on handwritten digits: the student sees a tenth of the labels")
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    cli.terminable()
    try:
        main()
    except Exception as error:
        sys.exit(cli.report(error))
    except KeyboardInterrupt:
        sys.exit(130)
