"""Reading back what W&B's SDK wrote into a .wandb file: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER, FIRST = 32768, 7, 7
FULL, BEGIN, MIDDLE, END = 1, 2, 3, 4


@dataclass
class Logged:
    """What a run logged."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[tuple[str, str], Any] = field(default_factory=dict)  # by (name, digest)
    exit_code: int | None = None

    def artifact(self, name: str) -> Any:
        """The one artifact of that name."""
        (found,) = [a for (n, _), a in self.artifacts.items() if n == name]
        return found


def records(file: Path) -> Iterator[Any]:
    """Every whole record; a torn tail ends it."""
    from wandb.proto import wandb_internal_pb2 as pb

    data = file.read_bytes()
    assert struct.unpack("<4sHB", data[:FIRST])[:2] == (b":W&B", 0xBEE1)
    at, parts = FIRST, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        piece = data[at + HEADER : at + HEADER + length]
        if kind not in (FULL, BEGIN, MIDDLE, END) or len(piece) < length:
            return
        parts = piece if kind in (FULL, BEGIN) else parts + piece
        at += HEADER + length
        if kind in (FULL, END):
            yield pb.Record.FromString(parts)


def read(*files: Path) -> Logged:
    """What one or more sittings of a run logged."""
    found = Logged()
    for record in (r for file in files for r in records(file)):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            _merge(found.config, record.run.config.update)
        elif kind == "config":
            _merge(found.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _merge(row, record.history.item)
            found.history.append(row)
        elif kind == "summary":
            _merge(found.summary, record.summary.update)
        elif kind == "artifact":
            found.artifacts[record.artifact.name, record.artifact.digest] = record.artifact
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            artifact = record.request.log_artifact.artifact
            found.artifacts[artifact.name, artifact.digest] = artifact
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _merge(into: dict[str, Any], items: Any) -> None:
    for item in items:
        into[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
