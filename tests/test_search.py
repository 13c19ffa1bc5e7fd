"""Searches: totals, kills, failures, early stops, objectives, and the settings they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kills import kill_amid

from kd import compose, runs, search
from kd.config import Config
from kd.hints import UserError

optuna = pytest.importorskip("optuna")

YAML = """\
# @package _global_
defaults:
  - override /hydra/sweeper: optuna
  - override /teacher: none
  - _self_
sweep_name: small
hydra:
  mode: MULTIRUN
  sweeper:
    direction: maximize
    n_trials: 3
    sampler: {{seed: 0, n_startup_trials: 2}}
    params: {params}
"""


@pytest.fixture
def small(tiny, tmp_path):
    """Arguments of a search of three short trials, and the runs_dir; `params` of its YAML can be given."""

    def write(params: str = "{recipe.lr: 'tag(log, interval(1e-4, 1e-2))'}") -> list[str]:
        folder = tmp_path / "conf" / "search"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "small.yaml").write_text(YAML.format(params=params))
        return [f"--config-dir={tmp_path / 'conf'}", "+search=small", *tiny, "recipe.epochs=1", "baseline=off"]

    return write


def study(tmp_path: Path):
    storage = f"sqlite:///{tmp_path / 'runs' / 'searches' / 'small' / 'study.db'}"
    return optuna.load_study(study_name="small", storage=storage)


def written(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "runs" / "searches" / "small" / "search.json").read_text(encoding="utf-8"))


def test_the_number_of_trials_is_a_total_and_points_differ(command, small, tmp_path):
    code, out, _ = command("train", *small(), "hydra.sweeper.n_trials=2")
    assert code == 0, out
    assert "0 of 2 trials there" in out
    code, out, _ = command("train", *small(), "hydra.sweeper.n_trials=3")
    assert (code, "2 of 3 trials there" in out) == (0, True)
    assert command("train", *small(), "hydra.sweeper.n_trials=3")[0] == 0
    rates = [t.params["recipe.lr"] for t in study(tmp_path).trials]
    assert len(set(rates)) == len(rates) == 3
    rows = written(tmp_path)["trials"]
    assert [r["state"] for r in rows] == ["done"] * 3
    assert all((tmp_path / "runs" / r["run"] / "run.json").is_file() for r in rows)


def test_the_best_settings_are_an_experiment_that_is_the_trial(command, small, tmp_path):
    assert command("train", *small(), "hydra.sweeper.n_trials=2")[0] == 0
    best = study(tmp_path).best_trial
    folder = tmp_path / "runs" / "searches" / "small"
    cfg = compose("+experiment=small_best", "tracker=none", config_dir=folder)
    assert cfg.recipe.lr == best.params["recipe.lr"]
    assert (cfg.teacher.name, cfg.student.args["width"], cfg.dataset.train_fraction) == ("none", 4, 0.1)
    before = len(runs.records(tmp_path / "runs"))
    typed = ["tracker=none", "threads=1", f"runs_dir={tmp_path / 'runs'}"]
    code, out, _ = command("train", f"--config-dir={folder}", "+experiment=small_best", *typed)
    assert (code, "done already" in out) == (0, True)
    assert len(runs.records(tmp_path / "runs")) == before
    assert (folder / "plots" / "history.png").is_file()


def test_failed_and_diverged_trials_are_told_and_the_search_goes_on(command, small, tmp_path):
    params = "{recipe.lr: 'choice(1e30, 1e-3)', seed: 'range(0, 50)'}"
    code, _, err = command("train", *small(params), "recipe.optimizer=sgd", "hydra.sweeper.n_trials=4")
    assert code == 0, err
    states = {t.state.name for t in study(tmp_path).trials}
    assert states == {"COMPLETE", "FAIL"}
    assert len(study(tmp_path).trials) == 4
    failed = [r for r in written(tmp_path)["trials"] if r["state"] == "failed"]
    assert failed
    assert all("diverged" in r["error"] for r in failed)


def test_all_failed_is_an_error_with_reasons(command, small, tmp_path):
    code, _, err = command("train", *small(), "recipe.lr=1e30", "recipe.optimizer=sgd", "hydra.sweeper.n_trials=2")
    assert code == 1
    assert "no trial finished" in err
    assert "Traceback" not in err


def test_an_unknown_objective_is_named_with_what_was_logged(command, small):
    code, _, err = command("train", *small(), "objective=val/acc", "hydra.sweeper.n_trials=1")
    assert code == 1
    assert "objective 'val/acc' was never logged" in err
    assert "val/top1" in err


def test_the_wrong_direction_and_the_test_set_are_refused(command, small):
    code, _, err = command("train", *small(), "hydra.sweeper.direction=minimize")
    assert (code, "hydra.sweeper.direction=maximize" in err) == (2, True)
    code, _, err = command("train", *small(), "objective=test/top1")
    assert (code, "objective=val/top1" in err) == (2, True)


def test_two_objectives_give_a_front(command, small, tmp_path):
    two = ["objective=[val/top1,efficiency/latency_ms]", "hydra.sweeper.direction=[maximize,minimize]"]
    code, _, err = command("train", *small("{student.args.depth: 'choice(8, 14)'}"), *two, "hydra.sweeper.n_trials=2")
    assert code == 0, err
    assert all(len(t.values) == 2 for t in study(tmp_path).best_trials)
    assert (tmp_path / "runs" / "searches" / "small" / "plots" / "front.png").is_file()


def fake(folder: Path, name: str, values: list[float], status: str = "done") -> None:
    """A finished trial of the search `s` with a validation curve."""
    place = folder / name
    place.mkdir(parents=True)
    (place / "run.json").write_text(json.dumps({"status": status, "sweep": "s"}))
    lines = [json.dumps({"step": i, "epoch": i + 1, "val/top1": v}) for i, v in enumerate(values)]
    (place / "metrics.jsonl").write_text("\n".join([*lines, '{"torn']))


def settings(folder: Path, **changed) -> Config:
    cfg = Config(runs_dir=str(folder), sweep_name="s", give_up="median", **changed)
    cfg.recipe.epochs = 5
    return cfg


def rows(values: list[float]) -> list[dict]:
    return [{"epoch": i + 1, "val/top1": v} for i, v in enumerate(values)]


def test_the_median_rule(tmp_path):
    for at in range(4):
        fake(tmp_path, f"r{at}", [0.1 * at, 0.2 * at, 0.3 * at])  # at epoch 2 the median is 0.3
    hopeless = search.give_up(settings(tmp_path))
    assert [hopeless(r) for r in rows([0.16, 0.29])] == [False, True]
    hopeless = search.give_up(settings(tmp_path))
    assert [hopeless(r) for r in rows([0.35, 0.1])] == [False, False], "its best so far counts"
    assert not hopeless({"epoch": 9, "val/top1": 0.0}), "no finished trial came so far"
    assert not hopeless({"epoch": 2}), "no validation in this epoch"


def test_the_median_rule_needs_four_finished_trials(tmp_path):
    for at in range(4):
        fake(tmp_path, f"r{at}", [0.9, 0.9], status="done" if at else "stopped")
    assert not search.give_up(settings(tmp_path))({"epoch": 2, "val/top1": 0.0})


def test_the_median_rule_is_for_one_validation_metric_of_a_search(tmp_path):
    for at in range(4):
        fake(tmp_path, f"r{at}", [0.9, 0.9])
    row = {"epoch": 2, "val/top1": 0.0}
    assert search.give_up(settings(tmp_path))(row)
    off, two, other = settings(tmp_path), settings(tmp_path), settings(tmp_path)
    off.give_up, two.objective, other.sweep_name = "off", ["val/top1", "efficiency/latency_ms"], "t"
    assert not any(search.give_up(cfg)(row) for cfg in (off, two, other))


def test_a_trial_stopped_early_keeps_its_value_and_can_go_on(command, tiny, tmp_path):
    for at in range(4):
        fake(tmp_path / "runs", f"r{at}", [1.0, 1.0, 1.0])
    arguments = [*tiny, "teacher=none", "recipe.epochs=3", "baseline=off"]
    code, out, _ = command("train", *arguments, "sweep_name=s", "give_up=median")
    assert (code, "stopped early at epoch 1 of 3" in out) == (0, True)
    (stopped,) = [r for r in runs.records(tmp_path / "runs") if r.status == "stopped"]
    assert set(stopped.record["metrics"]) == {"val/top1", "val/nll"}
    code, out, _ = command("train", *arguments)
    assert (code, "going on from step" in out) == (0, True)
    assert runs.Run(stopped.folder).done


def test_difference_of_settings():
    assert search.difference({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 0}}) == {"a": {"c": 2}, "d": 3}


def test_two_processes_on_one_search_keep_each_others_rows(tmp_path):
    one, other = (object.__new__(search.Search) for _ in range(2))
    for sitting, process in (("a", one), ("b", other)):
        process.path, process.folder, process.name, process.command = tmp_path / "search.json", tmp_path, "s", ""
        process.sitting, process.mine, process.total = sitting, [], 9
        process.objectives, process.directions = ["val/top1"], ["maximize"]
    for number, process in enumerate((one, other, one)):
        process.mine.append({"run": f"r{number}", "state": "running", "sitting": process.sitting})
        process.write()
    one.mine[0]["state"] = "done"
    one.write()
    found = json.loads(one.path.read_text())
    assert found["total"] == 9
    assert {r["run"]: r["state"] for r in found["trials"]} == {"r0": "done", "r1": "running", "r2": "running"}


def test_objective_must_be_finite(tmp_path):
    run = runs.Run(tmp_path)
    run.record = {"metrics": {"val/top1": None}}
    with pytest.raises(UserError, match="not a finite number"):
        search.objective(Config(), run)


@pytest.mark.slow
def test_killed_three_times_it_comes_to_its_total(small, tmp_path):
    call = [sys.executable, "-m", "kd.train", *small(), "recipe.epochs=4", "hydra.sweeper.n_trials=12"]
    for seconds in (0.1, 1.0, 2.0):
        kill_amid(call, tmp_path / "runs", seconds)
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trials = study(tmp_path).trials
    finished = [t for t in trials if t.state.name == "COMPLETE"]
    assert len(finished) == 12
    assert not [t for t in trials if t.state.name == "RUNNING"]
    points = [t.params["recipe.lr"] for t in trials if t.params]
    assert len(set(points)) == len(points)
