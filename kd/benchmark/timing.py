"""Timing calls that take turns, so that a slow moment of the machine meets all of them; medians with intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import numpy as np

TURN_SECONDS = (0.02, 0.25)  # least and most of one turn, where a single call is shorter: as long as the longest call's
COLD_SECONDS = 0.1  # a call shorter than this gets its caches back before it counts
WARM_UP = 3  # calls
LEAST_ROUNDS = 10
PATIENCE = 5  # times `seconds`, before an interval that stays wide is accepted
RESAMPLES = 1000


@dataclass
class Times:
    """Seconds of every call, by round."""

    rounds: list[list[float]] = field(default_factory=list)
    total: float = 0.0

    def medians(self) -> np.ndarray:
        """The median call of each round (R,), in seconds."""
        return np.array([np.median(r) for r in self.rounds])

    def calls(self) -> np.ndarray:
        """Every call (N,), in seconds."""
        return np.concatenate([np.asarray(r) for r in self.rounds])

    def median(self) -> tuple[float, float, float]:
        """(median, low, high) of a call, in seconds, with its 95 % interval."""
        return with_interval(self.medians())

    def narrow(self, interval: float) -> bool:
        """Whether the 95 % interval reaches at most this fraction to either side of the median."""
        middle, low, high = self.median()
        return high - low <= 2 * interval * middle


def with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """(median, low, high): the 95 % bootstrap interval of the median of independent values (R,)."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)


def ratio(slow: Times, fast: Times) -> tuple[float, float, float]:
    """(ratio, low, high): how many times longer `slow` takes, round by round, with its 95 % interval."""
    rounds = min(len(slow.rounds), len(fast.rounds))
    return with_interval(slow.medians()[:rounds] / fast.medians()[:rounds])


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    interval: float,
    wait: Callable[[], object] = lambda: None,
    loose: Container[str] = (),
) -> dict[str, Times]:
    """Time each call in turns, for at least `seconds` each, until every interval is narrow or patience ends.

    `wait` returns when the device has done what was asked of it; nobody waits for the intervals of those in `loose`.
    """
    usual = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            usual[name] = _once(call, wait)
    turn = min(
        max(TURN_SECONDS[0], *usual.values()), TURN_SECONDS[1]
    )  # or short calls wait for long ones to fill `seconds`
    found, names, next_look = {name: Times() for name in calls}, list(calls), LEAST_ROUNDS
    while True:
        for name in names:
            _turn(calls[name], wait, found[name], turn, usual[name] < COLD_SECONDS)
        names = names[1:] + names[:1]  # nobody always follows the same neighbour
        rounds, least = len(found[names[0]].rounds), min(t.total for t in found.values())
        if rounds < next_look or least < seconds:
            continue
        if least >= PATIENCE * seconds or all(t.narrow(interval) for n, t in found.items() if n not in loose):
            return found
        next_look = int(1.2 * rounds) + 1  # looking costs a bootstrap


def _once(call: Callable[[], object], wait: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def _turn(call: Callable[[], object], wait: Callable[[], object], times: Times, seconds: float, cold: bool) -> None:
    """Calls, each timed by itself, until the turn is full; after a `cold` start the first does not count."""
    found: list[float] = []
    if cold:
        _once(call, wait)
    spent = 0.0
    while spent < seconds:
        found.append(_once(call, wait))
        spent += found[-1]
    times.rounds.append(found)
    times.total += spent
