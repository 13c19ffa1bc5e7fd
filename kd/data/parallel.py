"""A map over many images by threads, in order, that keeps little in memory."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = min(8, os.cpu_count() or 1)
_BLOCK = 128  # images: enough work for a thread to be worth handing over


def map_blocks(function: Callable[[list], Any], images: Sequence) -> Iterator[Any]:
    """function(list of up to 128 images) for one list after the other, a few ahead of use."""
    waiting, queue = _blocks(images), collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        queue.extend(pool.submit(function, block) for block in itertools.islice(waiting, 2 * THREADS))
        while queue:
            yield queue.popleft().result()
            queue.extend(pool.submit(function, block) for block in itertools.islice(waiting, 1))


def _blocks(images: Sequence) -> Iterator[list]:
    for start in range(0, len(images), _BLOCK):
        yield [images[i] for i in range(start, min(start + _BLOCK, len(images)))]
