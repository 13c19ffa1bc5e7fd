"""What a search found: its trials, those stopped early, the best settings."""

from __future__ import annotations

from pathlib import Path

from kd.report.pieces import Section
from kd.report.rows import Gathered


def sections(gathered: Gathered, folder: Path) -> list[Section]:
    """One for each search."""
    return []
