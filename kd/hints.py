"""Mistakes of the user, and what they probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right; its text says how. Ends a command with exit code 1."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting that is wrong, unknown or without effect. Ends a command with exit code 2."""

    exit_code = 2


def did_you_mean(given: str, options: Iterable[str]) -> str:
    """` Did you mean a or b?` from the options nearest to what was given; empty where none is near."""
    options = list(options)
    near = difflib.get_close_matches(given, options, n=3, cutoff=0.6)
    last = given.rsplit(".", 1)[-1]
    tails = {o.rsplit(".", 1)[-1]: o for o in reversed(options)}
    near += [tails[t] for t in difflib.get_close_matches(last, tails, n=2, cutoff=0.75) if tails[t] not in near]
    return f" Did you mean {' or '.join(near[:3])}?" if near else ""


class Interrupted(UserError):
    """SIGINT or SIGTERM came; what was done so far is kept. Ends a command with 128 + the signal's number."""

    def __init__(self, signum: int, text: str = "interrupted"):
        super().__init__(text)
        self.signum = signum
