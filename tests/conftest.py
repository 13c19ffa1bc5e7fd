"""Every test keeps off the network and out of the home folder, on one thread."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
os.environ.pop("WANDB_API_KEY", None)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls an entry point as typed, in this process: command("train", "teacher=none") -> (exit code, stdout, stderr)."""

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        import importlib

        monkeypatch.setattr(sys, "argv", [f"kd.{name}", *arguments])
        main, code = importlib.import_module(f"kd.{name}").main, 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def tiny(tmp_path):
    """Overrides of a run that takes a second: digits, a narrow resnet8, a few steps, no tracker."""
    return [
        "student=resnet8",
        "student.args.width=4",
        "recipe.batch_size=16",
        "dataset.train_fraction=0.1",
        "tracker=none",
        "threads=1",
        f"runs_dir={tmp_path / 'runs'}",
    ]


@pytest.fixture
def shared() -> Path:
    """The folder of data and weights beside the checkout, where there is one."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared, which is beside the checkout on some machines only")
    return folder
