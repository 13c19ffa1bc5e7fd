"""Reports from records alone: what is said, what is not, and the files that are written."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pytest
import wandb_file

from kd.report import behaviour, cross, efficiency, gaps, names, page, quality, results, trials
from kd.report.__main__ import Settings, parse, report
from kd.report.rows import gather

RESNET8 = {"name": "resnet8", "family": "cnn", "args": {"_target_": "kd.models.cifar.ResNet", "depth": 8}}
VIT = {
    "name": "vit_tiny_patch16_224",
    "family": "vit",
    "args": {"embed_dim": 96, "depth": 8, "num_heads": 3},
}
EMPTY = {"preprocess": {}, "pretrained": False, "checkpoint": None}
CLASSES = ["0", "1", "2"]


def model(spec: dict, **args) -> dict:
    return {**EMPTY, **spec, "args": {**spec["args"], **args}}


class Folder:
    """A runs_dir of made-up records."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()

    def add(
        self, student=RESNET8, teacher=None, seed=0, top1=0.9, status="done", select="val", teacher_top1=0.95, **more
    ):
        """A run's record; a teacher is (model, epoch)."""
        recipe = {"epochs": 60.0, "steps": None, "minutes": None, "batch_size": 16, "lr": more.pop("lr", 1e-3)}
        config = {
            "seed": seed,
            "student": model(student),
            "teacher": {**model(teacher[0]), "epoch": teacher[1], "min_top1": 0} if teacher else {"name": "none"},
            "dataset": {"name": "digits", "select": select, "train_fraction": 0.1},
            "loss": {"ce": {"weight": 0.1}, "kd": {"weight": 0.9}} if teacher else {"ce": {"weight": 1.0}},
            "augment": {"flip": False, **({"teacher_view": "same"} if teacher else {})},
            "recipe": recipe,
        }
        name = "run-" + hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
        figures = {
            "test/top1": top1,
            "test/nll": 0.3,
            "test/ece": 0.02,
            "test_last/top1": top1 - 0.01,
            "val/top1": top1,
        }
        if teacher:
            figures |= {"teacher/test/top1": teacher_top1, "teacher/test/nll": 0.1, "teacher/test/ece": 0.01}
            figures |= {"test/agreement": 0.8, "test/mistakes_copied": 0.5, "test/mistakes_mended": 0.25}
        record = {
            "format": 1,
            "name": name,
            "status": status,
            "config": config,
            "metrics": figures,
            "per_class": {"student": [top1] * 3},
            "teacher": {"name": "t", "run": more.pop("taught_by", None)} if teacher else None,
            "dataset": {"classes": CLASSES, "image_size": 16, "train": 126, "test": 360},
            "environment": {"device_name": "cpu", "threads": 1, "torch": "2", "commit": more.pop("commit", "a" * 40)},
            "efficiency": {"parameters": 1000, "macs": 2e6, "size_mib": 0.5},
            "precision": "fp32",
            **more,
        }
        (self.path / name).mkdir(exist_ok=True)
        (self.path / name / "run.json").write_text(json.dumps(record))
        return name

    def ladder(self, gains: list[float], teachers: list[float], base: float = 0.9):
        """Teachers of resnet8 kept at epochs 1.., students at base + gain, three seeds."""
        wobble = (-0.002, 0.0, 0.003)
        for seed in range(3):
            self.add(seed=seed, top1=base + wobble[seed])
            for epoch, (gain, top1) in enumerate(zip(gains, teachers, strict=True), 1):
                shift = wobble[(seed + epoch) % 3]
                self.add(teacher=(RESNET8, epoch), seed=seed, top1=base + gain + shift, teacher_top1=top1)

    def gathered(self, name=None):
        return gather(self.path, name)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "runs")


def text(sections) -> str:
    return " ".join(s for section in sections for s in section.sentences)


def test_networks_are_named_by_their_preset():
    assert names.network(model(RESNET8)) == "resnet8"
    assert names.network(model(RESNET8, width=4)) == "resnet8 width 4"
    assert names.network(model(VIT)) == "vit_micro"
    assert names.network({"name": "unheard_of", "args": {"a": 1}}) == "unheard_of a 1"


def test_equal_names_are_told_apart_by_what_differs():
    found = names.distinct([("kd", {"w": 1, "t": {"x": 4.0}}), ("kd", {"w": 1, "t": {"x": 2.0}}), ("at", {"w": 1})])
    assert sorted(found.values()) == ["at", "kd (t.x=2)", "kd (t.x=4)"]


