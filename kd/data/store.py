"""Decoded once: all images of a data set in one memory-mapped uint8 file that every process and run shares."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.data.decode import BrokenImage, decode, name_of
from kd.data.parallel import map_blocks
from kd.data.source import Source


def open_store(source: Source, digest: str, size: int, store_dir: Path) -> tuple[dict, dict]:
    """({split: images uint8 (N, C, size, size)}, {split: {position: reason}} of broken files), decoded here if need be.

    The file is channels-last and named by content and size; many processes may ask at once, one decodes.
    Raises OSError when `store_dir` cannot be written.
    """
    from filelock import FileLock

    shape = (size, size, source.channels)
    name = hashlib.sha256(f"{digest} {shape}".encode()).hexdigest()[:32]
    data, notes = store_dir / f"{name}.u8", store_dir / f"{name}.json"
    counts = {split: len(items) for split, items in source.splits.items()}
    total = sum(counts.values()) * size * size * source.channels
    if not _complete(data, notes, total):
        store_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{data}.lock"):
            if not _complete(data, notes, total):
                _build(source, shape, data, notes)
    broken = {s: {int(k): v for k, v in found.items()} for s, found in json.loads(notes.read_text()).items()}
    return _map(data, counts, shape, total), broken


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the place, flush to the disk, rename: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _complete(data: Path, notes: Path, total: int) -> bool:
    return data.is_file() and notes.is_file() and data.stat().st_size == total


def _map(data: Path, counts: dict[str, int], shape: tuple[int, int, int], total: int) -> dict[str, Tensor]:
    if total == 0:
        return {split: torch.zeros(0, shape[2], *shape[:2], dtype=torch.uint8) for split in counts}
    # shared=False opens for reading and maps copy-on-write: processes share the pages, none can spoil them
    everything = torch.from_file(str(data), shared=False, size=total, dtype=torch.uint8).view(-1, *shape)
    parts = everything.split(list(counts.values()))
    return {split: part.permute(0, 3, 1, 2) for split, part in zip(counts, parts, strict=True)}


def _build(source: Source, shape: tuple[int, int, int], data: Path, notes: Path) -> None:
    """Under the lock: a leftover of a killed process has the same temporary name, and is written over."""
    temporary, broken = data.with_suffix(".tmp"), {}
    try:
        with open(temporary, "wb") as file:
            for split, items in source.splits.items():
                broken[split] = {}
                for position, row in enumerate(_decoded(items.images, shape)):
                    lost = isinstance(row, BrokenImage)
                    if lost:
                        broken[split][position] = str(row)
                    file.write(bytes(math.prod(shape)) if lost else row)
            file.flush()
            os.fsync(file.fileno())
        write_atomically(notes, json.dumps(broken).encode())
        os.replace(temporary, data)
    finally:
        temporary.unlink(missing_ok=True)


def _decoded(images: Sequence, shape: tuple[int, int, int]) -> Iterator[bytes | BrokenImage]:
    """Each image's pixels as bytes, in order (the decoders release the interpreter's lock)."""
    return itertools.chain.from_iterable(map_blocks(lambda items: [_row(item, shape) for item in items], images))


def _row(item: Any, shape: tuple[int, int, int]) -> bytes | BrokenImage:
    try:
        return decode(item, shape[2], shape[0]).permute(1, 2, 0).contiguous().numpy().tobytes()
    except BrokenImage as error:
        return error


def scan(source: Source, size: int, digest: str, store_dir: Path) -> dict[str, dict[int, str]]:
    """{split: {position: reason}} of the broken files of a set that is too big to store: decodes all, once."""
    notes = store_dir / f"scan-{hashlib.sha256(f'{digest} {size}'.encode()).hexdigest()[:24]}.json"
    if not notes.is_file():
        broken = {}
        for split, items in source.splits.items():
            rows = enumerate(_decoded(items.images, (size, size, source.channels)))
            broken[split] = {position: str(row) for position, row in rows if isinstance(row, BrokenImage)}
        write_atomically(notes, json.dumps(broken).encode())
    return {s: {int(k): v for k, v in found.items()} for s, found in json.loads(notes.read_text()).items()}


def describe(source: Source, broken: dict[str, dict[int, str]]) -> list[str]:
    """`file: reason` of every broken image, in order."""
    return [
        f"{name_of(source.splits[split].images[position], f'{split} image {position}')}: {reason}"
        for split, found in broken.items()
        for position, reason in sorted(found.items())
    ]
