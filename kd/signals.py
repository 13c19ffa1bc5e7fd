"""A signal during training is noted, and acted on when the step is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kd.hints import Interrupted


class Stop:
    """`signum` of the signal that came, 0 before."""

    signum = 0


@contextmanager
def noted() -> Iterator[Stop]:
    """Note SIGINT and SIGTERM instead of being stopped by them; a second one interrupts at once."""
    stop = Stop()

    def note(signum, frame):
        if stop.signum:
            raise Interrupted(signum, "interrupted again: the last checkpoint stands")
        stop.signum = signum

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
