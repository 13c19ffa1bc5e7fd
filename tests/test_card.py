"""The model card is a function of the records."""

from __future__ import annotations

import copy

import pytest
import small_runs

from kd import card, runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_runs.make(tmp_path_factory.mktemp("runs"))


def read(run: runs.Run) -> str:
    return (run.folder / "checkpoints" / "best" / "README.md").read_text(encoding="utf-8")


def test_every_finished_run_has_one(made):
    for run in made.values():
        text = read(run)
        assert text.startswith("---\nlibrary_name: kd\n")
        assert run.name in text and run.record["environment"]["device_name"] in text
        assert f"`test/top1` | {100 * run.record['metrics']['test/top1']:.1f} %" in text


def test_a_distilled_one_names_teacher_loss_and_the_student_alone(made):
    text = read(made["distilled"])
    for word in (
        made["teacher"].name,
        made["alone"].name,
        "0.1 ce + 0.9 kd",
        "knowledge-distillation",
        "test/agreement",
    ):
        assert word in text
    assert "labels alone" in read(made["alone"])


def test_the_same_record_gives_the_same_bytes_and_no_clock(made):
    run = made["distilled"]
    before = read(run)
    assert card.write(run).read_text(encoding="utf-8") == before
    for stamp in (run.record["created"], run.record["finished"], str(run.folder.parent)):
        assert stamp not in before


def test_seeds_give_intervals(made):
    record = made["alone"].record
    more = []
    for seed, top1 in enumerate((0.90, 0.92, 0.94)):
        other = copy.deepcopy(record)
        other["config"]["seed"], other["metrics"]["test/top1"] = seed, top1
        more.append(other)
    text = card.text(record, more)
    assert "over 3 seeds" in text
    assert "92.0 % ± 2.0 %, 87.0 % to 97.0 %" in text  # 4.30 * 0.02 / sqrt(3) = 0.0497
    assert "One seed" not in text and "One seed" in card.text(record, [record])


def test_only_runs_that_differ_in_the_seed_count(made):
    assert len(card.seeds_of(made["alone"])) == 1  # the distilled run and the teacher are other settings


@pytest.mark.parametrize(("rate", "low", "high"), [(0.5, 0.4038, 0.5962), (1.0, 0.9630, 1.0), (0.0, 0.0, 0.0370)])
def test_wilson_by_hand(rate, low, high):
    assert card.wilson(rate, 100) == pytest.approx((low, high), abs=1e-4)


def test_a_run_that_chose_on_the_test_split_says_so(made):
    record = copy.deepcopy(made["alone"].record)
    record["config"]["dataset"]["select"] = "test"
    assert "optimistic" in card.text(record, [record])


def test_metrics_that_are_not_finite_are_said(made):
    record = copy.deepcopy(made["alone"].record)
    record["metrics"]["test/nll"] = None
    assert "not finite" in card.text(record, [record])


def test_the_command(made, capsys, tmp_path):
    card.main([str(made["alone"].folder)])
    assert capsys.readouterr().out.strip().endswith("README.md")
    with pytest.raises(SystemExit) as stop:
        card.main([str(tmp_path)])
    assert stop.value.code == 1 and "no run.json" in capsys.readouterr().err


def test_the_card_loads_as_it_says(made):
    from kd import models

    assert models.load(made["alone"].folder / "checkpoints" / "best").num_classes == 10
