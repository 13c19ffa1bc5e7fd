"""Files that are whole or not there: written beside their place, flushed, and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file with this text, or leave it as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by readable JSON; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def digest(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def write_folder(folder: Path, fill: Callable[[Path], None], previous: Path | None = None) -> None:
    """Replace `folder` by one that `fill` writes, with sha256.json over its files; the old one becomes `previous`."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        write_json(part / "sha256.json", {p.name: digest(p) for p in sorted(part.iterdir())})
        for path in part.iterdir():
            flush(path)
        _swap(part, folder, previous)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _swap(part: Path, folder: Path, previous: Path | None) -> None:
    if folder.exists():
        if previous is None:
            previous = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(part, folder)
    flush(folder.parent)
    if previous is not None and previous.name.startswith("."):
        shutil.rmtree(previous, ignore_errors=True)


def flush(path: Path) -> None:
    """Put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def broken_files(folder: Path) -> list[str]:
    """What in a folder differs from its sha256.json; the list itself when that is missing or unreadable."""
    try:
        wanted = json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["sha256.json"]
    return [n for n, value in wanted.items() if not (folder / n).is_file() or digest(folder / n) != value]