def test_cells_are_seeds_and_find_their_baseline(folder):
    folder.ladder([0.03], [0.95])
    alone, taught = sorted(folder.gathered().cells, key=lambda c: not c.alone)
    assert (alone.mean().n, taught.mean().n) == (3, 3)
    assert taught.baseline is alone
    assert taught.gain.value == pytest.approx(0.03, abs=1e-6)
    assert taught.first.teacher == "resnet8 at epoch 1"


def test_another_budget_is_no_baseline(folder):
    folder.add(lr=1e-2)
    folder.add(teacher=(RESNET8, None))
    taught = next(c for c in folder.gathered().cells if not c.alone)
    assert taught.baseline is None
    assert "teacher=none" in gaps.sections(folder.gathered())[0].tables[0].rows[0][-1]


def test_a_resolved_ladder_is_said_to_be(folder, tmp_path):
    folder.ladder([-0.05, 0.01, 0.02, 0.03, 0.04, 0.05], [0.5, 0.91, 0.93, 0.95, 0.97, 0.99])
    sections = quality.sections(folder.gathered(), tmp_path)
    said = text(sections)
    assert "Over all teachers: a better teacher makes a better student (rank correlation 1.00" in said
    assert "not resolved whether" not in said
    assert "gains +5.0 points over itself alone" in said
    assert "Of 1 teacher that is no better than the student alone, 1 made it worse" in said
    assert len(sections[0].figures) == 2
    assert all(f.png.stat().st_size > 5000 and f.svg.is_file() for f in sections[0].figures)


def test_an_unresolved_ladder_is_said_to_be(folder, tmp_path):
    folder.ladder([0.01, -0.01, 0.012, -0.012, 0.0, 0.004], [0.91, 0.93, 0.95, 0.96, 0.97, 0.99])
    said = text(quality.sections(folder.gathered(), tmp_path))
    assert "not resolved whether a better teacher makes a better student" in said


def test_few_teachers_are_no_ladder(folder, tmp_path):
    folder.ladder([0.01, 0.02], [0.91, 0.93])
    assert quality.sections(folder.gathered(), tmp_path) == []


def test_crossing_compares_families_in_pairs(folder, tmp_path):
    for seed in range(2):
        for student in (RESNET8, VIT):
            folder.add(student=student, seed=seed, top1=0.8)
            for teacher in (RESNET8, VIT):
                gain = (0.06 if teacher is student else 0.02) + 0.001 * seed
                folder.add(student=student, teacher=(teacher, None), seed=seed, top1=0.8 + gain)
    (section,) = cross.sections(folder.gathered(), tmp_path)
    assert "A teacher of the student's own family helps more than one of another (+4.0 points" in text([section])
    assert "4 pairs" in text([section])
    assert len(section.tables[1].rows) == 4
    assert section.figures[0].png.is_file()


def test_efficiency_marks_the_front():
    def point(name, top1, latency):
        from kd.stats import mean

        return efficiency.Point(name, "student alone", mean([top1]), {"latency_ms": latency}, "")

    points = [point("small", 0.8, 1.0), point("bad", 0.7, 2.0), point("large", 0.9, 3.0)]
    assert efficiency.front(points, "latency_ms") == [True, False, True]


def test_a_network_that_was_not_timed_leaves_the_others_their_figures(tmp_path):
    def point(name, top1, **cost):
        from kd.stats import mean

        counted = {"parameters": 10, "macs": 1e6, "size_mib": 0.1}
        return efficiency.Point(name, "student alone", mean([top1]), {**counted, **cost}, "")

    points = [point("a", 0.8, latency_ms=1.0), point("b", 0.9, latency_ms=2.0), point("own", 0.95)]
    section = efficiency._section("digits", points, tmp_path, 0)
    (table,) = section.tables
    column = table.columns.index("latency ms (1 image)")
    assert [row[column] for row in table.rows] == ["1.00 *", "2.00 *", ""]
    assert {f.png.stem for f in section.figures} == {"efficiency_latency_ms", "efficiency_size_mib"}


def test_long_names_leave_a_picture_its_room():
    shown = behaviour._wrap(
        "resnet20 (recipe.epochs=2), kd (ce.weight=0.1, kd.temperature=4, kd.weight=0.9, and more)", "resnet8"
    )
    assert len(shown.splitlines()) == 3
    assert max(map(len, shown.splitlines())) <= 48


def test_results_grey_what_was_picked_on_the_test_set(folder):
    folder.add(select="test")
    folder.add(select="val")
    (section,) = results.sections(folder.gathered())
    greyed = [t.rows[i][0] for t in section.tables for i in t.greyed]
    assert greyed == ["resnet8 (epoch picked on test)"]
    assert "picked on the test set" in text([section])


