"""How a method's golden case becomes a term: a registry of adapters and the few helpers that they share.

An adapter takes (inputs, hyperparameters, dtype) and returns {output name: tensor}: `loss`, and those of `loss_<part>`
and the plain values (`z_v1`, ...) that the term can give. Float inputs come in `dtype`; the differentiated ones require
grad, so a projection must hold the very tensors of the case: see `plant`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd.contracts import Batch, Output


@dataclass
class Adapter:
    """A method's function, and what is knowingly not compared."""

    make: Callable[[dict[str, Tensor], dict, torch.dtype], dict[str, Tensor]]
    without: tuple[str, ...] = ()  # golden outputs that no part of the term gives
    chosen: str = ""  # why probes only have to be finite: the term's docstring says what it does there instead
    float32: float = 1e-4  # how far float32 may be from float64, with the reason beside it where it is more


ADAPTERS: dict[str, Adapter] = {}


def adapter(*methods: str, **options):
    """Register the decorated function for these methods; options are those of `Adapter`."""

    def register(make):
        for method in methods:
            ADAPTERS[method] = Adapter(make, **options)
        return make

    return register


def outputs(inputs: dict[str, Tensor], suffix: str = "") -> tuple[Output, Output]:
    """(student, teacher) from `student_logits`, `teacher_logits` and features; feature N is called `stageN+1`.

    A single vector feature (B, D) is called `penultimate`. Missing logits are zeros (B, 2).
    """
    return tuple(_output(inputs, owner, suffix) for owner in ("student", "teacher"))


def _output(inputs: dict[str, Tensor], owner: str, suffix: str) -> Output:
    prefix = f"{owner}_features."
    features = {int(k.removeprefix(prefix)): v for k, v in inputs.items() if k.startswith(prefix)}
    named = {f"stage{n + 1}": v for n, v in features.items()}
    if len(features) == 1 and features[0].dim() == 2:
        named["penultimate"] = features[0]
    any_input = next(v for v in inputs.values() if v.is_floating_point())
    rows = len(next(iter(features.values()))) if features else 1
    logits = inputs.get(f"{owner}_logits{suffix}", any_input.new_zeros(rows, 2))
    return Output(logits, features=named)


def batch(inputs: dict[str, Tensor], epoch: float = 0.0, seed: int = 0) -> Batch:
    """The batch of a case: soft targets win over hard ones, `sample_index` is the index."""
    rows = len(next(v for k, v in inputs.items() if k.startswith("student_")))
    targets = inputs.get("soft_targets", inputs.get("targets", torch.zeros(rows, dtype=torch.int64)))
    index = inputs.get("sample_index", torch.arange(rows))
    return Batch(images=torch.zeros(rows, 1, 1, 1), targets=targets, index=index, epoch=epoch, seed=seed)


def plant(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the places of parameters and buffers, by dotted name, so that gradients flow back to them."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = getattr(owner, leaf)
        if old is not None and old.shape != tensor.shape:
            raise ValueError(f"{name}: the term has {tuple(old.shape)}, the case {tuple(tensor.shape)}")
        if leaf in owner._parameters:
            del owner._parameters[leaf]
            object.__setattr__(owner, leaf, tensor)
        else:
            setattr(owner, leaf, tensor.clone())


def projections(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The case's `proj.*` tensors without that prefix."""
    return {k.removeprefix("proj."): v for k, v in inputs.items() if k.startswith("proj.")}


def run(term: nn.Module, student: Output, teacher: Output, batch: Batch) -> Tensor:
    """The term's scalar in training mode, after no setup of its own."""
    return term.train()(student, teacher, batch)
