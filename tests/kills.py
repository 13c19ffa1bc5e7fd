"""Signal 9 for a command that is in the middle of its work."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def stamps(runs_dir: Path) -> dict[str, int]:
    """When each run's record was last written."""
    return {str(p): p.stat().st_mtime_ns for p in runs_dir.glob("*/run.json")}


def kill_amid(call: Sequence[str], runs_dir: Path, seconds: float) -> None:
    """Start a command, and kill it so many seconds after it first writes a run's record; it must still be there."""
    before = stamps(runs_dir)
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while stamps(runs_dir) == before and process.poll() is None:
        time.sleep(0.02)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
