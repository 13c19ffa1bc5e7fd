"""Hydra's door to our sweeps and searches: its Sweeper classes, known to it as members of hydra_plugins, the only ones it takes."""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
from omegaconf import DictConfig

NAME = "hydra_plugins.kd"  # of this module in Hydra's eyes


class CellSweeper(Sweeper):
    """Cells times parameters: plans them, runs what is not done, and goes on past a failure."""

    __module__ = NAME

    def __init__(self, params: Any = None, cells: Any = None, max_batch_size: int | None = None):
        self.params, self.cells = dict(params or {}), [dict(c) for c in cells or [{}]]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what launching needs."""
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep with the overrides that the user typed."""
        from kd import sweep

        expanded = sweep.expand(self.params, self.cells, arguments)
        return sweep.run(expanded, arguments, self.config, self.launcher, self.context)


class TrialSweeper(OptunaSweeper):
    """Optuna's sweeper, for which n_trials is the total over all sittings."""

    __module__ = NAME

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the configuration that the study's end needs."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.config = config

    def sweep(self, arguments: list[str]) -> None:
        """Go on to the total, then say what was found."""
        from kd import search

        search.run(self.sweeper, self.config, arguments)


def register() -> None:
    """Make the classes known to Hydra."""
    sys.modules[NAME] = sys.modules[__name__]
    for sweeper in (CellSweeper, TrialSweeper):
        Plugins.instance().register(sweeper)
