"""Three finished runs, made in seconds: a teacher, a student alone, the student distilled."""

from __future__ import annotations

from pathlib import Path

from kd import compose, run, runs

SETTINGS = (
    "teacher=resnet14",
    "teacher.args.width=4",
    "student=resnet8",
    "student.args.width=4",
    "teacher.recipe.steps=60",
    "recipe.steps=40",
    "recipe.batch_size=32",
    "dataset.train_fraction=0.3",
    "teacher.min_top1=0",
    "tracker=none",
    "threads=1",
)


def make(runs_dir: Path, *more: str) -> dict[str, runs.Run]:
    """{teacher, alone, distilled} below runs_dir."""
    student = run(compose(*SETTINGS, *more, f"runs_dir={runs_dir}"), say=lambda _: None)
    folder = student.folder.parent
    return {
        "teacher": runs.Run(folder / student.record["teacher"]["run"]),
        "alone": runs.Run(folder / student.record["baseline"]["run"]),
        "distilled": runs.Run(student.folder),
    }
