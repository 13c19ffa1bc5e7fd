"""Hugging Face data sets: Parquet from a local path, or any image set of the hub, read by the `datasets` library."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from kd.data.source import Items, Source

_SPLITS = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}


def hub(spec: Mapping) -> Source:
    """`root`: a Parquet file or folder, or a hub name such as uoft-cs/cifar10.

    Where they cannot be guessed, `args` has `config`, `revision`, `channels`, the columns `image` and `label`, and the
    splits `train`, `val`, `test`. No code of a data set's author is run. Raises ValueError or FileNotFoundError naming
    what is missing.
    """
    if not spec.get("root"):
        raise ValueError(
            "dataset=hf needs a Parquet file, a folder or a name on the hub: type dataset.root=NAME_OR_PATH"
        )
    args = dict(spec.get("args") or {})
    parts = _named(_read(str(spec["root"]), args), args, spec)
    first = parts.get("train") or next(iter(parts.values()))
    image, label = _column(first, args, "image", "Image"), _column(first, args, "label", "ClassLabel")
    classes, number = _classes(parts, label)
    splits = {n: Items(_Images(p, image), [number[value] for value in p[label]]) for n, p in parts.items()}
    stamp = repr([(n, p._fingerprint) for n, p in sorted(parts.items())] + [image, label, classes])
    return Source(classes, splits, channels=int(args.get("channels", 3)), stamp=stamp)


class _Images(Sequence):
    """A column of encoded images, read one at a time: bytes, or the path they are in."""

    def __init__(self, part: Any, column: str):
        from datasets import Image

        self.part, self.column = part.select_columns([column]).cast_column(column, Image(decode=False)), column

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, row: int) -> bytes | str:
        found = self.part[row][self.column] or {}
        return found.get("bytes") or found.get("path") or b""


def _read(root: str, args: Mapping) -> Mapping[str, Any]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError("dataset=hf needs the library `datasets`: type pip install 'kd[hf]'") from error
    path = Path(os.path.expanduser(root))
    if path.is_file():
        return datasets.load_dataset("parquet", data_files={"train": str(path)})
    if not path.is_dir() and (path.is_absolute() or root.startswith((".", "~")) or root.endswith(".parquet")):
        raise FileNotFoundError(f"dataset.root={root}: no such file or folder. Type dataset.root=PATH")
    try:
        with _offline_if_unreachable(path.is_dir()):
            name = str(path) if path.is_dir() else root
            return datasets.load_dataset(name, args.get("config"), revision=args.get("revision"))
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"dataset=hf dataset.root={root}: cannot be read ({' '.join(str(error).split())}). "
            "Three ways out: run it once where there is a network; a local Parquet file or folder, dataset.root=PATH; "
            "or dataset=digits, which needs neither"
        ) from error


@contextmanager
def _offline_if_unreachable(local: bool) -> Iterator[None]:
    """Without a network only what the cache has, at once: the library would try five times over half a minute."""
    import datasets
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not local and not getproxies():
        try:
            socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
        except OSError:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _named(parts: Mapping[str, Any], args: Mapping, spec: Mapping) -> dict[str, Any]:
    """Our split names for theirs; an `args.val` and so on that is not there is an error."""
    found = {}
    for ours, usual in _SPLITS.items():
        wanted = args.get(ours)
        if wanted and wanted not in parts:
            raise ValueError(f"dataset.args.{ours}={wanted}: no such split. There are {', '.join(parts)}")
        theirs = wanted or next((name for name in usual if name in parts), None)
        if theirs:
            found[ours] = parts[theirs]
    if spec.get("need_train", True) and "train" not in found:
        raise ValueError(
            f"dataset.root={spec['root']}: no split 'train'. Type dataset.args.train=, one of {', '.join(parts)}"
        )
    return found


def _column(part: Any, args: Mapping, role: str, kind: str) -> str:
    names = list(part.features)
    wanted = args.get(role)
    typed = [name for name in names if type(part.features[name]).__name__ == kind]
    guess = wanted or (typed[0] if len(typed) == 1 else None) or (role if role in names else None)
    if guess not in names:
        raise ValueError(
            f"which column is the {role}? {f'{wanted} is not there. ' if wanted else ''}There are {', '.join(names)}: "
            f"type +dataset.args.{role}=COLUMN"
        )
    return guess


def _classes(parts: Mapping[str, Any], label: str) -> tuple[list[str], dict[Any, int]]:
    """Class names, and each label value's number: the library's own names, or the values in order."""
    feature = next(iter(parts.values())).features[label]
    names = getattr(feature, "names", None)
    if names:
        return list(names), {number: number for number in range(len(names))}
    values = sorted({value for part in parts.values() for value in part[label]})
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}
