"""What does without the import of torch's compiler, 3 to 4 s that an eager run has no use for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def timm() -> None:
    """Import timm and torchvision without the compiler.

    One operator of torchvision (`roi_align`) wants a function of the compiler when it is imported, and calls it on a GPU
    alone; timm marks a few functions as not to be compiled. Both get what asks the compiler when it is called. Where this
    does not work the imports are the usual ones.
    """
    if COMPILER[0] in sys.modules:
        return
    for name in ("torchvision", "timm"):
        if name not in sys.modules:
            _quickly(name)


def _quickly(name: str) -> None:
    try:
        with _without_compiler():
            importlib.import_module(name)
    except Exception:  # one that asks for more: drop the part that came, and let it be imported as it wants to be
        for part in [n for n in sys.modules if n.split(".")[0] == name]:
            del sys.modules[part]


def unmarked(namespace: Any) -> None:
    """Let functions be called without the compiler that torch marks as not to be compiled, a class's or a module's.

    torch imports the compiler at their first call, to mark them, unless the mark is there. It is set here to the function
    itself. A torch that does it otherwise is left as it is.
    """
    import torch

    for function in list(vars(namespace).values()):
        while plain := getattr(function, "__wrapped__", None):
            if getattr(getattr(function, "__code__", None), "co_filename", None) == torch._compile.__file__:
                plain.__dict__.setdefault("__dynamo_disable", plain)
            function = plain  # noqa: PLW2901


@contextmanager
def _without_compiler() -> Iterator[None]:
    import torch

    disable = torch.compiler.disable
    sys.modules.update(_stand_ins())
    torch.compiler.disable = _disable
    try:
        yield
    finally:
        torch.compiler.disable = disable
        for name in COMPILER:
            del sys.modules[name]


def _disable(fn: Callable | None = None, recursive: bool = True, **_: Any) -> Callable:
    import torch

    return torch._disable_dynamo(fn, recursive)  # torch's own way to do it at the first call


def _stand_ins() -> dict[str, ModuleType]:
    """Modules under the compiler's names that hold the one function."""
    package, utils = (ModuleType(name) for name in COMPILER)
    utils.is_compile_supported = _is_compile_supported
    package.utils, package.__path__ = utils, []
    return dict(zip(COMPILER, (package, utils), strict=True))


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device_type)
