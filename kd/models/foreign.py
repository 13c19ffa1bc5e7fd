"""Weights that were saved elsewhere: read without running code, renamed where names differ, refused where shapes do."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from kd.models.classifier import Classifier

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "encoder.", "backbone.", "student.")
HEADS = (
    "fc",
    "linear",
    "head",
    "classifier",
    "head.fc",
    "classifier.0",
    "classifier.1",
    "last_linear",
    "output",
    "logits",
)
LITTER = ("num_batches_tracked", "total_ops", "total_params", "n_averaged", "relative_position_index", "attn_mask")


@dataclass
class Report:
    """What became of a file's tensors."""

    path: str
    loaded: int = 0  # tensors
    prefixes: list[str] = field(default_factory=list)  # taken off every name
    renamed: dict[str, str] = field(default_factory=dict)  # theirs -> ours
    ignored: list[str] = field(default_factory=list)  # counters and such that say nothing
    missing: list[str] = field(default_factory=list)  # ours that the file does not have
    unexpected: list[str] = field(default_factory=list)  # theirs that the network does not have
    mismatched: list[str] = field(default_factory=list)  # name: their shape, our shape

    @property
    def exact(self) -> bool:
        """Whether every tensor of the network was filled, and every tensor of the file used."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        """One line for people."""
        parts = [f"{self.loaded} tensors from {self.path}"]
        parts += [f"prefix {''.join(self.prefixes)} taken off"] if self.prefixes else []
        parts += [f"{a} -> {b}" for a, b in self.renamed.items()]
        for word in ("missing", "unexpected", "mismatched"):
            names = getattr(self, word)
            parts += [f"{word}: {some(names)}"] if names else []
        return "; ".join(parts)


def some(names: list[str], count: int = 4) -> str:
    """The first few of a list."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def load_weights(classifier: Classifier, path: str | Path, strict: bool = True) -> Report:
    """Fill a classifier's network from safetensors or a legacy torch file; says what did not match.

    With `strict` everything must match but counters, else ValueError; without, what fits is loaded. Raises
    FileNotFoundError for a missing file, ValueError for a broken one, for one with code in it, and for another
    network's or another data set's.
    """
    path = Path(path)
    report = Report(str(path))
    own = classifier.network.state_dict()
    theirs = rename_head(strip_prefixes(read_tensors(path), own, report), classifier.network, report)
    fitting = sort_out(theirs, own, report)
    if strict and not report.exact:
        raise ValueError(explain(classifier, theirs, own, report))
    classifier.network.load_state_dict(fitting, strict=False)
    report.loaded = len(fitting)
    classifier.origin = {"weights": "file", "source": str(path)}
    classifier.dry_forward()
    return report


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors by name, wrappers such as `state_dict` taken off; a folder means its `model.safetensors`."""
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}. Expected a .safetensors, .pt, .pth or .bin file")
    found = read_safetensors(path) if path.suffix == ".safetensors" else read_legacy(path)
    tensors = unwrap(found)
    if not tensors:
        raise ValueError(f"{path} holds no state dict (names with tensors)")
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; ValueError for a broken one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): the file is broken or was cut off"
        ) from error


def read_legacy(path: Path) -> object:
    """What a torch file holds, tensors and plain data only; ValueError for code, and for a broken file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "weights_only" in str(error).lower():
            raise ValueError(
                f"{path} holds Python objects, not only tensors: reading it would run code from it, so it is refused. "
                f"Save the plain state dict where you trust it: "
                f"safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
            ) from error
        raise ValueError(f"{path} is not a torch file, or was cut off ({str(error)[:120]})") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a torch file, or was cut off ({str(error)[:120]})") from error


def unwrap(found: object) -> dict[str, Tensor]:
    """The state dict inside wrappers such as {'state_dict': ..., 'epoch': ...}."""
    while isinstance(found, Mapping):
        inner = next((found[w] for w in WRAPPERS if isinstance(found.get(w), Mapping)), None)
        if inner is None:
            return {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        found = inner
    return {}


def strip_prefixes(theirs: dict[str, Tensor], own: Mapping[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Take off what wrappers put before every name, unless our own names begin so."""
    while True:
        prefix = next((p for p in PREFIXES if all(k.startswith(p) for k in theirs)), None)
        if prefix is None or all(k.startswith(prefix) for k in own):
            return theirs
        report.prefixes.append(prefix)
        theirs = {k[len(prefix) :]: v for k, v in theirs.items()}


def rename_head(theirs: dict[str, Tensor], network: nn.Module, report: Report) -> dict[str, Tensor]:
    """Give the last layer our name for it: fc, linear, head and classifier mean the same."""
    head = network.get_classifier() if hasattr(network, "get_classifier") else None
    ours = next((n for n, m in network.named_modules() if m is head), None)
    if ours is None or f"{ours}.weight" in theirs:
        return theirs
    other = next((h for h in HEADS if f"{h}.weight" in theirs and theirs[f"{h}.weight"].ndim == 2), None)
    if other is None:
        return theirs
    report.renamed[other] = ours
    return {
        f"{ours}{k[len(other) :]}" if k in (f"{other}.weight", f"{other}.bias") else k: v for k, v in theirs.items()
    }


def sort_out(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor], report: Report) -> dict[str, Tensor]:
    """The tensors that fit; the others are written into the report."""
    fitting = {}
    for name, tensor in theirs.items():
        if name not in own:
            (report.ignored if name.endswith(LITTER) else report.unexpected).append(name)
        elif tensor.shape != own[name].shape:
            report.mismatched.append(
                f"{name}: {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the network"
            )
        else:
            fitting[name] = tensor
    report.missing = [n for n in own if n not in theirs and not n.endswith(LITTER)]
    return fitting


def explain(classifier: Classifier, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor], report: Report) -> str:
    """Why a file does not fit: another number of classes, else another network."""
    head = classifier.network.get_classifier() if hasattr(classifier.network, "get_classifier") else None
    name = next((n for n, m in classifier.network.named_modules() if m is head), None)
    heads = {f"{name}.weight", f"{name}.bias"}
    if (
        report.mismatched
        and all(m.split(":")[0] in heads for m in report.mismatched)
        and not (report.missing or report.unexpected)
    ):
        count = theirs[f"{name}.weight"].shape[0]
        return (
            f"{report.path} has {count} classes, the data set has {classifier.num_classes}: its head does not fit. "
            f"Give weights that were trained on this data set's classes"
        )
    lines = [f"{report.path} is not a {classifier.name}:"]
    lines += [f"it lacks {some(report.missing)} ({len(report.missing)} of {len(own)});"] if report.missing else []
    lines += [f"it has {some(report.unexpected)}, which the network has not;"] if report.unexpected else []
    lines += [f"other shapes: {some(report.mismatched)};"] if report.mismatched else []
    return " ".join([*lines, "give weights of this network, or choose the network that they are of"])
