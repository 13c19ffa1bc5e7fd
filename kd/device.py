"""The device, its threads and its precision: rules, never stopwatches, so that a command stays the same run."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd.hints import ConfigError

DENSE = 50  # multiply-accumulates for each number that a layer gives out
SMALL = 20_000_000  # parameters of a network whose kernels are short
PAYS_BACK = {"cpu": 165_000, "cuda": 1_000_000}  # images; the second is a guess


def pick_device(wanted: str) -> str:
    """cuda where there is one, else cpu; or the one that was asked for."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device={wanted}: torch {torch.__version__} sees no CUDA device here. Type device=cpu or device=auto"
        )
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device={wanted}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={wanted}: this machine has {torch.cuda.device_count()} CUDA devices, counted from 0")
    return str(device)


def set_up(device: str, threads: int | None) -> None:
    """Threads on purpose; deterministic kernels and TF32 off, so that a resumed run is the same run."""
    if threads:
        torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware: AMX on a CPU, tensor cores of Ampere and later."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(amx and amx())


def resolve_precision(wanted: str, device: str, network: nn.Module | None = None) -> str:
    """`auto` is bf16 (autocast; weights stay float32) where the device is fast at it and the network gains by it.

    On a GPU every network does. On a CPU those do whose layers work `DENSE` times or more on each number they give out:
    the others wait for memory, and casting costs them more than it saves (docs/performance.md has the measurements).
    """
    if wanted != "auto":
        return wanted
    if not fast_bfloat16(device):
        return "fp32"
    return "bf16" if device.startswith("cuda") or network is None or density(network) >= DENSE else "fp32"


@torch.no_grad()
def density(network: nn.Module) -> float:
    """Multiply-accumulates of a classifier's layers (convolutions and linear ones) for each number that a module gives out."""
    work, numbers = [], []

    def see(module: nn.Module, _inputs: tuple, out: Any) -> None:
        if not torch.is_tensor(out):
            return
        numbers.append(out.numel())
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            each = module.weight.numel() // module.weight.shape[0]
            work.append(out.numel() * each)

    leaves = [m for m in network.modules() if not list(m.children())]
    handles, training = [m.register_forward_hook(see) for m in leaves], network.training
    try:
        network.eval()(example(network))
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return sum(work) / max(1, sum(numbers))


def example(network: nn.Module) -> torch.Tensor:
    """A gray image of the size that a classifier, or the first of an ensemble, was built for."""
    first = network.members[0] if hasattr(network, "members") else network
    shape = (1, first.built["in_channels"], first.image_size, first.image_size)
    return torch.full(shape, 0.5, device=next(network.parameters()).device)


def resolve_compile(wanted: str, device: str, images: int) -> bool:
    """`auto` compiles a run that sees enough images to pay back what compiling costs, where there is what it takes.

    On a CPU, 2 cores, a cold compile takes 44 s and pays back after some 165,000 images. It takes a C++ compiler; on a GPU
    Triton.
    """
    if wanted != "auto":
        return wanted == "on"
    if images < PAYS_BACK["cuda" if device.startswith("cuda") else "cpu"]:
        return False
    if device.startswith("cuda"):
        return importlib.util.find_spec("triton") is not None
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def compiled(classifier: nn.Module, device: str, graphs: bool = True) -> nn.Module:
    """The same classifier, weights shared, whose network is compiled whole at its first call; this one stays as it is.

    On a GPU the kernels of a small network, which would wait for their launches, are replayed as CUDA graphs; not
    without `graphs`: what one call leaves in a graph's memory (gradients that are summed up, a first view's output) the
    next one overwrites.
    """
    twin = copy.copy(classifier)
    small = sum(p.numel() for p in classifier.parameters()) < SMALL
    options = {"mode": "reduce-overhead"} if graphs and device.startswith("cuda") and small else {}
    if hasattr(classifier, "members"):
        twin.__dict__["_modules"] = {
            **twin._modules,
            "members": nn.ModuleList(compiled(m, device, graphs) for m in classifier.members),
        }
    else:
        twin.compile(dynamic=False, **options)
    return twin


def begin_compiling(folder: Path) -> None:
    """Forget what earlier runs of this process compiled (there is a limit), and keep code for later runs in a folder.

    A warm start takes 5 s instead of 44. A folder that the user has named (TORCHINDUCTOR_CACHE_DIR) stays.
    """
    torch.compiler.reset()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve()))
