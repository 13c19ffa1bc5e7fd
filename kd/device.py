"""The device, its threads and its precision: rules, never stopwatches, so that a command stays the same run."""

from __future__ import annotations

import torch

from kd.hints import ConfigError


def pick_device(wanted: str) -> str:
    """cuda where there is one, else cpu; or the one that was asked for."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={wanted}: torch {torch.__version__} sees no CUDA device here. Type device=cpu or device=auto")
    try:
        return str(torch.device(wanted))
    except RuntimeError as error:
        raise ConfigError(f"device={wanted}: expected auto, cpu, cuda or cuda:N") from error


def set_up(device: str, threads: int | None) -> None:
    """Threads on purpose; deterministic kernels and TF32 off, so that a resumed run is the same run."""
    if threads:
        torch.set_num_threads(threads)
    if device.startswith("cuda"):
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


def resolve_precision(wanted: str, device: str) -> str:
    """`auto` is bf16 (autocast; weights stay float32) where the hardware has it, else fp32."""
    if wanted != "auto":
        return wanted
    return "bf16" if fast_bfloat16(device) else "fp32"