def test_results_say_what_is_mixed(folder):
    folder.add(seed=0)
    folder.add(seed=1, commit="b" * 40)
    assert "mix commits of the code: aaaaaaaaaaaa, bbbbbbbbbbbb" in text(results.sections(folder.gathered()))


def test_students_and_teachers(folder, tmp_path):
    folder.ladder([0.03], [0.95])
    (section,) = behaviour.sections(folder.gathered(), tmp_path)
    assert section.tables[0].rows[0][3:] == ["80.0", "2.0", "1.0", "0.300", "0.100", "50.0", "25.0"]


def manifest(folder: Folder, cells: list[dict], name: str = "study") -> None:
    place = folder.path / "sweeps"
    place.mkdir()
    value = {"format": 1, "name": name, "command": "python -m kd.train -m +sweep=study", "cells": cells}
    (place / f"{name}.json").write_text(json.dumps(value))


def cell(run: str | None, state: str = "done", error: str | None = None, label: str = "") -> dict:
    return {"run": run, "state": state, "error": error, "label": label}


def test_what_is_missing_or_failed_is_listed_with_the_command(folder):
    done = folder.add()
    diverged = folder.add(seed=1, status="diverged", error="DivergedError: diverged at step 3")
    folder.add(seed=5, status="failed", error="boom", command="python -m kd.train seed=5")
    cells = [cell(done), cell(diverged, "new", label="seed=1"), cell(None, "failed", "no weights", "seed=2")]
    manifest(folder, cells)
    (section,) = gaps.sections(folder.gathered())
    rows = section.tables[0].rows
    assert rows == [
        ["seed=1", "diverged", "DivergedError: diverged at step 3"],
        ["seed=2", "failed", "no weights"],
    ]
    assert section.commands == ["python -m kd.train -m +sweep=study", "python -m kd.train seed=5"]


def test_the_command_of_a_missing_baseline_has_nothing_of_the_teachers():
    typed = (
        "python -m kd.train teacher=resnet20 teacher.recipe.epochs=5 recipe@teacher.recipe=cifar student=resnet8 seed=1"
    )
    assert gaps.alone(typed) == "python -m kd.train student=resnet8 seed=1 teacher=none"


def test_what_the_benchmark_measured_is_in_the_report_once(folder):
    row = {"model": "teacher a", "mode": "eager", "precision": "fp32", "name": "teacher a, eager fp32"}
    row |= {"latency_ms": {"p50": 2.0, "low": 1.9, "high": 2.1, "p99": 3.0}, "peak_mib": {"1": 3, "8": 7}}
    row |= {"images_per_s": {"1": {"images_per_s": 500}, "8": {"images_per_s": 900}}}
    ratio = {"name": "student b", "latency": [2, 1.9, 2.1], "throughput": [3, 2.9, 3.1], "throughput_batch_size": 8}
    figures = {
        "cells": [row, {**row, "model": "student b", "name": "student b"}],
        "ratios": [ratio],
        "reference": row["name"],
    }
    figures["environment"] = {"device_name": "cpu", "threads": 2, "torch": "2"}
    for seed in (0, 1):
        folder.add(seed=seed, benchmark=figures)
    (section,) = efficiency.benchmarks(folder.gathered())
    (table,) = section.tables
    assert [r[0] for r in table.rows] == ["teacher a", "student b"]
    assert table.rows[0][2:6] == ["2.000 [1.900, 2.100]", "3.000", "900 (batch 8)", "7"]
    assert table.rows[1][6:] == ["2.00 [1.90, 2.10]", "3.00 [2.90, 3.10]"]


def test_nothing_missing_is_said(folder):
    folder.add()
    assert "Nothing" in text(gaps.sections(folder.gathered()))


def test_a_sweeps_report_takes_its_runs_their_teachers_and_baselines_only(folder):
    teacher = folder.add(lr=5e-3)
    other = folder.add(lr=7e-3)
    baseline = folder.add()
    taught = folder.add(teacher=(RESNET8, None), taught_by=teacher, baseline={"run": baseline})
    manifest(folder, [cell(taught)])
    found = {r.name for r in folder.gathered("study").finished}
    assert found == {teacher, baseline, taught}
    assert other in {r.name for r in folder.gathered().finished}


def search(folder: Folder, runs: list[str]) -> None:
    place = folder.path / "searches" / "tune"
    place.mkdir(parents=True)
    states = ["done", "stopped", "failed"]
    rows = [
        {
            "overrides": [f"recipe.lr={10.0**-i}"],
            "run": run,
            "state": state,
            "error": "x" if state == "failed" else None,
        }
        | ({"values": [0.9 + 0.01 * i]} if state != "failed" else {})
        for i, (run, state) in enumerate(zip(runs, states, strict=True), 1)
    ]
    value = {"name": "tune", "command": "c", "objectives": ["val/top1"], "directions": ["maximize"], "importance": {}}
    (place / "search.json").write_text(json.dumps({**value, "total": 3, "trials": rows}))


def test_a_search_marks_trials_stopped_early_and_its_trials_are_no_cells(folder, tmp_path):
    trial = folder.add(lr=5e-3)
    folder.add()
    search(folder, [trial, "b", "c"])
    gathered = folder.gathered()
    assert len(gathered.cells) == 1
    (section,) = trials.sections(gathered, tmp_path)
    assert [r[1] for r in section.tables[0].rows] == ["done", "stopped early", "failed"]
    assert "2 trials finished, 1 of them stopped early" in text([section])
    assert len(section.figures) == 2


def test_the_report_is_written_and_stands_alone(folder, capsys):
    folder.ladder([-0.05, 0.01, 0.02, 0.03, 0.04, 0.05], [0.5, 0.91, 0.93, 0.95, 0.97, 0.99])
    html = report(Settings(runs_dir=str(folder.path), speed="off"))
    content = html.read_text(encoding="utf-8")
    assert "http" not in content.replace("http://www.w3.org", "")
    assert content.count("data:image/svg+xml;base64,") >= 3
    assert 'name="viewport"' in content
    markdown = (html.parent / "report.md").read_text(encoding="utf-8")
    assert "| resnet8 at epoch 6 |" in markdown
    for line in markdown.splitlines():
        if line.startswith("!["):
            assert (html.parent / line.split("](")[1].rstrip(")")).is_file()
    with open(html.parent / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21
    assert float(rows[0]["test/top1"]) > 0.5
    assert "All results" in capsys.readouterr().out


def test_the_report_goes_to_wandb_with_its_plots_and_tables(folder, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder.ladder([0.01] * 5, [0.91, 0.93, 0.95, 0.97, 0.99])
    html = report(Settings(runs_dir=str(folder.path), speed="off", wandb="us/study"))
    assert "wandb sync" in capsys.readouterr().out
    logged = wandb_file.read(*html.parent.glob("wandb/offline-run-*/*.wandb"))
    assert (logged.run.entity, logged.run.project) == ("us", "study")
    kinds = {
        n.removesuffix("._type"): kind for row in logged.history for n, kind in row.items() if n.endswith("._type")
    }
    plots = {f"report/{p.stem}": "image-file" for p in (html.parent / "plots").glob("*.png")}
    assert plots
    assert kinds == {**plots, "report/results": "table-file", "report/page": "html-file"}
    (sent,) = html.parent.glob("wandb/offline-run-*/files/media/html/report/*.html")
    assert sent.read_bytes() == html.read_bytes()


def test_the_same_records_give_the_same_files(folder, tmp_path, capsys):
    folder.ladder([0.01] * 5, [0.91, 0.93, 0.95, 0.97, 0.99])
    pages = []
    for out in ("a", "b"):
        pages.append(report(Settings(runs_dir=str(folder.path), speed="off", out=str(tmp_path / out))).read_bytes())
    assert pages[0] == pages[1]


def test_what_people_typed_is_not_markup(folder):
    folder.add(seed=5, status="failed", error="<script>alert(1)</script> | [bold]x[/bold]")
    sections = gaps.sections(folder.gathered())
    assert "<script>" not in page.to_html(sections, "t")
    assert "\\|" in page.to_markdown(sections, "t", folder.path)
    page.to_console(sections)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["swep=x"], "Did you mean sweep"),
        (["speed=fast"], "expected on or off"),
        (["--verbose"], "expected KEY=VALUE"),
        (["threads=0"], "whole number"),
    ],
)
def test_mistakes_in_settings(arguments, hint):
    with pytest.raises(ValueError, match=hint):
        parse(arguments)


def test_mistakes_end_with_a_message(command_report, tmp_path, folder):
    assert "there is no such folder" in command_report(f"runs_dir={tmp_path / 'nowhere'}")
    assert "there is no run" in command_report(f"runs_dir={folder.path}")
    folder.add()
    manifest(folder, [cell("x")])
    assert "Did you mean study" in command_report(f"runs_dir={folder.path}", "sweep=studi")


@pytest.fixture
def command_report(monkeypatch, capsys):
    def call(*arguments: str) -> str:
        from kd.report.__main__ import main

        monkeypatch.setattr("sys.argv", ["kd.report", *arguments])
        with pytest.raises(SystemExit):
            main()
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    return call
